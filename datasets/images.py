"""Image files and arrays: found, decoded, squeezed to a square."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from utils.cli import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
LARGEST = 2**24  # values in one image that is an array; Pillow has its own limit for files


def list_images(folder, suffixes=IMAGE_SUFFIXES):
    """Files of images at any depth below a folder, sorted by path; hidden files and folders are skipped."""

    def closed(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable")

    found = []
    for place, folders, files in os.walk(folder, onerror=closed if folder.exists() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found, key=lambda path: path.as_posix())


def printable(name):
    """A file name that can be printed and written as UTF-8, whatever bytes the disk has."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_image(path, grayscale=False):
    """Decode an image file with Pillow, turned upright by its EXIF tag. Returns uint8 [H, W, C], C = 1 or 3."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":
            image = Image.fromarray(
                (np.asarray(image) >> 8).astype(np.uint8)
            )  # 16-bit grey: convert() would clip, not scale
        if image.mode in ("I", "F"):
            raise ValueError(
                f"pixels of 32 bits (mode {image.mode}), whose range is not known; save it with 8 or 16 bits"
            )
        pixels = np.asarray(image.convert("L" if grayscale else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def squeeze(pixels, side):
    """Resize uint8 [H, W, C] to a square [side, side, C], whatever its aspect ratio (bicubic, antialiased)."""
    if pixels.shape[:2] == (side, side):
        return pixels
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).reshape(side, side, -1)


def as_array(image):
    """An entry of Source.images as an array [H, W, C] where it is one, or an .npy [C, H, W] (mapped, not read); None where it is an image file."""
    if isinstance(image, np.ndarray):
        return image
    if image.suffix.lower() != ".npy":
        return None
    array = np.load(image, mmap_mode="r", allow_pickle=False)
    if array.ndim != 3:
        raise ValueError(f"an array {list(array.shape)}, not [C, H, W]")
    return array.transpose(1, 2, 0)


def image_size(image):
    """Both sides of an entry of Source.images, from its header. ValueError where it declares more than any image has."""
    array = as_array(image)
    if array is None:
        with Image.open(image) as opened:
            return opened.size
    if array.size > LARGEST:
        raise ValueError(f"{' x '.join(map(str, array.shape))} values are too many for an image")
    return array.shape[:2]


def decode(image, channels, truncated):
    """An entry of Source.images as uint8 [H, W, channels], and whether its file is truncated; one that is, is an error unless `truncated`.

    Errors are Pillow's, numpy's, or a ValueError with the reason.
    """
    array = as_array(image)
    if array is not None:
        image_size(array)
        if array.shape[2] != channels:
            raise ValueError(f"{array.shape[2]} channels; the first image has {channels}")
        if array.dtype == np.uint8:
            return array, False
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise ValueError(
                f"{array.dtype} values that are not all between 0 and 1; scale them, or save uint8"
            )
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
