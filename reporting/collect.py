"""Collect the results of runs: one flat row per run, from run folders or a runs.jsonl."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from datasets import DATASETS
from utils.cli import UserError
from utils.files import read_json, read_log

# Methods in the order of the tables.
METHODS = {
    "ntxent": "NT-Xent",
    "supcon": "SupCon",
    "supmin": "Supervised Minority",
    "suppro": "Supervised Prototypes",
    "kcl": "KCL",
    "tsc": "TSC",
    "sbcl": "SBC",
    "bcl": "BCL",
    "paco": "PaCo",
    "ce": "cross entropy",
    "weighted_ce": "weighted CE",
    "focal": "focal loss",
    "ldam_drw": "LDAM-DRW",
    "logit_adjusted": "logit adjustment",
    "crt": "cRT",
    "tau_norm": "tau-normalisation",
    "lws": "LWS",
    "pixels": "raw pixels",
}
METRICS = {"saa": "SAA", "cac": "CAC", "sad": "SAD", "cad": "CAD", "gpu": "GPU", "peu": "PEU"}
SCORES = ("accuracy", "balanced_accuracy", "auroc", "f1")
NOT_RUN, NOT_APPLICABLE = "not run", "-"

# Each is a <name>.json of a run.
RESULTS = ("metrics", "probe", "finetune")
# Entries of config.json that name a run. All others are settings.
IDENTITY = (
    *("dataset", "ratio", "method", "seed", "subset", "classes", "minority"),
    *("encoder_sha256", "encoder_seed", "classifier_seed"),
)
# Switches that are on by default. A switch is a setting only if it is not at its default.
DEFAULT_ON = ("augment", "encoder_augment")
# Settings that are compared between methods, too.
SHARED_SETTINGS = ("arch", "epochs", "batch_size", "size", "lr", "warmup_epochs")
FINETUNE_SETTINGS = (
    *("gamma", "head", "head_lr", "balanced_batches", "subsample_balanced", "fraction"),
    *("bn_train", "augment", "epochs", "batch_size", "lr"),
)


def collect(source):
    """Read every run of a folder or a runs.jsonl into one flat dict, in the order of the tables.

    Keys are the columns of results.csv; values stay as the files of the run have them: fractions
    for probe and fine-tuning, percent for SAA, CAC and PEU. What was not measured is absent.
    row["settings"] holds the entries of config.json that decide the result.
    row["state"] is "finished", "not finished" or "repeats PATH" (same settings and seed).
    Raises UserError when the source is missing or holds no run.
    """
    return make_rows(load_runs(source)[1])


def make_rows(runs):
    """Turn the runs of load_runs into sorted and labelled rows."""
    rows = [make_row(run) for run in runs]
    add_labels(rows)
    # Of two copies, the finished one with the most results comes first.
    for key in (lambda row: (row["state"], -len(row), row["path"]), table_order):
        rows.sort(key=key)
    seen = {}
    for row in rows:
        names = row["dataset"], row["ratio"], row["method"], row["seed"], row.get("encoder_seed")
        first = seen.setdefault((*names, settings_json(row)), row)
        # A copy counts once, otherwise it would lower the standard deviation.
        if first is not row and row["state"] == "finished":
            row["state"] = f"repeats {first['path']}"
    return rows


# files --------------------------------------------------------------------------------------------


def load_runs(source):
    """Read a folder of runs or a runs.jsonl. Returns (head, runs).

    The head is the first line of a runs.jsonl, None for a folder. A run is a dict. It holds path,
    finished, config, log, train_counts and test_counts (None where the subset is missing), and
    metrics, probe and finetune where they were measured.
    """
    source, head = Path(source), None
    hint = "give the folder of the runs (runs by default) or a runs.jsonl"
    if source.is_file():
        head, runs = read_archive(source)
    elif source.is_dir():
        folders = [path.parent for path in sorted(source.rglob("config.json"))]
        runs = [read_run_folder(folder, source) for folder in folders]
    else:
        raise UserError(f"{source}: no such folder; {hint}")
    runs = [run for run in runs if "method" in run["config"] and "dataset" in run["config"]]
    if not runs:
        raise UserError(f"{source}: holds no run (a folder with config.json); {hint}")
    return head, runs


def read_run_folder(folder, root):
    """Read the files of one run. Raises UserError when one of them is not JSON."""
    config = read_json(folder / "config.json", "delete it or move it out of this folder")
    last_file = "finetune.json" if "encoder_method" in config else "encoder.pt"
    last_file = "probe.json" if config.get("method") == "pixels" else last_file
    subset = folder / str(config.get("subset", ""))
    counts = read_json(subset, "run make_subsets.py again")["counts"] if subset.is_file() else {}
    run = {
        "path": folder.relative_to(root).as_posix(),
        "config": config,
        "finished": (folder / last_file).exists(),
        "train_counts": counts.get("train"),
        "test_counts": counts.get("test"),
        "log": read_log(folder) if (folder / "log.jsonl").exists() else [],
    }
    for name in RESULTS:
        if (folder / f"{name}.json").exists():
            run[name] = read_json(folder / f"{name}.json", "delete it and measure again")
    return run


def archive_text(head, runs):
    """Return the text of a runs.jsonl: head and runs, one JSON object per line."""
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in [head, *runs])


def read_archive(path):
    """Return (head, runs) of a runs.jsonl. Raises UserError when it is none."""
    try:
        head, *runs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if not {"command", "claims", "figures", "notes"} <= head.keys():
            raise ValueError("its first line lacks a key")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a runs.jsonl ({error}); restore it from git") from None
    return head, runs


# rows ---------------------------------------------------------------------------------------------


def make_row(run):
    """Flatten one run. Raises UserError when its results belong to different encoders."""
    config = run["config"]
    kind = "contrastive" if "projection_dim" in config else "supervised"
    kind = "pixels" if config["method"] == "pixels" else kind
    row = {
        **{key: value for key, value in config.items() if key != "subset"},
        "settings": run_settings(config),
        "kind": "re-trained" if "encoder_method" in config else kind,
        "state": "finished" if run["finished"] else "not finished",
        "path": run["path"],
        "minority_percent": minority_percent(config, run["train_counts"]),
        **log_values(run["log"], config),
    }
    for name in RESULTS:
        if name in run:
            row |= flatten_result(name, run[name], config["minority"])
    counts = run.get("test_counts") or {}
    row["test_images"] = sum(row.get("metrics_n") or counts.values()) or None
    check_encoder(run)
    return row


def run_settings(config):
    """Return the entries of config.json that decide the result; not the defaults of switches."""
    return {
        key: value
        for key, value in config.items()
        if key not in IDENTITY and value is not None and value is not (key in DEFAULT_ON)
    }


def log_values(log, config):
    """Return provenance, final loss, last and early values of a log."""
    values = {}
    if log and "epoch" not in log[0]:
        # The first line holds command, commit, device and versions.
        values = {key: value for key, value in log[0].items() if isinstance(value, str)}
    epochs = [line for line in log if line.get("loss") is not None and "epoch" in line]
    if epochs:
        values["final_loss"] = epochs[-1]["loss"]
        skipped = ("epoch", "loss", "lr", "head_lr")
        last = {key: value for key, value in epochs[-1].items() if key not in skipped}
        values |= flatten(last, "last_") | early_values(epochs, config["epochs"])
    return values


def check_encoder(run):
    """Raise UserError when the results of a run were measured on different encoders."""
    hashes = {run[name].get("encoder_sha256") for name in RESULTS if name in run} - {None}
    if len(hashes) > 1:
        names = " and ".join(f"{name}.json" for name in RESULTS if name in run)
        raise UserError(f"{run['path']}: {names} belong to different encoders; measure again")


def flatten_result(name, result, minority):
    """Flatten metrics.json, probe.json or finetune.json; each metric is split by class."""
    row, result = {}, dict(result)
    if name == "metrics":
        spaces = {"": result, "encoder_": result.pop("encoder", {})}
        for prefix, values in spaces.items():
            for key in METRICS.keys() & values.keys():
                # null: the metric is not defined for this run
                pair = values[key] or (NOT_APPLICABLE, NOT_APPLICABLE)
                row[f"{prefix}{key}_minority"] = pair[minority]
                row[f"{prefix}{key}_majority"] = pair[1 - minority]
        result = {key: value for key, value in result.items() if key not in METRICS}
    return row | flatten(result, f"{name}_")


def flatten(data, prefix):
    """Flatten nested dicts: {"test": {"auroc": 1}} -> {"<prefix>test_auroc": 1}."""
    flat = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}_") if isinstance(value, dict) else {name: value}
    return flat


def early_values(epochs, planned):
    """Read kNN accuracy, CAC and collapse gap at the first validation in the second quarter."""
    for line in epochs:
        if line.get("val_knn") is not None and planned <= 4 * (line["epoch"] + 1) <= 2 * planned:
            keys = ("val_knn", "val_cac", "collapse_gap")
            known = [key for key in keys if line.get(key) is not None]
            return {f"early_{key}": float(np.mean(line[key])) for key in known}
    return {}


def minority_percent(config, counts):
    """Return the minority share of the training images in percent; None if unknown.

    It is read from the ratio's name ("99-1") or else from counts {"0": n, "1": n}.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", config["ratio"]):
        majority, minority = map(float, match.groups())
        return 100 * minority / (majority + minority)
    if not counts:
        return None
    return 100 * counts[str(config["minority"])] / sum(counts.values())


def table_order(row):
    return *sort_key(row), row["label"], row["seed"]


def sort_key(row):
    """Order data sets and methods by their tables, ratios from rare minority to balanced."""
    datasets, methods = list(DATASETS), list(METHODS)
    dataset, method = row["dataset"], row["method"]
    share = 101 if row["ratio"] == "natural" else row["minority_percent"] or 101
    return (
        *(datasets.index(dataset) if dataset in datasets else len(datasets), dataset),
        *(share, row["ratio"]),
        *(methods.index(method) if method in methods else len(methods), method),
    )


# labels -------------------------------------------------------------------------------------------


def add_labels(rows):
    """Set row["label"]: the method and, in brackets, the settings that set the run apart.

    A setting is named unless it has the usual value among the comparable runs. Two runs of one
    table with the same label have the same settings. row["finetune_label"] names a fine-tuning.
    """
    names = {key for row in rows for key in row["settings"]}
    names = sorted(names, key=lambda key: (key not in ("variant", "encoder_method"), key))
    comparable = defaultdict(list)
    for row in rows:
        for key in names:
            comparable[comparable_runs(row, key)].append(row)
    usual = {group: usual_value(group[-1], members) for group, members in comparable.items()}
    for row in rows:
        named = [key for key in names if setting_json(row, key) != usual[comparable_runs(row, key)]]
        texts = ", ".join(setting_text(key, row["settings"].get(key)) for key in named)
        row["label"] = row["method"] + (f" ({texts})" if texts else "")
    add_finetune_labels([row for row in rows if row["kind"] == "contrastive"])


def comparable_runs(row, key):
    """Return the key of the runs that share the usual value of a setting; it ends with `key`."""
    if key == "rows_sha256":
        return row["dataset"], row["ratio"], key
    if key in SHARED_SETTINGS and row["kind"] != "re-trained":
        return row["dataset"], row["kind"], key
    return row["dataset"], row["method"], row.get("encoder_method"), key


def usual_value(key, rows):
    """Return the usual value of a setting as JSON, or None where two values are level.

    A switch or an option that one run leaves off is usually off. Otherwise the value at most
    ratios is usual, then the one of most runs.
    """
    ratios = defaultdict(list)
    for row in rows:
        ratios[setting_json(row, key)].append(row["ratio"])
    if key == "smoke" or "null" in ratios:
        return "null"
    if key == "encoder_method":
        return '"ce"'
    counts = {value: (len(set(found)), len(found)) for value, found in ratios.items()}
    best = max(counts.values())
    values = [value for value, count in counts.items() if count == best]
    return values[0] if len(values) == 1 else None


def add_finetune_labels(rows):
    """Set row["finetune_label"]: loss, trained layers, and what differs within the data set."""
    for dataset in {row["dataset"] for row in rows}:
        tuned = [row for row in rows if row["dataset"] == dataset and "finetune_loss" in row]
        for row in tuned:
            texts = ["fine-tuned", row["finetune_loss"], row.get("finetune_train", "all")]
            for key in FINETUNE_SETTINGS:
                values = {str(other.get(f"finetune_{key}")) for other in tuned}
                if len(values) > 1 and row.get(f"finetune_{key}") is not None:
                    texts.append(setting_text(key, row[f"finetune_{key}"]))
            row["finetune_label"] = ", ".join(texts)


def setting_json(row, key):
    return json.dumps(row["settings"].get(key))


def settings_json(row):
    return json.dumps(row["settings"], sort_keys=True)


def setting_text(key, value):
    """Name a setting as the labels do: "margin 0.5", "smoke", "no augment", "encoder supcon"."""
    if key == "variant":
        return str(value)
    if key.endswith("sha256"):
        return f"{'rows' if key.startswith('rows') else 'images'} {str(value)[:8]}"
    words = key.replace("_", " ").removesuffix(" method")
    if isinstance(value, bool) or value is None:
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
