"""Pre-training from disk, relative to its network alone and to loops with a DataLoader."""

import csv
import math
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.losses import masked_loss
from benchmarks.synthetic import packing_command, synthetic_photographs
from benchmarks.timing import compare_throughput, time_in_rounds
from benchmarks.training import TrainingRun, call_without_trials, draw_batch
from common import Amp
from datasets.augment import RECIPES
from datasets.loader import BatchLoader
from datasets.subset import load_subset
from utils.encoders import compile_training

SIZES = (28, 64, 224)  # pixels


def measure_pipeline(args, device):
    """Measure throughput per image size: pre-training, the compiled network, augmented views."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        root = Path(folder)
        # A category has 60 training images; make_subsets.py moves some of them to validation.
        synthetic_photographs(root, max(2, math.ceil(args.batch_size * args.steps / 50)))
        for size in args.sizes or SIZES:
            command = packing_command(root, root / str(size), "--size", str(size))
            subprocess.run(command, capture_output=True, check=True)
            subset = load_subset(root / str(size) / "inat21-mammals" / "natural.json")
            results[size] = {
                **measure_steps(args, device, subset),
                "views": measure_views(args, device, subset, root),
            }
    return {key: getattr(args, key) for key in ("arch", "batch_size", "steps", "amp")}, results


def measure_steps(args, device, subset):
    """Measure full training steps against the network alone and against published code.

    A network step trains on one batch of finished views that stays on the device: as it is, with
    --compile and, on a GPU, without trials of cuDNN's algorithms. A published step has the form of
    the public SupCon code: transforms of single images in a DataLoader, and a masked loss. The fast
    step is a full one with --amp bf16 --compile.
    """
    flags = f"--method supcon --arch {args.arch}"
    run, compiled, fast = (TrainingRun(flags, subset, args, device) for _ in range(3))
    if not args.smoke:
        fast.amp = Amp(device, "bf16", subset.size)
        for network in (compiled.model, fast.model):
            compile_training(network.encoder)
    loader = published_loader(args, device, subset)

    def train_as_published():
        for views, batch_labels in loader:
            x = torch.stack(views).to(device, non_blocking=True)
            with run.amp.autocast:
                loss = masked_loss(run.model(x).transpose(0, 1), batch_labels.to(device))
            run.amp.step(loss, run.optimizer)

    batch = draw_batch(args.batch_size, subset.size, device)
    variants = {
        "network_step": partial(run.train_on, batch),
        "full_step": run.train_epoch,
        "compiled_step": partial(compiled.train_on, batch),
        "published": train_as_published,
        "fast_step": fast.train_epoch,
    }
    if device.type == "cuda":
        variants["untried_step"] = partial(call_without_trials, variants["network_step"])
    seconds = time_in_rounds(variants, args.rounds)
    images, reference = args.steps * args.batch_size, seconds["network_step"]
    results = {
        "step": compare_throughput(seconds["full_step"], reference, images),
        "compiled": compare_throughput(seconds["compiled_step"], reference, images),
        "published": compare_throughput(seconds["full_step"], seconds["published"], images),
        "fast": compare_throughput(seconds["fast_step"], seconds["published"], images),
    }
    if "untried_step" in seconds:
        results["untried"] = compare_throughput(seconds["untried_step"], reference, images)
    return results


def published_loader(args, device, subset):
    """Return a DataLoader of two views and labels, made from the packed images one by one."""
    rows = subset.splits["train"][: args.batch_size * args.steps]
    images = [Image.fromarray(image) for image in subset.images[rows]]
    views, labels = TwoViews(images, subset), torch.from_numpy(subset.labels[rows])
    return build_loader(torch.utils.data.StackDataset(views, labels), args, device)


def build_loader(dataset, args, device):
    """Return a DataLoader with as many workers as this process has threads."""
    return torch.utils.data.DataLoader(
        dataset,
        args.batch_size,
        num_workers=torch.get_num_threads(),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def measure_views(args, device, subset, root):
    """Measure two normalised views per image from the packed file against a DataLoader."""
    rows = subset.splits["train"][: args.batch_size * args.steps]
    with open(subset.path.with_name("index.csv"), newline="", encoding="utf-8") as file:
        names = [row["source"] for row in csv.DictReader(file)]
    loader = build_loader(TwoViews([root / names[row] for row in rows], subset), args, device)
    batches = np.split(np.arange(len(rows)), args.steps)
    packed = BatchLoader(subset, rows, device, lambda generator: batches, views=2)

    def packed_views():
        for _ in packed.epoch(0, seed=0):
            pass

    def loader_views():
        for views in loader:
            torch.cat(views).to(device, non_blocking=True)

    seconds = time_in_rounds({"reference": loader_views, "packed": packed_views}, args.rounds)
    return compare_throughput(seconds["packed"], seconds["reference"], 2 * len(rows))


def torchvision_recipe(subset):
    """Return the subset's augmentation as torchvision transforms of one PIL image."""
    recipe = RECIPES[subset.recipe]
    return v2.Compose(
        [
            v2.RandomResizedCrop(subset.size, scale=recipe["area"]),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*recipe["jitter"])], recipe["p_jitter"]),
            v2.RandomGrayscale(recipe["p_gray"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(subset.mean, subset.std),
        ]
    )


class TwoViews(torch.utils.data.Dataset):
    """Transform a PIL image, or the path of one that is decoded when it is needed, twice."""

    def __init__(self, images, subset):
        self.images, self.transform = images, torchvision_recipe(subset)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        image = image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")
        return self.transform(image), self.transform(image)
