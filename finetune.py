"""Supervised training: fine-tune a run, train from scratch, or re-train a run's classifier.

    python finetune.py runs/digits/99-1/supmin/seed0                 all weights
    python finetune.py runs/digits/99-1/supmin/seed0 --train head    a linear head, frozen encoder
    python finetune.py subsets/digits/99-1.json --loss focal         ResNet-50 from scratch
    python finetune.py runs/digits/99-1/ce/seed0 --retrain crt       a new classifier for a run

Validation chooses the epoch, by AUROC; lws and tau_norm use balanced accuracy, because they move
the threshold more than the order of the images. The test split is read once.
Writes config.json, log.jsonl, checkpoint.pt, classifier.pt, predictions.csv, finetune.json and, if
training changed it, encoder.pt into <run>/finetune/, <run>/<crt, lws or tau_norm>/ or
runs/<dataset>/<ratio>/<loss>/seed<k>/. A contrastive run gets its finetune.json in <run>/. The
same command continues a stopped run.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from baselines import LearnableScale, tau_normalized
from baselines.classification import (
    HEADS,
    LOSSES,
    Classifier,
    first_selectable_epoch,
    make_loss,
)
from common import (
    RECIPES,
    Amp,
    embed,
    load_run,
    load_subset,
    train_one_epoch,
    warmup_cosine,
)
from datasets.loader import BatchLoader, balanced_batches, check_batch_size, shuffled_batches
from datasets.pack import read_index
from datasets.predict import list_prediction_images, predict_folder
from datasets.subset import Subset
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main
from utils.distributed import pick_device
from utils.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STEMS,
    build_encoder,
    compile_training,
    feature_map_side,
    load_init,
    resolve_stem,
)
from utils.files import find_runs_folder, read_json, write_json
from utils.runs import (
    Run,
    add_machine_flags,
    load_strict,
    load_tensors,
    module_sha256,
    provenance,
    save_tensors,
)
from utils.scores import classification_scores, write_predictions

TAUS = [i / 10 for i in range(21)]

# What --retrain decides, as in Kang et al. 2020 (arXiv:1910.09217): its flags are refused.
FIXED = dict(loss="ce", train="head", head="linear", head_lr=None, subsample_balanced=False)
UNTRAINED = dict(epochs=0, lr=None, fraction=1.0, no_augment=False, bn_train=False)
RETRAIN = {
    "crt": {**FIXED, "balanced_batches": True},
    "lws": {**FIXED, "balanced_batches": True},
    "tau_norm": {**FIXED, "balanced_batches": False, **UNTRAINED},
}
RETRAIN_EPOCHS = {"crt": 10, "lws": 5, "tau_norm": 0}  # defaults
CRITERION = {"lws": "balanced_accuracy", "tau_norm": "balanced_accuracy"}  # else auroc


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


def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    if args.predict and (args.source / "classifier.pt").exists():
        print(f"{args.source}: its finished network classifies; nothing is trained")
        model, subset = load_classifier_folder(args.source)
    else:
        from_run = retrain if args.retrain else finetune
        task = from_run(args) if args.source.is_dir() else train_from_scratch(args)
        model, subset = train(task, args, device), task.subset
    if args.predict:
        predict_folder(model.to(device), subset, args.predict, args.new_images, args.csv, device)


def train(task, args, device):
    """Train until the last epoch, write the results of the best one, and return its network."""
    has_fixed_encoder = args.train == "head" and not args.bn_train
    model = Classifier(task.encoder, task.head, has_fixed_encoder).to(device)
    frozen_module = select_frozen_module(model.encoder, args)
    frozen_sha256 = module_sha256(frozen_module)
    rows = select_training_rows(task.subset, args)
    labels = task.subset.labels[rows]
    loss = loss_for_counts(args, labels, device)
    amp = Amp(device, args.amp, task.subset.size)
    optimizer, best = make_optimizer(model, args), BestEpoch(model)
    state = dict(model=model, optimizer=optimizer, scaler=amp.scaler, best=best)
    run = Run(task.out, make_config(task, args, amp), device, args.save_every, **state)
    first_epoch = run.resume()
    if args.retrain == "tau_norm" and first_epoch == 0:
        choose_tau(model, best, task.subset, run, device)

    sampler, augmented = make_sampler(args, labels), not args.no_augment
    loader = BatchLoader(task.subset, rows, device, sampler, augmented=augmented)
    if args.compile:
        compile_training(model.encoder)
    with run:
        for epoch in range(first_epoch, args.epochs):
            set_learning_rates(optimizer, epoch, args.epochs)
            model.train()
            batches = loader.epoch(epoch, args.seed)
            batch_loss = partial(compute_batch_loss, model, loss, epoch)
            stats = train_one_epoch(batch_loss, batches, optimizer, amp, task.out)
            stats["head_lr"] = optimizer.param_groups[1]["lr"]
            scores, _ = evaluate_split(model, task.subset, "val", device, args.batch_size)
            if epoch >= first_selectable_epoch(args.loss, args.epochs):
                best.update(model, epoch, scores[CRITERION.get(args.retrain, "auroc")])
            run.finish_epoch(epoch, stats | {f"val_{key}": value for key, value in scores.items()})
            print_epoch(epoch, args.epochs, stats["loss"], scores)

    model.load_state_dict(best.weights)
    if module_sha256(frozen_module) != frozen_sha256:
        raise RuntimeError("training changed the frozen encoder")
    write_results(task, model, best, run.config, device)
    return model


# --------------------------------------------------------------------------------------------------
# the three programs: each builds a Task
# --------------------------------------------------------------------------------------------------


def finetune(args):
    """Train the network of a run, or a new head on its frozen encoder."""
    config, subset, encoder = load_source_run(args)
    encoder_sha256 = module_sha256(encoder)
    encoder.requires_grad_(args.train == "all")
    head = HEADS[args.head](encoder.dim)
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
    subset.change_views(args.size, args.recipe, args.no_flip)
    if args.init == "imagenet":
        subset.mean, subset.std = IMAGENET_MEAN, IMAGENET_STD
        print("  inputs are normalised with ImageNet's mean and standard deviation")
    if args.smoke:
        subset.limit_for_smoke()
    stem = resolve_stem(args.arch, args.stem, subset.size, args.init)
    torch.manual_seed(args.seed)
    encoder, network = build_encoder(args.arch, stem), {"arch": args.arch, "stem": stem}
    head = HEADS[args.head](encoder.dim)
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
    head = HEADS[args.head](encoder.dim)
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


def select_frozen_module(encoder, args):
    """Return what training must not change: nothing, the encoder, or its weights (--bn-train)."""
    if args.train == "all":
        return nn.Module()
    return nn.ParameterList(encoder.parameters()) if args.bn_train else encoder


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


def load_classifier_folder(folder):
    """Load a finished network from the folder of its classifier.pt: (Classifier, subset).

    The encoder is in the same folder or, if it was frozen, in the run above. Raises UserError if
    it is missing or is not the one that the classifier was trained on.
    """
    config = read_json(folder / "config.json", "give a folder that finetune.py made")
    is_frozen = not (folder / "encoder.pt").exists()
    _, subset, encoder = load_run(folder.parent if is_frozen else folder)
    if is_frozen and module_sha256(encoder) != config.get("encoder_sha256"):
        raise UserError(
            f"{folder}: trained on another encoder than that of {folder.parent}; "
            "move the folder back into its run"
        )
    if config["smoke"]:
        print(f"  WARNING: {folder} was trained with --smoke; its probabilities mean nothing")
    subset.size = config["size"]
    head = HEADS[config["head"]](encoder.dim)
    head = LearnableScale(head) if config.get("method") == "lws" else head
    load_strict(head, load_tensors(folder / "classifier.pt"), folder / "classifier.pt")
    return Classifier(encoder, head, has_fixed_encoder=True).eval(), subset


# --------------------------------------------------------------------------------------------------
# flags and their checks
# --------------------------------------------------------------------------------------------------


def parse_args(words=None):
    words = sys.argv[1:] if words is None else words
    parser = make_parser()
    args = parser.parse_args(words)
    if args.retrain:
        # None: defaults_from_run sets it.
        parser.set_defaults(epochs=RETRAIN_EPOCHS[args.retrain], batch_size=None, lr=None)
        args = parser.parse_args(words)
    args.new_images = list_prediction_images(args.predict, args.csv)
    typed = {word.split("=")[0] for word in words}
    apply_overrides(args, typed, f"--retrain {args.retrain}", RETRAIN.get(args.retrain, {}))
    if args.loss == "ldam_drw":
        apply_overrides(args, typed, "--loss ldam_drw", {"head": "cosine"})
    check_source(args, typed)
    check_args(args, typed)
    return args


def make_parser():
    parser = ArgumentParser(
        "A subset file: train a network from scratch. A run folder: fine-tune its network, or "
        "train a new head (--train head). With --retrain: re-train its classifier by a published "
        "method, which fixes --loss, --train, --head and the sampling.",
        smoke=dict(arch="resnet18", epochs=2, batch_size=16),
    )
    positive, number = number_from(1), number_from(0, float)
    add = parser.add_argument
    add("source", type=Path, help="subsets/<dataset>/<ratio>.json, or a run folder")
    add("--loss", choices=LOSSES, default="weighted_ce", help="not with --retrain")
    add("--gamma", type=number, default=2.0, help="exponent of --loss focal")
    add("--head", choices=["linear", "mlp"], default="linear", help="classifier; ldam_drw: cosine")
    add("--epochs", type=positive, default=100, help="passes over the images; crt: 10, lws: 5")
    add("--batch-size", type=number_from(2), default=256, help="images; --retrain: the run's")
    add("--lr", type=number, default=1e-4, help="Adam's; crt, lws: SGD, 0.2 * batch size / 512")
    add("--head-lr", type=number, metavar="LR", help="another one for the head (default: --lr)")
    add("--seed", type=number_from(0), help="of weights and batches (default: the run's, or 0)")
    add("--out", type=Path, help="folder for all files (default: in the run, or below runs/)")
    add("--smoke", action="store_true", help="tiny network, few images, two epochs of two steps")

    add = parser.add_argument_group("from scratch only").add_argument
    add("--arch", default="resnet50", help="resnet8 to resnet56, or any torchvision ResNet")
    add("--stem", choices=STEMS, default="auto", help="cifar: 3x3, no pooling (auto: up to 32 px)")
    add("--init", metavar="WHERE", help="start from a run folder, a file of weights, or imagenet")

    add = parser.add_argument_group("of a run only").add_argument
    text = "all: the whole network; head: a new head on the frozen encoder"
    add("--train", choices=["all", "head"], default="all", help=text)
    text = "crt: a new classifier; lws: scales of the trained one; tau_norm: norms of its weights"
    add("--retrain", choices=RETRAIN, metavar="METHOD", help=text)
    add("--bn-train", action="store_true", help="batch norm of a frozen encoder goes on learning")

    add = parser.add_argument_group("images").add_argument
    add("--size", type=number_from(8), metavar="S", help="input side, px (default: the source's)")
    text = "share of the training images of each class"
    add("--fraction", type=number, default=1.0, metavar="F", help=text)
    text = "leave out majority images until the classes are equal"
    add("--subsample-balanced", action="store_true", help=text)
    text = "draw both classes equally often; the loss then counts them as equal"
    add("--balanced-batches", action="store_true", help=text)
    recipe = f"augmentation: {', '.join(RECIPES)} (default: the source's)"
    add("--recipe", choices=RECIPES, metavar="NAME", help=recipe)
    add("--no-flip", action="store_true", help="never flip images left-right")
    add("--no-augment", action="store_true", help="train on the evaluation view")
    text = "classify the images in FOLDER; a finished network is reused, not trained again"
    add("--predict", type=Path, metavar="FOLDER", help=text)
    add("--csv", type=Path, metavar="OUT", help="output of --predict: file, probability, class")

    add_machine_flags(parser.add_argument_group("machine").add_argument)
    return parser


def apply_overrides(args, typed, cause, overrides):
    """Set what another flag, the cause, decides. Raises UserError if the user typed it, too."""
    for name, value in overrides.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in typed:
            raise UserError(f"{flag}: cannot be combined with {cause}; leave it out")
        setattr(args, name, value)


def check_source(args, typed):
    """Raise UserError unless the source is a run or a subset, and the flags are for its kind."""
    source = args.source
    if not source.exists():
        made_by = "make it with pretrain.py or make_subsets.py"
        raise UserError(f"{source}: no such run folder or subset file; {made_by}")
    if source.is_dir():
        for flag in ("--arch", "--stem", "--init"):
            if flag in typed:
                raise UserError(f"{flag}: {source} has its network; leave the flag out")
        return
    if (source.parent / "config.json").exists():
        raise UserError(f"{source}: is a file of a run; give its folder, {source.parent}")
    if source.suffix != ".json":
        raise UserError(f"{source}: not a subset file; give weights as --init {source}")
    if args.retrain or args.train == "head":
        flag = f"--retrain {args.retrain}" if args.retrain else "--train head"
        raise UserError(f"{flag}: needs the trained encoder of a run folder, not {source}")


def check_args(args, typed):
    """Raise UserError for flags that do not fit each other."""
    if "--gamma" in typed and args.loss != "focal":
        raise UserError(f"--gamma: only --loss focal reads it, not {args.loss}; leave it out")
    if not 0 < args.fraction <= 1:
        raise UserError(f"--fraction {args.fraction:g}: give a share above 0 and up to 1")
    if args.bn_train and args.train != "head":
        raise UserError("--bn-train: needs a frozen encoder; add --train head or --retrain crt")
    if args.head_lr is not None and args.train == "head":
        raise UserError("--head-lr: only the head is trained; give its learning rate as --lr")


def make_config(task, args, amp):
    """Return every setting that decides the result, for config.json."""
    subset = task.subset
    return dict(
        **task.settings,
        **task.source_settings,
        **{key: getattr(args, key) for key in ("epochs", "batch_size", "lr", "seed", "smoke")},
        **{key: getattr(subset, key) for key in ("size", "recipe", "ratio", "classes", "minority")},
        **({} if subset.flip else {"no_flip": True}),
        dataset=subset.name,
        amp=amp.mode,
        subset=os.path.relpath(subset.path, task.out),
        sha256=subset.sha256,
        rows_sha256=subset.rows_sha256,
    )


# --------------------------------------------------------------------------------------------------
# loss, training rows, batches, optimizer
# --------------------------------------------------------------------------------------------------


def loss_for_counts(args, labels, device):
    """Return --loss for the class counts of the training labels [n]."""
    counts = [1, 1] if args.balanced_batches else np.bincount(labels, minlength=2).tolist()
    with torch.device(device):
        return make_loss(args.loss, counts, args.epochs, args.gamma)


def compute_batch_loss(model, loss, epoch, batch):
    return loss(model(batch.x[0]).float(), batch.labels, epoch)


def select_training_rows(subset, args):
    """Return the sorted rows to train on, after --fraction and --subsample-balanced.

    Each class keeps its share, at least one image. Raises UserError if they do not fill a batch.
    """
    rows = subset.splits["train"]
    members = [rows[subset.labels[rows] == c] for c in (0, 1)]
    counts = [max(1, round(args.fraction * len(m))) for m in members]
    if args.subsample_balanced:
        counts = [min(counts)] * 2
    # The model seed never changes the data. A smaller share is contained in a larger one.
    rng = np.random.default_rng(0)
    kept = [rng.permutation(m)[:n] for m, n in zip(members, counts, strict=True)]
    rows = np.sort(np.concatenate(kept))
    check_batch_size(args.batch_size, rows, subset)
    return rows


def make_sampler(args, labels):
    """Return the function that draws the batches of an epoch: generator -> list of positions."""
    steps = min(len(labels) // args.batch_size, 2 if args.smoke else len(labels))

    def draw_batches(generator):
        if args.balanced_batches:
            return balanced_batches(labels, args.batch_size, steps, generator)
        return shuffled_batches(len(labels), args.batch_size, generator)[:steps]

    return draw_batches


def make_optimizer(model, args):
    """Return Adam, or SGD for --retrain, with a parameter group each for encoder and head."""
    head_lr = args.lr if args.head_lr is None else args.head_lr
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "peak_lr": lr}
        for module, lr in ((model.encoder, args.lr), (model.head, head_lr))
    ]
    fused = next(model.parameters()).is_cuda
    if args.retrain:
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, fused=fused)
    return torch.optim.Adam(groups, fused=fused)


def set_learning_rates(optimizer, epoch, epochs):
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(epoch, epochs, group["peak_lr"], warmup_epochs=0)


# --------------------------------------------------------------------------------------------------
# validation and results
# --------------------------------------------------------------------------------------------------


class BestEpoch:
    """The weights of the epoch with the highest validation score; an earlier epoch wins a tie."""

    def __init__(self, model):
        self.epoch, self.score, self.weights = -1, -1.0, model.state_dict()

    def update(self, model, epoch, score):
        if score > self.score:
            self.epoch, self.score = epoch, score
            self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def state_dict(self):
        return {"epoch": self.epoch, "score": self.score, "weights": self.weights}

    def load_state_dict(self, state):
        self.epoch, self.score, self.weights = state["epoch"], state["score"], state["weights"]


@torch.no_grad()
def choose_tau(model, best, subset, run, device):
    """Drop the bias, try every tau, and keep the best by validation balanced accuracy.

    tau = 0 is the classifier without its bias; tau = 1 gives weight vectors of unit length.
    With two softmax classes, the gradients of cross entropy at w_0 and w_1 are exactly opposite.
    So w_0 + w_1 keeps its initial value, up to weight decay, and the norms differ by the
    initialisation alone: tau has little to balance, and what changes the scores is the lost bias.
    Source: Kang et al. 2020, arXiv:1910.09217.
    """
    rows, weight = subset.splits["val"], model.head.weight.clone()
    features = embed(model.encoder, subset, rows, device, run.config["batch_size"]).to(device)
    model.head.bias.zero_()
    for i, tau in enumerate(TAUS):
        model.head.weight.copy_(tau_normalized(weight, tau))
        p = model.head(features).double().softmax(1)[:, 1].cpu()
        scores = classification_scores(p, subset.labels[rows], subset.minority)
        best.update(model, i, scores["balanced_accuracy"])
        run.log(epoch=i, tau=tau, **{f"val_{name}": value for name, value in scores.items()})
    run.copy_checkpoint(len(TAUS))


def evaluate_split(model, subset, split, device, batch_size):
    """Return the scores of a split, and the probability of the minority of each image, [n]."""
    rows = subset.splits[split]
    p = embed(model, subset, rows, device, batch_size).double().softmax(1)[:, 1]
    scores = classification_scores(p, subset.labels[rows], subset.minority)
    return scores, p if subset.minority else 1 - p


def write_results(task, model, best, config, device):
    """Score the best epoch; write the network (see above), predictions.csv and finetune.json."""
    summary_keys = "epochs batch_size lr seed size smoke classes minority".split()
    settings = {**task.settings, **{key: config[key] for key in summary_keys}}
    table, subset = task.out / "predictions.csv", task.subset
    previous = read_json(task.summary, "delete it") if task.summary.exists() else {}
    if table.exists() and all(previous.get(key) == value for key, value in settings.items()):
        print(f"finished already: {task.summary}")
        return
    save_tensors(task.out / "classifier.pt", model.head.state_dict())
    if config["train"] == "all" or config["bn_train"]:
        save_tensors(task.out / "encoder.pt", model.encoder.state_dict())
    scores, predictions = {}, {}
    for split in ("val", "test"):
        scores[split], p = evaluate_split(model, subset, split, device, config["batch_size"])
        predictions[split] = subset.splits[split], p
    files = read_index(subset.path.with_name("index.csv"))[-1]
    write_predictions(table, files, subset.labels, predictions)
    chosen = {"best_epoch": best.epoch + 1}
    if config.get("method") == "tau_norm":
        chosen = {"tau": TAUS[best.epoch]}
    write_json(task.summary, {**scores, **settings, **chosen, "provenance": provenance(device)})
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in chosen.items())
    print(f"test, {text}: {format_scores(scores['test'])}")
    print(f"wrote {task.summary} and {table}")
    print_next("report.py", find_runs_folder(task.out))


def print_epoch(epoch, epochs, loss, scores):
    shown = {name: scores[name] for name in ("balanced_accuracy", "auroc")}
    text = f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}  validation: {format_scores(shown)}"
    print(text, flush=True)


def format_scores(scores):
    names = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "f1": "F1"}
    return "  ".join(f"{names.get(k, k)} {100 * value:.1f} %" for k, value in scores.items())


if __name__ == "__main__":
    run_main(main)
