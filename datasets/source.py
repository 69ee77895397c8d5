"""What a loader returns, and the choice of two groups of classes."""

import difflib
import hashlib
from dataclasses import dataclass, field

import numpy as np

from datasets.images import printable
from utils.cli import UserError

SPLITS = ("train", "val", "test")
# Every draw has its own stream, default_rng([seed, stream, class]): no draw moves another.
DRAW_SPLIT, DRAW_TRAIN, DRAW_VAL, DRAW_TEST = range(4)


@dataclass
class Source:
    """The images that a loader found, with class and split; nothing is decoded yet."""

    images: list  # paths or arrays [H, W, C], as decode() takes them; a list, or NpzImages
    names: list  # column `source` of index.csv: path below the data root
    labels: np.ndarray  # int [M]
    split: np.ndarray  # str [M], of SPLITS
    classes: list  # names, index = label
    digest: str  # sha256 of what was found, to notice other images
    channels: int = 3
    store_size: int | None = None  # largest side stored, pixels; None: that of the images
    side: int | None = None  # longest side of all images, where it is known from one header
    minority: int | None = None  # None: the rarer class of train
    tail: list | None = None  # labels of --tail
    balance: bool = False  # val and test are cut to their rarest class
    truncated: bool = False  # truncated files are read as far as possible
    notes: list = field(default_factory=list)  # lines to print


def file_source(args, root, found, groups=None, **fields):
    """Make a Source of image files below `root`, stored at 10/7 of what the network sees.

    found: [(path, label, split)]; groups: a name for each, or None.
    """
    images = [path for path, _, _ in found]
    names = [printable(path.relative_to(root).as_posix()) for path in images]
    lines = [
        f"{name}\t{label}\t{path.stat().st_size if path.exists() else None}"
        for name, (path, label, _) in zip(names, found, strict=True)
    ]
    if groups is not None:
        lines = [f"{line}\t{group}" for line, group in zip(lines, groups, strict=True)]
    return Source(
        images,
        names,
        labels=np.array([label for _, label, _ in found], dtype=np.int64),
        split=np.array([split for _, _, split in found], dtype="<U5"),
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        store_size=round(args.size * 10 / 7),
        **fields,
    )


def choose_classes(known, minority, majority, where, names=()):
    """Choose the members of the rare and of the other class by --minority and --majority.

    known: {class: its description}; names: {name of a class: class}, further names for the flags.
    Without flags, each of exactly two classes is one. Without --majority, the other class is all
    the rest. Returns two lists of classes.
    """
    listed = ", ".join(list(known.values())[:10]) or "none"
    if len(known) < 2:
        raise UserError(f"{where}: found {len(known)} classes ({listed}); two are needed")
    if minority is None and (len(known) > 2 or majority is not None):
        raise UserError(
            f"{where}: found {len(known)} classes ({listed}); name the rare one with --minority A "
            "and the other with --majority B,C (default: all others)"
        )
    rare = (
        parse_classes("--minority", minority, known, dict(names))
        if minority is not None
        else [*known][:1]
    )
    other = [name for name in known if name not in rare]
    if majority is not None:
        other = parse_classes("--majority", majority, known, dict(names))
    if set(rare) & set(other) or not other:
        raise UserError(
            f"--minority {minority} --majority {majority}: the two classes must differ; name others"
        )
    return rare, other


def parse_classes(flag, text, known, names):
    """Parse the value of a flag, A or A,B, into a list of known classes.

    names: {another name of a class: class}, in letters of any case.
    """
    others = {name.lower(): c for name, c in names.items() if c in known}
    classes = {**others, **{name: name for name in known}}
    # a class name may itself hold a comma
    chosen = [text] if text in known else [word.strip() for word in text.split(",")]
    members = [classes.get(name, classes.get(name.lower())) for name in chosen]
    for name, member in zip(chosen, members, strict=True):
        if member is None:
            nearest = difflib.get_close_matches(name, classes, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            listed = ", ".join([*known.values()][:10])
            raise UserError(f"{flag} {text}: no class {name!r}; {hint}choose from {listed}")
    return list(dict.fromkeys(members))


def describe_numbers(numbers, names):
    """Return {"3": "3 name of class 3"} for the classes of a data set."""
    return {str(c): f"{c} {names.get(str(c), '')}".rstrip() for c in numbers}


def binary_labels(labels, minority, majority, names, where):
    """Label two groups of numbered classes: 0 for --minority, 1 for --majority, else -1.

    labels: int [M], or 0 and 1 in [M, K] where an image may have any of K findings; an image of
    both groups is -1. names: {"3": name of class 3}.
    Returns int [M], and the fields classes, minority and notes of a Source.
    """
    has_findings = labels.ndim == 2
    numbers = range(labels.shape[1]) if has_findings else np.unique(labels)
    known = describe_numbers(numbers, names)
    by_name = {name: c for c, name in names.items()}
    groups = choose_classes(known, minority, majority, where, by_name)
    columns = [[int(c) for c in group] for group in groups]
    if has_findings:
        rare, other = (labels[:, column].any(1) for column in columns)
    else:
        rare, other = (np.isin(labels, column) for column in columns)
    if majority is None:
        other = ~rare
    binary = np.select([rare & ~other, other & ~rare], [0, 1], -1)
    classes = [" + ".join(names.get(c, c) for c in group) for group in groups]
    if majority is None and minority is not None:
        classes[1] = "rest"
    neither, both = int((~rare & ~other).sum()), int((rare & other).sum())
    notes = [f"left out: {neither} images of neither class, {both} of both"] * (neither + both > 0)
    return binary, dict(classes=classes, minority=None if minority is None else 0, notes=notes)


def choose_ordered_classes(args, known, names):
    """Choose the members of --classes, in its order, and the labels of --tail, or None.

    known: {class: its description}; names: {class: another name that the flags may use}.
    """
    by_name = {name: c for c, name in names.items()}
    classes = parse_classes("--classes", args.classes, known, by_name)
    if len(classes) < 2:
        raise UserError(f"--classes {args.classes}: give two or more classes, as A,B,C")
    if not args.tail:
        return classes, None
    tail = parse_classes("--tail", args.tail, known, by_name)
    if not set(tail) < set(classes):
        raise UserError(f"--tail {args.tail}: give some of --classes {args.classes}, but not all")
    return classes, sorted(classes.index(c) for c in tail)


def ordered_labels(labels, args, names):
    """Label numbered classes by their place in --classes, else -1; arguments as binary_labels.

    An image of several of them is -1, too. Returns int [M], and fields of a Source.
    """
    numbers = range(labels.shape[1]) if labels.ndim == 2 else np.unique(labels)
    known = describe_numbers(numbers, names)
    chosen, tail = choose_ordered_classes(args, known, names)
    columns = [int(c) for c in chosen]
    is_member = labels[:, columns] == 1 if labels.ndim == 2 else labels[:, None] == columns
    kept = is_member.sum(1) == 1
    notes = [f"left out: {(~kept).sum()} images of other classes"] * bool((~kept).any())
    classes = [names.get(c, c) for c in chosen]
    fields = dict(classes=classes, minority=len(classes) - 1, tail=tail, notes=notes)
    return np.where(kept, is_member.argmax(1), -1), fields
