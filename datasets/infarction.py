"""Infarction in UK Biobank's cardiac MRI (access on application), as preprocessed by its user."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.images import as_array, list_files, printable
from datasets.source import DRAW_SPLIT, Source
from datasets.table import read_lookup
from utils.cli import UserError


def load(args):
    """Load one CSV (columns eid, label: 1 = infarction) and an image per participant.

    The images are one .pt file, a dict from eid to a tensor [C, H, W], or a file <eid>.npy
    ([C, H, W]) or <eid>.png each. The channels are three short-axis slices (basal, middle,
    apical) of one point in time, cropped to the heart, each scaled to 0..1 (or uint8); a single
    slice is accepted, too.
    """
    root = Path(args.data_root)
    if (root / "infarction").is_dir():
        root = root / "infarction"
    tables = sorted(root.glob("*.csv"))
    if len(tables) != 1:
        raise UserError(
            f"{root}: found {len(tables)} CSV files; put one (eid,label) beside the images, or "
            "give their folder with --data-root"
        )
    path = tables[0]
    files = [f for f in list_files(root) if f.suffix.lower() in (".pt", ".npy", ".png")]
    labels = {eid: row["label"] for eid, row in read_lookup(path, ["eid", "label"]).items()}
    images = open_participants(files, root)
    for eid, label in labels.items():
        if label not in ("0", "1"):
            raise UserError(f"{path}: label of {eid} is {label or ''!r}; write 0 or 1")
        if eid not in images:
            raise UserError(f"{path}: no image of {eid!r} in {root}; add it or remove the line")
    eids, unlabelled = sorted(labels), len(images) - len(labels)
    found = [f"{printable(file.relative_to(root))}\t{file.stat().st_size}" for file in files]
    found += [f"{eid}\t{labels[eid]}" for eid in eids]
    labels = np.array([int(labels[eid]) for eid in eids])
    images = [images[eid] for eid in eids]
    return Source(
        images=images,
        names=eids,
        labels=labels,
        split=draw_participants(labels, args.seed),
        classes=["no infarction", "infarction"],
        digest=hashlib.sha256("\n".join(found).encode()).hexdigest(),
        channels=count_channels(images),
        notes=[f"left out: {unlabelled} images without a label"] * (unlabelled > 0),
    )


def draw_participants(labels, seed):
    """Draw int(0.05 n) participants each for val and test, as the reference does: str [n].

    Unlike there, the draw is stratified, so that every split has the rare class.
    """
    n, rare = len(labels) // 20, np.bincount(labels, minlength=2).argmin()
    n_rare = max(1, round(0.05 * int((labels == rare).sum())))
    if n <= n_rare:
        raise UserError(f"--data-root: {len(labels)} participants are too few; 40 are needed")
    split = np.full(len(labels), "train", dtype="<U5")
    for label, count in ((rare, n_rare), (1 - rare, n - n_rare)):
        generator = np.random.default_rng([seed, DRAW_SPLIT, label])
        members = generator.permutation(np.flatnonzero(labels == label))
        split[members[:count]], split[members[count : 2 * count]] = "val", "test"
    return split


def open_participants(files, root):
    """Open the images of a folder: {eid: array [H, W, C], or path of an .npy or .png}.

    A .pt file is mapped, not read, and no pickle in it is executed (weights_only).
    """
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) != 1 or kinds == [".pt"] and len(files) > 1:
        raise UserError(
            f"{root}: found {len(files)} files {' '.join(kinds)}; leave one .pt (a dict from eid "
            "to a tensor), or a file <eid>.npy or <eid>.png for each participant"
        )
    if kinds != [".pt"]:
        return {path.stem: path for path in files}
    path, is_zip = files[0], zipfile.is_zipfile(files[0])
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        return {str(eid): tensor.permute(1, 2, 0).numpy() for eid, tensor in tensors.items()}
    except Exception as error:  # torch reports a damaged or foreign file in many ways
        raise UserError(
            f"{path}: not a dict of tensors ({type(error).__name__}); save a dict from eid to a "
            "uint8 or float32 tensor [C, H, W] with torch.save"
        ) from None


def count_channels(images):
    """Count the channels of the first readable image: 1 or 3. Others are refused when decoded."""
    for image in images:
        try:
            array = as_array(image)
            if array is None:
                with Image.open(image) as opened:
                    return 1 if opened.mode in ("1", "L", "I", "I;16") else 3
        except Exception:  # an unreadable image is reported by name when it is decoded
            continue
        if array.shape[2] in (1, 3):
            return array.shape[2]
    raise UserError("--data-root: no image [3, H, W] or [1, H, W] that can be read; convert them")
