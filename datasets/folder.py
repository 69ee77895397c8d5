"""Folders of classes, with or without a folder for each split."""

import difflib
import re
from pathlib import Path

import numpy as np

from datasets.images import IMAGE_SUFFIXES, list_images, printable
from datasets.source import SPLITS, draw_splits, file_source
from utils.cli import UserError


def load(args):
    """Folders of classes: train/val/test/<class>/ or <class>/, images at any depth below. What is not given is drawn from train."""
    root = Path(args.data_root)
    layout = "<class>/ or train/<class>/, val/<class>/, test/<class>/"
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; put the images there as {layout}, or give their folder with --data-root"
        )
    tops = subfolders(root)
    parts = {folder.name.lower(): folder for folder in tops if folder.name.lower() in SPLITS}
    others = [folder.name for folder in tops if folder not in parts.values()]
    if parts and ("train" not in parts or others):
        odd = f"there is also {', '.join(others)}" if others else "there is no train folder"
        raise UserError(
            f"{root}: a folder named {' or '.join(f.name for f in parts.values())} is a split, but {odd}; "
            f"rename it if it is a class, else use {layout}"
        )
    groups = parts or {"train": root}
    names = sorted({folder.name for group in groups.values() for folder in subfolders(group)})
    for name in names:
        if name.lower() in SPLITS:
            raise UserError(
                f"{root}: a class folder named {name} would be taken for a split; rename it"
            )
    classes, minority = choose_class_folders(
        names,
        args,
        f"{root}: class folders found: {len(names)} ({', '.join(names[:10]) or 'none'})",
        layout,
    )
    found = [
        (image, label, part)
        for part, folder in groups.items()
        for label, (_, members) in enumerate(classes)
        for name in members
        for image in list_images(folder / name)
    ]
    if not found:
        raise UserError(
            f"{root}: no images below {' and '.join(name for name, _ in classes)} ({' '.join(sorted(IMAGE_SUFFIXES))}); put them there"
        )
    images, labels = (
        [image for image, _, _ in found],
        np.array([label for _, label, _ in found], dtype=np.int64),
    )
    split = np.array([part for _, _, part in found], dtype="<U5")
    patients = (
        np.array([patient_id(args.patient, image, root) for image in images])
        if args.patient
        else None
    )
    source = file_source(
        args,
        images,
        root,
        labels,
        split,
        [name for name, _ in classes],
        args.grayscale,
        minority=minority,
    )
    left = len(names) - sum(len(members) for _, members in classes)
    if left:
        source.notes.append(f"left out: {left} class folder{'s' * (left > 1)}")
    missing = {
        part: percent for part, percent in {"test": 20, "val": 10}.items() if part not in groups
    }
    if missing:
        rows = np.flatnonzero(split == "train")
        split[rows] = draw_splits(
            labels[rows], missing, args.seed, None if patients is None else patients[rows]
        )
        shares = ", ".join(f"{percent} % for {part}" for part, percent in missing.items())
        source.notes.append(
            f"drawn from train: {shares}"
            + (f", by patient ({len(set(patients[rows]))} patients)" if args.patient else "")
        )
    if args.patient:
        for part in SPLITS:
            shared = set(patients[split == part]) & set(patients[split != part])
            if shared:
                raise UserError(
                    f"--patient: patient {sorted(shared)[0]} has images in {part} and in another split folder; "
                    "move them into one"
                )
    return source


def subfolders(folder):
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".")]


def choose_class_folders(names, args, found, layout):
    """[(class, its folders)] of two classes, index = label, and the label of the minority, None for the rarer; from class folders `names`."""

    def chosen(flag, text):
        members = (
            [text]
            if text in names
            else list(dict.fromkeys(word.strip() for word in text.split(",")))
        )
        for name in members:
            if name not in names:
                near = difflib.get_close_matches(name, names, cutoff=0.4) or names[:10]
                raise UserError(
                    f"{flag} {text}: no such class folder{'' if name == text else ' as ' + name}; nearest names: {', '.join(near)}"
                )
        return members

    if len(names) < 2:
        raise UserError(f"{found}; two at least are needed, as {layout}")
    if args.minority is None and (len(names) > 2 or args.majority is not None):
        raise UserError(
            f"{found}; say which is the rare one with --minority A, and the other with --majority B,C (default: all others)"
        )
    few = chosen("--minority", args.minority) if args.minority is not None else names[:1]
    many = (
        chosen("--majority", args.majority)
        if args.majority is not None
        else [name for name in names if name not in few]
    )
    if set(few) & set(many) or not many:
        raise UserError(
            f"--minority {args.minority} --majority {args.majority}: the two classes must differ"
        )
    rest = "rest" if args.majority is None and len(many) > 1 else "+".join(many)
    classes = sorted([("+".join(few), few), (rest, many)])
    if classes[0][0] == classes[1][0]:
        raise UserError(
            f"--minority {args.minority} --majority {args.majority}: both classes would be called {rest}; rename a folder"
        )
    return classes, None if args.minority is None else [members for _, members in classes].index(
        few
    )


def patient_id(regex, image, root):
    """The patient id of an image: first group of the regex in its file name, else in its path below the data root."""
    try:
        match = re.search(regex, image.name) or re.search(regex, image.relative_to(root).as_posix())
    except re.error as error:
        raise UserError(f"--patient {regex}: not a regular expression ({error})") from None
    if match is None or match.group(min(match.re.groups, 1)) is None:
        raise UserError(
            f"--patient {regex}: finds no patient in {printable(image)}; change the expression so that every file has one"
        )
    return match.group(min(match.re.groups, 1))
