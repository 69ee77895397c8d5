"""Contrastive pre-training of an encoder on one subset.

    python pretrain.py subsets/digits/99-1.json --method supmin                  published defaults
    python pretrain.py subsets/digits/99-1.json --method suppro --margin 0.5     another threshold
    python pretrain.py subsets/digits/99-1.json --method supcon --smoke          two tiny epochs
    torchrun --nproc-per-node 4 pretrain.py subsets/digits/99-1.json             on four GPUs

Writes runs/<dataset>/<ratio>/<method>/seed<k>/: config.json, log.jsonl, checkpoint.pt, encoder.pt
and curves.png. The same command continues a stopped run and returns at once for a finished one.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from baselines import BCL, KCL, SBCL, TSC, PaCo
from common import (
    RECIPES,
    Amp,
    ContrastiveModel,
    Method,
    Training,
    draw_supervised_majority,
    embed,
    load_subset,
    ntxent_loss,
    simplex_prototypes,
    supcon_loss,
    supmin_loss,
    suppro_loss,
    train_one_epoch,
    warmup_cosine,
)
from datasets.loader import (
    BatchLoader,
    check_batch_size,
    guarantee_minority,
    shuffled_batches,
)
from evaluate_metrics import class_alignment_consistency, sample_alignment_accuracy
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main
from utils.distributed import (
    broadcast_buffers,
    convert_sync_batchnorm,
    pick_device,
    rank,
    torchrun_main,
    world_size,
)
from utils.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STEMS,
    compile_training,
    feature_map_side,
    load_init,
    resolve_stem,
)
from utils.files import atomic_write, read_log
from utils.runs import Run, add_machine_flags, make_generator, save_tensors

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # as the published code; decay on all parameters
PROJECTION_DIM = 128
MONITORED_IMAGES = 2000  # most validation images that the collapse monitor embeds
COLLAPSE_GAP = 0.01  # nats between the loss and its collapse value
COLLAPSE_CAC = 5.0  # percent above chance, mean of the classes
SETTLED_STEPS = 100  # fewer leave initial values in the running statistics of batch norm


class NTXent(Method):
    def loss(self, z, labels, generator):  # z [N, V, D], labels [N]
        return ntxent_loss(z, self.temperature)


class SupCon(Method):
    def loss(self, z, labels, generator):
        return supcon_loss(z, labels, self.temperature)


class SupMin(Method):
    def __init__(self, model, subset, training, majority_supervision):
        super().__init__(model, subset, training)
        self.minority, self.ratio = subset.tail, majority_supervision
        # The same labels, on the device of the loss.
        self.register_buffer("tail", torch.tensor(subset.tail), persistent=False)

    def forward(self, model, batch):
        z, drawn = model(batch.x).transpose(0, 1), None
        if self.ratio:
            arguments = batch.cpu_labels, self.minority, self.ratio, batch.generator
            drawn = draw_supervised_majority(*arguments).to(z.device, non_blocking=True)
        return supmin_loss(z, batch.labels, self.tail, self.temperature, drawn)


class SupPro(Method):
    def __init__(self, model, subset, training, margin):
        super().__init__(model, subset, training)
        self.margin = margin
        prototypes = simplex_prototypes(len(subset.classes), model.dim, training.generator)
        self.register_buffer("prototypes", prototypes)

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
# The flags that each method reads, and their defaults.
OPTIONS = {
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


@torchrun_main
def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    subset, rows = load_training_data(args)
    check_args(args, subset, rows)
    amp = Amp(device, args.amp, subset.size)
    out = args.out or default_folder(args, subset)

    # ResNet -> projection head -> unit sphere; the method adds prototypes, queues, ...
    torch.manual_seed(args.seed)
    model = ContrastiveModel(args.arch, PROJECTION_DIM, args.chunk, args.stem, args.relu)
    if args.init is not None:
        args.init_sha256 = load_init(model.encoder, args.arch, args.init, subset.classes)
    model = convert_sync_batchnorm(model.to(device))
    method = build_method(args, model, subset).to(device)
    optimizer = build_optimizer(args, model, method)

    state = dict(model=model, method=method, optimizer=optimizer, scaler=amp.scaler)
    run = Run(out, make_config(args, subset, amp, out), device, args.save_every, **state)
    first_epoch = run.resume()
    if first_epoch == args.epochs and (out / "encoder.pt").exists():
        print(f"finished already: {out / 'encoder.pt'}")
        return
    print_plan(args, subset, method, len(rows) // args.batch_size)

    sampler = make_sampler(args, subset, rows)
    loader = BatchLoader(subset, rows, device, sampler, method.views, method.randaugment_views)
    if args.compile:
        compile_training(model.encoder)
    with run:
        for epoch in range(first_epoch, args.epochs):
            start_epoch(epoch, args, model, method, optimizer)
            batches = loader.epoch(epoch, args.seed)
            stats = train_one_epoch(partial(method, model), batches, optimizer, amp, out)
            stats |= monitor_collapse(epoch, stats, args, model, method, subset, device)
            run.finish_epoch(epoch, {**stats, **method.log_fields})

    if rank() == 0:
        plot_curves(out, method.collapse_value(args.batch_size))
        # Written last: encoder.pt marks the run as finished.
        save_tensors(out / "encoder.pt", model.encoder.state_dict())
        print(f"wrote {out / 'encoder.pt'}, curves.png")
        print_next("linear_probe.py", out, smoke=args.smoke)


# --------------------------------------------------------------------------------------------------
# flags and their checks
# --------------------------------------------------------------------------------------------------


def parse_args(words=None):
    parser = ArgumentParser(
        "Contrastive pre-training on one subset. Defaults are those of the published code.",
        smoke=dict(arch="resnet18", epochs=2, batch_size=16, watch_every=1),
        example="python pretrain.py subsets/digits/99-1.json --method supmin",
    )
    positive, number = number_from(1), number_from(0, float)
    add = parser.add_argument_group("data").add_argument
    add("subset", type=Path, help="subsets/<dataset>/<ratio>.json, from make_subsets.py")
    side = number_from(8, high=4096)
    add("--size", type=side, metavar="S", help="input side, px (default: the subset's)")
    recipe = f"augmentation: {', '.join(RECIPES)} (default: the subset's)"
    add("--recipe", choices=RECIPES, metavar="NAME", help=recipe)
    add("--no-flip", action="store_true", help="never flip images left-right")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="supmin", help="contrastive loss")
    add("--temperature", type=number_from(1e-3, float), help="T (default: 0.07; paco: 0.2)")
    text = "put at least K minority images into every batch"
    add("--minority-per-batch", type=positive, metavar="K", help=text)
    add("--relu", action="store_true", help="end the projection head with a ReLU")
    text = "supmin: share of majority images supervised too (default: 0)"
    add("--majority-supervision", type=number, metavar="R", help=text)
    add("--margin", type=number, metavar="M", help="suppro: attract until cosine M/2 (default: 1)")
    forms = "; ".join(f"{name}: {', '.join(forms)}" for name, forms in VARIANTS.items())
    add("--variant", metavar="NAME", help=f"form of the method (default: the first): {forms}")
    add("--k", type=number_from(0), help="kcl, tsc: positives per anchor (default: 3)")
    text = "kcl, tsc, paco: keys in the queue (default: 0, none; paco: 1024)"
    add("--queue", type=number_from(0), metavar="K", help=text)
    add("--alpha", type=number, metavar="A", help="paco: weight of a positive (default: 0.4/count)")
    text = "sbcl: epochs between clusterings (default: 10)"
    add("--recluster-every", type=positive, metavar="E", help=text)
    text = "bcl, paco: RandAugment on one view"
    add("--randaugment", action="store_const", const=True, help=text)

    add = parser.add_argument_group("training").add_argument
    add("--arch", default="resnet50", help="resnet8 to resnet56, or any torchvision ResNet")
    add("--stem", choices=STEMS, default="auto", help="cifar: 3x3, no pooling (auto: up to 32 px)")
    add("--init", metavar="WHERE", help="start from a run folder, a file of weights, or imagenet")
    add("--epochs", type=positive, default=100, help="as published; the paper's supplement: 350")
    add("--batch-size", type=number_from(2), default=256, help="images; each gives two views")
    add("--lr", type=number, default=0.0625, help="of SGD after the warm-up; 0: untrained floor")
    add("--warmup-epochs", type=number_from(0), default=10, help="linear warm-up, then cosine")
    add("--seed", type=number_from(0), default=0, help="of weights, order and augmentation")

    add = parser.add_argument_group("machine").add_argument
    text = "images per forward pass, to save memory; the loss still uses the whole batch"
    add("--chunk", type=number_from(2), metavar="IMAGES", help=text)
    add_machine_flags(add)

    add = parser.add_argument_group("output").add_argument
    text = "run folder (default: runs/<dataset>/<ratio>/<method>/seed<k>)"
    add("--out", type=Path, help=text)
    add("--watch-every", type=number_from(0), default=5, metavar="E", help="epochs between checks")
    add("--smoke", action="store_true", help="tiny network, few images, two epochs of two steps")
    args = parser.parse_args(words)
    resolve_method_options(args)
    return args


def resolve_method_options(args):
    """Give the method's options their defaults. Raises UserError for another method's option."""
    options = OPTIONS[args.method]
    args.temperature = args.temperature or default_temperature(args.method)
    for option in dict.fromkeys(name for defaults in OPTIONS.values() for name in defaults):
        if getattr(args, option) is None:
            setattr(args, option, options.get(option))
        elif option not in options:
            flag = f"--{option.replace('_', '-')}"
            readers = ", ".join(name for name in OPTIONS if option in OPTIONS[name])
            raise UserError(f"{flag}: only --method {readers} reads it, not {args.method}")
    variants = VARIANTS.get(args.method, ())
    if args.variant is not None and args.variant not in variants:
        raise UserError(f"--variant {args.variant}: {args.method} has {', '.join(variants)}")
    if (args.majority_supervision or 0) > 1:
        value = args.majority_supervision
        raise UserError(f"--majority-supervision {value}: give a share between 0 and 1")


def default_temperature(method):
    return 0.2 if method == "paco" else 0.07


def load_training_data(args):
    """Return the subset as the flags change it, and the training rows; resolve --stem."""
    subset = load_subset(args.subset)
    subset.change_views(args.size, args.recipe, args.no_flip)
    if args.init == "imagenet":
        subset.mean, subset.std = IMAGENET_MEAN, IMAGENET_STD
    args.stem = resolve_stem(args.arch, args.stem, subset.size, args.init)
    rows = subset.splits["train"]
    if args.smoke:
        rows = subset.limit_for_smoke().splits["train"]
    return subset, rows


def check_args(args, subset, rows):
    """Raise UserError if a flag does not fit the training images, the method or the ranks."""
    ranks = world_size()
    if subset.recipe == "none":
        others = ", ".join(name for name in RECIPES if name != "none")
        raise UserError(f"--recipe none: contrastive training needs augmentation; choose {others}")
    check_batch_size(args.batch_size, rows, subset)
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size}: use a multiple of the {ranks} processes")
    if args.chunk and (args.batch_size % min(args.chunk, args.batch_size) or args.chunk % ranks):
        also = f" and be a multiple of the {ranks} processes" if ranks > 1 else ""
        raise UserError(f"--chunk {args.chunk}: must divide --batch-size {args.batch_size}{also}")
    check_method(args, subset, rows)
    if args.watch_every and len(subset.splits["val"]) < 10:
        raise UserError(f"{subset.path}: under 10 validation images; use --watch-every 0")


def check_method(args, subset, rows):
    """Raise UserError if the method cannot take the batches or the number of classes."""
    if args.method in ("suppro", "tsc") and len(subset.classes) > PROJECTION_DIM + 1:
        text = f"takes up to {PROJECTION_DIM + 1} classes, not {len(subset.classes)}; use supmin"
        raise UserError(f"--method {args.method}: {text}")
    if args.minority_per_batch:
        if args.method in ("bcl", "paco"):
            raise UserError(f"--minority-per-batch: {args.method} expects natural batches; drop it")
        count = int(np.isin(subset.labels[rows], subset.tail).sum())
        most = min(args.batch_size, count)
        if args.minority_per_batch > most:
            value = args.minority_per_batch
            raise UserError(f"--minority-per-batch {value}: a batch can hold at most {most}")


def default_folder(args, subset):
    """Return runs/<dataset>/<ratio>/<method>/seed<k>; the flags of a variant follow the method."""
    defaults = {**OPTIONS[args.method], "minority_per_batch": None, "relu": False}
    defaults["temperature"] = default_temperature(args.method)
    name = args.method
    for option, default in defaults.items():
        value = getattr(args, option)
        if value != default:
            text = f"-{value}" if isinstance(value, str) else str(value)
            name += f"-{option.replace('_', '-')}" + ("" if value is True else text)
    return Path("runs", subset.name, subset.ratio, name, f"seed{args.seed}")


def make_config(args, subset, amp, out):
    """Return every setting that decides the result, for config.json."""
    names = ("no_flip", "chunk", "minority_per_batch", "relu", "init", "init_sha256")
    optional = {name: value for name in names if (value := getattr(args, name, None))}
    return dict(
        method=args.method,
        **{option: getattr(args, option) for option in OPTIONS[args.method]},
        **subset.identity(out),
        arch=args.arch,
        stem=args.stem,
        feature_map=feature_map_side(args.arch, args.stem, subset.size),
        recipe=subset.recipe,
        projection_dim=PROJECTION_DIM,
        size=subset.size,
        epochs=args.epochs,
        batch_size=args.batch_size,
        **optional,
        lr=args.lr,
        warmup_epochs=args.warmup_epochs,
        temperature=args.temperature,
        seed=args.seed,
        amp=amp.mode,
        smoke=args.smoke,
    )


# --------------------------------------------------------------------------------------------------
# the pieces of main
# --------------------------------------------------------------------------------------------------


def build_method(args, model, subset):
    generator = make_generator(args.seed)
    training = Training(args.epochs, args.batch_size, args.seed, args.temperature, generator)
    options = {name: getattr(args, name) for name in OPTIONS[args.method]}
    return METHODS[args.method](model, subset, training, **options)


def build_optimizer(args, model, method):
    trainable = [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad]
    options = dict(weight_decay=WEIGHT_DECAY, fused=trainable[0].is_cuda)
    return torch.optim.SGD(trainable, args.lr, MOMENTUM, **options)


def make_sampler(args, subset, rows):
    """Return the function that draws the batches of an epoch: generator -> list of positions."""
    is_minority = np.isin(subset.labels[rows], subset.tail)

    def draw_batches(generator):
        batches = shuffled_batches(len(rows), args.batch_size, generator)
        batches = batches[:2] if args.smoke else batches
        if args.minority_per_batch:
            return guarantee_minority(batches, is_minority, args.minority_per_batch, generator)
        return batches

    return draw_batches


def start_epoch(epoch, args, model, method, optimizer):
    """Set the learning rate; let the method prepare its epoch."""
    method.start_epoch(epoch, model)
    broadcast_buffers(method)
    first, end = method.schedule_span(epoch)
    if epoch == first:
        optimizer.state.clear()  # no momentum of the span before
    warmup_epochs = 0 if first else args.warmup_epochs
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(epoch - first, end - first, args.lr, warmup_epochs)


def print_plan(args, subset, method, steps_per_epoch):
    print_network(args, subset, steps_per_epoch)
    print_batch_statistics(args, subset, method)


def print_batch_statistics(args, subset, method):
    """Print how many minority images a batch holds, and the collapse value of the loss."""
    counts, batch_size = subset.train_counts(), args.batch_size
    minority, total = sum(counts[c] for c in subset.tail), sum(counts)
    names = " + ".join(subset.classes[c] for c in subset.tail)
    # Hypergeometric probability of no minority image: C(majority, batch) / C(total, batch).
    none = math.comb(total - minority, batch_size) / math.comb(total, batch_size)
    filled = f"; filled up to {args.minority_per_batch}" if args.minority_per_batch else ""
    print(
        f"  {minority} of {total} training images are '{names}' "
        f"(minority): {batch_size * minority / total:.2f} expected per batch of {batch_size}, "
        f"none in {none:.1%} of the batches{filled}"
    )
    value = method.collapse_value(batch_size)
    if value is None:
        print("  this loss has no fixed collapse value: watch SAA and CAC")
    else:
        print(f"  collapse value of the loss: {value:.3f}")
    if method.log_fields:
        print("  " + format_fields(method.log_fields))


def print_network(args, subset, steps_per_epoch):
    """Print the last feature map, and warnings about it and about the length of the run."""
    side = feature_map_side(args.arch, args.stem, subset.size)
    print(f"  {args.arch} with {args.stem} stem: the last feature map is {side} x {side}")
    if side == 1:
        print("  WARNING: its last stage sees one pixel; use --stem cifar, or a larger --size")
    if args.init == "imagenet":
        print("  inputs are normalised with ImageNet's mean and standard deviation")
    steps = args.epochs * steps_per_epoch
    if args.lr == 0 and steps < SETTLED_STEPS:
        print(f"  WARNING: {steps} steps do not settle batch norm; use the epochs of the real run")
    if args.warmup_epochs > args.epochs and args.lr:
        print("  the warm-up outlasts the run, so --lr is never reached; use more --epochs")


# --------------------------------------------------------------------------------------------------
# collapse monitor
# --------------------------------------------------------------------------------------------------


def monitor_collapse(epoch, stats, args, model, method, subset, device):
    """Return what the log gets beside the loss: SAA, CAC and kNN accuracy every few epochs.

    The gap between the loss and its collapse value is computed in every epoch. Prints one line at
    each check, with a warning if the representation has collapsed.
    """
    value = method.collapse_value(args.batch_size)
    found = {"collapse_gap": None if value is None else value - stats["loss"]}
    is_last = epoch + 1 == args.epochs
    if rank() > 0 or not args.watch_every or not (is_last or (epoch + 1) % args.watch_every == 0):
        return found
    found |= validate_embedding(model, subset, device, args.chunk or args.batch_size)
    # A network that has hardly been trained maps all images to nearly one point, too.
    is_trained = is_last or epoch >= max(4, min(args.warmup_epochs, args.epochs // 2))
    is_trained = is_trained and args.lr > 0 and not args.smoke
    found["collapsed"] = is_trained and has_collapsed(found)
    print(format_progress(epoch, {**stats, **found}, args, subset, method), flush=True)
    return found


def validate_embedding(model, subset, device, batch_size):
    """Return SAA, CAC and leave-one-out 5-NN balanced accuracy of the validation projections.

    In percent. Every check sees the same views.
    """
    rows = subset.splits["val"]
    if len(rows) > MONITORED_IMAGES:
        drawn = np.random.default_rng(0).choice(rows, MONITORED_IMAGES, replace=False)
        # The measures need an image of each class, and a rare one may have none among the drawn.
        is_missed = ~np.isin(subset.labels[rows], subset.labels[drawn])
        rows = np.sort(np.append(drawn, rows[is_missed]))
    z = embed(
        model, subset, rows, device, batch_size, views=2, generator=make_generator(0, 0, 0, 0)
    )
    labels = torch.from_numpy(subset.labels[rows])
    return {
        "val_saa": [round(v, 3) for v in sample_alignment_accuracy(z, labels).tolist()],
        "val_cac": [round(v, 3) for v in class_alignment_consistency(z, labels).tolist()],
        "val_knn": round(knn_balanced_accuracy(z[0], labels), 3),
    }


def has_collapsed(stats):
    """True if the loss is at its collapse value and the neighbours of an image are mixed.

    CAC tells a collapse from slow training: it rises while the loss is still near that value.
    """
    gap, cac = stats["collapse_gap"], stats["val_cac"]
    chance = 100 / len(cac)  # mean of the classes' shares
    return bool(
        gap is not None and abs(gap) < COLLAPSE_GAP and np.mean(cac) < chance + COLLAPSE_CAC
    )


def knn_balanced_accuracy(z, labels, k=5):
    """Balanced accuracy (percent) of the vote of the k most similar other rows.

    z [n, D] unit vectors; labels int [n].
    """
    nearest = (z @ z.T).fill_diagonal_(-2).topk(min(k, len(z) - 1), dim=1).indices  # [n, k]
    # Of equal votes, the lower label wins.
    correct = F.one_hot(labels[nearest]).sum(1).argmax(1) == labels
    return 100 * np.mean([correct[labels == c].float().mean().item() for c in labels.unique()])


def format_progress(epoch, stats, args, subset, method):
    others = [c for c in range(len(subset.classes)) if c not in subset.tail]
    groups = subset.tail, others
    saa, cac = (
        "/".join(f"{np.mean([stats[key][c] for c in group]):.1f}" for group in groups)
        for key in ("val_saa", "val_cac")
    )
    value = method.collapse_value(args.batch_size)
    collapse = "" if value is None else f" (collapse {value:.3f})"
    line = (
        f"epoch {epoch + 1}/{args.epochs}  loss {stats['loss']:.3f}{collapse}  "
        f"lr {stats['lr']:.4f}  minority/majority: SAA {saa} %  CAC {cac} %  "
        f"kNN {stats['val_knn']:.1f} %  {stats['images_per_s']:.0f} images/s"
    )
    if torch.cuda.is_available():
        line += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    if method.log_fields:
        line += "  " + format_fields(method.log_fields)
    if stats["collapsed"]:
        line += (
            "\n  WARNING: the representation has collapsed: the loss is at its collapse value, and "
            "neighbours are mixed (CAC at chance); start again with --method supmin"
        )
    return line


def format_fields(fields):
    return "  ".join(
        f"{name.replace('_', ' ')} " + (f"{v[0]} / {v[1]}" if isinstance(v, list) else f"{v}")
        for name, v in fields.items()
    )


def plot_curves(out, value):
    """Write curves.png: the loss with its collapse value (or None), and the monitor's scores."""
    log = [line for line in read_log(out) if "epoch" in line]
    checks = [line for line in log if "val_saa" in line]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] + 1 for line in log]
    left.plot(epochs, [line["loss"] for line in log], color="black", label="loss")
    if value is not None:
        left.axhline(value, color="gray", linestyle="--", label="all embeddings equal")
    left.set(xlabel="epoch", ylabel="loss (nats)", title="training loss")
    epochs = [line["epoch"] + 1 for line in checks]
    for key, style, name in (("saa", "-o", "SAA"), ("cac", "--s", "CAC"), ("knn", ":^", "kNN")):
        values = [np.mean(line[f"val_{key}"]) for line in checks]
        right.plot(epochs, values, style, markersize=4, label=name)
    if checks:
        chance = 100 / len(checks[0]["val_cac"])
        right.axhline(chance, color="gray", linestyle=":", label="chance of CAC and kNN")
    right.set(xlabel="epoch", ylabel="mean of the classes (%)", ylim=(0, 102))
    right.set_title("validation images")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    with atomic_write(out / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    run_main(main)
