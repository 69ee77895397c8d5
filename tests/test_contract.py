"""Names, flags, files and keys that users' scripts rely on: others may be added, none may go."""

import contextlib
import importlib
import inspect
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import call

# {module: {function: (its parameters, defaults included)}}; further parameters may follow
FUNCTIONS = {
    "common": {
        "ntxent_loss": "z, temperature=0.07",
        "supcon_loss": "z, labels, temperature=0.07",
        "supmin_loss": "z, labels, minority, temperature=0.07, supervised_majority=None",
        "suppro_loss": "z, labels, prototypes, temperature=0.07, margin=1.0",
        "draw_supervised_majority": "labels, minority, ratio, generator",
        "antipodal_prototypes": "dim, generator",
        "simplex_prototypes": "classes, dim, generator",
        "class_weights": "counts",
        "focal_loss": "logits, targets, gamma=2.0, weights=None",
        "warmup_cosine": "epoch, epochs, lr, warmup_epochs=10",
        "collapse_value": "images, views=2",
    },
    "baselines": {
        "draw_k_positives": "labels, views, k, generator",
        "kcl_loss": "z, labels, positives, temperature=0.07",
        "tsc_loss": "z, labels, targets, positives, temperature=0.07, variant='ttc'",
    },
    "evaluate_metrics": {
        "sample_alignment_distance": "z, labels",
        "sample_alignment_accuracy": "z, labels",
        "class_alignment_distance": "z, labels",
        "class_alignment_consistency": "z, labels, neighborhood=0.05",
        "gaussian_potential": "z, labels",
        "entropy_uniformity": "z, labels, repeats=5, generator=None",
    },
}
NAMES = {
    "common": "augment center_crops center_view color_jitter crop_resize draw_crops draw_jitter "
    "grayscale normalize rotate shift_hue RECIPES cli load_subset embed",
    "baselines": "sbcl_loss bcl_loss paco_loss ldam_loss ldam_margins effective_number_weights "
    "logit_adjusted_loss tau_normalized",
}

# {script: {flag: the default that --help shows, or "" where it shows none or a sentence}}
FLAGS = {
    "make_subsets": {
        "--data-root": "data",
        "--ratios": "99-1 95-5 50-50 natural",
        "--seed": "0",
        "--size": "224, digits 32, infarction 128",
        "--workers": "all cores",
        "--out": "subsets",
        "--test-share": "0.2",
        "--val-share": "0.1",
        "--path-column": "path",
        "--label-column": "label",
        "--patient-column": "patient",
        "--split-column": "split",
        **dict.fromkeys(
            "--download --minority --majority --classes --tail --imbalance --store-size "
            "--grayscale --patient --skip-bad --verify --name --labels --folds".split(),
            "",
        ),
    },
    "pretrain": {
        "--method": "supmin",
        "--majority-supervision": "0",
        "--margin": "1",
        "--k": "3",
        "--queue": "0",
        "--alpha": "0.4",
        "--recluster-every": "10",
        "--temperature": "0.07",
        "--arch": "resnet50",
        "--epochs": "100",
        "--batch-size": "256",
        "--lr": "0.0625",
        "--warmup-epochs": "10",
        "--amp": "auto",
        "--device": "auto",
        "--seed": "0",
        "--watch-every": "5",
        "--save-every": "auto",
        "--out": "runs/<dataset>/<ratio>/<method>/seed<k>",
        **dict.fromkeys(
            "--variant --randaugment --size --chunk --minority-per-batch --deterministic "
            "--compile "
            "--init --recipe --no-flip --relu --smoke".split(),
            "",
        ),
        "--stem": "auto",
    },
    "linear_probe": {
        "--rows": "own balanced",
        "--protocol": "cached",
        "--class-weights": "balanced",
        "--optimizer": "adam",
        "--epochs": "100",
        "--batch-size": "1024",
        "--seed": "0",
        "--device": "auto",
        "--threshold-for": "youden",
        **dict.fromkeys(
            "--embeddings --standardize --prevalence --predict --csv --export --out "
            "--smoke".split(),
            "",
        ),
    },
    "finetune": {
        "--loss": "weighted_ce",
        "--threshold-for": "youden",
        "--gamma": "2",
        "--train": "all",
        "--head": "linear",
        "--head-lr": "--lr",
        "--fraction": "1.0",
        "--arch": "resnet50",
        "--epochs": "100",
        "--batch-size": "256",
        "--lr": "0.0001",
        "--amp": "auto",
        "--device": "auto",
        "--save-every": "auto",
        **dict.fromkeys(
            "--retrain --bn-train --balanced-batches --subsample-balanced --no-augment --size "
            "--init --recipe --no-flip --deterministic --compile --seed --prevalence --predict "
            "--csv --export --out --smoke".split(),
            "",
        ),
    },
    "evaluate_metrics": {
        "--neighborhood": "0.05",
        "--picture": "pca",
        "--batch-size": "256",
        "--seed": "0",
        "--device": "auto",
        **dict.fromkeys("--embeddings --out --smoke".split(), ""),
    },
    "report": dict.fromkeys("--out --html --claims --check --compare".split(), ""),
}
CHOICES = {
    ("pretrain", "--method"): "ntxent supcon supmin suppro kcl tsc sbcl bcl paco",
    ("pretrain", "--variant"): "ttc paper code layernorm batchnorm paco gpaco",
    ("pretrain", "--amp"): "auto off bf16 fp16",
    ("pretrain", "--device"): "auto cpu cuda",
    ("linear_probe", "--protocol"): "cached reference centroid",
    ("linear_probe", "--rows"): "own balanced subsampled one-percent",
    ("linear_probe", "--class-weights"): "balanced none",
    ("linear_probe", "--optimizer"): "adam sgd",
    ("finetune", "--loss"): "ce weighted_ce focal ldam_drw logit_adjusted auc_margin",
    ("finetune", "--retrain"): "crt tau_norm lws",
    ("finetune", "--train"): "all head",
    ("finetune", "--head"): "linear mlp",
    ("evaluate_metrics", "--picture"): "tsne pca none",
}

SCORES = {"accuracy", "balanced_accuracy", "auroc", "f1"}
RARE_CLASS_SCORES = set(
    "average_precision brier sensitivity specificity sensitivity_at_90_specificity "
    "sensitivity_at_95_specificity sensitivity_at_threshold specificity_at_threshold "
    "balanced_accuracy_at_threshold".split()
)
SIX_METRICS = {"sad", "saa", "cad", "cac", "gpu", "peu"}
PROVENANCE = {"command", "commit", "device", "python", "torch", "torchvision", "numpy"}
DATA_KEYS = set("dataset ratio smoke classes minority subset sha256 rows_sha256".split())
TRAINING_KEYS = set("arch size epochs batch_size lr seed amp".split())
FINETUNE_KEYS = set(
    "loss train augment head head_lr balanced_batches subsample_balanced fraction bn_train "
    "encoder_sha256".split()
)
KEYS = {
    "config.json": DATA_KEYS
    | TRAINING_KEYS
    | {"method", "majority_supervision", "projection_dim", "warmup_epochs", "temperature"},
    "probe.json": set(
        "test val test_balanced_train val_balanced_train chosen chosen_balanced_train protocol "
        "smoke encoder_sha256 balanced_sha256 class_weights standardize rows classes minority "
        "threshold threshold_rule test_interval provenance".split()
    ),
    "metrics.json": SIX_METRICS
    | set(
        "space encoder title classes minority n views seed neighborhood neighbors picture smoke "
        "split batch_size encoder_sha256 provenance".split()
    ),
    "finetune.json": FINETUNE_KEYS
    | set("val test epochs batch_size lr seed size smoke classes minority best_epoch".split())
    | {"threshold", "threshold_rule", "test_interval", "provenance"},
    "finetune/config.json": DATA_KEYS | TRAINING_KEYS | FINETUNE_KEYS,
}
LOG_KEYS = {
    "log.jsonl": set(
        "epoch loss collapse_gap lr seconds images_per_s val_saa val_cac val_knn collapsed".split()
    ),
    "finetune/log.jsonl": {f"val_{score}" for score in SCORES}
    | set("epoch loss lr head_lr seconds images_per_s".split()),
}
SUBSET_KEYS = set(
    "command name ratio classes minority counts size recipe mean std seed images_sha256 "
    "index_sha256 settings splits".split()
)
FILES = (
    set("checkpoint.pt encoder.pt curves.png probe.pt predictions.csv".split())
    | set("embedding.png embedding.npz neighbours.csv hard_examples.png".split())
    | {"probe_classifier.json", "finetune/classifier.json"}
    | set("finetune/checkpoint.pt finetune/encoder.pt finetune/classifier.pt".split())
    | KEYS.keys()
    | LOG_KEYS.keys()
)


@pytest.mark.parametrize("module", FUNCTIONS)
def test_public_names_are_importable_and_keep_their_parameters(module):
    namespace = vars(importlib.import_module(module))
    missing = [name for name in NAMES.get(module, "").split() if name not in namespace]
    assert not missing, f"no longer importable from {module}"
    for name, expected in FUNCTIONS[module].items():
        parameters = inspect.signature(namespace[name]).parameters.values()
        shown = [str(p.replace(annotation=p.empty)) for p in parameters]
        assert shown[: expected.count(",") + 1] == expected.split(", "), name
        added = list(parameters)[expected.count(",") + 1 :]
        assert all(p.default is not p.empty for p in added), f"{name} needs a further argument"


@pytest.mark.parametrize("script", FLAGS)
def test_help_shows_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        call(importlib.import_module(script), "--help")
    assert not stop.value.code
    entries = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    texts = {re.search(r"--[\w-]+", entry)[0]: " ".join(entry.split()) for entry in entries}
    assert FLAGS[script].keys() <= texts.keys()
    for flag, default in FLAGS[script].items():
        assert re.search(
            rf"\(default: {re.escape(default)}(?!\w)" if default else "", texts[flag]
        ), f"{texts[flag]!r} does not show the default {default}"
    for name, flag in CHOICES:
        if name == script:
            assert set(CHOICES[name, flag].split()) <= set(re.findall(r"[\w-]+", texts[flag])), flag


@pytest.fixture(scope="module")
def chain(workplace):
    """The run folder of five scripts, each given the path that the one before it wrote; output."""
    import evaluate_metrics
    import finetune
    import linear_probe
    import make_subsets
    import pretrain

    run, output = "runs/digits/99-1/supmin/seed0", io.StringIO()
    with contextlib.redirect_stdout(output):
        call(make_subsets, "digits", "--workers", 1)
        call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke")
        for script in (linear_probe, evaluate_metrics, finetune):
            call(script, run, "--smoke")
    return workplace / run, output.getvalue()


def test_a_subset_keeps_its_files_and_keys(workplace):
    folder = workplace / "subsets/digits"
    subset = json.loads((folder / "99-1.json").read_text())
    assert SUBSET_KEYS <= subset.keys()
    assert list(subset["splits"]) == list(subset["counts"]) == ["train", "val", "test"]
    assert subset["counts"]["train"] == {"0": 620, "1": 6} and subset["minority"] == 1
    assert subset["classes"] == ["0-4", "5-9"]
    assert [len(rows) for rows in subset["splits"].values()] == [626, 179, 361]
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    header = (folder / "index.csv").read_text().splitlines()[0]
    assert header == "row,split,label,class,width,height,source"


def test_a_run_folder_keeps_its_files_and_keys(chain):
    run, _ = chain
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert FILES <= files
    content = {name: json.loads((run / name).read_text()) for name in KEYS}
    for name, keys in KEYS.items():
        assert keys <= content[name].keys(), name
    for name, keys in LOG_KEYS.items():
        first, *epochs = map(json.loads, (run / name).read_text().splitlines())
        assert PROVENANCE | {"data_sha256"} <= first.keys(), name
        assert len(epochs) == 2 and all(keys <= line.keys() for line in epochs), name
    for scores in ("test", "val", "test_balanced_train", "val_balanced_train"):
        assert content["probe.json"][scores].keys() == SCORES | RARE_CLASS_SCORES | {"threshold"}
    for name in ("probe.json", "finetune.json"):
        assert content[name]["test"].keys() == SCORES | RARE_CLASS_SCORES | {"threshold"}
        assert content[name]["test_interval"].keys() == SCORES | RARE_CLASS_SCORES
    assert all(len(content["metrics.json"][name]) == 2 for name in SIX_METRICS)
    assert PROVENANCE <= content["metrics.json"]["provenance"].keys()


def test_weights_load_without_pickles(chain):
    run, _ = chain
    for name in ("checkpoint.pt", "encoder.pt", "finetune/encoder.pt"):
        assert torch.load(run / name, weights_only=True), name
    assert torch.load(run / "encoder.pt", weights_only=True)["conv1.weight"].ndim == 4


def test_every_script_prints_the_command_that_follows(chain):
    run = "runs/digits/99-1/supmin/seed0"
    assert re.findall("^next: (.*)", chain[1], re.MULTILINE) == [
        "python pretrain.py subsets/digits/99-1.json --method supmin",
        f"python linear_probe.py {run} --smoke",
        f"python evaluate_metrics.py {run} --smoke",
        "python report.py runs --html",
        "python report.py runs --html",
    ]
