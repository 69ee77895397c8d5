"""What a loader returns, splits that a data set does not bring, and two groups of its classes."""

import csv
import hashlib
from dataclasses import dataclass, field

import numpy as np

from datasets.images import printable
from utils.cli import UserError

SPLITS = ("train", "val", "test")
# every draw has its own stream default_rng([seed, stream, class]), so that no draw moves another
DRAW_SPLIT, DRAW_TRAIN, DRAW_VAL, DRAW_TEST = range(4)


@dataclass
class Source:
    """What a loader found. One entry per image in images, names, labels and split."""

    images: list  # what decode() takes: paths or arrays [H, W, C]; a list, or NpzImages
    names: list  # source column of index.csv: path below the data root
    labels: np.ndarray  # int [M]
    split: np.ndarray  # str [M]: train, val or test
    classes: list  # two names, index = label
    digest: str  # sha256 of what was found, to notice another source
    size: int  # side of what the network sees, pixels
    recipe: str
    channels: int = 3
    store_size: int | None = None  # largest side stored, pixels; None: the images' own
    side: int | None = None  # longest side of all images, where it is known without a look at each
    minority: int | None = None  # None: the rarer class of train
    balance: bool = False  # val and test cut to their rarest class
    truncated: bool = False  # truncated files are read as far as they go
    notes: list = field(default_factory=list)  # lines to print


def draw_splits(labels, percents, seed, groups=None):
    """Draw whole groups (patients; default: every image its own) for each split of percents, stratified by class; the rest is train.

    labels int [M] in {0, 1}; percents: {split: percent of the images}; groups [M] or None. A group counts as rare if any of its
    images is of the rarer class. Returns str [M]. A split gets its share of each stratum's images, exceeded by at most one group.
    """
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    has_rare = np.zeros(len(sizes), dtype=bool)
    has_rare[groups[labels == np.bincount(labels, minlength=2).argmin()]] = True
    drawn = np.full(len(sizes), "train", dtype="<U5")  # per group
    for stratum in (0, 1):
        members = np.random.default_rng([seed, DRAW_SPLIT, stratum]).permutation(
            np.flatnonzero(has_rare == stratum)
        )
        before, total = np.cumsum(sizes[members]) - sizes[members], sizes[members].sum()
        low = 0
        for name, percent in percents.items():
            drawn[
                members[(100 * before >= low * total) & (100 * before < (low + percent) * total)]
            ] = name
            low += percent
    return drawn[groups]


def file_source(args, images, root, labels, split, classes, grayscale, groups=None, **more):
    """A Source of image files below root; size, storage and augmentation as the flags and `grayscale` say. groups: a name for each, or None."""
    names = [printable(image.relative_to(root).as_posix()) for image in images]
    found = "\n".join(
        f"{name}\t{label}\t{image.stat().st_size if image.exists() else None}"
        + (f"\t{group}" if group else "")
        for name, label, image, group in zip(names, labels, images, groups or [None] * len(images))
    )
    size = args.size or 224
    return Source(
        images,
        names,
        labels,
        split,
        classes,
        hashlib.sha256(found.encode()).hexdigest(),
        size,
        "medical" if grayscale else "natural",
        1 if grayscale else 3,
        args.store_size or round(size * 10 / 7),
        **more,
    )


def binary_labels(labels, minority, majority, path, named):
    """Which images make up the two classes: 0 for --minority, 1 for --majority, -1 for neither or both.

    labels int [M], or [M, K] where an image may have any of K findings; minority, majority: "3" or "0,1" or None; named: {"3": its name}.
    Without --majority it is everything else. Returns (int [M], two names, label of the minority or None, lines to print).
    """
    known = [int(c) for c in (range(labels.shape[1]) if labels.ndim == 2 else np.unique(labels))]

    def numbers(flag, text):
        chosen = list(
            dict.fromkeys(
                int(word) if word.strip().isdecimal() else word for word in text.split(",")
            )
        )
        strange = [c for c in chosen if c not in known]
        if strange:
            raise UserError(
                f"{flag} {text}: {path} has no class {strange[0]}; its classes are {listed(known)}"
            )
        return chosen

    def listed(chosen):
        return ", ".join(f"{c} {named[str(c)]}" if str(c) in named else str(c) for c in chosen)

    def joined(chosen):
        return " + ".join(named.get(str(c), str(c)) for c in chosen)

    if len(known) < 2:
        raise UserError(
            f"{path}: holds {len(known)} class{'es' * (not known)}; two at least are needed"
        )
    if minority is None:
        if len(known) != 2 or labels.ndim == 2 or majority is not None:
            raise UserError(
                f"--minority: say which of the classes of {path} is the rare one, e.g. --minority {known[0]} --majority {known[-1]} "
                f"(without --majority: all others); they are {listed(known)}"
            )
        return np.searchsorted(known, labels), [joined([c]) for c in known], None, []
    few, many = (
        numbers("--minority", minority),
        numbers("--majority", majority) if majority is not None else None,
    )
    if many and set(few) & set(many):
        raise UserError(
            f"--minority {minority} --majority {majority}: both name class {min(set(few) & set(many))}"
        )
    is_few = labels[:, few].any(1) if labels.ndim == 2 else np.isin(labels, few)
    is_many = (
        ~is_few
        if many is None
        else labels[:, many].any(1)
        if labels.ndim == 2
        else np.isin(labels, many)
    )
    group = np.select([is_few & ~is_many, is_many & ~is_few], [0, 1], -1)
    left, both = int((~is_few & ~is_many).sum()), int((is_few & is_many).sum())
    notes = (
        [f"left out: {left} images of neither class" + (f", {both} of both" if both else "")]
        if left or both
        else []
    )
    return group, [joined(few), joined(many) if many else "rest"], 0, notes


def read_table(path, columns):
    """{line number: row as a dict} of a CSV. UserError when it is not one, or lacks one of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            have = reader.fieldnames or []
            table = {reader.line_num: row for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error}); save it again") from None
    for column in columns:
        if column not in have:
            raise UserError(
                f"{path}: has no column {column}, only {', '.join(have) or 'nothing'}; give it {' and '.join(columns)}"
            )
    if not table:
        raise UserError(f"{path}: has no line below its header")
    return table


def parse_binary(path, line, column, row):
    if row[column] not in ("0", "1"):
        raise UserError(
            f"{path}, line {line}: {column} is {row[column] or ''!r}, neither 0 nor 1; mend it"
        )
    return int(row[column])


def more_of(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
