"""Supervised training: fine-tune a run, train from scratch, or re-train a run's classifier.

    python finetune.py runs/digits/99-1/supmin/seed0                 all weights
    python finetune.py runs/digits/99-1/supmin/seed0 --train head    a linear head, frozen encoder
    python finetune.py subsets/digits/99-1.json --loss focal         ResNet-50 from scratch
    python finetune.py runs/digits/99-1/ce/seed0 --retrain crt       a new classifier for a run
    python finetune.py runs/digits/99-1/ce/seed0 --predict photos --csv out.csv

Validation chooses the epoch, by AUROC; lws and tau_norm use balanced accuracy, because they move
the threshold more than the order of the images. It then chooses the threshold by --threshold-for.
The test split is read once.
Writes config.json, log.jsonl, checkpoint.pt, classifier.pt, classifier.json, predictions.csv,
finetune.json and, if training changed it, encoder.pt into <run>/finetune/, <run>/<crt, lws or
tau_norm>/ or runs/<dataset>/<ratio>/<loss>/seed<k>/. A contrastive run gets its finetune.json in
<run>/. The same command continues a stopped run.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from baselines import tau_normalized
from baselines.classification import (
    LOSSES,
    Classifier,
    first_selectable_epoch,
    load_classifier,
    make_loss,
    write_classifier,
)
from baselines.finetune_task import finetune, retrain, train_from_scratch
from common import RECIPES, Amp, embed, train_one_epoch, warmup_cosine
from datasets.loader import BatchLoader, balanced_batches, check_batch_size, shuffled_batches
from datasets.pack import read_index
from datasets.predict import (
    REUSE_FLAGS,
    add_prediction_flags,
    list_prediction_images,
    use_classifier,
)
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main
from utils.distributed import pick_device
from utils.encoders import STEMS, compile_training
from utils.files import find_runs_folder, read_json, write_json
from utils.runs import Run, add_machine_flags, module_sha256, provenance, save_tensors
from utils.scores import (
    add_score_flags,
    classification_scores,
    print_test_scores,
    score_splits,
    write_predictions,
)

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


def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    folder = find_classifier(args) if args.is_reuse else None
    if folder:
        print(f"{folder}: uses the finished network; nothing is trained")
    else:
        from_run = retrain if args.retrain else finetune
        task = from_run(args) if args.source.is_dir() else train_from_scratch(args)
        train(task, args, device)
        folder = task.out
    if args.predict or args.export:
        use_classifier(load_classifier(folder / "classifier.json"), args, device)


def train(task, args, device):
    """Train until the last epoch and write the results of the best one."""
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
            scores = validate(model, task.subset, device, args.batch_size)
            if epoch >= first_selectable_epoch(args.loss, args.epochs):
                best.update(model, epoch, scores[CRITERION.get(args.retrain, "auroc")])
            run.finish_epoch(epoch, stats | {f"val_{key}": value for key, value in scores.items()})
            print_epoch(epoch, args.epochs, stats["loss"], scores)

    model.load_state_dict(best.weights)
    if module_sha256(frozen_module) != frozen_sha256:
        raise RuntimeError("training changed the frozen encoder")
    write_results(task, model, best, run.config, args, device)


def select_frozen_module(encoder, args):
    """Return what training must not change: nothing, the encoder, or its weights (--bn-train)."""
    if args.train == "all":
        return nn.Module()
    return nn.ParameterList(encoder.parameters()) if args.bn_train else encoder


def find_classifier(args):
    """Return the folder of the finished classifier that --predict and --export use, or None."""
    folders = [args.out] if args.out else [args.source, args.source / "finetune"]
    return next((folder for folder in folders if (folder / "classifier.pt").exists()), None)


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
    args.new_images = list_prediction_images(args)
    typed = {word.split("=")[0] for word in words if word.startswith("--")}
    args.is_reuse = bool(args.predict or args.export) and typed <= REUSE_FLAGS
    apply_overrides(args, typed, f"--retrain {args.retrain}", RETRAIN.get(args.retrain, {}))
    if args.loss == "ldam_drw":
        apply_overrides(args, typed, "--loss ldam_drw", {"head": "cosine"})
    check_source(args, typed)
    check_args(args, typed)
    return args


def make_parser():
    parser = ArgumentParser(
        "Train a subset from scratch, fine-tune a run, give it a new head (--train head), or "
        "re-train its classifier.",
        smoke=dict(arch="resnet18", epochs=2, batch_size=16),
        example="python finetune.py runs/digits/99-1/supmin/seed0 --train head",
    )
    positive, number = number_from(1), number_from(0, float)
    add = parser.add_argument_group("data").add_argument
    add("source", type=Path, help="subsets/<dataset>/<ratio>.json, or a run folder")
    side = number_from(8, high=4096)
    add("--size", type=side, metavar="S", help="input side, px (default: the source's)")
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

    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="weighted_ce", help="not with --retrain")
    add("--gamma", type=number, default=2.0, help="exponent of --loss focal")
    add("--head", choices=["linear", "mlp"], default="linear", help="classifier; ldam_drw: cosine")
    text = "all: the whole network of a run; head: a new head, encoder frozen"
    add("--train", choices=["all", "head"], default="all", help=text)
    text = "crt: a new classifier; lws: scales of it; tau_norm: norms of its weights"
    add("--retrain", choices=RETRAIN, metavar="METHOD", help=text)
    add("--bn-train", action="store_true", help="batch norm of a frozen encoder goes on learning")
    text = "from scratch: resnet8 to resnet56, or any torchvision ResNet"
    add("--arch", default="resnet50", help=text)
    text = "from scratch; cifar: 3x3, no pooling (auto: up to 32 px)"
    add("--stem", choices=STEMS, default="auto", help=text)
    text = "from scratch: start from a run folder, a file of weights, or imagenet"
    add("--init", metavar="WHERE", help=text)
    add_score_flags(add)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=100, help="passes over the images; crt: 10, lws: 5")
    add("--batch-size", type=number_from(2), default=256, help="images; --retrain: the run's")
    add("--lr", type=number, default=1e-4, help="Adam's; crt, lws: SGD, 0.2 * batch size / 512")
    add("--head-lr", type=number, metavar="LR", help="another one for the head (default: --lr)")
    add("--seed", type=number_from(0), help="of weights and batches (default: the run's, or 0)")

    add_machine_flags(parser.add_argument_group("machine").add_argument)

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, help="folder for all files (default: in the run, or below runs/)")
    add_prediction_flags(add)
    add("--smoke", action="store_true", help="tiny network, few images, two epochs of two steps")
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
    if args.no_augment and "--recipe" in typed:
        raise UserError("--recipe: is not used with --no-augment; leave one of them out")
    if not 0 < args.fraction <= 1:
        raise UserError(f"--fraction {args.fraction:g}: give a share above 0 and up to 1")
    if args.bn_train and args.train != "head":
        raise UserError("--bn-train: needs a frozen encoder; add --train head or --retrain crt")
    if args.compile and args.train == "head" and not args.bn_train:
        raise UserError("--compile: only training compiles, and the encoder is frozen; drop it")
    if args.head_lr is not None and args.train == "head":
        raise UserError("--head-lr: only the head is trained; give its learning rate as --lr")


def make_config(task, args, amp):
    """Return every setting that decides the result, for config.json."""
    subset = task.subset
    return dict(
        **task.settings,
        **task.source_settings,
        **{key: getattr(args, key) for key in ("epochs", "batch_size", "lr", "seed", "smoke")},
        **subset.identity(task.out),
        size=subset.size,
        recipe=subset.recipe,
        **({} if subset.flip else {"no_flip": True}),
        amp=amp.mode,
    )


# --------------------------------------------------------------------------------------------------
# loss, training rows, batches, optimizer
# --------------------------------------------------------------------------------------------------


def loss_for_counts(args, labels, device):
    """Return --loss for the class counts of the training labels [n]."""
    counts = np.bincount(labels, minlength=2).tolist()
    if args.balanced_batches:
        counts = [1] * len(counts)
    with torch.device(device):
        return make_loss(args.loss, counts, args.epochs, args.gamma)


def compute_batch_loss(model, loss, epoch, batch):
    return loss(model(batch.x[0]).float(), batch.labels, epoch)


def select_training_rows(subset, args):
    """Return the sorted rows to train on, after --fraction and --subsample-balanced.

    Each class keeps its share, at least one image. Raises UserError if they do not fill a batch.
    """
    rows = subset.splits["train"]
    members = [rows[subset.labels[rows] == c] for c in range(len(subset.classes))]
    counts = [max(1, round(args.fraction * len(m))) for m in members]
    if args.subsample_balanced:
        counts = [min(counts)] * len(counts)
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
        p = model.head(features).double().softmax(1).cpu()
        scores = classification_scores(p, subset.labels[rows], subset.minority)
        best.update(model, i, scores["balanced_accuracy"])
        run.log(epoch=i, tau=tau, **{f"val_{name}": value for name, value in scores.items()})
    run.copy_checkpoint(len(TAUS))


def predict_split(model, subset, split, device, batch_size):
    """Return the class probabilities of the images of a split, float64 [n, C]."""
    return embed(model, subset, subset.splits[split], device, batch_size).double().softmax(1)


def validate(model, subset, device, batch_size):
    p = predict_split(model, subset, "val", device, batch_size)
    return classification_scores(p, subset.labels[subset.splits["val"]], subset.minority)


def write_results(task, model, best, config, args, device):
    """Score the best epoch; write the network (see above), predictions.csv and finetune.json."""
    summary_keys = "epochs batch_size lr seed size smoke classes minority".split()
    settings = {**task.settings, **{key: config[key] for key in summary_keys}}
    settings |= {"threshold_rule": args.threshold_for, "prevalence": args.prevalence}
    files = [task.out / name for name in ("predictions.csv", "classifier.pt", "classifier.json")]
    previous = read_json(task.summary, "delete it") if task.summary.exists() else {}
    changed = [key for key, value in settings.items() if previous.get(key) != value]
    if not changed and all(file.exists() for file in files):
        print(f"finished already: {task.summary}")
        return
    if previous and changed:
        print(f"replaces {task.summary}, which was made with other {', '.join(changed)}")
    subset, batch_size = task.subset, config["batch_size"]
    p = {
        split: predict_split(model, subset, split, device, batch_size) for split in ("val", "test")
    }
    y = {split: subset.labels[subset.splits[split]] for split in p}
    result = score_splits(p, y, subset.tail, args.threshold_for, args.prevalence)
    save_network(task, model, result, args)
    names = read_index(subset.path.with_name("index.csv"))[-1]
    write_predictions(files[0], names, subset.labels, subset.splits, p, subset.tail, subset.classes)
    chosen = {"best_epoch": best.epoch + 1}
    if args.retrain == "tau_norm":
        chosen = {"tau": TAUS[best.epoch]}
    write_json(task.summary, {**result, **settings, **chosen, "provenance": provenance(device)})
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in chosen.items())
    print(f"test, {text}: {format_scores(result['test'])}")
    print_test_scores(result, p, y, subset.classes, subset.tail)
    print(f"wrote {task.summary} and {files[0]}")
    print_next("report.py", find_runs_folder(task.out), "--html")


def save_network(task, model, result, args):
    """Write classifier.pt, classifier.json and, if training changed it, encoder.pt."""
    save_tensors(task.out / "classifier.pt", model.head.state_dict())
    is_changed = args.train == "all" or args.bn_train
    if is_changed:
        save_tensors(task.out / "encoder.pt", model.encoder.state_dict())
    write_classifier(
        task.out / "classifier.json",
        model.encoder,
        (task.out if is_changed else args.source) / "encoder.pt",
        task.subset,
        **{key: task.source_settings[key] for key in ("arch", "stem")},
        head="lws" if args.retrain == "lws" else args.head,
        weights="classifier.pt",
        threshold=result["threshold"],
        threshold_rule=result["threshold_rule"],
        smoke=args.smoke,
    )


def print_epoch(epoch, epochs, loss, scores):
    shown = {name: scores[name] for name in ("balanced_accuracy", "auroc")}
    text = f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}  validation: {format_scores(shown)}"
    print(text, flush=True)


def format_scores(scores):
    names = dict(accuracy="accuracy", balanced_accuracy="balanced accuracy", auroc="AUROC", f1="F1")
    shown = [key for key in names if key in scores]
    return "  ".join(f"{names[key]} {100 * scores[key]:.1f} %" for key in shown)


if __name__ == "__main__":
    run_main(main)
