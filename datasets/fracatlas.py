"""FracAtlas: radiographs, fractured or not."""

from pathlib import Path

import numpy as np

from datasets import fracatlas_folder
from datasets.images import list_images
from datasets.source import draw_splits, file_source, more_of, parse_binary, read_table
from utils.cli import UserError
from utils.files import sha256


def load(args):
    """FracAtlas (Abedeen et al. 2023): radiographs of hand, leg, hip and shoulder, fractured or not; grey.

    The release has 717 fractured and 3,366 other images, a table dataset.csv (image_id, fractured and what is shown) and no split for
    classification. Drawn here: 20 % for test and 10 % for val, stratified. The table has no patient: its column multiscan says that one
    picture shows several scans, not which pictures belong together. So views of one patient are kept in one split where the table has been
    given a column patient_id; else only copies of one file are. Some files of the release are truncated: they are read as far as
    they go, the rest is grey, and the subset's record names them.
    """
    root = fracatlas_folder(Path(args.data_root))
    if root is None:
        raise UserError(
            f"{args.data_root}: no FracAtlas/ with images/ and dataset.csv; get it from doi.org/10.6084/m9.figshare.22363012 and "
            "unpack it there, or give its folder with --data-root"
        )
    table = read_table(root / "dataset.csv", ["image_id", "fractured"])
    classes = ["Fractured", "Non_fractured"]
    images, described = {}, {}
    for label, name in enumerate(classes):
        for image in list_images(root / "images" / name):
            if image.name in images:
                raise UserError(
                    f"{image}: a second file of this name, also {images[image.name][0]}; leave one"
                )
            images[image.name] = image, label
    for line, row in table.items():
        name, where = row["image_id"], f"{root / 'dataset.csv'}, line {line}"
        if name not in images:
            raise UserError(
                f"{where}: {name!r} is not in images/Fractured or images/Non_fractured; unpack FracAtlas again"
            )
        if name in described:
            raise UserError(f"{where}: {name} a second time; one line each")
        if parse_binary(root / "dataset.csv", line, "fractured", row) != 1 - images[name][1]:
            raise UserError(
                f"{where}: fractured is {row['fractured']}, but {name} lies in {classes[images[name][1]]}"
            )
        described[name] = row
    strange = sorted(images.keys() - described.keys())
    if strange:
        raise UserError(
            f"{images[strange[0]][0]}: not in dataset.csv{more_of(strange)}; remove it or unpack FracAtlas again"
        )
    paths, labels = (
        [image for image, _ in images.values()],
        np.array([label for _, label in images.values()]),
    )
    groups = [described[image.name].get("patient_id") or sha256(image) for image in paths]
    split = draw_splits(labels, {"test": 20, "val": 10}, args.seed, np.array(groups))
    return file_source(args, paths, root, labels, split, classes, True, groups, truncated=True)
