"""Compare two classifiers image by image: report.py --compare A B.

A and B are runs, or folders with the seeds of one setting. Every number is computed from their
predictions.csv. Runs are paired by seed, images by file name. Each difference has two measures of
doubt, and neither contains the other: an interval over the test images, and a spread over seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting.collect import load_runs, make_rows
from reporting.tables import markdown_table, settings_json
from utils.cli import UserError
from utils.files import read_json
from utils.intervals import DRAWS, bootstrap_scores, interval, observed_scores
from utils.scores import SCORE_TITLES, read_predictions

HEADER = [
    "score",
    "A (%)",
    "B (%)",
    "A - B (points)",
    "95 % interval over test images",
    "standard deviation over seeds",
]


@dataclass
class Predictions:
    """The test predictions of one run, sorted by file name."""

    run: Path
    minority: str  # name of the class; of more than two classes, the names of the tail
    files: np.ndarray
    is_minority: np.ndarray
    p_minority: np.ndarray
    threshold: float | None  # chosen on validation; None: the run is older than the key


def load_seeds(folder):
    """Return {seed: (path, row)} of a run, or of a folder with the seeds of one setting."""
    if folder.name == "finetune" and (folder.parent / "config.json").exists():
        return load_finetuning(folder)
    runs = load_runs(folder)[1]
    if (folder / "config.json").exists():
        # A run may hold re-trained classifiers, which are runs of their own.
        runs = [run for run in runs if run["path"] == "."]
    rows = [row for row in make_rows(runs) if row["state"] == "finished"]
    if len({(row["method"], row["ratio"], settings_json(row)) for row in rows}) > 1:
        raise UserError(f"{folder}: holds runs of several settings; give the folder of one setting")
    if not rows:
        raise UserError(f"{folder}: holds no finished run; finish one, or give another folder")
    return {row["seed"]: (Path(folder, row["path"]), row) for row in rows}


def load_finetuning(folder):
    """Return {seed: (path, row)} of <run>/finetune: the row of the run with its other threshold."""
    ((seed, (run, row)),) = load_seeds(folder.parent).items()
    # That of a contrastive run stands in the run's own folder.
    places = (path / "finetune.json" for path in (folder, run))
    summary = next((path for path in places if path.exists()), folder / "finetune.json")
    threshold = read_json(summary, f"make it with python finetune.py {run}").get("threshold")
    return {seed: (folder, {**row, "kind": "fine-tuned", "finetune_threshold": threshold})}


def load_predictions(run, row):
    """Read the test predictions of a run. Raises UserError if there are none."""
    path = run / "predictions.csv"
    if not path.is_file():
        is_probed = row["kind"] in ("contrastive", "raw pixels")
        script = "linear_probe.py" if is_probed else "finetune.py"
        source = run.parent if row["kind"] == "fine-tuned" else run
        raise UserError(f"{path}: is missing; make it with python {script} {source}")
    table = read_predictions(path)
    tail = row.get("tail", [row["minority"]])
    rows = np.flatnonzero(table["split"] == "test")
    rows = rows[np.argsort(table["file"][rows], kind="stable")]
    result = "probe" if row["kind"] in ("contrastive", "raw pixels") else "finetune"
    return Predictions(
        run=run,
        minority=" + ".join(row["classes"][label] for label in tail),
        files=table["file"][rows],
        is_minority=np.isin(table["label"][rows], tail),
        p_minority=table["p_minority"][rows],
        threshold=row.get(f"{result}_threshold"),
    )


def pair_seeds(a, b):
    """Return [(Predictions of A, Predictions of B)] by seed; two single runs are a pair, too."""
    if len(a) == len(b) == 1:
        pairs = [(*a.values(), *b.values())]
    else:
        pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    if not pairs:
        raise UserError("--compare: A and B share no seed; train both with the same seeds")
    pairs = [tuple(load_predictions(*run) for run in pair) for pair in pairs]
    for pair in pairs:
        check_pair(*pair)
    return pairs


def check_pair(a, b):
    """Raise UserError if two runs cannot be compared image by image."""
    if a.minority != b.minority:
        raise UserError(
            f"{b.run}: its minority is {b.minority!r}, that of {a.run} is {a.minority!r}; "
            "compare runs on one data set"
        )
    if not np.array_equal(a.files, b.files) or not np.array_equal(a.is_minority, b.is_minority):
        raise UserError(
            f"{b.run}: has other test images than {a.run}; compare runs on the same subset"
        )


def compare_scores(pairs):
    """Return {score: row} with mean a and b, difference, low, high and std over seeds.

    The interval is of the mean over seeds: each draw of the test images is the same for both runs
    of a pair, and for all pairs that share their test images. All in percent.
    """
    runs = [run for pair in pairs for run in pair]
    options = [
        (run.p_minority, run.is_minority, 0.5 if run.threshold is None else run.threshold)
        for run in runs
    ]
    observed = [observed_scores(*some) for some in options]
    drawn = [bootstrap_scores(*some) for some in options]
    has_thresholds = all(run.threshold is not None for run in runs)
    return {
        score: compare_values([o[score] for o in observed], [d[score] for d in drawn])
        for score in SCORE_TITLES
        if score in observed[0] and (has_thresholds or not score.endswith("_at_threshold"))
    }


def compare_values(observed, drawn):
    """Compare one score of the runs A, B, A, B, ...: its values, and its values in each draw."""
    a, b = 100 * np.array(observed).reshape(-1, 2).T
    differences = 100 * (np.mean(drawn[::2], axis=0) - np.mean(drawn[1::2], axis=0))
    low, high = interval(differences)
    std = float(np.std(a - b, ddof=1)) if len(a) > 1 else None
    means = {"a": a, "b": b, "difference": a - b}
    means = {key: float(np.mean(values)) for key, values in means.items()}
    return means | {"low": low, "high": high, "std": std}


def comparison_markdown(name_a, name_b, pairs, table):
    """Return the comparison as Markdown: what was paired, the table, how to read it."""
    images, rare = len(pairs[0][0].files), int(pairs[0][0].is_minority.sum())
    rows = [
        [
            SCORE_TITLES[score],
            *(f"{row[key]:.1f}" for key in ("a", "b")),
            f"{row['difference']:+.1f}",
            f"{row['low']:+.1f} to {row['high']:+.1f}",
            "-" if row["std"] is None else f"{row['std']:.1f}",
        ]
        for score, row in table.items()
    ]
    lines = [
        f"A: {name_a}",
        f"B: {name_b}",
        f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of runs; {images} test images, {rare} of them "
        f"{pairs[0][0].minority}, scored against the others",
        "",
        *markdown_table(HEADER, rows, pad=True),
        "",
        f"The interval is a stratified bootstrap ({DRAWS} draws) of the same test images for A and "
        "B.",
        "It says what other test images would change; the deviation over seeds says what other "
        "seeds would.",
        f"Of {len(rows)} scores of two equal classifiers, one interval in twenty leaves out 0.",
    ]
    return "\n".join(lines) + "\n"


def compare_runs(folder_a, folder_b):
    """Compare two runs or settings. Returns (Markdown, rows of a CSV table)."""
    pairs = pair_seeds(load_seeds(folder_a), load_seeds(folder_b))
    table = compare_scores(pairs)
    rows = [{"score": score, **row, "pairs": len(pairs)} for score, row in table.items()]
    return comparison_markdown(folder_a, folder_b, pairs, table), rows
