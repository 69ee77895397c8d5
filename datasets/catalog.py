"""The data sets: where to get them, where they lie below a data root, how many images to expect. Plain Python, needs no package.

python catalog.py data        what lies there: name, pixels or -, folder, separated by tabs; what does not, with its address
"""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

MEDMNIST_SIZES = (224, 128, 64, 28)  # pixels, the first that is there is taken
INAT21 = {  # minority, majority: levels of the taxonomy
    "inat21-plants": ("Fagales/Fagaceae/Quercus", "Saxifragales"),
    "inat21-insects": ("Hymenoptera/Apidae", "Hymenoptera/Vespidae"),
    "inat21-mammals": ("Artiodactyla", "Carnivora"),
}
# train, val as the archives unpack and as torchvision.datasets.INaturalist names them; the whole before the mini training part
INAT21_PARTS = (
    ("train", "val"),
    ("2021_train", "2021_valid"),
    ("train_mini", "val"),
    ("2021_train_mini", "2021_valid"),
)


@dataclass(frozen=True)
class DataSet:
    """What README.md's table of data sets says of one."""

    get: str  # where it comes from
    put: str  # what goes below the data root
    find: callable  # data root -> (folder for --data-root, pixels or None), or None
    counts: dict = field(
        default_factory=dict
    )  # {split: images of label 0 and 1} at natural ratio; empty where it depends


def medmnist_file(name, size):
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def find_medmnist(name):
    return lambda root: next(
        ((root, size) for size in MEDMNIST_SIZES if (root / medmnist_file(name, size)).is_file()),
        None,
    )


def inat21_parts(root):
    """(root, train folder, val folder) of iNaturalist 2021 at a data root or one level below; None where it is not."""
    for place in (root, root / "inat21", root / "inat21_mini"):
        for train, val in INAT21_PARTS:
            if (place / train).is_dir() and (place / val).is_dir():
                return place, place / train, place / val
    return None


def find_inat21(name):
    def find(root):
        parts = inat21_parts(root)
        if parts is None:
            return None
        folders = "\n".join(os.listdir(parts[1]))
        holds = all(
            re.search(f"^\\d+_.*{taxon.replace('/', '_')}_", folders, re.MULTILINE)
            for taxon in INAT21[name]
        )
        return (parts[0], None) if holds else None

    return find


def fracatlas_folder(root):
    """The folder that holds images/ and dataset.csv, or None."""
    return next(
        (
            place
            for place in (root, root / "FracAtlas")
            if (place / "images").is_dir() and (place / "dataset.csv").is_file()
        ),
        None,
    )


def find_fracatlas(root):
    place = fracatlas_folder(root)
    return place and (place, None)


def infarction_folder(root):
    """The folder that holds the table of participants, or None."""
    return next((place for place in (root / "infarction", root) if any(place.glob("*.csv"))), None)


def find_infarction(root):
    place = infarction_folder(root)
    return (
        (place, None) if place and place != root else None
    )  # below a root of many data sets it has a folder of its own


INAT21_GET = "github.com/visipedia/inat_comp/tree/master/2021"
INAT21_PUT = "train/ and val/"
DATASETS = {
    "breastmnist": DataSet(
        "medmnist.com, or python make_subsets.py breastmnist --download",
        "breastmnist_224.npz",
        find_medmnist("breastmnist"),
        {"train": (147, 399), "val": (21, 57), "test": (42, 114)},
    ),
    "pneumoniamnist": DataSet(
        "medmnist.com, or python make_subsets.py pneumoniamnist --download",
        "pneumoniamnist_224.npz",
        find_medmnist("pneumoniamnist"),
        {"train": (1214, 3494), "val": (135, 389), "test": (234, 390)},
    ),
    "fracatlas": DataSet(
        "doi.org/10.6084/m9.figshare.22363012",
        "FracAtlas/",
        find_fracatlas,
        {"train": (501, 2356), "val": (72, 336), "test": (144, 674)},
    ),
    "infarction": DataSet(
        "ukbiobank.ac.uk, by application",
        "infarction/ with a CSV (eid,label) and one .pt, or .npy or .png files",
        find_infarction,
    ),
    **{name: DataSet(INAT21_GET, INAT21_PUT, find_inat21(name)) for name in INAT21},
}


def found(root):
    """{name: (folder for --data-root, pixels or None)} of the data sets that lie below a data root."""
    places = {name: entry.find(Path(root)) for name, entry in DATASETS.items()}
    return {name: place for name, place in places.items() if place}


def missing(root):
    """One line for each data set that does not lie there: where to get it, where to put it."""
    there = found(root)
    return [
        f"not found: {name} ({entry.get}; {entry.put} into {root})"
        for name, entry in DATASETS.items()
        if name not in there
    ]


if __name__ == "__main__":
    data_root = sys.argv[1] if len(sys.argv) > 1 else "data"
    for name, (folder, size) in found(data_root).items():
        print(name, size or "-", folder, sep="\t")
    print(*missing(data_root), sep="\n", file=sys.stderr)
