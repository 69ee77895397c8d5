"""The training rows of a linear probe: --rows own, balanced, subsampled, one-percent."""

import hashlib
import json

import numpy as np

from datasets.subset import load_subset

ROW_SETS = ("own", "balanced", "subsampled", "one-percent")
# One random stream per draw, apart from those of make_subsets.py.
STREAMS = {"subsampled": 101, "one-percent": 102}
MIN_PER_CLASS = 10  # of one-percent


def draw_row_sets(names, labels, own, pool, seed, balanced=None):
    """Return {name: training rows} for some of ROW_SETS.

    labels int [M]; own: the run's training rows; pool: all training rows of the data set; balanced:
    the training rows of the 50-50 subset, left out if None. The draws depend on `seed` alone, the
    seed of the subset.
    """
    row_sets = {}
    for name in names:
        if name == "own":
            row_sets[name] = own
        elif name == "balanced" and balanced is not None:
            row_sets[name] = balanced
        elif name == "subsampled":
            row_sets[name] = draw_subsampled(own, labels, seed)
        elif name == "one-percent":
            row_sets[name] = draw_one_percent(pool, labels, seed)
    return row_sets


def draw_subsampled(rows, labels, seed):
    """Cut rows to the number of the rarer class, in each class."""
    rarer = np.bincount(labels[rows], minlength=labels.max() + 1).min()
    return draw_per_class(rows, labels, rarer, [seed, STREAMS["subsampled"]])


def draw_one_percent(pool, labels, seed):
    """Draw 1 % of the training images of the data set, equally many per class, at least 10.

    pool: the training rows of the whole data set, whatever the ratio of the run. An imbalanced run
    has too few rare images for this draw. If a class has fewer images than wanted, every class gets
    as many as it has. Source: supplement S2.3 of arXiv:2503.17024, as a public rerun quotes it: "a
    class-balanced subset of 1 % of the training images"; not checked against the paper.
    """
    counts = np.bincount(labels[pool], minlength=2)
    wanted, found = max(MIN_PER_CLASS, round(0.01 * len(pool) / len(counts))), int(counts.min())
    if found < wanted:
        print(f"one-percent rows: {found} per class, not {wanted}; the data set has no more")
    return draw_per_class(pool, labels, min(wanted, found), [seed, STREAMS["one-percent"]])


def draw_per_class(rows, labels, n, seed):
    """Draw n rows of each class without replacement; returns them sorted."""
    drawn = [
        np.random.default_rng([*seed, c]).permutation(rows[labels[rows] == c])[:n]
        for c in range(labels.max() + 1)
    ]
    return np.sort(np.concatenate(drawn))


def balanced_ratio(subset):
    """Return the name of the ratio with equal classes."""
    return "50-50" if len(subset.classes) == 2 else "lt1"


def load_balanced_sibling(subset, smoke=False):
    """Load the balanced subset of the same images; None where there is none or it is `subset`."""
    ratio = balanced_ratio(subset)
    path = subset.path.with_name(f"{ratio}.json")
    if subset.ratio == ratio or not path.exists():
        return None
    # images.npy has been verified with the subset
    sibling = load_subset(path, verify=False)
    if sibling.sha256 != subset.sha256:
        return None
    return sibling.limit_for_smoke() if smoke else sibling


def describe_rows(rows, labels):
    """Return the record of training rows for probe.json: counts per class and a checksum."""
    counts = np.bincount(labels[rows], minlength=labels.max() + 1).tolist()
    digest = hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()
    return {"counts": counts, "sha256": digest}
