"""scikit-learn's real 8x8 scans of digits, 0-4 against 5-9; no download."""

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from datasets.source import Source, draw_splits


def load(args):
    scans = load_digits()
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)[
        ..., None
    ]  # [1797, 8, 8, 1], 17 grey levels
    labels = (scans.target >= 5).astype(np.int64)
    names = [f"load_digits/{i}" for i in range(len(images))]
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    return Source(
        list(images),
        names,
        labels,
        draw_splits(labels, {"test": 20, "val": 10}, args.seed),
        ["0-4", "5-9"],
        digest,
        args.size or 32,
        "medical",
        1,
        args.store_size,
    )
