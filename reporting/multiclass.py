"""Compare methods over the number of classes: the table and the figure of docs/multiclass.md.

    python -m reporting.multiclass runs/multiclass results/multiclass

Reads the runs of results/multiclass.sh; writes runs.csv and multiclass.png.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reporting.styles import METHOD_STYLES, RC
from utils.files import atomic_write, read_json, read_log, write_table

COLUMNS = "dataset classes method seed commit collapse_gap balanced_accuracy auroc saa cac".split()
# {column: (title of its panel, unit)}
PANELS = {
    "collapse_gap": ("loss below its collapse value", "nats"),
    "balanced_accuracy": ("balanced accuracy of the probe", "%"),
    "saa": ("SAA, mean of classes", "%"),
    "cac": ("CAC, mean (0 is chance)", "%"),
}


def read_runs(folder):
    """Return the rows of runs.csv, as dicts. Scores are percent; cac is rescaled from chance.

    saa and cac are NaN where evaluate_metrics.py was not run.
    """
    rows, unmeasured = [], {"saa": [math.nan], "cac": [math.nan]}
    for path in sorted(Path(folder).glob("*/*/*/*/probe.json")):
        run, log = path.parent, read_log(path.parent)
        config, scores = read_json(run / "config.json", ""), read_json(path, "")["test"]
        has_metrics, n_classes = (run / "metrics.json").exists(), len(config["classes"])
        metrics = read_json(run / "metrics.json", "") if has_metrics else unmeasured
        # Of classes of equal size, chance is one in C.
        chance = 100 / n_classes
        rows.append(
            {
                "dataset": config["dataset"].split("-")[0],
                "classes": n_classes,
                "method": config["method"] if config["lr"] else "untrained",
                "seed": config["seed"],
                "commit": log[0]["commit"],
                "collapse_gap": round(log[-1]["collapse_gap"], 4) + 0.0,
                "balanced_accuracy": round(100 * scores["balanced_accuracy"], 2),
                "auroc": round(100 * scores["auroc"], 2),
                "saa": round(np.mean(metrics["saa"]), 2),
                "cac": round(100 * (np.mean(metrics["cac"]) - chance) / (100 - chance), 2),
            }
        )
    return rows


def draw_comparison(rows):
    """Return a figure with a line of panels per data set: score over the number of classes."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(13, 3.2 * len(datasets) + 0.3), layout="constrained")
        for line, dataset in zip(
            figure.subplots(len(datasets), len(PANELS), squeeze=False), datasets, strict=True
        ):
            for axes, (column, (title, unit)) in zip(line, PANELS.items(), strict=True):
                draw_panel(axes, [row for row in rows if row["dataset"] == dataset], column)
                axes.set(title=title, xlabel="classes", ylabel=f"{dataset}, {unit}")
        figure.legend(*line[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_panel(axes, rows, column):
    """Draw the mean of a column over seeds, with a dot per run."""
    for method, style in METHOD_STYLES.items():
        values = defaultdict(list)
        for row in rows:
            if row["method"] == method and math.isfinite(row[column]):
                values[row["classes"]].append(row[column])
        if values:
            x, means = sorted(values), [np.mean(values[c]) for c in sorted(values)]
            look = dict(color=style.colour, marker=style.marker)
            axes.plot(x, means, linestyle=style.line, label=style.name, **look)
            for c in x:
                axes.plot([c] * len(values[c]), values[c], linestyle="", alpha=0.3, **look)
    axes.set_xscale("log")
    axes.set_xticks(ticks := sorted({row["classes"] for row in rows}), map(str, ticks))
    axes.minorticks_off()


def main():
    folder, out = map(Path, sys.argv[1:])
    rows = read_runs(folder)
    write_table(out / "runs.csv", COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
    with atomic_write(out / "multiclass.png") as temporary:
        draw_comparison(rows).savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    main()
