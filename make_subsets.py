r"""Images on disk -> subsets/<dataset>/: two classes, decoded once, at several class ratios of the training part.

    python make_subsets.py digits                                               # no download: scikit-learn's 8x8 scans, 0-4 vs 5-9
    python make_subsets.py breastmnist --size 28 --download                     # MedMNIST file in data/
    python make_subsets.py inat21-mammals --data-root /data/inat21              # the folder that holds train/ and val/
    python make_subsets.py folder --data-root /data/xray --patient '(person\d+)'  # <class>/ or train|val|test/<class>/
    python make_subsets.py npz --data-root octmnist.npz --minority 2 --majority 3  # any file of MedMNIST's layout
    python make_subsets.py all --data-root /data                                # every data set of the paper that lies there
    python make_subsets.py all --data-root /data --verify                       # what was made of it is what it should be

Writes images.npy (uint8 [M, S, S, C], every image squeezed to a square), index.csv (one line per image), and per ratio
<ratio>.json (which rows are train, val and test) and <ratio>.png (what they look like). 99-1 is percent of majority and
minority in train. The same command goes on where it was stopped; the same command and seed give the same bytes.
"""

import argparse
import math
import os
import shlex
import sys
import warnings
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from datasets import DATASETS, describe_missing, find_all
from datasets.pack import (
    CHUNK,
    check_block,
    choose_stored_side,
    count_workers,
    drop_unreadable,
    mean_std,
    pack_images,
    parallel_map,
    read_index,
    scan_images,
    select_images,
    write_index,
)
from datasets.source import DRAW_TEST, DRAW_TRAIN, DRAW_VAL, SPLITS
from utils.cli import ArgumentParser, UserError, command_line, number_from, run_main
from utils.files import atomic_write, lock_folder, naming, read_json, sha256, write_json

RATIOS = ("99-1", "95-5", "50-50", "natural")


# ------------------------------------------------------------------------------------------------------------------
# which rows: balanced parts, ratios
# ------------------------------------------------------------------------------------------------------------------


def ratio_counts(class_sizes, ratios):
    """Images kept per class: min(floor(m * ratio_c), n_c), m the smallest class, so the total is about m whatever the ratio.

    class_sizes: images per class; ratios: share per class, sum 1. In double precision, as the reference: 100 * 0.29 gives 28.
    """
    smallest = min(class_sizes)
    return [min(math.floor(smallest * ratio), n) for n, ratio in zip(class_sizes, ratios)]


def parse_ratio(text):
    """'99-1' -> ('99-1', 0.99, 0.01): percent of majority and minority in train. 'natural' -> ('natural', None, None)."""
    if text == "natural":
        return text, None, None
    try:
        major, minor = (Decimal(part) for part in text.split("-"))
        if not (major + minor == 100 and major >= minor >= 0):
            raise ValueError
    except (ValueError, InvalidOperation):
        raise UserError(
            f"--ratios {text}: not a ratio; give percent of majority and minority in train, as 99-1 or 99.5-0.5, "
            "or natural"
        ) from None
    name = "-".join(format(part.normalize(), "f") for part in (major, minor))
    return name, float(major / 100), float(minor / 100)


def draw_rows(labels, split, ratio, minority, balance, seed):
    """The rows of one ratio: {"train": sorted rows, "val": ..., "test": ...}. Every ratio takes the head of one permutation per class."""
    rows = {}
    for part, stream in zip(SPLITS, (DRAW_TRAIN, DRAW_VAL, DRAW_TEST)):
        drawn = [
            np.random.default_rng([seed, stream, c]).permutation(
                np.flatnonzero((split == part) & (labels == c))
            )
            for c in (0, 1)
        ]
        keep = [len(d) for d in drawn]
        _, major, minor = parse_ratio(ratio)
        if part == "train" and ratio != "natural":
            keep = ratio_counts(keep, [minor, major] if minority == 0 else [major, minor])
        elif part != "train" and balance:
            keep = [min(keep)] * 2
        rows[part] = np.sort(np.concatenate([d[:k] for d, k in zip(drawn, keep)])).astype(np.int64)
    return rows


def draw_all_ratios(labels, split, source, args):
    """(minority, {ratio: rows}) for the ratios asked for. UserError when a split lacks a class or a ratio empties one."""
    for part in SPLITS:
        for c in (0, 1):
            if not ((split == part) & (labels == c)).any():
                raise UserError(
                    f"{args.data_root}: class {source.classes[c]} has no image in {part}; every split needs both classes"
                )
    minority = source.minority
    if minority is None:
        minority = int(np.bincount(labels[split == "train"], minlength=2).argmin())
    rows = {}
    for ratio in args.ratios or RATIOS:
        drawn = draw_rows(labels, split, ratio, minority, source.balance, args.seed)
        kept = np.bincount(labels[drawn["train"]], minlength=2)
        if kept.min() > 0:
            rows[ratio] = drawn
            continue
        empty = f"{ratio}: leaves no training image of {source.classes[int(kept.argmin())]}"
        if args.ratios:
            raise UserError(f"--ratios {empty}; ask for a larger share of it")
        source.notes.append(f"left out {empty}")
    return minority, rows


# ------------------------------------------------------------------------------------------------------------------
# packing: every image decoded once, by all cores, resumable
# ------------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------------
# what a ratio is written as
# ------------------------------------------------------------------------------------------------------------------


def contact_sheet(path, title, images, sizes, rows, labels, classes):
    """A PNG with some images of every class and split, in their true aspect ratio."""
    tile, gap, columns, dpi = 96, 24, 8, 100  # pixels
    sheet = Image.new("RGB", (columns * tile, 6 * (tile + gap) + gap), "white")
    figure = Figure(figsize=(sheet.width / dpi, sheet.height / dpi), dpi=dpi)
    text = [(title, 0)]
    for line, (part, c) in enumerate((part, c) for part in SPLITS for c in (0, 1)):
        members, top = rows[part][labels[rows[part]] == c], gap + line * (tile + gap)
        text.append((f"{part}: {classes[c]}, {len(members)} image{'s' * (len(members) != 1)}", top))
        for column, row in enumerate(
            members[np.unique(np.linspace(0, len(members) - 1, columns).astype(int))]
        ):
            height, width = (
                int(side)
                for side in np.maximum(np.rint((tile - 4) * sizes[row] / sizes[row].max()), 1)
            )
            picture = Image.fromarray(
                images[row].squeeze(2) if images.shape[3] == 1 else images[row]
            ).resize((width, height))
            sheet.paste(
                picture, (column * tile + (tile - width) // 2, top + gap + (tile - height) // 2)
            )
    figure.figimage(np.asarray(sheet))
    for words, top in text:
        figure.text(
            4 / sheet.width,
            1 - (top + gap / 2) / sheet.height,
            words,
            fontsize=8,
            va="center",
            parse_math=False,
        )
    with warnings.catch_warnings(), atomic_write(path) as part:
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # a class name in letters that the font lacks
        figure.savefig(part, format="png")


def make_records(
    name, images_path, index_path, rows, minority, source, settings, truncated, workers
):
    """{ratio: what <ratio>.json says}, from the packed images, for every entry of rows."""
    index = read_index(index_path)
    labels, _, _, names = index
    sums, grey, brightest, leaks = scan_images(images_path, index, workers)
    shape = np.load(images_path, mmap_mode="r").shape
    facts = {
        "images_sha256": sha256(images_path),
        "index_sha256": sha256(index_path),
        "truncated": truncated,
        "leaks": [[names[row] for row in same] for same in leaks],
        "settings": settings,
    }
    if grey and "grayscale" in DATASETS[settings["dataset"]].flags:
        source.notes.append(
            "every image is grey: --grayscale would store one channel and use the medical augmentation"
        )
    if brightest < 16:
        source.notes.append(
            f"WARNING: no pixel is brighter than {brightest} of 255; scale 16-bit files that use 12 bits to the full range"
        )
    records = {}
    for ratio, drawn in rows.items():
        mean, std = mean_std(sums[drawn["train"]], shape[1] * shape[2])
        counts = {
            part: {str(c): int((labels[drawn[part]] == c).sum()) for c in (0, 1)} for part in SPLITS
        }
        records[ratio] = {
            "name": name,
            "ratio": ratio,
            "classes": source.classes,
            "minority": minority,
            "counts": counts,
            "size": source.size,
            "recipe": source.recipe,
            "mean": mean,
            "std": std,
            "seed": settings["seed"],
            **facts,
            "splits": {part: drawn[part].tolist() for part in SPLITS},
        }
    return records


def write_ratios(folder, images_path, index_path, rows, records):
    """<ratio>.png and <ratio>.json for every record, and the packed files moved to their names just before the JSONs."""
    images = np.load(images_path, mmap_mode="r")
    labels, _, sizes, _ = read_index(index_path)
    for ratio, record in records.items():
        title = f"{folder.name} {ratio}, minority: {record['classes'][record['minority']]}"
        contact_sheet(
            folder / f"{ratio}.png", title, images, sizes, rows[ratio], labels, record["classes"]
        )
    os.replace(images_path, folder / "images.npy")
    os.replace(index_path, folder / "index.csv")
    for ratio, record in records.items():
        write_json(folder / f"{ratio}.json", {"command": command_line(), **record})


def existing_records(folder, settings, skip_bad):
    """The records of a finished subset folder, {ratio: record}, verified. UserError when it was made with other settings or was changed."""
    records = {}
    for path in sorted(folder.glob("[!.]*.json")):
        record = read_json(path, "delete it, or choose another folder with --name or --out")
        old = record.get("settings")
        if not isinstance(old, dict):
            raise UserError(
                f"{path}: not a subset of this kit; choose another folder with --name or --out"
            )
        if not {"truncated", "leaks"} <= record.keys():
            raise UserError(
                f"{folder}: made by an earlier version of the kit; delete it and give the same command again, for the same images"
            )
        now = {**settings, "skipped": old.get("skipped") if skip_bad else 0}
        differ = [
            f"{key} {old.get(key)} there, {now.get(key)} now"
            for key in {**now, **old}
            if old.get(key) != now.get(key)
        ]
        if differ:
            raise UserError(
                f"{folder}: made with other settings ({'; '.join(differ)}); choose another folder with --name or --out"
            )
        records[path.stem] = record
    for name, key in (("images.npy", "images_sha256"), ("index.csv", "index_sha256")):
        wanted = {record.get(key) for record in records.values()}
        if records and (not (folder / name).exists() or wanted != {sha256(folder / name)}):
            raise UserError(
                f"{folder / name}: not what the subset was made with (checksum); delete {folder} and make it again"
            )
    return records


# ------------------------------------------------------------------------------------------------------------------
# what can be done with a data set: make its subsets, verify them, either for all there are
# ------------------------------------------------------------------------------------------------------------------


def open_source(args):
    """The Source of a data set, the folder of its subsets, and the settings that decide what is in it."""
    try:
        source = DATASETS[args.dataset].load(args)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.data_root}: {error.strerror or error}; make it readable, or remove it"
        ) from None
    settings = {
        "dataset": args.dataset,
        "size": source.size,
        "store_size": source.store_size,
        "grayscale": args.grayscale,
        "seed": args.seed,
        "patient": args.patient,
        "minority": args.minority,
        "majority": args.majority,
        "source": f"{len(source.images)} images, sha256 {source.digest[:16]}",
    }
    return source, Path(args.out) / args.name, settings


def build_subset(args):
    source, folder, settings = open_source(args)
    records = existing_records(folder, settings, args.skip_bad)
    if not records or any(folder.glob(".part-*")):
        draw_all_ratios(
            source.labels, source.split, source, args
        )  # what cannot work fails before the long work
        lock_folder(folder)
        records = existing_records(folder, settings, args.skip_bad)  # by another process, just now
        if records:
            remove_temporary_files(folder)
    workers = count_workers(source, args)
    if records:  # decoded already
        first = next(iter(records.values()))
        settings["skipped"], truncated = first["settings"]["skipped"], first["truncated"]
        images_path, index_path = folder / "images.npy", folder / "index.csv"
    else:
        index_path = folder / ".part-index.csv"
        with naming(folder):
            path, packed = pack_images(source, folder, choose_stored_side(source), workers)
            images_path, good = drop_unreadable(path, packed, source.names, args.skip_bad)
            write_index(index_path, source, packed, good)
        settings["skipped"], truncated = (
            len(packed) - len(good),
            [source.names[i] for i in good if packed[i][3]],
        )
    labels, split, _, _ = read_index(index_path)
    minority, rows = draw_all_ratios(labels, split, source, args)
    new = {ratio: drawn for ratio, drawn in rows.items() if ratio not in records}
    if new:
        lock_folder(folder)
        more = make_records(
            folder.name,
            images_path,
            index_path,
            new,
            minority,
            source,
            settings,
            truncated,
            workers,
        )
        write_ratios(folder, images_path, index_path, new, more)
        records = {**records, **more}
        remove_temporary_files(folder)
    print_summary(folder, args, source, {ratio: records[ratio] for ratio in rows})
    files = ["images.npy", "index.csv"] * (len(records) == len(new)) + [
        f"{ratio}.{kind}" for ratio in new for kind in ("json", "png")
    ]
    print(
        f"wrote {folder}: {' '.join(files)}"
        if new
        else f"{folder} is there already, made with these settings; checksums verified"
    )
    print(
        f"next: python pretrain.py {shlex.quote(str(folder / next(iter(rows))))}.json --method supmin"
    )


def remove_temporary_files(folder):
    """Remove what a stopped call left behind; only while the folder is held."""
    for part in folder.glob(".part-*"):
        part.unlink()


def verify_subset(args):
    """Check a finished folder against its checksums, and everything in it against its source, decoded again. UserError for a difference."""
    source, folder, settings = open_source(args)
    records = existing_records(folder, settings, skip_bad=True)
    absent = [ratio for ratio in args.ratios or records if ratio not in records]
    if not records or absent:
        raise UserError(
            f"{folder}: no finished {' '.join(absent) or 'subset'} there to verify; make it with the same command without --verify"
        )
    path, again = folder / "images.npy", f"delete {folder} and make it again"
    labels, split, _, names = read_index(folder / "index.csv")
    position = {name: i for i, name in enumerate(source.names)}
    good = np.array([position.get(name, -1) for name in names])
    if (
        (good < 0).any()
        or (labels != source.labels[good]).any()
        or (split != source.split[good]).any()
    ):
        raise UserError(
            f"{folder / 'index.csv'}: lists other images, classes or splits than {args.data_root}; {again}"
        )
    workers, side = count_workers(source, args), np.load(path, mmap_mode="r").shape[1]
    starts = range(0, len(good), CHUNK)
    jobs = (
        (
            path,
            start,
            select_images(source.images, good[start : start + CHUNK]),
            side,
            source.channels,
            source.truncated,
        )
        for start in starts
    )
    checked = []
    with tqdm(total=len(good), desc="verify", unit="image", leave=False, delay=0.5) as bar:
        for results in parallel_map(check_block, jobs, len(starts), workers):
            checked += results
            bar.update(len(results))
    other = [name for name, (same, _) in zip(names, checked) if not same]
    if other:
        raise UserError(
            f"{path}: {len(other)} of {len(names)} images are not what their files hold now, first {other[0]}; {again}"
        )
    minority, rows = draw_all_ratios(
        labels, split, source, argparse.Namespace(**{**vars(args), "ratios": list(records)})
    )
    settings["skipped"], truncated = (
        len(source.names) - len(names),
        [name for name, (_, cut) in zip(names, checked) if cut],
    )
    expected = make_records(
        folder.name,
        path,
        folder / "index.csv",
        rows,
        minority,
        source,
        settings,
        truncated,
        workers,
    )
    for ratio, record in records.items():
        differ = [
            key
            for key in {**expected[ratio], **record}
            if key != "command" and expected[ratio].get(key) != record.get(key)
        ]
        if differ:
            raise UserError(
                f"{folder / ratio}.json: not what its images and its seed give: {', '.join(differ)}; {again}"
            )
    print_summary(folder, args, source, records)
    print(
        f"verified {folder}: checksums, {len(names)} images decoded again, {', '.join(records)} drawn again"
    )


def run_all_found(step, args):
    """make or verify for every data set below the data root, one after the other; one that fails does not stop the others."""
    there, failed = find_all(args.data_root), []
    for name, (folder, size) in there.items():
        print(f"\n{name} in {folder}")
        try:
            step(
                argparse.Namespace(
                    **{
                        **vars(args),
                        "dataset": name,
                        "name": name,
                        "data_root": str(folder),
                        "size": size,
                    }
                )
            )
        except UserError as error:
            print(f"make_subsets.py: {error}", file=sys.stderr)
            failed.append(name)
    print("", *describe_missing(args.data_root), sep="\n")
    if failed:
        raise UserError(
            f"failed: {', '.join(failed)}; mend what is said of it above and give the same command again"
        )
    if not there:
        raise UserError(
            f"--data-root {args.data_root}: none of the data sets lies there; put one there as listed"
        )


def print_summary(folder, args, source, records):
    """The counts, beside those to be expected, and what there is to say of single images."""

    def line(name, counts):
        return f"{name:<12}" + "".join(
            f"{' / '.join(map(str, counts[part])):>16}" for part in SPLITS
        )

    shape, record = (
        np.load(folder / "images.npy", mmap_mode="r").shape,
        next(iter(records.values())),
    )
    print(
        f"{folder.name}: {shape[0]} images, stored as {shape[1]} x {shape[2]} x {shape[3]}, "
        f"classes {source.classes[0]} / {source.classes[1]}, minority {source.classes[record['minority']]}"
    )
    print(*dict.fromkeys(source.notes), sep="\n", end="\n" * bool(source.notes))
    print(f"{'ratio':<12}" + "".join(f"{part:>16}" for part in SPLITS))
    for ratio, of in records.items():
        print(line(ratio, {part: of["counts"][part].values() for part in SPLITS}))
    labels, split, _, _ = read_index(folder / "index.csv")
    counts = {
        part: tuple(np.bincount(labels[split == part], minlength=2).tolist()) for part in SPLITS
    }
    expected = DATASETS[args.dataset].counts
    if expected and (args.verify or counts != expected):
        print(
            line("expected", expected)
            + ("   as it is" if counts == expected else f"   WARNING: there are{line('', counts)}")
        )
    if record["truncated"]:
        print(
            f"truncated, read as far as they go ({len(record['truncated'])}):",
            *first_lines(record["truncated"]),
            sep="\n",
        )
    if record["leaks"]:
        print(
            f"WARNING: equal pictures in two splits or in both classes ({len(record['leaks'])}):",
            *first_lines([" = ".join(same) for same in record["leaks"]]),
            sep="\n",
        )


def first_lines(lines, at_most=10):
    more = (
        [f"  and {len(lines) - at_most} more, listed in the .json files"]
        if len(lines) > at_most
        else []
    )
    return [f"  {line}" for line in lines[:at_most]] + more


# ------------------------------------------------------------------------------------------------------------------


def parse_args():
    p = ArgumentParser(
        "Images on disk -> subsets/<dataset>/, decoded once, at several class ratios of the training part."
    )
    p.epilog = "data sets: " + " ".join(DATASETS) + "; all: those that lie below --data-root"
    p.add_argument("dataset", help="one of those below, or all; digits needs no download")
    p.add_argument(
        "--data-root",
        default="data",
        metavar="D",
        help="folder of the images, or of the MedMNIST file; npz: the file",
    )
    p.add_argument(
        "--download", action="store_true", help="fetch a missing MedMNIST file into --data-root"
    )
    p.add_argument(
        "--minority",
        metavar="X",
        help="rare class. inat21: taxon; folder: A or A,B; npz, fashionmnist: 3 or 3,4 (default: rarer of two)",
    )
    p.add_argument(
        "--majority",
        metavar="Y",
        help="the other class, likewise (default of folder and npz: all others)",
    )
    p.add_argument(
        "--ratios",
        nargs="+",
        metavar="A-B",
        help=f"percent majority-minority in train (default: {' '.join(RATIOS)})",
    )
    p.add_argument(
        "--seed",
        type=number_from(0),
        default=0,
        metavar="K",
        help="of splits and draws; the model's seed is another",
    )
    p.add_argument(
        "--size",
        type=number_from(1),
        metavar="S",
        help="pixels of what the network sees (default: 224, digits 32, infarction 128, "
        "npz its own); MedMNIST: which file",
    )
    p.add_argument(
        "--store-size",
        type=number_from(1),
        metavar="S",
        help="largest side stored, pixels (default: size * 10/7 for photographs)",
    )
    p.add_argument(
        "--grayscale", action="store_true", help="store one channel, use the medical augmentation"
    )
    p.add_argument(
        "--patient",
        metavar="REGEX",
        help="folder: first group finds the patient in a file name; splits keep patients whole",
    )
    p.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable images out instead of stopping"
    )
    p.add_argument(
        "--workers",
        type=number_from(1),
        metavar="N",
        help="processes that decode (default: all cores)",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="check finished subsets against their checksums, source and published counts",
    )
    p.add_argument("--out", default="subsets", help="folder above <dataset>/")
    p.add_argument(
        "--name",
        help="another name for the <dataset> folder (default of folder and npz: the data root's name)",
    )
    args = p.parse_args()

    if args.dataset not in (*DATASETS, "all"):
        raise UserError(
            f"{args.dataset}: no such data set; choose one of {', '.join(DATASETS)}, or all"
        )
    taken = (
        ("skip_bad",) if args.dataset == "all" else (*DATASETS[args.dataset].flags, "size", "name")
    )
    for flag in (
        "download",
        "skip_bad",
        "grayscale",
        "minority",
        "majority",
        "patient",
        "size",
        "name",
    ):
        if getattr(args, flag) and flag not in taken:
            raise UserError(
                f"--{flag.replace('_', '-')}: {args.dataset} does not take it; leave it out"
            )
    if args.ratios:
        args.ratios = list(
            dict.fromkeys(
                parse_ratio(text)[0] for word in args.ratios for text in word.split(",") if text
            )
        )
    if args.name is None:
        root = Path(args.data_root).resolve()
        args.name = {"folder": root.name, "npz": root.stem}.get(args.dataset, args.dataset)
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: not a folder name; the place above it is --out")
    return args


def main():
    args = parse_args()
    step = verify_subset if args.verify else build_subset
    if args.dataset == "all":
        run_all_found(step, args)
    else:
        step(args)


if __name__ == "__main__":
    run_main(main)

# Expected printout of `python make_subsets.py digits`:
#
# digits: 1797 images, stored as 8 x 8 x 1, classes 0-4 / 5-9, minority 5-9
# ratio                  train             val            test
# 99-1                 620 / 6         90 / 89       181 / 180
# 95-5                595 / 31         90 / 89       181 / 180
# 50-50              313 / 313         90 / 89       181 / 180
# natural            630 / 627         90 / 89       181 / 180
# wrote subsets/digits: images.npy index.csv 99-1.json 99-1.png 95-5.json 95-5.png 50-50.json 50-50.png natural.json natural.png
# next: python pretrain.py subsets/digits/99-1.json --method supmin
