"""Estimate the hours of the training commands on stdin from the speed of finished runs.

bash run_all.sh list | python reporting/estimate.py runs 0 1     # folder of runs, device ids
"""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path


def is_finished(out, command):
    """Tell whether run folder `out` holds everything that its command trains."""
    retrained = [f"{name}/finetune.json" for name in re.findall(r"--retrain (\w+)", command)]
    return all((out / file).exists() for file in ["encoder.pt", *retrained])


def count_images(subset, command):
    """Return the training images times epochs of a command; 0 where its subset is missing."""
    if not subset.exists():
        return 0
    training = command.split("&&")[0]
    epochs = re.findall(r"--epochs[ =](\d+)", training)
    counts = json.loads(subset.read_text())["counts"]["train"]
    return sum(counts.values()) * int(epochs[-1] if epochs else 100)


def mean_seconds(runs, dataset, committed=Path("results/runs.jsonl")):
    """Return the seconds per training image in the logs of a data set; None without a log."""
    text = "".join(log.read_text() for log in runs.glob(f"{dataset}/*/*/seed*/log.jsonl"))
    if not text and runs == Path("runs/evidence") and committed.exists():
        lines = committed.read_text().splitlines()
        text = "".join(line for line in lines if f'"dataset": "{dataset}"' in line)
    seconds = [1 / float(speed) for speed in re.findall(r'"images_per_s": ([\d.]+)', text)]
    return sum(seconds) / len(seconds) if seconds else None


def main():
    runs, devices = Path(sys.argv[1]), sys.argv[2:]
    total, missing, images, hours = (Counter() for _ in range(4))
    for command in sys.stdin:
        words = shlex.split(command)
        subset, out = Path(words[2]), Path(words[words.index("--out") + 1])
        dataset = subset.parent.name
        total[dataset] += 1
        if not is_finished(out, command):
            missing[dataset] += 1
            images[dataset] += count_images(subset, command)
    for dataset in total:
        seconds = mean_seconds(runs, dataset)
        hours[dataset] = images[dataset] * (seconds or 0) / 3600
        work = f"{images[dataset]:,} training images" if images[dataset] else "subset not made yet"
        time = f"{hours[dataset]:.1f} hours" if seconds else "speed not measured yet"
        details = f": {work}, {time}" if missing[dataset] else ""
        print(f"{dataset}: {total[dataset]} runs, {missing[dataset]} to do{details}")
    if any(hours.values()):
        at_least = any(images[dataset] and not hours[dataset] for dataset in total)
        unit = "CPU" if "cpu" in devices else "GPU"
        all_hours = sum(hours.values())
        print(
            f"all: {sum(missing.values())} runs to do, {'at least ' * at_least}{all_hours:.1f} "
            f"{unit} hours, {all_hours / len(devices):.1f} hours with {len(devices)} at a time"
        )


if __name__ == "__main__":
    main()
