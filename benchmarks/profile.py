"""Where the time of a training step goes: the share of each kind of operation."""

from collections import Counter

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks.synthetic import synthetic_subset
from benchmarks.training import TrainingRun
from datasets.loader import Batch

KINDS = {  # parts of the names of PyTorch's operations, of which the first match counts
    "convolution": ("conv",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "threshold", "clamp_min"),
    "optimizer": ("optimizer", "sgd", "_foreach"),
    "addition": ("aten::add",),
}


def measure_profile(args, device):
    """Measure steps of SupCon on one batch of finished views with torch.profiler, per round."""
    subset = synthetic_subset(args.batch_size, args.size)
    run = TrainingRun(f"--method supcon --arch {args.arch}", subset, args, device)
    views = torch.randn(2, args.batch_size, 3, args.size, args.size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 2
    batch = Batch(views, labels, labels.cpu(), positions=None, generator=None)
    run.train_on(batch)
    rounds = []
    for _ in range(args.rounds):
        with profile() as profiler:
            run.train_on(batch)
        rounds.append(add_up_kinds(profiler, device))
    results = {}
    for kind in (*KINDS, "rest"):
        percent = np.array([100 * times[kind] / times.total() for times in rounds])
        results[kind] = {
            "percent": float(np.median(percent)),
            "lowest": float(percent.min()),
            "highest": float(percent.max()),
        }
    keys = ("arch", "size", "batch_size", "steps", "amp")
    return {key: getattr(args, key) for key in keys}, results


def add_up_kinds(profiler, device):
    """Return a Counter: microseconds on the device per kind of operation."""
    on_gpu, times = device.type == "cuda", Counter()
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time the operation that started it has, too
        name = event.key.lower()
        matches = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[next(matches, "rest")] += time
    return times
