"""Intervals of scores over the test images: the stratified percentile bootstrap, in NumPy.

Each draw takes as many images of each class as there are, with replacement. A score of a draw
needs only how many images of each class lie at each predicted probability. That makes 2,000 draws
of 4,000 images a matter of a second.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
PERCENTILES = (2.5, 97.5)
# Draws that are computed at once: 64 of 4,000 images fit into the cache of a core.
CHUNK = 64


@dataclass
class Draws:
    """How many images of each class a draw has at each distinct p; p falls along the columns.

    rare, common: float [draws, n]; p: [n]; threshold: a number.
    """

    rare: np.ndarray
    common: np.ndarray
    p: np.ndarray
    threshold: float

    def __post_init__(self):
        # An image at the chosen threshold counts as rare (utils/scores.py), one at 0.5 does not.
        self.threshold = np.nextafter(self.threshold, -1)
        # Images that count as rare when each p in turn is the lowest one that does.
        self.hits = np.cumsum(self.rare, axis=1)
        self.false_alarms = np.cumsum(self.common, axis=1)
        self.n_rare, self.n_common = self.hits[:, -1], self.false_alarms[:, -1]

    def sensitivity(self, threshold=0.5):
        above = np.count_nonzero(self.p > threshold)
        return self.hits[:, above - 1] / self.n_rare if above else np.zeros(len(self.rare))

    def specificity(self, threshold=0.5):
        above = np.count_nonzero(self.p > threshold)
        wrong = self.false_alarms[:, above - 1] if above else 0.0
        return 1 - wrong / self.n_common

    def balanced_accuracy(self, threshold=0.5):
        return (self.sensitivity(threshold) + self.specificity(threshold)) / 2

    def accuracy(self):
        right = self.sensitivity() * self.n_rare + self.specificity() * self.n_common
        return right / (self.n_rare + self.n_common)

    def f1(self):
        hits = self.sensitivity() * self.n_rare
        false_alarms = (1 - self.specificity()) * self.n_common
        return 2 * hits / (hits + false_alarms + self.n_rare)

    def auroc(self):
        """Count the pairs of a rare and a common image in the right order; a tie is half a pair."""
        below = self.n_common[:, None] - self.false_alarms + self.common / 2
        return (self.rare * below).sum(axis=1) / (self.n_rare * self.n_common)

    def average_precision(self):
        precision = self.hits / np.maximum(self.hits + self.false_alarms, 1)
        return (self.rare * precision).sum(axis=1) / self.n_rare

    def brier(self):
        errors = self.rare @ (1 - self.p) ** 2 + self.common @ self.p**2
        return errors / (self.n_rare + self.n_common)

    def sensitivity_at(self, specificity):
        """Return the highest sensitivity of a threshold that keeps at least this specificity."""
        allowed = (1 - specificity) * self.n_common + 1e-9
        is_allowed = self.false_alarms <= allowed[:, None]
        return np.where(is_allowed, self.hits, 0).max(axis=1) / self.n_rare


SCORES = {
    "accuracy": Draws.accuracy,
    "balanced_accuracy": Draws.balanced_accuracy,
    "auroc": Draws.auroc,
    "f1": Draws.f1,
    "average_precision": Draws.average_precision,
    "brier": Draws.brier,
    "sensitivity": Draws.sensitivity,
    "specificity": Draws.specificity,
    "sensitivity_at_90_specificity": lambda draws: draws.sensitivity_at(0.90),
    "sensitivity_at_95_specificity": lambda draws: draws.sensitivity_at(0.95),
    "sensitivity_at_threshold": lambda draws: draws.sensitivity(draws.threshold),
    "specificity_at_threshold": lambda draws: draws.specificity(draws.threshold),
    "balanced_accuracy_at_threshold": lambda draws: draws.balanced_accuracy(draws.threshold),
}


def observed_scores(p_minority, is_minority, threshold=0.5):
    """Return {score: value}, as fractions, of the images as they are.

    p_minority [n]: probability of the minority class; is_minority [n]: the truth. An image counts
    as minority above 0.5, and from `threshold` up for the scores "_at_threshold".
    """
    p, level, is_rare = prepare_images(p_minority, is_minority)
    counts = [np.bincount(level[kind], minlength=len(p))[None, :] for kind in (is_rare, ~is_rare)]
    draws = Draws(*(c.astype(float) for c in counts), p, threshold)
    return {name: float(score(draws)[0]) for name, score in SCORES.items()}


def bootstrap_scores(p_minority, is_minority, threshold=0.5, draws=DRAWS, seed=0, scores=SCORES):
    """Return {score: values [draws]}: each score of each draw of the test images.

    Two calls with the same truth and seed draw the same images: differences of values are paired.
    """
    p, level, is_rare = prepare_images(p_minority, is_minority)
    classes = level[is_rare], level[~is_rare]
    rng = np.random.default_rng(seed)
    found = {name: [] for name in scores}
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        counts = [draw_counts(rng, levels, len(p), size) for levels in classes]
        drawn = Draws(*counts, p, threshold)
        for name, values in found.items():
            values.append(SCORES[name](drawn))
    return {name: np.concatenate(values) for name, values in found.items()}


def bootstrap_intervals(p_minority, is_minority, threshold=0.5, draws=DRAWS, seed=0):
    """Return {score: [low, high]}, the 95 % percentile intervals over the test images."""
    values = bootstrap_scores(p_minority, is_minority, threshold, draws, seed)
    return {name: interval(of_draws) for name, of_draws in values.items()}


def bootstrap_difference(p_a, p_b, is_minority, score, draws=DRAWS, seed=0):
    """Return (score of a minus score of b, its 95 % interval [low, high]) on the same images."""
    difference = observed_scores(p_a, is_minority)[score] - observed_scores(p_b, is_minority)[score]
    a, b = (
        bootstrap_scores(p, is_minority, draws=draws, seed=seed, scores=[score])[score]
        for p in (p_a, p_b)
    )
    return difference, interval(a - b)


def interval(values):
    """Return [low, high] of the middle 95 % of the values."""
    return [float(bound) for bound in np.percentile(values, PERCENTILES)]


def prepare_images(p_minority, is_minority):
    """Return distinct p from high to low, the place of each image among them, and the truth."""
    is_rare = np.asarray(is_minority, dtype=bool)
    if is_rare.all() or not is_rare.any():
        raise ValueError("all images are of one class; scores need both")
    negated, level = np.unique(-np.asarray(p_minority, dtype=np.float64), return_inverse=True)
    return -negated, level, is_rare


def draw_counts(rng, levels, n_levels, size):
    """Draw len(levels) images `size` times; return how many fall on each level [size, n_levels]."""
    drawn = levels[rng.integers(0, len(levels), (size, len(levels)))]
    drawn += n_levels * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n_levels).reshape(size, -1).astype(float)
