"""BreastMNIST and PneumoniaMNIST (MedMNIST v2) with their own splits."""

import os
import tempfile
from pathlib import Path

import medmnist

from datasets import MEDMNIST_SIZES, medmnist_file
from datasets.npz import npz_source
from utils.cli import UserError


def load(args):
    """BreastMNIST and PneumoniaMNIST with their own splits; --size says which file."""
    size, root = args.size or 224, Path(args.data_root)
    if size not in MEDMNIST_SIZES:
        raise UserError(
            f"--size {size}: {args.dataset} comes in {', '.join(map(str, sorted(MEDMNIST_SIZES)))} pixels; choose one of them"
        )
    path = root / medmnist_file(args.dataset, size)
    if not path.exists() and args.download:
        download_medmnist(
            getattr(medmnist, medmnist.INFO[args.dataset]["python_class"]), size, path
        )
    if not path.exists():
        there = [
            s for s in sorted(MEDMNIST_SIZES) if (root / medmnist_file(args.dataset, s)).exists()
        ]
        others = "".join(
            f"; {medmnist_file(args.dataset, s)} is there: use --size {s}" for s in there
        )
        raise UserError(
            f"{path}: no such file; --download fetches it, or get {path.name} from medmnist.com (Zenodo) "
            f"and put it into {root}{others}"
        )
    source = npz_source(args, path)
    if source.side != size:
        raise UserError(
            f"{path}: holds images of {source.side} px, not {size}; move it away and fetch it again with --download"
        )
    return source


def download_medmnist(dataset, size, path):
    """Fetch a MedMNIST file beside its place, then move it there: no half download is ever taken for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        try:
            dataset(split="train", root=folder, size=size, download=True)
        except (RuntimeError, ValueError, OSError):
            raise UserError(
                f"--download: could not fetch {path.name}; get it from medmnist.com (Zenodo) "
                f"and put it into {path.parent}"
            ) from None
        os.replace(Path(folder) / path.name, path)
