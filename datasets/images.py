"""Image files and arrays: find them, decode them, squeeze them to a square."""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from datasets.dicom import DICOM_SUFFIXES, has_dicom_prefix, open_dicom, read_header
from utils.cli import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# values in one array; Pillow has a limit of its own for files
MAX_VALUES = 2**24


def list_files(folder):
    """List the files at any depth below a folder by path, without hidden ones."""

    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable")

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse if folder.exists() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files, key=Path.as_posix)


def is_dicom(path):
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or suffix not in IMAGE_SUFFIXES and has_dicom_prefix(path)


def is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path)


def list_images(folder):
    return [path for path in list_files(folder) if is_image(path)]


def printable(name):
    """Convert a file name to text that can be printed as UTF-8, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_image(path, grayscale=False):
    """Decode an image file, turned upright by its EXIF tag: uint8 [H, W, C], C = 1 or 3.

    Raises ValueError for pixels of 32 bits, whose range is unknown, and for a huge image.
    """
    try:
        opened = open_dicom(path) if is_dicom(path) else Image.open(path)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))[0]
        raise ValueError(f"{pixels} pixels are too many; shrink it, or cut it into tiles") from None
    with opened as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":
            # convert() would clip 16-bit pixels, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of 32 bits (mode {image.mode}); save it with 8 or 16 bits")
        pixels = np.asarray(image.convert("L" if grayscale else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def squeeze(pixels, side):
    """Resize uint8 [H, W, C] to a square [side, side, C] (bicubic, antialiased)."""
    if pixels.shape[:2] == (side, side):
        return pixels
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).reshape(side, side, -1)


def describe_enlargement(stored, size):
    """Describe the cost of enlarging stored images for the network: [] or one line."""
    # small inputs cost little
    if stored >= size or size <= 64:
        return []
    return [
        f"images are enlarged from {stored} to {size} pixels for the network; --size {stored} "
        f"takes {(size / stored) ** 2:.3g} times less work"
    ]


def as_array(image):
    """Return an array, or an .npy file [C, H, W] mapped, as [H, W, C]; None for other files."""
    if isinstance(image, np.ndarray):
        return image
    if image.suffix.lower() != ".npy":
        return None
    array = np.load(image, mmap_mode="r", allow_pickle=False)
    if array.ndim != 3:
        raise ValueError(f"an array {list(array.shape)}, not [C, H, W]")
    return array.transpose(1, 2, 0)


def image_size(image):
    """Read both sides of an image from its header."""
    array = as_array(image)
    if array is None and is_dicom(image):
        return read_header(image).size
    if array is None:
        with Image.open(image) as opened:
            return opened.size
    if array.size > MAX_VALUES:
        raise ValueError(f"{' x '.join(map(str, array.shape))} values are too many for an image")
    return array.shape[:2]


def decode(image, channels, truncated):
    """Decode an entry of Source.images: (uint8 [H, W, channels], whether its file is truncated).

    A truncated file is read as far as possible if `truncated`. Raises errors of Pillow and numpy
    for a damaged file, ValueError for other values.
    """
    array = as_array(image)
    if array is not None:
        image_size(array)
        if array.shape[2] != channels:
            raise ValueError(f"{array.shape[2]} channels; the first image has {channels}")
        if array.dtype == np.uint8:
            return array, False
        # NaN fails both comparisons
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{array.dtype} values outside 0 to 1; scale them, or save uint8")
        return np.rint(array * 255).astype(np.uint8), False
    try:
        return read_image(image, grayscale=channels == 1), False
    except OSError:
        if not truncated:
            raise
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        return read_image(image, grayscale=channels == 1), True
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
