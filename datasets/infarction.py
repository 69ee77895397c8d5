"""Infarction in UK Biobank's cardiac MRI."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import infarction_folder
from datasets.images import as_array, list_images, printable
from datasets.source import DRAW_SPLIT, Source, more_of, parse_binary, read_table
from utils.cli import UserError
from utils.files import sha256


def load(args):
    """Infarction in UK Biobank's cardiac MRI (access on application), as a researcher has it after preprocessing.

    A folder with one CSV (columns eid, label: 1 = infarction) and one image per participant: one .pt, a dict from eid to a tensor
    [C, H, W], or a file <eid>.npy ([C, H, W]) or <eid>.png each, at any depth. The channels are three short-axis slices (basal, middle,
    apical) of one time point, cropped to the heart, each scaled to 0..1 by its own percentiles (or uint8); one slice alone is taken, too.
    Split by participant, 90 / 5 / 5 %, not balanced: int(0.05 n) for val and test each, as in the reference, but stratified, so that a
    rare class is in every split.
    """
    root = infarction_folder(Path(args.data_root))
    if root is None:
        raise UserError(
            f"{args.data_root}: no CSV (eid,label) there or in infarction/; put it beside one .pt, or .npy or .png files"
        )
    path, *others = sorted(root.glob("*.csv"))
    if others:
        raise UserError(
            f"{root}: holds {path.name} and {others[0].name}; leave one CSV (eid,label)"
        )
    labels = {}
    for line, row in read_table(path, ["eid", "label"]).items():
        if row["eid"] in labels:
            raise UserError(
                f"{path}, line {line}: participant {row['eid']} a second time; one line each"
            )
        labels[row["eid"]] = parse_binary(path, line, "label", row)
    images, digest = list_participants(root)
    missing = [eid for eid in labels if eid not in images]
    if missing:
        raise UserError(
            f"{path}: participant {missing[0]!r}{more_of(missing)} has no image in {root}; remove the line or add the image"
        )
    eids = sorted(labels)
    label = np.array([labels[eid] for eid in eids])
    n, rare = int(0.05 * len(eids)), np.bincount(label, minlength=2).argmin()
    k = max(1, round(0.05 * int((label == rare).sum())))  # of the rare class, in val and in test
    if n <= k:
        raise UserError(
            f"{path}: {len(eids)} participants, of whom 5 % are too few to have both classes in val and in test; it takes 40 at least"
        )
    split = np.full(len(eids), "train", dtype="<U5")
    for c, taken in ((rare, k), (1 - rare, n - k)):
        members = np.random.default_rng([args.seed, DRAW_SPLIT, c]).permutation(
            np.flatnonzero(label == c)
        )
        split[members[:taken]], split[members[taken : 2 * taken]] = "val", "test"
    found = digest + "".join(f"\n{eid}\t{labels[eid]}" for eid in eids)
    unlabelled = len(images) - len(eids)
    return Source(
        [images[eid] for eid in eids],
        eids,
        label,
        split,
        ["no infarction", "infarction"],
        hashlib.sha256(found.encode()).hexdigest(),
        args.size or 128,
        "cardiac",
        count_channels({eid: images[eid] for eid in eids}),
        args.store_size,
        notes=[f"left out: {unlabelled} images without a line in {path.name}"]
        if unlabelled
        else [],
    )


def list_participants(root):
    """({eid: array [H, W, C] or path}, sha256 of what was found) of a folder with one .pt, or with .npy or .png files."""
    files = list_images(root, (".pt", ".npy", ".png"))
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) != 1 or kinds == [".pt"] and len(files) > 1:
        raise UserError(
            f"{root}: holds {f'{len(files)} files ' + ' '.join(kinds) if files else 'no image'}; "
            "leave one .pt (a dict from eid to a tensor), or a file <eid>.npy or <eid>.png for each participant"
        )
    if kinds == [".pt"]:
        return open_tensor_dict(files[0]), sha256(files[0])
    images = {}
    for path in files:
        if path.stem in images:
            raise UserError(
                f"{path}: participant {path.stem} a second time, also as {images[path.stem]}; leave one"
            )
        images[path.stem] = path
    found = "".join(
        f"{printable(path.relative_to(root).as_posix())}\t{path.stat().st_size}\n" for path in files
    )
    return images, hashlib.sha256(found.encode()).hexdigest()


def open_tensor_dict(path):
    """{eid: array [H, W, C]} of a .pt, mapped and not read. No pickle is executed: weights_only."""
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch reports a damaged or foreign file in many ways; all of them mean the same here
        raise UserError(
            f"{path}: not a file of tensors ({type(error).__name__}), and no other object is ever opened; "
            "save a dict from eid to a tensor [C, H, W] with torch.save"
        ) from None
    images = {}
    for eid, tensor in state.items() if isinstance(state, dict) else [(None, state)]:
        if str(eid) in images:
            raise UserError(
                f"{path}: participant {eid} a second time, as a number and as text; leave one"
            )
        try:
            images[str(eid)] = tensor.permute(1, 2, 0).numpy()
        except (AttributeError, RuntimeError, TypeError):
            raise UserError(
                f"{path}: holds no tensor [C, H, W] for {eid}; save a dict from eid to a uint8 or float32 tensor"
            ) from None
    return images


def count_channels(images):
    """1 or 3: the channels of all participants, {eid: array or path}, from the headers. UserError where they differ or are others."""
    channels = {}
    for eid, image in images.items():
        try:
            array = as_array(image)
            if array is None:
                with Image.open(image) as opened:
                    number = 1 if opened.mode in ("1", "L", "I", "I;16") else 3
            else:
                number = array.shape[2]
        except Exception:  # an unreadable image is reported by name when it is decoded
            continue
        channels.setdefault(number, eid)
    if len(channels) == 1 and channels.keys() <= {1, 3}:
        return next(iter(channels))
    seen = (
        ", ".join(f"{number} (participant {eid})" for number, eid in channels.items())
        or "none that can be read"
    )
    raise UserError(
        f"channels of the {len(images)} images of the participants: {seen}; make all of them [3, H, W], three slices, or all [1, H, W]"
    )
