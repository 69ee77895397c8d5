"""DICOM files as 8-bit pictures, with pydicom, which is optional."""

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.cli import UserError

DICOM_SUFFIXES = (".dcm", ".dicom")


@dataclass
class Header:
    """What a DICOM file says of its image."""

    patient: str  # PatientID, "" where it is empty
    size: tuple  # width, height
    is_gray: bool


def has_dicom_prefix(path):
    """Return whether a file has DICOM's four letters at byte 128; exports often have no suffix."""
    try:
        with open(path, "rb") as file:
            file.seek(128)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def require_pydicom(paths):
    """Raise UserError if there are DICOM files, but no package that reads them."""
    if paths and importlib.util.find_spec("pydicom") is None:
        raise UserError(
            f"{paths[0]}: {len(paths)} DICOM files need the package pydicom; "
            "install it with pip install pydicom"
        )


def read_dataset(path, **options):
    """Read a DICOM file without pydicom's warnings on unusual values."""
    require_pydicom([path])
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pydicom.dcmread(path, **options)
        except pydicom.errors.InvalidDicomError:
            raise ValueError("not a DICOM file") from None


def read_header(path):
    """Read the Header of a DICOM file."""
    dataset = read_dataset(path, stop_before_pixels=True)
    return Header(
        patient=str(dataset.get("PatientID") or "").strip(),
        size=(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0)),
        is_gray=str(dataset.get("PhotometricInterpretation")).startswith("MONOCHROME"),
    )


def read_headers(paths):
    """Read the headers of DICOM files; an unreadable one counts as a patient of its own."""
    require_pydicom(paths)
    headers = []
    for path in paths:
        try:
            headers.append(read_header(path))
        except Exception:  # an unreadable image is reported by name when it is decoded
            headers.append(Header(str(path), (0, 0), is_gray=True))
    return headers


def open_dicom(path):
    """Decode a DICOM file as a Pillow image of mode L or RGB.

    Grey values are rescaled (slope and intercept), cut to the first window, or to the range of the
    image where the file has no window, and inverted for MONOCHROME1.
    Raises ValueError for several frames, for no pixels, and for colours of more than 8 bits.
    """
    dataset = read_dataset(path)
    if "PixelData" not in dataset:
        raise ValueError("a DICOM file without pixels")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"a DICOM file of {frames} frames; save each frame as an image of its own")
    from pydicom.pixels import pixel_array

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels, kind = pixel_array(dataset), str(dataset.PhotometricInterpretation)
        if kind.startswith("MONOCHROME"):
            return Image.fromarray(scale_gray(pixels, dataset, is_inverted=kind == "MONOCHROME1"))
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(f"DICOM colours {kind}, {dataset.BitsStored} bits; save it as PNG")
    return Image.fromarray(pixels)


def scale_gray(pixels, dataset, is_inverted):
    """Scale stored values [H, W] to uint8 by the modality transform and the first window."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    x = apply_modality_lut(pixels, dataset).astype(np.float64)
    if dataset.get("WindowWidth"):
        # what is far below and above the window gives the range of its output
        low, high = apply_windowing(np.array([-1e9, 1e9]), dataset)
        x = apply_windowing(x, dataset)
    else:
        low, high = x.min(), x.max()
    x = (x - low) / max(high - low, 1e-9)
    return np.rint(255 * (1 - x if is_inverted else x)).astype(np.uint8)
