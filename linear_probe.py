"""Linear probe: how much of the classes a frozen encoder shows to a linear classifier.

    python linear_probe.py runs/digits/99-1/supmin/seed0                                 features once, exact convex fit
    python linear_probe.py runs/digits/99-1/supmin/seed0 --protocol reference            Adam, augmented, 100 epochs
    python linear_probe.py runs/digits/99-1/supmin/seed0 --predict photos --csv out.csv  probabilities for new images

Two probes are trained, since the paper leaves open which it reports: `test` on the run's own imbalanced training rows, with classes
weighted to balance, and `test_balanced_train` on the training rows of the 50-50 subset beside it, where there is one. Strength or epoch is
chosen by validation AUROC; the test split is read once. The encoder is in eval mode and proved bit-identical before and after: batch-norm
statistics are part of what is frozen. Writes probe.json and probe.pt; a probe of the other protocol is kept beside as probe_<protocol>.json.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import (
    ImageReader,
    augment,
    class_weights,
    classification_scores,
    embed,
    load_run,
    load_strict,
    load_subset,
    load_tensors,
    make_generator,
    module_sha256,
    normalize,
    pick_device,
    predict_folder,
    provenance,
    save_tensors,
    warmup_cosine,
)
from datasets.images import list_prediction_images
from utils.cli import ArgumentParser, UserError, number_from, run_main
from utils.files import lock_folder, read_json, write_json


def parse_args():
    parser = ArgumentParser("Linear probe of a finished run.", smoke=dict(epochs=2, batch_size=64))
    parser.add_argument(
        "runs",
        metavar="run",
        type=Path,
        nargs="+",
        help="run folder from pretrain.py or finetune.py, or several",
    )
    parser.add_argument(
        "--protocol",
        choices=["cached", "reference"],
        default="cached",
        help="cached: convex fit on features; reference: Adam, augmented",
    )
    parser.add_argument(
        "--epochs", type=number_from(1), default=100, help="reference protocol only"
    )
    parser.add_argument(
        "--batch-size", type=number_from(1), default=1024, help="images, of the reference protocol"
    )
    parser.add_argument(
        "--seed",
        type=number_from(0),
        default=0,
        help="reference protocol: of weights, order and augmentation",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA where there is one",
    )
    parser.add_argument(
        "--predict",
        type=Path,
        metavar="FOLDER",
        help="classify the images below this folder, with --csv",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="where --predict writes file, probability, class"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of probe.json, for one run (default: the run folder)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few images; two strengths, or two epochs"
    )
    args = parser.parse_args()
    args.new_images = list_prediction_images(args.predict, args.csv)
    if len(args.runs) > 1 and (args.out or args.predict):
        raise UserError("--out and --predict: are meant for one run; give a single run folder")
    return args


STRENGTHS = [
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
]  # C of scikit-learn's LogisticRegression: weight of the data against the L2 norm
LR = 3e-4  # of Adam in the reference protocol


def main():
    args = parse_args()
    device = pick_device(args.device)
    for run in args.runs:
        _, subset, encoder = load_run(run, args.smoke)
        encoder.to(device)
        out = args.out or run
        balanced, balanced_sha256 = balanced_rows(subset, args.smoke)
        settings = {
            "protocol": args.protocol,
            "smoke": args.smoke,
            "encoder_sha256": module_sha256(encoder),
            "balanced_sha256": balanced_sha256,
            **(
                {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
                if args.protocol == "reference"
                else {}
            ),
        }
        if finished(out, settings):
            print(f"finished already: {out / 'probe.json'}")
        else:
            facts = provenance(device, others=[other for other in args.runs if other != run])
            probe_run(encoder, subset, balanced, out, settings, device, args, facts)
        if args.predict:
            probe = nn.Linear(encoder.dim, 2)
            load_strict(probe, load_tensors(out / "probe.pt"), out / "probe.pt")
            predict_folder(
                nn.Sequential(encoder, probe.to(device)),
                subset,
                args.predict,
                args.new_images,
                args.csv,
                device,
            )
    print(
        "next: python evaluate_metrics.py "
        + " ".join(map(str, args.runs[:3]))
        + (" ..." if len(args.runs) > 3 else "")
    )


def probe_run(encoder, subset, balanced, out, settings, device, args, facts):
    """Train both probes of one run, read the test split once for each, write probe.json and probe.pt."""
    lock_folder(out, "-probe")
    val, test = (
        features(encoder, subset, subset.splits[split], device, args, desc=split)
        for split in ("val", "test")
    )
    fit = fit_logistic_regression if args.protocol == "cached" else fit_adam
    result = {"test": None, "val": None, "test_balanced_train": None, "val_balanced_train": None}
    for ending, rows in (("", subset.splits["train"]), ("_balanced_train", balanced)):
        if rows is not None:
            probe, chosen = fit(encoder, subset, rows, val, device, args)
            result.update(
                {
                    "val" + ending: probe_scores(probe, *val, subset),
                    "test" + ending: probe_scores(probe, *test, subset),
                    "chosen" + ending: chosen,
                }
            )
            if not ending:
                (out / "probe.json").unlink(
                    missing_ok=True
                )  # it would vouch for another probe.pt, if this ended between the two
                save_tensors(out / "probe.pt", probe.state_dict())
        elif subset.ratio != "50-50":
            print(
                "no probe on balanced rows: there is no 50-50 subset beside this one; make_subsets.py --ratios 50-50 adds it"
            )
    if module_sha256(encoder) != settings["encoder_sha256"]:
        raise RuntimeError("the probe changed the encoder it was to leave frozen")
    write_json(
        out / "probe.json",
        {
            **result,
            **settings,
            "classes": subset.classes,
            "minority": subset.minority,
            "provenance": facts,
        },
    )
    print_scores(result, subset)
    print(f"wrote {out / 'probe.json'}")


def finished(out, settings):
    """True if probe.json holds these settings. A probe of the other protocol moves aside, to be lost to nobody."""
    if not (out / "probe.json").exists() or not (out / "probe.pt").exists():
        return False
    old = read_json(out / "probe.json", "delete it")
    if all(old.get(key) == value for key, value in settings.items()):
        return True
    if settings["smoke"] and not old.get("smoke"):
        raise UserError(
            f"{out / 'probe.json'}: holds a real probe, which a smoke probe would replace; choose another folder with --out"
        )
    if old.get("protocol") != settings["protocol"]:
        os.replace(out / "probe.json", out / f"probe_{old.get('protocol')}.json")
    return False


def balanced_rows(subset, smoke):
    """Training rows of the 50-50 subset beside this one, and the checksum of its rows; None, None where there is none."""
    path = subset.path.with_name("50-50.json")
    if subset.ratio == "50-50" or not path.exists():
        return None, None
    sibling = load_subset(
        path, verify=False
    )  # its images.npy is the one that was verified with the run
    if sibling.sha256 != subset.sha256:
        return None, None
    return (sibling.limit_for_smoke() if smoke else sibling).splits["train"], sibling.rows_sha256


def features(encoder, subset, rows, device, args, desc):
    """Encoder features [n, D] of the evaluation view, and labels [n]."""
    return embed(
        encoder, subset, rows, device, min(args.batch_size, 256), desc=desc
    ), subset.labels[rows]


def probe_scores(probe, x, y, subset):
    with torch.no_grad():
        return classification_scores(probe.cpu()(x).double().softmax(1)[:, 1], y, subset.minority)


# the two protocols: each returns a Linear on the raw features and what validation chose -------------------------------


def fit_logistic_regression(encoder, subset, rows, val, device, args):
    """Logistic regression with balanced class weights on standardised features of the evaluation view; C by validation AUROC."""
    x, y = features(encoder, subset, rows, device, args, desc="train")
    return best_logistic_regression(
        x, y, *val, subset.minority, STRENGTHS[2:4] if args.smoke else STRENGTHS
    )


def best_logistic_regression(x, y, x_val, y_val, minority, strengths):
    """The Linear of the strength with the best validation AUROC, on raw features float [n, D], and what was chosen. y int [n], 0 or 1."""
    mean, std = x.double().mean(0), x.double().std(0)
    std[std < 1e-6] = torch.inf  # a feature that never changes gets no weight
    x, x_val = (((rows - mean) / std).float() for rows in (x, x_val))
    best_auroc = -1.0
    for strength, w in zip(
        strengths,
        tqdm(
            logistic_regressions(x, y, strengths),
            desc="strengths",
            leave=False,
            total=len(strengths),
        ),
    ):
        auroc = classification_scores((x_val.double() @ w[:-1] + w[-1]).sigmoid(), y_val, minority)[
            "auroc"
        ]
        if auroc > best_auroc:  # a tie keeps the stronger regularisation
            best, best_auroc, chosen = w, auroc, {"C": strength, "val_auroc": auroc}
    weight = best[:-1] / std  # undo the standardisation: the probe takes raw features
    bias = float(best[-1]) - float(weight @ mean)
    probe = nn.Linear(x.shape[1], 2)
    with torch.no_grad():  # logits -t/2 and t/2: their softmax is the sigmoid of t
        probe.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        probe.bias.copy_(torch.tensor([-bias / 2, bias / 2]))
    return probe, chosen


def logistic_regressions(x, y, strengths):
    """Yield w [D + 1], float64, bias last: scikit-learn's LogisticRegression(C, class_weight="balanced") for each C, from small to large.

    x float32 [n, D] standardised, y int [n], 0 or 1. Minimises  sum_i a_i (log(1 + exp t_i) - y_i t_i) + |w|^2 / (2 C n),  t = x w + b,
    a_i = 1 / (2 n_y), by L-BFGS from the solution before, in coordinates in which the Hessian there is the identity: a dozen passes over x
    for each C instead of hundreds. Its products in float32 set the limit: at C = 10 about 0.001 in the probabilities.
    """
    from scipy.optimize import minimize

    x, y = F.pad(x, (0, 1), value=1.0), torch.as_tensor(y)
    a, w = 0.5 / y.bincount().double()[y], torch.zeros(x.shape[1], dtype=torch.float64)
    for i, C in enumerate(strengths):
        penalty = torch.full_like(w, 1 / (C * len(x)))
        penalty[-1] = 0  # the bias is free
        if i % 2 == 0:  # the Hessian serves the next C, too: it costs as much as a fit
            p = (x @ w.float()).sigmoid()
            rooted = x * (a * p * (1 - p)).sqrt().float()[:, None]
            hessian = (rooted.T @ rooted).double() + penalty.diag()
            hessian.diagonal().add_(
                1e-7 * hessian.trace()
            )  # more than float32 has rounded off, so that there is a root
            root = torch.linalg.cholesky(hessian).float()  # u = root^T w

        def solve(factor, v, upper):
            return (
                torch.linalg.solve_triangular(factor, v.float()[:, None], upper=upper)
                .squeeze(1)
                .double()
            )

        def loss(u):
            w = solve(root.T, torch.from_numpy(u), upper=True)
            t = (x @ w.float()).double()
            gradient = (x.T @ (a * (t.sigmoid() - y)).float()).double() + penalty * w
            return float(a @ (F.softplus(t) - y * t) + penalty @ w**2 / 2), solve(
                root, gradient, upper=False
            ).numpy()

        u = minimize(
            loss,
            root.T @ w.float(),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 20, "ftol": 1e-10, "gtol": 1e-5},
        ).x
        w = solve(root.T, torch.from_numpy(u), upper=True)
        yield w


def fit_adam(encoder, subset, rows, val, device, args):
    """Adam on freshly augmented images, cosine without warm-up, cross entropy with balanced class weights; epoch by validation AUROC."""
    labels = torch.from_numpy(subset.labels)
    torch.manual_seed(args.seed)
    probe = nn.Linear(encoder.dim, 2).to(device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=LR)
    weights = class_weights(np.bincount(subset.labels[rows], minlength=2)).to(device)
    train = ImageReader(subset.images, rows, device)
    best_auroc = -1.0
    for epoch in tqdm(range(args.epochs), desc="epochs", leave=False):
        generator = make_generator(args.seed, epoch)
        optimizer.param_groups[0]["lr"] = warmup_cosine(epoch, args.epochs, LR, warmup_epochs=0)
        order = torch.randperm(len(rows), generator=generator).numpy()
        for positions, images in train(np.array_split(order, -(-len(rows) // args.batch_size))):
            batch = rows[positions]
            view = augment(
                images, torch.from_numpy(subset.sizes[batch]), subset.recipe, subset.size, generator
            )
            with torch.no_grad():
                x = encoder(normalize(view, subset.mean, subset.std))
            loss = F.cross_entropy(probe(x), labels[batch].to(device), weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            auroc = classification_scores(
                probe(val[0].to(device)).softmax(1)[:, 1].cpu(), val[1], subset.minority
            )["auroc"]
        if auroc > best_auroc:
            best_auroc, chosen = auroc, {"epoch": epoch + 1, "val_auroc": auroc}
            best = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    probe.load_state_dict(best)
    return probe, chosen


def print_scores(result, subset):
    print(
        f"{'percent':24}{'accuracy':>10}{'balanced':>10}{'AUROC':>10}{'F1':>10}    F1 of '{subset.classes[subset.minority]}'"
    )
    for name in ("val", "test", "test_balanced_train"):
        if result[name]:
            print(f"{name:24}" + "".join(f"{100 * value:10.1f}" for value in result[name].values()))


if __name__ == "__main__":
    run_main(main)
