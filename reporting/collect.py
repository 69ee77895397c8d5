"""Collect the results of runs: one flat row per run, from run folders or a runs.jsonl."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from datasets import DATASETS
from reporting.styles import FLOORS, METHOD_STYLES
from utils.archs import CIFAR_RESNETS
from utils.cli import UserError
from utils.files import read_json, read_log

METHODS = {key: style.name for key, style in METHOD_STYLES.items() if key not in FLOORS}
METRICS = {"saa": "SAA", "cac": "CAC", "sad": "SAD", "cad": "CAD", "gpu": "GPU", "peu": "PEU"}
SCORES = ("accuracy", "balanced_accuracy", "auroc", "f1")
NOT_RUN, NOT_APPLICABLE = "not run", "-"

# linear_probe.py moves a probe of another protocol from probe.json to probe_<protocol>.json.
PROBES = ("probe", "probe_cached", "probe_reference", "probe_centroid")
# Each is a <name>.json of a run.
RESULTS = ("metrics", *PROBES, "finetune")
# Rows that a linear probe is trained on beside the run's own: {part of its keys: title}.
ROW_SETS = {
    "balanced_train": "50-50 rows",
    "subsampled": "subsampled rows",
    "one_percent": "one-percent rows",
}
# Entries of config.json that name a run. All others are settings.
IDENTITY = (
    *("dataset", "ratio", "method", "seed", "subset", "classes", "minority"),
    *("encoder_sha256", "encoder_seed", "classifier_seed"),
    *("init_sha256", "encoder_init_sha256", "classifier_init_sha256"),
)
# Settings that leave no trace in a network with learning rate 0.
LOSS_SETTINGS = (
    *("lr", "warmup_epochs", "temperature", "margin", "majority_supervision"),
    *("k", "queue", "variant", "alpha", "recluster_every"),
)
# Numbers of the log that are compared while a run trains.
WATCHED = ("val_knn", "val_cac", "val_saa", "collapse_gap")
# Stands for the checksum of training rows that were drawn with the seed of each run.
PER_SEED = "drawn per seed"
# Switches that are on by default. A switch is a setting only if it is not at its default.
DEFAULT_ON = ("augment", "encoder_augment")
# Settings that are compared between methods, too.
SHARED_SETTINGS = (
    *("arch", "epochs", "batch_size", "size", "lr", "warmup_epochs"),
    *("stem", "feature_map", "recipe", "no_flip", "init"),
)
FINETUNE_SETTINGS = (
    *("gamma", "head", "head_lr", "balanced_batches", "subsample_balanced", "fraction"),
    *("bn_train", "augment", "epochs", "batch_size", "lr"),
)


def collect(source):
    """Read every run of a folder or a runs.jsonl into one flat dict, in the order of the tables.

    Keys are the columns of results.csv; values stay as the files of the run have them: fractions
    for probe and fine-tuning, percent for SAA, CAC and PEU. What was not measured is absent.
    row["settings"] holds the entries of config.json that decide the result. row["probes"] is
    {prefix of its columns: name} of the linear probes; the default probe has the prefix "probe".
    row["state"] is "finished", "not finished" or "repeats PATH" (same settings and seed).
    Raises UserError when the source is missing or holds no run.
    """
    return make_rows(load_runs(source)[1])


def make_rows(runs):
    """Turn the runs of load_runs into sorted and labelled rows."""
    rows = [make_row(run) for run in runs]
    join_drawn_rows(rows)
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
    finished, config, log, and what was measured of RESULTS. From its subset it holds train_counts,
    test_counts, subset_seed and recipe; they are None where the subset is missing.
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
    last_files = {"re-trained": "finetune.json", "raw pixels": "probe.json"}
    last_file = last_files.get(run_kind(config), "encoder.pt")
    path = folder / str(config.get("subset", ""))
    subset = read_json(path, "run make_subsets.py again") if path.is_file() else {}
    counts = subset.get("counts", {})
    run = {
        "path": folder.relative_to(root).as_posix(),
        "config": config,
        "finished": (folder / last_file).exists(),
        "train_counts": counts.get("train"),
        "test_counts": counts.get("test"),
        "subset_seed": subset.get("seed"),
        "recipe": subset.get("recipe"),
        "log": read_log(folder) if (folder / "log.jsonl").exists() else [],
    }
    for name in RESULTS:
        if (folder / f"{name}.json").exists():
            run[name] = read_json(folder / f"{name}.json", "delete it and measure again")
    if run_kind(config) == "raw pixels" and "probe" in run:
        run["log"] = [run["probe"]["provenance"]]
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
    trials = smoke_results(run)
    run = {key: value for key, value in run.items() if key not in trials}
    probes = named_probes(run)
    row = {
        **{key: value for key, value in config.items() if key != "subset"},
        "method": row_method(config),
        "settings": run_settings(run),
        "probes": {probe_prefix(name): name for name in probes},
        "kind": run_kind(config),
        "state": "finished" if run["finished"] else "not finished",
        "path": run["path"],
        "minority_percent": minority_percent(config, run["train_counts"]),
        **log_values(run["log"], config),
        **seeds(run),
        **({"smoke_results": trials} if trials else {}),
    }
    results = {name: run[name] for name in ("metrics", "finetune") if name in run}
    results |= {probe_prefix(name): probe for name, probe in probes.items()}
    for name, result in results.items():
        row |= flatten_result(name, result, config["minority"])
    tested = dict(enumerate(row["metrics_n"])) if "metrics_n" in row else run.get("test_counts")
    for split, counts in (("test", tested), ("train", run["train_counts"])):
        counts = {int(label): n for label, n in (counts or {}).items()}
        row[f"{split}_images"] = sum(counts.values()) or None
        row[f"{split}_minority"] = counts.get(config["minority"])
    check_encoder(run)
    return row


def smoke_results(run):
    """Name what was measured with --smoke on a run that is no smoke run: it does not count."""
    if run["config"].get("smoke"):
        return []
    return [name for name in RESULTS if run.get(name, {}).get("smoke")]


def run_kind(config):
    if config.get("method") == "pixels":
        return "raw pixels"
    if "encoder_method" in config:
        return "re-trained"
    return "contrastive" if "projection_dim" in config else "supervised"


def seeds(run):
    """Return the seed of the subset if it is known; for raw pixels it is the seed of the run."""
    if run.get("subset_seed") is None:
        return {}
    seed, found = run["subset_seed"], {"subset_seed": run["subset_seed"]}
    # Only the reference protocol has random numbers of its own.
    is_cached = run.get("probe", {}).get("protocol") != "reference"
    return found | ({"seed": seed} if is_cached and run_kind(run["config"]) == "raw pixels" else {})


def row_method(config):
    """Return the method; contrastive runs with learning rate 0 are "untrained", whatever theirs."""
    kind = run_kind(config)
    if kind == "contrastive" and config.get("lr") == 0:
        return "untrained"
    return kind if kind == "raw pixels" else config["method"]


def run_settings(run):
    """Return the entries of config.json that decide the result; not the defaults of switches."""
    config = run["config"]
    if "arch" in config and "stem" not in config:
        config = {**config, **old_network_settings(run)}
    ignored = IDENTITY + (LOSS_SETTINGS if row_method(config) == "untrained" else ())
    settings = {
        key: value
        for key, value in config.items()
        if key not in ignored and value is not None and value is not (key in DEFAULT_ON)
    }
    for key in settings.keys() & {"init", "encoder_init", "classifier_init"}:
        # Each seed may start from the run of the same seed.
        settings[key] = re.sub(rf"seed{config['seed']}\b", "seed<k>", settings[key])
    return settings


def old_network_settings(run):
    """Return what the config.json of a run lacks that is older than --stem and --recipe."""
    config = run["config"]
    # Only these networks had a cifar stem before there was --stem.
    is_cifar = config["arch"] in CIFAR_RESNETS
    return {
        "stem": "cifar" if is_cifar else "imagenet",
        "feature_map": -(-config["size"] // (4 if is_cifar else 32)),
        "recipe": run.get("recipe"),
    }


def named_probes(run):
    """Return {name: probe} of the linear probes, the default one first.

    Of two probes with one name, that of probe.json counts. A moved probe of an earlier encoder
    does not count.
    """
    found, latest = {}, run.get("probe")
    for key in PROBES:
        probe = run.get(key)
        if probe and (probe is latest or is_same_encoder(probe, latest or probe)):
            found.setdefault(probe_name(probe), probe)
    return dict(sorted(found.items(), key=lambda item: item[0] != "linear probe"))


def is_same_encoder(moved, latest):
    return moved.get("encoder_sha256") == latest.get("encoder_sha256")


def probe_name(probe):
    """Name a probe: "linear probe" (cached, standardised, balanced weights), and what differs."""
    protocol = probe.get("protocol", "cached")
    names = ["linear probe"]
    if protocol == "reference":
        # A probe without this key is older than --optimizer.
        optimizer, batch_size = probe.get("optimizer", "adam"), probe.get("batch_size", 1024)
        names += ["reference protocol", f"{probe.get('epochs')} epochs"]
        names += [optimizer] * (optimizer != "adam")
        names += [f"batch size {batch_size}"] * (batch_size != 1024)
    elif protocol != "cached":
        names.append(f"{protocol} protocol")
    if probe.get("class_weights", "balanced") == "none":
        names.append("unweighted")
    is_standardized, is_usual = probe.get("standardize"), protocol == "cached"
    if is_standardized not in (None, is_usual):
        names.append("standardised" if is_standardized else "not standardised")
    return ", ".join(names)


def probe_prefix(name):
    """Return what the columns of a probe begin with: "linear probe, centroid": "probe_centroid"."""
    return re.sub("[ ,-]+", "_", name.removeprefix("linear "))


def join_drawn_rows(rows):
    """Let runs be averaged whose training rows were drawn anew for each seed.

    This holds for a data set and ratio if the subset of each run has the seed of the run.
    """
    tables = defaultdict(list)
    for row in rows:
        tables[row["dataset"], row["ratio"]].append(row)
    for members in tables.values():
        draws = {row["settings"].get("rows_sha256") for row in members}
        if len(draws) > 1 and all(row.get("subset_seed") == row["seed"] for row in members):
            for row in members:
                row["settings"]["rows_sha256"] = PER_SEED


def log_values(log, config):
    """Return provenance, final loss, last and early values of a log."""
    values = {}
    if log and "epoch" not in log[0]:
        # The first line holds command, commit, device and versions.
        values = {key: value for key, value in log[0].items() if isinstance(value, str)}
    epochs = [line for line in log if line.get("loss") is not None and "epoch" in line]
    if epochs:
        values["final_loss"] = epochs[-1]["loss"]
        # The median, since a machine may have slept in one epoch.
        seconds = float(np.median([line.get("seconds", 0) for line in epochs]))
        values["train_minutes"] = len(epochs) * seconds / 60
        skipped = ("epoch", "loss", "lr", "head_lr")
        last = {key: value for key, value in epochs[-1].items() if key not in skipped}
        values |= flatten(last, "last_") | early_values(epochs, config["epochs"])
        values["history"] = {key: curve(epochs, key) for key in WATCHED}
    return values


def curve(epochs, key):
    """Return {epoch: mean of the classes} of a number at the validations of a log."""
    lines = [line for line in epochs if line.get("val_knn") is not None]
    return {line["epoch"]: float(np.mean(line[key])) for line in lines if line.get(key) is not None}


def check_encoder(run):
    """Raise UserError when the results of a run were measured on different encoders."""
    names = [name for name in ("metrics", "probe", "finetune") if name in run]
    hashes = {run[name].get("encoder_sha256") for name in names} - {None}
    if len(hashes) > 1:
        names = " and ".join(f"{name}.json" for name in names)
        raise UserError(f"{run['path']}: {names} belong to different encoders; measure again")


def flatten_result(name, result, minority):
    """Flatten metrics.json, probe.json or finetune.json; each metric is split by class.

    Of more than two classes, `_majority` is the mean of all but the rarest, and each class has a
    value of its own.
    """
    row, result = {}, dict(result)
    if name == "metrics":
        spaces = {"": result, "encoder_": result.pop("encoder", {})}
        for prefix, values in spaces.items():
            for key in METRICS.keys() & values.keys():
                # null: the metric is not defined for this run
                if values[key] is None:
                    row |= {
                        f"{prefix}{key}_{of}": NOT_APPLICABLE for of in ("minority", "majority")
                    }
                    continue
                others = [value for c, value in enumerate(values[key]) if c != minority]
                row[f"{prefix}{key}_minority"] = values[key][minority]
                row[f"{prefix}{key}_majority"] = sum(others) / len(others)
                if len(others) > 1:
                    row |= {f"{prefix}{key}_class{c}": v for c, v in enumerate(values[key])}
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
    datasets, methods = list(DATASETS), list(METHOD_STYLES)
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

    A setting is named unless it has the usual value among the comparable runs; smoke runs do not
    make a value usual. Two runs of one table with the same label have the same settings.
    row["finetune_label"] names a fine-tuning.
    """
    names = {key for row in rows for key in row["settings"]}
    names = sorted(names, key=lambda key: (key not in ("variant", "encoder_method"), key))
    comparable = defaultdict(list)
    for row in rows:
        for key in () if row.get("smoke") else names:
            comparable[comparable_runs(row, key)].append(row)
    usual = {group: usual_value(group[-1], members) for group, members in comparable.items()}
    for row in rows:
        named = [key for key in names if is_unusual(row, key, usual)]
        texts = ", ".join(setting_text(key, row["settings"].get(key)) for key in named)
        row["label"] = row["method"] + (f" ({texts})" if texts else "")
    add_finetune_labels([row for row in rows if row["kind"] == "contrastive"])


def is_unusual(row, key, usual):
    value = setting_json(row, key)
    return value != usual.get(comparable_runs(row, key), value)


def comparable_runs(row, key):
    """Return the key of the runs that share the usual value of a setting; it ends with `key`.

    The settings of untrained networks are compared among themselves: they train for one epoch.
    """
    if key == "rows_sha256":
        return row["dataset"], row["ratio"], key
    is_shared = row["kind"] != "re-trained" and row["method"] != "untrained"
    if key in SHARED_SETTINGS and is_shared:
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
    if "null" in ratios:
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
        short = value if value == PER_SEED else str(value)[:8]
        return f"{'rows' if key.startswith('rows') else 'images'} {short}"
    words = key.replace("_", " ").removesuffix(" method")
    if isinstance(value, bool) or value is None:
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
