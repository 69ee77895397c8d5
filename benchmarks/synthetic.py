"""Synthetic inputs: embeddings, a subset in memory, a folder of photographs."""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import make_subsets
from datasets.source import SPLITS
from datasets.subset import Subset
from utils.runs import make_generator

DIM = 128  # dimensions of synthetic embeddings
MINORITY_SHARE = 0.05
IMAGES_PER_CATEGORY = {"train": 60, "val": 10}
PHOTO_SIZES = [(500, 375), (375, 500), (500, 333), (500, 500)]  # width, height


def synthetic_embeddings(rows, device):
    """Draw unit vectors z [rows / 2, 2, DIM] whose two views are close, and labels [rows / 2]."""
    generator, n = make_generator(0), rows // 2
    image = torch.randn(n, 1, DIM, generator=generator)
    z = F.normalize(image + 0.7 * torch.randn(n, 2, DIM, generator=generator), dim=2)
    labels = (torch.arange(n) < max(2, n * MINORITY_SHARE)).long()
    return z.to(device), labels.to(device)


def synthetic_subset(images, size):
    """Build a Subset in memory: noise uint8 [images, size, size, 3], all rows in every split."""
    labels = (np.arange(images) < max(1, images * MINORITY_SHARE)).astype(np.int64)
    counts = {str(c): int((labels == c).sum()) for c in (0, 1)}
    noise = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    return Subset(
        path=Path("synthetic"),
        name="synthetic",
        ratio="95-5",
        classes=["majority", "minority"],
        minority=1,
        tail=[1],
        counts=dict.fromkeys(SPLITS, counts),
        splits=dict.fromkeys(SPLITS, np.arange(images)),
        images=noise,
        labels=labels,
        sizes=np.full((images, 2), size),
        size=size,
        recipe="natural",
        mean=[0.5] * 3,
        std=[0.25] * 3,
        sha256="",
        rows_sha256="",
    )


def synthetic_photographs(root, categories):
    """Write JPEGs in iNaturalist's layout, 70 of each category. Returns their paths."""
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(write_category, repeat(root), range(categories))
        written = list(tqdm(jobs, total=categories, desc="photographs", disable=None))
    return [path for paths in written for path in paths]


def write_category(root, category):
    """Write the photographs of one category, up to 500 px. Returns their paths."""
    order = "Artiodactyla" if category % 3 == 0 else "Carnivora"
    family, genus = f"Family{category % 20}", f"Genus{category % 100}"
    name = f"{category:05d}_Animalia_Chordata_Mammalia_{order}_{family}_{genus}_species{category}"
    paths = []
    for split, images in IMAGES_PER_CATEGORY.items():
        (root / split / name).mkdir(parents=True)
        for i in range(images):
            paths.append(root / split / name / f"{i:03d}.jpg")
            draw_photograph([category, i, images]).save(paths[-1], quality=85)
    return paths


def draw_photograph(seed):
    """Draw blurred colours with fine noise, which compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    width, height = PHOTO_SIZES[rng.integers(len(PHOTO_SIZES))]
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(coarse).resize((width, height)))
    noisy = blurred + rng.normal(0, 12, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def packing_command(root, out, *flags):
    """Return the make_subsets.py command that packs the photographs below `root` into `out`."""
    command = [sys.executable, make_subsets.__file__, "inat21-mammals", "--data-root", root]
    return [*command, "--ratios", "natural", "--out", out, *flags]
