"""Contrastive pre-training of a ResNet on one subset.

    python pretrain.py subsets/digits/99-1.json --method supmin                  the paper's recipe: ResNet-50, 100 epochs
    python pretrain.py subsets/digits/99-1.json --method suppro --margin 0.5     pull to the prototypes until cosine 0.25
    python pretrain.py subsets/digits/99-1.json --method supcon --smoke          two tiny epochs, to see it run
    torchrun --nproc-per-node 4 pretrain.py subsets/digits/99-1.json             the same run on four GPUs

Writes runs/<dataset>/<ratio>/<method>/seed<k>/: config.json, log.jsonl, checkpoint.pt, encoder.pt (torchvision ResNet keys) and
curves.png. The same command continues a run that was stopped, and returns at once when it is finished.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines import BCL, KCL, SBCL, TSC, PaCo
from common import (
    ContrastiveModel,
    Epoch,
    ImageReader,
    Method,
    antipodal_prototypes,
    augment,
    draw_supervised_majority,
    embed,
    guarantee_minority,
    load_subset,
    log_line,
    make_generator,
    normalize,
    ntxent_loss,
    pick_device,
    precision,
    resume,
    rewind_log,
    save_checkpoint,
    save_tensors,
    shuffled_batches,
    start_run,
    supcon_loss,
    supmin_loss,
    suppro_loss,
    warmup_cosine,
)
from evaluate_metrics import class_alignment_consistency, sample_alignment_accuracy
from utils.cli import ArgumentParser, Stop, Stopped, UserError, number_from, run_main
from utils.distributed import (
    assert_same_on_all_ranks,
    broadcast_buffers,
    convert_sync_batchnorm,
    local_slice,
    on_rank_zero,
    rank,
    torchrun_main,
    world_size,
)
from utils.files import atomic_write, read_log

OPTIONS = {  # of each method: the flags that it reads, and their defaults
    "ntxent": {},
    "supcon": {},
    "supmin": {"majority_supervision": 0.0},
    "suppro": {"margin": 1.0},
    "kcl": {"k": 3, "queue": 0},
    "tsc": {"variant": "ttc", "k": 3, "queue": 0},
    "sbcl": {"variant": "code", "recluster_every": 10},
    "bcl": {"variant": "layernorm", "randaugment": False},
    "paco": {"variant": "paco", "alpha": None, "queue": 1024, "randaugment": False},
}
VARIANTS = {
    "tsc": ("ttc", "paper", "code"),
    "sbcl": ("code", "paper"),
    "bcl": ("layernorm", "batchnorm"),
    "paco": ("paco", "gpaco"),
}


def parse_args(words=None):
    parser = ArgumentParser(
        "Contrastive pre-training on one subset. Defaults are the paper's recipe.",
        smoke=dict(arch="resnet18", epochs=2, batch_size=16, watch_every=1),
    )
    parser.add_argument(
        "subset", type=Path, help="subsets/<dataset>/<ratio>.json, from make_subsets.py"
    )
    parser.add_argument("--method", choices=OPTIONS, default="supmin", help="what is contrasted")
    parser.add_argument(
        "--majority-supervision",
        type=number_from(0, float),
        metavar="R",
        help="supmin: share of majority images supervised too, 0 to 1 (default: 0)",
    )
    parser.add_argument(
        "--margin",
        type=number_from(0, float),
        metavar="M",
        help="suppro: prototypes pull until cosine M/2 (default: 1)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="which form of it (default: the first): "
        + "; ".join(f"{name}: {', '.join(variants)}" for name, variants in VARIANTS.items()),
    )
    parser.add_argument(
        "--k",
        type=number_from(0),
        help="kcl, tsc: positives drawn per anchor (default: 3; as published 6)",
    )
    parser.add_argument(
        "--queue",
        type=number_from(0),
        metavar="K",
        help="kcl, tsc, paco: keys kept to compare with (default: 0, in batch; paco: 1024)",
    )
    parser.add_argument(
        "--alpha",
        type=number_from(0, float),
        metavar="A",
        help="paco: weight of a same-class row (default: 0.4 / their number)",
    )
    parser.add_argument(
        "--recluster-every",
        type=number_from(1),
        metavar="E",
        help="sbcl: epochs between clusterings (default: 10)",
    )
    parser.add_argument(
        "--randaugment",
        action="store_const",
        const=True,
        help="bcl: RandAugment on the classifier's view; paco: on the first",
    )
    parser.add_argument(
        "--size",
        type=number_from(8),
        metavar="S",
        help="side of what the network sees, pixels (default: the subset's)",
    )
    parser.add_argument(
        "--temperature",
        type=number_from(1e-3, float),
        help="of the similarities (default: 0.07; paco: 0.2)",
    )
    parser.add_argument(
        "--arch",
        default="resnet50",
        help="resnet8 to resnet56 (CIFAR ResNets) or any torchvision ResNet",
    )
    parser.add_argument(
        "--epochs", type=number_from(1), default=100, help="passes over the training images"
    )
    parser.add_argument(
        "--batch-size",
        type=number_from(2),
        default=256,
        help="images; each gives two views (bcl: three)",
    )
    parser.add_argument(
        "--chunk",
        type=number_from(2),
        metavar="IMAGES",
        help="of the batch in the network at a time: the loss sees all, memory and batch norm so many",
    )
    parser.add_argument(
        "--minority-per-batch",
        type=number_from(1),
        metavar="K",
        help="at least K minority images in a batch (default: as they come)",
    )
    parser.add_argument(
        "--lr", type=number_from(0, float), default=0.0625, help="of SGD, reached after the warm-up"
    )
    parser.add_argument(
        "--warmup-epochs", type=number_from(0), default=10, help="linear warm-up, then cosine"
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
        default=0,
        help="of weights, order and augmentation; never of the data",
    )
    parser.add_argument(
        "--watch-every",
        type=number_from(0),
        default=5,
        metavar="E",
        help="epochs between looks at the embedding; 0: never",
    )
    parser.add_argument(
        "--save-every",
        type=number_from(1),
        default=1,
        metavar="E",
        help="epochs between checkpoints",
    )
    parser.add_argument(
        "--out", type=Path, help="run folder (default: runs/<dataset>/<ratio>/<method>/seed<k>)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny network, a few images, two epochs of two steps"
    )
    args = parser.parse_args(words)
    settle_options(args)
    return args


def settle_options(args):
    """Give every option of the method that was not typed its default. UserError for an option that the method does not read."""
    options, variants = OPTIONS[args.method], VARIANTS.get(args.method, ())
    readers = {
        option: [name for name in OPTIONS if option in OPTIONS[name]]
        for each in OPTIONS.values()
        for option in each
    }
    args.temperature = args.temperature or {"paco": 0.2}.get(args.method, 0.07)
    for option in readers:
        if getattr(args, option) is None:
            setattr(args, option, options.get(option))
        elif option not in options:
            names = " or ".join(", ".join(readers[option]).rsplit(", ", 1))
            raise UserError(
                f"--{option.replace('_', '-')}: is read by --method {names} only, not by {args.method}"
            )
    if args.variant not in variants and args.variant is not None:
        raise UserError(
            f"--variant {args.variant}: --method {args.method} has {', '.join(variants)}"
        )
    if args.method == "supmin" and args.majority_supervision > 1:
        raise UserError(
            f"--majority-supervision {args.majority_supervision}: must lie between 0 and 1"
        )


MOMENTUM, WEIGHT_DECAY, PROJECTION_DIM = 0.9, 1e-4, 128  # the reference's; decay on all parameters
WATCHED = 2000  # validation images that the watch looks at, at most
COLLAPSED = dict(
    gap=0.1, saa=5.0
)  # loss this near log(V*N - 1) (nats) and SAA below this (percent)


# the paper's methods: a pure loss from losses.py, its state (buffers go into the checkpoint); the others are in baselines.py --


class NTXent(Method):
    def loss(self, z, labels, generator):  # z [N, V, D], labels [N], generator of the epoch
        return ntxent_loss(z, self.temperature)


class SupCon(Method):
    def loss(self, z, labels, generator):
        return supcon_loss(z, labels, self.temperature)


class SupMin(Method):
    def __init__(self, args, subset, model, generator):
        super().__init__(args, subset, model, generator)
        self.minority, self.ratio = subset.minority, args.majority_supervision

    def loss(self, z, labels, generator):
        drawn = (
            draw_supervised_majority(labels, self.minority, self.ratio, generator)
            if self.ratio
            else None
        )
        return supmin_loss(z, labels, self.minority, self.temperature, drawn)


class SupPro(Method):
    def __init__(self, args, subset, model, generator):
        super().__init__(args, subset, model, generator)
        self.margin = args.margin
        self.register_buffer("prototypes", antipodal_prototypes(model.dim, generator))

    def loss(self, z, labels, generator):
        return suppro_loss(z, labels, self.prototypes, self.temperature, self.margin)

    def collapse_value(self, images):
        return None  # a prototype among the positives moves it


METHODS = {
    "ntxent": NTXent,
    "supcon": SupCon,
    "supmin": SupMin,
    "suppro": SupPro,
    "kcl": KCL,
    "tsc": TSC,
    "sbcl": SBCL,
    "bcl": BCL,
    "paco": PaCo,
}


@torchrun_main
def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    subset = load_subset(args.subset)
    subset.size = args.size or subset.size
    out = args.out or Path("runs", subset.name, subset.ratio, args.method, f"seed{args.seed}")
    amp, autocast, scaler = precision(device, args.amp, subset.size)
    rows = subset.limit_for_smoke().splits["train"] if args.smoke else subset.splits["train"]
    if args.batch_size > len(rows):
        raise UserError(
            f"--batch-size {args.batch_size}: {subset.path} has only {len(rows)} training images; use --batch-size {len(rows)} or less"
        )
    if args.batch_size % world_size():
        raise UserError(
            f"--batch-size {args.batch_size}: is shared by {world_size()} processes; use a multiple of {world_size()}"
        )
    if args.chunk and (
        args.batch_size % min(args.chunk, args.batch_size) or args.chunk % world_size()
    ):
        raise UserError(
            f"--chunk {args.chunk}: has to divide --batch-size {args.batch_size}"
            + (
                f" and to be a multiple of {world_size()}, the number of processes"
                if world_size() > 1
                else ""
            )
        )
    if args.minority_per_batch and args.method in ("bcl", "paco"):
        raise UserError(
            f"--minority-per-batch: {args.method} corrects for the classes' shares as they are; leave it out"
        )
    most = min(args.batch_size, int((subset.labels[rows] == subset.minority).sum()))
    if (args.minority_per_batch or 0) > most:
        raise UserError(
            f"--minority-per-batch {args.minority_per_batch}: is more than a batch or the training images can hold; use {most} or less"
        )
    if args.watch_every and len(subset.splits["val"]) < 10:
        raise UserError(
            f"{subset.path}: has only {len(subset.splits['val'])} validation images, too few to watch; use --watch-every 0"
        )

    config = dict(
        method=args.method,
        **{option: getattr(args, option) for option in OPTIONS[args.method]},
        dataset=subset.name,
        ratio=subset.ratio,
        arch=args.arch,
        projection_dim=PROJECTION_DIM,
        size=subset.size,
        epochs=args.epochs,
        batch_size=args.batch_size,
        **{key: value for key in ("chunk", "minority_per_batch") if (value := getattr(args, key))},
        lr=args.lr,
        warmup_epochs=args.warmup_epochs,
        temperature=args.temperature,
        seed=args.seed,
        amp=amp,
        smoke=args.smoke,
        classes=subset.classes,
        minority=subset.minority,
        subset=os.path.relpath(subset.path, out),
        sha256=subset.sha256,
        rows_sha256=subset.rows_sha256,
    )

    # network, method, optimizer
    torch.manual_seed(args.seed)
    model = convert_sync_batchnorm(
        ContrastiveModel(args.arch, PROJECTION_DIM, args.chunk).to(device)
    )
    method = METHODS[args.method](args, subset, model, make_generator(args.seed)).to(device)
    learned = [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    # a new run, or the same one from its last checkpoint
    on_rank_zero(start_run, out, config, device)
    parts = {"model": model, "method": method, "optimizer": optimizer, "scaler": scaler}
    epoch, within = resume(out, parts, config)
    assert_same_on_all_ranks(
        (device.type, config, epoch, within and within["step"]),
        f"{out}: not all processes see this folder as it is, or the same command; use a disk that they share",
    )
    if epoch == args.epochs and (out / "encoder.pt").exists():
        print(f"finished already: {out / 'encoder.pt'}")
        return
    on_rank_zero(rewind_log, out, epoch)
    describe_batches(subset, args.batch_size, method, args.minority_per_batch)
    if args.warmup_epochs > args.epochs:
        print(
            f"  the warm-up ({args.warmup_epochs} epochs) outlasts the run, which never reaches its learning rate; --warmup-epochs shortens it"
        )

    # training
    train = ImageReader(subset.images, rows, device)
    steps = min(len(rows) // args.batch_size, 2 if args.smoke else math.inf)
    with (
        tqdm(
            total=args.epochs * steps,
            initial=epoch * steps,
            unit="step",
            dynamic_ncols=True,
            disable=rank() > 0,
        ) as bar,
        Stop(within) as stop,
    ):
        for epoch in range(epoch, args.epochs):
            try:
                stats = train_one_epoch(
                    epoch,
                    steps,
                    model,
                    method,
                    optimizer,
                    scaler,
                    autocast,
                    train,
                    subset,
                    args,
                    out,
                    bar,
                    stop,
                )
            except Stopped as stopped:
                if stopped.within:
                    on_rank_zero(save_checkpoint, out, parts, epoch, config, stopped.within)
                raise
            if rank() > 0:
                continue
            last = epoch + 1 == args.epochs
            if args.watch_every and ((epoch + 1) % args.watch_every == 0 or last):
                stats.update(watch(model, subset, device, args))
                # a network that has hardly been trained sends all images to nearly one point, too
                stats["collapsed"] = (
                    epoch >= max(4, min(args.warmup_epochs, args.epochs // 2))
                    and not args.smoke
                    and has_collapsed(stats)
                )
                tqdm.write(progress_line(epoch, stats, args, subset, method))
            log_line(out, epoch=epoch, **stats, **method.facts)
            if last or (epoch + 1) % args.save_every == 0:
                save_checkpoint(out, parts, epoch + 1, config)

    if rank() > 0:
        return
    draw_curves(out, method.collapse_value(args.batch_size))
    save_tensors(
        out / "encoder.pt", model.encoder.state_dict()
    )  # last: it says that the run is finished
    print(
        f"wrote {out / 'encoder.pt'} and {out / 'curves.png'}\nnext: python linear_probe.py {out}"
    )


def train_one_epoch(
    epoch, steps, model, method, optimizer, scaler, autocast, train, subset, args, folder, bar, stop
):
    """One pass in full batches, or the rest of one that was stopped."""

    def draw(generator):
        batches = shuffled_batches(len(train.rows), args.batch_size, generator)[:steps]
        is_minority = subset.labels[train.rows] == subset.minority
        return (
            guarantee_minority(batches, is_minority, args.minority_per_batch, generator)
            if args.minority_per_batch
            else batches
        )

    progress = Epoch(epoch, args.seed, draw, train.device, stop)
    method.start_epoch(epoch, model, bool(progress.resumed))
    broadcast_buffers(method)
    first, end = method.phase(epoch, args.epochs)
    if epoch == first and not progress.resumed:
        optimizer.state.clear()  # no momentum of the phase before
    lr = warmup_cosine(epoch - first, end - first, args.lr, 0 if first else args.warmup_epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    bar.update(progress.done)
    for positions, images in train(progress.batches[progress.done :], local_slice()):
        batch = train.rows[positions]
        sizes = torch.from_numpy(subset.sizes[batch])
        labels = torch.from_numpy(subset.labels[batch]).to(train.device, non_blocking=True)
        views = [
            augment(
                images,
                sizes,
                subset.recipe,
                subset.size,
                progress.generator,
                view in method.strong,
                local_slice(),
            )
            for view in range(method.views)
        ]
        x = normalize(torch.cat(views), subset.mean, subset.std).unflatten(
            0, (method.views, -1)
        )  # [V, n, 3, H, W]
        with autocast:
            loss = method(
                model,
                x,
                labels,
                torch.from_numpy(positions).to(train.device, non_blocking=True),
                progress.generator,
            )
        progress.step(loss, optimizer, scaler)
        bar.update()
    loss, seconds = progress.loss(optimizer, train, folder), progress.seconds()
    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    collapsed = method.collapse_value(args.batch_size)
    return {
        "loss": loss,
        "collapse_gap": None if collapsed is None else collapsed - loss,
        "lr": lr,
        "seconds": round(seconds, 3),
        "images_per_s": round(steps * args.batch_size / seconds, 1),
        **({"skipped_steps": progress.skipped} if scaler.is_enabled() else {}),
    }


# the watch: is the representation collapsing? -------------------------------------------------------------------------


def watch(model, subset, device, args):
    """SAA, CAC and leave-one-out 5-NN balanced accuracy of the validation images' projections, in percent; detached, seeded."""
    rows = subset.splits["val"]
    if len(rows) > WATCHED:
        rows = np.sort(np.random.default_rng(0).choice(rows, WATCHED, replace=False))
    z = embed(
        model,
        subset,
        rows,
        device,
        args.chunk or args.batch_size,
        views=2,
        generator=make_generator(0),
    )  # the same views at every look
    labels = torch.from_numpy(subset.labels[rows])
    return {
        "val_saa": [round(v, 3) for v in sample_alignment_accuracy(z, labels).tolist()],
        "val_cac": [round(v, 3) for v in class_alignment_consistency(z, labels).tolist()],
        "val_knn": round(knn_balanced_accuracy(z[0], labels), 3),
    }


def has_collapsed(stats):
    """The loss sits on its collapse value, if it has one, and views do not find each other."""
    return bool(
        stats["collapse_gap"] is not None
        and abs(stats["collapse_gap"]) < COLLAPSED["gap"]
        and np.mean(stats["val_saa"]) < COLLAPSED["saa"]
    )


def knn_balanced_accuracy(z, labels, k=5):
    """Balanced accuracy (percent) of each row's vote among its k most similar other rows. z [n, D] unit vectors; labels [n]."""
    nearest = (z @ z.T).fill_diagonal_(-2).topk(min(k, len(z) - 1), dim=1).indices  # [n, k]
    right = (labels[nearest].float().mean(1) > 0.5).long() == labels
    return 100 * np.mean([right[labels == c].float().mean().item() for c in (0, 1)])


def describe_batches(subset, batch_size, method, at_least=None):
    """Say how many minority images a batch holds, and how often none (drawn without replacement), and what a collapse would look like."""
    minority, total = subset.train_counts()[subset.minority], sum(subset.train_counts())

    def log_choose(n, k):
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    none = (
        math.exp(log_choose(total - minority, batch_size) - log_choose(total, batch_size))
        if batch_size <= total - minority
        else 0.0
    )
    print(
        f"  {minority} of {total} training images are '{subset.classes[subset.minority]}' (minority): {batch_size * minority / total:.2f} "
        f"expected per batch of {batch_size}, none in {none:.1%} of the batches"
        + (f"; filled up to {at_least} in each" if at_least else "")
    )
    collapsed = method.collapse_value(batch_size)
    print(
        "  this loss has no fixed collapse value: watch SAA and CAC"
        if collapsed is None
        else f"  collapse value of the loss: log({math.exp(collapsed):.0f}) = {collapsed:.3f}"
    )
    if method.facts:
        print("  " + facts_text(method))


def progress_line(epoch, stats, args, subset, method):
    order = [subset.minority, 1 - subset.minority]
    saa, cac = ("/".join(f"{stats[key][c]:.1f}" for c in order) for key in ("val_saa", "val_cac"))
    collapsed = method.collapse_value(args.batch_size)
    line = (
        f"epoch {epoch + 1}/{args.epochs}  loss {stats['loss']:.3f}{'' if collapsed is None else f' (collapse {collapsed:.3f})'}  "
        f"lr {stats['lr']:.4f}  minority/majority: SAA {saa} %  CAC {cac} %  kNN {stats['val_knn']:.1f} %  {stats['images_per_s']:.0f} images/s"
    )
    if torch.cuda.is_available():
        line += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    if method.facts:
        line += "  " + facts_text(method)
    if stats["collapsed"]:
        line += "\n  WARNING: the representation has collapsed: the loss sits on its collapse value and views no longer find each other"
    return line


def facts_text(method):
    values = {
        name: f"{v[0]} / {v[1]} (class 0 / 1)" if isinstance(v, list) else v
        for name, v in method.facts.items()
    }
    return "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


# the picture ------------------------------------------------------------------------------------------------------------


def draw_curves(out, collapsed):
    """curves.png: the loss against its collapse value (or None), and what the watch saw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: curves.png is not drawn")
        return
    log = [line for line in read_log(out) if "epoch" in line]
    looks = [line for line in log if "val_saa" in line]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [line["epoch"] + 1 for line in log],
        [line["loss"] for line in log],
        color="black",
        label="loss",
    )
    if collapsed is not None:
        left.axhline(collapsed, color="gray", linestyle="--", label="all embeddings equal")
    left.set(xlabel="epoch", ylabel="loss (nats)", title=str(out))
    for key, style, name in (
        ("val_saa", "-o", "SAA"),
        ("val_cac", "--s", "CAC"),
        ("val_knn", ":^", "kNN"),
    ):
        right.plot(
            [line["epoch"] + 1 for line in looks],
            [np.mean(line[key]) for line in looks],
            style,
            markersize=4,
            label=name,
        )
    right.set(xlabel="epoch", ylabel="validation, mean of the classes (%)", ylim=(0, 102))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    with atomic_write(out / "curves.png") as part:
        figure.savefig(part, dpi=120)


if __name__ == "__main__":
    run_main(main)
