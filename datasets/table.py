"""Images of the user's own whose labels are in a table: a CSV file with a line per image."""

import csv
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.folder import SPLIT_NAMES, choose_user_classes, user_source
from datasets.images import is_image, list_files
from datasets.source import SPLITS
from utils.cli import UserError


def load(args):
    """Load the images that --labels lists; a missing val or test is drawn from train."""
    root, table = Path(args.data_root), args.labels
    check_places(root, table)
    found, rows = read_rows(table)
    columns = choose_columns(args, found, table)
    entries = read_entries(rows, columns, table, root)
    check_files(entries, table, root)
    labels = {path: entry["label"] for path, entry in entries.items()}
    classes, minority, tail = choose_user_classes(sorted(set(labels.values())), args, table)
    number = {label: c for c, (_, members) in enumerate(classes) for label in members}
    kept = [path for path in sorted(entries) if labels[path] in number]
    splits = [read_split(entries[path].get("split", "train"), path, table) for path in kept]
    if "train" not in splits:
        raise UserError(f"{table}: no line has the split train; give it to most of the images")
    patients = [entries[path].get("patient") for path in kept]
    return user_source(
        args,
        root,
        [(path, number[labels[path]], split) for path, split in zip(kept, splits, strict=True)],
        given=[split for split in SPLITS if split in splits],
        patients=np.array(patients) if "patient" in columns else None,
        # so that a change of the table is noticed
        groups=[f"{patient}\t{split}" for patient, split in zip(patients, splits, strict=True)],
        classes=[name for name, _ in classes],
        minority=minority,
        tail=tail,
        notes=describe_unused(found, columns) + describe_left_out(labels, number, root, table),
    )


def check_places(root, table):
    """Raise UserError unless the folder of the images and the table are there."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; give the folder of the images")
    if table is None or not Path(table).is_file():
        found = ", ".join(sorted(map(str, root.glob("*.csv")))) or "none"
        problem = "is missing" if table is None else f"{table}: no such file"
        raise UserError(f"--labels {problem}; give a CSV file (in {root}: {found})")


def read_rows(path):
    """Read a CSV file with commas, semicolons or tabs: (its columns, rows as dicts)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error}); save it again") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise UserError(f"{path}: line {number} has too many cells; quote those with a comma")
    rows = [{key.strip(): (value or "").strip() for key, value in row.items()} for row in rows]
    return [column.strip() for column in reader.fieldnames or []], rows


def read_lookup(path, columns):
    """Read a CSV file: {value of the first of `columns`: row as a dict}.

    Raises UserError where a column is missing or a value of the first one stands twice.
    """
    found, rows = read_rows(path)
    for column in columns:
        if column not in found:
            raise UserError(
                f"{path}: no column {column}, only {', '.join(found) or 'nothing'}; add it"
            )
    table = {}
    for row in rows:
        key = row[columns[0]]
        if key in table:
            raise UserError(f"{path}: {columns[0]} {key} stands in two lines; leave one")
        table[key] = row
    return table


def choose_columns(args, found, table):
    """Choose the columns to read: {"path": column, "label": ..., "patient" and "split" if any}."""
    typed = {
        "path": args.path_column,
        "label": args.label_column,
        "patient": args.patient_column,
        "split": args.split_column,
    }
    columns = {name: column or name for name, column in typed.items()}
    for name, column in columns.items():
        if column not in found and (typed[name] or name in ("path", "label")):
            raise UserError(
                f"{table}: no column {column}, only {', '.join(found) or 'nothing'}; name the "
                f"right one with --{name}-column"
            )
    return {name: column for name, column in columns.items() if column in found}


def read_entries(rows, columns, table, root):
    """Read {path of an image: its label, and patient and split if known}.

    Raises UserError for an empty cell, and for a file with two different lines.
    """
    entries = {}
    for row in rows:
        entry = {name: row[column] for name, column in columns.items()}
        empty = [columns[name] for name, cell in entry.items() if not cell]
        if empty:
            n = sum(not row[empty[0]] for row in rows)
            raise UserError(
                f"{table}: {n} lines have no {empty[0]}, first that of "
                f"{entry['path'] or 'an empty path'}; fill or remove them"
            )
        # a path may be absolute; Windows writes backslashes
        path = root / os.path.relpath(root / entry.pop("path").replace("\\", "/"), root)
        first = entries.setdefault(path, entry)
        for name in (name for name in entry if entry[name] != first[name]):
            raise UserError(
                f"{table}: {path} has two lines, with {columns[name]} {first[name]} and "
                f"{entry[name]}; leave one"
            )
    return entries


def check_files(entries, table, root):
    """Raise UserError for files that are missing or do not lie below the data root."""
    missing = [path for path in entries if not path.is_file()]
    if missing:
        raise UserError(
            f"{table}: {len(missing)} of {len(entries)} files are missing, first {missing[0]}; "
            "correct the paths, or --data-root"
        )
    outside = [path for path in entries if ".." in path.relative_to(root).parts]
    if outside:
        raise UserError(f"{table}: {outside[0]} is not below {root}; give a higher --data-root")


def read_split(text, path, table):
    """Read the split of a line: train, val or test."""
    if text.lower() not in SPLIT_NAMES:
        raise UserError(f"{table}: split {text!r} of {path}; write train, val or test")
    return SPLIT_NAMES[text.lower()]


def describe_unused(found, columns):
    """Describe the columns that are not read, which may name patients: [] or one line."""
    unused = ", ".join(column for column in found if column not in columns.values())
    hint = "" if "patient" in columns else "; --patient-column keeps a patient's images together"
    return [f"columns that are not used: {unused}{hint}"] * bool(unused)


def describe_left_out(labels, number, root, table):
    """Describe images that are not used: those of other labels, those without a line."""
    other = Counter(label for label in labels.values() if label not in number)
    listed = ", ".join(f"{n} {label}" for label, n in other.most_common(5))
    notes = [f"left out: {other.total()} images of other labels ({listed})"] * bool(other)
    unlisted = sum(is_image(path) and path not in labels for path in list_files(root))
    return notes + [f"left out: {unlisted} images without a line in {table}"] * bool(unlisted)
