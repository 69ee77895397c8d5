"""Measure an embedding per class: alignment, uniformity and neighbours.

    python evaluate_metrics.py runs/digits/99-1/supmin/seed0
    python evaluate_metrics.py runs/digits/99-1/supmin/seed0 --neighborhood 5 --out k5
    python evaluate_metrics.py --embeddings z.npz

SAD, CAD, GPU and PEU are the usual measures of alignment and uniformity. SAA and CAC compare a row
with its neighbours (arXiv:2503.17024): they tell a collapse from a tight class.

A run is measured on two augmented views of its test split, in two spaces: "projection", the sphere
on which the loss acts, and "encoder", the encoder's features scaled to unit length. --embeddings
takes an .npz file with z [V, n, D] or [n, D] and labels [n] from 0 up; z is used as it is.
Writes metrics.json, embedding.png (a 2-D map), embedding.npz and neighbours.csv: SAA and CAC of
every image and, after linear_probe.py or finetune.py, p, its probability of the rare class. A run
also gets hard_examples.png: images that are wrong, alone, or twins with different labels
(docs/audit.md).
The metrics are importable: from evaluate_metrics import class_alignment_consistency
"""

import numbers
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import build_model, embed, load_run
from datasets.image_audit import read_test_probabilities, write_image_audit
from datasets.pack import read_index
from datasets.subset import Subset, load_subset
from reporting.embedding import plot_embedding
from utils.arrays import load_arrays
from utils.cli import ArgumentParser, UserError, number_from, print_next, run_main, share
from utils.distributed import pick_device
from utils.files import find_runs_folder, lock_folder, read_json, sha256, write_json
from utils.runs import load_strict, load_tensors, make_generator, module_sha256, provenance


def parse_args():
    parser = ArgumentParser(
        "Six metrics per class and a picture of a run's test split.",
        example="python evaluate_metrics.py runs/digits/99-1/supmin/seed0",
    )
    add = parser.add_argument_group("data").add_argument
    add("runs", metavar="run", nargs="*", type=Path, help="folders from pretrain.py or finetune.py")
    text = "measure this file instead: arrays z [V, n, D] or [n, D], labels [n]"
    add("--embeddings", type=Path, metavar="NPZ", help=text)
    add = parser.add_argument_group("method").add_argument
    text = "neighbours of CAC: a share of all rows, or a count"
    add("--neighborhood", type=share_or_count, default=0.05, metavar="K", help=text)
    add("--picture", choices=["pca", "tsne", "none"], default="pca", help="2-D map")
    add("--seed", type=number_from(0), default=0, help="seed for the augmented views")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=number_from(1), default=256, help="images per forward pass")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")
    add = parser.add_argument_group("output").add_argument
    text = "output folder, for one run (default: the run folder; for z.npz: z_metrics)"
    add("--out", type=Path, help=text)
    add("--smoke", action="store_true", help="a few images")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.embeddings):
        raise UserError("give either run folders or --embeddings z.npz; --help lists all flags")
    if len(args.runs) > 1 and args.out:
        raise UserError("--out takes one run; give a single run folder")
    return args


def share_or_count(text):
    return int(text) if text.isdigit() else share(text)


# --------------------------------------------------------------------------------------------------
# metrics. Letters: V views, n images, D dimensions, M = V*n rows in view-major order (row =
# view * n + image), n_c images of class c. z is a tensor or an array, its rows need not have unit
# length. All is float64; a row is never its own neighbour. ValueError: wrong shapes, values that
# are not finite, labels other than 0 to C-1, a class without an image.
# --------------------------------------------------------------------------------------------------

# Distances held at a time (32 MB): memory grows with the rows, not with their square.
CHUNK_DISTANCES = 2**22
# Squared distances that differ by less than this share of the rows' size count as equal.
TIE_TOLERANCE = 1e-13


def sample_alignment_distance(z, labels):
    """Compute SAD: mean distance from an image's view 0 to its other views.

    z [V, n, D], V >= 2, labels int [n]. Returns float64 [C], L2 distance, the mean over
    the images of each class. 0 = the views coincide.
    Source: alignment of Wang & Isola 2020 (arXiv:2005.10242) per class, not squared.
    """
    z, labels, _ = validate_embeddings(z, labels, min_views=2)
    return _class_means((z[1:] - z[0]).norm(dim=2).mean(dim=0), labels)


def sample_alignment_accuracy(z, labels):
    """Compute SAA: share of rows whose nearest other row is another view of the same image.

    z [V, n, D], V >= 2, labels int [n]. Returns float64 [C], percent of the rows of each
    class. 100 = images are told apart. Equally near rows share the credit: a full collapse scores
    chance, 100 (V - 1) / (M - 1). Source: arXiv:2503.17024.
    """
    z, labels, rows = validate_embeddings(z, labels, min_views=2)
    image = torch.arange(z.shape[1], device=z.device).repeat(len(z))  # [M]
    return 100 * _class_means(_neighbor_agreement(rows, image, 1), labels.repeat(len(z)))


def class_alignment_distance(z, labels):
    """Compute CAD: mean distance from a row to the other rows of its class, all views.

    z [V, n, D], labels int [n]. Returns float64 [C], L2 distance, the mean over the rows
    of each class. 0 = the class is one point. Raises ValueError: V * n_c < 2.

    Differs from the paper's code, which counts a row's zero distance to itself. With m = V * n_c
    rows, exactly: reference = ours * (m - 1) / m, and ours = reference * m / (m - 1).
    """

    def mean_distance(rows):
        total = sum(d2.sqrt().sum() for _, d2 in _squared_distances(rows))
        return total / (len(rows) * (len(rows) - 1))

    return torch.stack([mean_distance(rows) for rows in _rows_by_class(z, labels)])


def class_alignment_consistency(z, labels, neighborhood=0.05):
    """Compute CAC: share of a row's k nearest other rows that have its label.

    z [V, n, D], labels int [n]; neighborhood: a share of all rows below 1, k = int(share
    * M), or an integer k. Returns float64 [C], percent, the mean over the rows of each class.
    The class's share of all rows = the classes are mixed. Equally far rows share the last places: a
    full collapse scores 100 (V * n_c - 1) / (M - 1). Raises ValueError: k = 0 or k > M - 1.
    Source: arXiv:2503.17024.

    Differs from the paper's code, which takes the row itself as the first of the k, except after
    its own SAA has overwritten the diagonal. Exactly, unless rows coincide: reference(k) =
    (100 + (k - 1) * ours(k - 1)) / k, and ours(k) = ((k + 1) * reference(k + 1) - 100) / k.
    """
    z, labels, rows = validate_embeddings(z, labels)
    k = count_neighbors(neighborhood, len(rows))
    labels = labels.repeat(len(z))  # [M]
    return 100 * _class_means(_neighbor_agreement(rows, labels, k), labels)


def image_alignment(z, labels, neighborhood=0.05):
    """Return SAA and CAC of every image: the means over its views, float64 [n] each, in percent.

    z [V, n, D], labels int [n]; neighborhood: of class_alignment_consistency. SAA is None for one
    view. The mean over the images of a class is the metric of that class.
    """
    z, labels, rows = validate_embeddings(z, labels)
    k, image = count_neighbors(neighborhood, len(rows)), torch.arange(z.shape[1], device=z.device)
    groups = [(image, 1), (labels, k)] if len(z) > 1 else [(labels, k)]
    shares = [_neighbor_agreement(rows, group.repeat(len(z)), k) for group, k in groups]
    *saa, cac = (100 * share.unflatten(0, z.shape[:2]).mean(dim=0) for share in shares)
    return saa[0] if saa else None, cac


def gaussian_potential(z, labels):
    """Compute GPU: mean over pairs of different rows of a class of exp(-2 * distance^2).

    z [V, n, D], labels int [n]. Returns float64 [C], no unit, no logarithm. 1 = one
    point, near 0 = spread out. Raises ValueError: V * n_c < 2.
    Source: the Gaussian potential of Wang & Isola 2020 (arXiv:2005.10242), t = 2, per class.
    """

    def potential(rows):
        pairs = _squared_distances(rows, diagonal=torch.inf)
        return sum(d2.mul_(-2).exp_().sum() for _, d2 in pairs) / (len(rows) * (len(rows) - 1))

    return torch.stack([potential(rows) for rows in _rows_by_class(z, labels)])


def entropy_uniformity(z, labels, repeats=5, generator=None):
    """Compute PEU: how evenly a class fills the sphere, in percent.

    Draw 10 * M points uniformly on the unit sphere and assign every row to its nearest point. PEU
    is the entropy (bits) of the class's rows over the points, divided by log2(rows of the class),
    averaged over `repeats` draws. 100 = every row in a place of its own, 0 = all rows in one.

    z [V, n, D], scaled to unit length first, labels int [n]; generator: a CPU
    torch.Generator, by default make_generator(0): two calls agree. Returns float64 [C].
    Raises ValueError: V * n_c < 2, repeats < 1. Source: arXiv:2503.17024.
    """
    z, labels, rows = validate_embeddings(z, labels)
    if repeats < 1:
        raise ValueError(f"entropy uniformity needs at least one repeat, not {repeats}")
    rows = F.normalize(rows, dim=1)
    classes = [torch.cat([labels == c] * len(z)) for c in _classes(labels)]  # bool [M] each
    _require_two_rows(*(members.sum() for members in classes))
    generator = generator or make_generator(0)
    total = torch.zeros(len(classes), dtype=torch.float64, device=rows.device)
    for _ in range(repeats):
        nearest = _nearest_random_point(rows, 10 * len(rows), generator)
        for c, members in enumerate(classes):
            counts = nearest[members].unique(return_counts=True)[1].double()
            p = counts / counts.sum()
            total[c] += -(p * p.log2()).sum() / counts.sum().log2()
    return 100 * total / repeats


# helpers of the metrics ---------------------------------------------------------------------------


def validate_embeddings(z, labels, min_views=1):
    """Return z [V, n, D] as float64 tensor, labels [n], and the rows [M, D]. Raises ValueError."""
    z, labels = torch.as_tensor(z).detach().double(), torch.as_tensor(labels)
    if z.ndim != 3 or 0 in z.shape:
        raise ValueError(f"embeddings must be [views, images, dimensions], not {list(z.shape)}")
    if labels.shape != z.shape[1:2]:
        n = z.shape[1]
        raise ValueError(f"{n} images need labels [{n}], not {list(labels.shape)}")
    if len(z) < min_views:
        raise ValueError("sample alignment compares the views of an image; two are needed, not 1")
    if not z.isfinite().all():
        raise ValueError("embeddings hold NaN or infinite values")
    found = labels.unique().tolist()
    if len(found) < 2:
        raise ValueError(f"all images are of class {found[0]:g}; two or more classes are needed")
    if found != list(range(len(found))):
        raise ValueError(f"labels must be 0 to C-1, each with an image, not {found[:5]}")
    return z, labels.to(z.device).long(), z.flatten(0, 1)


def _require_two_rows(*counts):
    for c, count in enumerate(counts):
        if count < 2:
            raise ValueError(f"class {c} has a single row; pairs need two views or a second image")


def count_neighbors(neighborhood, rows):
    """Return k of the neighborhood: an integer k itself, or int(share * rows)."""
    is_count = isinstance(neighborhood, numbers.Integral)
    if not is_count and not 0 < neighborhood < 1:
        raise ValueError(f"neighborhood {neighborhood} is no share between 0 and 1, no integer")
    k = neighborhood if is_count else int(neighborhood * rows)
    if not 1 <= k <= rows - 1:
        raise ValueError(f"neighborhood {neighborhood} means {k} of {rows - 1} other rows")
    return int(k)


def _classes(labels):
    return range(int(labels.max()) + 1)


def _class_means(values, labels):
    return torch.stack([values[labels == c].mean() for c in _classes(labels)])


def _rows_by_class(z, labels):
    """Return the rows of each class, [V * n_c, D] each."""
    z, labels, _ = validate_embeddings(z, labels)
    classes = [z[:, labels == c].flatten(0, 1) for c in _classes(labels)]
    _require_two_rows(*map(len, classes))
    return classes


def _neighbor_agreement(rows, group, k):
    """Return the share [M] of each row's k nearest other rows that are in its group.

    rows [M, D], group int [M]. Rows that tie for the last places share them.
    """
    size = (rows - rows.mean(dim=0)).square().sum(dim=1, keepdim=True)  # [M, 1]
    shares = torch.empty_like(rows[:, 0])  # [M]
    for anchors, d2 in _squared_distances(rows, diagonal=torch.inf):
        last = _kth_smallest(d2, k)  # [a, 1]
        tolerance = TIE_TOLERANCE * (size[anchors] + last)
        # k neighbours per anchor, more where rows tie
        anchor, neighbor = (d2 <= last + tolerance).nonzero(as_tuple=True)
        is_inside = d2[anchor, neighbor] < (last - tolerance)[anchor, 0]
        is_same = group[anchors[anchor]] == group[neighbor]
        same_inside, inside, tied, same_tied = (
            anchor[mask].bincount(minlength=len(anchors))
            for mask in (is_inside & is_same, is_inside, ~is_inside, ~is_inside & is_same)
        )
        shares[anchors] = (same_inside + (k - inside) * same_tied / tied.double()) / k
    return shares


def _kth_smallest(values, k):
    """Return the k-th smallest value of each row: [a, M] -> [a, 1]."""
    if k == 1:
        return values.amin(dim=1, keepdim=True)
    if values.is_cuda:
        return values.topk(k, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    # on the CPU NumPy's partition takes a third of topk's time
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k])


def _squared_distances(rows, diagonal=0.0):
    """Yield (anchors, squared distances [a, M]) in chunks, until every row was an anchor.

    diagonal: the value that stands for the distance of a row to itself.
    """
    # centring keeps distances, and a tight cluster far from the origin keeps its precision
    rows = rows - rows.mean(dim=0)
    square = rows.square().sum(dim=1)
    chunk = max(1, CHUNK_DISTANCES // len(rows))
    for anchors in torch.arange(len(rows), device=rows.device).split(chunk):
        d2 = torch.addmm(square, rows[anchors], rows.T, alpha=-2)
        d2 = d2.add_(square[anchors, None]).clamp_(min=0)
        d2[torch.arange(len(anchors), device=rows.device), anchors] = diagonal
        yield anchors, d2


def _nearest_random_point(rows, points, generator):
    """Draw `points` uniform points on the sphere; return the index [M] of each row's nearest.

    rows [M, D] of unit length. Float32 products, whose rounding is below D * 2 ** -23, select the
    rows that may have come nearer; float64 decides.
    """
    best = torch.full_like(rows[:, 0], -torch.inf)
    nearest = torch.zeros_like(best, dtype=torch.long)
    rows32, rounding = rows.float(), rows.shape[1] * 2**-23
    # a constant, because the random stream of randn depends on the size of the draw
    drawn = 1024
    for start in range(0, points, drawn):
        block = torch.randn(drawn, rows.shape[1], generator=generator, dtype=torch.float64)
        block = block[: points - start].to(rows.device)
        block = block / block.norm(dim=1, keepdim=True)
        chunks = torch.arange(len(rows), device=rows.device).split(max(1, CHUNK_DISTANCES // drawn))
        for chunk in chunks:
            chunk = chunk[(rows32[chunk] @ block.float().T).amax(dim=1) > best[chunk] - rounding]
            cosine, index = (rows[chunk] @ block.T).max(dim=1)
            is_closer = cosine > best[chunk]
            best[chunk] = torch.where(is_closer, cosine, best[chunk])
            nearest[chunk] = torch.where(is_closer, start + index, nearest[chunk])
    return nearest


METRICS = {
    "sad": sample_alignment_distance,
    "saa": sample_alignment_accuracy,
    "cad": class_alignment_distance,
    "cac": class_alignment_consistency,
    "gpu": gaussian_potential,
    "peu": entropy_uniformity,
}


def compute_metrics(z, labels, neighborhood, space=""):
    """Return {metric: [value of each class]} of z [V, n, D]; SAD and SAA are None for one view."""
    values = {}
    for name, metric in tqdm(METRICS.items(), f"metrics, {space}", leave=False, disable=None):
        options = [neighborhood] if name == "cac" else []
        is_undefined = len(z) == 1 and name in ("sad", "saa")
        values[name] = None if is_undefined else metric(z, labels, *options).tolist()
    return values


# --------------------------------------------------------------------------------------------------
# script: load, measure, write
# --------------------------------------------------------------------------------------------------


@dataclass
class Embeddings:
    """Embeddings of one source, in one or two spaces; metrics.json reports the first space."""

    source: Path  # run folder or .npz file
    title: str
    labels: torch.Tensor  # int [n]
    classes: list  # names, index = label
    minority: int  # label of the rare class
    views: int
    files: list  # n names
    probabilities: dict = field(default_factory=dict)  # of the minority, by file name
    subset: Subset | None = None  # of a run
    # {space: (z [V, n, D], evaluation view [n, D])}; a run's are computed only if needed
    spaces: dict = field(default_factory=dict)


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.embeddings:
        evaluate_file(args, device)
    for run in args.runs:
        evaluate_run(run, args, device)
    if args.runs:
        print_next("report.py", find_runs_folder(args.runs[0]), "--html")


def evaluate_run(run, args, device):
    """Measure the test split of a run, unless its metrics.json is current."""
    config, subset, encoder = load_run(run, args.smoke)
    if subset.recipe == "none":
        # two equal views would measure nothing
        subset.change_views(recipe=load_subset(subset.path, verify=False).recipe)
    head = load_head(run, config, encoder)
    labels = torch.from_numpy(subset.labels[subset.splits["test"]])
    title = f"{subset.name} {subset.ratio}, {config.get('method', config.get('loss'))}"
    *_, names = read_index(subset.path.with_name("index.csv"))
    probabilities, checksum = read_test_probabilities(run)
    embeddings = Embeddings(
        source=run,
        title=title,
        labels=labels,
        classes=subset.classes,
        minority=subset.minority,
        views=2,
        files=[names[row] for row in subset.splits["test"]],
        probabilities=probabilities,
        subset=subset,
    )
    settings = {"split": "test", "batch_size": args.batch_size, "predictions_sha256": checksum}
    settings |= evaluation_settings(embeddings, args) | {"encoder_sha256": module_sha256(encoder)}
    out = args.out or run
    if not metrics_are_current(out, settings):
        lock_folder(out, "-metrics")
        embeddings.spaces = embed_test_split(encoder, head, subset, args, device)
        write_metrics(out, embeddings, settings, args, device)


def evaluate_file(args, device):
    """Measure the embeddings of an .npz file, unless its metrics.json is current."""
    path = args.embeddings
    embeddings = load_embeddings(path, args.smoke)
    settings = evaluation_settings(embeddings, args)
    settings |= {"split": None, "embeddings_sha256": sha256(path)}
    out = args.out or path.with_name(f"{path.stem}_metrics")
    if not metrics_are_current(out, settings):
        lock_folder(out, "-metrics")
        write_metrics(out, embeddings, settings, args, device)


def load_head(run, config, encoder):
    """Load the projection head of a pre-training run; None for a supervised run."""
    if "projection_dim" not in config:
        return None
    model = build_model(config)
    checkpoint = run / "checkpoint.pt"
    load_strict(model, load_tensors(checkpoint, keys=("model",))["model"], checkpoint)
    if module_sha256(model.encoder) != module_sha256(encoder):
        raise UserError(f"{run}: checkpoint.pt and encoder.pt differ; finish pretrain.py first")
    return model.head.eval().requires_grad_(False)


def embed_test_split(encoder, head, subset, args, device):
    """Embed two augmented views and the evaluation view of the test split.

    Returns {space: (z [2, n, D], evaluation view [n, D])}, unit vectors. The first space is the
    projection, if there is a head.
    """
    rows, generator = subset.splits["test"], make_generator(args.seed)
    data = (encoder.to(device), subset, rows, device, args.batch_size)
    features = embed(*data, 2, generator), embed(*data)
    spaces = {"encoder": features}
    if head:
        head.to(device)
        spaces = {"projection": [head(x.to(device)).cpu() for x in features], **spaces}
    return {space: [F.normalize(x, dim=-1) for x in pair] for space, pair in spaces.items()}


def load_embeddings(path, smoke):
    """Load z [V, n, D] or [n, D] and labels [n] from an .npz file."""
    layout = "z [V, n, D] or [n, D] and labels [n] from 0 up"
    arrays = load_arrays(path, ("z", "labels"), layout)
    z, labels = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("z", "labels"))
    z = z[None] if z.ndim == 2 else z
    try:
        z, labels, _ = validate_embeddings(z, labels)
    except ValueError as error:
        raise UserError(f"{path}: {error}; --embeddings takes {layout}") from None
    if len(z) == 1:
        print("one view: SAD and SAA compare views of an image and stay empty (null)")
    low, high = z.norm(dim=2).aminmax()
    if max(1 - low, high - 1) > 1e-3:
        print(f"z is used as it is: its rows are {low:.3g} to {high:.3g} long, not of unit length")
    if smoke:
        members = [(labels == c).nonzero().squeeze(1) for c in _classes(labels)]
        kept = torch.cat([rows[:32] for rows in members]).sort().values
        z, labels = z[:, kept], labels[kept]
    # Of equally rare classes, the last one.
    minority = int(labels.max() - labels.bincount().flip(0).argmin())
    return Embeddings(
        source=path,
        title=path.stem,
        labels=labels,
        classes=[f"class {c}" for c in _classes(labels)],
        minority=minority,
        views=len(z),
        files=list(range(len(labels))),
        spaces={"embeddings": (z, z[0])},
    )


def evaluation_settings(embeddings, args):
    """Collect what decides the result: a metrics.json with equal settings is current."""
    n = torch.bincount(embeddings.labels, minlength=len(embeddings.classes)).tolist()
    try:
        k = count_neighbors(args.neighborhood, embeddings.views * sum(n))
    except ValueError as error:
        raise UserError(f"--neighborhood {args.neighborhood}: {error}") from None
    settings = {key: getattr(embeddings, key) for key in ("title", "classes", "minority", "views")}
    options = {key: getattr(args, key) for key in ("seed", "neighborhood", "picture", "smoke")}
    return settings | options | {"n": n, "neighbors": k}


def output_files(out, settings):
    names = ["metrics.json", "neighbours.csv"]
    names += ["hard_examples.png"] if settings["split"] else []
    names += ["embedding.png", "embedding.npz"] if settings["picture"] != "none" else []
    return [out / name for name in names]


def metrics_are_current(out, settings):
    """Compare metrics.json with the settings. UserError: it holds an evaluation of other values."""
    path = out / "metrics.json"
    if not path.exists():
        return False
    old = read_json(path, "delete it to measure again")
    changed = [key for key, value in settings.items() if old.get(key) != value]
    # a new picture loses nothing, nor do new predictions
    if set(changed) - {"picture", "predictions_sha256"}:
        others = ", ".join(changed)
        raise UserError(f"{path}: made with other {others}; delete it or choose another --out")
    is_current = not changed and all(file.exists() for file in output_files(out, settings))
    if is_current:
        print(f"finished already: {path}")
    return is_current


def write_metrics(out, embeddings, settings, args, device):
    """Compute the metrics in every space; write the files. Pictures show the first space."""
    try:
        values = {
            space: compute_metrics(z.to(device), embeddings.labels, args.neighborhood, space)
            for space, (z, _) in embeddings.spaces.items()
        }
    except ValueError as error:
        raise UserError(f"{embeddings.source}: {error}") from None
    space = next(iter(values))
    z, _ = embeddings.spaces[space]
    scores = image_alignment(z.to(device), embeddings.labels, args.neighborhood)
    write_image_audit(out, embeddings, *scores)
    if args.picture != "none":
        plot_embedding(out, embeddings, values[space], args)
    result = {**values[space], "space": space}
    if "encoder" in values:
        result["encoder"] = values["encoder"]
    others = [run for run in args.runs if run != embeddings.source]
    record = {**result, **settings, "provenance": provenance(device, exclude=others)}
    write_json(out / "metrics.json", record)
    print_table(values, embeddings, settings["n"])
    print("wrote", *output_files(out, settings), sep="\n  ")


def print_table(values, embeddings, n):
    """Print the metrics of every space, with the value that a collapse has."""
    shares = " and ".join(f"{100 * count / sum(n):.0f}" for count in n)
    collapse = {
        "sad": "0: views coincide, all images too",
        "saa": "near 0: another image is nearer than the other view",
        "cad": "0: a class is one point",
        "cac": f"{shares}: the classes' shares, neighbours are mixed",
        "gpu": "1: a class is one point",
        "peu": "0: a class is in one place",
    }
    names = [f"{name:>10}" for name in embeddings.classes]
    names[embeddings.minority] += " (minority)"
    print(f"\n{embeddings.title}: {' and '.join(map(str, n))} images, views: {embeddings.views}")
    for space, metrics in values.items():
        print(f"{space:<11}{'  '.join(names)}   value at collapse")
        for name, pair in metrics.items():
            unit, digits = {"sad": ("L2", 3), "cad": ("L2", 3), "gpu": ("", 3)}.get(name, ("%", 1))
            cells = [
                f"{'-' if pair is None else f'{pair[c]:.{digits}f}':>{len(names[c])}}"
                for c in range(len(names))
            ]
            print(f"  {name.upper():<4} {unit:<4}{'  '.join(cells)}   {collapse[name]}")


if __name__ == "__main__":
    run_main(main)
