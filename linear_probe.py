"""Train a linear classifier on frozen features: the linear probe.

    python linear_probe.py runs/digits/99-1/supmin/seed0
    python linear_probe.py runs/digits/99-1/supmin/seed0 --rows own balanced one-percent
    python linear_probe.py runs/digits/99-1/supmin/seed0 --predict photos --csv out.csv
    python linear_probe.py subsets/digits/99-1.json
    python linear_probe.py --embeddings z.npz

Features come from the frozen encoder of a run. A subset in place of a run gives the floor without a
network: the pixels of its evaluation view, at most 32 x 32. --embeddings takes features of any
model: an .npz file with train, val, test [n, D] and train_labels, val_labels, test_labels [n].

Probes are trained on the run's own training rows (`test` in probe.json) and on the rows of the
50-50 subset beside it (`test_balanced_train`). --rows adds `test_subsampled`, the own rows cut to
the rarer class, and `test_one_percent`, the paper's class-balanced 1 % (datasets/probe_rows.py).

--protocol cached fits logistic regression to standardised features, with balanced class weights.
centroid takes the nearest class mean of the features; nothing is trained. reference trains on
augmented images. With --class-weights none it is the probe of the published code: Adam, learning
rate 3e-4, batch 1024, 100 epochs, raw features. The paper's supplement S2.3, as a public rerun
quotes it, names SGD, 50 epochs and 1 % of the images: --optimizer sgd --epochs 50 --rows
one-percent.

Strength or epoch is chosen by validation AUROC; the test split is read once. The encoder stays in
eval mode and its bits are compared before and after, batch-norm statistics included.

Writes probe.json, and of the first rows probe.pt and predictions.csv (file, split, label,
p_minority). A probe of another protocol is kept as probe_<protocol>.json.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from common import class_weights, embed, load_run, load_subset, warmup_cosine
from datasets.loader import BatchLoader
from datasets.pack import read_index
from datasets.predict import list_prediction_images, predict_folder
from datasets.probe_rows import ROW_SETS, describe_rows, draw_row_sets, load_balanced_sibling
from datasets.subset import Subset
from utils.arrays import load_labeled_splits
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main
from utils.distributed import pick_device
from utils.files import lock_folder, read_json, sha256, write_json
from utils.runs import load_strict, load_tensors, module_sha256, provenance, save_tensors
from utils.scores import classification_scores, write_predictions

# C of scikit-learn's LogisticRegression: weight of the data against the L2 norm
STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
# Optimizers of the reference protocol, with the settings of the published code.
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, dict(momentum=0.9, weight_decay=1e-4)),
}
LR = 3e-4
# Side of the view whose pixels are features, at most.
PIXEL_SIZE = 32
# Endings of the keys in probe.json, by --rows.
KEY_ENDINGS = {
    "own": "",
    "balanced": "_balanced_train",
    "subsampled": "_subsampled",
    "one-percent": "_one_percent",
}


def parse_args():
    smoke = dict(epochs=2, batch_size=64)
    parser = ArgumentParser("Linear probe of a run, of raw pixels or of any features.", smoke)
    add, count = parser.add_argument, number_from(1)
    add("sources", metavar="run", type=Path, nargs="*", help="run folders; a subset: raw pixels")
    add("--embeddings", type=Path, metavar="NPZ", help="probe the features in this file instead")
    text = "training rows: own balanced subsampled one-percent (default: own balanced)"
    add("--rows", nargs="+", choices=ROW_SETS, metavar="ROWS", help=text)
    text = "cached: logistic regression; reference: augmented images; centroid: nearest class mean"
    add("--protocol", choices=["cached", "reference", "centroid"], default="cached", help=text)
    add("--class-weights", choices=["balanced", "none"], default="balanced", help="of the loss")
    text = "standardise the features (default: yes in the cached protocol, else no)"
    add("--standardize", choices=["yes", "no"], help=text)
    add("--optimizer", choices=list(OPTIMIZERS), default="adam", help="reference protocol")
    add("--epochs", type=count, default=100, help="reference protocol; in the paper 50")
    add(
        "--batch-size",
        type=count,
        default=1024,
        help="of the reference protocol; features: at most 256",
    )
    text = "reference protocol: seed for weights, shuffling and augmentation"
    add("--seed", type=number_from(0), default=0, help=text)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")
    add("--predict", type=Path, metavar="FOLDER", help="classify the images in FOLDER; needs --csv")
    add("--csv", type=Path, metavar="OUT", help="output of --predict: file, probability, class")
    text = "output folder, for one run (default: the run; runs/<dataset>/<ratio>/pixels; z_probe)"
    add("--out", type=Path, help=text)
    add("--smoke", action="store_true", help="a few images; two strengths, or two epochs")
    args = parser.parse_args()
    args.new_images = list_prediction_images(args.predict, args.csv)
    args.rows = list(dict.fromkeys(args.rows or ["own", "balanced"]))
    default = "yes" if args.protocol == "cached" else "no"
    args.standardize = (args.standardize or default) == "yes"
    if bool(args.sources) == bool(args.embeddings):
        raise UserError("give either runs or --embeddings z.npz; --help lists all flags")
    if len(args.sources) > 1 and (args.out or args.predict):
        raise UserError("--out and --predict take one run; give a single run folder")
    if args.embeddings and (args.protocol == "reference" or args.predict):
        raise UserError("--embeddings has no images; leave out --protocol reference and --predict")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    for source in args.sources or [args.embeddings]:
        task = load_task(source, args)
        settings = probe_settings(task, args)
        if probe_is_current(task.out, settings):
            print(f"finished already: {task.out / 'probe.json'}")
        else:
            train_probes(task, settings, args, device)
        if args.predict:
            predict(task, args, device)
    runs = [source for source in args.sources if source.is_dir()]
    if runs:
        print_next("evaluate_metrics.py", *runs, smoke=args.smoke)


# --------------------------------------------------------------------------------------------------
# what is probed: the encoder of a run, raw pixels, or the features in a file
# --------------------------------------------------------------------------------------------------


@dataclass
class ProbeTask:
    """What the probes of one source share. Rows index the images of the subset, or of the file."""

    source: Path  # run folder, subset or .npz file
    out: Path
    classes: list  # two names, index = label
    minority: int  # label of the rare class
    labels: np.ndarray  # int [M]
    files: list  # M names, for predictions.csv
    splits: dict  # {"val": rows, "test": rows}
    row_sets: dict  # {name in ROW_SETS: training rows}
    origin: dict  # checksums of what is probed, for probe.json
    features: torch.Tensor | None = None  # float32 [M, D], of --embeddings
    subset: Subset | None = None
    encoder: nn.Module | None = None
    config: dict | None = None  # config.json of raw pixels

    def extract(self, rows, args, device):
        """Return the features float32 [n, D] of the evaluation view of some rows."""
        if self.encoder is None:
            return self.features[rows]
        self.encoder.to(device)
        return embed(self.encoder, self.subset, rows, device, min(args.batch_size, 256))


class Pixels(nn.Module):
    """The floor without a network: x [B, 3, H, W] -> its pixels, [B, channels * H * W]."""

    def __init__(self, channels, size):
        super().__init__()
        self.channels, self.dim = channels, channels * size**2

    def forward(self, x):
        # a grey image has three equal channels
        return x[:, : self.channels].flatten(1)


def load_task(source, args):
    if args.embeddings:
        return load_features(source, args)
    if source.is_file() and (source.parent / "config.json").exists():
        raise UserError(f"{source}: is a file of a run; give its folder, {source.parent}")
    if source.is_file():
        return load_pixels(source, args)
    _, subset, encoder = load_run(source, args.smoke)
    return make_task(source, args.out or source, subset, encoder, args)


def make_task(source, out, subset, encoder, args, **options):
    """Draw the training rows and build the task of an encoder on a subset."""
    labels, split, _, files = read_index(subset.path.with_name("index.csv"))
    sibling = load_balanced_sibling(subset, args.smoke) if "balanced" in args.rows else None
    if "balanced" in args.rows and sibling is None and subset.ratio != "50-50":
        print(
            "no probe on balanced rows: 50-50.json is missing beside the subset; "
            "make_subsets.py --ratios 50-50 adds it"
        )
    pool = np.flatnonzero(split == "train")
    seed = read_json(subset.path, "make it with make_subsets.py").get("seed", 0)
    balanced = sibling.splits["train"] if sibling else None
    row_sets = draw_row_sets(args.rows, labels, subset.splits["train"], pool, seed, balanced)
    if not row_sets:
        raise UserError(f"--rows balanced: {subset.path} has no other rows than its own; add own")
    origin = {"encoder_sha256": module_sha256(encoder)}
    origin["balanced_sha256"] = sibling.rows_sha256 if sibling else None
    return ProbeTask(
        source=source,
        out=out,
        classes=subset.classes,
        minority=subset.minority,
        labels=labels,
        files=files,
        splits=subset.splits,
        row_sets=row_sets,
        origin=origin | options.pop("origin", {}),
        subset=subset,
        encoder=encoder,
        **options,
    )


def load_pixels(path, args):
    """Load a subset in place of a run; its features are pixels, at most 32 x 32.

    Raises UserError if the output folder holds a run.
    """
    subset = load_subset(path)
    subset = replace(subset, size=min(subset.size, PIXEL_SIZE))
    out = args.out or Path("runs", subset.name, subset.ratio, "pixels")
    if (out / "config.json").exists():
        old = read_json(out / "config.json", "delete it or choose another folder with --out")
        if old.get("method") != "pixels":
            raise UserError(f"{out}: holds another run; choose another folder with --out")
    config = {
        "method": "pixels",
        "dataset": subset.name,
        "ratio": subset.ratio,
        "size": subset.size,
        "seed": args.seed,
        "smoke": args.smoke,
        "classes": subset.classes,
        "minority": subset.minority,
        "subset": os.path.relpath(subset.path, out),
        "sha256": subset.sha256,
        "rows_sha256": subset.rows_sha256,
    }
    if args.smoke:
        subset.limit_for_smoke()
    encoder = Pixels(subset.images.shape[3], subset.size).eval()
    origin = {"images_sha256": subset.sha256, "size": subset.size}
    return make_task(path, out, subset, encoder, args, origin=origin, config=config)


def load_features(path, args):
    """Load features and labels of three splits from an .npz file."""
    data = load_labeled_splits(path, ("train", "val", "test"))
    labels = np.concatenate([y for _, y in data.values()])
    ends = np.cumsum([len(y) for _, y in data.values()])[:-1]
    splits = dict(zip(data, np.split(np.arange(len(labels)), ends), strict=True))
    if args.smoke:
        for split, rows in splits.items():
            splits[split] = np.sort(np.concatenate([rows[labels[rows] == c][:16] for c in (0, 1)]))
    train = splits["train"]
    row_sets = draw_row_sets(args.rows, labels, train, train, seed=0)
    if not row_sets:
        raise UserError("--rows balanced: an .npz file has no 50-50 subset; use other rows")
    return ProbeTask(
        source=path,
        out=args.out or path.with_name(f"{path.stem}_probe"),
        classes=["class 0", "class 1"],
        minority=int(np.bincount(labels[train]).argmin()),
        labels=labels,
        files=[f"{split}[{i}]" for split, (_, y) in data.items() for i in range(len(y))],
        splits=splits,
        row_sets=row_sets,
        origin=dict(encoder_sha256=None, balanced_sha256=None, embeddings_sha256=sha256(path)),
        features=torch.from_numpy(np.concatenate([x for x, _ in data.values()])),
    )


# --------------------------------------------------------------------------------------------------
# training and scoring
# --------------------------------------------------------------------------------------------------


def probe_settings(task, args):
    """Collect what decides the result: a probe.json with equal settings is current."""
    settings = {
        "protocol": args.protocol,
        "smoke": args.smoke,
        **task.origin,
        "class_weights": None if args.protocol == "centroid" else args.class_weights,
        "standardize": args.standardize,
        "rows": {name: describe_rows(rows, task.labels) for name, rows in task.row_sets.items()},
    }
    if args.protocol == "reference":
        keys = ("optimizer", "epochs", "batch_size", "seed")
        settings |= {key: getattr(args, key) for key in keys}
    return settings


def probe_is_current(out, settings):
    """Compare probe.json with the settings. A probe of another protocol is moved aside.

    UserError: a smoke probe would replace a real one.
    """
    path = out / "probe.json"
    if not all(file.exists() for file in (path, out / "probe.pt", predictions_path(out))):
        return False
    old = read_json(path, "delete it")
    if all(old.get(key) == value for key, value in settings.items()):
        return True
    if settings["smoke"] and not old.get("smoke"):
        raise UserError(f"{path}: holds a real probe; choose another folder with --out")
    if old.get("protocol") != settings["protocol"]:
        os.replace(path, out / f"probe_{old.get('protocol')}.json")
    return False


def predictions_path(out):
    """Return predictions.csv; in a run of finetune.py, which has its own, probe_predictions.csv."""
    is_supervised = (out / "classifier.pt").exists()
    return out / ("probe_predictions.csv" if is_supervised else "predictions.csv")


def train_probes(task, settings, args, device):
    """Train one probe per row set, score each on val and test; write the files of the probe."""
    lock_folder(task.out, "-probe")
    val, test = (
        (task.extract(task.splits[split], args, device), task.labels[task.splits[split]])
        for split in ("val", "test")
    )
    train = extract_training_features(task, args, device)
    result = dict.fromkeys(["test", "val", "test_balanced_train", "val_balanced_train"])
    probes = {}
    for name, rows in task.row_sets.items():
        probe, chosen = fit_probe(task, rows, train.get(name), val, args, device)
        ending, probes[name] = KEY_ENDINGS[name], probe
        result["val" + ending] = score_probe(probe, *val, task.minority)
        result["test" + ending] = score_probe(probe, *test, task.minority)
        result["chosen" + ending] = chosen
    if task.encoder is not None and module_sha256(task.encoder) != task.origin["encoder_sha256"]:
        raise RuntimeError("the probe changed the frozen encoder")
    others = [source for source in args.sources if source != task.source]
    data = {"classes": task.classes, "minority": task.minority}
    data["provenance"] = provenance(device, exclude=others)
    headline = probes.get("own") or next(iter(probes.values()))
    # an old probe.json would describe other weights if this process ended in between
    (task.out / "probe.json").unlink(missing_ok=True)
    if task.config:
        write_json(task.out / "config.json", task.config)
    save_tensors(task.out / "probe.pt", headline.state_dict())
    predictions = {
        split: (task.splits[split], predict_probability(headline, x, task.minority))
        for split, (x, _) in (("val", val), ("test", test))
    }
    write_predictions(predictions_path(task.out), task.files, task.labels, predictions)
    write_json(task.out / "probe.json", {**result, **settings, **data})
    print_scores(result, task)
    print(f"wrote {task.out / 'probe.json'}")


def extract_training_features(task, args, device):
    """Return {name: features [n, D]} of all row sets, each row extracted once.

    Empty if the protocol reads images alone.
    """
    if args.protocol == "reference" and not args.standardize:
        return {}
    rows = np.unique(np.concatenate(list(task.row_sets.values())))
    x = task.extract(rows, args, device)
    return {name: x[np.searchsorted(rows, some)] for name, some in task.row_sets.items()}


def fit_probe(task, rows, x, val, args, device):
    """Fit a probe by args.protocol. Returns (Linear on raw features, what validation chose).

    x: features [n, D] of the training rows; val: (features, labels) of the validation split.
    """
    x_val, y_val = val
    y, mean, std = task.labels[rows], torch.zeros(x_val.shape[1]), torch.ones(x_val.shape[1])
    if args.standardize:
        mean, std = x.double().mean(0), x.double().std(0)
        # a constant feature gets no weight
        std[std < 1e-6] = torch.inf
    if args.protocol == "reference":
        probe, chosen = train_on_images(task, rows, mean, std, val, args, device)
    else:
        x, x_val = ((features.double() - mean) / std for features in (x, x_val))
        fit = fit_centroids if args.protocol == "centroid" else fit_logistic_regression
        probe, chosen = fit(x, y, x_val, y_val, task.minority, args)
    probe = probe.cpu().double()
    with torch.no_grad():
        probe.weight /= std
        probe.bias -= probe.weight @ mean.double()
    return probe.float(), chosen


# --------------------------------------------------------------------------------------------------
# the protocols: each returns a Linear on the features it was given and what validation chose
# --------------------------------------------------------------------------------------------------


def fit_logistic_regression(x, y, x_val, y_val, minority, args):
    """Fit logistic regression for each strength, keep the best by validation AUROC.

    x float64 [n, D], y int [n] of 0 and 1.
    """
    strengths = STRENGTHS[2:4] if args.smoke else STRENGTHS
    class_weight = "balanced" if args.class_weights == "balanced" else None
    # warm start: the solution of one strength is where the next one begins
    model = LogisticRegression(class_weight=class_weight, tol=1e-6, max_iter=5000, warm_start=True)
    best_auroc = -1.0
    for strength in tqdm(strengths, desc="strengths", leave=False, disable=None):
        model.set_params(C=strength).fit(x.numpy(), y)
        candidate = linear_layer(torch.from_numpy(model.coef_[0]), float(model.intercept_[0]))
        auroc = score_probe(candidate, x_val, y_val, minority)["auroc"]
        # a tie keeps the stronger regularisation
        if auroc > best_auroc:
            probe, best_auroc, chosen = candidate, auroc, {"C": strength, "val_auroc": auroc}
    return probe, chosen


def fit_centroids(x, y, x_val, y_val, minority, args):
    """Classify by the nearest class mean (Euclidean).

    The logit is the signed distance from the middle of both means, in standard deviations over the
    training rows: nothing is trained, so its probability is not calibrated.
    """
    low, high = (x[torch.from_numpy(y == c)].mean(0) for c in (0, 1))
    direction, middle = high - low, (low + high) / 2
    spread = ((x - middle) @ direction).std()
    weight = direction / spread if spread > 0 else torch.zeros_like(direction)
    probe = linear_layer(weight, -float(middle @ weight))
    return probe, {"val_auroc": score_probe(probe, x_val, y_val, minority)["auroc"]}


def linear_layer(weight, bias):
    """Build a Linear, float64, with logits -t/2 and t/2, where t = x @ weight + bias.

    Their softmax is the sigmoid of t.
    """
    probe = nn.Linear(len(weight), 2, dtype=torch.float64)
    with torch.no_grad():
        probe.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        probe.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return probe


def train_on_images(task, rows, mean, std, val, args, device):
    """Train on freshly augmented images, keep the best epoch by validation AUROC.

    Cosine schedule without warm-up. The last batch of an epoch may be smaller.
    """

    def split_order(generator):
        order = torch.randperm(len(rows), generator=generator).numpy()
        return np.array_split(order, -(-len(rows) // args.batch_size))

    loader = BatchLoader(task.subset, rows, device, split_order)
    torch.manual_seed(args.seed)
    probe = nn.Linear(task.encoder.dim, 2).to(device)
    optimizer_class, options = OPTIMIZERS[args.optimizer]
    optimizer = optimizer_class(probe.parameters(), lr=LR, **options)
    is_weighted, counts = args.class_weights == "balanced", np.bincount(task.labels[rows])
    weights = class_weights(counts).to(device) if is_weighted else None
    mean, std = mean.float().to(device), std.float().to(device)
    x_val, y_val = (val[0].to(device) - mean) / std, val[1]
    best_auroc = -1.0
    for epoch in tqdm(range(args.epochs), desc="epochs", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = warmup_cosine(epoch, args.epochs, LR, warmup_epochs=0)
        for batch in loader.epoch(epoch, args.seed):
            with torch.no_grad():
                x = (task.encoder(batch.x[0]) - mean) / std
            loss = F.cross_entropy(probe(x), batch.labels, weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        auroc = score_probe(probe, x_val, y_val, task.minority)["auroc"]
        if auroc > best_auroc:
            best_auroc, chosen = auroc, {"epoch": epoch + 1, "val_auroc": auroc}
            best = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    probe.load_state_dict(best)
    return probe, chosen


# --------------------------------------------------------------------------------------------------
# scores and predictions
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_probability(probe, x, label):
    """Return the probability of a label, float64 [n], from features [n, D]."""
    return probe(x.to(probe.weight)).double().softmax(1)[:, label].cpu()


def score_probe(probe, x, y, minority):
    return classification_scores(predict_probability(probe, x, 1), y, minority)


def print_scores(result, task):
    header = "".join(f"{name:>10}" for name in ("accuracy", "balanced", "AUROC", "F1"))
    print(f"{'percent':24}{header}    F1 of '{task.classes[task.minority]}'")
    for key in ["val", *(f"test{KEY_ENDINGS[name]}" for name in ROW_SETS)]:
        if result.get(key):
            print(f"{key:24}" + "".join(f"{100 * value:10.1f}" for value in result[key].values()))


def predict(task, args, device):
    """Write the class probabilities of new images with the probe in the output folder."""
    probe = nn.Linear(task.encoder.dim, 2)
    load_strict(probe, load_tensors(task.out / "probe.pt"), task.out / "probe.pt")
    network = nn.Sequential(task.encoder, probe).to(device)
    predict_folder(network, task.subset, args.predict, args.new_images, args.csv, device)


if __name__ == "__main__":
    run_main(main)
