"""Any .npz file of MedMNIST's layout: two groups of its classes, with its own splits."""

import math
import re
import zipfile
import zlib
from pathlib import Path

import medmnist
import numpy as np

from datasets.images import MAX_VALUES
from datasets.source import SPLITS, Source, binary_labels, ordered_labels
from utils.cli import UserError
from utils.files import sha256


def load(args):
    """Load the file that --data-root names."""
    path = Path(args.data_root)
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in path.glob("*.npz"))) or "none"
        raise UserError(
            f"--data-root {path}: no such file; npz needs one with train_images, train_labels, "
            f"val_images, ... (.npz files in this folder: {found})"
        )
    return npz_source(args, path)


def npz_source(args, path):
    """Make a Source of an .npz file; only headers and labels are read."""
    try:
        picks, labels, shape = read_layout(path)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and numpy report a damaged file in many ways
        raise damaged(path, error) from None
    # MedMNIST's package names the classes of its own files: {"0": "malignant", ...}
    info = medmnist.INFO.get(re.sub(r"_\d+$", "", path.stem), {"label": {}})
    if args.classes:
        labels, fields = ordered_labels(labels, args, info["label"])
    else:
        labels, fields = binary_labels(labels, args.minority, args.majority, info["label"], path)
    picks = [pick for pick, label in zip(picks, labels, strict=True) if label >= 0]
    return Source(
        images=NpzImages(path, picks),
        names=[f"{path.name}/{split}/{row}" for split, row in picks],
        labels=labels[labels >= 0],
        split=np.array([split for split, _ in picks]),
        digest=sha256(path),
        channels=(*shape, 1)[2],
        side=max(shape[:2]),
        **fields,
    )


def read_layout(path):
    """Read the layout of a file: [(split, row)] of its images, their labels, their shape.

    Labels are int [M], or 0 and 1 in [M, K] where an image may have any of K findings. Raises
    ValueError unless images are uint8 [N, H, W] or [N, H, W, 3] of one size.
    """
    picks, labels, shapes = [], [], set()
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        for split in SPLITS:
            (n, *shape), _ = read_header(archive, f"{split}_images.npy")
            shapes.add(tuple(shape))
            picks += [(split, row) for row in range(n)]
            labels.append(arrays[f"{split}_labels"].reshape(n, -1).astype(np.int64))
    if len(shapes) > 1 or len(shape) not in (2, 3) or shape[2:] not in ([], [1], [3]):
        raise ValueError(f"images {shapes}, not [N, H, W] or [N, H, W, 3] of one size")
    if not 0 < math.prod(shape) <= MAX_VALUES:
        raise ValueError(f"images {shape}")
    labels = np.concatenate(labels)
    if labels.shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels of {labels.shape[1]} findings are not all 0 or 1")
    return picks, labels[:, 0] if labels.shape[1] == 1 else labels, shape


def read_header(archive, name):
    """Read (shape, offset of the values) of a uint8 array in an open .npz file."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        readers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran, dtype = readers[version[0] - 1](file)
        offset = file.tell()
    if fortran or dtype != np.uint8 or offset + math.prod(shape) != archive.getinfo(name).file_size:
        raise ValueError(f"{name} is no complete array of bytes")
    return shape, offset


def damaged(path, error):
    return UserError(
        f"{path}: damaged, or not of MedMNIST's layout ({type(error).__name__}: {error}); "
        "fetch it again"
    )


class NpzImages:
    """Images of an .npz file, read from the archive when asked for: 13 GB need no memory."""

    def __init__(self, path, picks):
        """picks: [(split, row)], in the order of the archive."""
        self.path, self.picks, self.split = path, picks, None

    def __len__(self):
        return len(self.picks)

    def __getitem__(self, wanted):
        """Read the images of a slice: a list of uint8 [H, W, C]."""
        try:
            return [self._read(split, row) for split, row in self.picks[wanted]]
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise damaged(self.path, error) from None

    def _read(self, split, row):
        if split != self.split:
            archive, name = zipfile.ZipFile(self.path), f"{split}_images.npy"
            self.shape, self.offset = read_header(archive, name)
            self.file, self.split = archive.open(name), split
        size = math.prod(self.shape[1:])
        self.file.seek(self.offset + row * size)
        return np.frombuffer(self.file.read(size), dtype=np.uint8).reshape(*self.shape[1:3], -1)
