"""Images of the user's own: a folder for each class, with or without a folder for each split."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.dicom import read_headers
from datasets.images import IMAGE_SUFFIXES, is_dicom, is_image, list_files, printable
from datasets.source import SPLITS, choose_classes, choose_ordered_classes, file_source
from datasets.splits import DRAWN, draw_by_flags, split_percents
from utils.cli import UserError

LAYOUT = "<class>/ or train/<class>/, val/<class>/, test/<class>/"
SPLIT_NAMES = {"valid": "val", "validation": "val"} | {split: split for split in SPLITS}


def load(args):
    """Load class folders with images at any depth; a missing val or test is drawn from train."""
    root = Path(args.data_root)
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; put the images there as {LAYOUT}")
    tops = find_split_folders(root)
    names = sorted({folder.name for top in tops.values() for folder in list_folders(top)})
    tables = sorted([*root.glob("*.csv"), *root.parent.glob("*.csv")])
    if len(names) < 2 and tables:
        raise UserError(
            f"{root}: has no two class folders; for labels in a table: "
            f"make_subsets.py table --data-root {root} --labels {tables[0]}"
        )
    classes, minority, tail = choose_user_classes(names, args, f"{root}, as {LAYOUT}")
    found, ignored = list_class_files(tops, classes)
    notes = describe_ignored(ignored, root)
    if not found:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError("; ".join([f"{root}: no images in its class folders ({suffixes})", *notes]))
    fields = dict(classes=[name for name, _ in classes], minority=minority, tail=tail, notes=notes)
    return user_source(
        args, root, found, given=[split for split in SPLITS if split in tops], **fields
    )


def user_source(args, root, found, given, patients=None, groups=None, **fields):
    """Make the Source of a user's own images: find patients, draw the splits that are not given.

    given: the splits of `found`; patients: str [M], or None to find them by --patient or in DICOM
    headers; the others as in file_source().
    """
    images = [path for path, _, _ in found]
    dicoms = [path for path in images if is_dicom(path)]
    headers = read_headers(dicoms)
    is_gray = args.grayscale or len(dicoms) == len(images) and all(h.is_gray for h in headers)
    source = file_source(args, root, found, groups, channels=1 if is_gray else 3, **fields)
    if args.patient:
        patients = match_patients(args.patient, images, root)
    elif patients is None and len(dicoms) == len(images):
        patients = choose_dicom_patients(headers, source.notes)
    draw_missing_splits(source, args, given, patients)
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


def draw_missing_splits(source, args, given, patients):
    """Draw the splits that are not given from train; refuse a patient in two splits."""
    flags = {"val": args.val_share, "test": args.test_share}
    unused = [f"--{split}-share" for split in given if flags.get(split)]
    unused += ["--folds"] * bool(args.folds and len(given) > 1)
    if unused:
        raise UserError(f"{unused[0]}: the images have splits ({', '.join(given)}); leave it out")
    missing = [split for split in DRAWN if split not in given]
    if missing:
        rows = np.flatnonzero(source.split == "train")
        percents = split_percents(args)
        note = ", ".join(f"{percents[split]:.3g} % for {split}" for split in missing)
        groups = None if patients is None else patients[rows]
        if groups is not None:
            note += f", by patient ({len(set(groups))} patients)"
        source.split[rows] = draw_by_flags(source.labels[rows], args, missing, groups)
        source.notes.append(f"drawn from train: {note}")
    for split in SPLITS if patients is not None else ():
        shared = set(patients[source.split == split]) & set(patients[source.split != split])
        if shared:
            raise UserError(
                f"patient {min(shared)}: has images in {split} and in another split; put all of "
                "them into one"
            )


def find_split_folders(root):
    """Find {split: its folder}; {"train": root} where the classes lie directly in `root`."""
    tops, others = {}, []
    for folder in list_folders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
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


def choose_user_classes(names, args, where):
    """Choose the classes: [(name, its members)], label of the minority or None, --tail or None.

    Two classes are sorted by name; those of --classes keep its order.
    """
    known = {name: name for name in names}
    if args.classes:
        chosen, tail = choose_ordered_classes(args, known, {})
        return [(name, [name]) for name in chosen], len(chosen) - 1, tail
    rare, other = choose_classes(known, args.minority, args.majority, where)
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
    return [f"ignored {len(files)} other files ({listed}), first {first}"]


def choose_dicom_patients(headers, notes):
    """Choose PatientID as the patient of each image; None, with a note, where it tells nothing."""
    patients = np.array([header.patient for header in headers])
    n_empty = int((patients == "").sum())
    if n_empty:
        notes.append(
            f"WARNING: {n_empty} DICOM files have no PatientID; patients may be in two splits"
        )
    elif len(set(patients)) == 1:
        notes.append("WARNING: all DICOM files have one PatientID; patients may be in two splits")
    else:
        return patients


def match_patients(regex, images, root):
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
