"""iNaturalist 2021: two taxa, with its val part as test."""

import difflib
import math
import re
from pathlib import Path

import numpy as np

from datasets import INAT21_FOLDERS, INAT21_GET, INAT21_TAXA, inat21_folders
from datasets.images import list_images
from datasets.source import DRAW_SPLIT, file_source
from utils.cli import UserError


def load(args):
    """iNaturalist 2021. Test is its val part; of every class 5 % of its train part become val."""
    taxa = INAT21_TAXA.get(args.dataset, (args.minority, args.majority))
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        if taxon is None:
            raise UserError(
                f"{flag}: inat21 needs one taxon for each class, for example --minority Quercus --majority Saxifragales"
            )
    parts = inat21_folders(Path(args.data_root))
    if parts is None:
        others = ", ".join(" and ".join(f"{name}/" for name in pair) for pair in INAT21_FOLDERS[1:])
        raise UserError(
            f"{args.data_root}: no folder with train/ and val/ (or {others}); get iNaturalist 2021 from {INAT21_GET}, "
            "unpack it there, or give its folder with --data-root"
        )
    root, train, val = parts
    folders = {
        part: {
            f: f.name.split("_", 7)[1:]
            for f in sorted(part.iterdir())
            if re.fullmatch(r"\d+(_[^_]+){6}_.+", f.name)
        }
        for part in (train, val)
    }  # folder -> its seven taxonomy levels
    names, found = [], []
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        name, chosen = match_taxon(flag, taxon, folders, root)
        names.append(name)
        found.append(chosen)
    both = sorted(found[0] & found[1])
    if both:
        raise UserError(
            f"--minority {taxa[0]} --majority {taxa[1]}: overlap in {both[0].name}; choose two taxa without a common species"
        )
    images = [
        (image, label, part)
        for part in (train, val)
        for label in (0, 1)
        for folder in sorted(found[label])
        if folder.parent == part
        for image in list_images(folder)
    ]
    labels = np.array([label for _, label, _ in images], dtype=np.int64)
    split = np.array(["test" if part == val else "train" for _, _, part in images], dtype="<U5")
    for label in (0, 1):
        rows = np.flatnonzero((labels == label) & (split == "train"))
        split[
            np.random.default_rng([args.seed, DRAW_SPLIT, label]).permutation(rows)[
                : split_counts(len(rows))[1]
            ]
        ] = "val"
    return file_source(
        args,
        [image for image, _, _ in images],
        root,
        labels,
        split,
        names,
        args.grayscale,
        minority=0,
        balance=True,
    )


def match_taxon(flag, taxon, folders, root):
    """The folders whose taxonomy holds the levels of `taxon` in a row, and the last level as it is written there."""
    wanted = [level for level in re.split("[/_]", taxon.lower()) if level]
    n = len(wanted)
    found, name, known = set(), None, set()
    for part in folders.values():
        for folder, levels in part.items():
            lower = [level.lower() for level in levels]
            known.update(levels)
            at = [i for i in range(len(levels) - n + 1) if n and lower[i : i + n] == wanted]
            if at:
                found.add(folder)
                name = levels[at[0] + n - 1]
    if not known:
        raise UserError(
            f"{next(iter(folders))}: no folders named NNNNN_Kingdom_Phylum_Class_Order_Family_Genus_species; give the folder of "
            "iNaturalist 2021 that holds train/ and val/ with --data-root"
        )
    if not found:
        lower = {level.lower(): level for level in sorted(known)}
        near = [
            lower[k]
            for word in reversed(wanted)
            for k in difflib.get_close_matches(word, lower, n=5, cutoff=0.4)
        ]
        near = dict.fromkeys(near or list(lower.values())[:10])
        raise UserError(
            f"{flag} {taxon}: matches no folder in {root}; nearest names: {', '.join(near)}"
        )
    return name, found


def split_counts(n: int):
    """(train, val) of n images: floor of 95 % and 5 %, then the remainder one by one from the first, as the reference does."""
    counts = [math.floor(n * 0.95), math.floor(n * 0.05)]
    for i in range(n - sum(counts)):
        counts[i % 2] += 1
    return tuple(counts)
