"""Images of the user's own: a folder for each class, with or without a folder for each split."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.images import IMAGE_SUFFIXES, is_image, list_files, printable
from datasets.source import (
    DRAWN,
    SPLITS,
    choose_classes,
    choose_ordered_classes,
    draw_splits,
    file_source,
)
from utils.cli import UserError

LAYOUT = "<class>/ or train/<class>/, val/<class>/, test/<class>/"
SPLIT_FOLDERS = {"valid": "val", "validation": "val"} | {split: split for split in SPLITS}


def load(args):
    """Load class folders with images at any depth; a missing val or test is drawn from train."""
    root = Path(args.data_root)
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; put the images there as {LAYOUT}")
    tops = find_split_folders(root)
    names = sorted({folder.name for top in tops.values() for folder in list_folders(top)})
    classes, minority, tail = choose_class_folders(names, args, root)
    found, ignored = list_class_files(tops, classes)
    notes = describe_ignored(ignored, root)
    if not found:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError("; ".join([f"{root}: no images in its class folders ({suffixes})", *notes]))
    fields = dict(classes=[name for name, _ in classes], minority=minority, tail=tail, notes=notes)
    source = file_source(args, root, found, channels=1 if args.grayscale else 3, **fields)
    patients = find_patients(args.patient, source.images, root) if args.patient else None
    draw_missing_splits(source, tops, patients, args.seed)
    return source


def list_class_files(tops, classes):
    """List ([(image, label, split)], [files that are no images]) of class folders."""
    found, ignored = [], []
    for split, top in tops.items():
        for label, (_, members) in enumerate(classes):
            for path in (path for name in members for path in list_files(top / name)):
                if is_image(path):
                    found.append((path, label, split))
                else:
                    ignored.append(path)
    return found, ignored


def draw_missing_splits(source, tops, patients, seed):
    """Draw the splits without a folder from train; refuse a patient in two splits."""
    missing = {split: percent for split, percent in DRAWN.items() if split not in tops}
    if missing:
        rows = np.flatnonzero(source.split == "train")
        note = ", ".join(f"{percent} % for {split}" for split, percent in missing.items())
        groups = None if patients is None else patients[rows]
        if groups is not None:
            note += f", by patient ({len(set(groups))} patients)"
        source.split[rows] = draw_splits(source.labels[rows], missing, seed, groups)
        source.notes.append(f"drawn from train: {note}")
    for split in SPLITS if patients is not None else ():
        shared = set(patients[source.split == split]) & set(patients[source.split != split])
        if shared:
            raise UserError(
                f"--patient: patient {min(shared)} has images in {split} and in another split; "
                "move them into one folder"
            )


def find_split_folders(root):
    """Find {split: its folder}; {"train": root} where the classes lie directly in `root`."""
    tops, others = {}, []
    for folder in list_folders(root):
        split = SPLIT_FOLDERS.get(folder.name.lower())
        if split is None or split in tops:
            others.append(folder.name)
        else:
            tops[split] = folder
    if tops and ("train" not in tops or others):
        names = ", ".join(folder.name for folder in tops.values())
        problem = f"there is also {', '.join(others)}" if others else "there is no train folder"
        raise UserError(
            f"{root}: {names} is named like a split, but {problem}; rename it if it is a class, "
            f"else use {LAYOUT}"
        )
    return tops or {"train": root}


def list_folders(folder):
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".")]


def choose_class_folders(names, args, root):
    """Choose the classes: [(name, its folders)], label of the minority or None, --tail or None.

    Two classes are sorted by name; those of --classes keep its order.
    """
    known = {name: name for name in names}
    if args.classes:
        chosen, tail = choose_ordered_classes(args, known, {})
        return [(name, [name]) for name in chosen], len(chosen) - 1, tail
    rare, other = choose_classes(known, args.minority, args.majority, f"{root}, as {LAYOUT}")
    rest = "rest" if args.majority is None and len(other) > 1 else "+".join(other)
    classes = sorted([("+".join(rare), rare), (rest, other)])
    minority = None if args.minority is None else [m for _, m in classes].index(rare)
    return classes, minority, None


def describe_ignored(files, root):
    """Describe the files that are no images: [] or one line with their number and what to do."""
    if not files:
        return []
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in files)
    listed = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common(5))
    first = printable(files[0].relative_to(root).as_posix())
    return [f"ignored {len(files)} other files ({listed}), first {first}; convert DICOM to PNG"]


def find_patients(regex, images, root):
    """Find the patient of each image: first group of the regex in its file name, else its path."""
    patients = []
    for image in images:
        path = image.relative_to(root).as_posix()
        try:
            match = re.search(regex, image.name) or re.search(regex, path)
        except re.error as error:
            raise UserError(f"--patient {regex}: not a regular expression ({error})") from None
        patient = match and match.group(min(match.re.groups, 1))
        if patient is None:
            raise UserError(f"--patient {regex}: finds no patient in {printable(path)}; change it")
        patients.append(patient)
    return np.array(patients)
