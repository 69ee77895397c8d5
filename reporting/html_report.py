"""Write report.html: one file with all figures inside, for one run or for many.

Nothing in it is loaded from outside: charts are inline SVG, images are data URIs, the script and
the style are in the template. Names of classes and files are escaped by Jinja2.
"""

import html
import shlex
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reporting import charts
from reporting.collect import METRICS, run_kind
from reporting.html_images import HARD_WIDTH, SHEET_WIDTH, map_points, shrunk_uri, svg_markup
from reporting.styles import RC, style_of
from reporting.tables import (
    cell_texts,
    excluded_runs,
    how_to_read,
    report_columns,
    setting_texts,
    split_by_subset,
)
from utils.files import atomic_write, read_json
from utils.scores import SCORE_TITLES, read_predictions

TEMPLATE = "report.html.j2"
# Bytes. Charts of further groups are left out, so that the file stays below 5 MB.
CHART_BUDGET = 2_500_000
BAND = "Band: 95 % over test images, drawn with replacement within each class."
CAPTIONS = {
    "Validation": "Dotted: chance of kNN, balanced accuracy and the mean CAC of the classes.",
    "ROC": BAND,
    "Precision and recall": f"{BAND} Dotted: the minority's share of the test images.",
    "Reliability": "Ten bins of equal size with 95 % Wilson intervals. A classifier with balanced "
    "class weights does not predict the prevalence.",
}
FIGURE_TITLES = {
    "accuracy": "Balanced accuracy",
    "saa_cac": "SAA and CAC over the ratios",
    "cac_accuracy": "CAC against balanced accuracy",
}
PROVENANCE = ("commit", "device", "python", "torch", "torchvision", "numpy")


def write_html(out, source, runs, rows, groups, plans, head):
    """Write report.html into `out`.

    source: the folder or the archive of the runs; plans: of plan_figures; head: the first line of
    runs.jsonl.
    """
    folder = source if source.is_dir() else None
    paths = {run["path"]: run for run in runs}
    is_single = len(runs) == 1
    chosen = rows if is_single else first_seeds(groups)
    figures = {} if is_single else draw_figures(plans)
    budget = CHART_BUDGET - sum(map(len, figures.values()))
    sections = []
    for row in chosen:
        section = run_section(row, paths, folder, budget > 0, is_single)
        budget -= sum(len(chart["svg"]) for chart in section["charts"])
        sections.append(section)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        title=sections[0]["title"] if is_single else f"{len(rows)} runs",
        command=head["command"],
        subsets=subset_sections(runs, folder),
        tables=[] if is_single else summary_tables(groups),
        how_to_read=plain_items(how_to_read(rows)),
        figures=figures,
        sections=sections,
        notes=head["notes"] + excluded_runs(rows),
        is_single=is_single,
        next_command=next_command(rows[0], folder) if is_single and folder else None,
    )
    with atomic_write(out / "report.html") as tmp:
        tmp.write_text(text, encoding="utf-8")


def plain_items(text):
    """Return the items of a Markdown list as plain text."""
    return [item.replace("*", "").strip() for item in text.split("\n* ")]


def draw_figures(plans):
    """Return {title: inline SVG} of the figures of the report."""
    found = {}
    for name, draw in plans.items():
        with matplotlib.rc_context(RC):
            figure = draw()
        name = name.removesuffix(".png")
        title = FIGURE_TITLES.get(name, " of ".join(name.split("_", 1)).capitalize())
        if figure is not None:
            found[title] = svg_markup(figure, html.escape(title))
    return found


def first_seeds(groups):
    """Return the row of the lowest seed of each encoder or classifier, in the tables' order."""
    found = {}
    for group in groups:
        key = group.dataset, group.ratio, group.label
        found.setdefault(key, min(group.rows, key=lambda row: row["seed"]))
    return list(found.values())


# tables -------------------------------------------------------------------------------------------


def summary_tables(groups):
    """Return a table per data set and ratio: title, header, and the rows as texts."""
    tables = []
    for (dataset, ratio), members in split_by_subset(groups).items():
        columns = report_columns(members)
        cells = [
            [label_text(g.method, g.label), g.scored_by, str(g.n), *cell_texts(g, columns)]
            for g in members
        ]
        header = ["method", "scored by", "n", *columns.values()]
        tables.append({"title": f"{dataset}, {ratio}", "header": header, "rows": cells})
    return tables


def label_text(method, label):
    """Return a label with the full name of its method: "Supervised Minority (margin 0.5)"."""
    return style_of(method).name + label.removeprefix(method)


def score_table(result):
    """Return [title, test, 95 % interval, val] of each score of a probe or fine-tuning."""
    intervals, table = result.get("test_interval") or {}, []
    for key in [key for key in SCORE_TITLES if key in result.get("test", {})]:
        digits = 3 if key == "brier" else 1
        values = result["test"][key], result["val"].get(key), *intervals.get(key, ())
        test, val, *bounds = (score_text(value, digits) for value in values)
        table.append([SCORE_TITLES[key], test, " to ".join(bounds) or "not kept", val])
    return table


def score_text(value, digits):
    if value is None:
        return "-"
    return f"{value:.3f}" if digits == 3 else f"{100 * value:.1f} %"


def metric_table(metrics, config):
    """Return (header, rows) of the metrics of each class in each space."""
    spaces = {metrics["space"]: metrics, "encoder": metrics.get("encoder", {})}
    header = ["space", "class", *METRICS.values()]
    table = []
    for space, values in spaces.items():
        for label, name in zip(*minority_first(config), strict=True) if values else ():
            found = [values.get(key) for key in METRICS]
            table.append([space, name, *("-" if v is None else f"{v[label]:.3g}" for v in found)])
    return header, table


# data ---------------------------------------------------------------------------------------------


def subset_sections(runs, folder):
    """Return title, counts and contact sheet of each subset, the sheet once per data set."""
    found, sheets = {}, set()
    for run in runs:
        config = run["config"]
        dataset, key = config["dataset"], (config["dataset"], config["ratio"])
        if key in found:
            continue
        path, subset = read_subset(run, folder)
        labels, names = minority_first(config)
        kept = {"train": run["train_counts"], "test": run["test_counts"]}
        splits = {split: n for split, n in (subset["counts"] if subset else kept).items() if n}
        sheet = None
        if path and dataset not in sheets:
            sheet = shrunk_uri(path.with_suffix(".png"), SHEET_WIDTH)
            sheets.add(dataset)
        found[key] = {
            "title": " ".join(key),
            "header": ["split", *names],
            "counts": [
                [split, *(n[str(label)] for label in labels)] for split, n in splits.items()
            ],
            "sheet": sheet,
        }
    return list(found.values())


def minority_first(config):
    """Return the labels of a run and the names of their classes, those of the minority first."""
    minority, classes = config["minority"], config["classes"]
    labels = sorted(range(len(classes)), key=lambda label: label != minority)
    return labels, [f"{classes[minority]} (minority)", *(classes[label] for label in labels[1:])]


def read_subset(run, folder):
    """Return (path, record) of the subset of a run; (None, None) where it is not beside it."""
    path = folder and folder / run["path"] / run["config"]["subset"]
    if not path or not path.is_file():
        return None, None
    return path, read_json(path, "run make_subsets.py again")


# runs ---------------------------------------------------------------------------------------------


def run_section(row, paths, folder, has_charts, is_single):
    """Return what the template shows of one run."""
    run = paths[row["path"]]
    place = folder / row["path"] if folder else None
    result, predictions = best_result(run, place)
    epochs = [line for line in run["log"] if "epoch" in line]
    section = {
        **run_facts(row, run),
        "path": str(place or row["path"]),
        "scores": score_table(result),
        "threshold": result.get("threshold"),
        "threshold_rule": result.get("threshold_rule"),
        "charts": draw_charts(epochs, predictions, result) if has_charts else [],
        "missing": [],
        "map": None,
        "hard": None,
    }
    if predictions is None:
        section["missing"].append("ROC, precision and reliability need predictions.csv: not kept")
    if not has_charts:
        command = f"python report.py {shlex.quote(section['path'])} --html"
        section["missing"].append(f"curves are left out here: {command}")
    if is_single and place:
        path, subset = read_subset(run, folder)
        section["map"] = map_points(place, path, subset)
        section["hard"] = shrunk_uri(place / "hard_examples.png", HARD_WIDTH)
    return section


def run_facts(row, run):
    """Return names, state, metrics, settings and provenance of a run."""
    name = label_text(row["method"], row["label"])
    return {
        "title": f"{row['dataset']} {row['ratio']}: {name}",
        "seed": row["seed"],
        "state": row["state"],
        "is_smoke": bool(row.get("smoke") or row.get("smoke_results")),
        "metrics": metric_table(run["metrics"], run["config"]) if "metrics" in run else None,
        "classes": minority_first(run["config"])[1],
        "tail": [run["config"]["classes"][label] for label in run["config"].get("tail", ())],
        "settings": setting_texts(row),
        "provenance": [f"{key} {row[key]}" for key in PROVENANCE if key in row],
        "commands": run_commands(run),
    }


def best_result(run, place):
    """Return (probe.json or finetune.json or {}, its predictions of the test split or None)."""
    name = next((name for name in ("probe", "finetune") if name in run), None)
    if name is None:
        return {}, None
    # The predictions of a supervised run stand beside those of its probe.
    paths = {"probe": "probe_predictions.csv", "finetune": "predictions.csv"}
    if run_kind(run["config"]) in ("contrastive", "raw pixels"):
        paths = {"probe": "predictions.csv", "finetune": "finetune/predictions.csv"}
    path = place and place / paths[name]
    if not path or not path.is_file():
        return run[name], None
    table = read_predictions(path)
    is_test = table["split"] == "test"
    tail = run["config"].get("tail", [run["config"]["minority"]])
    return run[name], (table["p_minority"][is_test], np.isin(table["label"][is_test], tail))


def draw_charts(epochs, predictions, result):
    """Return title, SVG and caption of each chart that can be drawn."""
    found = {}
    with matplotlib.rc_context(RC):
        if epochs:
            found["Loss"] = charts.loss_chart(epochs)
            found["Validation"] = charts.validation_chart(epochs)
        if predictions:
            found["ROC"] = charts.roc_chart(*predictions, result.get("threshold"))
            found["Precision and recall"] = charts.precision_recall_chart(*predictions)
            found["Reliability"] = charts.reliability_chart(*predictions)
    return [
        {"title": title, "svg": svg_markup(figure, title), "caption": CAPTIONS.get(title, "")}
        for title, figure in found.items()
        if figure is not None
    ]


def run_commands(run):
    """Return the commands that made a run and measured it."""
    results = [run[name] for name in ("probe", "metrics", "finetune") if name in run]
    found = [line["command"] for line in run["log"][:1] if "command" in line]
    found += [result.get("provenance", {}).get("command") for result in results]
    return list(dict.fromkeys(filter(None, found)))


def next_command(row, folder):
    """Return the next command for one run; None if it is not finished and its own is unknown."""
    place = shlex.quote(str(folder / row["path"]))
    if row["state"] != "finished":
        return row.get("command")
    if row["kind"] == "contrastive" and not row["probes"]:
        return f"python linear_probe.py {place}"
    if "metrics_n" not in row and row["kind"] in ("contrastive", "supervised"):
        return f"python evaluate_metrics.py {place}"
    script = "linear_probe.py" if row["probes"] else "finetune.py"
    return f"python {script} {place} --predict FOLDER --csv predictions.csv"
