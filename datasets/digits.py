"""scikit-learn's 8x8 scans of handwritten digits: 0-4 against 5-9. No download."""

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from datasets.source import DRAWN, Source, draw_splits


def load(args):
    """Load the 1797 digits; 20 % are drawn for test and 10 % for val."""
    scans = load_digits()
    # 17 grey levels -> uint8 [1797, 8, 8, 1]
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)[..., None]
    labels = (scans.target >= 5).astype(np.int64)
    return Source(
        images=list(images),
        names=[f"load_digits/{i}" for i in range(len(images))],
        labels=labels,
        split=draw_splits(labels, DRAWN, args.seed),
        classes=["0-4", "5-9"],
        digest=hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest(),
        channels=1,
    )
