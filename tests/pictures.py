"""Small pictures, folders of them in the layouts of the data sets, and checks of their subsets."""

import csv

import numpy as np
from PIL import Image

from common import load_subset
from datasets.source import SPLITS


def picture(path, seed=0, size=(24, 16), mode="RGB", **options):
    """Save a smooth picture with its own colours; size is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng([7, seed]).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(path, **options)


def plain_folder(root, counts, suffix=".jpg", **options):
    """Make class folders; counts: {class: images}."""
    for name, n in counts.items():
        for i in range(n):
            path = root / name / f"{name} {i:03d}{suffix}"
            picture(path, seed=i + 1000 * len(name), **options)
    return root


def inat_folder(root, taxa):
    """Make folders of iNaturalist 2021; taxa: {taxonomy: (train images, val images)}."""
    for i, (taxonomy, counts) in enumerate(taxa.items()):
        for split, n in zip(("train", "val"), counts, strict=True):
            for k in range(n):
                path = root / split / f"{i:05d}_{taxonomy}" / f"{k:03d}.jpg"
                picture(path, seed=100 * i + k, size=(12, 9))
    return root


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".lock")
    }


def index(folder):
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def well_formed(path):
    """Load a subset; check that splits are disjoint, and mean and std those of the train rows."""
    subset = load_subset(path)
    rows = np.concatenate([subset.splits[split] for split in SPLITS])
    assert len(set(rows)) == len(rows)
    splits = np.array([line["split"] for line in index(path.parent)])
    for name in SPLITS:
        rows = subset.splits[name]
        assert (splits[rows] == name).all() and (np.diff(rows) > 0).all()
    train = subset.images[subset.splits["train"]] / 255
    np.testing.assert_allclose(subset.mean, train.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(subset.std, np.maximum(train.std((0, 1, 2)), 1 / 255), atol=1e-6)
    assert Image.open(path.with_suffix(".png")).size[0] > 100
    return subset


def counts(subset):
    return {split: tuple(subset.counts[split].values()) for split in SPLITS}
