"""What linear_probe.py probes: the encoder of a run, raw pixels, or the features in a file."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from common import embed, load_run, load_subset
from datasets.pack import read_index
from datasets.probe_rows import balanced_ratio, draw_row_sets, load_balanced_sibling
from datasets.subset import Subset
from utils.arrays import load_labeled_splits
from utils.cli import UserError
from utils.encoders import Pixels
from utils.files import read_json, sha256
from utils.runs import module_sha256

# Side of the view whose pixels are features, at most.
PIXEL_SIZE = 32


@dataclass
class ProbeTask:
    """What the probes of one source share. Rows index the images of the subset, or of the file."""

    source: Path  # run folder, subset or .npz file
    out: Path
    classes: list  # names, index = label
    minority: int  # label of the rarest class
    tail: list  # labels of the rare classes
    labels: np.ndarray  # int [M]
    files: list  # M names, for predictions.csv
    splits: dict  # {"val": rows, "test": rows}
    row_sets: dict  # {name in ROW_SETS: training rows}
    origin: dict  # checksums of what is probed, for probe.json
    features: torch.Tensor | None = None  # float32 [M, D], of --embeddings
    subset: Subset | None = None
    encoder: nn.Module | None = None
    network: dict | None = None  # arch and stem of the encoder, and the file of its weights
    config: dict | None = None  # config.json of raw pixels

    def extract(self, rows, args, device):
        """Return the features float32 [n, D] of the evaluation view of some rows."""
        if self.encoder is None:
            return self.features[rows]
        self.encoder.to(device)
        return embed(self.encoder, self.subset, rows, device, min(args.batch_size, 256))


def load_task(source, args):
    if args.embeddings:
        return load_features(source, args)
    if source.is_file() and (source.parent / "config.json").exists():
        raise UserError(f"{source}: is a file of a run; give its folder, {source.parent}")
    if source.is_file():
        return load_pixels(source, args)
    config, subset, encoder = load_run(source, args.smoke)
    network = dict(arch=config["arch"], stem=config.get("stem", "imagenet"))
    network["encoder_path"] = source / "encoder.pt"
    return make_task(source, args.out or source, subset, encoder, args, network=network)


def make_task(source, out, subset, encoder, args, **options):
    """Draw the training rows and build the task of an encoder on a subset."""
    labels, split, _, files = read_index(subset.path.with_name("index.csv"))
    sibling = load_balanced_sibling(subset, args.smoke) if "balanced" in args.rows else None
    ratio = balanced_ratio(subset)
    if "balanced" in args.rows and sibling is None and subset.ratio != ratio:
        print(
            f"no probe on balanced rows: {ratio}.json is missing beside the subset; "
            f"make_subsets.py --ratios {ratio} adds it"
        )
    pool = np.flatnonzero(split == "train")
    seed = read_json(subset.path, "make it with make_subsets.py").get("seed", 0)
    balanced = sibling.splits["train"] if sibling else None
    row_sets = draw_row_sets(args.rows, labels, subset.splits["train"], pool, seed, balanced)
    if not row_sets:
        raise UserError(f"--rows balanced: {subset.path} has no other rows than its own; add own")
    origin = {"encoder_sha256": module_sha256(encoder)}
    origin["balanced_sha256"] = sibling.rows_sha256 if sibling else None
    return ProbeTask(
        source=source,
        out=out,
        classes=subset.classes,
        minority=subset.minority,
        tail=subset.tail,
        labels=labels,
        files=files,
        splits=subset.splits,
        row_sets=row_sets,
        origin=origin | options.pop("origin", {}),
        subset=subset,
        encoder=encoder,
        **options,
    )


def load_pixels(path, args):
    """Load a subset in place of a run; its features are pixels, at most 32 x 32.

    Raises UserError if the output folder holds a run.
    """
    subset = load_subset(path)
    subset = replace(subset, size=min(subset.size, PIXEL_SIZE))
    out = args.out or Path("runs", subset.name, subset.ratio, "pixels")
    if (out / "config.json").exists():
        old = read_json(out / "config.json", "delete it or choose another folder with --out")
        if old.get("method") != "pixels":
            raise UserError(f"{out}: holds another run; choose another folder with --out")
    config = {
        "method": "pixels",
        **subset.identity(out),
        "size": subset.size,
        "seed": args.seed,
        "smoke": args.smoke,
    }
    if args.smoke:
        subset.limit_for_smoke()
    encoder = Pixels(subset.images.shape[3], subset.size).eval()
    origin = {"images_sha256": subset.sha256, "size": subset.size}
    network = dict(arch="pixels", stem=None, encoder_path=None)
    options = dict(origin=origin, network=network, config=config)
    return make_task(path, out, subset, encoder, args, **options)


def load_features(path, args):
    """Load features and labels of three splits from an .npz file."""
    data = load_labeled_splits(path, ("train", "val", "test"))
    labels = np.concatenate([y for _, y in data.values()])
    ends = np.cumsum([len(y) for _, y in data.values()])[:-1]
    splits = dict(zip(data, np.split(np.arange(len(labels)), ends), strict=True))
    if args.smoke:
        for split, rows in splits.items():
            splits[split] = np.sort(
                np.concatenate([rows[labels[rows] == c][:16] for c in np.unique(labels)])
            )
    train = splits["train"]
    minority = int(np.bincount(labels[train]).argmin())
    row_sets = draw_row_sets(args.rows, labels, train, train, seed=0)
    if not row_sets:
        raise UserError("--rows balanced: an .npz file has no 50-50 subset; use other rows")
    return ProbeTask(
        source=path,
        out=args.out or path.with_name(f"{path.stem}_probe"),
        classes=[f"class {c}" for c in np.unique(labels)],
        minority=minority,
        tail=[minority],
        labels=labels,
        files=[f"{split}[{i}]" for split, (_, y) in data.items() for i in range(len(y))],
        splits=splits,
        row_sets=row_sets,
        origin=dict(encoder_sha256=None, balanced_sha256=None, embeddings_sha256=sha256(path)),
        features=torch.from_numpy(np.concatenate([x for x, _ in data.values()])),
    )
