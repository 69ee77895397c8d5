"""iNaturalist 2021: two taxa of its tree of species."""

import difflib
import errno
import re
from pathlib import Path

import numpy as np

from datasets import INAT21_FOLDERS, INAT21_PLACES, INAT21_TAXA
from datasets.images import list_images
from datasets.source import DRAW_SPLIT, file_source
from utils.cli import UserError


def load(args):
    """Load two taxa: the official val images are test, 5 % of each class of train become val.

    val and test are balanced, as in the reference.
    """
    taxa = INAT21_TAXA.get(args.dataset, (args.minority, args.majority))
    if None in taxa:
        raise UserError(
            "--minority, --majority: inat21 needs a taxon for each class, e.g. --minority Quercus "
            "--majority Saxifragales"
        )
    train, val = find_folders(Path(args.data_root))
    tree = read_tree(train, val)
    rare, rare_folders = match_taxon("--minority", taxa[0], tree)
    other, other_folders = match_taxon("--majority", taxa[1], tree)
    shared = [folder.name for folder in rare_folders if folder in other_folders]
    if shared:
        raise UserError(
            f"--minority {taxa[0]} --majority {taxa[1]}: overlap in {shared[0]}; choose two taxa "
            "without a common species"
        )
    found = [
        (image, label, "test" if top == val else "train")
        for top in (train, val)
        for label, folders in enumerate((rare_folders, other_folders))
        for folder in folders
        if folder.parent == top
        for image in list_images(folder)
    ]
    channels = 1 if args.grayscale else 3
    fields = dict(classes=[rare, other], channels=channels, minority=0, balance=True)
    source = file_source(args, train.parent, found, **fields)
    for label in (0, 1):
        rows = np.flatnonzero((source.labels == label) & (source.split == "train"))
        drawn = np.random.default_rng([args.seed, DRAW_SPLIT, label]).permutation(rows)
        source.split[drawn[: len(rows) // 20]] = "val"
    return source


def find_folders(root):
    """Find (train folder, val folder) at or below a data root."""
    for place in INAT21_PLACES:
        for train, val in INAT21_FOLDERS:
            if (root / place / train).is_dir() and (root / place / val).is_dir():
                return root / place / train, root / place / val
    raise FileNotFoundError(errno.ENOENT, "no folders train/ and val/", str(root))


def read_tree(*tops):
    """Read {folder: its seven levels, kingdom to species} from the names of folders."""
    name = re.compile(r"\d+(_[^_]+){6}_.+")
    folders = [folder for top in tops for folder in sorted(top.iterdir())]
    return {f: f.name.split("_", 7)[1:] for f in folders if name.fullmatch(f.name)}


def match_taxon(flag, taxon, tree):
    """Find the folders whose levels hold those of `taxon` in a row: (its last level, folders)."""
    wanted = [level for level in re.split("[/_]", taxon.lower()) if level]
    name, found = None, []
    for folder, levels in tree.items():
        lower = [level.lower() for level in levels]
        for end in range(len(wanted), len(levels) + 1):
            if wanted and lower[end - len(wanted) : end] == wanted:
                name = levels[end - 1]
                found.append(folder)
    if not found:
        known = {level.lower(): level for levels in tree.values() for level in levels}
        near = [difflib.get_close_matches(word, known, n=5, cutoff=0.4) for word in wanted[::-1]]
        near = [known[match] for match in sum(near, [])] or sorted(known.values())[:10]
        listed = ", ".join(dict.fromkeys(near)) or "none; no folder is NNNNN_Kingdom_..._species"
        raise UserError(f"{flag} {taxon}: no such taxon; nearest names: {listed}")
    return name, found
