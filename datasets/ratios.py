"""The training images of a class ratio: percents of two classes, or a long tail of several."""

import math
from decimal import Decimal, InvalidOperation

import numpy as np

from datasets.source import DRAW_TEST, DRAW_TRAIN, DRAW_VAL, SPLITS
from utils.cli import UserError

RATIOS = ("99-1", "95-5", "50-50", "natural")


def parse_ratio(text):
    """Parse '99-1' as ('99-1', 0.99, 0.01); 'natural' and 'lt100' have None for both shares."""
    if text == "natural":
        return text, None, None
    try:
        if text.startswith("lt"):
            return long_tail_name(float(text[2:])), None, None
        major, minor = (Decimal(percent) for percent in text.split("-"))
        if not (major + minor == 100 and major >= minor >= 0):
            raise ValueError
    except (ValueError, InvalidOperation):
        raise UserError(
            f"--ratios {text}: give percent of majority and minority in train, as 99-1, or natural"
        ) from None
    name = "-".join(format(percent.normalize(), "f") for percent in (major, minor))
    return name, float(major / 100), float(minor / 100)


def long_tail_name(imbalance):
    """Return the name of a long-tail ratio, e.g. "lt100". Raises ValueError below 1."""
    if not 1 <= imbalance < math.inf:
        raise ValueError
    return f"lt{imbalance:g}"


def ratio_counts(class_sizes, ratios):
    """Count the images kept per class: min(floor(m * ratio_c), n_c), m the smallest class.

    The total is about m at every ratio. class_sizes: images per class; ratios: share per class,
    sum 1. Computed in double precision, as the reference does: 100 * 0.29 gives 28.
    """
    smallest = min(class_sizes)
    return [min(math.floor(smallest * r), n) for r, n in zip(ratios, class_sizes, strict=True)]


def long_tail_counts(class_sizes, imbalance):
    """Count the images kept per class: n_c = floor(n_0 * imbalance^(-c / (C - 1))).

    n_0 is the largest number that the images of every class allow. class_sizes: images per class,
    the class to be largest first. Source: CIFAR-LT of Cao et al. 2019, arXiv:1906.07413.
    """
    last = len(class_sizes) - 1
    shares = [imbalance ** (-c / last) for c in range(last + 1)]
    largest = min(n / share for n, share in zip(class_sizes, shares, strict=True))
    # Rounding must not cost the class that limits the others an image.
    return [math.floor(largest * share + 1e-6) for share in shares]


def count_kept(class_sizes, ratio, minority):
    """Count the training images of a ratio, one number per class.

    In a long tail the minority is the rarest; the others keep their order.
    """
    if ratio == "natural":
        return class_sizes
    if ratio.startswith("lt"):
        order = sorted(range(len(class_sizes)), key=lambda c: (c == minority, c))
        kept = long_tail_counts([class_sizes[c] for c in order], float(ratio[2:]))
        return [kept[order.index(c)] for c in range(len(class_sizes))]
    if len(class_sizes) > 2:
        raise UserError(f"--ratios {ratio}: is for two classes; use --imbalance or natural")
    _, major, minor = parse_ratio(ratio)
    return ratio_counts(class_sizes, [minor, major] if minority == 0 else [major, minor])


def draw_rows(labels, split, ratio, minority, balance, seed):
    """Draw the rows of one ratio: {"train": sorted rows, "val": ..., "test": ...}.

    Every ratio takes the head of one permutation per class, so that the ratios are nested.
    """
    drawn, classes = {}, range(labels.max() + 1)
    for name, stream in zip(SPLITS, (DRAW_TRAIN, DRAW_VAL, DRAW_TEST), strict=True):
        members = [np.flatnonzero((split == name) & (labels == c)) for c in classes]
        counts = [len(rows) for rows in members]
        if name == "train":
            counts = count_kept(counts, ratio, minority)
        elif balance:
            counts = [min(counts)] * len(counts)
        rows = [
            np.random.default_rng([seed, stream, c]).permutation(members[c])[: counts[c]]
            for c in classes
        ]
        drawn[name] = np.sort(np.concatenate(rows)).astype(np.int64)
    return drawn


def draw_all_ratios(source, labels, split, args):
    """Draw the rows of --ratios: (label of the minority, {ratio: rows}).

    A ratio that leaves no image of a class is left out; if it was asked for, it raises UserError.
    """
    classes = range(len(source.classes))
    for name in SPLITS:
        for c in classes:
            if not ((split == name) & (labels == c)).any():
                needs = "both classes" if len(classes) == 2 else "all classes"
                raise UserError(
                    f"{args.data_root}: no image of {source.classes[c]} in {name}; every split "
                    f"needs {needs}: add images or patients, three of a class at least"
                )
    minority = source.minority
    if minority is None:
        minority = int(np.bincount(labels[split == "train"]).argmin())
    # of the user's own images, the natural ratio comes first
    default = ("natural", *RATIOS[:3]) if args.dataset in ("folder", "table") else RATIOS
    drawn = {}
    for ratio in args.ratios or (default if len(classes) == 2 else ("natural",)):
        rows = draw_rows(labels, split, ratio, minority, source.balance, args.seed)
        counts = np.bincount(labels[rows["train"]], minlength=len(classes))
        if counts.min() > 0:
            drawn[ratio] = rows
        elif args.ratios:
            name, smallest = (
                source.classes[counts.argmin()],
                np.bincount(labels[split == "train"]).min(),
            )
            raise UserError(
                f"--ratios {ratio}: leaves no training image of {name}; give it a larger share, "
                f"{math.ceil(10000 / smallest) / 100:g} % at least"
            )
    return minority, drawn


def choose_tail(counts, chosen):
    """Return (label of the rarest class, labels of the tail) of more than two classes.

    counts: training images per class; of equals, the last is the rarest. chosen: the labels of
    --tail; None: the classes below half of the mean size, at least the rarest.
    """
    rarest = len(counts) - 1 - int(np.argmin(counts[::-1]))
    below = [c for c, n in enumerate(counts) if n < sum(counts) / len(counts) / 2]
    return rarest, chosen or below or [rarest]
