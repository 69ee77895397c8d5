"""Small pictures, folders of them in the forms of the data sets, and a look into what make_subsets.py makes of them."""

import csv

import numpy as np
from PIL import Image

from common import load_subset
from datasets.source import SPLITS


def picture(path, seed=0, size=(24, 16), mode="RGB", **options):
    """A smooth picture with its own colours; size is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng([7, seed]).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(
        path, **options
    )


def plain_folder(root, counts, suffix=".jpg", **options):
    for name, n in counts.items():
        for i in range(n):
            picture(root / name / f"{name} {i:03d}{suffix}", seed=i + 1000 * len(name), **options)
    return root


def inat_folder(root, taxa):
    """taxa: {taxonomy: (train images, val images)}."""
    for i, (taxonomy, counts) in enumerate(taxa.items()):
        for part, n in zip(("train", "val"), counts):
            for k in range(n):
                picture(
                    root / part / f"{i:05d}_{taxonomy}" / f"{k:03d}.jpg",
                    seed=100 * i + k,
                    size=(12, 9),
                )
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
    """load_subset takes it, splits are apart, and mean and std are those of the train rows."""
    subset = load_subset(path)
    rows = np.concatenate([subset.splits[part] for part in SPLITS])
    assert len(set(rows)) == len(rows)
    split = np.array([line["split"] for line in index(path.parent)])
    for part in SPLITS:
        assert (split[subset.splits[part]] == part).all() and (
            np.diff(subset.splits[part]) > 0
        ).all()
    train = subset.images[subset.splits["train"]] / 255
    np.testing.assert_allclose(subset.mean, train.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(subset.std, np.maximum(train.std((0, 1, 2)), 1 / 255), atol=1e-6)
    assert Image.open(path.with_suffix(".png")).size[0] > 100
    return subset


def counts(subset):
    return {part: tuple(subset.counts[part].values()) for part in SPLITS}
