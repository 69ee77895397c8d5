"""Where images come from: files and arrays decoded, and one loader per data set, from the arguments of make_subsets.py to a Source.

A loader finds the images, their class and their split, and decodes nothing. A new data set is a loader and a line in DATASETS. Needs no torch
(MedMNIST's package, which names the classes of its files, and a .pt bring it along).
"""

import csv
import difflib
import hashlib
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.catalog import (
    INAT21,
    INAT21_GET,
    INAT21_PARTS,
    MEDMNIST_SIZES,
    fracatlas_folder,
    inat21_parts,
    infarction_folder,
    medmnist_file,
)
from utils.cli import UserError
from utils.files import sha256

SPLITS = ("train", "val", "test")
FASHION = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
LARGEST = 2**24  # values in one image that is an array; Pillow has its own limit for files
# every draw has its own stream default_rng([seed, stream, class]), so that no draw moves another
DRAW_SPLIT, DRAW_TRAIN, DRAW_VAL, DRAW_TEST = range(4)


@dataclass
class Source:
    """What a loader found. One entry per image in images, names, labels and split."""

    images: list  # what decode() takes: paths or arrays [H, W, C]; a list, or NpzImages
    names: list  # source column of index.csv: path below the data root
    labels: np.ndarray  # int [M]
    split: np.ndarray  # str [M]: train, val or test
    classes: list  # two names, index = label
    digest: str  # sha256 of what was found, to notice another source
    size: int  # side of what the network sees, pixels
    recipe: str
    channels: int = 3
    store_size: int | None = None  # largest side stored, pixels; None: the images' own
    side: int | None = None  # longest side of all images, where it is known without a look at each
    minority: int | None = None  # None: the rarer class of train
    balance: bool = False  # val and test cut to their rarest class
    truncated: bool = False  # truncated files are read as far as they go
    notes: list = field(default_factory=list)  # lines to print


# ------------------------------------------------------------------------------------------------------------------
# images on disk
# ------------------------------------------------------------------------------------------------------------------


def image_files(folder, suffixes=IMAGE_SUFFIXES):
    """Files of images at any depth below a folder, sorted by path; hidden files and folders are skipped."""

    def closed(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable")

    found = []
    for place, folders, files in os.walk(folder, onerror=closed if folder.exists() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found, key=lambda path: path.as_posix())


def list_prediction_images(folder, csv_path):
    """The images below --predict, found before any long work; none without --predict. UserError for one flag without the other, or no image."""
    if (folder is None) != (csv_path is None):
        raise UserError(
            "--predict and --csv belong together: the folder to read and the table to write"
        )
    files = image_files(folder) if folder else []
    if folder and not files:
        raise UserError(
            f"--predict {folder}: no such folder, or no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return files


def printable(name):
    """A file name that can be printed and written as UTF-8, whatever bytes the disk has."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_image(path, grayscale=False):
    """Decode an image file with Pillow, turned upright by its EXIF tag. Returns uint8 [H, W, C], C = 1 or 3."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":
            image = Image.fromarray(
                (np.asarray(image) >> 8).astype(np.uint8)
            )  # 16-bit grey: convert() would clip, not scale
        if image.mode in ("I", "F"):
            raise ValueError(
                f"pixels of 32 bits (mode {image.mode}), whose range is not known; save it with 8 or 16 bits"
            )
        pixels = np.asarray(image.convert("L" if grayscale else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def squeeze(pixels, side):
    """Resize uint8 [H, W, C] to a square [side, side, C], whatever its aspect ratio (bicubic, antialiased)."""
    from PIL import Image

    if pixels.shape[:2] == (side, side):
        return pixels
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).reshape(side, side, -1)


def array_of(image):
    """An entry of Source.images as an array [H, W, C] where it is one, or an .npy [C, H, W] (mapped, not read); None where it is an image file."""
    if isinstance(image, np.ndarray):
        return image
    if image.suffix.lower() != ".npy":
        return None
    array = np.load(image, mmap_mode="r", allow_pickle=False)
    if array.ndim != 3:
        raise ValueError(f"an array {list(array.shape)}, not [C, H, W]")
    return array.transpose(1, 2, 0)


def true_size(image):
    """Both sides of an entry of Source.images, from its header. ValueError where it declares more than any image has."""
    from PIL import Image

    array = array_of(image)
    if array is None:
        with Image.open(image) as opened:
            return opened.size
    if array.size > LARGEST:
        raise ValueError(f"{' x '.join(map(str, array.shape))} values are too many for an image")
    return array.shape[:2]


def decode(image, channels, truncated):
    """An entry of Source.images as uint8 [H, W, channels], and whether its file is truncated; one that is, is an error unless `truncated`.

    Errors are Pillow's, numpy's, or a ValueError with the reason.
    """
    from PIL import ImageFile

    array = array_of(image)
    if array is not None:
        true_size(array)
        if array.shape[2] != channels:
            raise ValueError(f"{array.shape[2]} channels; the first image has {channels}")
        if array.dtype == np.uint8:
            return array, False
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise ValueError(
                f"{array.dtype} values that are not all between 0 and 1; scale them, or save uint8"
            )
        return np.rint(array * 255).astype(np.uint8), False
    try:
        return read_image(image, grayscale=channels == 1), False
    except OSError:
        if not truncated:
            raise
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        return read_image(image, grayscale=channels == 1), True
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


# ------------------------------------------------------------------------------------------------------------------
# splits that a data set does not bring
# ------------------------------------------------------------------------------------------------------------------


def split_counts(n: int):
    """(train, val) of n images: floor of 95 % and 5 %, then the remainder one by one from the first, as the reference does."""
    counts = [math.floor(n * 0.95), math.floor(n * 0.05)]
    for i in range(n - sum(counts)):
        counts[i % 2] += 1
    return tuple(counts)


def draw_splits(labels, percents, seed, groups=None):
    """Draw whole groups (patients; default: every image its own) for each split of percents, stratified by class; the rest is train.

    labels int [M] in {0, 1}; percents: {split: percent of the images}; groups [M] or None. A group counts as rare if any of its
    images is of the rarer class. Returns str [M]. A split gets its share of each stratum's images, exceeded by at most one group.
    """
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(groups)
    has_rare = np.zeros(len(sizes), dtype=bool)
    has_rare[groups[labels == np.bincount(labels, minlength=2).argmin()]] = True
    drawn = np.full(len(sizes), "train", dtype="<U5")  # per group
    for stratum in (0, 1):
        members = np.random.default_rng([seed, DRAW_SPLIT, stratum]).permutation(
            np.flatnonzero(has_rare == stratum)
        )
        before, total = np.cumsum(sizes[members]) - sizes[members], sizes[members].sum()
        low = 0
        for name, percent in percents.items():
            drawn[
                members[(100 * before >= low * total) & (100 * before < (low + percent) * total)]
            ] = name
            low += percent
    return drawn[groups]


# ------------------------------------------------------------------------------------------------------------------
# arrays: digits, MedMNIST and any .npz of its layout
# ------------------------------------------------------------------------------------------------------------------


def load_digits(args):
    from sklearn import datasets

    scans = datasets.load_digits()
    images = np.rint(scans.images * 255 / 16).astype(np.uint8)[
        ..., None
    ]  # [1797, 8, 8, 1], 17 grey levels
    labels = (scans.target >= 5).astype(np.int64)
    names = [f"load_digits/{i}" for i in range(len(images))]
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    return Source(
        list(images),
        names,
        labels,
        draw_splits(labels, {"test": 20, "val": 10}, args.seed),
        ["0-4", "5-9"],
        digest,
        args.size or 32,
        "medical",
        1,
        args.store_size,
    )


def load_medmnist(args):
    """BreastMNIST and PneumoniaMNIST with their own splits; --size says which file."""
    import medmnist

    size, root = args.size or 224, Path(args.data_root)
    if size not in MEDMNIST_SIZES:
        raise UserError(
            f"--size {size}: {args.dataset} comes in {', '.join(map(str, sorted(MEDMNIST_SIZES)))} pixels; choose one of them"
        )
    path = root / medmnist_file(args.dataset, size)
    if not path.exists() and args.download:
        download_medmnist(
            getattr(medmnist, medmnist.INFO[args.dataset]["python_class"]), size, path
        )
    if not path.exists():
        there = [
            s for s in sorted(MEDMNIST_SIZES) if (root / medmnist_file(args.dataset, s)).exists()
        ]
        others = "".join(
            f"; {medmnist_file(args.dataset, s)} is there: use --size {s}" for s in there
        )
        raise UserError(
            f"{path}: no such file; --download fetches it, or get {path.name} from medmnist.com (Zenodo) "
            f"and put it into {root}{others}"
        )
    source = npz_source(args, path)
    if source.side != size:
        raise UserError(
            f"{path}: holds images of {source.side} px, not {size}; move it away and fetch it again with --download"
        )
    return source


def download_medmnist(dataset, size, path):
    """Fetch a MedMNIST file beside its place, then move it there: no half download is ever taken for the file."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        try:
            dataset(split="train", root=folder, size=size, download=True)
        except (RuntimeError, ValueError, OSError):
            raise UserError(
                f"--download: could not fetch {path.name}; get it from medmnist.com (Zenodo) "
                f"and put it into {path.parent}"
            ) from None
        os.replace(Path(folder) / path.name, path)


def load_npz(args):
    """Any file of MedMNIST's layout: two groups of its classes, with its own splits."""
    path = Path(args.data_root)
    if path.is_dir():
        there = ", ".join(sorted(f.name for f in path.glob("*.npz"))) or "none"
        raise UserError(
            f"--data-root {path}: npz takes the file itself, not its folder; .npz files there: {there}"
        )
    if not path.exists():
        raise UserError(
            f"--data-root {path}: no such file; give one with train_images, train_labels, val_images, ... as on medmnist.com"
        )
    return npz_source(args, path)


def load_fashionmnist(args):
    """Two groups of Fashion-MNIST's classes, from its four files; shirts against T-shirts, pullovers and coats. 10 % of train become val."""
    root = Path(args.data_root)
    images, labels = (
        [read_idx(root / f"{part}-{kind}-ubyte.gz", dimensions) for part in ("train", "t10k")]
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    for pixels, each in zip(images, labels):
        if len(pixels) != len(each) or each.max(initial=0) >= len(FASHION):
            raise UserError(
                f"{root}: holds {len(pixels)} images and {len(each)} labels up to {each.max(initial=0)}; fetch its four files again"
            )
    names = [
        f"{part}/{i}" for part, each in zip(("train", "t10k"), labels) for i in range(len(each))
    ]
    official = np.repeat(["train", "test"], [len(each) for each in labels])
    pixels, labels = np.concatenate(images)[..., None], np.concatenate(labels).astype(np.int64)
    group, classes, minority, notes = two_groups(
        labels,
        args.minority or "6",
        args.majority or (None if args.minority else "0,2,4"),
        root,
        {str(c): name for c, name in enumerate(FASHION)},
    )
    kept = np.flatnonzero(group >= 0)
    group, split = group[kept], official[kept]
    split[split == "train"] = draw_splits(group[split == "train"], {"val": 10}, args.seed)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Source(
        list(pixels[kept]),
        [names[i] for i in kept],
        group,
        split,
        classes,
        digest,
        args.size or 28,
        "medical",
        1,
        args.store_size,
        minority=minority,
        notes=notes,
    )


def read_idx(path, dimensions):
    """Array uint8 of a gzip file of MNIST's format: 0, 0, type, number of dimensions, their sizes (big-endian), values."""
    import gzip

    try:
        raw = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(raw, ">u4", dimensions, 4)
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"begins with {raw[:4].hex()}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; Debian's package dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist, "
            "torchvision.datasets.FashionMNIST into FashionMNIST/raw: give that folder as --data-root"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); move it away and fetch it again"
        ) from None


def npz_source(args, path):
    import medmnist

    named = medmnist.INFO.get(re.sub(r"_\d+$", "", path.stem), {"label": {}})[
        "label"
    ]  # of MedMNIST's own files: {"0": "malignant", ...}
    labels, picks, split, side = [], [], [], None
    try:
        with zipfile.ZipFile(path) as archive:
            for part in SPLITS:
                shape = npz_header(archive, f"{part}_images")[0]
                if (
                    picks
                    and shape[1:] != side
                    or len(shape) not in (3, 4)
                    or shape[3:] not in ((), (1,), (3,))
                    or math.prod(shape[1:]) > LARGEST
                ):
                    raise ValueError(
                        f"{part}_images are {list(shape)}, not [N, H, W] or [N, H, W, 3] of one size"
                    )
                side = shape[1:]
                labels.append(npz_labels(archive, f"{part}_labels", shape[0]))
                picks += [(f"{part}_images", row) for row in range(shape[0])]
                split += [part] * shape[0]
        labels = np.concatenate(labels)
        strange = (
            set(np.unique(labels)) - {int(label) for label in named}
            if named and labels.ndim == 1
            else ()
        )
        if strange:
            raise ValueError(f"holds class {min(strange)}")
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # a damaged npz fails in zipfile, zlib, numpy or here; all of them mean the same
        raise UserError(
            f"{path}: damaged, or not of MedMNIST's layout ({type(error).__name__}: {error}); "
            "move it away and fetch it again"
        ) from None
    group, classes, minority, notes = two_groups(labels, args.minority, args.majority, path, named)
    kept = np.flatnonzero(group >= 0)
    picks, channels = [picks[i] for i in kept], (*side, 1)[2]
    names = [f"{path.name}/{member.removesuffix('_images')}/{row}" for member, row in picks]
    return Source(
        NpzImages(path, picks),
        names,
        group[kept],
        np.array(split)[kept],
        classes,
        sha256(path),
        args.size or max(side[:2]),
        "medical" if channels == 1 else "natural",
        channels,
        args.store_size,
        max(side[:2]),
        minority,
        notes=notes,
    )


def npz_header(archive, name):
    """(shape, offset of the data) of an array in an open .npz. ValueError unless it is of whole numbers, in C order and as long as it says."""
    with archive.open(f"{name}.npy") as file:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read(file)
        offset = file.tell()
    if fortran or not (dtype == np.uint8 or dtype.kind in "biu" and name.endswith("labels")):
        raise ValueError(f"{name} are {dtype}")
    if offset + dtype.itemsize * math.prod(shape) != archive.getinfo(f"{name}.npy").file_size:
        raise ValueError(f"{name} are not as many as declared")
    return shape, offset


def npz_labels(archive, name, n):
    """The labels of n images: int [n], or [n, K] of 0 and 1 where each may have any of K findings."""
    shape, _ = npz_header(archive, name)
    if shape[:1] != (n,) or len(shape) > 2:
        raise ValueError(f"{name} are {list(shape)} for {n} images")
    with archive.open(f"{name}.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False).astype(np.int64)
    if labels.ndim == 2 and shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{name} of {shape[1]} findings are not all 0 or 1")
    return labels[:, 0] if shape[1:] == (1,) else labels


class NpzImages:
    """Images of an .npz, read forward from the archive as they are asked for: 13 GB of them need no 13 GB of memory."""

    def __init__(self, path, picks):
        """picks: [(member, row)] in the order of the archive."""
        self.path, self.picks, self.member = path, picks, None

    def __len__(self):
        return len(self.picks)

    def __getitem__(self, wanted):  # a slice -> list of uint8 [H, W, C]
        try:
            return [self._read(member, row) for member, row in self.picks[wanted]]
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise UserError(
                f"{self.path}: damaged ({type(error).__name__}: {error}); move it away and fetch it again"
            ) from None

    def _read(self, member, row):
        if member != self.member:
            archive = zipfile.ZipFile(self.path)
            self.shape, self.offset = npz_header(archive, member)
            self.file, self.member = archive.open(f"{member}.npy"), member
        size = math.prod(self.shape[1:])
        self.file.seek(self.offset + row * size)
        return np.frombuffer(self.file.read(size), dtype=np.uint8).reshape(*self.shape[1:3], -1)


def two_groups(labels, minority, majority, path, named):
    """Which images make up the two classes: 0 for --minority, 1 for --majority, -1 for neither or both.

    labels int [M], or [M, K] where an image may have any of K findings; minority, majority: "3" or "0,1" or None; named: {"3": its name}.
    Without --majority it is everything else. Returns (int [M], two names, label of the minority or None, lines to print).
    """
    known = [int(c) for c in (range(labels.shape[1]) if labels.ndim == 2 else np.unique(labels))]

    def numbers(flag, text):
        chosen = list(
            dict.fromkeys(
                int(word) if word.strip().isdecimal() else word for word in text.split(",")
            )
        )
        strange = [c for c in chosen if c not in known]
        if strange:
            raise UserError(
                f"{flag} {text}: {path} has no class {strange[0]}; its classes are {listed(known)}"
            )
        return chosen

    def listed(chosen):
        return ", ".join(f"{c} {named[str(c)]}" if str(c) in named else str(c) for c in chosen)

    def joined(chosen):
        return " + ".join(named.get(str(c), str(c)) for c in chosen)

    if len(known) < 2:
        raise UserError(
            f"{path}: holds {len(known)} class{'es' * (not known)}; two at least are needed"
        )
    if minority is None:
        if len(known) != 2 or labels.ndim == 2 or majority is not None:
            raise UserError(
                f"--minority: say which of the classes of {path} is the rare one, e.g. --minority {known[0]} --majority {known[-1]} "
                f"(without --majority: all others); they are {listed(known)}"
            )
        return np.searchsorted(known, labels), [joined([c]) for c in known], None, []
    few, many = (
        numbers("--minority", minority),
        numbers("--majority", majority) if majority is not None else None,
    )
    if many and set(few) & set(many):
        raise UserError(
            f"--minority {minority} --majority {majority}: both name class {min(set(few) & set(many))}"
        )
    is_few = labels[:, few].any(1) if labels.ndim == 2 else np.isin(labels, few)
    is_many = (
        ~is_few
        if many is None
        else labels[:, many].any(1)
        if labels.ndim == 2
        else np.isin(labels, many)
    )
    group = np.select([is_few & ~is_many, is_many & ~is_few], [0, 1], -1)
    left, both = int((~is_few & ~is_many).sum()), int((is_few & is_many).sum())
    notes = (
        [f"left out: {left} images of neither class" + (f", {both} of both" if both else "")]
        if left or both
        else []
    )
    return group, [joined(few), joined(many) if many else "rest"], 0, notes


# ------------------------------------------------------------------------------------------------------------------
# files: iNaturalist, class folders, FracAtlas, cardiac MRI
# ------------------------------------------------------------------------------------------------------------------


def file_source(args, images, root, labels, split, classes, grayscale, groups=None, **more):
    """A Source of image files below root; size, storage and augmentation as the flags and `grayscale` say. groups: a name for each, or None."""
    names = [printable(image.relative_to(root).as_posix()) for image in images]
    found = "\n".join(
        f"{name}\t{label}\t{image.stat().st_size if image.exists() else None}"
        + (f"\t{group}" if group else "")
        for name, label, image, group in zip(names, labels, images, groups or [None] * len(images))
    )
    size = args.size or 224
    return Source(
        images,
        names,
        labels,
        split,
        classes,
        hashlib.sha256(found.encode()).hexdigest(),
        size,
        "medical" if grayscale else "natural",
        1 if grayscale else 3,
        args.store_size or round(size * 10 / 7),
        **more,
    )


def load_inat21(args):
    """iNaturalist 2021. Test is its val part; of every class 5 % of its train part become val."""
    taxa = INAT21.get(args.dataset, (args.minority, args.majority))
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        if taxon is None:
            raise UserError(
                f"{flag}: inat21 needs one taxon for each class, for example --minority Quercus --majority Saxifragales"
            )
    parts = inat21_parts(Path(args.data_root))
    if parts is None:
        others = ", ".join(" and ".join(f"{name}/" for name in pair) for pair in INAT21_PARTS[1:])
        raise UserError(
            f"{args.data_root}: no folder with train/ and val/ (or {others}); get iNaturalist 2021 from {INAT21_GET}, "
            "unpack it there, or give its folder with --data-root"
        )
    root, train, val = parts
    folders = {
        part: {
            f: f.name.split("_", 7)[1:]
            for f in sorted(part.iterdir())
            if re.fullmatch(r"\d+(_[^_]+){6}_.+", f.name)
        }
        for part in (train, val)
    }  # folder -> its seven taxonomy levels
    names, found = [], []
    for flag, taxon in zip(("--minority", "--majority"), taxa):
        name, chosen = match_taxon(flag, taxon, folders, root)
        names.append(name)
        found.append(chosen)
    both = sorted(found[0] & found[1])
    if both:
        raise UserError(
            f"--minority {taxa[0]} --majority {taxa[1]}: overlap in {both[0].name}; choose two taxa without a common species"
        )
    images = [
        (image, label, part)
        for part in (train, val)
        for label in (0, 1)
        for folder in sorted(found[label])
        if folder.parent == part
        for image in image_files(folder)
    ]
    labels = np.array([label for _, label, _ in images], dtype=np.int64)
    split = np.array(["test" if part == val else "train" for _, _, part in images], dtype="<U5")
    for label in (0, 1):
        rows = np.flatnonzero((labels == label) & (split == "train"))
        split[
            np.random.default_rng([args.seed, DRAW_SPLIT, label]).permutation(rows)[
                : split_counts(len(rows))[1]
            ]
        ] = "val"
    return file_source(
        args,
        [image for image, _, _ in images],
        root,
        labels,
        split,
        names,
        args.grayscale,
        minority=0,
        balance=True,
    )


def match_taxon(flag, taxon, folders, root):
    """The folders whose taxonomy holds the levels of `taxon` in a row, and the last level as it is written there."""
    wanted = [level for level in re.split("[/_]", taxon.lower()) if level]
    n = len(wanted)
    found, name, known = set(), None, set()
    for part in folders.values():
        for folder, levels in part.items():
            lower = [level.lower() for level in levels]
            known.update(levels)
            at = [i for i in range(len(levels) - n + 1) if n and lower[i : i + n] == wanted]
            if at:
                found.add(folder)
                name = levels[at[0] + n - 1]
    if not known:
        raise UserError(
            f"{next(iter(folders))}: no folders named NNNNN_Kingdom_Phylum_Class_Order_Family_Genus_species; give the folder of "
            "iNaturalist 2021 that holds train/ and val/ with --data-root"
        )
    if not found:
        lower = {level.lower(): level for level in sorted(known)}
        near = [
            lower[k]
            for word in reversed(wanted)
            for k in difflib.get_close_matches(word, lower, n=5, cutoff=0.4)
        ]
        near = dict.fromkeys(near or list(lower.values())[:10])
        raise UserError(
            f"{flag} {taxon}: matches no folder in {root}; nearest names: {', '.join(near)}"
        )
    return name, found


def load_folder(args):
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
    classes, minority = two_classes(
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
        for image in image_files(folder / name)
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
        np.array([patient(args.patient, image, root) for image in images]) if args.patient else None
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


def two_classes(names, args, found, layout):
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


def patient(regex, image, root):
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


def load_fracatlas(args):
    """FracAtlas (Abedeen et al. 2023): radiographs of hand, leg, hip and shoulder, fractured or not; grey.

    The release has 717 fractured and 3,366 other images, a table dataset.csv (image_id, fractured and what is shown) and no split for
    classification. Drawn here: 20 % for test and 10 % for val, stratified. The table has no patient: its column multiscan says that one
    picture shows several scans, not which pictures belong together. So views of one patient are kept in one split where the table has been
    given a column patient_id; else only copies of one file are. Some files of the release are truncated: they are read as far as
    they go, the rest is grey, and the subset's record names them.
    """
    root = fracatlas_folder(Path(args.data_root))
    if root is None:
        raise UserError(
            f"{args.data_root}: no FracAtlas/ with images/ and dataset.csv; get it from doi.org/10.6084/m9.figshare.22363012 and "
            "unpack it there, or give its folder with --data-root"
        )
    table = read_table(root / "dataset.csv", ["image_id", "fractured"])
    classes = ["Fractured", "Non_fractured"]
    images, described = {}, {}
    for label, name in enumerate(classes):
        for image in image_files(root / "images" / name):
            if image.name in images:
                raise UserError(
                    f"{image}: a second file of this name, also {images[image.name][0]}; leave one"
                )
            images[image.name] = image, label
    for line, row in table.items():
        name, where = row["image_id"], f"{root / 'dataset.csv'}, line {line}"
        if name not in images:
            raise UserError(
                f"{where}: {name!r} is not in images/Fractured or images/Non_fractured; unpack FracAtlas again"
            )
        if name in described:
            raise UserError(f"{where}: {name} a second time; one line each")
        if zero_or_one(root / "dataset.csv", line, "fractured", row) != 1 - images[name][1]:
            raise UserError(
                f"{where}: fractured is {row['fractured']}, but {name} lies in {classes[images[name][1]]}"
            )
        described[name] = row
    strange = sorted(images.keys() - described.keys())
    if strange:
        raise UserError(
            f"{images[strange[0]][0]}: not in dataset.csv{more_of(strange)}; remove it or unpack FracAtlas again"
        )
    paths, labels = (
        [image for image, _ in images.values()],
        np.array([label for _, label in images.values()]),
    )
    groups = [described[image.name].get("patient_id") or sha256(image) for image in paths]
    split = draw_splits(labels, {"test": 20, "val": 10}, args.seed, np.array(groups))
    return file_source(args, paths, root, labels, split, classes, True, groups, truncated=True)


def more_of(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def load_infarction(args):
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
        labels[row["eid"]] = zero_or_one(path, line, "label", row)
    images, digest = participants(root)
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
        one_number_of_channels({eid: images[eid] for eid in eids}),
        args.store_size,
        notes=[f"left out: {unlabelled} images without a line in {path.name}"]
        if unlabelled
        else [],
    )


def participants(root):
    """({eid: array [H, W, C] or path}, sha256 of what was found) of a folder with one .pt, or with .npy or .png files."""
    files = image_files(root, (".pt", ".npy", ".png"))
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) != 1 or kinds == [".pt"] and len(files) > 1:
        raise UserError(
            f"{root}: holds {f'{len(files)} files ' + ' '.join(kinds) if files else 'no image'}; "
            "leave one .pt (a dict from eid to a tensor), or a file <eid>.npy or <eid>.png for each participant"
        )
    if kinds == [".pt"]:
        return tensors(files[0]), sha256(files[0])
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


def tensors(path):
    """{eid: array [H, W, C]} of a .pt, mapped and not read. No pickle is executed: weights_only."""
    import torch

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


def one_number_of_channels(images):
    """1 or 3: the channels of all participants, {eid: array or path}, from the headers. UserError where they differ or are others."""
    from PIL import Image

    channels = {}
    for eid, image in images.items():
        try:
            array = array_of(image)
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


def read_table(path, columns):
    """{line number: row as a dict} of a CSV. UserError when it is not one, or lacks one of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            have = reader.fieldnames or []
            table = {reader.line_num: row for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error}); save it again") from None
    for column in columns:
        if column not in have:
            raise UserError(
                f"{path}: has no column {column}, only {', '.join(have) or 'nothing'}; give it {' and '.join(columns)}"
            )
    if not table:
        raise UserError(f"{path}: has no line below its header")
    return table


def zero_or_one(path, line, column, row):
    if row[column] not in ("0", "1"):
        raise UserError(
            f"{path}, line {line}: {column} is {row[column] or ''!r}, neither 0 nor 1; mend it"
        )
    return int(row[column])


# name: (loader, flags that only some data sets take). A new data set is a loader that returns a Source, and a line here.
DATASETS = {
    "digits": (load_digits, ()),
    "breastmnist": (load_medmnist, ("download",)),
    "pneumoniamnist": (load_medmnist, ("download",)),
    "fracatlas": (load_fracatlas, ("skip_bad",)),
    "infarction": (load_infarction, ("skip_bad",)),
    **{name: (load_inat21, ("skip_bad", "grayscale")) for name in INAT21},
    "inat21": (load_inat21, ("skip_bad", "grayscale", "minority", "majority")),
    "fashionmnist": (load_fashionmnist, ("minority", "majority")),
    "npz": (load_npz, ("minority", "majority")),
    "folder": (load_folder, ("skip_bad", "grayscale", "minority", "majority", "patient")),
}
