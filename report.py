"""Tables and figures from every run below a folder, with mean and standard deviation over seeds.

    python report.py runs                                     # report.md, results.csv, summary.csv and figures into runs/report
    python report.py runs/digits                              # one data set alone
    python report.py runs/evidence --claims --out results     # the paper's claims judged by these runs, too: README.md
    python report.py --check results                          # exit code 1 unless the tables there are what the logs beside them give

A run is a folder whose config.json names a method and a data set. Runs with other settings are never averaged:
what differs stands in the label. Needs no GPU and none of the images; give it again after more runs. runs.jsonl keeps the runs' logs
and results in one file, from which the tables can be made again: python report.py results/runs.jsonl
"""

import csv
import io
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from reporting import claims
from utils.cli import ArgumentParser, UserError, command_line, run_main
from utils.files import atomic_write, read_json, read_log

DATASETS = (
    "digits",
    "fashionmnist",
    "breastmnist",
    "pneumoniamnist",
    "inat21-plants",
    "inat21-insects",
    "inat21-mammals",
    "inat21",
    "fracatlas",
    "infarction",
    "folder",
)
METHODS = (
    "ntxent",
    "supcon",
    "supmin",
    "suppro",
    "kcl",
    "tsc",
    "sbcl",
    "bcl",
    "paco",
    "ce",
    "weighted_ce",
    "focal",
    "ldam_drw",
    "logit_adjusted",
    "crt",
    "tau_norm",
    "lws",
)
DEFAULTS = {
    "encoder_method": "ce",
    "variant": None,
    "majority_supervision": 0.0,
    "margin": 1.0,
    "k": 3,
    "queue": 0,
    "recluster_every": 10,
    "randaugment": False,
    "alpha": None,
    "minority_per_batch": None,
    "chunk": None,
    "gamma": 2.0,
    "head": "linear",
    "head_lr": None,
    "balanced_batches": False,
    "subsample_balanced": False,
    "fraction": 1.0,
    "bn_train": False,
    "augment": True,
    "smoke": False,
}  # another value stands in the label
OWN_DEFAULTS = {
    "tsc": {"variant": "ttc"},
    "sbcl": {"variant": "code"},
    "bcl": {"variant": "layernorm"},
    "paco": {"variant": "paco", "queue": 1024},
    "ldam_drw": {"head": "cosine"},
    "crt": {"balanced_batches": True},
    "lws": {"balanced_batches": True},
}
IDENTITY = (
    "dataset",
    "ratio",
    "method",
    "seed",
    "subset",
    "classes",
    "minority",
    "encoder_sha256",
    "encoder_seed",
    "classifier_seed",
)
COMPARED = (
    "arch",
    "epochs",
    "batch_size",
    "size",
    "lr",
    "warmup_epochs",
)  # settings that also tell methods of one kind apart
SCORES = ("accuracy", "balanced_accuracy", "auroc", "f1")
MEASURED = {
    "metrics": "evaluate_metrics.py",
    "probe": "linear_probe.py",
    "finetune": "finetune.py",
}  # <name>.json of a run, by whom
METRICS = ("saa", "cac", "sad", "cad", "gpu", "peu")
NUMBERS = (
    "last_collapse_gap",
    "metrics_neighborhood",
    "minority_percent",
    *(
        f"{way}_{score}"
        for way in ("probe_test", "probe_test_balanced_train", "finetune_test")
        for score in SCORES
    ),
)
COMMANDS = (
    "command",
    "probe_provenance_command",
    "metrics_provenance_command",
    "finetune_provenance_command",
)
NOT_RUN, NOT_APPLICABLE = "not run", "-"


def parse_args():
    parser = ArgumentParser("Tables and figures from every run below a folder.")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="?",
        help="folder with runs at any depth (the other scripts make runs/), or a report's runs.jsonl",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where tables and figures go (default: report/ in that folder; results to commit them)",
    )
    parser.add_argument(
        "--claims",
        action="store_true",
        help="judge the paper's claims by these runs, too: README.md, ablations.png, metrics.png",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="RESULTS",
        help="exit code 1 unless the tables below this folder are what the runs.jsonl beside them give",
    )
    args = parser.parse_args()
    if (args.runs is None) == (args.check is None) or args.check and (args.out or args.claims):
        raise UserError(
            "give the folder with the runs, or --check and the folder with the tables, and nothing else"
        )
    return args


def main():
    args = parse_args()
    if args.check:
        check(args.check)
        return
    from_archive = args.runs.is_file()
    out = args.out or (args.runs.parent if from_archive else args.runs / "report")
    head, runs = load(args.runs)
    judged = args.claims or from_archive and head["claims"]
    if (
        judged
        and (out / "README.md").exists()
        and not (out / "README.md").read_text(encoding="utf-8").startswith(claims.TITLE)
    ):
        raise UserError(f"{out / 'README.md'}: is not this script's; give --out another folder")
    rows = flat(runs, args.runs)
    groups = group(rows)
    figures, missing = draw_figures(groups, args.runs, out, judged)
    notes = missing if from_archive else missing + unlisted(args.runs)
    head = {"command": command_line(), "claims": judged, "figures": figures, "notes": notes}
    for name, text in {"runs.jsonl": archive(head, runs), **tables(head, rows, groups)}.items():
        with atomic_write(out / name) as part:
            part.write_text(text, encoding="utf-8")

    print(terminal_tables(groups))
    for line in [
        *notes,
        *left_out(rows),
        *headlines(groups),
        f"written to {out}: " + ", ".join(["report.md", "results.csv", "summary.csv", *figures]),
    ]:
        print(
            textwrap.fill(line.replace(" %", "\0%"), 120, subsequent_indent="  ").replace("\0", " ")
        )  # a number keeps its unit
    print("next: " + next_step(rows, args.runs, out, figures))


def tables(head, rows, groups):
    """{file name: text} of all that is written but the figures; head: command, claims, figures, notes, as the first line of runs.jsonl has them."""
    made = {
        "results.csv": csv_text(results_table(rows)),
        "summary.csv": csv_text(summary_table(groups)),
        "report.md": markdown(
            groups, head["figures"], head["notes"] + left_out(rows), head["command"]
        ),
    }
    if head["claims"]:
        made["README.md"] = claims.markdown(rows, head["figures"], head["command"])
    return made


def check(folder):
    """Make the tables beside every runs.jsonl below a folder again, from it alone, and compare. Exit code 1 where one differs."""
    archives = sorted(folder.rglob("runs.jsonl"))
    if not archives:
        raise UserError(
            f"--check {folder}: holds no runs.jsonl; give a folder that report.py has written to"
        )
    differ = []
    for path in archives:
        head, runs = load(path)
        rows = flat(runs, path)
        for name, text in tables(head, rows, group(rows)).items():
            there = path.with_name(name)
            same = there.is_file() and there.read_text(encoding="utf-8") == text
            print(
                f"{there}: {'as the logs give it' if same else 'DIFFERS from what runs.jsonl gives'}"
            )
            differ += [] if same else [f"python report.py {path}"]
    for path in sorted(folder.rglob("report.md")):
        if not path.with_name("runs.jsonl").exists():
            print(f"{path}: not compared, there is no runs.jsonl beside it")
    if differ:
        raise SystemExit(
            f"report.py: {len(differ)} of the tables differ; made again by: {differ[-1]}"
        )


# ------------------------------------------------------------------------------------------------------------------
# collect: one flat row per run
# ------------------------------------------------------------------------------------------------------------------


def collect(source):
    """Every run below a folder, or in a runs.jsonl, in the order of the tables: one flat dict per run, named as the columns of results.csv.

    Values stay as the run's files have them (probe and fine-tuning fractions, SAA, CAC, PEU percent); what was not measured is absent.
    row["state"] is "finished", "not finished" (no encoder.pt yet, or no finetune.json of a re-trained classifier) or "repeats PATH" (same
    settings and seed). UserError when the source is missing or has no run, or when a file of a run is damaged.
    """
    return flat(load(source)[1], source)


def flat(runs, source):
    """The rows of runs as load gives them."""
    rows = [read_run(run, source) for run in runs]
    rows.sort(
        key=lambda row: (
            *place(row),
            row["settings"],
            row["seed"],
            row["state"],
            -len(row),
            row["path"],
        )
    )
    name_methods(rows)
    rows.sort(key=lambda row: (*place(row), row["label"]))
    first = {}
    for row in rows:
        same = first.setdefault(
            (
                *(row[key] for key in ("dataset", "ratio", "method", "settings", "seed")),
                row.get("encoder_seed"),
            ),
            row,
        )
        if (
            same is not row and row["state"] == "finished"
        ):  # counted once, or the copy would shrink the standard deviation
            row["state"] = f"repeats {same['path']}"
    return rows


def load(source):
    """(head, runs): what the runs left, one dict each: path, finished, train_counts (or None), config, log, and metrics, probe, finetune if measured.

    source: a folder with runs at any depth (head is then None), or a report's runs.jsonl, whose first line is the head.
    """
    source, head = Path(source), None
    way_out = "give the folder that pretrain.py made its runs in (runs by default), or a report's runs.jsonl"
    if source.is_file():
        head, runs = read_archive(source)
    elif source.is_dir():
        runs = [load_run(path.parent, source) for path in sorted(source.rglob("config.json"))]
    else:
        raise UserError(f"{source}: no such folder; {way_out}")
    runs = [run for run in runs if "method" in run["config"] and "dataset" in run["config"]]
    if not runs:
        raise UserError(f"{source}: holds no run (a folder with config.json); {way_out}")
    return head, runs


def load_run(folder, root):
    """The dict of one run folder. UserError when a file of it is no JSON."""
    run = {
        "path": folder.relative_to(root).as_posix(),
        "config": read_json(folder / "config.json", "delete it or move it out of this folder"),
    }
    run["finished"] = (
        folder / ("finetune.json" if "encoder_method" in run["config"] else "encoder.pt")
    ).exists()
    subset = folder / str(run["config"].get("subset", ""))
    run["train_counts"] = (
        read_json(subset, "make it again with make_subsets.py").get("counts", {}).get("train", {})
        if subset.is_file()
        else None
    )
    run["log"] = read_log(folder) if (folder / "log.jsonl").exists() else []
    for name, script in MEASURED.items():
        if (folder / f"{name}.json").exists():
            run[name] = read_json(
                folder / f"{name}.json", f"delete it and run {script} on this run again"
            )
    return run


def archive(head, runs):
    """The text of a runs.jsonl: the head and every run, one JSON object in a line."""
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in [head, *runs])


def read_archive(path):
    """(head, runs) of a runs.jsonl. UserError when it is not one."""
    try:
        head, *runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        well_formed = all(
            isinstance(head[key], kind)
            for key, kind in dict(command=str, claims=bool, figures=list, notes=list).items()
        )
        well_formed = well_formed and all(
            isinstance(text, str) for text in head["figures"] + head["notes"]
        )
        if not well_formed or not all(
            isinstance(run["path"], str)
            and isinstance(run["config"], dict)
            and isinstance(run["log"], list)
            and all(isinstance(line, dict) for line in run["log"])
            and isinstance(run["finished"], bool)
            and all(isinstance(n, int) for n in (run["train_counts"] or {}).values())
            and all(isinstance(run.get(name, {}), dict) for name in MEASURED)
            for run in runs
        ):
            raise ValueError("another kind of JSON")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not the runs of a report ({type(error).__name__}: {error}); take it from the repository, "
            "or make it again with report.py"
        ) from None
    return head, runs


def read_run(run, source):
    """What one run left, as a flat row. UserError when something in it cannot be."""
    config, folder = run["config"], Path(source) / run["path"]
    try:
        row = {
            **{key: str(config[key]) for key in ("dataset", "ratio", "method")},
            "seed": int(config["seed"]),
        }
        minority = (0, 1).index(config["minority"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'}: not a run's settings ({type(error).__name__}: {error}); "
            "delete it or move it out of this folder"
        ) from None
    defaults = {**DEFAULTS, **OWN_DEFAULTS.get(row["method"], {})}
    settings = {
        key: value
        for key, value in config.items()
        if key not in IDENTITY and not (key in defaults and value == defaults[key])
    }
    kind = (
        "re-trained"
        if "encoder_method" in config
        else "contrastive"
        if "projection_dim" in config
        else "supervised"
    )
    row.update(
        settings=json.dumps(settings, sort_keys=True),
        kind=kind,
        state="finished" if run["finished"] else "not finished",
        path=run["path"],
    )
    row.update({key: value for key, value in config.items() if key not in row and key != "subset"})
    row["minority_percent"] = minority_percent(config, run["train_counts"])

    log = run["log"]
    if log and "epoch" not in log[0]:
        row.update(
            {key: value for key, value in log[0].items() if isinstance(value, str)}
        )  # command, commit, device, versions
    epochs = [
        line for line in log if "epoch" in line and isinstance(line.get("loss"), (int, float))
    ]
    if epochs:
        row["final_loss"] = float(epochs[-1]["loss"])
        row.update(
            flatten(
                {
                    key: value
                    for key, value in epochs[-1].items()
                    if key not in ("epoch", "loss", "lr", "head_lr")
                },
                "last_",
            )
        )
    row.update(early_look(epochs, config.get("epochs")))

    measured_on = {}
    for name, script in MEASURED.items():
        path = folder / f"{name}.json"
        if name in run:
            again, values = f"delete it and run {script} on this run again", dict(run[name])
            measured_on[str(values.get("encoder_sha256"))] = path
            if name == "metrics":
                encoder = values.pop("encoder", {})
                if not isinstance(encoder, dict):
                    raise UserError(f"{path}: encoder is no JSON object; {again}")
                row.update(
                    by_class(values, "", minority, path, again),
                    **by_class(dict(encoder), "encoder_", minority, path, again),
                )
            elif not all(
                isinstance(values.get("test"), dict)
                and isinstance(values["test"].get(score), (int, float))
                for score in SCORES
            ):
                raise UserError(f"{path}: lacks a test score; {again}")
            row.update(flatten(values, f"{name}_"))
    measured_on.pop("None", None)
    if len(measured_on) > 1:
        raise UserError(
            f"{' and '.join(map(str, measured_on.values()))}: measured on different encoders; delete them and measure again"
        )
    for keys, kinds in ((NUMBERS, (int, float, type(None))), (COMMANDS, (str,))):
        if wrong := [key for key in keys if key in row and not isinstance(row[key], kinds)]:
            raise UserError(
                f"{folder}: what it holds as {wrong[0]} cannot be that; delete the file with it and make it again"
            )
    return row


def early_look(epochs, planned):
    """early_val_knn, early_val_cac and early_collapse_gap (means of the classes) at the first look between a quarter and half of the training."""

    def is_number(value):
        return (
            isinstance(value, (int, float))
            or isinstance(value, list)
            and value
            and all(isinstance(v, (int, float)) for v in value)
        )

    for line in epochs if isinstance(planned, int) else ():
        if (
            is_number(line.get("val_knn"))
            and isinstance(line["epoch"], int)
            and planned <= 4 * (line["epoch"] + 1) <= 2 * planned
        ):
            return {
                f"early_{key}": float(np.mean(line[key]))
                for key in ("val_knn", "val_cac", "collapse_gap")
                if is_number(line.get(key))
            }
    return {}


def by_class(values, prefix, minority, path, again):
    """Take the metrics out of `values`: {"saa": [class 0, class 1], ...} -> {"saa_minority": ..., "saa_majority": ...}; None was not defined."""
    out = {}
    for key in METRICS if values or not prefix else ():
        pair = values.pop(key, "")
        if pair is None:
            pair = NOT_APPLICABLE, NOT_APPLICABLE
        elif not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(value, (int, float)) for value in pair)
        ):
            raise UserError(f"{path}: {key} is not a pair of numbers; {again}")
        out[f"{prefix}{key}_minority"], out[f"{prefix}{key}_majority"] = (
            pair[minority],
            pair[1 - minority],
        )
    return out


def flatten(data, prefix):
    """Nested dicts to one level: {"test": {"auroc": 1}} -> {"<prefix>test_auroc": 1}."""
    flat = {}
    for key, value in data.items():
        flat.update(
            flatten(value, f"{prefix}{key}_")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def minority_percent(config, counts):
    """Minority share of the training images in percent, from the ratio's name or else the subset's counts {"0": n, "1": n}. None if unknown."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", str(config["ratio"])):
        majority, minority = map(float, match.groups())
        return 100 * minority / (majority + minority) if majority + minority else None
    minority, majority = (
        (counts or {}).get(str(label), 0)
        for label in (config["minority"], 1 - int(config["minority"]))
    )
    return 100 * minority / (minority + majority) if minority + majority else None


def place(row):
    """Sort key of the tables: data sets and methods in their fixed order, ratios from rare minority to balanced, natural last."""

    def index(name, known):
        return known.index(name) if name in known else len(known), name

    share = (
        row["minority_percent"]
        if "-" in row["ratio"] and row["minority_percent"] is not None
        else 101
    )
    return *index(row["dataset"], DATASETS), share, row["ratio"], *index(row["method"], METHODS)


def name_methods(rows):
    """Set row["label"]: the method and what sets it apart, e.g. "suppro (margin 0.5)" or "supcon (epochs 30)".

    Named are options that are not the default, and settings other than the usual: those at most ratios (where equal, of most runs) of the
    method on this data set, or for COMPARED of its kind. Two runs with one label on a data set and ratio thus have the same settings.
    """
    settings = [json.loads(row["settings"]) for row in rows]
    every = sorted({key for s in settings for key in s} - set(DEFAULTS))

    def among(row, key):  # the runs whose commonest value of a setting goes without saying
        if key == "rows_sha256":
            return row["dataset"], row["ratio"], key
        if key in COMPARED and row["kind"] != "re-trained":
            return row["dataset"], row["kind"], key
        return row["dataset"], row["method"], row.get("encoder_method"), key

    values = {}  # how often each setting has each value there, by ratio
    for row, s in zip(rows, settings):
        for key in every:
            values.setdefault(among(row, key), {}).setdefault(json.dumps(s.get(key)), Counter())[
                row["ratio"]
            ] += 1
    usual_there = {
        where: max(counts, key=lambda value: (len(counts[value]), counts[value].total()))
        for where, counts in values.items()
    }
    for row, s in zip(rows, settings):
        usual = {key: usual_there[among(row, key)] for key in every}
        options = [key for key in DEFAULTS if key in s] + [
            key for key in every if json.dumps(s.get(key)) != usual[key]
        ]
        row["label"] = row["method"] + (
            f" ({', '.join(setting_text(key, s.get(key)) for key in options)})" if options else ""
        )


def setting_text(key, value):
    """A setting as the labels name it: "margin 0.5", "smoke", "no augment", "encoder supcon"; of a variant the value alone."""
    if key == "variant":
        return str(value)
    words = key.replace("_", " ").removesuffix(" method")
    if key == "sha256":
        return f"images {str(value)[:8]}"
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


# ------------------------------------------------------------------------------------------------------------------
# group: mean and standard deviation over seeds
# ------------------------------------------------------------------------------------------------------------------


def group(rows):
    """Finished runs that differ in nothing but the seed, once for each way they were scored.

    Returns dicts: dataset, ratio, minority_percent, method, label, scored_by, name (label and scored_by in one), rows, n, and
    cells = {quantity: (mean, std, values)}: std over n - 1, None for a single value; percent for scores, SAA, CAC and PEU.
    A cell is NOT_RUN when nothing was measured and NOT_APPLICABLE when there is nothing to measure.
    """
    members = {}
    for row in rows:
        if row["state"] == "finished":
            for scored_by in ways_scored(row):
                members.setdefault(
                    (row["dataset"], row["ratio"], row["label"], row["settings"], scored_by), []
                ).append(row)
    groups = []
    for (dataset, ratio, label, _, scored_by), runs in members.items():
        each = [quantities(row, scored_by) for row in runs]
        cells = {key: cell([values[key] for values in each]) for key in each[0]}
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


def ways_scored(row):
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


def quantities(row, scored_by):
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


def cell(values):
    measured = [float(value) for value in values if value is not None and value != NOT_APPLICABLE]
    if not measured:
        return NOT_RUN if None in values else NOT_APPLICABLE
    return (
        float(np.mean(measured)),
        float(np.std(measured, ddof=1)) if len(measured) > 1 else None,
        measured,
    )


# ------------------------------------------------------------------------------------------------------------------
# tables
# ------------------------------------------------------------------------------------------------------------------

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
    [key for key in COLUMNS if key not in left_out]
    for left_out in (
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
            commits=distinct(g["rows"], "commit"),
            devices=distinct(g["rows"], "device"),
        )
        table.append(row)
    return table


def distinct(rows, key):
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


def by_dataset_and_ratio(groups):
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
    for (dataset, ratio), part in by_dataset_and_ratio(groups).items():
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
        f"hardware: {distinct(rows, 'device')}; torch {distinct(rows, 'torch')}; commit {distinct(rows, 'commit')}"
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
    for (dataset, ratio), part in by_dataset_and_ratio(groups).items():
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
        part = headline_groups(groups, dataset)

        def means(*keys):
            told = [
                g
                for g in part
                if g["rows"][0]["kind"] == "contrastive" or "balanced_accuracy" in keys
            ]
            known = [(g, [measured(g, key) for key in keys]) for g in told]
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


def headline_groups(groups, dataset):
    """One group per method at a data set's most imbalanced ratio. Fine-tuning and variants of a method have their place in the tables."""
    part = [g for g in encoder_groups(groups) if g["dataset"] == dataset]
    rarest = min(
        part,
        key=lambda g: 101 if g["minority_percent"] is None else g["minority_percent"],
        default=None,
    )
    part = [g for g in part if g["ratio"] == rarest["ratio"]]
    return [g for g in part if g["label"] == g["method"]] or part


def left_out(rows):
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


def unlisted(folder):
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


def next_step(rows, runs, out, figures):
    """What to type or look at now: the first thing that is missing, else the report."""
    for row in rows:
        if row["state"] == "not finished" and "command" in row:
            return f"{row['command']}    # goes on with {row['path']}"
    for row in rows:
        if row["state"] == "finished":
            measures = {
                "linear_probe.py": "probe_test_accuracy",
                "evaluate_metrics.py": "saa_minority",
            }
            missing = [script for script, key in measures.items() if key not in row]
            if missing and (row["kind"] == "contrastive" or missing == ["evaluate_metrics.py"]):
                return f"python {missing[0]} {runs / row['path']}    # then this report again"
    picture = next((name for name in figures if name.startswith("overview")), None)
    return f"open {out / 'report.md'}" + (f", and first {out / picture}" if picture else "")


# ------------------------------------------------------------------------------------------------------------------
# figures: readable in grey, so every method has its own marker and line
# ------------------------------------------------------------------------------------------------------------------

COLOURS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
)  # Okabe, Ito: for colour-blind eyes too
MARKERS = ("o", "X", "^", "s", "D", "v", "P", "*", "<", ">", "p", "h", "8", "d")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (7, 3)))  # 7 beside 8 colours


def draw_figures(groups, runs, out, judged):
    """Draw and save what there is data for. Returns the names that are there and a line for each figure left out.

    From a runs.jsonl, which holds no maps, the figures with maps are left as they are.
    """
    from tqdm import tqdm

    names = list(dict.fromkeys(g["name"] for g in groups))
    style = {
        name: dict(
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            ls=LINES[i % len(LINES)],
        )
        for i, name in enumerate(names)
    }
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    plans = {
        f"overview_{dataset}.png": lambda dataset=dataset: overview_figure(groups, runs, dataset)
        for dataset in datasets
    }
    plans |= {
        "accuracy.png": lambda: accuracy_figure(groups, style),
        "saa_cac.png": lambda: saa_cac_figure(groups, style),
        "cac_accuracy.png": lambda: cac_accuracy_figure(groups, style),
    }
    plans |= (
        claims.figures([row for g in encoder_groups(groups) for row in g["rows"]]) if judged else {}
    )
    plans |= {
        f"embeddings_{dataset}.png": lambda dataset=dataset: embeddings_figure(
            groups, runs, dataset
        )
        for dataset in datasets
    }
    there, missing = [], []
    for name, draw in tqdm(plans.items(), desc="figures", leave=False):
        if runs.is_file() and name.startswith(("overview", "embeddings")):
            there += [name] if (out / name).is_file() else []
            continue
        figure = draw()
        if figure is None:
            missing.append(f"{name}: not drawn, nothing measured for it yet")
            continue
        with atomic_write(out / name) as part:
            figure.savefig(part, dpi=130)
        there.append(name)
    return there, missing


def panels(rows, columns, width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def measured(g, key):
    """Means and single values that can be drawn, or None."""
    value = g["cells"][key]
    return value if isinstance(value, tuple) and np.isfinite(value[0]) else None


def line_panel(axes, groups, key, style):
    """Mean over seeds with its standard deviation, and every seed as a dot, against the minority share; a line per method."""
    known = [g for g in groups if g["minority_percent"] is not None and measured(g, key)]
    names = list(dict.fromkeys(g["name"] for g in known))
    step = min(
        1.1, 1.5 ** (1 / max(len(names), 1))
    )  # side by side, so that error bars do not cover each other
    for i, name in enumerate(names):
        points = sorted(
            (g for g in known if g["name"] == name), key=lambda g: g["minority_percent"]
        )
        x = np.array([g["minority_percent"] for g in points]) * step ** (i - (len(names) - 1) / 2)
        mean = [measured(g, key)[0] for g in points]
        std = [measured(g, key)[1] or 0 for g in points]
        axes.errorbar(
            x, mean, std, label=name, capsize=3, lw=1.4, ms=6, mfc="white", mew=1.4, **style[name]
        )
        for place_x, g in zip(x, points):
            values = measured(g, key)[2]
            axes.plot(
                [place_x * step**0.45] * len(values), values, ".", color=style[name]["color"], ms=4
            )
    shares = sorted({g["minority_percent"] for g in known})
    ticks = [
        share for share, before in zip(shares, [0, *shares]) if share > 1.3 * before
    ]  # closer ones would overprint
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{share:.3g}" for share in ticks])
    axes.set_xticks([], minor=True)
    if shares:
        axes.set_xlim(shares[0] / 1.5, shares[-1] * 1.5)
    axes.grid(alpha=0.3)
    return bool(known)


def on_lines(groups):
    """The groups that line figures show: not what was changed at one ratio of several, which would be dots beside the method's line."""
    ratios = {}
    for g in groups:
        ratios.setdefault(g["dataset"], {}).setdefault(g["name"], set()).add(g["ratio"])
    return [
        g
        for g in groups
        if g["label"] == g["method"]
        or len(ratios[g["dataset"]][g["name"]]) > 1
        or len(set.union(*ratios[g["dataset"]].values())) == 1
    ]


def legend_below(figure, axes):
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    longest = max(map(len, handles))
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 11 // (longest + 8))))
    figure.set_figheight(
        figure.get_figheight() + 0.24 * max(0, -(-len(handles) // columns) - 3)
    )  # room for a grid of methods
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        numpoints=1,
    )


def accuracy_figure(groups, style):
    """Balanced accuracy against imbalance, a panel per data set. None without a value."""
    groups = [
        g for g in groups if g["minority_percent"] is not None and measured(g, "balanced_accuracy")
    ]
    groups = on_lines([g for g in groups if not g["scored_by"].startswith("fine-tuned")])
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    if not datasets:
        return None
    columns = min(3, len(datasets))
    figure, axes = panels(-(-len(datasets) // columns), columns, 5.4 if columns < 3 else 4.6, 4.2)
    for ax, dataset in zip(axes.flat, datasets):
        line_panel(ax, [g for g in groups if g["dataset"] == dataset], "balanced_accuracy", style)
        ax.set(
            title=dataset,
            xlabel="minority share of training images (%, log)",
            ylabel="balanced test accuracy (%)",
        )
    for ax in list(axes.flat)[len(datasets) :]:
        ax.remove()
    legend_below(figure, figure.axes)
    return figure


def saa_cac_figure(groups, style):
    """SAA and CAC of both classes against imbalance, a row per data set. None without a value."""
    groups = on_lines(
        [
            g
            for g in encoder_groups(groups)
            if g["minority_percent"] is not None and measured(g, "saa_minority")
        ]
    )
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    if not datasets:
        return None
    figure, axes = panels(len(datasets), 4, 3.5, 3.3)
    for row, dataset in zip(axes, datasets):
        for ax, key in zip(row, ("saa_minority", "saa_majority", "cac_minority", "cac_majority")):
            if key.endswith("majority"):
                ax.sharey(row[list(row).index(ax) - 1])  # the classes of a metric on one scale
            line_panel(ax, [g for g in groups if g["dataset"] == dataset], key, style)
            metric, side = key.split("_")
            metric = metric.upper()
            ax.set(
                title=f"{dataset}: {metric}, {side}",
                xlabel="minority share of training images (%, log)",
                ylabel=f"{metric} (%)",
            )
    legend_below(figure, figure.axes)
    return figure


def encoder_groups(groups):
    """One group per encoder, whatever number of ways it was scored: fine-tuned and re-trained groups and second scorings left out."""
    seen = {}
    for g in groups:
        if not g["scored_by"].startswith(("fine-tuned", "re-trained")):
            seen.setdefault((g["dataset"], g["ratio"], g["label"], g["rows"][0]["settings"]), g)
    return list(seen.values())


def cac_accuracy_figure(groups, style):
    """CAC against balanced probe accuracy, a dot per run, with the least-squares line; all runs and each data set. None without a run."""
    points = []  # (data set, name, CAC, balanced accuracy)
    for g in groups:
        if g["scored_by"].startswith("linear probe"):
            for row in g["rows"]:
                values = quantities(row, g["scored_by"])
                x = [values["cac_minority"], values["cac_majority"], values["balanced_accuracy"]]
                if None not in x and np.isfinite(x).all():
                    points.append((g["dataset"], g["name"], (x[0] + x[1]) / 2, x[2]))
    datasets = list(dict.fromkeys(point[0] for point in points))
    if not datasets:
        return None
    shown = [("all runs", points)] if len(datasets) > 1 else []
    shown += [(dataset, [point for point in points if point[0] == dataset]) for dataset in datasets]
    columns = min(3, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, 5.4 if columns < 3 else 4.6, 4.4)
    for ax, (title, part) in zip(axes.flat, shown):
        for name in dict.fromkeys(point[1] for point in part):
            own = [point for point in part if point[1] == name]
            ax.plot(
                [p[2] for p in own],
                [p[3] for p in own],
                label=name,
                mfc="none",
                mew=1.4,
                ms=7,
                **{**style[name], "ls": ""},
            )
        x, y = np.array([p[2] for p in part]), np.array([p[3] for p in part])
        if len(part) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            ax.set_title(
                f"{title}, n = {len(part)}: "
                + ("no line, fewer than 3 runs" if len(part) < 3 else "no line, all values equal")
            )
        else:
            slope, intercept, r2 = line_fit(x, y)
            ends = np.array([x.min(), x.max()])
            ax.plot(ends, slope * ends + intercept, color="0.4", lw=1.2)
            ax.set_title(f"{title}, n = {len(part)}: R² = {r2:.2f}")
        ax.set(xlabel="CAC, mean of both classes (%)", ylabel="balanced probe accuracy (%)")
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(shown) :]:
        ax.remove()
    legend_below(figure, figure.axes)
    return figure


def line_fit(x, y):
    """Least-squares line through (x, y): slope, intercept, R² (the share of y's variance that the line explains)."""
    slope, intercept = np.polyfit(x, y, 1)
    return (
        slope,
        intercept,
        1 - np.sum((y - slope * x - intercept) ** 2) / np.sum((y - y.mean()) ** 2),
    )


def embedding_of(g, runs):
    """(row, xy, is_minority, limit of the axes) of the lowest seed that has embedding.npz, or None. UserError when the file is damaged."""
    for row in sorted(g["rows"], key=lambda row: row["seed"]):
        path = Path(runs) / row["path"] / "embedding.npz"
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    xy, labels, minority, limit = (
                        file["xy"],
                        file["labels"],
                        int(file["minority"]),
                        float(file["limit"]),
                    )
                if xy.shape != (len(labels), 2):
                    raise ValueError("xy and labels do not match")
            except Exception as error:  # numpy and zipfile report damage in many ways; all of them mean the same here
                raise UserError(
                    f"{path}: not an embedding ({type(error).__name__}); delete it and run evaluate_metrics.py again"
                ) from None
            return row, xy, labels == minority, limit
    return None


def map_panel(ax, found):
    """A 2-D embedding: pale dots for the majority, dark triangles on top for the minority."""
    ax.set(xticks=[], yticks=[])
    if found is None:
        ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color="0.5")
        ax.spines[:].set_visible(False)
        return
    _, xy, rare, limit = found
    if np.isfinite(limit):
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    size = np.clip(4000 / len(xy), 2, 14)
    ax.scatter(*xy[~rare].T, s=size, c="#9ecae1", marker="o", lw=0, label="majority")
    ax.scatter(*xy[rare].T, s=1.3 * size, c="#a50f15", marker="^", lw=0, label="minority")


def embeddings_figure(groups, runs, dataset):
    """Maps side by side: a row per ratio, a column per method. None without a map."""
    found = {
        (g["ratio"], g["label"]): embedding_of(g, runs)
        for g in on_lines(encoder_groups(groups))
        if g["dataset"] == dataset
    }
    found = {key: value for key, value in found.items() if value}
    if not found:
        return None
    part = [g for g in groups if g["dataset"] == dataset]
    ratios = [
        r for r in dict.fromkeys(g["ratio"] for g in part) if any(key[0] == r for key in found)
    ]
    part.sort(
        key=lambda g: place(g["rows"][0])[4:]
    )  # methods in their order, whichever ratio has them first
    labels = [
        name
        for name in dict.fromkeys(g["label"] for g in part)
        if any(key[1] == name for key in found)
    ]
    figure, axes = panels(len(ratios), len(labels), 2.5, 2.5)
    for i, ratio in enumerate(ratios):
        for j, label in enumerate(labels):
            ax = axes[i, j]
            map_panel(ax, found.get((ratio, label)))
            if i == 0:
                ax.set_title(textwrap.fill(label, 24), fontsize=10)
            if j == 0:
                ax.set_ylabel(ratio, fontsize=10)
            if (ratio, label) in found:
                ax.set_xlabel(f"seed {found[ratio, label][0]['seed']}", fontsize=8)
    figure.suptitle(f"{dataset}: test images in the embedding, two dimensions", fontsize=11)
    legend_maps(figure, figure.axes)
    return figure


def legend_maps(figure, axes):
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        markerscale=2.5,
    )


def overview_figure(groups, runs, dataset):
    """The story at a glance, for the most imbalanced ratio: maps above, bars of SAA, CAC and balanced accuracy below. None without a value."""
    from matplotlib.figure import Figure

    part = headline_groups(groups, dataset)
    maps = [embedding_of(g, runs) for g in part]
    bars = {
        ("saa_minority", "saa_majority"): "SAA (%)",
        ("cac_minority", "cac_majority"): "CAC (%)",
        ("balanced_accuracy",): "balanced test accuracy (%)",
    }
    bars = {keys: title for keys, title in bars.items() if any(measured(g, keys[0]) for g in part)}
    if not any(maps) and not bars:
        return None
    any_map = any(found is not None for found in maps)
    columns, many = (
        min(6, len(part)),
        len(part) > 6,
    )  # maps side by side; the bars of many methods one diagram below the other
    width, map_rows, bar_rows = (
        max(10, 2.5 * columns),
        -(-len(part) // columns),
        len(bars) if many else 1,
    )
    heights = [2.9 * map_rows] * any_map + [3.3 * bar_rows] * bool(bars)
    figure = Figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
    share = part[0]["minority_percent"]
    what = "" if share is None else f": {share:.3g} % of the training images are minority"
    figure.suptitle(f"{dataset} {part[0]['ratio']}{what}", fontsize=13)
    boxes = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if any_map:
        box = boxes.pop(0)
        axes = list(box.subplots(map_rows, columns, squeeze=False).flat)
        for ax in axes[len(part) :]:
            ax.remove()
        for ax, g, found in zip(axes, part, maps):
            map_panel(ax, found)
            ax.set_title(textwrap.fill(g["name"], 24), fontsize=10)
            below = measured(g, "below_collapse")
            side = "below" if below and below[0] >= 0 else "above"
            under = [
                f"seed {found[0]['seed']}" if found else "",
                f"final loss {abs(below[0]):.3f} {side} collapse" if below else "",
            ]
            ax.set_xlabel("\n".join(under), fontsize=8)
        legend_maps(box, box.axes)
    if bars:
        for ax, (keys, title) in zip(
            boxes[0].subplots(bar_rows, len(bars) // bar_rows, squeeze=False).flat, bars.items()
        ):
            bar_panel(ax, part, keys, title)
    return figure


def bar_panel(ax, part, keys, title):
    """Bars of the mean, a group per method and a bar per key, with every seed as a dot."""
    looks = (
        [dict(color="#a50f15"), dict(color="#9ecae1", hatch="//")]
        if len(keys) > 1
        else [dict(color="#bdbdbd")]
    )
    w = 0.8 / len(keys)
    for j, (key, look) in enumerate(zip(keys, looks)):
        for i, g in enumerate(part):
            x = i + (j - (len(keys) - 1) / 2) * w
            if value := measured(g, key):
                mean, _, values = value
                ax.bar(
                    x,
                    mean,
                    w,
                    edgecolor="black",
                    lw=0.7,
                    label=key.split("_")[1] if len(keys) > 1 else None,
                    **look,
                )
                ax.plot(
                    x + w / 4 * np.linspace(-1, 1, len(values) + 2)[1:-1],
                    values,
                    "o",
                    ms=4,
                    mfc="white",
                    mec="black",
                    mew=0.8,
                )
                ax.annotate(
                    f"{mean:.1f}",
                    (x, max(values)),
                    (0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            else:
                ax.text(
                    x,
                    0.02,
                    cell_text(g["cells"][key], g["n"], 1),
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color="0.4",
                    transform=ax.get_xaxis_transform(),
                )
    ax.set_xticks(range(len(part)), [textwrap.fill(g["name"], 14) for g in part], fontsize=8)
    ax.set(ylabel=title, xlim=(-0.6, len(part) - 0.4))
    ax.margins(y=0.12)
    if len(keys) > 1:
        handles = dict(zip(*ax.get_legend_handles_labels()[::-1]))
        ax.legend(
            handles.values(),
            handles.keys(),
            frameon=False,
            fontsize=8,
            ncols=2,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderpad=0,
        )


if __name__ == "__main__":
    run_main(main)
