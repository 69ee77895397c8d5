"""Drawn splits: stratified by class; all images of a patient stay in one split."""

import numpy as np

from datasets.source import DRAW_SPLIT
from utils.cli import UserError

# percent of the images, where a data set has no split
DRAWN = {"test": 20, "val": 10}


def draw_splits(labels, percents, seed, groups=None):
    """Draw splits stratified by class; groups, such as patients, are never divided.

    labels: int [M]; percents: {split: percent of the images}, the rest is train; groups: [M], None
    for one image each. A group counts for the rarest class of its images.
    Returns str [M]. A split exceeds its share of a stratum by at most one group. Every split gets
    a group of each class where there are enough of them.
    """
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    counts = np.bincount(labels, minlength=2)
    rarity = np.empty_like(counts)  # of each class: 0 for the most frequent
    rarity[counts.argsort(kind="stable")[::-1]] = np.arange(len(counts))
    group_rarity = np.zeros_like(sizes)
    np.maximum.at(group_rarity, groups, rarity[labels])
    group_split = np.full(len(sizes), "train", dtype="<U5")
    for stratum in range(len(counts)):
        members = np.random.default_rng([seed, DRAW_SPLIT, stratum]).permutation(
            np.flatnonzero(group_rarity == stratum)
        )
        # 100 x images before each member, to compare with percent x total
        before = 100 * (np.cumsum(sizes[members]) - sizes[members])
        total, low = sizes[members].sum(), 0
        for split, percent in percents.items():
            drawn = (before >= low * total) & (before < (low + percent) * total)
            group_split[members[drawn]] = split
            low += percent
    fill_empty_splits(group_split, groups, labels, ("train", *percents))
    return group_split[groups]


def fill_empty_splits(group_split, groups, labels, splits):
    """Give each split that lacks a class one group of it, from the split with most of them.

    group_split: str [G], changed in place; groups: int [M] below G; labels: int [M].
    """
    for label in np.unique(labels):
        members = np.unique(groups[labels == label])
        for split in splits:
            of_split = {s: members[group_split[members] == s] for s in splits}
            donor = max(splits, key=lambda s: len(of_split[s]))
            if len(of_split[split]) == 0 and len(of_split[donor]) > 1:
                group_split[of_split[donor][-1]] = split


def draw_fold(labels, folds, fold, percent, seed, groups=None):
    """Draw one of `folds` cross-validation splits: every image is in the test split of one fold.

    fold: from 1; percent: of all images, for val; the others as in draw_splits. Returns str [M].
    """
    # takes a second to import; only folds need it
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    units = np.arange(len(labels)) if groups is None else groups
    most = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    if folds > most:
        raise UserError(
            f"--folds {folds}: one class has {most} {'images' if groups is None else 'patients'}; "
            f"use --folds {most} or less"
        )
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    drawn = splitter(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    rest, test = list(drawn)[fold - 1]
    split = np.full(len(labels), "test", dtype="<U5")
    percents = {"val": percent * len(labels) / len(rest)}
    split[rest] = draw_splits(
        labels[rest], percents, seed, None if groups is None else groups[rest]
    )
    return split


def split_percents(args):
    """Return {split: percent of the images} as --test-share, --val-share and --folds ask."""
    shares = {"test": 1 / args.folds if args.folds else args.test_share, "val": args.val_share}
    return {split: 100 * (shares[split] or DRAWN[split] / 100) for split in DRAWN}


def draw_by_flags(labels, args, missing=tuple(DRAWN), groups=None):
    """Draw the missing splits as the flags ask; the arguments are those of draw_splits."""
    percents = {split: split_percents(args)[split] for split in missing}
    if args.folds:
        return draw_fold(labels, args.folds, args.fold, percents["val"], args.seed, groups)
    return draw_splits(labels, percents, args.seed, groups)
