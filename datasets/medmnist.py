"""BreastMNIST and PneumoniaMNIST (MedMNIST v2) with their official splits."""

import os
import tempfile
from pathlib import Path

import medmnist

from datasets import DATASETS, medmnist_files
from datasets.npz import npz_source
from utils.cli import UserError


def load(args):
    """Load the file of --size pixels; --download fetches it if it is missing."""
    files = medmnist_files(args.dataset)
    if args.size not in files:
        sizes = ", ".join(map(str, sorted(files)))
        raise UserError(f"--size {args.size}: {args.dataset} has {sizes} pixels; choose one")
    path = Path(args.data_root, files[args.size])
    if not path.exists() and args.download:
        download(args.dataset, args.size, path)
    if not path.exists():
        other = DATASETS[args.dataset].find(args.data_root)
        raise UserError(
            f"{path}: no such file; fetch it with --download, or get {path.name} from medmnist.com "
            f"and put it into {path.parent}" + (f"; --size {other[1]} is there" if other else "")
        )
    return npz_source(args, path)


def download(name, size, path):
    """Download a MedMNIST file into a temporary folder beside its place, then move it there."""
    dataset = getattr(medmnist, medmnist.INFO[name]["python_class"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        try:
            dataset(split="train", root=folder, size=size, download=True)
        except (RuntimeError, ValueError, OSError):
            raise UserError(
                f"--download: could not fetch {path.name}; get it from medmnist.com and put it "
                f"into {path.parent}"
            ) from None
        os.replace(Path(folder) / path.name, path)
