"""What finetune.py trains: a run's network or head, a network from scratch, a run's classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from baselines.classification import HEADS
from baselines.supervised import LearnableScale
from common import load_run, load_subset
from datasets.subset import Subset
from utils.cli import UserError
from utils.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_encoder,
    feature_map_side,
    load_init,
    resolve_stem,
)
from utils.files import read_json
from utils.runs import load_strict, load_tensors, module_sha256


@dataclass
class Task:
    """What differs between fine-tuning, training from scratch and re-training."""

    subset: Subset
    encoder: nn.Module
    head: nn.Module
    out: Path  # folder of all files but finetune.json
    summary: Path  # finetune.json
    settings: dict  # of config.json and finetune.json
    source_settings: dict  # of config.json only: the network, and how its weights were trained


def finetune(args):
    """Train the network of a run, or a new head on its frozen encoder."""
    config, subset, encoder = load_source_run(args)
    check_loss(args, subset)
    encoder_sha256 = module_sha256(encoder)
    encoder.requires_grad_(args.train == "all")
    head = HEADS[args.head](encoder.dim, len(subset.classes))
    out = args.out or args.source / "finetune"
    # A supervised run has a finetune.json of its own.
    is_contrastive = "projection_dim" in config
    summary = (args.source if is_contrastive and not args.out else out) / "finetune.json"
    settings = {**training_settings(args), "encoder_sha256": encoder_sha256}
    return Task(subset, encoder, head, out, summary, settings, network_settings(config, subset))


def train_from_scratch(args):
    """Train a new network on a subset, from random weights or those of --init."""
    args.seed = args.seed or 0
    subset = load_subset(args.source)
    check_loss(args, subset)
    subset.change_views(args.size, args.recipe, args.no_flip)
    if args.init == "imagenet":
        subset.mean, subset.std = IMAGENET_MEAN, IMAGENET_STD
        print("  inputs are normalised with ImageNet's mean and standard deviation")
    if args.smoke:
        subset.limit_for_smoke()
    stem = resolve_stem(args.arch, args.stem, subset.size, args.init)
    torch.manual_seed(args.seed)
    encoder, network = build_encoder(args.arch, stem), {"arch": args.arch, "stem": stem}
    head = HEADS[args.head](encoder.dim, len(subset.classes))
    if args.init is not None:
        network["init"] = args.init
        network["init_sha256"] = load_init(encoder, args.arch, args.init, subset.classes)
    out = args.out or Path("runs", subset.name, subset.ratio, args.loss, f"seed{args.seed}")
    settings = {"method": args.loss, **training_settings(args)}
    source_settings = network_settings(network, subset)
    if source_settings["feature_map"] == 1:
        print("  WARNING: its last stage sees one pixel; use --stem cifar, or a larger --size")
    return Task(subset, encoder, head, out, out / "finetune.json", settings, source_settings)


def retrain(args):
    """Train a new classifier on the frozen encoder of a run, or re-scale the one it has."""
    config, subset, encoder = load_source_run(args)
    encoder_sha256 = module_sha256(encoder)
    head = HEADS[args.head](encoder.dim, len(subset.classes))
    # A fine-tuned encoder has no method.
    source_settings = {"encoder_method": "fine-tuned", **prefixed_settings(config, "encoder")}
    source_settings |= network_settings(config, subset)
    if args.retrain != "crt":
        source_settings |= load_linear_classifier(head, args, config, encoder_sha256)
    if args.retrain == "lws":
        head = LearnableScale(head)
    out = args.out or args.source / args.retrain
    settings = {"method": args.retrain, **training_settings(args), "encoder_sha256": encoder_sha256}
    return Task(subset, encoder, head, out, out / "finetune.json", settings, source_settings)


def load_source_run(args):
    """Load the run (config, subset, encoder), take defaults from it, and seed the new weights."""
    config, subset, encoder = load_run(args.source, args.smoke)
    subset.change_views(args.size, args.recipe, args.no_flip)
    defaults_from_run(args, config)
    torch.manual_seed(args.seed)
    return config, subset, encoder


def defaults_from_run(args, config):
    """Take the run's seed and, for --retrain, its batch size, if they were not typed."""
    args.seed = config["seed"] if args.seed is None else args.seed
    args.batch_size = args.batch_size or config["batch_size"]
    args.lr = 0.2 * args.batch_size / 512 if args.lr is None else args.lr


def check_loss(args, subset):
    """Raise UserError if --loss is not for as many classes."""
    if args.loss == "auc_margin" and len(subset.classes) > 2:
        raise UserError(f"--loss auc_margin: is for two classes; {args.source} has more; use ce")


def network_settings(config, subset):
    """Return the settings of the encoder, as load_run needs them in the new config.json."""
    network = {"stem": "imagenet", **config}
    kept = {key: network[key] for key in ("arch", "stem", "init", "init_sha256") if key in network}
    side = feature_map_side(network["arch"], network["stem"], subset.size)
    return {**kept, "feature_map": side}


def training_settings(args):
    """Return the flags that config.json and finetune.json record for all three programs."""
    names = ("head", "head_lr", "balanced_batches", "subsample_balanced", "fraction", "bn_train")
    gamma = {"gamma": args.gamma} if args.loss == "focal" else {}
    settings = {"loss": args.loss, **gamma, "train": args.train, "augment": not args.no_augment}
    return settings | {name: getattr(args, name) for name in names}


def prefixed_settings(config, prefix):
    """Return the settings of an earlier training, without those of the data, for config.json."""
    data = "dataset ratio subset classes minority sha256 rows_sha256 encoder_sha256".split()
    return {f"{prefix}_{key}": value for key, value in config.items() if key not in data}


def load_linear_classifier(head, args, run_config, encoder_sha256):
    """Load the linear classifier of a run's encoder into `head`.

    A supervised run has its own, beside encoder.pt. The one of another run is in <run>/finetune;
    then the settings of its training are returned, else {}. Raises UserError if there is none, or
    if it was trained in another way.
    """
    folder, config = args.source, run_config
    if run_config.get("head") != "linear":
        folder = args.source / "finetune"
        hint = (
            f"--retrain {args.retrain} needs a linear classifier on this encoder: "
            f"python finetune.py {args.source} --train head --loss ce"
        )
        if not (folder / "classifier.pt").exists():
            raise UserError(f"{folder / 'classifier.pt'}: no such file; {hint}")
        config = read_json(folder / "config.json", hint)
        needed = dict(train="head", head="linear", loss="ce", balanced_batches=False)
        needed |= dict(bn_train=False, encoder_sha256=encoder_sha256)
        differ = [f"{k} {config.get(k)}" for k, value in needed.items() if config.get(k) != value]
        if differ:
            raise UserError(f"{folder}: was made with {', '.join(differ)}; move it away; {hint}")
    load_strict(head, load_tensors(folder / "classifier.pt"), folder / "classifier.pt")
    return {} if config is run_config else prefixed_settings(config, "classifier")
