"""Speed, measured as ratios within one run: absolute times differ from machine to machine and from minute to minute.

    python benchmark.py methods                                            seconds per training step, relative to SupCon
    python benchmark.py methods --arch resnet18 --size 32 --batch-size 64  small enough for a CPU
    python benchmark.py methods --out results/benchmark                    and keep the figures, with provenance

A step is pretrain.py's own: views, network, loss, optimizer, on images in memory. In every round each method takes its turn, and is
divided by SupCon's time in the same round; the table has the median over rounds, lowest and highest.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pretrain
from common import (SPLITS, ArgumentParser, ContrastiveModel, ImageBatches, Subset, at_least, cli, pick_device, precision,
                    provenance, seeded, write_json)

FORMS = ("supcon", "ntxent", "supmin", "suppro", "kcl", "kcl --queue 1024", "tsc", "tsc --variant paper", "sbcl", "bcl", "paco",
         "paco --variant gpaco")                                 # words after --method
WARMED_UP = 3                                                    # of 4 epochs: past TSC's switch and SBCL's clustering


def parse_args():
    parser = ArgumentParser("Speed as ratios within one run.", smoke=dict(arch="resnet18", size=8, batch_size=8, steps=1, rounds=2))
    parser.add_argument("what", choices=["methods"], help="methods: time per training step of each, relative to SupCon")
    parser.add_argument("--arch", default="resnet50", help="any torchvision ResNet")
    parser.add_argument("--size", type=at_least(8), default=224, metavar="S", help="side of what the network sees, pixels")
    parser.add_argument("--batch-size", type=at_least(2), default=256, help="images")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed together, in each round")
    parser.add_argument("--rounds", type=at_least(2), default=5, help="turns of every method, after one that is not counted")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="auto: bf16 where the GPU has it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--out", type=Path, help="folder for methods.json (default: printed only)")
    parser.add_argument("--smoke", action="store_true", help="tiny network, to see it run")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    result = methods(args, device)
    print(f"\n{provenance(device)['device']}, {args.arch}, {args.size} px, batch {args.batch_size}, --amp {args.amp}: "
          f"{args.rounds} rounds of {args.steps} steps\n")
    print("| method | views | learned beside the network | kept beside it | time per step, SupCon = 1 (lowest - highest) |\n|---|---|---|---|---|")
    for form, row in result.items():
        print(f"| {form} | {row['views']} | {row['learned']:,} | {row['kept']:,} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) |")
    if args.out:
        settings = {key: getattr(args, key) for key in ("arch", "size", "batch_size", "steps", "rounds", "amp", "smoke")}
        write_json(args.out / "methods.json", {**settings, "methods": result, "provenance": provenance(device)})
        print(f"wrote {args.out / 'methods.json'}")


def methods(args, device):
    """Seconds per step of every form of every method on made-up images. Returns {form: {"ratio", "lowest", "highest", "seconds", ...}}."""
    _, autocast, scaler = precision(device, args.amp, args.size)
    subset = made_up_subset(args.batch_size * args.steps, args.size)
    train = ImageBatches(subset.images, subset.splits["train"], device)
    runs, seconds = {}, {form: [] for form in FORMS}
    for form in FORMS:
        options = pretrain.parse_args(["made-up", "--method", *form.split(), "--batch-size", str(args.batch_size), "--epochs", "4"])
        torch.manual_seed(0)
        model = ContrastiveModel(args.arch, pretrain.PROJECTION_DIM).to(device)
        method = pretrain.METHODS[options.method](options, subset, model, seeded(0)).to(device)
        optimizer = torch.optim.SGD([p for p in [*model.parameters(), *method.parameters()] if p.requires_grad], lr=1e-3, momentum=0.9)
        runs[form] = options, model, method, optimizer
    with tqdm(total=(1 + args.rounds) * len(FORMS) * args.steps, unit="step", dynamic_ncols=True) as bar:
        for turn in range(1 + args.rounds):                      # the first is not counted: SBCL clusters in it, caches fill
            for form, (options, model, method, optimizer) in runs.items():
                epoch = WARMED_UP if turn else WARMED_UP - 1
                stats = pretrain.train_one_epoch(epoch, args.steps, model, method, optimizer, scaler, autocast, train, subset, options, bar)
                seconds[form] += [stats["seconds"] / args.steps] if turn else []
    result = {}
    for form, (_, _, method, _) in runs.items():
        ratios = np.array(seconds[form]) / np.array(seconds["supcon"])
        learned = sum(p.numel() for p in method.parameters() if p.requires_grad)
        result[form] = {"ratio": float(np.median(ratios)), "lowest": float(ratios.min()), "highest": float(ratios.max()),
                        "seconds": float(np.median(seconds[form])), "views": method.views, "learned": learned,
                        "kept": sum(t.numel() for t in method.state_dict().values()) - learned}
    return result


def made_up_subset(images, size, minority_share=0.05):
    """Noise in the form of a subset: uint8 [images, size, size, 3], all of it training rows."""
    draw = np.random.default_rng(0)
    labels = (np.arange(images) < max(1, images * minority_share)).astype(np.int64)
    rows, counts = np.arange(images), {str(c): int((labels == c).sum()) for c in (0, 1)}
    return Subset(Path("made-up"), "made-up", "95-5", ["majority", "minority"], 1, dict.fromkeys(SPLITS, counts), dict.fromkeys(SPLITS, rows),
                  draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8), labels, np.full((images, 2), size), size, "natural",
                  [0.5] * 3, [0.25] * 3, "", "")


if __name__ == "__main__":
    cli(main)
