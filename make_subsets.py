r"""Images on disk -> subsets/<dataset>/: two classes, decoded once, at several class ratios of the training part.

    python make_subsets.py digits                                               # no download: scikit-learn's 8x8 scans, 0-4 vs 5-9
    python make_subsets.py breastmnist --size 28 --download                     # MedMNIST file in data/
    python make_subsets.py inat21-mammals --data-root /data/inat21              # the folder that holds train/ and val/
    python make_subsets.py folder --data-root /data/xray --patient '(person\d+)'  # <class>/ or train|val|test/<class>/

Writes images.npy (uint8 [M, S, S, C], every image squeezed to a square), index.csv (one line per image), and per ratio
<ratio>.json (which rows are train, val and test) and <ratio>.png (what they look like). 99-1 is percent of majority and
minority in train. The same command goes on where it was stopped; the same command and seed give the same bytes.
"""

import csv
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (IMAGE_SUFFIXES, SPLITS, ArgumentParser, UserError, at_least, cli, command_line, image_files, printable, read_image, read_json, sha256,
                    squeeze, whole, write_json)

RATIOS = ("99-1", "95-5", "50-50", "natural")
CHUNK = 32                                             # images per job of a worker and per line of the journal
# every draw has its own stream default_rng([seed, stream, class]), so that no draw moves another
DRAW_SPLIT, DRAW_TRAIN, DRAW_VAL, DRAW_TEST = range(4)


@dataclass
class Source:
    """What a loader found. One entry per image in images, names, labels and split."""
    images: list                                       # paths, or uint8 arrays [H, W, C]
    names: list                                        # source column of index.csv: path below the data root
    labels: np.ndarray                                 # int [M]
    split: np.ndarray                                  # str [M]: train, val or test
    classes: list                                      # two names, index = label
    digest: str                                        # sha256 of what was found, to notice another source
    size: int                                          # side of what the network sees, pixels
    recipe: str
    channels: int = 3
    store_size: int | None = None                      # largest side stored, pixels; None: the images' own
    minority: int | None = None                        # None: the rarer class of train
    balance: bool = False                              # val and test cut to their rarest class
    notes: list = field(default_factory=list)          # lines to print


# ------------------------------------------------------------------------------------------------------------------
# the data sets: one loader each, from the arguments to a Source
# ------------------------------------------------------------------------------------------------------------------


def load_digits(args):
    from sklearn import datasets
    scans = datasets.load_digits()
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)[..., None]                # [1797, 8, 8, 1], 17 grey levels
    labels = (scans.target >= 5).astype(np.int64)
    names = [f"load_digits/{i}" for i in range(len(images))]
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    return Source(list(images), names, labels, draw_splits(labels, {"test": 20, "val": 10}, args.seed), ["0-4", "5-9"], digest,
                  args.size or 32, "medical", 1, args.store_size)


def load_medmnist(args):
    import medmnist
    size, root = args.size or 224, Path(args.data_root)
    sizes = (28, 64, 128, 224)
    if size not in sizes:
        raise UserError(f"--size {size}: {args.dataset} comes in {', '.join(map(str, sizes))} pixels; choose one of them")
    paths = {s: root / (f"{args.dataset}.npz" if s == 28 else f"{args.dataset}_{s}.npz") for s in sizes}
    path, info = paths[size], medmnist.INFO[args.dataset]
    dataset = getattr(medmnist, info["python_class"])
    if not path.exists() and args.download:
        download_medmnist(dataset, size, path)
    if not path.exists():
        others = "".join(f"; {p.name} is there: use --size {s}" for s, p in paths.items() if p.exists())
        raise UserError(f"{path}: no such file; --download fetches it, or get {path.name} from medmnist.com (Zenodo) "
                        f"and put it into {root}{others}")
    images, names, labels, split = [], [], [], []
    try:
        for part in SPLITS:
            data = dataset(split=part, root=str(root), size=size, download=False)        # np.load without pickles
            if data.imgs.shape[1:] != (size, size) or data.imgs.dtype != np.uint8 or len(data.labels) != len(data.imgs):
                raise ValueError
            images += list(data.imgs[..., None])
            names += [f"{path.name}/{part}/{i}" for i in range(len(data.imgs))]
            labels += [int(label) for label in data.labels.reshape(-1)]
            split += [part] * len(data.imgs)
        if set(labels) - {0, 1}:
            raise ValueError
    except MemoryError:
        raise
    except Exception as error:               # a damaged npz fails in zipfile, zlib, numpy or here; all of them mean the same
        raise UserError(f"{path}: damaged, or not the {args.dataset} file of {size} px ({type(error).__name__}); "
                        "move it away and fetch it again with --download") from None
    return Source(images, names, np.array(labels), np.array(split), [info["label"]["0"], info["label"]["1"]], sha256(path),
                  size, "medical", 1, args.store_size)


def download_medmnist(dataset, size, path):
    """Fetch a MedMNIST file beside its place, then move it there: no half download is ever taken for the file."""
    import tempfile
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        try:
            dataset(split="train", root=folder, size=size, download=True)
        except (RuntimeError, ValueError, OSError):
            raise UserError(f"--download: could not fetch {path.name}; get it from medmnist.com (Zenodo) "
                            f"and put it into {path.parent}") from None
        os.replace(Path(folder) / path.name, path)


INAT21 = {                                             # minority, majority
    "inat21-plants": ("Fagales/Fagaceae/Quercus", "Saxifragales"),
    "inat21-insects": ("Hymenoptera/Apidae", "Hymenoptera/Vespidae"),
    "inat21-mammals": ("Artiodactyla", "Carnivora"),
}


def load_inat21(args):
    """iNaturalist 2021. Test is its val part; of every class 5 % of its train part become val."""
    taxa = INAT21.get(args.dataset, (args.minority, args.majority))
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        if taxon is None:
            raise UserError(f"{flag}: inat21 needs one taxon for each class, for example --minority Quercus --majority Saxifragales")
    root = Path(args.data_root)
    root = next((r for r in (root, root / "inat21", root / "inat21_mini") if (r / "train").is_dir() and (r / "val").is_dir()), None)
    if root is None:
        raise UserError(f"{args.data_root}: no folder with train/ and val/; get iNaturalist 2021 from "
                        "github.com/visipedia/inat_comp/tree/master/2021, unpack it there, or give its folder with --data-root")
    folders = {part: {f: f.name.split("_", 7)[1:] for f in sorted((root / part).iterdir()) if re.fullmatch(r"\d+(_[^_]+){6}_.+", f.name)}
               for part in ("train", "val")}                                             # folder -> its seven taxonomy levels
    names, found = [], []
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        name, chosen = match_taxon(flag, taxon, folders, root)
        names.append(name)
        found.append(chosen)
    both = sorted(found[0] & found[1])
    if both:
        raise UserError(f"--minority {taxa[0]} --majority {taxa[1]}: overlap in {both[0].name}; choose two taxa without a common species")
    images = [(image, label, part) for part in ("train", "val") for label in (0, 1)
              for folder in sorted(found[label]) if folder.parent.name == part for image in image_files(folder)]
    labels = np.array([label for _, label, _ in images], dtype=np.int64)
    split = np.array(["test" if part == "val" else "train" for _, _, part in images], dtype="<U5")
    for label in (0, 1):
        rows = np.flatnonzero((labels == label) & (split == "train"))
        split[np.random.default_rng([args.seed, DRAW_SPLIT, label]).permutation(rows)[:split_counts(len(rows))[1]]] = "val"
    return file_source(args, [image for image, _, _ in images], root, labels, split, names, minority=0, balance=True)


def match_taxon(flag, taxon, folders, root):
    """The folders whose taxonomy holds the levels of `taxon` in a row, and the last level as it is written there."""
    wanted = [level for level in re.split("[/_]", taxon.lower()) if level]
    n = len(wanted)
    found, name, known = set(), None, set()
    for part in folders.values():
        for folder, levels in part.items():
            lower = [level.lower() for level in levels]
            known.update(levels)
            at = [i for i in range(len(levels) - n + 1) if n and lower[i:i + n] == wanted]
            if at:
                found.add(folder)
                name = levels[at[0] + n - 1]
    if not known:
        raise UserError(f"{root / 'train'}: no folders named NNNNN_Kingdom_Phylum_Class_Order_Family_Genus_species; give the folder of "
                        "iNaturalist 2021 that holds train/ and val/ with --data-root")
    if not found:
        lower = {level.lower(): level for level in sorted(known)}
        near = [lower[k] for word in reversed(wanted) for k in difflib.get_close_matches(word, lower, n=5, cutoff=0.4)]
        near = dict.fromkeys(near or list(lower.values())[:10])
        raise UserError(f"{flag} {taxon}: matches no folder in {root}; nearest names: {', '.join(near)}")
    return name, found


def load_folder(args):
    """Any two classes: train/val/test/<class>/ or <class>/, images at any depth below. What is not given is drawn from train."""
    root = Path(args.data_root)
    layout = "<class>/ or train/<class>/, val/<class>/, test/<class>/"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put the images there as {layout}, or give their folder with --data-root")
    tops = subfolders(root)
    parts = {folder.name.lower(): folder for folder in tops if folder.name.lower() in SPLITS}
    others = [folder.name for folder in tops if folder not in parts.values()]
    if parts and ("train" not in parts or others):
        odd = f"there is also {', '.join(others)}" if others else "there is no train folder"
        raise UserError(f"{root}: a folder named {' or '.join(f.name for f in parts.values())} is a split, but {odd}; "
                        f"rename it if it is a class, else use {layout}")
    groups = parts or {"train": root}
    classes = sorted({folder.name for group in groups.values() for folder in subfolders(group)})
    for name in classes:
        if name.lower() in SPLITS:
            raise UserError(f"{root}: a class folder named {name} would be taken for a split; rename it")
    if len(classes) != 2:
        raise UserError(f"{root}: class folders found: {len(classes)} ({', '.join(classes[:10]) or 'none'}); "
                        f"exactly two are needed, as {layout}")
    found = [(image, label, part) for part, folder in groups.items() for label, name in enumerate(classes)
             for image in image_files(folder / name)]
    if not found:
        raise UserError(f"{root}: no images below {' and '.join(classes)} ({' '.join(sorted(IMAGE_SUFFIXES))}); put them there")
    images, labels = [image for image, _, _ in found], np.array([label for _, label, _ in found], dtype=np.int64)
    split = np.array([part for _, _, part in found], dtype="<U5")
    patients = np.array([patient(args.patient, image, root) for image in images]) if args.patient else None
    source = file_source(args, images, root, labels, split, classes)
    missing = {part: percent for part, percent in {"test": 20, "val": 10}.items() if part not in groups}
    if missing:
        rows = np.flatnonzero(split == "train")
        split[rows] = draw_splits(labels[rows], missing, args.seed, None if patients is None else patients[rows])
        shares = ", ".join(f"{percent} % for {part}" for part, percent in missing.items())
        source.notes.append(f"drawn from train: {shares}"
                            + (f", by patient ({len(set(patients[rows]))} patients)" if args.patient else ""))
    if args.patient:
        for part in SPLITS:
            shared = set(patients[split == part]) & set(patients[split != part])
            if shared:
                raise UserError(f"--patient: patient {sorted(shared)[0]} has images in {part} and in another split folder; "
                                "move them into one")
    if args.minority is not None:
        same = [label for label, name in enumerate(classes) if name == args.minority]
        if not same:
            near = difflib.get_close_matches(args.minority, classes, cutoff=0.4) or classes
            raise UserError(f"--minority {args.minority}: no such class folder; nearest names: {', '.join(near)}")
        source.minority = same[0]
    return source


def patient(regex, image, root):
    """The patient id of an image: first group of the regex in its file name, else in its path below the data root."""
    try:
        match = re.search(regex, image.name) or re.search(regex, image.relative_to(root).as_posix())
    except re.error as error:
        raise UserError(f"--patient {regex}: not a regular expression ({error})") from None
    if match is None or match.group(min(match.re.groups, 1)) is None:
        raise UserError(f"--patient {regex}: finds no patient in {printable(image)}; change the expression so that every file has one")
    return match.group(min(match.re.groups, 1))


def file_source(args, images, root, labels, split, classes, **more):
    names = [printable(image.relative_to(root).as_posix()) for image in images]
    found = "\n".join(f"{name}\t{label}\t{image.stat().st_size if image.exists() else None}"
                      for name, label, image in zip(names, labels, images))
    size = args.size or 224
    return Source(images, names, labels, split, classes, hashlib.sha256(found.encode()).hexdigest(), size,
                  "medical" if args.grayscale else "natural", 1 if args.grayscale else 3, args.store_size or round(size * 10 / 7), **more)


def subfolders(folder):
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".")]


# name: (loader, flags that only some data sets take). A new data set is a loader that returns a Source, and a line here.
DATASETS = {
    "digits": (load_digits, ()),
    "breastmnist": (load_medmnist, ("download",)),
    "pneumoniamnist": (load_medmnist, ("download",)),
    **{name: (load_inat21, ("skip_bad", "grayscale")) for name in INAT21},
    "inat21": (load_inat21, ("skip_bad", "grayscale", "minority", "majority")),
    "folder": (load_folder, ("skip_bad", "grayscale", "minority", "patient")),
}


# ------------------------------------------------------------------------------------------------------------------
# which rows: splits, balanced parts, ratios
# ------------------------------------------------------------------------------------------------------------------


def split_counts(n: int):
    """(train, val) of n images: floor of 95 % and 5 %, then the remainder one by one from the first, as the reference does."""
    counts = [math.floor(n * 0.95), math.floor(n * 0.05)]
    for i in range(n - sum(counts)):
        counts[i % 2] += 1
    return tuple(counts)


def ratio_counts(class_sizes, ratios):
    """Images kept per class: min(floor(m * ratio_c), n_c), m the smallest class, so the total is about m whatever the ratio.

    class_sizes: images per class; ratios: share per class, sum 1. In double precision, as the reference: 100 * 0.29 gives 28.
    """
    smallest = min(class_sizes)
    return [min(math.floor(smallest * ratio), n) for n, ratio in zip(class_sizes, ratios)]


def draw_splits(labels, percents, seed, groups=None):
    """Draw whole groups (patients; default: every image its own) for each split of percents, stratified by class; the rest is train.

    labels int [M] in {0, 1}; percents: {split: percent of the images}; groups [M] or None. A group counts as rare if any of its
    images is of the rarer class. Returns str [M]. A split gets its share of each stratum's images, exceeded by at most one group.
    """
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    has_rare = np.zeros(len(sizes), dtype=bool)
    has_rare[groups[labels == np.bincount(labels, minlength=2).argmin()]] = True
    drawn = np.full(len(sizes), "train", dtype="<U5")                                    # per group
    for stratum in (0, 1):
        members = np.random.default_rng([seed, DRAW_SPLIT, stratum]).permutation(np.flatnonzero(has_rare == stratum))
        before, total = np.cumsum(sizes[members]) - sizes[members], sizes[members].sum()
        low = 0
        for name, percent in percents.items():
            drawn[members[(100 * before >= low * total) & (100 * before < (low + percent) * total)]] = name
            low += percent
    return drawn[groups]


def parse_ratio(text):
    """'99-1' -> ('99-1', 0.99, 0.01): percent of majority and minority in train. 'natural' -> ('natural', None, None)."""
    if text == "natural":
        return text, None, None
    try:
        major, minor = (Decimal(part) for part in text.split("-"))
        if not (major + minor == 100 and major >= minor >= 0):
            raise ValueError
    except (ValueError, InvalidOperation):
        raise UserError(f"--ratios {text}: not a ratio; give percent of majority and minority in train, as 99-1 or 99.5-0.5, "
                        "or natural") from None
    name = "-".join(format(part.normalize(), "f") for part in (major, minor))
    return name, float(major / 100), float(minor / 100)


def draw_rows(labels, split, ratio, minority, balance, seed):
    """The rows of one ratio: {"train": sorted rows, "val": ..., "test": ...}. Every ratio takes the head of one permutation per class."""
    rows = {}
    for part, stream in zip(SPLITS, (DRAW_TRAIN, DRAW_VAL, DRAW_TEST)):
        drawn = [np.random.default_rng([seed, stream, c]).permutation(np.flatnonzero((split == part) & (labels == c)))
                 for c in (0, 1)]
        keep = [len(d) for d in drawn]
        _, major, minor = parse_ratio(ratio)
        if part == "train" and ratio != "natural":
            keep = ratio_counts(keep, [minor, major] if minority == 0 else [major, minor])
        elif part != "train" and balance:
            keep = [min(keep)] * 2
        rows[part] = np.sort(np.concatenate([d[:k] for d, k in zip(drawn, keep)])).astype(np.int64)
    return rows


def plan(labels, split, source, args):
    """(minority, {ratio: rows}) for the ratios asked for. UserError when a split lacks a class or a ratio empties one."""
    for part in SPLITS:
        for c in (0, 1):
            if not ((split == part) & (labels == c)).any():
                raise UserError(f"{args.data_root}: class {source.classes[c]} has no image in {part}; every split needs both classes")
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


def stored_side(images, limit):
    """Side of the stored squares: `limit`, or the longest side of all images if that is smaller (from the headers)."""
    from PIL import Image
    longest = 0
    for image in tqdm(images, desc="sizes", unit="image", leave=False, delay=1):
        if isinstance(image, np.ndarray):
            longest = max(longest, *image.shape[:2])
        else:
            try:
                with Image.open(image) as opened:
                    longest = max(longest, *opened.size)
            except Exception:                                   # an unreadable image is reported by name when it is decoded
                continue
        if limit and longest >= limit:
            return limit
    return max(longest, 1)


def pack_chunk(job):
    """Decode some images into their place of the .npy file. Returns (start, crc32 of the block, [[width, height, why unreadable]])."""
    path, offset, start, images, side, channels = job
    block, rows = np.zeros((len(images), side, side, channels), dtype=np.uint8), []
    for i, image in enumerate(images):
        try:
            pixels = image if isinstance(image, np.ndarray) else read_image(image, grayscale=channels == 1)
            block[i] = squeeze(pixels, side)
            rows.append([pixels.shape[1], pixels.shape[0], None])
        except MemoryError:
            raise
        except Exception as error:                              # Pillow reports a broken image in many ways
            rows.append([0, 0, reason(error)])
    with open(path, "r+b") as file:                             # not through a memory map: a full disk must be an error, not a SIGBUS
        file.seek(offset + start * block[0].nbytes)
        file.write(block)
    return start, zlib.crc32(block), rows


def reason(error):
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow can identify"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is the parent's business
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()   # nor outlive a killed parent


def pack(source, folder, side, workers):
    """Decode all images into folder/.part-images.npy. Returns its path and [[width, height, reason if unreadable]] per image.

    A journal beside it holds what is finished, with a checksum, so that the same command goes on after a kill.
    """
    path, journal = folder / ".part-images.npy", folder / ".part-journal.jsonl"
    shape = (len(source.images), side, side, source.channels)
    head = {"source": source.digest, "shape": list(shape)}
    done = read_journal(journal, path, head)
    if not done:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        with whole(journal) as part:
            part.write_text(json.dumps(head) + "\n")
    offset = np.lib.format.open_memmap(path, mode="r").offset
    jobs = [(path, offset, start, source.images[start:start + CHUNK], side, source.channels)
            for start in range(0, len(source.images), CHUNK) if start not in done]
    if done:
        print(f"going on: {len(source.images) - sum(len(job[3]) for job in jobs)} of {len(source.images)} images are packed already")
    parallel = workers > 1 and len(jobs) > 1 and not isinstance(source.images[0], np.ndarray)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), initializer=start_worker) if parallel else None
    with open(journal, "a") as log, tqdm(total=len(source.images), desc="pack", unit="image", leave=False, delay=0.5) as bar:
        bar.update(len(source.images) - sum(len(job[3]) for job in jobs))
        try:
            for start, crc, rows in (pool.map if pool else map)(pack_chunk, jobs):
                log.write(json.dumps([start, crc, rows]) + "\n")
                log.flush()
                done[start] = rows
                bar.update(len(rows))
        except BrokenProcessPool:
            raise UserError(f"--workers {workers}: the system killed a worker, most likely for want of memory; "
                            "the same command with fewer goes on from here") from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return path, [row for start in sorted(done) for row in done[start]]


def read_journal(journal, path, head):
    """{start: rows} of the chunks of an earlier, stopped call that are really in the file. Empty when it was for something else."""
    if not (journal.exists() and path.exists()):
        return {}
    lines = []
    for line in journal.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:                                      # torn by the kill
            continue
    if not lines or lines[0] != head:
        return {}
    try:
        images = np.load(path, mmap_mode="r")
    except ValueError:
        return {}
    if list(images.shape) != head["shape"]:
        return {}
    done = {}
    for start, crc, rows in tqdm(lines[1:], desc="check", unit="chunk", leave=False, delay=1):
        unreadable = any(why for _, _, why in rows)             # perhaps mended by now
        if not unreadable and zlib.crc32(np.ascontiguousarray(images[start:start + len(rows)])) == crc:
            done[start] = rows
    return done


def keep_readable(path, packed, names, skip_bad):
    """Report the unreadable images and stop, or leave them out. Returns the path of the images kept and which they are, int [M]."""
    bad = [(name, row[2]) for name, row in zip(names, packed) if row[2]]
    good = np.array([i for i, row in enumerate(packed) if not row[2]], dtype=np.int64)
    if not bad:
        return path, good
    shown = [f"  {name}: {why}" for name, why in (bad if skip_bad else bad[:20])]
    print(f"{len(bad)} unreadable image{'s' * (len(bad) > 1)}{', left out' if skip_bad else ''}:", *shown, sep="\n")
    if not skip_bad or not len(good):
        raise UserError(f"{bad[0][0]}: {bad[0][1]}" + (f" (and {len(bad) - 1} more unreadable images)" if len(bad) > 1 else "")
                        + "; mend or remove what is listed, or leave it out with --skip-bad")
    images = np.load(path, mmap_mode="r")
    kept = path.with_name(".part-kept.npy")
    out = np.lib.format.open_memmap(kept, mode="w+", dtype=np.uint8, shape=(len(good), *images.shape[1:]))
    for start in range(0, len(good), CHUNK):
        out[start:start + CHUNK] = images[good[start:start + CHUNK]]
    out.flush()
    return kept, good


def write_index(path, source, packed, good):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "split", "label", "class", "width", "height", "source"])
        for row, i in enumerate(good):
            label = int(source.labels[i])
            writer.writerow([row, source.split[i], label, source.classes[label], packed[i][0], packed[i][1], source.names[i]])


def read_index(path):
    """labels int [M], split str [M], sizes int [M, 2] (height, width)."""
    with open(path, newline="", encoding="utf-8") as file:
        index = list(csv.DictReader(file))
    return (np.array([int(row["label"]) for row in index]), np.array([row["split"] for row in index]),
            np.array([(int(row["height"]), int(row["width"])) for row in index]))


# ------------------------------------------------------------------------------------------------------------------
# what a ratio is written as
# ------------------------------------------------------------------------------------------------------------------


def pixel_sums(images, rows):
    """Sums of pixels and of their squares [M, 2, C] of some rows, exact integers in float64; and whether all of them have equal channels.

    One pass over the file serves every ratio.
    """
    level = np.arange(256.0)
    sums, equal = np.zeros((len(images), 2, images.shape[3])), images.shape[3] == 3
    for row in tqdm(rows, desc="mean and std", unit="image", leave=False, delay=1):
        image = images[row]                                                              # [S, S, C]
        equal = equal and bool((image == image[..., :1]).all())
        for c in range(images.shape[3]):
            histogram = np.bincount(image[..., c].ravel(), minlength=256)
            sums[row, :, c] = histogram @ level, histogram @ level ** 2
    return sums, equal


def mean_std(sums, pixels):
    """Per channel, in [0, 1]; sums [n, 2, C] of n images of `pixels` pixels. An all-equal channel gets std 1/255, never 0."""
    first, second = sums.sum(0) / (len(sums) * pixels)                                   # [C] each
    std = np.sqrt(np.maximum(second - first ** 2, 1)) / 255
    return [round(float(m), 6) for m in first / 255], [round(float(s), 6) for s in std]


def contact_sheet(path, title, images, sizes, rows, labels, classes):
    """A PNG with some images of every class and split, in their true aspect ratio."""
    import warnings
    from matplotlib.figure import Figure
    from PIL import Image
    tile, gap, columns, dpi = 96, 24, 8, 100                                             # pixels
    sheet = Image.new("RGB", (columns * tile, 6 * (tile + gap) + gap), "white")
    figure = Figure(figsize=(sheet.width / dpi, sheet.height / dpi), dpi=dpi)
    text = [(title, 0)]
    for line, (part, c) in enumerate((part, c) for part in SPLITS for c in (0, 1)):
        members, top = rows[part][labels[rows[part]] == c], gap + line * (tile + gap)
        text.append((f"{part}: {classes[c]}, {len(members)} image{'s' * (len(members) != 1)}", top))
        for column, row in enumerate(members[np.unique(np.linspace(0, len(members) - 1, columns).astype(int))]):
            height, width = (int(side) for side in np.maximum(np.rint((tile - 4) * sizes[row] / sizes[row].max()), 1))
            picture = Image.fromarray(images[row].squeeze(2) if images.shape[3] == 1 else images[row]).resize((width, height))
            sheet.paste(picture, (column * tile + (tile - width) // 2, top + gap + (tile - height) // 2))
    figure.figimage(np.asarray(sheet))
    for words, top in text:
        figure.text(4 / sheet.width, 1 - (top + gap / 2) / sheet.height, words, fontsize=8, va="center", parse_math=False)
    with warnings.catch_warnings(), whole(path) as part:
        warnings.filterwarnings("ignore", message="Glyph")                               # a class name in letters that the font lacks
        figure.savefig(part, format="png")


def write_ratios(folder, images_path, index_path, rows, minority, source, settings):
    """<ratio>.png and <ratio>.json for every entry of rows, and the packed files moved to their names just before the JSONs."""
    images = np.load(images_path, mmap_mode="r")
    labels, split, sizes = read_index(index_path)
    sums, equal = pixel_sums(images, np.flatnonzero(split == "train"))
    if equal:
        source.notes.append("every image is grey: --grayscale would store one channel and use the medical augmentation")
    sums_of = {"images_sha256": sha256(images_path), "index_sha256": sha256(index_path)}
    records = {}
    for ratio, drawn in rows.items():
        mean, std = mean_std(sums[drawn["train"]], images.shape[1] * images.shape[2])
        counts = {part: {str(c): int((labels[drawn[part]] == c).sum()) for c in (0, 1)} for part in SPLITS}
        title = f"{folder.name} {ratio}, minority: {source.classes[minority]}"
        contact_sheet(folder / f"{ratio}.png", title, images, sizes, drawn, labels, source.classes)
        records[ratio] = {"name": folder.name, "ratio": ratio, "classes": source.classes, "minority": minority, "counts": counts,
                          "size": source.size, "recipe": source.recipe, "mean": mean, "std": std, "seed": settings["seed"],
                          "command": command_line(), **sums_of, "settings": settings,
                          "splits": {part: drawn[part].tolist() for part in SPLITS}}
    os.replace(images_path, folder / "images.npy")
    os.replace(index_path, folder / "index.csv")
    for ratio, record in records.items():
        write_json(folder / f"{ratio}.json", record)


def finished(folder, settings, skip_bad):
    """The records of a finished subset folder, {ratio: record}, verified. UserError when it was made with other settings or was changed."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        record = read_json(path, "delete it, or choose another folder with --name or --out")
        old = record.get("settings")
        if not isinstance(old, dict):
            raise UserError(f"{path}: not a subset of this kit; choose another folder with --name or --out")
        now = {**settings, "skipped": old.get("skipped") if skip_bad else 0}
        differ = [f"{key} {old.get(key)} there, {now.get(key)} now" for key in {**now, **old} if old.get(key) != now.get(key)]
        if differ:
            raise UserError(f"{folder}: made with other settings ({'; '.join(differ)}); choose another folder with --name or --out")
        records[path.stem] = record
    for name, key in (("images.npy", "images_sha256"), ("index.csv", "index_sha256")):
        wanted = {record.get(key) for record in records.values()}
        if records and (not (folder / name).exists() or wanted != {sha256(folder / name)}):
            raise UserError(f"{folder / name}: not what the subset was made with (checksum); delete {folder} and make it again")
    return records


# ------------------------------------------------------------------------------------------------------------------


def parse_args():
    p = ArgumentParser("Images on disk -> subsets/<dataset>/, decoded once, at several class ratios of the training part.")
    p.epilog = "data sets: " + " ".join(DATASETS)
    p.add_argument("dataset", help="one of those below; digits needs no download")
    p.add_argument("--data-root", default="data", metavar="D", help="folder of the images, or of the MedMNIST file")
    p.add_argument("--download", action="store_true", help="fetch a missing MedMNIST file into --data-root")
    p.add_argument("--minority", metavar="X", help="inat21: taxon of the rare class; folder: its class (default: rarer)")
    p.add_argument("--majority", metavar="Y", help="inat21: taxon of the other class")
    p.add_argument("--ratios", nargs="+", metavar="A-B", help=f"percent majority-minority in train (default: {' '.join(RATIOS)})")
    p.add_argument("--seed", type=at_least(0), default=0, metavar="K", help="of splits and draws; the model's seed is another")
    p.add_argument("--size", type=at_least(1), metavar="S", help="pixels of what the network sees (default: 224, digits 32); MedMNIST: which file")
    p.add_argument("--store-size", type=at_least(1), metavar="S", help="largest side stored, pixels (default: size * 10/7 for files)")
    p.add_argument("--grayscale", action="store_true", help="store one channel, use the medical augmentation")
    p.add_argument("--patient", metavar="REGEX", help="folder: first group finds the patient in a file name; splits keep patients whole")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out instead of stopping")
    p.add_argument("--workers", type=at_least(1), metavar="N", help="processes that decode (default: all cores)")
    p.add_argument("--out", default="subsets", help="folder above <dataset>/")
    p.add_argument("--name", help="another name for the <dataset> folder (default of folder: the data root's name)")
    args = p.parse_args()

    if args.dataset not in DATASETS:
        raise UserError(f"{args.dataset}: no such data set; choose one of {', '.join(DATASETS)}")
    for flag in ("download", "skip_bad", "grayscale", "minority", "majority", "patient"):
        if getattr(args, flag) and flag not in DATASETS[args.dataset][1]:
            raise UserError(f"--{flag.replace('_', '-')}: {args.dataset} does not take it; leave it out")
    if args.ratios:
        args.ratios = list(dict.fromkeys(parse_ratio(text)[0] for word in args.ratios for text in word.split(",") if text))
    if args.name is None:
        args.name = Path(args.data_root).resolve().name if args.dataset == "folder" else args.dataset
    if args.name in ("", ".", "..") or Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: not a folder name; the place above it is --out")
    return args


def main():
    args = parse_args()
    source = DATASETS[args.dataset][0](args)                                             # images, labels, splits
    folder = Path(args.out) / args.name
    settings = {"dataset": args.dataset, "size": source.size, "store_size": source.store_size, "grayscale": args.grayscale,
                "seed": args.seed, "patient": args.patient, "minority": args.minority, "majority": args.majority,
                "source": f"{len(source.images)} images, sha256 {source.digest[:16]}"}
    records = finished(folder, settings, args.skip_bad)
    if records:                                                                          # decoded already
        settings["skipped"] = next(iter(records.values()))["settings"]["skipped"]
        images_path, index_path = folder / "images.npy", folder / "index.csv"
    else:
        plan(source.labels, source.split, source, args)                                  # what cannot work fails before the long work
        folder.mkdir(parents=True, exist_ok=True)
        side = stored_side(source.images, source.store_size)
        path, packed = pack(source, folder, side, args.workers or cores())
        images_path, good = keep_readable(path, packed, source.names, args.skip_bad)
        settings["skipped"] = len(packed) - len(good)
        index_path = folder / ".part-index.csv"
        write_index(index_path, source, packed, good)
    labels, split, _ = read_index(index_path)
    minority, rows = plan(labels, split, source, args)
    new = {ratio: drawn for ratio, drawn in rows.items() if ratio not in records}
    if new:
        write_ratios(folder, images_path, index_path, new, minority, source, settings)
    for part in folder.glob(".part-*"):
        part.unlink()
    report(folder, source, minority, rows, new, labels)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(folder, source, minority, rows, new, labels):
    shape = np.load(folder / "images.npy", mmap_mode="r").shape
    print(f"{folder.name}: {shape[0]} images, stored as {shape[1]} x {shape[2]} x {shape[3]}, "
          f"classes {source.classes[0]} / {source.classes[1]}, minority {source.classes[minority]}")
    print(*dict.fromkeys(source.notes), sep="\n", end="\n" * bool(source.notes))
    print(f"{'ratio':<12}" + "".join(f"{part:>16}" for part in SPLITS))
    for ratio, drawn in rows.items():
        print(f"{ratio:<12}" + "".join(f"{' / '.join(str((labels[drawn[part]] == c).sum()) for c in (0, 1)):>16}" for part in SPLITS))
    files = ["images.npy", "index.csv"] * (len(new) == len(rows)) + [f"{ratio}.{kind}" for ratio in new for kind in ("json", "png")]
    print(f"wrote {folder}: {' '.join(files)}" if new else f"{folder} is there already, made with these settings; checksums verified")
    print(f"next: python pretrain.py {shlex.quote(str(folder / next(iter(rows))))}.json --method supmin")


if __name__ == "__main__":
    cli(main)

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
