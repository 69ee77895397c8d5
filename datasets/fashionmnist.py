"""Fashion-MNIST: two groups of its ten classes."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from datasets.source import Source, binary_labels, ordered_labels
from datasets.splits import draw_splits
from utils.cli import UserError

CLASSES = "T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
# shirt against T-shirt, pullover, coat
MINORITY, MAJORITY = "6", "0,2,4"


def load(args):
    """Load the four files; 10 % of the training images of each class become val."""
    root, files = Path(args.data_root), ("train", "t10k")
    pixels = [read_idx(root / f"{file}-images-idx3-ubyte.gz", 3) for file in files]
    numbers = [read_idx(root / f"{file}-labels-idx1-ubyte.gz", 1) for file in files]
    names = [f"train/{i}" for i in range(len(numbers[0]))]
    names += [f"t10k/{i}" for i in range(len(numbers[1]))]
    split = np.repeat(["train", "test"], [len(numbers[0]), len(numbers[1])])
    pixels, numbers = np.concatenate(pixels)[..., None], np.concatenate(numbers).astype(np.int64)
    minority, majority = args.minority, args.majority
    if minority is None:
        minority, majority = MINORITY, majority or MAJORITY
    class_names = {str(c): name for c, name in enumerate(CLASSES)}
    if args.classes:
        labels, fields = ordered_labels(numbers, args, class_names)
    else:
        labels, fields = binary_labels(numbers, minority, majority, class_names, root)
    kept = np.flatnonzero(labels >= 0)
    labels, split = labels[kept], split[kept]
    split[split == "train"] = draw_splits(labels[split == "train"], {"val": 10}, args.seed)
    return Source(
        images=list(pixels[kept]),
        names=[names[i] for i in kept],
        labels=labels,
        split=split,
        digest=hashlib.sha256(pixels.tobytes() + numbers.tobytes()).hexdigest(),
        channels=1,
        **fields,
    )


def read_idx(path, dimensions):
    """Read a gzip file of MNIST's format as a uint8 array.

    Header: 0, 0, type, number of dimensions, then their sizes as big-endian int32.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"begins with {raw[:4].hex()}")
        shape = np.frombuffer(raw, ">u4", dimensions, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); fetch it again") from None
