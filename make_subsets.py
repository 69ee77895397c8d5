r"""Images on disk -> subsets/<dataset>/: two classes, decoded once, at several class ratios.

    python make_subsets.py digits                                   # comes with scikit-learn
    python make_subsets.py breastmnist --size 28 --download         # MedMNIST
    python make_subsets.py inat21-mammals --data-root /data/inat21  # the folder of train/ and val/
    python make_subsets.py folder --data-root scans --patient '(person\d+)'
    python make_subsets.py table --data-root scans --labels labels.csv
    python make_subsets.py npz --data-root octmnist.npz --minority 2 --majority 3
    python make_subsets.py all --data-root /data                    # all that are found there
    python make_subsets.py all --data-root /data --verify

Writes images.npy (uint8 [M, S, S, C], every image squeezed to a square) and index.csv (a line per
image), and for each ratio <ratio>.json (the rows of train, val and test) and <ratio>.png (a
contact sheet). 99-1 is percent of majority and minority in train. The same command continues where
it was stopped; the same command and seed give the same bytes.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from datasets import DATASETS, describe_missing, find_all
from datasets.contact_sheet import draw_contact_sheet
from datasets.images import describe_enlargement
from datasets.pack import count_workers, mean_std, open_packed, pack_images, scan_images
from datasets.ratios import RATIOS, choose_tail, draw_all_ratios, long_tail_name, parse_ratio
from datasets.source import SPLITS
from datasets.splits import split_percents
from utils.cli import (
    ArgumentParser,
    UserError,
    command_line,
    number_from,
    print_next,
    run_main,
    share,
)
from utils.files import lock_folder, read_json, sha256, write_json

DEFAULT_BATCH_SIZE = 256  # of pretrain.py
# images of a class in a split: fewer give a warning, or no verdict
FEW, VERDICT = 10, 25
WATCHED_IMAGES = 10  # of validation, that pretrain.py needs for --watch-every
ENOUGH = 5  # rare training images of the ratio to begin with
# flags that decide the content of a subset; the later ones are recorded where they are given
SETTINGS = "dataset size store_size grayscale seed patient minority majority".split()
MORE_SETTINGS = ("classes", "tail", "val_share", "test_share", "folds", "fold")


def make_records(args, source, packed, settings, minority, drawn):
    """Make {ratio: content of <ratio>.json} from the packed images; adds notes to the source."""
    entry, n_classes = DATASETS[args.dataset], len(source.classes)
    sums, leaks, notes = scan_images(packed, count_workers(source, args.workers))
    source.notes += notes
    checksums = sha256(packed.images_path), sha256(packed.index_path)
    records = {}
    for ratio, rows in drawn.items():
        mean, std = mean_std(sums[rows["train"]], packed.shape[1] * packed.shape[2])
        counts = {split: count_classes(packed.labels[rows[split]], n_classes) for split in SPLITS}
        rare = {"minority": minority}
        if n_classes > 2:
            rarest, tail = choose_tail([*counts["train"].values()], source.tail)
            rare = {"minority": rarest, "tail": tail}
        records[ratio] = {
            "name": args.name,
            "ratio": ratio,
            "classes": source.classes,
            **rare,
            "counts": counts,
            "size": args.size,
            "recipe": entry.recipe or ("medical" if source.channels == 1 else "natural"),
            "mean": mean,
            "std": std,
            "seed": args.seed,
            "images_sha256": checksums[0],
            "index_sha256": checksums[1],
            "truncated": packed.truncated,
            "leaks": leaks,
            "settings": settings,
            "splits": {split: rows[split].tolist() for split in SPLITS},
        }
    return records


def write_ratios(folder, packed, records):
    """Write <ratio>.png, give the packed files their final names, and write <ratio>.json last."""
    for ratio, record in records.items():
        title = f"{folder.name} {ratio}, minority: {record['classes'][record['minority']]}"
        draw_contact_sheet(folder / f"{ratio}.png", title, packed, record)
    os.replace(packed.images_path, folder / "images.npy")
    os.replace(packed.index_path, folder / "index.csv")
    for ratio, record in records.items():
        write_json(folder / f"{ratio}.json", {"command": command_line(), **record})


def existing_records(folder, settings, skip_bad):
    """Read the records of a finished folder: {ratio: content of <ratio>.json}.

    Raises UserError where it was made with other settings, or where its images were changed.
    """
    paths = sorted(folder.glob("[!.]*.json"))
    records = {path.stem: read_json(path, "delete it") for path in paths}
    for record in records.values():
        old = record.get("settings", {})
        # images that were left out are accepted with --skip-bad alone
        now = {**settings, "skipped": old.get("skipped") if skip_bad else 0}
        keys = [key for key in {**old, **now} if old.get(key) != now.get(key)]
        differ = [f"{key} {old.get(key)} there, {now.get(key)} now" for key in keys]
        if differ:
            raise UserError(
                f"{folder}: made with other settings ({'; '.join(differ)}); delete it, or choose "
                "another folder with --name or --out"
            )
    for name, key in (("images.npy", "images_sha256"), ("index.csv", "index_sha256")):
        expected = {record.get(key) for record in records.values()}
        if records and not ((folder / name).exists() and expected == {sha256(folder / name)}):
            raise UserError(
                f"{folder / name}: missing or changed (checksum); delete {folder} and make it again"
            )
    return records


def open_source(args):
    """Find the images of a data set: (Source, folder of its subsets, settings of their content)."""
    entry = DATASETS[args.dataset]
    try:
        source = entry.load(args)
    except OSError as error:
        hint = "make it readable, or remove it"
        if isinstance(error, FileNotFoundError) and entry.get:
            hint = f"get {args.dataset} from {entry.get}, and give its folder with --data-root"
        path = error.filename or args.data_root
        raise UserError(f"{path}: {error.strerror or error}; {hint}") from None
    args.size = args.size or source.side
    args.store_size = args.store_size or source.store_size
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= {key: value for key in MORE_SETTINGS if (value := getattr(args, key, None))}
    settings["source"] = f"{len(source.images)} images, sha256 {source.digest[:16]}"
    return source, Path(args.out) / args.name, settings


def build_subset(args):
    """Make the subsets of one data set, or those of its ratios that are missing."""
    source, folder, settings = open_source(args)
    # refuse impossible ratios before the long work
    draw_all_ratios(source, source.labels, source.split, args)
    lock_folder(folder)
    records = existing_records(folder, settings, args.skip_bad)
    if records:
        packed = open_packed(folder, next(iter(records.values())))
    else:
        workers = count_workers(source, args.workers)
        packed = pack_images(source, folder, args.store_size, workers, args.skip_bad)
    settings["skipped"] = packed.skipped
    minority, drawn = draw_all_ratios(source, packed.labels, packed.split, args)
    missing = {ratio: rows for ratio, rows in drawn.items() if ratio not in records}
    if missing:
        records |= make_records(args, source, packed, settings, minority, missing)
    print_summary(args, source, packed, {ratio: records[ratio] for ratio in drawn})
    if missing:
        write_ratios(folder, packed, {ratio: records[ratio] for ratio in missing})
        print(f"wrote {folder}: images.npy, index.csv, and .json and .png of {', '.join(missing)}")
    else:
        print(f"{folder} is there already, made with these settings; checksums verified")
    for path in folder.glob(".part-*"):
        path.unlink()
    if not args.folds or args.fold == args.folds:
        print_next_training(folder, {ratio: records[ratio] for ratio in drawn})


def print_next_training(folder, records):
    """Print the training to begin with: on the natural ratio if it is the first, else the rarest.

    records: {ratio: content of <ratio>.json}. A ratio needs some rare images to begin with.
    """
    counts = {ratio: record["counts"]["train"].values() for ratio, record in records.items()}
    enough = {ratio: images for ratio, images in counts.items() if min(images) >= ENOUGH}
    shares = {ratio: min(images) / sum(images) for ratio, images in (enough or counts).items()}
    ratio = "natural" if next(iter(counts)) == "natural" else min(shares, key=shares.get)
    largest_batch = 2 ** int(math.log2(sum(counts[ratio])))
    is_small = largest_batch < DEFAULT_BATCH_SIZE
    small_batch = ["--batch-size", largest_batch] if is_small else []
    few = sum(records[ratio]["counts"]["val"].values()) < WATCHED_IMAGES
    unwatched = ["--watch-every", 0] if few else []
    flags = "--method", "supmin", *small_batch, *unwatched
    print_next("pretrain.py", folder / f"{ratio}.json", *flags)
    size, batch = min(32, records[ratio]["size"]), "" if is_small else " --batch-size 64"
    print(f"without a GPU, add: --arch resnet8 --size {size}{batch}")


def verify_subset(args):
    """Compare finished subsets with their checksums and source, and with rows drawn again."""
    source, folder, settings = open_source(args)
    records = existing_records(folder, settings, skip_bad=True)
    args.ratios = args.ratios or list(records)
    absent = [ratio for ratio in args.ratios if ratio not in records]
    if not records or absent:
        raise UserError(
            f"{folder}: no finished {' '.join(absent) or 'subset'}; make it without --verify"
        )
    packed = open_packed(folder, next(iter(records.values())))
    settings["skipped"] = packed.skipped
    minority, drawn = draw_all_ratios(source, packed.labels, packed.split, args)
    expected = make_records(args, source, packed, settings, minority, drawn)
    for ratio, record in expected.items():
        differ = [key for key in record if records[ratio].get(key) != record[key]]
        if differ:
            raise UserError(
                f"{folder / ratio}.json: {', '.join(differ)} differ from what its images and seed "
                f"give; delete {folder} and make it again"
            )
    print_summary(args, source, packed, expected)
    print(f"verified {folder}: checksums, counts, leaks and rows of {', '.join(expected)}")


def run_all_found(step, args):
    """Build or verify every data set below the data root; a failure does not stop the others."""
    found, failed = find_all(args.data_root), []
    for name, (folder, size) in found.items():
        print(f"\n{name} in {folder}")
        size = size or DATASETS[name].size
        changed = dict(dataset=name, name=name, data_root=str(folder), size=size)
        try:
            step(argparse.Namespace(**{**vars(args), **changed}))
        except UserError as error:
            print(f"make_subsets.py: {error}", file=sys.stderr)
            failed.append(name)
    print("", *describe_missing(args.data_root), sep="\n")
    if failed:
        raise UserError(
            f"failed: {', '.join(failed)}; fix the errors above and run the same command again"
        )
    if not found:
        raise UserError(f"--data-root {args.data_root}: no data set; put one there as listed above")


def print_summary(args, source, packed, records):
    """Print the counts of every ratio, and what limits the results."""
    record = next(iter(records.values()))
    rare = source.classes[record["minority"]]
    names = " / ".join(f"{name} (rare)" if name == rare else name for name in source.classes)
    stored = " x ".join(map(str, packed.shape[1:]))
    print(f"{args.name}: {len(packed.names)} images of {names}, stored as {stored}")
    published = DATASETS[args.dataset].counts
    print_counts(source.classes, {r: records[r]["counts"] for r in records}, published)
    found = {s: count_classes(packed.labels[packed.split == s], 2) for s in SPLITS}
    if published and any(tuple(found[s].values()) != published[s] for s in SPLITS):
        print("WARNING: the counts of all images are not the published ones")
    lines = [*source.notes, *describe_limits(args, packed, records)]
    print(*dict.fromkeys(lines), sep="\n", end="\n" * bool(lines))
    print_list("truncated, read as far as possible", packed.truncated)
    leaks = [" = ".join(names) for names in record["leaks"]]
    print_list("WARNING: equal pictures in two splits or in both classes", leaks)


def print_counts(classes, rows, published):
    """Print a table of the images per split and class; rows: {ratio: counts of its record}."""
    head = " / ".join(name if len(name) <= 12 else f"{name[:11]}…" for name in classes)
    head = head if len(classes) == 2 else "all (least-most)"
    width = max(15, len(head) + 2)
    print(f"{'ratio':<12}" + "".join(f" {split:>{width}}" for split in SPLITS))
    print(" " * 12 + f" {head:>{width}}" * len(SPLITS))
    if published:
        rows["published"] = {s: dict(enumerate(published[s])) for s in SPLITS}
    for name, counts in rows.items():
        columns = [format_counts([*counts[split].values()]) for split in SPLITS]
        print(f"{name:<12}" + "".join(f" {column:>{width}}" for column in columns))


def format_counts(counts):
    """Format images per class: both of two classes, else the sum with the least and the most."""
    if len(counts) == 2:
        return " / ".join(map(str, counts))
    return f"{sum(counts)} ({min(counts)}-{max(counts)})"


def describe_limits(args, packed, records):
    """Describe what limits the results: ratios left out, small images, few images of a class."""
    lines, record, side = [], next(iter(records.values())), packed.shape[1]
    left_out = [ratio for ratio in RATIOS if ratio not in records and not args.ratios]
    if left_out and not args.classes:
        rare = record["classes"][record["minority"]]
        lines.append(f"left out {', '.join(left_out)}: no training image of {rare} would remain")
    lines += describe_enlargement(side, record["size"])
    tiny = [name for name, size in zip(packed.names, packed.sizes, strict=True) if min(size) < 8]
    if tiny:
        lines.append(f"WARNING: images with a side below 8 pixels: {len(tiny)}, first {tiny[0]}")
    held_out = {split: record["counts"][split] for split in ("val", "test")}
    counts = {f"{ratio} train": records[ratio]["counts"]["train"] for ratio in records} | held_out
    if few := name_small_classes(record["classes"], counts, FEW):
        lines.append(f"WARNING: few images of {few}; scores will vary")
    if unsure := name_small_classes(record["classes"], held_out, VERDICT):
        has_folds = "folds" in DATASETS[args.dataset].flags and not args.folds
        hint = "; --folds 5 tests on every image" if has_folds else ""
        lines.append(f"no verdict with fewer than {VERDICT} images: {unsure}{hint}")
    return lines


def name_small_classes(classes, counts, limit, most=5):
    """Name the classes with fewer images than `limit` somewhere, as "rare (val 6, test 13)".

    counts: {place: {"0": images, ...}}; most: classes to name.
    """
    found = []
    for c, name in enumerate(classes):
        few = [f"{place} {n[str(c)]}" for place, n in counts.items() if n[str(c)] < limit]
        found += [f"{name} ({', '.join(few)})"] * bool(few)
    return ", ".join(found[:most] + [f"{len(found) - most} more classes"] * (len(found) > most))


def print_list(title, lines, limit=10):
    """Print the first lines below a title; nothing if there are none."""
    more = [f"and {len(lines) - limit} more, listed in the .json files"] * (len(lines) > limit)
    if lines:
        print(f"{title} ({len(lines)}):", *lines[:limit], *more, sep="\n  ")


def count_classes(labels, n_classes):
    return {str(c): int((labels == c).sum()) for c in range(n_classes)}


def parse_args():
    p = ArgumentParser(
        "Images on disk -> subsets/<dataset>/: decoded once, at several ratios.",
        example="python make_subsets.py folder --data-root scans --patient '(patient[0-9]+)'",
    )
    pixels = dict(type=number_from(1, high=4096), metavar="PIXELS")
    add = p.add_argument_group("data").add_argument
    text = f"{' '.join(DATASETS)}; all: those below --data-root"
    add("dataset", choices=[*DATASETS, "all"], metavar="dataset", help=text)
    add("path", nargs="?", help=argparse.SUPPRESS)
    add("--data-root", default="data", metavar="PATH", help="their folder; npz: the file itself")
    add("--download", action="store_true", help="fetch a missing MedMNIST file")
    add("--skip-bad", action="store_true", help="leave out unreadable images instead of stopping")
    sizes = "default: 224, digits 32, infarction 128, fashionmnist 28, npz its own"
    add("--size", help=f"side of what the network sees ({sizes})", **pixels)
    add(
        "--store-size",
        help="largest side stored (default for photographs: 10/7 of --size)",
        **pixels,
    )
    add("--grayscale", action="store_true", help="store one channel; augment like medical images")
    add("--labels", metavar="CSV", help="table: a line per image, path below --data-root and label")
    for column in ("path", "label", "patient", "split"):
        name = f"--{column}-column"
        add(name, metavar="NAME", help=f"table: column of the {column} (default: {column})")
    add = p.add_argument_group("classes, splits and ratios").add_argument
    add("--minority", metavar="A", help="rare class, or A,B; inat21: a taxon (default: the rarer)")
    add("--majority", metavar="B", help="other class, likewise (default: all others)")
    add("--classes", metavar="A,B,C", help="two or more classes, the most frequent first")
    text = "rare ones of --classes (default: below half of the mean size)"
    add("--tail", metavar="A,B", help=text)
    patient = "regular expression; its first group, found in a path, is the patient (for splits)"
    add("--patient", metavar="REGEX", help=patient)
    ratios = f"percent of majority and minority in train (default: {' '.join(RATIOS)})"
    add("--ratios", nargs="+", metavar="A-B", help=ratios)
    text = "long tail: the first class has N times the images of the last; makes lt<N>.json"
    add("--imbalance", type=number_from(1, float), metavar="N", help=text)
    add("--test-share", type=share, metavar="S", help="of a split that is drawn (default: 0.2)")
    add("--val-share", type=share, metavar="S", help="likewise (default: 0.1)")
    folds = "cross-validation: write <dataset>-fold1 to -foldK, each with a test split of its own"
    add("--folds", type=number_from(2), metavar="K", help=folds)
    add("--seed", type=number_from(0), default=0, metavar="N", help="seed for splits and draws")
    add = p.add_argument_group("machine").add_argument
    add("--workers", type=number_from(1), metavar="N", help="processes (default: all cores)")
    add = p.add_argument_group("output").add_argument
    add("--out", default="subsets", metavar="PATH", help="folder above <dataset>/")
    add("--name", help="name of <dataset>/ (folder, npz: that of --data-root)")
    add("--verify", action="store_true", help="compare finished subsets with source and checksums")
    args = p.parse_args()
    check_args(args)
    return args


def check_args(args):
    """Refuse flags that do not fit; fill in ratios, size and name."""
    if args.path is not None:
        raise UserError(f"{args.path}: give the place of the images as --data-root {args.path}")
    refuse_unused_flags(args)
    if args.ratios:
        texts = [text for word in args.ratios for text in word.split(",") if text]
        args.ratios = list(dict.fromkeys(parse_ratio(text)[0] for text in texts))
    if args.imbalance:
        args.ratios = list(dict.fromkeys([long_tail_name(args.imbalance), *(args.ratios or [])]))
    if args.dataset != "all":
        args.size = args.size or DATASETS[args.dataset].size
        args.name = args.name or default_name(args)
        if args.name in ("", ".", "..") or Path(args.name).name != args.name:
            raise UserError(f"--name {args.name}: not a folder name; give its parent with --out")


def refuse_unused_flags(args):
    """Raise UserError for a flag that the data set or another flag leaves without a use."""
    entry = DATASETS.get(args.dataset)
    accepted = {"size", "name", *entry.flags} if entry else {"skip_bad"}
    for flag in ("size", "name", *dict.fromkeys(f for e in DATASETS.values() for f in e.flags)):
        if getattr(args, flag) and flag not in accepted:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}: {args.dataset} does not take it; leave it out")
    if args.classes and (args.minority or args.majority):
        raise UserError("--classes: names all classes; leave out --minority and --majority")
    if args.folds and args.test_share:
        raise UserError(f"--test-share: --folds {args.folds} decides the test split; leave it out")
    if sum(split_percents(args).values()) >= 100:
        raise UserError("--test-share, --val-share: leave no image for train; give smaller shares")
    if args.tail and not args.classes:
        raise UserError("--tail: names rare ones of --classes; add --classes A,B,C")


def default_name(args):
    """Return the name of <dataset>/: that of the data set, or of the user's own images."""
    root = Path(args.data_root).resolve()
    names = {"folder": root.name, "table": root.name, "npz": root.stem}
    suffix = f"-{len(args.classes.split(','))}classes" if args.classes else ""
    return names.get(args.dataset, args.dataset) + suffix


def main():
    args = parse_args()
    step = verify_subset if args.verify else build_subset
    if args.dataset == "all":
        run_all_found(step, args)
    elif args.folds:
        for fold in range(1, args.folds + 1):
            print(f"fold {fold} of {args.folds}")
            changed = dict(fold=fold, name=f"{args.name}-fold{fold}")
            step(argparse.Namespace(**{**vars(args), **changed}))
        if not args.verify:
            print("the other folds likewise; then average their test scores")
    else:
        step(args)


if __name__ == "__main__":
    run_main(main)

# Expected printout of `python make_subsets.py digits`:
#
# digits: 1797 images of 0-4 / 5-9 (rare), stored as 8 x 8 x 1
# ratio                  train             val            test
#                    0-4 / 5-9       0-4 / 5-9       0-4 / 5-9
# 99-1                 620 / 6         90 / 89       181 / 180
# 95-5                595 / 31         90 / 89       181 / 180
# 50-50              313 / 313         90 / 89       181 / 180
# natural            630 / 627         90 / 89       181 / 180
# WARNING: few images of 5-9 (99-1 train 6); scores will vary
# wrote subsets/digits: images.npy, index.csv, and .json and .png of 99-1, 95-5, 50-50, natural
# next: python pretrain.py subsets/digits/99-1.json --method supmin
# without a GPU, add: --arch resnet8 --size 32 --batch-size 64
