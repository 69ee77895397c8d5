"""The table of data sets: how each is loaded, where to get it, where to put it, what to expect.

A new data set is a module in this folder whose `load(args)` returns a Source, and an entry in
DATASETS. This file imports no package: `python -m datasets` runs before any is installed.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

# (minority, majority): consecutive levels of the taxonomy
INAT21_TAXA = {
    "inat21-plants": ("Fagales/Fagaceae/Quercus", "Saxifragales"),
    "inat21-insects": ("Hymenoptera/Apidae", "Hymenoptera/Vespidae"),
    "inat21-mammals": ("Artiodactyla", "Carnivora"),
}
# (train, val) as the archives unpack and as torchvision.datasets.INaturalist names them; the full
# training split comes before the mini one
INAT21_FOLDERS = (
    ("train", "val"),
    ("2021_train", "2021_valid"),
    ("train_mini", "val"),
    ("2021_train_mini", "2021_valid"),
)
# flags of data sets whose splits are drawn
DRAWN_SPLITS = ("val_share", "test_share", "folds")
# flags for the user's own images
USER_FLAGS = (
    *("skip_bad", "grayscale", "minority", "majority", "classes", "patient"),
    *DRAWN_SPLITS,
)
TABLE_FLAGS = ("labels", "path_column", "label_column", "patient_column", "split_column")
# below the data root
INAT21_PLACES = ("", "inat21", "inat21_mini")


@dataclass(frozen=True)
class DataSet:
    """One data set, and all of make_subsets.py that depends on it."""

    module: str  # in this folder
    kind: str | None = None  # "natural" or "medical"; None: the user's images, or neither
    recipe: str | None = None  # augmentation; None: medical for one channel, else natural
    size: int | None = 224  # pixels of what the network sees; None: those of the images
    flags: tuple = ()  # flags that not every data set accepts
    get: str = ""  # address
    put: str = ""  # what belongs below the data root
    # (folder below the data root, glob patterns that all match in it, pixels or None); empty where
    # the data set is not looked for
    places: tuple = ()
    counts: dict = field(default_factory=dict)  # {split: images of label 0 and 1}, where known

    def load(self, args):
        # imported when used: loaders need numpy, this table must not
        return importlib.import_module(f"datasets.{self.module}").load(args)

    def find(self, root):
        """Find the images below a data root: (folder for --data-root, pixels or None), or None."""
        for folder, patterns, size in self.places:
            if all(any(Path(root, folder).glob(pattern)) for pattern in patterns):
                return Path(root, folder), size
        return None


def medmnist_files(name):
    """Name the files of a MedMNIST data set: {pixels: file}, the largest first."""
    return {size: f"{name}_{size}.npz" for size in (224, 128, 64)} | {28: f"{name}.npz"}


def medmnist(name, **counts):
    return DataSet(
        "medmnist",
        "medical",
        flags=("download",),
        get=f"medmnist.com, or python make_subsets.py {name} --download",
        put=f"{name}_224.npz",
        places=tuple(("", (file,), size) for size, file in medmnist_files(name).items()),
        counts=counts,
    )


def inat21(taxa, flags=("skip_bad", "grayscale")):
    names = [taxon.replace("/", "_") for taxon in taxa]
    return DataSet(
        "inat21",
        "natural",
        flags=flags,
        get="github.com/visipedia/inat_comp/tree/master/2021",
        put="train/ and val/",
        places=tuple(
            (place, (f"{val}/", *(f"{train}/*_{name}_*" for name in names)), None)
            for place in INAT21_PLACES
            for train, val in INAT21_FOLDERS
            if taxa
        ),
    )


DATASETS = {
    "digits": DataSet("digits", size=32, flags=("classes", *DRAWN_SPLITS)),
    "breastmnist": medmnist("breastmnist", train=(147, 399), val=(21, 57), test=(42, 114)),
    "pneumoniamnist": medmnist(
        "pneumoniamnist", train=(1214, 3494), val=(135, 389), test=(234, 390)
    ),
    "fracatlas": DataSet(
        "fracatlas",
        "medical",
        flags=("skip_bad", *DRAWN_SPLITS),
        get="doi.org/10.6084/m9.figshare.22363012",
        put="FracAtlas/",
        places=tuple((place, ("images/*", "dataset.csv"), None) for place in ("", "FracAtlas")),
        counts={"train": (501, 2356), "val": (72, 336), "test": (144, 674)},
    ),
    "infarction": DataSet(
        "infarction",
        "medical",
        "cardiac",
        size=128,
        flags=("skip_bad",),
        get="ukbiobank.ac.uk, by application",
        put="infarction/ with a CSV (eid,label) and one .pt, or .npy or .png files",
        places=(("infarction", ("*.csv",), None),),
    ),
    **{name: inat21(taxa) for name, taxa in INAT21_TAXA.items()},
    "inat21": inat21((), ("skip_bad", "grayscale", "minority", "majority")),
    "fashionmnist": DataSet(
        "fashionmnist",
        "natural",
        size=28,
        flags=("minority", "majority", "classes"),
        get="github.com/zalandoresearch/fashion-mnist or Debian's dataset-fashion-mnist",
        put="its four .gz files",
    ),
    "npz": DataSet("npz", size=None, flags=("minority", "majority", "classes")),
    "folder": DataSet("folder", flags=USER_FLAGS),
    "table": DataSet("table", flags=(*USER_FLAGS, *TABLE_FLAGS)),
}


def find_all(root):
    """Find the data sets below a data root: {name: (folder for --data-root, pixels or None)}."""
    places = {name: entry.find(root) for name, entry in DATASETS.items()}
    return {name: place for name, place in places.items() if place}


def describe_missing(root):
    """Describe each data set that is not below a data root: where to get it, where to put it."""
    found = find_all(root)
    return [
        f"not found: {name} ({entry.get}; {entry.put} into {root})"
        for name, entry in DATASETS.items()
        if entry.places and name not in found
    ]
