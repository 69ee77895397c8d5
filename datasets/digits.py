"""scikit-learn's 8x8 scans of handwritten digits: 0-4 against 5-9, or --classes. No download."""

import hashlib

import numpy as np
from sklearn.datasets import load_digits

from datasets.source import Source, ordered_labels
from datasets.splits import draw_by_flags


def load(args):
    """Load the 1797 digits; 20 % are drawn for test and 10 % for val."""
    scans = load_digits()
    # 17 grey levels -> uint8 [1797, 8, 8, 1]
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)[..., None]
    labels, fields = (scans.target >= 5).astype(np.int64), dict(classes=["0-4", "5-9"])
    if args.classes:
        labels, fields = ordered_labels(scans.target, args, {})
    kept = np.flatnonzero(labels >= 0)
    images, labels = images[kept], labels[kept]
    return Source(
        images=list(images),
        names=[f"load_digits/{i}" for i in kept],
        labels=labels,
        split=draw_by_flags(labels, args),
        digest=hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest(),
        channels=1,
        **fields,
    )
