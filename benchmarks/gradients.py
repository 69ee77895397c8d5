"""Gradients of the losses on synthetic embeddings: how hard each row is moved, and by which pairs.

    python -m benchmarks.gradients --out results/gradients

Writes gradients.json and gradients.png; docs/gradients.md explains them. One CPU core, a minute.
The embeddings have no class structure: what differs between the classes is their number alone.

The gradient of row k is G_k = M * dL/dz_k without its part along z_k, with M = V*N rows in a batch.
The factor M makes batches of different sizes comparable; an optimizer sees dL/dz_k.
"""

import itertools
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.gradient_figure import draw_gradients
from common import antipodal_prototypes, ntxent_loss, supcon_loss, supmin_loss, suppro_loss
from utils.cli import ArgumentParser, run_main
from utils.files import write_json
from utils.runs import make_generator, provenance

DIM, VIEWS, SEEDS, MINORITY = 128, 2, 3, 1
VIEW_NOISE = 0.2  # share of the variance between rows that lies between the views of an image
PROTOTYPES = antipodal_prototypes(DIM, make_generator(0)).double()
LOSSES = {
    "supcon": supcon_loss,
    "ntxent": lambda z, labels, temperature: ntxent_loss(z, temperature),
    "supmin": lambda z, labels, temperature: supmin_loss(z, labels, MINORITY, temperature),
    "suppro": lambda z, labels, temperature: suppro_loss(z, labels, PROTOTYPES, temperature),
}
STATES = {"random": math.inf, "collapsed": 0.01}  # spread of the embeddings
BASE = {"images": 256, "minority": 3, "temperature": 0.07, "relu": False}
SWEEPS = {
    "minority": (1, 2, 3, 4, 8, 16, 32, 64, 128),
    "images": (32, 64, 128, 256, 512, 1024),
    "temperature": (0.05, 0.07, 0.1, 0.2, 0.5, 1.0),
    "relu": (False, True),
}
SPREADS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, math.inf)


def draw_embeddings(images, minority, spread, relu=False, seed=0):
    """Draw unit vectors z [N, V, D] around one point, and labels [N], 1 for the minority.

    spread: root mean square distance of a row from the point; inf: uniform on the sphere.
    relu: end the projection head with a ReLU.
    """
    generator = make_generator(seed)
    point = F.normalize(torch.randn(DIM, generator=generator, dtype=torch.float64), dim=0)
    noise = torch.randn(images, 1 + VIEWS, DIM, generator=generator, dtype=torch.float64)
    noise = (1 - VIEW_NOISE) ** 0.5 * noise[:, :1] + VIEW_NOISE**0.5 * noise[:, 1:]
    z = noise / DIM**0.5
    if math.isfinite(spread):
        z = point + spread * z
    z = z.relu() if relu else z
    return F.normalize(z, dim=2), (torch.arange(images) < minority).long()


def to_rows(x):
    """Return x [N, V, D] as rows [V*N, D], view-major."""
    return x.transpose(0, 1).flatten(0, 1)


def row_gradients(method, z, labels, temperature):
    """Return G [M, D], rows view-major."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[method](z, labels, temperature), z)
    rows = to_rows(z.detach())
    gradient = len(rows) * to_rows(gradient)
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


def pair_weights(method, z, labels, temperature):
    """Return the pairs' part of every gradient: (w [M, M], prototype's weight [M]).

    G_k = sum_a w_ka t_ka - w_k t_k, with t the tangential parts at z_k of z_a and of the own
    prototype. A negative weight attracts.
    """
    rows, image = to_rows(z), torch.arange(len(z)).repeat(z.shape[1])
    labels = labels.repeat(z.shape[1])
    group = {
        "supcon": labels,
        "supmin": torch.where(labels == MINORITY, -1, image),
    }.get(method, image)
    s = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    positive = (group[:, None] == group).double().fill_diagonal_(0)
    attracted = torch.zeros(len(rows), dtype=torch.float64)
    if method == "suppro":
        attracted = ((rows * PROTOTYPES[labels]).sum(1) <= 0.5).double()
    n_positive = positive.sum(1) + attracted
    own = s.softmax(1) - positive / n_positive[:, None]
    return (own + own.T) / temperature, attracted / n_positive / temperature


def majority_shares(method, z, labels, temperature):
    """Return the share of every row's gradient [M] that comes from its pairs with the majority.

    It is the sum of the lengths of these pairs' terms, divided by that of all terms.
    """
    rows, labels = to_rows(z), labels.repeat(z.shape[1])
    weights, prototype_weight = pair_weights(method, z, labels[: len(z)], temperature)
    terms = weights.abs() * (1 - (rows @ rows.T).square()).clamp(min=0).sqrt()
    own_cosine = (rows * PROTOTYPES[labels]).sum(1)
    prototype_term = prototype_weight * (1 - own_cosine.square()).sqrt()
    return terms[:, labels != MINORITY].sum(1) / (terms.sum(1) + prototype_term)


def supcon_bound(other_rows, rows, diameter, temperature):
    """Bound SupCon's |G_k|: no two rows lie further apart than `diameter`.

    other_rows: rows of the class that k does not belong to; rows: all M of the batch.
    """
    unevenness = math.expm1(diameter**2 / (2 * temperature))
    return 2 * diameter / temperature * (other_rows / (rows - 1) + unevenness)


def outward_parts(gradients, z):
    """Return the part [M] of each step -G_k that leads away from the mean of all rows."""
    rows = to_rows(z)
    away = rows - F.normalize(rows.mean(dim=0), dim=0)
    away = away - (away * rows).sum(1, keepdim=True) * rows
    return -(gradients * F.normalize(away, dim=1)).sum(1)


def measure(spread, images, minority, temperature, relu):
    """Return medians over the rows of a class in SEEDS batches, per method.

    majority, minority: |G|; outwards_of_...: outward_parts; majority_pairs_of_...: majority_shares.
    """
    draws = [draw_embeddings(images, minority, spread, relu, seed) for seed in range(SEEDS)]
    is_minority = (draws[0][1] == MINORITY).repeat(VIEWS).numpy()
    results = {}
    for method in LOSSES:
        values = {"": [], "outwards_of_": [], "majority_pairs_of_": []}
        for z, labels in draws:
            gradients = row_gradients(method, z, labels, temperature)
            values[""].append(gradients.norm(dim=1))
            values["outwards_of_"].append(outward_parts(gradients, z))
            values["majority_pairs_of_"].append(majority_shares(method, z, labels, temperature))
        results[method] = {
            name + rows: float(np.median(torch.stack(found).numpy()[:, mask]))
            for name, found in values.items()
            for rows, mask in (("majority", ~is_minority), ("minority", is_minority))
        }
    diameter = max(float(torch.pdist(to_rows(z)).max()) for z, _ in draws)
    bound = supcon_bound(VIEWS * minority, VIEWS * images, diameter, temperature)
    return results | {"diameter": diameter, "supcon_bound": bound}


def parse_args():
    parser = ArgumentParser("Gradients of four losses on synthetic embeddings.")
    parser.prog = "python -m benchmarks.gradients"
    text = "folder of gradients.json and gradients.png"
    parser.add_argument("--out", type=Path, default=Path("results/gradients"), help=text)
    parser.add_argument("--smoke", action="store_true", help="small batches, to see that it runs")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    base, sweeps = BASE, SWEEPS
    if args.smoke:
        base = BASE | {"images": 64}
        sweeps = {
            name: [value for value in values if value <= 32] for name, values in sweeps.items()
        }
    cases = [
        (state, {**base, "spread": spread, name: value}, name, value)
        for (state, spread), (name, values) in itertools.product(STATES.items(), sweeps.items())
        for value in values
    ]
    cases += [("any", {**base, "spread": spread}, "spread", spread) for spread in SPREADS]
    results = {}
    for state, setting, name, value in tqdm(cases, disable=None):
        by_value = results.setdefault(state, {}).setdefault(name, {})
        by_value[str(value)] = measure(**setting)
    settings = {**base, "dim": DIM, "views": VIEWS, "seeds": SEEDS, "states": STATES}
    origin = provenance(torch.device("cpu"))
    origin["command"] = shlex.join(["python", "-m", "benchmarks.gradients", *sys.argv[1:]])
    record = {"settings": settings, **results, "provenance": origin}
    write_json(args.out / "gradients.json", record)
    draw_gradients(record, args.out / "gradients.png")
    print(f"wrote {args.out}/gradients.json, gradients.png")


if __name__ == "__main__":
    # Error messages begin with this name.
    sys.argv[0] = "benchmarks.gradients"
    run_main(main)
