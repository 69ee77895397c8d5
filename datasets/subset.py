"""A subset: one class ratio of one data set, packed by make_subsets.py."""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.augment import RECIPES
from datasets.source import SPLITS
from utils.cli import UserError
from utils.files import read_json, sha256


@dataclass
class Subset:
    """One ratio of one data set: packed images, and which rows make up train, val and test."""

    path: Path
    name: str  # data set
    ratio: str  # "99-1": percent of majority and minority in train; or "natural"
    classes: list  # two names, index = label
    minority: int  # label of the rare class
    counts: dict  # {"train": {"0": n, "1": n}, ...}
    splits: dict  # {"train": int array of rows, ...}
    images: np.ndarray  # uint8 [M, S, S, C], memory-mapped, every image squeezed to a square
    labels: np.ndarray  # int64 [M]
    sizes: np.ndarray  # int64 [M, 2]: true height and width in pixels
    size: int  # side of what the network sees, pixels
    recipe: str  # augmentation, a key of RECIPES
    mean: list  # per channel, of the train rows, in [0, 1]
    std: list
    sha256: str  # of images.npy
    rows_sha256: str  # of splits

    def train_counts(self):
        return [self.counts["train"]["0"], self.counts["train"]["1"]]

    def limit_for_smoke(self, per_class=16):
        """For --smoke: keep at most so many rows of each class in every split."""
        for split, rows in self.splits.items():
            kept = [rows[self.labels[rows] == c][:per_class] for c in (0, 1)]
            self.splits[split], self.counts[split] = (
                np.sort(np.concatenate(kept)),
                {str(c): len(kept[c]) for c in (0, 1)},
            )
        return self


def load_subset(path, verify=True):
    """Open subsets/<dataset>/<ratio>.json. UserError when a file is missing, or not what make_subsets.py wrote.

    verify: compare the checksums of images.npy and index.csv; not needed twice for two ratios of one folder.
    """
    path = Path(path)
    remake = "make it with make_subsets.py"
    record = read_json(path, remake)
    folder = path.parent
    try:
        if verify and (
            sha256(folder / "images.npy") != record["images_sha256"]
            or sha256(folder / "index.csv") != record["index_sha256"]
        ):
            raise UserError(
                f"{folder}: images.npy or index.csv is not what {path.name} was made with (checksum); make the subset again"
            )
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / "index.csv", newline="", encoding="utf-8") as file:
            index = list(csv.DictReader(file))
        labels = np.array([int(row["label"]) for row in index])
        sizes = np.array([(int(row["height"]), int(row["width"])) for row in index])
        splits = {split: np.array(record["splits"][split] or [], dtype=object) for split in SPLITS}
        if any(type(row) is not int for rows in splits.values() for row in rows):
            raise UserError(f"{path}: its splits are not lists of rows; {remake}")
        splits = {split: rows.astype(np.int64) for split, rows in splits.items()}
        subset = Subset(
            path,
            record["name"],
            record["ratio"],
            list(record["classes"]),
            int(record["minority"]),
            record["counts"],
            splits,
            images,
            labels,
            sizes,
            int(record["size"]),
            record["recipe"],
            list(record["mean"]),
            list(record["std"]),
            record["images_sha256"],
            hashlib.sha256(json.dumps(record["splits"], sort_keys=True).encode()).hexdigest(),
        )
        rows = np.concatenate(list(splits.values()))
        if (
            len(np.unique(rows)) != len(rows)
            or len(rows)
            and not 0 <= rows.min() <= rows.max() < len(labels)
        ):
            raise UserError(f"{path}: rows of its splits are doubled or out of range; {remake}")
        for split in SPLITS:
            if [int((labels[splits[split]] == c).sum()) for c in (0, 1)] != [
                record["counts"][split][str(c)] for c in (0, 1)
            ]:
                raise UserError(f"{path}: rows and counts of {split} disagree; {remake}")
        if (
            images.ndim != 4
            or images.dtype != np.uint8
            or len(images) != len(labels)
            or not np.isin(labels, (0, 1)).all()
            or sizes.min() < 1
        ):
            raise UserError(f"{path}: does not fit its images.npy; {remake}")
        names, numbers = (
            (subset.name, subset.ratio, *subset.classes),
            np.array([subset.mean, subset.std], dtype=np.float64),
        )
        if (
            not all(isinstance(name, str) for name in names)
            or len(names) != 4
            or subset.recipe not in RECIPES
            or subset.minority not in (0, 1)
        ):
            raise UserError(
                f"{path}: its name, ratio, classes, minority or recipe does not fit a subset; {remake}"
            )
        if any(
            Path(name).name != name or name in ("", "..") for name in names[:2]
        ):  # they become folders below runs/
            raise UserError(f"{path}: its name or ratio is no folder name; {remake}")
        if (
            numbers.shape != (2, images.shape[3])
            or not np.isfinite(numbers).all()
            or numbers[1].min() <= 0
            or not 1 <= subset.size <= 4096
        ):
            raise UserError(f"{path}: its mean, std or size is no number for its images; {remake}")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; {remake}") from None
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{path}: not a subset of this kit ({type(error).__name__}: {error}); {remake}"
        ) from None
    return subset
