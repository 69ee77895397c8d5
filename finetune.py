"""Supervised training: fine-tune a finished run, train a baseline from scratch, or re-train the classifier on a frozen encoder.

    python finetune.py runs/digits/99-1/supmin/seed0                           the whole network, weighted cross entropy
    python finetune.py runs/digits/99-1/supmin/seed0 --train head              a linear head on the frozen encoder
    python finetune.py subsets/digits/99-1.json --loss focal                   ResNet-50 from scratch
    python finetune.py runs/digits/99-1/ce/seed0 --retrain crt                 a new classifier, class-balanced sampling

Fine-tuning a contrastive run writes finetune.json there and its own files in <run>/finetune/; --retrain all in <run>/<crt|tau_norm|lws>/.
From scratch they go to runs/<dataset>/<ratio>/<loss>/seed<k>/, with an encoder.pt that linear_probe.py and evaluate_metrics.py take like
any other. classifier.pt is the head; encoder.pt lies beside it where the training changed the encoder. The epoch is chosen on validation,
by AUROC (of LDAM-DRW, among those with its weights); lws and tau_norm choose by balanced accuracy, since scales move the threshold more
than the order. The test split is read once. The same command continues a run that was stopped.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import (
    CosineClassifier,
    LearnableScale,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    tau_normalized,
)
from common import (
    Amp,
    class_weights,
    embed,
    focal_loss,
    load_run,
    load_subset,
    train_one_epoch,
    warmup_cosine,
)
from datasets.images import list_prediction_images
from datasets.loader import BatchLoader, balanced_batches, shuffled_batches
from datasets.predict import predict_folder
from utils.cli import ArgumentParser, UserError, number_from, run_main
from utils.distributed import pick_device
from utils.encoders import build_encoder
from utils.files import read_json, write_json
from utils.runs import Run, load_strict, load_tensors, module_sha256, provenance, save_tensors
from utils.scores import classification_scores

RETRAIN_EPOCHS = {"crt": 10, "lws": 5, "tau_norm": 0}  # Kang et al. 2020; tau_norm trains nothing


def parse_args():
    parser = ArgumentParser(
        "Fine-tune a run, train a supervised baseline from scratch, or re-train a run's classifier."
    )
    parser.add_argument(
        "source",
        type=Path,
        help="run folder, or subsets/<dataset>/<ratio>.json to train from scratch",
    )
    parser.add_argument(
        "--loss",
        choices=["ce", "weighted_ce", "focal", "ldam_drw", "logit_adjusted"],
        help="weights, margins, priors: from the training rows (default: weighted_ce)",
    )
    parser.add_argument(
        "--gamma", type=number_from(0, float), help="of the focal loss (default: 2)"
    )
    parser.add_argument(
        "--retrain",
        choices=RETRAIN_EPOCHS,
        help="only the classifier, as its paper does: its loss, sampler, optimizer, epochs",
    )
    parser.add_argument(
        "--train",
        choices=["all", "head"],
        help="head: the encoder stays frozen, in eval mode (default: all)",
    )
    parser.add_argument(
        "--bn-train",
        action="store_true",
        help="batch norm of a frozen encoder in train mode: its statistics drift",
    )
    parser.add_argument(
        "--head",
        choices=["linear", "mlp"],
        help="on the encoder (default: linear; ldam_drw: cosine)",
    )
    parser.add_argument(
        "--head-lr",
        type=number_from(0, float),
        metavar="LR",
        help="learning rate of the head (default: --lr)",
    )
    parser.add_argument(
        "--balanced-batches",
        action="store_true",
        help="classes alike in a batch, and then in weights, margins, priors",
    )
    parser.add_argument(
        "--subsample-balanced",
        action="store_true",
        help="leave out majority images until the classes are equal",
    )
    parser.add_argument(
        "--fraction",
        type=number_from(0, float),
        default=1.0,
        metavar="F",
        help="share of the training images of each class, up to 1",
    )
    parser.add_argument(
        "--no-augment",
        action="store_true",
        help="train on the evaluation view, as the reference's baseline does",
    )
    parser.add_argument("--arch", help="from scratch: any torchvision ResNet (default: resnet50)")
    parser.add_argument(
        "--size",
        type=number_from(8),
        metavar="S",
        help="side of what the network sees, pixels (default: the run's or subset's)",
    )
    parser.add_argument(
        "--epochs",
        type=number_from(1),
        help="passes over the training images (default: 100; crt: 10, lws: 5)",
    )
    parser.add_argument(
        "--batch-size", type=number_from(2), help="images (default: 256; --retrain: the run's)"
    )
    parser.add_argument(
        "--lr",
        type=number_from(0, float),
        help="of Adam (default: 0.0001), of SGD (crt, lws: 0.2 batch size / 512); cosine",
    )
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 where the GPU has it",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA where there is one",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits every time on a GPU, too, which is slower",
    )
    parser.add_argument(
        "--seed",
        type=number_from(0),
        help="of weights, order and augmentation; never of the data (default: the run's, or 0)",
    )
    parser.add_argument(
        "--save-every",
        type=number_from(1),
        default=1,
        metavar="E",
        help="epochs between checkpoints",
    )
    parser.add_argument(
        "--predict",
        type=Path,
        metavar="FOLDER",
        help="classify the images below this folder, with --csv; trains if need be",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="where --predict writes file, probability, class"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for everything written (default: see above)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny network, a few images, two epochs of two steps"
    )
    args = parser.parse_args()
    args.new_images = list_prediction_images(args.predict, args.csv)
    if not args.source.exists():
        raise UserError(
            f"{args.source}: no such run folder or subset file; pretrain.py makes runs, make_subsets.py subsets"
        )
    if args.arch and args.source.is_dir():
        raise UserError(
            f"--arch {args.arch}: is for training from scratch; {args.source} has its network"
        )
    for flag, value in (
        ("--train head", args.train == "head"),
        (f"--retrain {args.retrain}", args.retrain),
    ):
        if value and not args.source.is_dir():
            raise UserError(
                f"{flag}: needs a run folder with a trained encoder, {args.source} is none"
            )

    # what --retrain fixes is not typed beside it; everything else has a default, the run's own for some
    fixed = (
        ["loss", "train", "head", "head_lr", "balanced_batches", "subsample_balanced"]
        if args.retrain
        else []
    )
    fixed += (
        ["fraction", "epochs", "lr", "no_augment", "bn_train"] if args.retrain == "tau_norm" else []
    )
    for flag in fixed:
        if getattr(args, flag) != parser.get_default(flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: is no choice in --retrain {args.retrain}; leave it out"
            )
    if args.head and args.loss == "ldam_drw":
        raise UserError(
            f"--head {args.head}: --loss ldam_drw brings its cosine classifier; leave --head out"
        )
    if args.retrain:
        defaults = dict(
            loss="ce", train="head", head="linear", epochs=RETRAIN_EPOCHS[args.retrain]
        )  # batch size and lr: see inherit
        args.balanced_batches = args.retrain != "tau_norm"
    else:
        defaults = dict(
            loss="weighted_ce",
            train="all",
            head="cosine" if args.loss == "ldam_drw" else "linear",
            epochs=100,
            batch_size=256,
            lr=1e-4,
        )
    if args.smoke:
        defaults.update(epochs=min(defaults["epochs"], 2), batch_size=16)
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)

    if args.gamma is not None and args.loss != "focal":
        raise UserError(f"--gamma: is read by --loss focal only, not by {args.loss}")
    args.gamma = 2.0 if args.gamma is None else args.gamma
    if not 0 < args.fraction <= 1:
        raise UserError(f"--fraction {args.fraction:g}: must lie above 0 and not above 1")
    if args.bn_train and args.train != "head":
        raise UserError("--bn-train: is about a frozen encoder; add --train head or --retrain crt")
    if args.head_lr is not None and args.train == "head":
        raise UserError(
            "--head-lr: with --train head the head alone is trained; give its learning rate as --lr"
        )
    return args


SCALE = 30.0  # of the cosine classifier's logits
TAUS = [i / 10 for i in range(21)]


# losses: made from the options and the class counts of the training rows, called with logits [B, 2], targets [B] and the epoch --


def ce(args, counts):
    return lambda logits, targets, epoch: F.cross_entropy(logits, targets)


def weighted_ce(args, counts):
    """Divided by the sum of the weights in the batch, as in the reference: a batch of one class alone is not weighted."""
    weights = class_weights(counts)
    return lambda logits, targets, epoch: F.cross_entropy(
        logits, targets, weight=weights.to(logits)
    )


def focal(args, counts):
    weights = class_weights(counts)
    return lambda logits, targets, epoch: focal_loss(logits, targets, args.gamma, weights)


def ldam_drw(args, counts):
    """Deferred re-weighting: the margins alone, and class weights over the last fifth of the epochs."""
    margins, weights, switch = (
        ldam_margins(counts),
        effective_number_weights(counts),
        first_choice(args),
    )
    return lambda logits, targets, epoch: ldam_loss(
        logits / SCALE, targets, margins, SCALE, weights if epoch >= switch else None
    )


def first_choice(args):
    """The first epoch that validation may choose: before its deferred weights, LDAM-DRW is only LDAM."""
    return 4 * args.epochs // 5 if args.loss == "ldam_drw" else 0


def logit_adjusted(args, counts):
    prior = torch.tensor(counts) / sum(counts)
    return lambda logits, targets, epoch: logit_adjusted_loss(logits, targets, prior)


LOSSES = {loss.__name__: loss for loss in (ce, weighted_ce, focal, ldam_drw, logit_adjusted)}
HEADS = {
    "linear": lambda dim: nn.Linear(dim, 2),
    "mlp": lambda dim: nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, 2)
    ),
    "cosine": lambda dim: CosineClassifier(dim, SCALE),
}


def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    if args.predict and (args.source / "classifier.pt").exists():
        print(f"{args.source}: its finished network classifies, nothing is trained")
        model, subset = load_network(args.source)
        predict_folder(model.to(device), subset, args.predict, args.new_images, args.csv, device)
        return

    # what is trained: a finished run's encoder, or a new network on a subset; and where it is written
    options = dict(
        loss=args.loss,
        **({"gamma": args.gamma} if args.loss == "focal" else {}),
        train=args.train,
        augment=not args.no_augment,
        **{
            name: getattr(args, name)
            for name in (
                "head",
                "head_lr",
                "balanced_batches",
                "subsample_balanced",
                "fraction",
                "bn_train",
            )
        },
    )
    origin = {}
    if args.source.is_dir():
        source, subset, encoder = load_run(args.source)
        inherit(args, source)
        torch.manual_seed(args.seed)
        arch, out = source["arch"], args.out or args.source / (args.retrain or "finetune")
        beside_encoder = (
            "projection_dim" in source and not args.out and not args.retrain
        )  # a supervised source has one of its own there
        summary = (args.source if beside_encoder else out) / "finetune.json"
        options["encoder_sha256"] = module_sha256(encoder)
        if args.retrain:
            options, origin = (
                {"method": args.retrain, **options},
                {"encoder_method": "fine-tuned", **settings_of(source, "encoder")},
            )
    else:
        args.seed = args.seed or 0
        torch.manual_seed(args.seed)
        arch = args.arch or ("resnet18" if args.smoke else "resnet50")
        subset, encoder = load_subset(args.source), build_encoder(arch)
        out = args.out or Path("runs", subset.name, subset.ratio, args.loss, f"seed{args.seed}")
        summary, options = out / "finetune.json", {"method": args.loss, **options}
    head = HEADS[args.head](encoder.dim)
    if args.retrain in ("lws", "tau_norm"):
        origin.update(load_classifier(head, args, source, options["encoder_sha256"]))
    if args.retrain == "lws":
        head = LearnableScale(head)
    model = Classifier(
        encoder.requires_grad_(args.train == "all"),
        head,
        frozen=args.train == "head" and not args.bn_train,
    ).to(device)
    kept = (
        nn.ParameterList(encoder.parameters()) if args.bn_train else encoder
    )  # what has to stay, if the encoder is frozen
    kept_sha256 = module_sha256(kept)

    subset.size = args.size or subset.size
    amp = Amp(device, args.amp, subset.size)
    rows = training_rows(subset.limit_for_smoke() if args.smoke else subset, args)
    if args.batch_size > len(rows):
        raise UserError(
            f"--batch-size {args.batch_size}: only {len(rows)} training images of {subset.path} are left; "
            f"use --batch-size {len(rows)} or less"
        )
    counts = (
        [1, 1] if args.balanced_batches else np.bincount(subset.labels[rows], minlength=2).tolist()
    )  # as the loss will see them
    with torch.device(device):
        loss_of = LOSSES[args.loss](args, counts)
    config = dict(
        **options,
        **origin,
        dataset=subset.name,
        ratio=subset.ratio,
        arch=arch,
        size=subset.size,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        amp=amp.mode,
        smoke=args.smoke,
        classes=subset.classes,
        minority=subset.minority,
        subset=os.path.relpath(subset.path, out),
        sha256=subset.sha256,
        rows_sha256=subset.rows_sha256,
    )

    # a new run, or the same one from its last checkpoint; `best` holds the weights of the best epoch so far
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "peak_lr": lr}
        for part, lr in (
            (model.encoder, args.lr),
            (model.head, args.lr if args.head_lr is None else args.head_lr),
        )
    ]
    optimizer = (
        torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
        if args.retrain
        else torch.optim.Adam(groups)
    )
    best = Best(model)
    state = dict(model=model, optimizer=optimizer, scaler=amp.scaler, best=best)
    run = Run(out, config, device, args.save_every, **state)
    first_epoch = run.resume()
    if args.retrain == "tau_norm" and first_epoch == 0:
        choose_tau(model, best, subset, run, device, args)
        run.save_checkpoint(len(TAUS))

    steps = min(len(rows) // args.batch_size, 2 if args.smoke else len(rows))

    def draw(generator):
        if args.balanced_batches:
            return balanced_batches(subset.labels[rows], args.batch_size, steps, generator)
        return shuffled_batches(len(rows), args.batch_size, generator)[:steps]

    loader = BatchLoader(subset, rows, device, draw, augmented=not args.no_augment)
    for epoch in range(first_epoch, args.epochs):

        def loss_of_batch(batch, epoch=epoch):
            return loss_of(model(batch.x[0]).float(), batch.labels, epoch)

        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(epoch, args.epochs, group["peak_lr"], warmup_epochs=0)
        model.train()
        batches = loader.epoch(epoch, args.seed)
        stats = train_one_epoch(loss_of_batch, batches, optimizer, amp, out)
        stats["head_lr"] = optimizer.param_groups[1]["lr"]
        validation = evaluate(model, subset, "val", device, args)
        if epoch >= first_choice(args):
            criterion = "balanced_accuracy" if args.retrain == "lws" else "auroc"
            best.update(model, epoch, validation[criterion])
        stats |= {f"val_{name}": value for name, value in validation.items()}
        run.finish_epoch(epoch, stats)

    # what validation chose, on the test split
    model.load_state_dict(best.weights)
    if args.train == "head" and module_sha256(kept) != kept_sha256:
        raise RuntimeError("training the head changed the encoder it was to leave frozen")
    settings = {
        **options,
        **{
            key: config[key]
            for key in (
                "epochs",
                "batch_size",
                "lr",
                "seed",
                "size",
                "smoke",
                "classes",
                "minority",
            )
        },
    }
    old = read_json(summary, "delete it") if summary.exists() else {}
    if any(old.get(key) != value for key, value in settings.items()):
        save_tensors(out / "classifier.pt", model.head.state_dict())
        if kept is not encoder or args.train == "all":  # else it is the run's own
            save_tensors(out / "encoder.pt", model.encoder.state_dict())
        result = {split: evaluate(model, subset, split, device, args) for split in ("val", "test")}
        chosen = (
            {"tau": TAUS[best.epoch]}
            if args.retrain == "tau_norm"
            else {"best_epoch": best.epoch + 1}
        )
        write_json(summary, {**result, **settings, **chosen, "provenance": provenance(device)})
        what = (
            f"tau {chosen['tau']}"
            if "tau" in chosen
            else f"epoch {best.epoch + 1} of {args.epochs}"
        )
        print(
            f"test, {what}: "
            + "  ".join(f"{name} {100 * value:.1f} %" for name, value in result["test"].items())
        )
        print(f"wrote {summary}\nnext: python report.py runs")
    else:
        print(f"finished already: {summary}")
    if args.predict:
        predict_folder(model, subset, args.predict, args.new_images, args.csv, device)


# what is trained, and on what ---------------------------------------------------------------------------------------------


def inherit(args, run):
    """Take from the run what was not typed: its seed and, for --retrain, its batch size, to which the learning rate is in proportion."""
    args.seed = run["seed"] if args.seed is None else args.seed
    if args.retrain:
        args.batch_size = args.batch_size or run["batch_size"]
        args.lr = 0.2 * args.batch_size / 512 if args.lr is None else args.lr


def training_rows(subset, args):
    """Rows to train on: of each class the share --fraction, at least one image, then as many as the rarer class has (--subsample-balanced).

    Drawn by a seed of their own, since the seed of a model never changes the data; a smaller share is part of a larger one.
    """
    rows = subset.splits["train"]
    members = [rows[subset.labels[rows] == c] for c in (0, 1)]
    keep = [max(1, round(args.fraction * len(m))) for m in members]
    if args.subsample_balanced:
        keep = [min(keep)] * 2
    rng = np.random.default_rng(0)
    return np.sort(np.concatenate([rng.permutation(m)[:n] for m, n in zip(members, keep)]))


def settings_of(config, prefix):
    """The settings of an earlier training for this one's config.json, without those of the data, which both share."""
    data = (
        "dataset",
        "ratio",
        "subset",
        "classes",
        "minority",
        "sha256",
        "rows_sha256",
        "encoder_sha256",
    )
    return {f"{prefix}_{key}": value for key, value in config.items() if key not in data}


def load_classifier(head, args, run, encoder_sha256):
    """Load the linear classifier that was trained on the run's encoder into `head`; returns the settings of its training.

    A supervised run brings its own, classifier.pt beside encoder.pt. Else it is that of <run>/finetune. UserError when there is none.
    """
    folder, made_with = args.source, run
    if run.get("head") != "linear":
        folder = args.source / "finetune"
        way_out = f"--retrain {args.retrain} needs a linear classifier on this encoder: python finetune.py {args.source} --train head --loss ce"
        if not (folder / "classifier.pt").exists():
            raise UserError(f"{folder / 'classifier.pt'}: no such file; {way_out}")
        made_with = read_json(folder / "config.json", way_out)
        wanted = {
            "train": "head",
            "head": "linear",
            "loss": "ce",
            "balanced_batches": False,
            "bn_train": False,
            "encoder_sha256": encoder_sha256,
        }
        other = [
            f"{key} {made_with.get(key)}"
            for key, value in wanted.items()
            if made_with.get(key) != value
        ]
        if other:
            raise UserError(
                f"{folder}: was made with {', '.join(other)}; move it away, since {way_out}"
            )
    load_strict(head, load_tensors(folder / "classifier.pt"), folder / "classifier.pt")
    return {} if made_with is run else settings_of(made_with, "classifier")


def load_network(folder):
    """The finished network of a folder with classifier.pt, and its subset. UserError when the encoder is not found or is another.

    The encoder lies in the same folder or, where it was frozen, in the run's, one above.
    """
    way_out = "give a folder that finetune.py made"
    config = read_json(folder / "config.json", way_out)
    if (
        config.get("head") not in [*HEADS]
        or type(config.get("size")) is not int
        or not 1 <= config["size"] <= 4096
    ):
        raise UserError(
            f"{folder / 'config.json'}: has no head or no size that a classifier could have; {way_out}"
        )
    frozen = not (folder / "encoder.pt").exists()
    _, subset, encoder = load_run(folder.parent if frozen else folder)
    subset.size = config["size"]
    if frozen and module_sha256(encoder) != config.get("encoder_sha256"):
        raise UserError(
            f"{folder}: its encoder is not the one in {folder.parent}; move the folder back into its run"
        )
    head = HEADS[config["head"]](encoder.dim)
    head = LearnableScale(head) if config.get("method") == "lws" else head
    load_strict(head, load_tensors(folder / "classifier.pt"), folder / "classifier.pt")
    return Classifier(encoder, head, frozen=True).eval(), subset


class Classifier(nn.Module):
    """An encoder and a head with two logits. A frozen encoder stays in eval mode: its batch-norm statistics are frozen too."""

    def __init__(self, encoder, head, frozen):
        super().__init__()
        self.encoder, self.head, self.frozen = encoder, head, frozen

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x):  # [B, 3, H, W] -> [B, 2]
        return self.head(self.encoder(x))


class Best:
    """The weights of the epoch with the highest validation score; an earlier epoch wins a tie."""

    def __init__(self, model):
        self.epoch, self.score, self.weights = -1, -1.0, model.state_dict()

    def update(self, model, epoch, score):
        if score > self.score:
            self.epoch, self.score, self.weights = (
                epoch,
                score,
                {k: v.detach().clone() for k, v in model.state_dict().items()},
            )

    def state_dict(self):
        return {"epoch": self.epoch, "score": self.score, "weights": self.weights}

    def load_state_dict(self, state):
        self.epoch, self.score, self.weights = state["epoch"], state["score"], state["weights"]


@torch.no_grad()
def choose_tau(model, best, subset, run, device, args):
    """tau-normalisation (Kang et al. 2020, arXiv:1910.09217): drop the bias, try every tau, keep the best by validation balanced accuracy.

    tau = 0 is the classifier without its bias, tau = 1 has unit rows. With two softmax classes the gradients of cross entropy at w_0 and
    w_1 are exactly opposite, so w_0 + w_1 keeps its initial value (but for weight decay) and the norms differ by the initialisation
    alone: there is little for tau to balance, and what changes the scores is that the bias is gone.
    """
    rows, weight = subset.splits["val"], model.head.weight.clone()
    features = embed(model.encoder, subset, rows, device, args.batch_size).to(device)
    model.head.bias.zero_()
    for i, tau in enumerate(TAUS):
        model.head.weight.copy_(tau_normalized(weight, tau))
        validation = classification_scores(
            model.head(features).double().softmax(1)[:, 1].cpu(),
            subset.labels[rows],
            subset.minority,
        )
        best.update(model, i, validation["balanced_accuracy"])
        run.log(epoch=i, tau=tau, **{f"val_{name}": value for name, value in validation.items()})


def evaluate(model, subset, split, device, args):
    """Scores of one split, from the evaluation view."""
    rows = subset.splits[split]
    logits = embed(model, subset, rows, device, args.batch_size)
    return classification_scores(
        logits.double().softmax(1)[:, 1], subset.labels[rows], subset.minority
    )


if __name__ == "__main__":
    run_main(main)
