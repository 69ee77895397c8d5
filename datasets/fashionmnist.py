"""Two groups of Fashion-MNIST's classes, from its four files."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from datasets.source import Source, binary_labels, draw_splits
from utils.cli import UserError

FASHION = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load(args):
    """Two groups of Fashion-MNIST's classes, from its four files; shirts against T-shirts, pullovers and coats. 10 % of train become val."""
    root = Path(args.data_root)
    images, labels = (
        [read_idx(root / f"{part}-{kind}-ubyte.gz", dimensions) for part in ("train", "t10k")]
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    for pixels, each in zip(images, labels):
        if len(pixels) != len(each) or each.max(initial=0) >= len(FASHION):
            raise UserError(
                f"{root}: holds {len(pixels)} images and {len(each)} labels up to {each.max(initial=0)}; fetch its four files again"
            )
    names = [
        f"{part}/{i}" for part, each in zip(("train", "t10k"), labels) for i in range(len(each))
    ]
    official = np.repeat(["train", "test"], [len(each) for each in labels])
    pixels, labels = np.concatenate(images)[..., None], np.concatenate(labels).astype(np.int64)
    group, classes, minority, notes = binary_labels(
        labels,
        args.minority or "6",
        args.majority or (None if args.minority else "0,2,4"),
        root,
        {str(c): name for c, name in enumerate(FASHION)},
    )
    kept = np.flatnonzero(group >= 0)
    group, split = group[kept], official[kept]
    split[split == "train"] = draw_splits(group[split == "train"], {"val": 10}, args.seed)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Source(
        list(pixels[kept]),
        [names[i] for i in kept],
        group,
        split,
        classes,
        digest,
        args.size or 28,
        "medical",
        1,
        args.store_size,
        minority=minority,
        notes=notes,
    )


def read_idx(path, dimensions):
    """Array uint8 of a gzip file of MNIST's format: 0, 0, type, number of dimensions, their sizes (big-endian), values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(raw, ">u4", dimensions, 4)
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"begins with {raw[:4].hex()}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; Debian's package dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist, "
            "torchvision.datasets.FashionMNIST into FashionMNIST/raw: give that folder as --data-root"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); move it away and fetch it again"
        ) from None
