"""Group runs by seed and write the tables."""

import csv
import io
import json
import re
import textwrap
from pathlib import Path

import numpy as np

from reporting.collect import (
    COMMANDS,
    COMPARED,
    DEFAULTS,
    METRICS,
    NOT_APPLICABLE,
    NOT_RUN,
    OWN_DEFAULTS,
    SCORES,
    setting_text,
)
from utils.files import read_json


def group_by_seed(rows):
    """Finished runs that differ in nothing but the seed, once for each way they were scored.

    Returns dicts: dataset, ratio, minority_percent, method, label, scored_by, name (label and scored_by in one), rows, n, and
    cells = {quantity: (mean, std, values)}: std over n - 1, None for a single value; percent for scores, SAA, CAC and PEU.
    A cell is NOT_RUN when nothing was measured and NOT_APPLICABLE when there is nothing to measure.
    """
    members = {}
    for row in rows:
        if row["state"] == "finished":
            for scored_by in scoring_protocols(row):
                members.setdefault(
                    (row["dataset"], row["ratio"], row["label"], row["settings"], scored_by), []
                ).append(row)
    groups = []
    for (dataset, ratio, label, _, scored_by), runs in members.items():
        each = [row_values(row, scored_by) for row in runs]
        cells = {key: mean_and_std([values[key] for values in each]) for key in each[0]}
        plain = (
            scored_by == "re-trained"
            or scored_by == "linear probe"
            and runs[0]["kind"] == "contrastive"
        )
        name = (
            label if plain else label + (" " if scored_by == "from scratch" else ", ") + scored_by
        )
        groups.append(
            dict(
                dataset=dataset,
                ratio=ratio,
                minority_percent=runs[0]["minority_percent"],
                method=runs[0]["method"],
                label=label,
                scored_by=scored_by,
                name=name,
                rows=runs,
                n=len(runs),
                cells=cells,
            )
        )
    return groups


def scoring_protocols(row):
    """What gave the run's numbers, with whatever is not the default: other ways are other measurements and never averaged."""

    def way(first, kind, *options):
        smoke = ["smoke"] if row.get(f"{kind}_smoke") and not row.get("smoke") else []
        return ", ".join([first, *options, *smoke, *metrics])

    metrics = []
    if row.get("metrics_neighborhood", 0.05) != 0.05:
        metrics.append(f"CAC neighborhood {row['metrics_neighborhood']:g}")
    if row.get("metrics_smoke") and not row.get("smoke"):
        metrics.append("metrics smoke")
    reference = (
        [f"reference protocol, {row.get('probe_epochs')} epochs"]
        if row.get("probe_protocol", "cached") != "cached"
        else []
    )
    probe = way("linear probe", "probe", *reference)
    if row["kind"] == "re-trained":
        return ["re-trained"]
    if row["kind"] == "supervised":
        return [way("from scratch", "finetune"), *([probe] if "probe_test_accuracy" in row else [])]
    if "finetune_test_accuracy" not in row:
        return [probe]
    defaults = {**DEFAULTS, **OWN_DEFAULTS.get(str(row.get("finetune_loss")), {})}
    options = [row.get(f"finetune_{key}") for key in ("loss", "train")] + [
        setting_text(key, row[f"finetune_{key}"])
        for key in (
            "gamma",
            "head",
            "head_lr",
            "balanced_batches",
            "subsample_balanced",
            "fraction",
            "bn_train",
            "augment",
            "epochs",
            "batch_size",
            "lr",
        )
        if f"finetune_{key}" in row and row[f"finetune_{key}"] != defaults.get(key)
    ]
    return [probe, way("fine-tuned", "finetune", *map(str, options))]


def row_values(row, scored_by):
    """The numbers of one run as the tables show them: float, None (not run) or NOT_APPLICABLE."""

    def percent(key):
        return None if row.get(key) is None else 100 * row[key]

    probed, tuned = (
        scored_by.startswith("linear probe"),
        scored_by.startswith(("fine-tuned", "re-trained")),
    )
    values = {
        score: percent(f"{'probe' if probed else 'finetune'}_test_{score}") for score in SCORES
    }
    sibling = probed and (
        "probe_test_accuracy" not in row
        or row.get("probe_test_balanced_train_accuracy") is not None
    )
    for score in SCORES:  # None when there is no 50-50 subset beside the run's own
        values[f"balanced_train_{score}"] = (
            percent(f"probe_test_balanced_train_{score}") if sibling else NOT_APPLICABLE
        )
    for key in METRICS:  # metrics.json is about the encoder before
        for side in ("minority", "majority"):
            values[f"{key}_{side}"] = NOT_APPLICABLE if tuned else row.get(f"{key}_{side}")
    values["final_loss"] = NOT_APPLICABLE if tuned else row.get("final_loss")
    gap = (
        None if tuned else row.get("last_collapse_gap")
    )  # null in the log where the loss has no collapse value
    values["below_collapse"] = NOT_APPLICABLE if gap is None else gap
    return values


def mean_and_std(values):
    measured = [float(value) for value in values if value is not None and value != NOT_APPLICABLE]
    if not measured:
        return NOT_RUN if None in values else NOT_APPLICABLE
    return (
        float(np.mean(measured)),
        float(np.std(measured, ddof=1)) if len(measured) > 1 else None,
        measured,
    )


COLUMNS = {
    "accuracy": ("accuracy", "%"),
    "balanced_accuracy": ("balanced accuracy", "%"),
    "auroc": ("AUROC", "%"),
    "balanced_train_accuracy": ("accuracy, 50-50 probe", "%"),
    "saa_minority": ("SAA minority", "%"),
    "saa_majority": ("SAA majority", "%"),
    "cac_minority": ("CAC minority", "%"),
    "cac_majority": ("CAC majority", "%"),
    "final_loss": ("final loss", "nats"),
    "below_collapse": ("below collapse", "nats"),
}


READING = """Mean ± standard deviation (n - 1) over n seeds, test split. "not run": not measured yet; "-": does not apply, or one seed alone has
no deviation. Accuracies of supervised methods are the trained network's own (*scored by* says so); "50-50 probe": the probe trained on the
balanced subset. *Below collapse* is the loss of embeddings that are all equal (log(2 · batch size - 1) for two views; "-" where it is not
constant), minus the final loss: about 0 means collapsed."""
TERMINAL = [
    [key for key in COLUMNS if key not in omitted]
    for omitted in (
        ("balanced_train_accuracy", "final_loss"),
        ("balanced_train_accuracy", "final_loss", "accuracy"),
        ("balanced_train_accuracy", "final_loss", "accuracy", "auroc"),
    )
]  # the widest that leaves room for the names


def csv_text(rows):
    """Rows (dicts) as CSV under the columns of them all, in the order in which they first appear."""
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def results_table(rows):
    """The rows of results.csv: one per run, known columns first, lists as JSON."""
    first = [
        "dataset",
        "ratio",
        "minority_percent",
        "method",
        "label",
        "seed",
        "state",
        "path",
        "arch",
        "epochs",
        "batch_size",
        "size",
        "smoke",
        *(f"{way}_test_{score}" for way in ("probe", "finetune") for score in SCORES),
        *(f"{key}_{side}" for key in METRICS for side in ("minority", "majority")),
        "final_loss",
        "last_collapse_gap",
        "command",
        "commit",
        "device",
    ]
    rest = sorted({key for row in rows for key in row} - set(first) - {"settings"})
    return [
        {
            key: json.dumps(row[key]) if isinstance(row.get(key), list) else row.get(key)
            for key in first + rest
        }
        for row in rows
    ]


def summary_table(groups):
    """The rows of summary.csv: mean, standard deviation (n - 1) and n of every quantity of every group."""
    table = []
    for g in groups:
        row = {
            key: g[key]
            for key in ("dataset", "ratio", "minority_percent", "label", "scored_by", "n")
        }
        row["seeds"] = " ".join(str(run["seed"]) for run in g["rows"])
        for key, value in g["cells"].items():
            name = f"{key}_percent" if key.removeprefix("balanced_train_") in SCORES else key
            measured = isinstance(value, tuple)
            row.update(
                {
                    f"{name}_mean": value[0] if measured else value,
                    f"{name}_std": value[1] if measured else None,
                    f"{name}_n": len(value[2]) if measured else 0,
                }
            )
        row.update(
            settings=g["rows"][0]["settings"],
            commits=distinct_text(g["rows"], "commit"),
            devices=distinct_text(g["rows"], "device"),
        )
        table.append(row)
    return table


def distinct_text(rows, key):
    return ", ".join(dict.fromkeys(str(row.get(key, "unknown")) for row in rows))


def cell_text(value, n, digits):
    """A cell as "mean ± std"; "± -" for one value; its own n where it differs from the row's."""
    if not isinstance(value, tuple):
        return value
    mean, std, values = value
    mean = round(mean, digits) + 0.0  # no -0.000
    return f"{mean:.{digits}f} ± {'-' if std is None else f'{std:.{digits}f}'}" + (
        f" (n {len(values)})" if len(values) != n else ""
    )


def cells_text(g, columns):
    return [
        cell_text(g["cells"][key], g["n"], 3 if COLUMNS[key][1] == "nats" else 1) for key in columns
    ]


def split_by_subset(groups):
    """The groups cut into one list per data set and ratio."""
    cut = {}
    for g in groups:
        cut.setdefault((g["dataset"], g["ratio"]), []).append(g)
    return cut


def markdown(groups, figures, notes, command):
    """report.md: headline, one table per data set and ratio with its provenance, figures, what is left out."""
    lines = [
        "# Results",
        "",
        f"Generated by `{command}`; nothing here is typed by hand. Every seed's values: [results.csv](results.csv); "
        "all quantities: [summary.csv](summary.csv).",
        "",
        *(f"* {line}" for line in headlines(groups)),
        "",
        READING,
    ]
    header = [f"{title} ({unit})" for title, unit in COLUMNS.values()]
    for (dataset, ratio), part in split_by_subset(groups).items():
        lines += [
            "",
            f"## {dataset}, {ratio}",
            "",
            "| " + " | ".join(["method", "scored by", "n", *header]) + " |",
            "|" + " --- |" * 2 + " ---: |" * (len(header) + 1),
        ]
        lines += [
            "| "
            + " | ".join([g["label"], g["scored_by"], str(g["n"]), *cells_text(g, COLUMNS)])
            + " |"
            for g in part
        ]
        lines += ["", *(f"* {line}" for line in provenance_lines(part))]
    if figures:
        lines += [
            "",
            "## Figures",
            "",
            *(f"![{Path(name).stem}]({name})" + "\n" for name in figures),
        ]
    if notes:
        lines += ["", "## Left out", "", *(f"* {note}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def provenance_lines(part):
    """What the numbers of one table were made with: hardware, versions, commits, settings per method, commands."""
    rows = list({row["path"]: row for g in part for row in g["rows"]}.values())
    settings, spaces = {}, {}
    for row in rows:
        text = ", ".join(setting_text(key, row[key]) for key in COMPARED if key in row)
        settings.setdefault(text, {})[row["label"]] = None
        if row.get("metrics_space"):
            spaces.setdefault(row["metrics_space"], {})[row["label"]] = None
    lines = [
        f"hardware: {distinct_text(rows, 'device')}; torch {distinct_text(rows, 'torch')}; commit {distinct_text(rows, 'commit')}"
    ]
    lines += [f"{', '.join(labels)}: {text}" for text, labels in settings.items()]
    lines += [
        f"SAA and CAC in the {space} space: {', '.join(labels)}" for space, labels in spaces.items()
    ]
    return lines + [
        f"`{shape}`"
        for shape in command_shapes([row[key] for key in COMMANDS for row in rows if key in row])
    ]


def command_shapes(commands):
    """Commands of one form as one line, varying words in braces: python pretrain.py ... --method {supcon,supmin} --seed {0,1}."""
    forms = {}
    for words in (command.split() for command in dict.fromkeys(commands)):
        forms.setdefault(
            (len(words), *words[1:2], *(word for word in words if word.startswith("-"))), []
        ).append(words)
    return [" ".join(map(braces, zip(*form))) for form in forms.values()]


def braces(words):
    """One pattern for some words: x/99-1/a and x/99-1/b give x/99-1/{a,b}."""
    words = list(dict.fromkeys(words))
    if len(words) == 1:
        return words[0]
    parts = [word.split("/") for word in words]
    if len(parts[0]) > 1 and len(set(map(len, parts))) == 1:
        return "/".join(map(braces, zip(*parts)))
    return "{" + ",".join(words) + "}"


def terminal_tables(groups, width=120):
    """The tables as aligned text of at most `width` columns, without the columns that do not fit."""
    lines = []
    for (dataset, ratio), part in split_by_subset(groups).items():
        for columns in TERMINAL:
            body = [[str(g["n"]), *cells_text(g, columns)] for g in part]
            body = [[re.sub(r" \(n \d+\)", "*", text) for text in row] for row in body]
            if columns[-1] == "below_collapse":
                body = [[*row[:-1], row[-1].split(" ± ")[0]] for row in body]
            head = [
                [
                    "n",
                    *(
                        "below" if key == "below_collapse" else COLUMNS[key][0].split()[0]
                        for key in columns
                    ),
                ],
                [
                    "",
                    *(
                        "collapse"
                        if key == "below_collapse"
                        else " ".join(COLUMNS[key][0].split()[1:])
                        for key in columns
                    ),
                ],
            ]
            wide = [max(map(len, column)) for column in zip(*head, *body)]
            room = width - sum(wide) - 2 * len(wide)
            if room >= 20:
                break
        room = min(room, max(len(g["name"]) for g in part))

        def line(first, cells):
            return (
                first.ljust(room) + "".join("  " + text.rjust(w) for text, w in zip(cells, wide))
            ).rstrip()

        fewer = "; * fewer seeds" if any("*" in text for row in body for text in row) else ""
        lines += [
            f"{dataset}, {ratio}: percent, mean ± standard deviation over n seeds; nats below the collapse value{fewer}",
            line("", head[0]),
            line("method", head[1]),
            "-" * (room + sum(wide) + 2 * len(wide)),
        ]
        for g, cells in zip(part, body):
            first, *more = textwrap.wrap(g["name"], room, subsequent_indent="  ")
            lines += [line(first, cells), *more]
        lines.append("")
    return "\n".join(lines)


def headlines(groups):
    """Two sentences per data set about its most imbalanced ratio, true whatever the numbers are."""
    lines = []
    for dataset in dict.fromkeys(g["dataset"] for g in encoder_groups(groups)):
        part = overview_groups(groups, dataset)

        def means(*keys):
            told = [
                g
                for g in part
                if g["rows"][0]["kind"] == "contrastive" or "balanced_accuracy" in keys
            ]
            known = [(g, [finite_cell(g, key) for key in keys]) for g in told]
            return {
                g["name"]: float(np.mean([value[0] for value in values]))
                for g, values in known
                if None not in values
            }

        said = []
        for title, keys in (
            ("SAA over both classes:", ("saa_minority", "saa_majority")),
            ("CAC:", ("cac_minority", "cac_majority")),
            ("balanced accuracy:", ("balanced_accuracy",)),
        ):
            if values := means(*keys):
                said.append(
                    f"{title} "
                    + ", ".join(f"{name} {value:.1f} %" for name, value in values.items())
                )
        text = "; ".join(said) or "nothing measured yet"
        if gaps := means("below_collapse"):
            nearest = min(gaps, key=lambda name: abs(gaps[name]))
            text += (
                f". The final loss nearest to its collapse value is that of {nearest}, {abs(gaps[nearest]):.3f} nats "
                + ("below it" if gaps[nearest] >= 0 else "above it")
            )
        if others := len(
            {
                g["label"]
                for g in encoder_groups(groups)
                if (g["dataset"], g["ratio"]) == (dataset, part[0]["ratio"])
            }
        ) - len(part):
            text += f". Methods with options of their own ({others}) are in the table"
        seeds = sorted({g["n"] for g in part})
        lines.append(
            f"{dataset} {part[0]['ratio']} ({'-'.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} "
            f"seed{'s' * (seeds[-1] > 1)}), {text}."
        )
    return lines


def overview_groups(groups, dataset):
    """One group per method at a data set's most imbalanced ratio. Fine-tuning and variants of a method have their place in the tables."""
    part = [g for g in encoder_groups(groups) if g["dataset"] == dataset]
    rarest = min(
        part,
        key=lambda g: 101 if g["minority_percent"] is None else g["minority_percent"],
        default=None,
    )
    part = [g for g in part if g["ratio"] == rarest["ratio"]]
    return [g for g in part if g["label"] == g["method"]] or part


def excluded_runs(rows):
    """One line for each thing that was found and does not count."""
    notes = []
    if unfinished := [row["path"] for row in rows if row["state"] == "not finished"]:
        notes.append(f"not finished ({len(unfinished)}): " + ", ".join(unfinished))
    notes += [
        f"{row['path']}: {row['state']} (same settings and seed), not counted"
        for row in rows
        if row["state"].startswith("repeats")
    ]
    unknown = sorted(
        {f"{row['dataset']} {row['ratio']}" for row in rows if row["minority_percent"] is None}
    )
    if unknown:
        notes.append(
            f"not in the line figures, since the subset's counts are not found: {', '.join(unknown)}"
        )
    return notes


def unlinked_finetunings(folder):
    """One line for the fine-tunings whose scores lie beside their work files instead of in a run's folder: they belong to no run's row."""
    places = [
        path.parent
        for path in sorted(Path(folder).rglob("finetune.json"))
        if (path.parent / "config.json").exists()
    ]
    named = [
        place.relative_to(folder).as_posix()
        for place in places
        if "method" not in read_json(place / "config.json", "delete it")
    ]
    return (
        [
            f"fine-tuned in a folder of their own, not in the tables: {', '.join(named)} (finetune.json there)"
        ]
        if named
        else []
    )


def finite_cell(g, key):
    """Means and single values that can be drawn, or None."""
    value = g["cells"][key]
    return value if isinstance(value, tuple) and np.isfinite(value[0]) else None


def encoder_groups(groups):
    """One group per encoder, whatever number of ways it was scored: fine-tuned and re-trained groups and second scorings left out."""
    seen = {}
    for g in groups:
        if not g["scored_by"].startswith(("fine-tuned", "re-trained")):
            seen.setdefault((g["dataset"], g["ratio"], g["label"], g["rows"][0]["settings"]), g)
    return list(seen.values())
