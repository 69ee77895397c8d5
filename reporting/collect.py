"""Collect what runs left behind: one flat row per run."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from utils.cli import UserError
from utils.files import read_json, read_log

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


def collect(source):
    """Every run below a folder, or in a runs.jsonl, in the order of the tables: one flat dict per run, named as the columns of results.csv.

    Values stay as the run's files have them (probe and fine-tuning fractions, SAA, CAC, PEU percent); what was not measured is absent.
    row["state"] is "finished", "not finished" (no encoder.pt yet, or no finetune.json of a re-trained classifier) or "repeats PATH" (same
    settings and seed). UserError when the source is missing or has no run, or when a file of a run is damaged.
    """
    return to_rows(load_runs(source)[1], source)


def to_rows(runs, source):
    """The rows of runs as load gives them."""
    rows = [run_row(run, source) for run in runs]
    rows.sort(
        key=lambda row: (
            *sort_key(row),
            row["settings"],
            row["seed"],
            row["state"],
            -len(row),
            row["path"],
        )
    )
    add_labels(rows)
    rows.sort(key=lambda row: (*sort_key(row), row["label"]))
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


def load_runs(source):
    """(head, runs): what the runs left, one dict each: path, finished, train_counts (or None), config, log, and metrics, probe, finetune if measured.

    source: a folder with runs at any depth (head is then None), or a report's runs.jsonl, whose first line is the head.
    """
    source, head = Path(source), None
    way_out = "give the folder that pretrain.py made its runs in (runs by default), or a report's runs.jsonl"
    if source.is_file():
        head, runs = read_archive(source)
    elif source.is_dir():
        runs = [
            read_run_folder(path.parent, source) for path in sorted(source.rglob("config.json"))
        ]
    else:
        raise UserError(f"{source}: no such folder; {way_out}")
    runs = [run for run in runs if "method" in run["config"] and "dataset" in run["config"]]
    if not runs:
        raise UserError(f"{source}: holds no run (a folder with config.json); {way_out}")
    return head, runs


def read_run_folder(folder, root):
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


def archive_text(head, runs):
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


def run_row(run, source):
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
    row.update(early_values(epochs, config.get("epochs")))

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
                    split_by_class(values, "", minority, path, again),
                    **split_by_class(dict(encoder), "encoder_", minority, path, again),
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


def early_values(epochs, planned):
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


def split_by_class(values, prefix, minority, path, again):
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


def sort_key(row):
    """Sort key of the tables: data sets and methods in their fixed order, ratios from rare minority to balanced, natural last."""

    def index(name, known):
        return known.index(name) if name in known else len(known), name

    share = (
        row["minority_percent"]
        if "-" in row["ratio"] and row["minority_percent"] is not None
        else 101
    )
    return *index(row["dataset"], DATASETS), share, row["ratio"], *index(row["method"], METHODS)


def add_labels(rows):
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
