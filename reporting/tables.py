"""Group runs by seed, and write the tables: results.csv, summary.csv, report.md."""

import csv
import io
import itertools
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reporting.collect import (
    METRICS,
    NOT_APPLICABLE,
    NOT_RUN,
    ROW_SETS,
    SCORES,
    setting_text,
    settings_json,
)
from utils.files import read_json

# mean and standard deviation over seeds -----------------------------------------------------------


class Statistic(NamedTuple):
    mean: float
    std: float | None  # n - 1; None for a single value
    values: list


class Interval(NamedTuple):
    """95 % bootstrap interval over the test images: the bounds of each seed, averaged."""

    low: float
    high: float


@dataclass
class Group:
    """Finished runs that differ in the seed alone, and one way in which they were scored.

    cells: {quantity: Statistic, NOT_RUN or NOT_APPLICABLE}; percent for scores, SAA, CAC, PEU. The
    quantities "<score>_interval" hold an Interval or NOT_APPLICABLE.
    """

    dataset: str
    ratio: str
    minority_percent: float | None
    method: str
    label: str
    scored_by: str
    rows: list
    cells: dict

    @property
    def n(self):
        return len(self.rows)

    @property
    def is_plain(self):
        """Whether no setting sets these runs apart from the others of their method."""
        return self.label == self.method

    @property
    def name(self):
        """Label for figures; it says how the runs were scored where that is not the usual way."""
        kind = self.rows[0]["kind"]
        usual = "linear probe" if kind in ("contrastive", "raw pixels") else kind
        if self.scored_by == usual:
            return self.label
        if self.scored_by == "from scratch":
            return f"{self.label} from scratch"
        return f"{self.label}, {self.scored_by}"


def group_by_seed(rows):
    """Return the Groups of the finished runs without --smoke, in the order of the rows."""
    members = {}
    for row in rows:
        if row["state"] == "finished" and not row.get("smoke"):
            for scored_by in scoring_protocols(row):
                names = row["dataset"], row["ratio"], row["label"], settings_json(row), scored_by
                members.setdefault(names, []).append(row)
    groups = []
    for (dataset, ratio, label, _, scored_by), runs in members.items():
        values = [row_values(row, scored_by) for row in runs]
        cells = {key: mean_and_std([value[key] for value in values]) for key in values[0]}
        cells |= {f"{score}_interval": mean_interval(runs, scored_by, score) for score in SCORES}
        share, method = runs[0]["minority_percent"], runs[0]["method"]
        groups.append(Group(dataset, ratio, share, method, label, scored_by, runs, cells))
    return groups


def scoring_protocols(row):
    """Return {what gave the run's numbers: what its columns begin with}.

    Other protocols are other measurements, never averaged.
    """
    probes = {"probe": "linear probe"} if row["kind"] == "contrastive" else {}
    sources = row["probes"] or probes
    if row["kind"] == "re-trained":
        return {"re-trained": "finetune"}
    if row["kind"] == "supervised":
        sources = {"finetune": "from scratch", **sources}
    elif "finetune_test_accuracy" in row:
        sources = {**sources, "finetune": row["finetune_label"]}
    metrics = []
    if row.get("metrics_neighborhood", 0.05) != 0.05:
        metrics.append(f"CAC neighborhood {row['metrics_neighborhood']:g}")
    return {", ".join([name, *metrics]): prefix for prefix, name in sources.items()}


def row_values(row, scored_by):
    """Return the numbers of one run as the tables show them: float, None or NOT_APPLICABLE."""

    def percent(key):
        return None if row.get(key) is None else 100 * row[key]

    prefix = scoring_protocols(row)[scored_by]
    values = {score: percent(f"{prefix}_test_{score}") for score in SCORES}
    for name, score in itertools.product(ROW_SETS, SCORES):
        key = f"{prefix}_test_{name}"
        # null: there is no 50-50 subset beside the run's own
        is_missing = prefix == "finetune" or row.get(key, ...) is None
        values[f"{name}_{score}"] = NOT_APPLICABLE if is_missing else percent(f"{key}_{score}")
    # metrics.json and the loss are about the encoder before fine-tuning.
    has_encoder = not scored_by.startswith(("fine-tuned", "re-trained"))
    has_encoder &= row["kind"] != "raw pixels"
    for key, side in itertools.product(METRICS, ("minority", "majority")):
        values[f"{key}_{side}"] = row.get(f"{key}_{side}") if has_encoder else NOT_APPLICABLE
    # An untrained network has the loss of whichever method was named.
    has_loss = has_encoder and row["method"] != "untrained"
    values["final_loss"] = row.get("final_loss") if has_loss else NOT_APPLICABLE
    # The log has null where the loss has no collapse value.
    gap = row.get("last_collapse_gap") if has_loss else None
    values["below_collapse"] = NOT_APPLICABLE if gap is None else gap
    return values


def mean_and_std(values):
    measured = [float(value) for value in values if value not in (None, NOT_APPLICABLE)]
    if not measured:
        return NOT_RUN if None in values else NOT_APPLICABLE
    std = float(np.std(measured, ddof=1)) if len(measured) > 1 else None
    return Statistic(float(np.mean(measured)), std, measured)


def mean_interval(rows, scored_by, score):
    """Return the Interval of a score in percent; NOT_APPLICABLE where no result keeps one."""
    keys = [f"{scoring_protocols(row)[scored_by]}_test_interval_{score}" for row in rows]
    bounds = [row[key] for row, key in zip(rows, keys, strict=True) if key in row]
    return Interval(*map(float, 100 * np.mean(bounds, axis=0))) if bounds else NOT_APPLICABLE


def finite_cell(group, key):
    """Return the Statistic of a quantity, or None where there is nothing to draw."""
    cell = group.cells[key]
    return cell if isinstance(cell, Statistic) and np.isfinite(cell.mean) else None


def first_probes(groups):
    """Leave out the further linear probes of encoders that were probed in several ways."""
    kept, probed = [], set()
    for group in groups:
        key = group.dataset, group.ratio, group.label, settings_json(group.rows[0])
        is_probe = group.scored_by.startswith("linear probe")
        if not (is_probe and key in probed):
            kept.append(group)
        if is_probe:
            probed.add(key)
    return kept


def encoder_groups(groups):
    """Return one Group per encoder: no fine-tuning, no re-training, no second way of scoring."""
    found = {}
    for group in groups:
        if not group.scored_by.startswith(("fine-tuned", "re-trained")):
            settings = settings_json(group.rows[0])
            found.setdefault((group.dataset, group.ratio, group.label, settings), group)
    return list(found.values())


# tables -------------------------------------------------------------------------------------------

SCORE_COLUMNS = {
    "accuracy": "accuracy (%)",
    "balanced_accuracy": "balanced accuracy (%)",
    "auroc": "AUROC (%)",
}
ENCODER_COLUMNS = {
    "saa_minority": "SAA minority (%)",
    "saa_majority": "SAA majority (%)",
    "cac_minority": "CAC minority (%)",
    "cac_majority": "CAC majority (%)",
    "final_loss": "final loss (nats)",
    "below_collapse": "below collapse (nats)",
}
TERMINAL_COLUMNS = {
    "balanced_accuracy": "bal. acc.",
    "auroc": "AUROC",
    "saa_minority": "SAA min.",
    "saa_majority": "SAA maj.",
    "cac_minority": "CAC min.",
    "cac_majority": "CAC maj.",
    "below_collapse": "below collapse",
}
HOW_TO_READ = """\
* ± is the spread over seeds: the standard deviation (n - 1) of n runs. A single seed has none. It
  does not contain the choice of the test images.
* *Interval over test images* is the 95 % bootstrap interval of one run: what other test images of
  the same kind would change. Of several seeds the bounds are averaged.
* All scores are on the test split, accuracies at the threshold 0.5. Its images and rare images are
  counted below each table.
* "not run" was not measured yet. "-" does not apply.
* The brackets after a method name the settings that set these runs apart from the others.
* *Scored by* says what gave the accuracies: a linear probe on the frozen encoder, or the trained
  network itself ("from scratch", "fine-tuned", "re-trained").
* The linear probe is trained on the run's own training rows, or on those that a column names: of
  the 50-50 subset, own rows subsampled to the rarer class, or a balanced 1 % of the data set.
* "untrained" is a network with learning rate 0, "raw pixels" a probe without a network.
* *Below collapse* is the loss of embeddings that are all equal, minus the final loss. About 0 means
  collapsed. With two views the first is log(2 · batch size - 1); "-" where it is not constant."""

OF_CLASSES = """\
* Of more than two classes, accuracy, balanced accuracy, AUROC and F1 are those of all classes. The
  minority is the rarest class, and the majority the mean of the others."""

# Entries of a row that are no column of results.csv.
NOT_IN_TABLES = ("settings", "probes", "history")
FIGURE_CAPTION = "Markers and bars are means with standard deviations, small dots single seeds."


def markdown_table(header, rows, text_columns=1, pad=False):
    """Return the lines of a Markdown table; columns after `text_columns` hold numbers."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(header))]
    table = [header, rule, *rows]
    if pad:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table = [[c.ljust(w) for c, w in zip(cells, widths, strict=True)] for cells in table]
    return [f"| {' | '.join(cells)} |" for cells in table]


def csv_text(rows):
    """Return rows (dicts) as CSV; the columns are the keys of all rows."""
    file, columns = io.StringIO(), dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def measured_row_sets(groups):
    """Return the names in ROW_SETS that a probe of these groups was trained on."""
    return [
        name
        for name in ROW_SETS
        if any(isinstance(group.cells[f"{name}_accuracy"], Statistic) for group in groups)
    ]


def report_columns(groups):
    """Return {quantity: title}; the 50-50 rows and others have columns where they were probed."""
    intervals = {
        f"{score}_interval": title.replace(" (%)", ", interval over test images (%)")
        for score, title in SCORE_COLUMNS.items()
        if any(isinstance(group.cells[f"{score}_interval"], Interval) for group in groups)
    }
    intervals.pop("accuracy_interval", None)
    rows = {
        f"{name}_{score}": title.replace(" (%)", f", {ROW_SETS[name]} (%)")
        for name in measured_row_sets(groups)
        for score, title in SCORE_COLUMNS.items()
        if score != "accuracy"
    }
    return {**SCORE_COLUMNS, **intervals, **rows, **ENCODER_COLUMNS}


def results_table(rows):
    """Return the rows of results.csv: one per run, known columns first, lists as JSON."""
    first = [
        *("dataset", "ratio", "minority_percent", "method", "label", "seed", "state", "path"),
        *("arch", "epochs", "batch_size", "size", "smoke"),
        *(f"{name}_test_{score}" for name in ("probe", "finetune") for score in SCORES),
        *(f"{key}_{side}" for key in METRICS for side in ("minority", "majority")),
        *("final_loss", "last_collapse_gap", "command", "commit", "device"),
    ]
    columns = first + sorted({key for row in rows for key in row} - {*first, *NOT_IN_TABLES})
    return [
        {
            key: json.dumps(row[key]) if isinstance(row.get(key), list) else row.get(key)
            for key in columns
        }
        for row in rows
    ]


def summary_table(groups):
    """Return the rows of summary.csv: mean, standard deviation and n of every quantity."""
    table = []
    hidden = tuple(name for name in ROW_SETS if name not in measured_row_sets(groups))
    for group in groups:
        names = ("dataset", "ratio", "minority_percent", "label", "scored_by", "n")
        row = {key: getattr(group, key) for key in names}
        row["seeds"] = " ".join(str(run["seed"]) for run in group.rows)
        for key, cell in group.cells.items():
            if key.startswith(hidden):
                continue
            if key.endswith("_interval"):
                if isinstance(cell, Interval):
                    row |= {f"{key}_low_percent": cell.low, f"{key}_high_percent": cell.high}
                continue
            name = f"{key}_percent" if key.endswith(SCORES) else key
            is_measured = isinstance(cell, Statistic)
            row[f"{name}_mean"] = cell.mean if is_measured else cell
            row[f"{name}_std"] = cell.std if is_measured else None
            row[f"{name}_n"] = len(cell.values) if is_measured else 0
        row["settings"] = settings_json(group.rows[0])
        row["commits"] = distinct_text(group.rows, "commit")
        row["devices"] = distinct_text(group.rows, "device")
        table.append(row)
    return table


def distinct_text(rows, key):
    return ", ".join(dict.fromkeys(str(row.get(key, "unknown")) for row in rows))


def cell_text(cell, n, digits):
    """Return a cell as "mean ± std" or "mean", with its own n where it differs from the row's."""
    if isinstance(cell, Interval):
        return f"{cell.low:.{digits}f} to {cell.high:.{digits}f}"
    if not isinstance(cell, Statistic):
        return cell
    # The sum with 0.0 turns -0.000 into 0.000.
    mean = f"{round(cell.mean, digits) + 0.0:.{digits}f}"
    std = "" if cell.std is None else f" ± {cell.std:.{digits}f}"
    return mean + std + ("" if len(cell.values) == n else f" (n {len(cell.values)})")


def cell_texts(group, columns):
    digits = {"final_loss": 3, "below_collapse": 3}
    return [cell_text(group.cells[key], group.n, digits.get(key, 1)) for key in columns]


def split_by_subset(groups):
    """Return {(data set, ratio): its Groups}."""
    subsets = {}
    for group in groups:
        subsets.setdefault((group.dataset, group.ratio), []).append(group)
    return subsets


def terminal_tables(groups):
    """Return the main columns of the tables as text for the terminal."""
    header = ["method", "n", *TERMINAL_COLUMNS.values()]
    lines = []
    for (dataset, ratio), members in split_by_subset(groups).items():
        rows = [[g.name, str(g.n), *cell_texts(g, TERMINAL_COLUMNS)] for g in members]
        lines += [f"{dataset}, {ratio} (%, loss in nats)", ""]
        lines += [*markdown_table(header, rows, pad=True), ""]
    return "\n".join(lines)


def how_to_read(rows):
    has_classes = any(len(row["classes"]) > 2 for row in rows)
    return HOW_TO_READ + f"\n{OF_CLASSES}" * has_classes


def report_markdown(groups, figures, notes, command):
    """Return report.md: a table with its provenance per data set and ratio, figures, notes."""
    lines = [
        "# Results",
        "",
        f"Generated by `{command}`; nothing is typed by hand.",
        "[results.csv](results.csv) holds every run, [summary.csv](summary.csv) every quantity.",
        "",
        how_to_read(row for group in groups for row in group.rows),
    ]
    for (dataset, ratio), members in split_by_subset(groups).items():
        columns = report_columns(members)
        header = ["method", "scored by", "n", *columns.values()]
        rows = [[g.label, g.scored_by, str(g.n), *cell_texts(g, columns)] for g in members]
        lines += ["", f"## {dataset}, {ratio}", "", *markdown_table(header, rows, text_columns=2)]
        lines += ["", *provenance_lines(members)]
    if figures:
        lines += ["", "## Figures", "", FIGURE_CAPTION]
    for name in figures:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    if notes:
        lines += ["", "## Notes", "", *(f"* {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def provenance_lines(groups):
    """List test images, hardware, versions, settings and commands behind one table."""
    rows = list({row["path"]: row for group in groups for row in group.rows}.values())
    images = distinct_text(rows, "test_images").replace("None", "unknown")
    made_with = [f"{key} {distinct_text(rows, key)}" for key in ("device", "torch", "commit")]
    rare = distinct_text(rows, "test_minority").replace("None", "unknown")
    lines = [f"* test images {images}, rare ones {rare}; {'; '.join(made_with)}"]
    kinds = {}
    for row in rows:
        kind = "untrained" if row["method"] == "untrained" else row["kind"]
        kinds.setdefault(kind, []).append(row)
    for kind, members in kinds.items():
        lines += setting_lines(kind, members)
    return lines + command_lines(rows)


def setting_lines(kind, rows):
    """List the settings that all runs share, then those of each label."""
    settings = {row["label"]: setting_texts(row) for row in rows}
    shared = [t for t in setting_texts(rows[0]) if all(t in texts for texts in settings.values())]
    labels = {}
    for label, texts in settings.items():
        differing = ", ".join(text for text in texts if text not in shared)
        labels.setdefault(differing, []).append(label)
    return [
        f"* {kind}: {', '.join(shared)}",
        *(f"* {', '.join(names)}: {text}" for text, names in labels.items() if text),
    ]


def setting_texts(row):
    """Name all settings of a run; an encoder that it took over has a row of its own."""
    texts = [
        setting_text(key, value)
        for key, value in sorted(row["settings"].items())
        if key == "encoder_method" or not key.startswith("encoder_")
    ]
    space = row.get("metrics_space")
    return [*texts, f"metrics in the {space} space"] if space else texts


def command_lines(rows):
    """List the training command of each label's first seed, and the forms of the measurements."""
    training, measuring = {}, {}
    for row in rows:
        if "command" in row:
            training.setdefault(row["label"], row["command"])
        for name in (*row["probes"], "metrics", "finetune"):
            command = row.get(f"{name}_provenance_command", "")
            if command != row.get("command"):
                folder = rf"\S*({re.escape(row['path'])}|/seed\d+)\b"
                measuring[re.sub(folder, "RUN", command)] = None
    commands = [command for command in (*training.values(), *measuring) if command]
    if not commands:
        return []
    title = "Commands of each row's first seed (RUN is its folder); results.csv has all:"
    return ["", title, "", "```bash", *dict.fromkeys(commands), "```"]


# notes --------------------------------------------------------------------------------------------


def excluded_runs(rows):
    """Name the runs that were found and do not count, or count with a reservation."""
    notes = []
    unfinished = [row["path"] for row in rows if row["state"] == "not finished"]
    if unfinished:
        notes.append(f"not finished ({len(unfinished)}): {', '.join(unfinished)}")
    for row in rows:
        if row["state"].startswith("repeats"):
            notes.append(f"{row['path']}: {row['state']} (same settings and seed), not counted")
    smoke = [row["path"] for row in rows if is_smoke(row)]
    if smoke:
        notes.append(f"made with --smoke, left out ({len(smoke)}): {', '.join(smoke)}")
    subsets = {f"{r['dataset']} {r['ratio']}" for r in rows if r["minority_percent"] is None}
    if subsets:
        names = ", ".join(sorted(subsets))
        notes.append(f"not in the line figures, the subset's counts are missing: {names}")
    return notes


def is_smoke(row):
    """Whether the run or one of its results was made with --smoke."""
    return bool(row.get("smoke") or row.get("smoke_results"))


def unlinked_finetunings(folder):
    """Name the fine-tunings with a folder of their own: their scores belong to no run's row."""
    paths = [path.parent for path in sorted(folder.rglob("finetune.json"))]
    unlinked = [
        path.relative_to(folder).as_posix()
        for path in paths
        if (path / "config.json").exists()
        and "method" not in read_json(path / "config.json", "delete it")
    ]
    if not unlinked:
        return []
    return [f"fine-tuned with --out, not in the tables: {', '.join(unlinked)}"]
