"""The table of data sets: how each is loaded, where it comes from, where it lies, what to expect.

A new data set is a module of this folder with `load(args)`, which returns a Source, and an entry
in DATASETS. This file needs no package: `python -m datasets DATA_ROOT` runs before anything is
installed.
"""

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# pixels; the first that is found is used
MEDMNIST_SIZES = (224, 128, 64, 28)
# minority, majority: levels of the taxonomy
INAT21_TAXA = {
    "inat21-plants": ("Fagales/Fagaceae/Quercus", "Saxifragales"),
    "inat21-insects": ("Hymenoptera/Apidae", "Hymenoptera/Vespidae"),
    "inat21-mammals": ("Artiodactyla", "Carnivora"),
}
# (train, val) as the archives unpack and as torchvision.datasets.INaturalist names them; the full
# training split before the mini one
INAT21_FOLDERS = (
    ("train", "val"),
    ("2021_train", "2021_valid"),
    ("train_mini", "val"),
    ("2021_train_mini", "2021_valid"),
)


@dataclass(frozen=True)
class DataSet:
    """One data set; `find` is None where it is not looked for below a data root."""

    module: str  # of this folder; its load(args) returns a Source
    kind: str | None = None  # "natural" or "medical" images; None: depends on the user's images
    recipe: str = "natural"  # augmentation; images of one channel take "medical" instead
    flags: tuple = ()  # flags of make_subsets.py that not every data set accepts
    get: str = ""  # where it comes from
    put: str = ""  # what goes below the data root
    find: Callable | None = None  # data root -> (folder for --data-root, pixels or None), or None
    # {split: images of label 0 and 1} at natural ratio; empty where it depends
    counts: dict = field(default_factory=dict)

    def load(self, args):
        # imported on demand: loaders need numpy, this table must not
        return importlib.import_module(f"datasets.{self.module}").load(args)


def medmnist_file(name, size):
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def find_medmnist(name):
    return lambda root: next(
        ((root, size) for size in MEDMNIST_SIZES if (root / medmnist_file(name, size)).is_file()),
        None,
    )


def inat21_folders(root):
    """(root, train folder, val folder) of iNaturalist 2021, at a data root or one level below."""
    for place in (root, root / "inat21", root / "inat21_mini"):
        for train, val in INAT21_FOLDERS:
            if (place / train).is_dir() and (place / val).is_dir():
                return place, place / train, place / val
    return None


def find_inat21(name):
    def find(root):
        folders = inat21_folders(root)
        if folders is None:
            return None
        names = "\n".join(os.listdir(folders[1]))
        holds = all(
            re.search(f"^\\d+_.*{taxon.replace('/', '_')}_", names, re.MULTILINE)
            for taxon in INAT21_TAXA[name]
        )
        return (folders[0], None) if holds else None

    return find


def fracatlas_folder(root):
    """The folder that holds images/ and dataset.csv, or None."""
    for place in (root, root / "FracAtlas"):
        if (place / "images").is_dir() and (place / "dataset.csv").is_file():
            return place
    return None


def find_fracatlas(root):
    place = fracatlas_folder(root)
    return place and (place, None)


def infarction_folder(root):
    """The folder that holds the table of participants, or None."""
    return next((place for place in (root / "infarction", root) if any(place.glob("*.csv"))), None)


def find_infarction(root):
    place = infarction_folder(root)
    # below a root of many data sets it has a folder of its own
    return (place, None) if place and place != root else None


INAT21_GET = "github.com/visipedia/inat_comp/tree/master/2021"
DATASETS = {
    "digits": DataSet("digits", recipe="medical"),
    "breastmnist": DataSet(
        "medmnist",
        "medical",
        "medical",
        ("download",),
        "medmnist.com, or python make_subsets.py breastmnist --download",
        "breastmnist_224.npz",
        find_medmnist("breastmnist"),
        {"train": (147, 399), "val": (21, 57), "test": (42, 114)},
    ),
    "pneumoniamnist": DataSet(
        "medmnist",
        "medical",
        "medical",
        ("download",),
        "medmnist.com, or python make_subsets.py pneumoniamnist --download",
        "pneumoniamnist_224.npz",
        find_medmnist("pneumoniamnist"),
        {"train": (1214, 3494), "val": (135, 389), "test": (234, 390)},
    ),
    "fracatlas": DataSet(
        "fracatlas",
        "medical",
        "medical",
        ("skip_bad",),
        "doi.org/10.6084/m9.figshare.22363012",
        "FracAtlas/",
        find_fracatlas,
        {"train": (501, 2356), "val": (72, 336), "test": (144, 674)},
    ),
    "infarction": DataSet(
        "infarction",
        "medical",
        "cardiac",
        ("skip_bad",),
        "ukbiobank.ac.uk, by application",
        "infarction/ with a CSV (eid,label) and one .pt, or .npy or .png files",
        find_infarction,
    ),
    **{
        name: DataSet(
            "inat21",
            "natural",
            flags=("skip_bad", "grayscale"),
            get=INAT21_GET,
            put="train/ and val/",
            find=find_inat21(name),
        )
        for name in INAT21_TAXA
    },
    "inat21": DataSet("inat21", "natural", flags=("skip_bad", "grayscale", "minority", "majority")),
    "fashionmnist": DataSet("fashionmnist", "natural", "medical", flags=("minority", "majority")),
    "npz": DataSet("npz", flags=("minority", "majority")),
    "folder": DataSet("folder", flags=("skip_bad", "grayscale", "minority", "majority", "patient")),
}


def find_all(root):
    """{name: (folder for --data-root, pixels or None)} of the data sets below a data root."""
    places = {name: entry.find(Path(root)) for name, entry in DATASETS.items() if entry.find}
    return {name: place for name, place in places.items() if place}


def describe_missing(root):
    """One line for each data set that is not below a data root: where to get it, where to put it."""
    found = find_all(root)
    return [
        f"not found: {name} ({entry.get}; {entry.put} into {root})"
        for name, entry in DATASETS.items()
        if entry.find and name not in found
    ]
