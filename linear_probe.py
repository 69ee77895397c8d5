"""Train a linear classifier on frozen features: the linear probe.

    python linear_probe.py runs/digits/99-1/supmin/seed0
    python linear_probe.py runs/digits/99-1/supmin/seed0 --rows own balanced one-percent
    python linear_probe.py runs/digits/99-1/supmin/seed0 --predict photos --csv out.csv
    python linear_probe.py runs/digits/99-1/supmin/seed0 --export model.pt2
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

Strength or epoch is chosen by validation AUROC, then the threshold by --threshold-for; the test
split is read once. The encoder stays in eval mode and its bits are compared before and after,
batch-norm statistics included.

Writes probe.json, and of the first rows predictions.csv (file, split, label, p_minority), probe.pt
and probe_classifier.json, from which --predict and --export work without the subset. A probe of
another protocol is kept as probe_<protocol>.json.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from baselines.classification import load_classifier, write_classifier
from baselines.probe_task import load_task
from common import class_weights, warmup_cosine
from datasets.loader import BatchLoader
from datasets.predict import (
    REUSE_FLAGS,
    add_prediction_flags,
    list_prediction_images,
    use_classifier,
)
from datasets.probe_rows import ROW_SETS, describe_rows
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main
from utils.distributed import pick_device
from utils.files import lock_folder, read_json, write_json
from utils.runs import module_sha256, provenance, save_tensors
from utils.scores import (
    add_score_flags,
    classification_scores,
    print_test_scores,
    score_splits,
    write_predictions,
)

# C of scikit-learn's LogisticRegression: weight of the data against the L2 norm
STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
# Optimizers of the reference protocol, with the settings of the published code.
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, dict(momentum=0.9, weight_decay=1e-4)),
}
LR = 3e-4
# Endings of the keys in probe.json, by --rows.
KEY_ENDINGS = {
    "own": "",
    "balanced": "_balanced_train",
    "subsampled": "_subsampled",
    "one-percent": "_one_percent",
}


def parse_args():
    parser = ArgumentParser(
        "Linear probe of a run, of raw pixels or of any features.",
        smoke=dict(epochs=2, batch_size=64),
        example="python linear_probe.py runs/digits/99-1/supmin/seed0",
    )
    add, count = parser.add_argument_group("data").add_argument, number_from(1)
    add("sources", metavar="run", type=Path, nargs="*", help="run folders; a subset: raw pixels")
    add("--embeddings", type=Path, metavar="NPZ", help="probe the features in this file instead")
    text = "training rows: own balanced subsampled one-percent (default: own balanced)"
    add("--rows", nargs="+", choices=ROW_SETS, metavar="ROWS", help=text)

    add = parser.add_argument_group("method").add_argument
    text = "cached: logistic regression; reference: augmented images; centroid: nearest class mean"
    add("--protocol", choices=["cached", "reference", "centroid"], default="cached", help=text)
    add("--class-weights", choices=["balanced", "none"], default="balanced", help="of the loss")
    text = "standardise the features (default: yes in the cached protocol, else no)"
    add("--standardize", choices=["yes", "no"], help=text)
    add_score_flags(add)

    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=list(OPTIMIZERS), default="adam", help="reference protocol")
    add("--epochs", type=count, default=100, help="reference protocol; in the paper 50")
    text = "of the reference protocol; features: at most 256"
    add("--batch-size", type=count, default=1024, help=text)
    text = "reference protocol: seed for weights, shuffling and augmentation"
    add("--seed", type=number_from(0), default=0, help=text)

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")

    add = parser.add_argument_group("output").add_argument
    text = "output folder, for one run (default: the run; runs/<dataset>/<ratio>/pixels; z_probe)"
    add("--out", type=Path, help=text)
    add_prediction_flags(add)
    add("--smoke", action="store_true", help="a few images; two strengths, or two epochs")
    args = parser.parse_args()
    args.new_images = list_prediction_images(args)
    args.rows = list(dict.fromkeys(args.rows or ["own", "balanced"]))
    default = "yes" if args.protocol == "cached" else "no"
    args.standardize = (args.standardize or default) == "yes"
    check_args(args, {word.split("=")[0] for word in sys.argv if word.startswith("--")})
    return args


def check_args(args, typed):
    """Raise UserError for flags that do not fit each other. Sets args.is_reuse."""
    if bool(args.sources) == bool(args.embeddings):
        raise UserError("give either runs or --embeddings z.npz; --help lists all flags")
    needs_network = args.predict or args.export
    if len(args.sources) > 1 and (args.out or needs_network):
        raise UserError("--out, --predict and --export take one run; give a single run folder")
    if args.embeddings and (args.protocol == "reference" or needs_network):
        raise UserError(
            "--embeddings has no images; leave out --protocol reference, --predict, --export"
        )
    ignored = typed & {"--optimizer", "--epochs", "--seed"}
    if ignored and args.protocol != "reference":
        flag = min(ignored)
        raise UserError(
            f"{flag}: only --protocol reference reads it, not {args.protocol}; leave it out"
        )
    if "--class-weights" in typed and args.protocol == "centroid":
        raise UserError("--class-weights: --protocol centroid has no loss; leave it out")
    args.is_reuse = bool(needs_network) and typed <= REUSE_FLAGS


def main():
    args = parse_args()
    device = pick_device(args.device)
    for source in args.sources or [args.embeddings]:
        out = args.out or source
        if args.is_reuse and all(file.exists() for file in probe_files(out)):
            print(f"{out}: uses the finished probe; nothing is trained")
        else:
            out = probe_source(source, args, device)
        if args.predict or args.export:
            use_classifier(load_classifier(out / "probe_classifier.json"), args, device)
    runs = [source for source in args.sources if source.is_dir()]
    if runs:
        print_next("evaluate_metrics.py", *runs, smoke=args.smoke)


def probe_source(source, args, device):
    """Train and score the probes of a source unless they are current; return their folder."""
    task = load_task(source, args)
    settings = probe_settings(task, args)
    if probe_is_current(task, settings):
        print(f"finished already: {task.out / 'probe.json'}")
    else:
        train_probes(task, settings, args, device)
    return task.out


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
        "threshold_rule": args.threshold_for,
        "prevalence": args.prevalence,
        "rows": {name: describe_rows(rows, task.labels) for name, rows in task.row_sets.items()},
    }
    if args.protocol == "reference":
        keys = ("optimizer", "epochs", "batch_size", "seed")
        settings |= {key: getattr(args, key) for key in keys}
    return settings


def probe_files(out):
    """Return the files of a finished probe that --predict and --export read."""
    return [out / name for name in ("probe.json", "probe.pt", "probe_classifier.json")]


def probe_is_current(task, settings):
    """Compare probe.json with the settings. A probe of another protocol is moved aside.

    UserError: a smoke probe would replace a real one.
    """
    path, *weights = probe_files(task.out)
    needed = [path, predictions_path(task.out), *(weights if task.subset else weights[:1])]
    if not all(file.exists() for file in needed):
        return False
    old = read_json(path, "delete it")
    changed = [key for key, value in settings.items() if old.get(key) != value]
    if not changed:
        return True
    if settings["smoke"] and not old.get("smoke"):
        raise UserError(f"{path}: holds a real probe; choose another folder with --out")
    if "protocol" in changed:
        os.replace(path, path.with_name(f"probe_{old.get('protocol')}.json"))
    else:
        print(f"replaces {path}, which was made with other {', '.join(changed)}")
    return False


def predictions_path(out):
    """Return predictions.csv; in a run of finetune.py, which has its own, probe_predictions.csv."""
    is_supervised = (out / "classifier.pt").exists()
    return out / ("probe_predictions.csv" if is_supervised else "predictions.csv")


def train_probes(task, settings, args, device):
    """Train one probe per row set, score each on val and test; write the files of the probe."""
    lock_folder(task.out, "-probe")
    x = {split: task.extract(task.splits[split], args, device) for split in ("val", "test")}
    y = {split: task.labels[task.splits[split]] for split in x}
    train = extract_training_features(task, args, device)
    result = dict.fromkeys(["test", "val", "test_balanced_train", "val_balanced_train"])
    fitted = {}
    for name, rows in task.row_sets.items():
        probe, chosen = fit_probe(task, rows, train.get(name), (x["val"], y["val"]), args, device)
        p = {split: predict_probabilities(probe, x[split]) for split in x}
        scores = score_splits(p, y, task.tail, args.threshold_for, args.prevalence)
        ending, fitted[name] = KEY_ENDINGS[name], (probe, p, scores)
        result |= {key + ending: scores[key] for key in ("val", "test", "test_interval")}
        result["chosen" + ending] = chosen
    headline = fitted.get("own") or next(iter(fitted.values()))
    if task.encoder is not None and module_sha256(task.encoder) != task.origin["encoder_sha256"]:
        raise RuntimeError("the probe changed the frozen encoder")
    write_probe(task, settings, result, headline, args, device)
    print_scores(result, task)
    _, p, scores = headline
    print_test_scores(scores, p, y, task.classes, task.tail)
    print(f"wrote {task.out / 'probe.json'} and {predictions_path(task.out)}")


def write_probe(task, settings, result, headline, args, device):
    """Write the files of a probe. headline: (probe, probabilities, scores)."""
    probe, p, scores = headline
    others = [source for source in args.sources if source != task.source]
    data = {"threshold": scores["threshold"], "classes": task.classes, "minority": task.minority}
    data["provenance"] = provenance(device, exclude=others)
    # an old probe.json would describe other weights if this process ended in between
    (task.out / "probe.json").unlink(missing_ok=True)
    if task.config:
        write_json(task.out / "config.json", task.config)
    save_tensors(task.out / "probe.pt", probe.state_dict())
    if task.subset:
        write_classifier(
            task.out / "probe_classifier.json",
            task.encoder,
            subset=task.subset,
            **task.network,
            head="linear",
            weights="probe.pt",
            threshold=scores["threshold"],
            threshold_rule=args.threshold_for,
            smoke=args.smoke,
        )
    path = predictions_path(task.out)
    write_predictions(path, task.files, task.labels, task.splits, p, task.tail, task.classes)
    write_json(task.out / "probe.json", {**result, **settings, **data})


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

    x float64 [n, D], y int [n]. More than two classes: multinomial.
    """
    strengths = STRENGTHS[2:4] if args.smoke else STRENGTHS
    class_weight = "balanced" if args.class_weights == "balanced" else None
    # warm start: the solution of one strength is where the next one begins
    model = LogisticRegression(class_weight=class_weight, tol=1e-6, max_iter=5000, warm_start=True)
    best_auroc = -1.0
    for strength in tqdm(strengths, desc="strengths", leave=False, disable=None):
        model.set_params(C=strength).fit(x.numpy(), y)
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        candidate = linear_layer(weight, bias)
        auroc = score_probe(candidate, x_val, y_val, minority)["auroc"]
        # a tie keeps the stronger regularisation
        if auroc > best_auroc:
            probe, best_auroc, chosen = candidate, auroc, {"C": strength, "val_auroc": auroc}
    return probe, chosen


def fit_centroids(x, y, x_val, y_val, minority, args):
    """Classify by the nearest class mean (Euclidean).

    The logit is the signed distance from the middle of both means, in standard deviations over the
    training rows: nothing is trained, so its probability is not calibrated. More than two classes:
    minus half of the squared distance from the mean, in its standard deviations.
    """
    means = torch.stack([x[torch.from_numpy(y == c)].mean(0) for c in np.unique(y)])  # [C, D]
    middle = means.sum(0) / len(means)
    directions = means[1:] - means[:1] if len(means) == 2 else means - middle
    spread = torch.stack([(x - middle) @ direction for direction in directions]).std()
    weight = directions / spread if spread > 0 else torch.zeros_like(directions)
    bias = torch.stack([-(middle @ row) for row in weight])
    if len(means) > 2:
        bias -= (weight * directions).sum(1) / 2
    probe = linear_layer(weight, bias)
    return probe, {"val_auroc": score_probe(probe, x_val, y_val, minority)["auroc"]}


def linear_layer(weight, bias):
    """Build a Linear, float64, with logits t = weight @ x + bias; weight [C, D], bias [C].

    A single row is for two classes: logits -t/2 and t/2, whose softmax is the sigmoid of t.
    """
    if len(weight) == 1:
        weight, bias = (torch.cat([-value / 2, value / 2]) for value in (weight, bias))
    probe = nn.Linear(*reversed(weight.shape), dtype=torch.float64)
    with torch.no_grad():
        probe.weight.copy_(weight)
        # Rounded to float32, as for the committed results.
        probe.bias.copy_(bias.float())
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
    probe = nn.Linear(task.encoder.dim, len(task.classes)).to(device)
    optimizer_class, options = OPTIMIZERS[args.optimizer]
    fused = device.type == "cuda"
    optimizer = optimizer_class(probe.parameters(), lr=LR, fused=fused, **options)
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
def predict_probabilities(probe, x):
    """Return the class probabilities, float64 [n, C], of features [n, D]."""
    return probe(x.to(probe.weight)).double().softmax(1).cpu()


def score_probe(probe, x, y, minority):
    return classification_scores(predict_probabilities(probe, x), y, minority)


def print_scores(result, task):
    header = "".join(f"{name:>10}" for name in ("accuracy", "balanced", "AUROC", "F1"))
    is_binary = len(task.classes) == 2
    note = f"F1: that of '{task.classes[task.minority]}'" if is_binary else "means of the classes"
    print(f"{'percent, at 0.5':24}{header}   ({note})")
    for key in ["val", *(f"test{KEY_ENDINGS[name]}" for name in ROW_SETS)]:
        if result.get(key):
            values = (
                result[key][name] for name in ("accuracy", "balanced_accuracy", "auroc", "f1")
            )
            print(f"{key:24}" + "".join(f"{100 * value:10.1f}" for value in values))


if __name__ == "__main__":
    run_main(main)
