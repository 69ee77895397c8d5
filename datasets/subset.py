"""A subset: one class ratio of one data set, as make_subsets.py packs it."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.augment import RECIPES
from datasets.pack import read_index
from datasets.source import SPLITS
from utils.cli import UserError
from utils.files import cached_sha256, read_json

MAKE_IT = "make it with make_subsets.py"


@dataclass
class Subset:
    """Packed images, and the rows of train, val and test."""

    path: Path
    name: str  # data set
    ratio: str  # "99-1": percent of majority and minority in train; or "natural"
    classes: list  # names, index = label
    minority: int  # label of the rarest class
    tail: list  # labels of the rare classes; of two classes, the minority alone
    counts: dict  # {"train": {"0": n, "1": n, ...}, ...}
    splits: dict  # {"train": int array of rows, ...}
    images: np.ndarray  # uint8 [M, S, S, C], memory-mapped, every image squeezed to a square
    labels: np.ndarray  # int64 [M]
    sizes: np.ndarray  # int64 [M, 2]: height and width in pixels before squeezing
    size: int  # side of the network's input, pixels
    recipe: str  # augmentation, a key of RECIPES
    mean: list  # per channel, of the training rows, in [0, 1]
    std: list
    sha256: str  # of images.npy
    rows_sha256: str  # of splits
    flip: bool = True  # whether augmented views are flipped left-right

    def train_counts(self):
        return [self.counts["train"][str(c)] for c in range(len(self.classes))]

    def identity(self, folder):
        """Return the entries of config.json that name the data of a run in `folder`."""
        return dict(
            dataset=self.name,
            ratio=self.ratio,
            classes=self.classes,
            minority=self.minority,
            **({"tail": self.tail} if len(self.classes) > 2 else {}),
            subset=os.path.relpath(self.path, folder),
            sha256=self.sha256,
            rows_sha256=self.rows_sha256,
        )

    def change_views(self, size=None, recipe=None, no_flip=False):
        """Change what the network sees, as --size, --recipe and --no-flip do."""
        self.size, self.recipe = size or self.size, recipe or self.recipe
        self.flip = self.flip and not no_flip

    def augmentation(self):
        """Return the parameters of augment()."""
        parameters = RECIPES[self.recipe]
        return parameters if self.flip or not parameters else {**parameters, "p_flip": 0.0}

    def limit_for_smoke(self, per_class=16):
        """Keep at most `per_class` rows of each class in every split, for --smoke."""
        for split, rows in self.splits.items():
            kept = [rows[self.labels[rows] == c][:per_class] for c in range(len(self.classes))]
            self.splits[split] = np.sort(np.concatenate(kept))
            self.counts[split] = {str(c): len(kept_rows) for c, kept_rows in enumerate(kept)}
        return self


def load_subset(path, verify=True):
    """Open subsets/<dataset>/<ratio>.json.

    verify: compare the checksums of images.npy and index.csv with the record.
    Raises UserError if a file is missing or is not what make_subsets.py wrote.
    """
    path = Path(path)
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.json")))
        raise UserError(f"{path}: is a folder; give one of its files: {found or 'none is there'}")
    record = read_json(path, MAKE_IT)
    files = {key: path.parent / name for key, name in FILES.items()}
    missing = [file for file in files.values() if not file.exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file; {MAKE_IT}")
    try:
        if verify and any(cached_sha256(file) != record[key] for key, file in files.items()):
            raise UserError(f"{path.parent}: images.npy or index.csv has changed; {MAKE_IT} again")
        splits = {s: np.array(record["splits"][s], dtype=np.int64) for s in SPLITS}
        rows_json = json.dumps(record["splits"], sort_keys=True).encode()
        labels, _, sizes, _ = read_index(files["index_sha256"])
        subset = Subset(
            path=path,
            name=record["name"],
            ratio=record["ratio"],
            classes=record["classes"],
            minority=record["minority"],
            tail=record.get("tail", [record["minority"]]),
            counts=record["counts"],
            splits=splits,
            images=np.load(files["images_sha256"], mmap_mode="r", allow_pickle=False),
            labels=labels,
            sizes=sizes,
            size=record["size"],
            recipe=record["recipe"],
            mean=record["mean"],
            std=record["std"],
            sha256=record["images_sha256"],
            rows_sha256=hashlib.sha256(rows_json).hexdigest(),
        )
        check_rows(subset)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a subset of this kit ({reason}); {MAKE_IT}") from None
    return subset


FILES = {"images_sha256": "images.npy", "index_sha256": "index.csv"}


def check_rows(subset):
    """Raise ValueError if rows overlap or disagree with the counts, images or recipes."""
    rows = np.concatenate(list(subset.splits.values()))
    if len(np.unique(rows)) != len(rows) or rows.min() < 0 or rows.max() >= len(subset.images):
        raise ValueError("rows of its splits overlap or are out of range")
    for split in SPLITS:
        counts = np.bincount(subset.labels[subset.splits[split]], minlength=len(subset.classes))
        if {str(c): int(n) for c, n in enumerate(counts)} != subset.counts[split]:
            raise ValueError(f"rows and counts of {split} disagree")
    if subset.recipe not in RECIPES:
        raise ValueError(f"no augmentation recipe {subset.recipe}")
