"""Time per training step of every method, relative to SupCon."""

from functools import partial

from benchmarks.synthetic import synthetic_subset
from benchmarks.timing import compare_times, time_in_rounds
from benchmarks.training import EPOCHS, TrainingRun

VARIANTS = (
    "supcon",
    "ntxent",
    "supmin",
    "suppro",
    "kcl",
    "kcl --queue 1024",
    "tsc",
    "tsc --variant paper",
    "sbcl",
    "bcl",
    "paco",
    "paco --variant gpaco",
)  # words after --method


def measure_methods(args, device):
    """Measure a training step of pretrain.py on images in memory: views, network, loss, update."""
    subset = synthetic_subset(args.batch_size * args.steps, args.size)
    runs = {
        variant: TrainingRun(f"--method {variant} --arch {args.arch}", subset, args, device)
        for variant in VARIANTS
    }
    # TSC's switch and SBCL's first clustering lie before the last epoch.
    for run in runs.values():
        run.train_epoch(EPOCHS - 2)
    steps = {variant: partial(run.train_epoch, EPOCHS - 1) for variant, run in runs.items()}
    seconds = time_in_rounds(steps, args.rounds)
    results = {}
    for variant, run in runs.items():
        times = compare_times(seconds[variant], seconds["supcon"])
        times["seconds"] /= args.steps
        results[variant] = {**times, "views": run.method.views}
    keys = ("arch", "size", "batch_size", "steps", "amp")
    return {key: getattr(args, key) for key in keys}, results
