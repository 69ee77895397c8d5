"""Where the time of a training step goes, and what other settings of PyTorch would change."""

import os
from collections import Counter
from functools import partial

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks.synthetic import synthetic_subset
from benchmarks.timing import compare_times, time_in_rounds
from benchmarks.training import TrainingRun, call_without_trials, draw_batch
from common import Amp
from utils.encoders import compile_training

KINDS = {  # parts of the names of PyTorch's operations
    "convolution": ("conv",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "threshold", "clamp_min"),
}
ADDITIONS = ("aten::add", "aten::add_")


def measure_profile(args, device):
    """Measure steps of SupCon on one batch of finished views, with and without torch.profiler."""
    subset = synthetic_subset(args.batch_size * args.steps, args.size)
    batch = draw_batch(args.batch_size, args.size, device)

    def build_step():
        run = TrainingRun(f"--method supcon --arch {args.arch}", subset, args, device)
        return run, partial(run.train_on, batch)

    _, step = build_step()
    step()
    keys = ("arch", "size", "batch_size", "steps", "amp")
    results = {"share": measure_shares(step, args.rounds, device)}
    results["time"] = measure_changes(build_step, args, device)
    return {key: getattr(args, key) for key in keys}, results


def measure_shares(step, rounds, device):
    """Return the percentage of each kind of operation, over the rounds."""
    times = []
    for _ in range(rounds):
        with profile() as profiler:
            step()
        times.append(add_up_kinds(profiler.events(), device))
    shares = {}
    for kind in (*KINDS, "addition", "optimizer", "rest"):
        percent = np.array([100 * time[kind] / time.total() for time in times])
        shares[kind] = {
            "percent": float(np.median(percent)),
            "lowest": float(percent.min()),
            "highest": float(percent.max()),
        }
    return shares


def add_up_kinds(events, device):
    """Return a Counter: microseconds on the device per kind of operation."""
    times, clock = Counter(), "device" if device.type == "cuda" else "cpu"
    for event in events:
        # A kernel's time is also that of the operation that started it.
        if event.device_type == DeviceType.CPU:
            times[kind_of(event)] += getattr(event, f"self_{clock}_time_total")
    return times


def kind_of(event):
    ancestor = event
    while ancestor is not None:
        if ancestor.name.startswith("Optimizer."):
            return "optimizer"
        ancestor = ancestor.cpu_parent
    if event.name in ADDITIONS:
        return "addition"
    for kind, parts in KINDS.items():
        if any(part in event.name.lower() for part in parts):
            return kind
    return "rest"


def measure_changes(build_step, args, device):
    """Return times relative to the kit's step: one setting is changed at a time."""
    variants, threads = {"as it is": build_step()[1]}, torch.get_num_threads()

    run, variants["contiguous weights"] = build_step()
    run.model.to(memory_format=torch.contiguous_format)

    is_fused = device.type == "cuda"
    run, variants["plain optimizer" if is_fused else "fused optimizer"] = build_step()
    for group in run.optimizer.param_groups:
        group["fused"] = not is_fused

    run, variants["zero_grad without set_to_none"] = build_step()
    zero_grad = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda set_to_none: zero_grad(set_to_none=False)

    if not args.smoke:
        run, variants["bf16"] = build_step()
        run.amp = Amp(device, "bf16", args.size)
        run, variants["compiled"] = build_step()
        compile_training(run.model.encoder)

    run, step = build_step()
    variants["views made in the step"] = run.train_epoch

    def step_on_all_cores():
        torch.set_num_threads(os.cpu_count())
        step()
        torch.set_num_threads(threads)

    if device.type == "cuda":
        variants["cuDNN without trials"] = partial(call_without_trials, step)
    else:
        variants[f"{os.cpu_count()} threads"] = step_on_all_cores
    seconds = time_in_rounds(variants, args.rounds)
    return {name: compare_times(seconds[name], seconds["as it is"]) for name in variants}
