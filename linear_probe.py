"""Train a linear classifier on a frozen encoder: the linear probe.

    python linear_probe.py runs/digits/99-1/supmin/seed0
    python linear_probe.py runs/digits/99-1/supmin/seed0 --protocol reference
    python linear_probe.py runs/digits/99-1/supmin/seed0 --predict photos --csv out.csv

Two probes are trained: `test` on the run's own imbalanced training rows, `test_balanced_train` on
the training rows of the 50-50 subset beside it, if there is one. Classes are weighted to balance.
Strength or epoch is chosen by validation AUROC; the test split is read once. The encoder stays in
eval mode and its bits are compared before and after, batch-norm statistics included.

Writes probe.json and probe.pt. A probe of the other protocol is kept as probe_<protocol>.json.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from common import augment, class_weights, embed, load_run, load_subset, normalize, warmup_cosine
from datasets.images import list_prediction_images
from datasets.loader import ImageReader
from datasets.predict import predict_folder
from utils.cli import ArgumentParser, UserError, number_from, run_main
from utils.distributed import pick_device
from utils.files import lock_folder, read_json, write_json
from utils.runs import (
    load_strict,
    load_tensors,
    make_generator,
    module_sha256,
    provenance,
    save_tensors,
)
from utils.scores import classification_scores

# C of scikit-learn's LogisticRegression: weight of the data against the L2 norm
STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
LR = 3e-4  # Adam, reference protocol


def parse_args():
    parser = ArgumentParser("Linear probe of a finished run.", smoke=dict(epochs=2, batch_size=64))
    add = parser.add_argument
    add("runs", metavar="run", type=Path, nargs="+", help="folders from pretrain.py or finetune.py")
    add(
        "--protocol",
        choices=["cached", "reference"],
        default="cached",
        help="cached: logistic regression on features; reference: Adam on augmented images",
    )
    add("--epochs", type=number_from(1), default=100, help="reference protocol only")
    add("--batch-size", type=number_from(1), default=1024, help="images; reference protocol")
    add(
        "--seed",
        type=number_from(0),
        default=0,
        help="reference protocol: seed for weights, shuffling and augmentation",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")
    add("--predict", type=Path, metavar="FOLDER", help="classify the images in FOLDER; needs --csv")
    add("--csv", type=Path, metavar="OUT", help="output of --predict: file, probability, class")
    add("--out", type=Path, help="folder of probe.json, for one run (default: the run folder)")
    add("--smoke", action="store_true", help="a few images; two strengths, or two epochs")
    args = parser.parse_args()
    args.new_images = list_prediction_images(args.predict, args.csv)
    if len(args.runs) > 1 and (args.out or args.predict):
        raise UserError("--out and --predict take one run; give a single run folder")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    for run in args.runs:
        _, subset, encoder = load_run(run, args.smoke)
        encoder.to(device)
        out = args.out or run
        balanced = load_balanced_sibling(subset, args.smoke)
        settings = probe_settings(args, encoder, balanced)
        if probe_is_current(out, settings):
            print(f"finished already: {out / 'probe.json'}")
        else:
            probe_encoder(encoder, subset, balanced, out, settings, device, args)
        if args.predict:
            predict(encoder, subset, out, device, args)
    shown = " ".join(map(str, args.runs[:3])) + (" ..." if len(args.runs) > 3 else "")
    print(f"next: python evaluate_metrics.py {shown}")


def load_balanced_sibling(subset, smoke):
    """Load the 50-50 subset of the same images; None where there is none or it is `subset`."""
    path = subset.path.with_name("50-50.json")
    if subset.ratio == "50-50" or not path.exists():
        return None
    # load_run has verified images.npy already
    sibling = load_subset(path, verify=False)
    if sibling.sha256 != subset.sha256:
        return None
    return sibling.limit_for_smoke() if smoke else sibling


def probe_settings(args, encoder, balanced):
    """Collect what decides the result: a probe.json with equal settings is current."""
    settings = {
        "protocol": args.protocol,
        "smoke": args.smoke,
        "encoder_sha256": module_sha256(encoder),
        "balanced_sha256": balanced.rows_sha256 if balanced else None,
    }
    if args.protocol == "reference":
        settings |= {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    return settings


def probe_is_current(out, settings):
    """Compare probe.json with the settings. A probe of the other protocol is moved aside.

    UserError: a smoke probe would replace a real one.
    """
    path = out / "probe.json"
    if not path.exists() or not (out / "probe.pt").exists():
        return False
    old = read_json(path, "delete it")
    if all(old.get(key) == value for key, value in settings.items()):
        return True
    if settings["smoke"] and not old.get("smoke"):
        raise UserError(f"{path}: holds a real probe; choose another folder with --out")
    if old.get("protocol") != settings["protocol"]:
        os.replace(path, out / f"probe_{old.get('protocol')}.json")
    return False


def probe_encoder(encoder, subset, balanced, out, settings, device, args):
    """Train the probes of one encoder and score each on val and test; write probe.json."""
    lock_folder(out, "-probe")
    val, test = (extract(encoder, subset, split, device, args) for split in ("val", "test"))
    fit = fit_logistic_regression if args.protocol == "cached" else fit_adam
    result = dict.fromkeys(["test", "val", "test_balanced_train", "val_balanced_train"])
    for ending, rows in train_rows(subset, balanced).items():
        probe, chosen = fit(encoder, subset, rows, val, device, args)
        result["val" + ending] = score_probe(probe, *val, subset.minority)
        result["test" + ending] = score_probe(probe, *test, subset.minority)
        result["chosen" + ending] = chosen
        if not ending:
            # an old probe.json would describe other weights if this process ended here
            (out / "probe.json").unlink(missing_ok=True)
            save_tensors(out / "probe.pt", probe.state_dict())
    if module_sha256(encoder) != settings["encoder_sha256"]:
        raise RuntimeError("the probe changed the frozen encoder")
    data = {"classes": subset.classes, "minority": subset.minority}
    others = [] if args.out else [run for run in args.runs if run != out]
    facts = {"provenance": provenance(device, exclude=others)}
    write_json(out / "probe.json", {**result, **settings, **data, **facts})
    print_scores(result, subset)
    print(f"wrote {out / 'probe.json'}")


def train_rows(subset, balanced):
    """Return {ending of the keys in probe.json: training rows}."""
    rows = {"": subset.splits["train"]}
    if balanced:
        rows["_balanced_train"] = balanced.splits["train"]
    elif subset.ratio != "50-50":
        print(
            "no probe on balanced rows: 50-50.json is missing beside the subset; "
            "make_subsets.py --ratios 50-50 adds it"
        )
    return rows


def extract(encoder, subset, split, device, args, rows=None):
    """Compute encoder features [n, D] of the evaluation view; returns them and the labels [n]."""
    rows = subset.splits[split] if rows is None else rows
    x = embed(encoder, subset, rows, device, min(args.batch_size, 256), desc=split)
    return x, subset.labels[rows]


def score_probe(probe, x, y, minority):
    with torch.no_grad():
        p = probe(x.to(probe.weight.device)).double().softmax(1)[:, 1].cpu()
    return classification_scores(p, y, minority)


# --------------------------------------------------------------------------------------------------
# the two protocols: each returns a Linear on raw features and what validation chose
# --------------------------------------------------------------------------------------------------


def fit_logistic_regression(encoder, subset, rows, val, device, args):
    """Fit logistic regression to features of the evaluation view."""
    x, y = extract(encoder, subset, "train", device, args, rows)
    strengths = STRENGTHS[2:4] if args.smoke else STRENGTHS
    return best_logistic_regression(x, y, *val, subset.minority, strengths)


def best_logistic_regression(x, y, x_val, y_val, minority, strengths):
    """Fit scikit-learn's LogisticRegression for each strength, keep the best by validation AUROC.

    x float [n, D] raw features, y int [n] of 0 and 1. Features are standardised for the fit and
    classes weighted to balance. Returns (Linear on raw features, what was chosen).
    """
    mean, std = x.double().mean(0), x.double().std(0)
    # a constant feature gets no weight
    std[std < 1e-6] = torch.inf
    x, x_val = (((features.double() - mean) / std).numpy() for features in (x, x_val))
    # warm start: the solution of one strength is where the next one begins
    model = LogisticRegression(class_weight="balanced", tol=1e-6, max_iter=5000, warm_start=True)
    best_auroc = -1.0
    for strength in tqdm(strengths, desc="strengths", leave=False, disable=None):
        model.set_params(C=strength).fit(x, y)
        auroc = classification_scores(model.predict_proba(x_val)[:, 1], y_val, minority)["auroc"]
        # a tie keeps the stronger regularisation
        if auroc > best_auroc:
            best_auroc, chosen = auroc, {"C": strength, "val_auroc": auroc}
            weight, bias = torch.from_numpy(model.coef_[0]) / std, float(model.intercept_[0])
    return linear_layer(weight, bias - float(weight @ mean)), chosen


def linear_layer(weight, bias):
    """Build a Linear with logits -t/2 and t/2, where t = x @ weight + bias.

    Their softmax is the sigmoid of t.
    """
    probe = nn.Linear(len(weight), 2)
    with torch.no_grad():
        probe.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        probe.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return probe


def fit_adam(encoder, subset, rows, val, device, args):
    """Train with Adam on freshly augmented images, keep the best epoch by validation AUROC.

    Cross entropy with balanced class weights; cosine schedule without warm-up.
    """
    labels = torch.from_numpy(subset.labels)
    torch.manual_seed(args.seed)
    probe = nn.Linear(encoder.dim, 2).to(device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=LR)
    weights = class_weights(np.bincount(subset.labels[rows], minlength=2)).to(device)
    reader = ImageReader(subset.images, rows, device)
    best_auroc = -1.0
    for epoch in tqdm(range(args.epochs), desc="epochs", leave=False, disable=None):
        generator = make_generator(args.seed, epoch)
        optimizer.param_groups[0]["lr"] = warmup_cosine(epoch, args.epochs, LR, warmup_epochs=0)
        order = torch.randperm(len(rows), generator=generator).numpy()
        for positions, images in reader(np.array_split(order, -(-len(rows) // args.batch_size))):
            batch = rows[positions]
            sizes = torch.from_numpy(subset.sizes[batch])
            view = augment(images, sizes, subset.recipe, subset.size, generator)
            with torch.no_grad():
                x = encoder(normalize(view, subset.mean, subset.std))
            loss = F.cross_entropy(probe(x), labels[batch].to(device), weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        auroc = score_probe(probe, *val, subset.minority)["auroc"]
        if auroc > best_auroc:
            best_auroc, chosen = auroc, {"epoch": epoch + 1, "val_auroc": auroc}
            best = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    probe.load_state_dict(best)
    return probe.cpu(), chosen


# --------------------------------------------------------------------------------------------------
# output
# --------------------------------------------------------------------------------------------------


def print_scores(result, subset):
    header = "".join(f"{name:>10}" for name in ("accuracy", "balanced", "AUROC", "F1"))
    print(f"{'percent':24}{header}    F1 of '{subset.classes[subset.minority]}'")
    for name in ("val", "test", "test_balanced_train"):
        if result[name]:
            print(f"{name:24}" + "".join(f"{100 * value:10.1f}" for value in result[name].values()))


def predict(encoder, subset, out, device, args):
    """Write the class probabilities of new images with the probe in `out`."""
    probe = nn.Linear(encoder.dim, 2)
    load_strict(probe, load_tensors(out / "probe.pt"), out / "probe.pt")
    network = nn.Sequential(encoder, probe.to(device))
    predict_folder(network, subset, args.predict, args.new_images, args.csv, device)


if __name__ == "__main__":
    run_main(main)
