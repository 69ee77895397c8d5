"""Supervised training: fine-tune a finished run, or train the supervised baselines from scratch.

    python finetune.py runs/digits/99-1/supmin/seed0                           the whole network, weighted cross entropy
    python finetune.py runs/digits/99-1/supmin/seed0 --train head              a linear head on the frozen encoder
    python finetune.py subsets/digits/99-1.json --loss focal                   ResNet-50 from scratch

Fine-tuning a run writes finetune.json there and its own files in <run>/finetune/; from scratch they all go to
runs/<dataset>/<ratio>/<loss>/seed<k>/, with an encoder.pt that linear_probe.py and evaluate_metrics.py take like any other.
The epoch is chosen by validation AUROC, the test split is read once. The same command continues a run that was stopped.
"""

import math
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import (ArgumentParser, ImageBatches, UserError, at_least, augment, center_view, class_weights, cli,
                    embed, focal_loss, images_to_predict, load_run, load_subset, log_line, normalize, pick_device,
                    precision, predict_folder, provenance, read_json, resnet, resume, rewind_log, save_checkpoint,
                    save_tensors, scores, seeded, shuffled_batches, start_run, state_sha256, warmup_cosine, write_json)

LOSSES = {
    "ce": lambda logits, targets, weights, gamma: F.cross_entropy(logits, targets),
    # divided by the sum of the weights in the batch, as in the reference: a batch of one class alone is not weighted
    "weighted_ce": lambda logits, targets, weights, gamma: F.cross_entropy(logits, targets, weight=weights),
    "focal": lambda logits, targets, weights, gamma: focal_loss(logits, targets, gamma, weights),
}


def parse_args():
    parser = ArgumentParser("Fine-tune a run, or train a supervised baseline from scratch on a subset.",
                            smoke=dict(epochs=2, batch_size=16))
    parser.add_argument("source", type=Path, help="run folder to fine-tune, or subsets/<dataset>/<ratio>.json to train from scratch")
    parser.add_argument("--loss", choices=LOSSES, default="weighted_ce", help="weights are inverse class frequencies of the training rows")
    parser.add_argument("--gamma", type=at_least(0, float), help="of the focal loss (default: 2)")
    parser.add_argument("--train", choices=["all", "head"], default="all", help="head: the encoder stays frozen, in eval mode")
    parser.add_argument("--no-augment", action="store_true", help="train on the evaluation view, as the reference's baseline does")
    parser.add_argument("--arch", help="from scratch: any torchvision ResNet (default: resnet50)")
    parser.add_argument("--size", type=at_least(8), metavar="S", help="side of what the network sees, pixels (default: the run's or subset's)")
    parser.add_argument("--epochs", type=at_least(1), default=100, help="passes over the training images")
    parser.add_argument("--batch-size", type=at_least(2), default=256, help="images")
    parser.add_argument("--lr", type=at_least(0, float), default=1e-4, help="of Adam; cosine without warm-up")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="auto: bf16 where the GPU has it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, order and augmentation; never of the data")
    parser.add_argument("--save-every", type=at_least(1), default=1, metavar="E", help="epochs between checkpoints")
    parser.add_argument("--predict", type=Path, metavar="FOLDER", help="classify the images below this folder, with --csv")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="where --predict writes file, probability, class")
    parser.add_argument("--out", type=Path, help="folder for everything written (default: see above)")
    parser.add_argument("--smoke", action="store_true", help="tiny network, a few images, two epochs of two steps")
    args = parser.parse_args()
    args.new_images = images_to_predict(args.predict, args.csv)
    if not args.source.exists():
        raise UserError(f"{args.source}: no such run folder or subset file; pretrain.py makes runs, make_subsets.py subsets")
    if args.arch and args.source.is_dir():
        raise UserError(f"--arch {args.arch}: is for training from scratch; {args.source} has its network")
    if args.train == "head" and not args.source.is_dir():
        raise UserError(f"--train head: needs a run folder with a trained encoder, {args.source} is none")
    if args.gamma is not None and args.loss != "focal":
        raise UserError(f"--gamma: is read by --loss focal only, not by {args.loss}")
    args.gamma = 2.0 if args.gamma is None else args.gamma
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    amp, autocast, scaler = precision(device, args.amp)

    # what is trained: a finished run's encoder, or a new network on a subset; and where it is written
    torch.manual_seed(args.seed)
    options = dict(loss=args.loss, **({"gamma": args.gamma} if args.loss == "focal" else {}), train=args.train, augment=not args.no_augment)
    if args.source.is_dir():
        run, subset, encoder = load_run(args.source)
        arch, out, summary = run["arch"], args.out or args.source / "finetune", (args.out or args.source) / "finetune.json"
        options["encoder_sha256"] = state_sha256(encoder)
    else:
        arch = args.arch or ("resnet18" if args.smoke else "resnet50")
        subset, encoder = load_subset(args.source), resnet(arch)
        out = args.out or Path("runs", subset.name, subset.ratio, args.loss, f"seed{args.seed}")
        summary, options = out / "finetune.json", {"method": args.loss, **options}
    subset.size = args.size or subset.size
    model = Classifier(encoder.requires_grad_(args.train == "all"), frozen=args.train == "head").to(device)
    frozen = state_sha256(model.encoder)
    rows = subset.shrink().splits["train"] if args.smoke else subset.splits["train"]
    if args.batch_size > len(rows):
        raise UserError(f"--batch-size {args.batch_size}: {subset.path} has only {len(rows)} training images; use --batch-size {len(rows)} or less")
    config = dict(**options, dataset=subset.name, ratio=subset.ratio, arch=arch, size=subset.size, epochs=args.epochs, batch_size=args.batch_size,
                  lr=args.lr, seed=args.seed, amp=amp, smoke=args.smoke, classes=subset.classes, minority=subset.minority,
                  subset=os.path.relpath(subset.path, out), sha256=subset.sha256, rows_sha256=subset.rows_sha256)

    # a new run, or the same one from its last checkpoint; `best` holds the weights of the best epoch so far
    start_run(out, config, device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    best = Best(model)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "best": best}
    epoch = resume(out, parts, config)
    rewind_log(out, epoch)

    train = ImageBatches(subset.images, rows, device)
    steps = min(len(rows) // args.batch_size, 2 if args.smoke else math.inf)
    with tqdm(total=args.epochs * steps, initial=epoch * steps, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(epoch, args.epochs):
            stats = train_one_epoch(epoch, steps, model, optimizer, scaler, autocast, train, subset, args, bar)
            if not math.isfinite(stats["loss"]):
                raise UserError(f"{out}: the loss is not finite in epoch {epoch + 1}; the last checkpoint is kept; try a lower --lr or --amp off")
            validation = evaluate(model, subset, "val", device, args)
            best.update(model, epoch, validation["auroc"])
            log_line(out, epoch=epoch, **stats, **{f"val_{name}": value for name, value in validation.items()})
            bar.set_postfix(loss=f"{stats['loss']:.3f}", auroc=f"{validation['auroc']:.3f}", refresh=False)
            if epoch + 1 == args.epochs or (epoch + 1) % args.save_every == 0:
                save_checkpoint(out, parts, epoch + 1, config)

    # the epoch that validation chose, on the test split
    model.load_state_dict(best.weights)
    if args.train == "head" and state_sha256(model.encoder) != frozen:
        raise RuntimeError("fine-tuning the head changed the encoder it was to leave frozen")
    settings = {**options, **{key: config[key] for key in ("epochs", "batch_size", "lr", "seed", "size", "smoke", "classes", "minority")}}
    old = read_json(summary, "delete it") if summary.exists() else {}
    if any(old.get(key) != value for key, value in settings.items()):
        if not args.source.is_dir():
            save_tensors(out / "encoder.pt", model.encoder.state_dict())
        result = {split: evaluate(model, subset, split, device, args) for split in ("val", "test")}
        write_json(summary, {**result, **settings, "best_epoch": best.epoch + 1, "provenance": provenance(device)})
        print(f"test, epoch {best.epoch + 1} of {args.epochs}: " + "  ".join(f"{name} {100 * value:.1f} %" for name, value in result["test"].items()))
        print(f"wrote {summary}\nnext: python report.py runs")
    else:
        print(f"finished already: {summary}")
    if args.predict:
        predict_folder(model, subset, args.predict, args.new_images, args.csv, device)


class Classifier(nn.Module):
    """An encoder and a linear head with two logits. A frozen encoder stays in eval mode: its batch-norm statistics are frozen too."""

    def __init__(self, encoder, frozen):
        super().__init__()
        self.encoder, self.head, self.frozen = encoder, nn.Linear(encoder.dim, 2), frozen

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x):                                        # [B, 3, H, W] -> [B, 2]
        return self.head(self.encoder(x))


class Best:
    """The weights of the epoch with the highest validation AUROC; an earlier epoch wins a tie."""

    def __init__(self, model):
        self.epoch, self.auroc, self.weights = -1, -1.0, model.state_dict()

    def update(self, model, epoch, auroc):
        if auroc > self.auroc:
            self.epoch, self.auroc, self.weights = epoch, auroc, {k: v.detach().clone() for k, v in model.state_dict().items()}

    def state_dict(self):
        return {"epoch": self.epoch, "auroc": self.auroc, "weights": self.weights}

    def load_state_dict(self, state):
        self.epoch, self.auroc, self.weights = state["epoch"], state["auroc"], state["weights"]


def train_one_epoch(epoch, steps, model, optimizer, scaler, autocast, train, subset, args, bar):
    """One pass in full batches, one view of each image."""
    generator = seeded(args.seed, epoch)
    lr = warmup_cosine(epoch, args.epochs, args.lr, warmup_epochs=0)
    optimizer.param_groups[0]["lr"] = lr
    weights = class_weights(subset.train_counts()).to(train.device)
    total = torch.zeros((), device=train.device)
    model.train()
    for positions, images in train(shuffled_batches(len(train.rows), args.batch_size, generator)[:steps]):
        batch = train.rows[positions]
        sizes = torch.from_numpy(subset.sizes[batch])
        labels = torch.from_numpy(subset.labels[batch]).to(train.device, non_blocking=True)
        view = center_view(images, sizes, subset.size) if args.no_augment else augment(images, sizes, subset.recipe, subset.size, generator)
        with autocast:
            logits = model(normalize(view, subset.mean, subset.std))
        loss = LOSSES[args.loss](logits.float(), labels, weights, args.gamma)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
        bar.update()
    return {"loss": (total / steps).item(), "lr": lr}


def evaluate(model, subset, split, device, args):
    """Scores of one split, from the evaluation view."""
    rows = subset.splits[split]
    logits = embed(model, subset, rows, device, args.batch_size)
    return scores(logits.double().softmax(1)[:, 1], subset.labels[rows], subset.minority)


if __name__ == "__main__":
    cli(main)
