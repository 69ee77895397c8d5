"""Time and memory of the losses, relative to the masked form of the public SupCon code."""

from functools import partial

import numpy as np
import torch

from benchmarks.synthetic import DIM, synthetic_embeddings
from benchmarks.timing import compare_times, measure_peak_memory, time_in_rounds, time_step
from common import (
    Amp,
    ContrastiveModel,
    antipodal_prototypes,
    ntxent_loss,
    supcon_loss,
    supmin_loss,
    suppro_loss,
)
from utils.runs import make_generator

ROWS = (512, 2048, 4096, 16384)
MIN_SECONDS = 0.2  # of each variant in each round


def masked_loss(z, labels, temperature=0.07):
    """Compute SupCon with masks [V*N, V*N], as the public SupCon code does. z [N, V, D]."""
    n, views, _ = z.shape
    rows = torch.cat(z.unbind(1))  # [V*N, D]
    mask = (labels[:, None] == labels).float().repeat(views, views)
    logits = rows @ rows.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    itself = torch.arange(n * views, device=z.device)[:, None]
    logits_mask = torch.ones_like(mask).scatter(1, itself, 0)
    mask = mask * logits_mask
    exp_logits = logits.exp() * logits_mask
    log_prob = logits - exp_logits.sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


PROTOTYPES = antipodal_prototypes(DIM, make_generator(0))
LOSSES = {
    "masked": masked_loss,
    "ntxent": lambda z, labels: ntxent_loss(z),
    "supcon": supcon_loss,
    "supmin": lambda z, labels: supmin_loss(z, labels, 1),
    "suppro": lambda z, labels: suppro_loss(z, labels, PROTOTYPES),
}


def measure_losses(args, device):
    """Measure forward and backward: time, peak memory and the share of a training step."""
    names = ("masked", "supcon") if args.smoke else tuple(LOSSES)
    results = {rows: {} for rows in ((1024,) if args.smoke else ROWS)}
    for rows, by_name in results.items():
        data = synthetic_embeddings(rows, device)
        for name in names:
            peak = measure_peak_memory(partial(run_loss, name), *data)
            by_name[name] = {"megabytes": peak / 1e6}
    view_seconds = time_network_view(args, device)
    for rows, by_name in results.items():
        data = synthetic_embeddings(rows, device)
        steps = {name: partial(run_loss, name, *data) for name in names}
        seconds = time_in_rounds(steps, args.rounds, MIN_SECONDS)
        for name, row in by_name.items():
            row |= compare_times(seconds[name], seconds["masked"])
            step_seconds = rows * view_seconds + row["seconds"]
            row["percent_of_step"] = 100 * row["seconds"] / step_seconds
    settings = {key: getattr(args, key) for key in ("arch", "size", "batch_size")}
    return {"dimensions": DIM, **settings, "seconds_per_view": view_seconds}, results


def run_loss(name, z, labels):
    """Run the forward and backward pass of a loss."""
    z = z.requires_grad_()
    z.grad = None
    LOSSES[name](z, labels).backward()


def time_network_view(args, device):
    """Return the median seconds of forward and backward through the network for one view."""
    amp = Amp(device, args.amp, args.size)
    model = ContrastiveModel(args.arch).to(device)
    views = torch.randn(2, args.batch_size, 3, args.size, args.size, device=device)

    def step():
        with amp.autocast:
            z = model(views)
        z.sum().backward()

    seconds = [time_step(step) for _ in range(1 + args.rounds)]
    return float(np.median(seconds[1:])) / (2 * args.batch_size)
