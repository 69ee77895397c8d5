"""Time and memory of the six metrics, relative to NumPy that sorts all distances."""

from functools import partial

import numpy as np

import evaluate_metrics
from benchmarks.synthetic import DIM, synthetic_embeddings
from benchmarks.timing import compare_times, measure_peak_memory, time_in_rounds

METRICS = {
    "SAD": evaluate_metrics.sample_alignment_distance,
    "SAA": evaluate_metrics.sample_alignment_accuracy,
    "CAD": evaluate_metrics.class_alignment_distance,
    "CAC": evaluate_metrics.class_alignment_consistency,
    "GPU": evaluate_metrics.gaussian_potential,
    "PEU": partial(evaluate_metrics.entropy_uniformity, repeats=1),
}
FIVE = ("SAD", "SAA", "CAD", "CAC", "GPU")
PEU_REPEATS = 5  # of evaluate_metrics.py
ANCHORS = 1000  # rows that NumPy processes; its time is scaled to all rows


def measure_metrics(args, device):
    """Measure every metric, and five and six of them together against NumPy."""
    z, labels = synthetic_embeddings(args.rows, device)
    views = z.transpose(0, 1).flatten(0, 1).cpu().numpy()  # [rows, DIM]
    view_labels = labels.repeat(2).cpu().numpy()
    memory = {
        name: measure_peak_memory(partial(run_metric, name), z, labels) / 1e6 for name in METRICS
    }
    steps = {name: partial(run_metric, name, z, labels) for name in METRICS}
    steps["NumPy, five"] = partial(numpy_five_metrics, views, view_labels)
    steps["NumPy, PEU"] = partial(numpy_entropy, views, view_labels)
    seconds = {name: np.array(times) for name, times in time_in_rounds(steps, args.rounds).items()}
    results = {
        name: {"seconds": float(np.median(seconds[name])), "megabytes": memory[name]}
        for name in METRICS
    }
    scale = args.rows // ANCHORS
    numpy_five, numpy_peu = scale * seconds["NumPy, five"], scale * seconds["NumPy, PEU"]
    five, peu = sum(seconds[name] for name in FIVE), seconds["PEU"]
    numpy_six, six = numpy_five + PEU_REPEATS * numpy_peu, five + PEU_REPEATS * peu
    results["speed"] = {
        "SAD SAA CAD CAC GPU": compare_times(numpy_five, five),
        "PEU, one throw": compare_times(numpy_peu, peu),
        "all six, PEU with five throws": compare_times(numpy_six, six),
    }
    return {"rows": args.rows, "dimensions": DIM}, results


def run_metric(name, z, labels):
    METRICS[name](z.transpose(0, 1), labels)


def sort_distances(anchors, points):
    """Return distances [A, M] in float64 and the order of the points for each anchor."""
    squared = (anchors**2).sum(1)[:, None] + (points**2).sum(1) - 2 * anchors @ points.T
    distance = np.sqrt(np.maximum(squared, 0))
    return distance, distance.argsort(axis=1)


def numpy_five_metrics(rows, labels):
    """Compute five metrics of every k-th row from one distance matrix and one full sort."""
    rows, n, nearest = rows.astype(np.float64), len(rows) // 2, len(rows) // 20
    values = []
    for anchors in np.array_split(np.arange(0, len(rows), len(rows) // ANCHORS), 5):
        distance, order = sort_distances(rows[anchors], rows)
        same = labels[anchors, None] == labels
        values += [
            (order[:, 1] % n == anchors % n).mean(),
            np.take_along_axis(same, order[:, 1 : nearest + 1], axis=1).mean(),
            np.where(same, distance, 0).mean(),
            np.where(same, np.exp(-2 * distance**2), 0).mean(),
        ]
    return values


def numpy_entropy(rows, labels):
    """Compute one repetition of PEU for every k-th row: the entropy of its nearest point."""
    points = np.random.default_rng(0).standard_normal((10 * len(rows), rows.shape[1]))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    step = len(rows) // ANCHORS
    anchors, labels = rows[::step].astype(np.float64), labels[::step]
    blocks = np.array_split(anchors, 10)
    nearest = np.concatenate([sort_distances(block, points)[1][:, 0].copy() for block in blocks])
    entropies = []
    for c in (0, 1):
        p = np.unique(nearest[labels == c], return_counts=True)[1] / len(nearest)
        entropies.append(-(p * np.log2(p)).sum())
    return entropies
