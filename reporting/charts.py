"""The charts of one run: loss, validation, ROC, precision and recall, reliability.

All take the predictions of test images: p [n], the probability of the minority class, and
is_minority [n], the truth.
"""

import numpy as np
from matplotlib.figure import Figure

from reporting.styles import INK, MAJORITY, MINORITY, REST
from utils.intervals import CHUNK, PERCENTILES, Draws, draw_counts, prepare_images

# Enough for a smooth band; the intervals in the tables take 2,000.
BAND_DRAWS = 512
GRID = np.linspace(0, 1, 101)
BINS = 10
VALIDATION = {
    # Entries of log.jsonl: percent, a pair of classes or a number; name and line.
    "val_saa": ("SAA", "-", "o", MAJORITY),
    "val_cac": ("CAC", "--", "s", MINORITY),
    "val_knn": ("kNN", ":", "^", INK),
    # Fractions, of classifiers.
    "val_balanced_accuracy": ("balanced accuracy", "-", "o", MAJORITY),
    "val_auroc": ("AUROC", "--", "s", MINORITY),
}


def new_panel():
    figure = Figure(figsize=(4.2, 3.5), layout="constrained")
    return figure, figure.subplots()


def loss_chart(lines):
    """Draw the loss over the epochs, and its value for embeddings that are all equal.

    lines: those of log.jsonl with an epoch.
    """
    figure, ax = new_panel()
    ax.plot(*epoch_values(lines, "loss"), color=MAJORITY, lw=1.4, label="loss")
    gaps = [line for line in lines if line.get("collapse_gap") is not None]
    if gaps:
        value = gaps[-1]["loss"] + gaps[-1]["collapse_gap"]
        looks = {"color": MINORITY, "ls": "--", "lw": 1.4}
        ax.axhline(value, label="collapse: all embeddings equal", **looks)
        # An axis of a hundredth of a nat would make a run at its collapse look like learning.
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.85 * value), max(high, 1.05 * value))
    ax.set(xlabel="epoch", ylabel="loss (nats)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)
    return figure


def epoch_values(lines, key):
    """Return epochs from 1 and the values of a key in percent, the mean over the classes."""
    lines = [line for line in lines if line.get(key) is not None]
    scale = 100 if key in ("val_balanced_accuracy", "val_auroc") else 1
    return [line["epoch"] + 1 for line in lines], [scale * np.mean(line[key]) for line in lines]


def validation_chart(lines):
    """Draw what was measured on the validation split during the training; None without it."""
    figure, ax = new_panel()
    for key, (name, line, marker, colour) in VALIDATION.items():
        epochs, values = epoch_values(lines, key)
        if epochs:
            looks = {"ls": line, "marker": marker, "ms": 3, "lw": 1.2, "color": colour}
            ax.plot(epochs, values, label=name, **looks)
    if not ax.get_lines():
        return None
    classes = next((len(line["val_cac"]) for line in lines if "val_cac" in line), 2)
    ax.axhline(100 / classes, color=REST, lw=1, ls=(0, (1, 3)))
    ax.set(xlabel="epoch", ylabel="validation, mean of classes (%)", ylim=(-2, 102))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8, ncols=2)
    return figure


def roc_chart(p, is_minority, threshold):
    """Draw sensitivity against the share of false alarms, with a 95 % band over test images."""
    figure, ax = new_panel()
    draw_band(ax, p, is_minority, roc_on_grid)
    observed = observed_draw(p, is_minority)
    ax.plot(*roc_points(observed, 0), color=MAJORITY, lw=1.6)
    ax.plot([0, 1], [0, 1], color=REST, lw=1, ls=(0, (1, 3)))
    above = 0 if threshold is None else np.count_nonzero(observed.p > threshold)
    if above:
        i = above - 1
        x, y = (
            observed.false_alarms[0, i] / observed.n_common,
            observed.hits[0, i] / observed.n_rare,
        )
        ax.plot(x, y, "o", color=MINORITY, ms=7, label="threshold chosen on validation")
        ax.legend(loc="lower right", fontsize=8)
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return figure


def precision_recall_chart(p, is_minority):
    """Draw precision against recall of the minority, with a 95 % band over test images."""
    figure, ax = new_panel()
    draw_band(ax, p, is_minority, precision_on_grid)
    observed = observed_draw(p, is_minority)
    ax.plot(GRID, precision_on_grid(observed)[0], color=MAJORITY, lw=1.6)
    share = np.mean(is_minority)
    ax.axhline(share, color=REST, lw=1, ls=(0, (1, 3)))
    ax.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.01, 1.01), ylim=(0, 1.01))
    return figure


def reliability_chart(p, is_minority):
    """Draw the observed share of the minority against p in BINS bins of equal size."""
    figure, ax = new_panel()
    order = np.argsort(p)
    bins = [rows for rows in np.array_split(order, BINS) if len(rows)]
    means = np.array([p[rows].mean() for rows in bins])
    shares = np.array([is_minority[rows].mean() for rows in bins])
    low, high = wilson_interval(shares, np.array([len(rows) for rows in bins]))
    ax.plot([0, 1], [0, 1], color=REST, lw=1, ls=(0, (1, 3)))
    errors = [shares - low, high - shares]
    ax.errorbar(means, shares, errors, color=MAJORITY, marker="o", ms=5, lw=1.2, capsize=2)
    ax.set(xlabel="predicted probability of the minority", ylabel="observed share")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure


def wilson_interval(share, n, z=1.96):
    """Return the 95 % interval [low, high] of a share of n images (Wilson, 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding must not put a bound on the wrong side of the share.
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


# bootstrap bands ----------------------------------------------------------------------------------


def observed_draw(p, is_minority):
    """Return the Draws with the test images as they are."""
    p, level, is_rare = prepare_images(p, is_minority)
    counts = [np.bincount(level[kind], minlength=len(p))[None, :] for kind in (is_rare, ~is_rare)]
    return Draws(*(c.astype(float) for c in counts), p, 0.5)


def roc_points(draws, i):
    """Return (false alarms, hits) of one draw as fractions, from (0, 0) on."""
    x = np.r_[0, draws.false_alarms[i] / draws.n_common[i]]
    return x, np.r_[0, draws.hits[i] / draws.n_rare[i]]


def roc_on_grid(draws):
    """Return the sensitivity at each false alarm rate of GRID [draws, len(GRID)]."""
    return np.array([np.interp(GRID, *roc_points(draws, i)) for i in range(len(draws.hits))])


def precision_on_grid(draws):
    """Return the precision at the highest threshold that reaches each recall of GRID."""
    precision = draws.hits / np.maximum(draws.hits + draws.false_alarms, 1)
    recall = draws.hits / draws.n_rare[:, None]
    lines = zip(precision, recall, strict=True)
    # At recall 0 stands the precision of the first minority image that is found.
    reached = np.maximum(GRID - 1e-12, 1e-12)
    return np.array([values[np.searchsorted(r, reached)] for values, r in lines])


def draw_band(ax, p, is_minority, on_grid):
    """Fill the middle 95 % of the curves of BAND_DRAWS stratified draws of the test images."""
    p, level, is_rare = prepare_images(p, is_minority)
    rng, curves = np.random.default_rng(0), []
    for _ in range(0, BAND_DRAWS, CHUNK):
        counts = [draw_counts(rng, level[kind], len(p), CHUNK) for kind in (is_rare, ~is_rare)]
        curves.append(on_grid(Draws(*counts, p, 0.5)))
    low, high = np.percentile(np.concatenate(curves), PERCENTILES, axis=0)
    ax.fill_between(GRID, low, high, color=MAJORITY, alpha=0.25, lw=0)
