"""FracAtlas (Abedeen et al. 2023): radiographs of hand, leg, hip and shoulder, fractured or not."""

from pathlib import Path

import numpy as np

from datasets.images import list_images
from datasets.source import file_source
from datasets.splits import draw_by_flags
from datasets.table import read_lookup
from utils.cli import UserError
from utils.files import sha256

CLASSES = ["Fractured", "Non_fractured"]


def load(args):
    """Load 717 fractured and 3,366 other images, in grey; 20 % are drawn for test, 10 % for val.

    The release has no split for classification and no patients; its column `multiscan` says that
    one picture shows several scans. A column `patient_id` added to dataset.csv keeps patients in
    one split; without it, copies of one file stay together. Some files of the release are
    truncated: they are read as far as possible, and the record names them.
    """
    root = Path(args.data_root)
    if (root / "FracAtlas").is_dir():
        root = root / "FracAtlas"
    table = read_lookup(root / "dataset.csv", ["image_id", "fractured"])
    found = [
        (image, label, "train")
        for label, name in enumerate(CLASSES)
        for image in list_images(root / "images" / name)
    ]
    for image, label, _ in found:
        if table.get(image.name, {}).get("fractured") != str(1 - label):
            raise UserError(
                f"{image}: dataset.csv does not say fractured = {1 - label}; unpack FracAtlas again"
            )
    groups = [table[image.name].get("patient_id") or sha256(image) for image, _, _ in found]
    source = file_source(args, root, found, groups, classes=CLASSES, channels=1, truncated=True)
    source.split = draw_by_flags(source.labels, args, groups=np.array(groups))
    return source
