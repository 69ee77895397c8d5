"""Any .npz file of MedMNIST's layout: two groups of its classes, with its own splits."""

import math
import re
import zipfile
import zlib
from pathlib import Path

import medmnist
import numpy as np

from datasets.images import LARGEST
from datasets.source import SPLITS, Source, binary_labels
from utils.cli import UserError
from utils.files import sha256


def load(args):
    """Any file of MedMNIST's layout: two groups of its classes, with its own splits."""
    path = Path(args.data_root)
    if path.is_dir():
        there = ", ".join(sorted(f.name for f in path.glob("*.npz"))) or "none"
        raise UserError(
            f"--data-root {path}: npz takes the file itself, not its folder; .npz files there: {there}"
        )
    if not path.exists():
        raise UserError(
            f"--data-root {path}: no such file; give one with train_images, train_labels, val_images, ... as on medmnist.com"
        )
    return npz_source(args, path)


def npz_source(args, path):
    named = medmnist.INFO.get(re.sub(r"_\d+$", "", path.stem), {"label": {}})[
        "label"
    ]  # of MedMNIST's own files: {"0": "malignant", ...}
    labels, picks, split, side = [], [], [], None
    try:
        with zipfile.ZipFile(path) as archive:
            for part in SPLITS:
                shape = npz_header(archive, f"{part}_images")[0]
                if (
                    picks
                    and shape[1:] != side
                    or len(shape) not in (3, 4)
                    or shape[3:] not in ((), (1,), (3,))
                    or math.prod(shape[1:]) > LARGEST
                ):
                    raise ValueError(
                        f"{part}_images are {list(shape)}, not [N, H, W] or [N, H, W, 3] of one size"
                    )
                side = shape[1:]
                labels.append(npz_labels(archive, f"{part}_labels", shape[0]))
                picks += [(f"{part}_images", row) for row in range(shape[0])]
                split += [part] * shape[0]
        labels = np.concatenate(labels)
        strange = (
            set(np.unique(labels)) - {int(label) for label in named}
            if named and labels.ndim == 1
            else ()
        )
        if strange:
            raise ValueError(f"holds class {min(strange)}")
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # a damaged npz fails in zipfile, zlib, numpy or here; all of them mean the same
        raise UserError(
            f"{path}: damaged, or not of MedMNIST's layout ({type(error).__name__}: {error}); "
            "move it away and fetch it again"
        ) from None
    group, classes, minority, notes = binary_labels(
        labels, args.minority, args.majority, path, named
    )
    kept = np.flatnonzero(group >= 0)
    picks, channels = [picks[i] for i in kept], (*side, 1)[2]
    names = [f"{path.name}/{member.removesuffix('_images')}/{row}" for member, row in picks]
    return Source(
        NpzImages(path, picks),
        names,
        group[kept],
        np.array(split)[kept],
        classes,
        sha256(path),
        args.size or max(side[:2]),
        "medical" if channels == 1 else "natural",
        channels,
        args.store_size,
        max(side[:2]),
        minority,
        notes=notes,
    )


def npz_header(archive, name):
    """(shape, offset of the data) of an array in an open .npz. ValueError unless it is of whole numbers, in C order and as long as it says."""
    with archive.open(f"{name}.npy") as file:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read(file)
        offset = file.tell()
    if fortran or not (dtype == np.uint8 or dtype.kind in "biu" and name.endswith("labels")):
        raise ValueError(f"{name} are {dtype}")
    if offset + dtype.itemsize * math.prod(shape) != archive.getinfo(f"{name}.npy").file_size:
        raise ValueError(f"{name} are not as many as declared")
    return shape, offset


def npz_labels(archive, name, n):
    """The labels of n images: int [n], or [n, K] of 0 and 1 where each may have any of K findings."""
    shape, _ = npz_header(archive, name)
    if shape[:1] != (n,) or len(shape) > 2:
        raise ValueError(f"{name} are {list(shape)} for {n} images")
    with archive.open(f"{name}.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False).astype(np.int64)
    if labels.ndim == 2 and shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{name} of {shape[1]} findings are not all 0 or 1")
    return labels[:, 0] if shape[1:] == (1,) else labels


class NpzImages:
    """Images of an .npz, read forward from the archive as they are asked for: 13 GB of them need no 13 GB of memory."""

    def __init__(self, path, picks):
        """picks: [(member, row)] in the order of the archive."""
        self.path, self.picks, self.member = path, picks, None

    def __len__(self):
        return len(self.picks)

    def __getitem__(self, wanted):  # a slice -> list of uint8 [H, W, C]
        try:
            return [self._read(member, row) for member, row in self.picks[wanted]]
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise UserError(
                f"{self.path}: damaged ({type(error).__name__}: {error}); move it away and fetch it again"
            ) from None

    def _read(self, member, row):
        if member != self.member:
            archive = zipfile.ZipFile(self.path)
            self.shape, self.offset = npz_header(archive, member)
            self.file, self.member = archive.open(f"{member}.npy"), member
        size = math.prod(self.shape[1:])
        self.file.seek(self.offset + row * size)
        return np.frombuffer(self.file.read(size), dtype=np.uint8).reshape(*self.shape[1:3], -1)
