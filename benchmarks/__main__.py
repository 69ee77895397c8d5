"""Speed, measured as ratios within one run on synthetic data.

    python -m benchmarks methods    training step of every method, relative to SupCon
    python -m benchmarks networks   training images per second of every network
    python -m benchmarks profile    shares of a training step, and what other settings change
    python -m benchmarks losses     time and memory of the losses, relative to the masked form
    python -m benchmarks subsets    packing 15,120 photographs, relative to a plain Pillow loop
    python -m benchmarks pipeline   pre-training relative to its network and to published code
    python -m benchmarks reading    batches from a packed file, relative to one plain thread
    python -m benchmarks metrics    the six metrics, relative to NumPy

Absolute times differ between machines and between minutes. Therefore all variants run once in
every round, in turn, and each time is divided by the reference's time of the same round. The
results hold the median over the rounds, the lowest and the highest ratio.
"""

import shlex
import sys
from pathlib import Path

from benchmarks.losses import measure_losses
from benchmarks.methods import measure_methods
from benchmarks.metrics import measure_metrics
from benchmarks.networks import measure_networks
from benchmarks.pipeline import measure_pipeline
from benchmarks.profile import measure_profile
from benchmarks.reading import measure_reading
from benchmarks.subsets import measure_subsets
from benchmarks.timing import print_table
from utils.cli import ArgumentParser, number_from, run_main
from utils.distributed import pick_device
from utils.files import write_json
from utils.runs import AMP_MODES, provenance

BENCHMARKS = {
    "methods": measure_methods,
    "networks": measure_networks,
    "profile": measure_profile,
    "losses": measure_losses,
    "subsets": measure_subsets,
    "pipeline": measure_pipeline,
    "reading": measure_reading,
    "metrics": measure_metrics,
}
SMOKE = dict(arch="resnet8", size=8, sizes=[8], batch_size=8, steps=1, rows=1000, rounds=2)


def parse_args():
    parser = ArgumentParser("Speed as ratios within one run.", smoke=SMOKE)
    parser.prog = "python -m benchmarks"
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="what to measure")
    add("--arch", default="resnet50", help="network of methods, profile, losses and pipeline")
    add(
        "--size",
        type=number_from(8),
        default=224,
        metavar="S",
        help="methods, profile, losses: side of the network's input in pixels",
    )
    text = "networks, pipeline, reading: sides of the images (default: those of docs/speed.md)"
    add("--sizes", type=number_from(8), nargs="+", metavar="S", help=text)
    add("--batch-size", type=number_from(2), default=256, help="images per training step")
    add("--steps", type=number_from(1), default=5, help="training steps timed in each round")
    add(
        "--amp",
        choices=AMP_MODES,
        default="auto",
        help="precision of the network; auto: bf16 where the GPU has it",
    )
    add("--rows", type=number_from(1000), default=20000, help="metrics: embeddings of two views")
    add("--rounds", type=number_from(1), default=5, help="rounds in which every variant runs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")
    add("--out", type=Path, metavar="FOLDER", help="write FOLDER/<benchmark>.json")
    add("--smoke", action="store_true", help="tiny inputs, to see that it runs")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device, deterministic=False)
    # Recorded first: the code may be edited while a benchmark runs.
    record = provenance(device)
    record["command"] = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    settings, results = BENCHMARKS[args.benchmark](args, device)
    words = [f"{args.rounds} rounds", *(f"{key} {value}" for key, value in settings.items())]
    print(f"\n{args.benchmark} on {record['device']}: {', '.join(words)}\n")
    print_table(results)
    if args.out:
        path = args.out / f"{args.benchmark}.json"
        run = {"rounds": args.rounds, "smoke": args.smoke}
        write_json(path, {**settings, **run, args.benchmark: results, "provenance": record})
        print(f"wrote {path}")


if __name__ == "__main__":
    # Error messages begin with this name.
    sys.argv[0] = "benchmarks"
    run_main(main)
