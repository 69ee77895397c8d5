"""Judge an embedding, per class: are positives close, is the sphere used, do neighbours agree?

    python evaluate_metrics.py runs/digits/99-1/supmin/seed0
    python evaluate_metrics.py runs/digits/99-1/supmin/seed0 --neighborhood 5 --out five_neighbours
    python evaluate_metrics.py --embeddings z.npz        # z [V, n, D] or [n, D], labels [n], 0 or 1

SAD, CAD, GPU and PEU are the usual measures of alignment and uniformity. SAA and CAC compare a row
with its neighbours (arXiv:2503.17024) and so tell a collapse from a tight class.

A run is judged on two augmented views of its test split: on the sphere where the loss acts
("projection") and at the encoder's features, scaled to unit length ("encoder"). Embeddings of your
own are taken as they are. Writes metrics.json, embedding.png (a 2-D map) and embedding.npz.
The metrics are importable: from evaluate_metrics import class_alignment_consistency
"""

import numbers
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import ContrastiveModel, embed, load_run
from utils.cli import ArgumentParser, UserError, number_from, run_main
from utils.distributed import pick_device
from utils.files import atomic_write, lock_folder, read_json, sha256, write_json
from utils.runs import load_strict, load_tensors, make_generator, module_sha256, provenance


def parse_args():
    parser = ArgumentParser(
        "Six metrics per class and a picture of the embedding of a run's test split.",
        smoke=dict(picture="pca"),
    )
    parser.add_argument(
        "runs",
        metavar="run",
        nargs="*",
        type=Path,
        help="run folder from pretrain.py or finetune.py, or several",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="NPZ",
        help="judge these instead: arrays z [V, n, D] or [n, D], labels [n]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results, for one run (default: the run folder; for z.npz: z_metrics)",
    )
    parser.add_argument(
        "--neighborhood",
        type=share_or_count,
        default=0.05,
        metavar="K",
        help="CAC: share of all rows, or a count",
    )
    parser.add_argument(
        "--picture",
        choices=["tsne", "pca", "none"],
        default="tsne",
        help="2-D map of the embedding",
    )
    parser.add_argument(
        "--batch-size", type=number_from(1), default=256, help="images embedded at a time"
    )
    parser.add_argument("--seed", type=number_from(0), default=0, help="of the augmented views")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA where there is one",
    )
    parser.add_argument("--smoke", action="store_true", help="a few images, PCA picture")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.embeddings):
        raise UserError(
            "give a run folder or --embeddings z.npz, one of the two; --help lists what there is"
        )
    if len(args.runs) > 1 and args.out:
        raise UserError("--out: is meant for one run; give a single run folder")
    return args


def share_or_count(text):
    return int(text) if text.isdigit() else float(text)


# ------------------------------------------------------------------------------------------------------------------
# the metrics. Letters: V views, n images, D dimensions, M = V*n rows (view-major: row = view * n + image), n_c images of
# class c. Everything is float64, whatever comes in, and a row is never its own neighbour.
# ------------------------------------------------------------------------------------------------------------------

AT_ONCE = (
    2**22
)  # distances held at a time (32 MB), so that memory grows with the rows and not with their square
ROUNDING = 1e-13  # squared distances that differ by less, relative to the rows' size, tie: rounding would decide


def sample_alignment_distance(z, labels):
    """SAD: mean distance from an image's view 0 to its other views. 0 = the views coincide.

    z [V, n, D], V >= 2, tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], L2 distance,
    the mean over the images of class 0 and of class 1. ValueError: one view, an empty class, wrong shapes, not finite.
    Source: alignment of Wang & Isola 2020 (arXiv:2005.10242) per class, not squared.
    """
    z, labels, _ = checked(z, labels)
    _need_views(z)
    return _class_means((z[1:] - z[0]).norm(dim=2).mean(dim=0), labels)


def sample_alignment_accuracy(z, labels):
    """SAA: share of the rows whose nearest other row, of all M, is another view of the same image. 100 = images are told apart.

    z [V, n, D], V >= 2, tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], percent of the
    rows of class 0 and of class 1. Rows that are equally near share the credit, so a fully collapsed representation scores chance,
    100 (V - 1) / (M - 1). ValueError: one view, an empty class, wrong shapes, not finite. Source: arXiv:2503.17024.
    """
    z, labels, rows = checked(z, labels)
    _need_views(z)
    image = torch.arange(z.shape[1], device=z.device).repeat(len(z))  # [M]
    size = _centred(rows).square().sum(dim=1, keepdim=True)  # [M, 1]
    hits = torch.empty_like(rows[:, 0])  # [M]
    for anchors, d2 in _squared_distances(rows, itself=torch.inf):
        least = d2.amin(dim=1, keepdim=True)  # [a, 1]
        anchor, nearest = (d2 <= least + ROUNDING * (size[anchors] + least)).nonzero(
            as_tuple=True
        )  # one per anchor unless rows tie
        hit = image[anchors[anchor]] == image[nearest]
        hits[anchors] = anchor.bincount(hit.double(), len(anchors)) / anchor.bincount(
            minlength=len(anchors)
        )
    return 100 * _class_means(hits, labels.repeat(len(z)))


def class_alignment_distance(z, labels):
    """CAD: mean distance from a row to the other rows of its class, all views. 0 = the class is one point.

    z [V, n, D], tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], L2 distance, the mean
    over the rows of class 0 and of class 1. ValueError: fewer than two rows in a class (V * n_c < 2), wrong shapes, not finite.

    Differs from the paper's code, which counts the row's zero distance to itself in the mean. With m = V * n_c rows,
    exactly: reference = ours * (m - 1) / m, and ours = reference * m / (m - 1).
    """

    def mean_distance(rows):
        return sum(d2.sqrt().sum() for _, d2 in _squared_distances(rows)) / (
            len(rows) * (len(rows) - 1)
        )

    return torch.stack([mean_distance(rows) for rows in _classes(z, labels)])


def class_alignment_consistency(z, labels, neighborhood=0.05):
    """CAC: share of a row's k nearest other rows, of all M, that have its label. The class's share of all rows = classes are mixed.

    z [V, n, D], tensor or array, unit length or not; labels int [n] of 0 and 1; neighborhood: a share of all rows below 1,
    k = int(share * V * n), or an integer k. Returns float64 [2], percent, the mean over the rows of class 0 and of class 1.
    Rows that are equally far share the last places, so a fully collapsed representation scores 100 (V * n_c - 1) / (M - 1).
    ValueError: k = 0 or k > M - 1, an empty class, wrong shapes, not finite. Source: arXiv:2503.17024.

    Differs from the paper's code, which takes the row itself as the first of the k, except after its own SAA has overwritten
    the diagonal. Exactly, unless rows coincide: reference(k) = (100 + (k - 1) * ours(k - 1)) / k, and
    ours(k) = ((k + 1) * reference(k + 1) - 100) / k.
    """
    z, labels, rows = checked(z, labels)
    k = neighbors(neighborhood, len(rows))
    labels = labels.repeat(len(z))  # [M]
    size = _centred(rows).square().sum(dim=1, keepdim=True)  # [M, 1]
    shares = torch.empty_like(rows[:, 0])  # [M]
    for anchors, d2 in _squared_distances(rows, itself=torch.inf):
        last = _kth_smallest(d2, k)  # [a, 1]
        rounding = ROUNDING * (size[anchors] + last)
        anchor, near = (d2 <= last + rounding).nonzero(
            as_tuple=True
        )  # k per anchor, more where rows tie
        nearer = (
            d2[anchor, near] < (last - rounding)[anchor, 0]
        )  # the others share the places that are left
        same = labels[anchors[anchor]] == labels[near]
        own, inside, tied, own_tied = (
            anchor[some].bincount(minlength=len(anchors))
            for some in (nearer & same, nearer, ~nearer, ~nearer & same)
        )
        shares[anchors] = (own + (k - inside) * own_tied / tied.double()) / k
    return 100 * _class_means(shares, labels)


def gaussian_potential(z, labels):
    """GPU: mean over pairs of different rows of a class of exp(-2 * distance^2). 1 = the class is one point, near 0 = spread out.

    z [V, n, D], tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], no unit, no logarithm.
    ValueError: fewer than two rows in a class (V * n_c < 2), wrong shapes, not finite.
    Source: the Gaussian potential of Wang & Isola 2020 (arXiv:2005.10242), t = 2, per class.
    """

    def potential(rows):
        return sum(
            d2.mul_(-2).exp_().sum() for _, d2 in _squared_distances(rows, itself=torch.inf)
        ) / (len(rows) * (len(rows) - 1))

    return torch.stack([potential(rows) for rows in _classes(z, labels)])


def entropy_uniformity(z, labels, repeats=5, generator=None):
    """PEU: how evenly a class fills the sphere. 100 = every row in a place of its own, 0 = all rows in one.

    Throw 10 * M points uniformly on the unit sphere and send every row to its nearest one: the entropy (bits) of the class's rows
    over the points, divided by log2(rows of the class), in percent, mean over `repeats` throws.

    z [V, n, D], tensor or array, rows are scaled to unit length first; labels int [n] of 0 and 1; generator: a CPU torch.Generator,
    by default seeded(0), so that a second call agrees with the first. Returns float64 [2], percent.
    ValueError: fewer than two rows in a class (V * n_c < 2), repeats < 1, wrong shapes, not finite. Source: arXiv:2503.17024.
    """
    z, labels, rows = checked(z, labels)
    if repeats < 1:
        raise ValueError(f"entropy uniformity needs at least one repeat, not {repeats}")
    rows = F.normalize(rows, dim=1)
    classes = [torch.cat([labels == c] * len(z)) for c in (0, 1)]  # bool [M] each
    _need_two_rows(classes[0].sum(), classes[1].sum())
    generator = generator or make_generator(0)
    total = torch.zeros(2, dtype=torch.float64, device=rows.device)
    for _ in range(repeats):
        place = _nearest_random_point(rows, 10 * len(rows), generator)
        for c in (0, 1):
            counts = place[classes[c]].unique(return_counts=True)[1].double()
            p = counts / counts.sum()
            total[c] += -(p * p.log2()).sum() / counts.sum().log2()
    return 100 * total / repeats


# the pieces ---------------------------------------------------------------------------------------------------------


def checked(z, labels):
    """z [V, n, D] and labels [n] as tensors (z float64), and the M rows view-major [M, D]. ValueError says what is wrong."""
    z, labels = torch.as_tensor(z).detach().double(), torch.as_tensor(labels)
    if z.ndim != 3 or 0 in z.shape:
        raise ValueError(f"embeddings must be [views, images, dimensions], not {list(z.shape)}")
    if labels.shape != z.shape[1:2]:
        raise ValueError(
            f"{z.shape[1]} images need labels [{z.shape[1]}], not {list(labels.shape)}"
        )
    if not z.isfinite().all():
        raise ValueError("embeddings hold NaN or infinite values")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 and 1, not {labels.unique().tolist()[:5]}")
    if len(labels.unique()) < 2:
        raise ValueError(
            f"all {len(labels)} images are of class {int(labels[0])}; the metrics compare two classes"
        )
    return z, labels.to(z.device).long(), z.flatten(0, 1)


def _need_views(z):
    if len(z) < 2:
        raise ValueError(
            "sample alignment compares views of the same image and needs at least two, not 1"
        )


def _need_two_rows(*rows):
    for c, count in enumerate(rows):
        if count < 2:
            raise ValueError(f"class {c} has a single row; pairs need two views or a second image")


def neighbors(neighborhood, rows):
    """k of the neighborhood: an integer k itself, or int(share * rows)."""
    whole_number = isinstance(neighborhood, numbers.Integral)
    if not whole_number and not 0 < neighborhood < 1:
        raise ValueError(
            f"a neighborhood is a share between 0 and 1 or a whole number of neighbors, not {neighborhood}"
        )
    k = neighborhood if whole_number else int(neighborhood * rows)
    if not 1 <= k <= rows - 1:
        raise ValueError(
            f"a neighborhood of {neighborhood} means {k} of {rows - 1} other rows; give a number between 1 and {rows - 1}"
        )
    return int(k)


def _classes(z, labels):
    """The rows of class 0 and of class 1, [V * n_c, D] each."""
    z, labels, _ = checked(z, labels)
    classes = [z[:, labels == c].flatten(0, 1) for c in (0, 1)]
    _need_two_rows(*map(len, classes))
    return classes


def _class_means(values, labels):
    return torch.stack([values[labels == c].mean() for c in (0, 1)])


def _centred(rows):
    return rows - rows.mean(dim=0)


def _kth_smallest(values, k):
    """[a, M] -> [a, 1]. On the CPU by NumPy's partition, three times as fast as topk."""
    if values.is_cuda:
        return values.topk(k, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k])


def _squared_distances(rows, itself=0.0):
    """Yield (anchors, squared distances [a, M]) until every row was an anchor; `itself` stands for the distance to itself."""
    rows = _centred(rows)  # distances stay, and those of a tight cluster lose nothing to its place
    square = rows.square().sum(dim=1)
    for anchors in torch.arange(len(rows), device=rows.device).split(max(1, AT_ONCE // len(rows))):
        d2 = (
            torch.addmm(square, rows[anchors], rows.T, alpha=-2)
            .add_(square[anchors, None])
            .clamp_(min=0)
        )
        d2[torch.arange(len(anchors), device=rows.device), anchors] = itself
        yield anchors, d2


def _nearest_random_point(rows, points, generator):
    """Index [M] of the nearest of `points` uniform points on the sphere to every row [M, D] of unit length.

    Float32 products, whose rounding is below D * 2 ** -23, tell which rows may have come nearer; float64 decides.
    """
    best = torch.full_like(rows[:, 0], -torch.inf)
    place = torch.zeros_like(best, dtype=torch.long)
    rough, rounding = rows.float(), rows.shape[1] * 2**-23
    drawn = (
        1024  # at a time, and never another number: randn's stream depends on the size asked for
    )
    for start in range(0, points, drawn):
        block = torch.randn(drawn, rows.shape[1], generator=generator, dtype=torch.float64)[
            : points - start
        ].to(rows.device)
        block = block / block.norm(dim=1, keepdim=True)
        for part in torch.arange(len(rows), device=rows.device).split(max(1, AT_ONCE // drawn)):
            part = part[(rough[part] @ block.float().T).amax(dim=1) > best[part] - rounding]
            cosine, nearest = (rows[part] @ block.T).max(dim=1)
            closer = cosine > best[part]
            best[part] = torch.where(closer, cosine, best[part])
            place[part] = torch.where(closer, start + nearest, place[part])
    return place


# ------------------------------------------------------------------------------------------------------------------
# the script
# ------------------------------------------------------------------------------------------------------------------

POINTS = 3000  # most that the picture shows: t-SNE takes longer than the metrics, and more dots only cover each other


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.embeddings:
        evaluate(*open_embeddings(args), args, device)
    for run in args.runs:
        evaluate(*open_run(run, args, device), args, device)
    if args.runs:
        print(
            f"next: python report.py {next((folder for folder in args.runs[0].parents if folder.name == 'runs'), args.runs[0].parent)}"
        )


def evaluate(source, out, facts, spaces, args, device):
    """Measure one source of embeddings and write metrics.json and the picture into `out`, unless they are there."""
    if finished(out / "metrics.json", facts):
        print(f"finished already: {out / 'metrics.json'}")
        return
    lock_folder(out, "-metrics")
    labels, embeddings = spaces()  # {space: (z [V, n, D], evaluation view [n, D])}
    try:
        values = {
            space: measure(z.to(device), labels, args.neighborhood, space)
            for space, (z, _) in embeddings.items()
        }
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    space = next(iter(embeddings))
    if args.picture != "none":
        order = (facts["minority"], 1 - facts["minority"])
        saa, cac = (
            "-"
            if values[space][m] is None
            else " / ".join(f"{values[space][m][c]:.0f}" for c in order)
            for m in ("saa", "cac")
        )
        title = f"{facts['title']}, {space}\nSAA {saa} %, CAC {cac} % (minority / majority)"
        draw(
            out,
            embeddings[space][1].numpy(),
            labels.numpy(),
            facts["classes"],
            facts["minority"],
            args.picture,
            args.seed,
            title,
        )
    nested = {"encoder": values["encoder"]} if "encoder" in values else {}
    others = [run for run in args.runs if run != source]
    write_json(
        out / "metrics.json",
        {
            **values[space],
            "space": space,
            **nested,
            **facts,
            "provenance": provenance(device, exclude=others),
        },
    )

    print_table(values, facts)
    pictures = [] if args.picture == "none" else [out / "embedding.png", out / "embedding.npz"]
    print("wrote", *[out / "metrics.json", *pictures], sep="\n  ")


def open_run(run, args, device):
    """(source, out, what decides the result, a function that embeds the test split) of a run folder."""
    config, subset, encoder = load_run(run, args.smoke)
    head = None  # supervised from scratch: there is none
    if "projection_dim" in config:
        model = ContrastiveModel(config["arch"], config["projection_dim"])
        checkpoint = run / "checkpoint.pt"
        load_strict(model, load_tensors(checkpoint, keys=("model",))["model"], checkpoint)
        if module_sha256(model.encoder) != module_sha256(encoder):
            raise UserError(
                f"{run}: checkpoint.pt and encoder.pt hold different encoders; finish the run with pretrain.py first"
            )
        head = model.head.eval().requires_grad_(False).to(device)
    rows = subset.splits["test"]
    labels = torch.from_numpy(subset.labels[rows])
    title = (
        f"{subset.name} {subset.ratio}, {config.get('method', config.get('loss', 'supervised'))}"
    )
    facts = {
        **settings(args, labels, subset.classes, subset.minority, 2, title),
        "split": "test",
        "batch_size": args.batch_size,
        "encoder_sha256": module_sha256(encoder),
    }

    def spaces():
        network = encoder.to(device)
        views = embed(
            network,
            subset,
            rows,
            device,
            args.batch_size,
            2,
            make_generator(args.seed),
            "two views",
        )  # [2, n, D]
        plain = embed(
            network, subset, rows, device, args.batch_size, desc="evaluation view"
        )  # [n, D]
        found = {"encoder": (F.normalize(views, dim=2), F.normalize(plain, dim=1))}
        if head:
            found = {
                "projection": tuple(
                    F.normalize(head(x.to(device)), dim=-1).cpu() for x in (views, plain)
                ),
                **found,
            }
        return labels, found

    return run, args.out or run, facts, spaces


def open_embeddings(args):
    """The same of an npz file with arrays z [V, n, D] or [n, D] and labels [n]."""
    path, needs = (
        args.embeddings,
        "--embeddings needs an .npz with arrays z [V, n, D] or [n, D] and labels [n] of 0 and 1",
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            z, labels = file["z"], file["labels"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {needs}") from None
    except MemoryError:
        raise UserError(
            f"{path}: declares more numbers than the memory can hold; {needs}"
        ) from None
    except Exception as error:  # a damaged npz fails in zipfile, zlib or numpy in many ways; all of them mean the same
        raise UserError(f"{path}: {error}; {needs}".replace("\n", " ")) from None
    if z.dtype.kind not in "fiu" or labels.dtype.kind not in "fiub":
        raise UserError(
            f"{path}: z is {z.dtype} and labels are {labels.dtype}, both must be numbers; {needs}"
        )
    z, labels = torch.from_numpy(z.astype(np.float64)), torch.from_numpy(labels.astype(np.float64))
    z = z[None] if z.ndim == 2 else z
    try:
        z, labels, _ = checked(z, labels)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {needs}") from None
    if len(z) == 1:
        print("one view: SAD and SAA compare views of the same image and stay empty (null)")
    if args.smoke:
        keep = torch.cat([(labels == c).nonzero().squeeze(1)[:32] for c in (0, 1)]).sort().values
        z, labels = z[:, keep], labels[keep]
    facts = {
        **settings(
            args,
            labels,
            ["class 0", "class 1"],
            int(labels.sum() * 2 <= len(labels)),
            len(z),
            path.stem,
        ),
        "split": None,
        "embeddings_sha256": sha256(path),
    }
    return (
        path,
        args.out or path.with_name(f"{path.stem}_metrics"),
        facts,
        lambda: (labels, {"embeddings": (z, z[0])}),
    )


def settings(args, labels, classes, minority, views, title):
    """What decides the result, for metrics.json: the same settings again need no new evaluation."""
    n = torch.bincount(labels, minlength=2).tolist()
    if 0 in n:
        raise UserError(
            f"{title}: the test split has no image of class {classes[n.index(0)]}; make the subset again"
        )
    try:
        k = neighbors(args.neighborhood, views * sum(n))
    except ValueError as error:
        raise UserError(f"--neighborhood {args.neighborhood}: {error}") from None
    return {
        "title": title,
        "classes": classes,
        "minority": minority,
        "n": n,
        "views": views,
        "seed": args.seed,
        "neighborhood": args.neighborhood,
        "neighbors": k,
        "picture": args.picture,
        "smoke": args.smoke,
    }


def finished(path, facts):
    """Whether metrics.json holds these very results. UserError when writing it would lose others; another picture loses nothing."""
    if not path.exists():
        return False
    old = read_json(path, "delete it to measure again")
    differ = [key for key, value in facts.items() if old.get(key) != value]
    if set(differ) - {"picture"}:
        raise UserError(
            f"{path}: holds another evaluation (other {', '.join(differ)}); delete it or choose another folder with --out"
        )
    return not differ


def measure(z, labels, neighborhood, space):
    """The six metrics of z [V, n, D]: {name: [class 0, class 1]}; SAD and SAA are None for a single view."""
    metrics = {
        "sad": sample_alignment_distance,
        "saa": sample_alignment_accuracy,
        "cad": class_alignment_distance,
        "cac": lambda z, labels: class_alignment_consistency(z, labels, neighborhood),
        "gpu": gaussian_potential,
        "peu": entropy_uniformity,
    }
    return {
        name: None if len(z) == 1 and name in ("sad", "saa") else metric(z, labels).tolist()
        for name, metric in tqdm(metrics.items(), desc=f"metrics, {space}", leave=False)
    }


def print_table(values, facts):
    mixed = " and ".join(f"{100 * count / sum(facts['n']):.0f}" for count in facts["n"])
    collapse = {
        "sad": "0: views coincide, and so do all images",
        "saa": "near 0: some other image is nearer than the own view",
        "cad": "0: a class is one point",
        "cac": f"{mixed}, the classes' shares: neighbours tell nothing",
        "gpu": "1: a class is one point",
        "peu": "0: a class is in one place",
    }
    names = [
        name + (" (minority)" if c == facts["minority"] else "")
        for c, name in enumerate(facts["classes"])
    ]
    widths = [max(len(name), 10) for name in names]
    print(
        f"\n{facts['title']}: {facts['n'][0]} and {facts['n'][1]} images, {facts['views']} view{'s' * (facts['views'] > 1)}"
    )
    for space, measured in values.items():
        print(
            f"{space:<11}"
            + "  ".join(f"{name:>{w}}" for name, w in zip(names, widths))
            + "   a collapse looks like"
        )
        for name, pair in measured.items():
            unit = {"sad": "L2", "cad": "L2", "gpu": ""}.get(name, "%")
            cells = [
                f"{'-':>{w}}" if pair is None else f"{pair[c]:>{w}.{1 if unit == '%' else 3}f}"
                for c, w in enumerate(widths)
            ]
            print(f"  {name.upper():<4} {unit:<4}" + "  ".join(cells) + f"   {collapse[name]}")


def draw(out, rows, labels, classes, minority, method, seed, title):
    """Map rows [n, D] to the plane; write embedding.npz (xy float32 [n, 2], labels, minority, map, limit of the axes) and embedding.png."""
    from matplotlib.figure import Figure

    if len(rows) > POINTS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), POINTS, replace=False))
        rows, labels, title = (
            rows[chosen],
            labels[chosen],
            f"{title}   ({POINTS} of {len(rows)} images)",
        )
        print(f"the picture shows {POINTS} images, drawn by --seed")
    xy, name = flat_map(rows, method)
    # a PCA map is drawn at the scale of the rows' length, so that a collapse is one dot; t-SNE has no scale of its own
    limit = (
        1.05 * max(np.linalg.norm(rows, axis=1).mean(), np.abs(xy).max())
        if name == "PCA"
        else np.inf
    )
    with atomic_write(out / "embedding.npz") as part, open(part, "wb") as file:
        np.savez(
            file, xy=xy.astype(np.float32), labels=labels, minority=minority, map=name, limit=limit
        )

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    styles = [
        dict(c="#9ec5e8", marker="o", s=14, linewidths=0),
        dict(c="#8b0000", marker="^", s=30, linewidths=0.5, edgecolors="w"),
    ]
    for c in (1 - minority, minority):  # the few on top of the many
        of_class = labels == c
        axes.scatter(
            *xy[of_class].T, label=f"{classes[c]} ({of_class.sum()})", **styles[c == minority]
        )
    axes.set(title=title, aspect="equal", xlabel=f"{name} 1", ylabel=f"{name} 2")
    if name == "t-SNE":
        axes.set(
            xticks=[],
            yticks=[],
            xlabel="t-SNE: shows neighbours, not distances; a collapse is magnified",
            ylabel="",
        )
    else:
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    axes.legend(loc="best", framealpha=0.8)
    with atomic_write(out / "embedding.png") as part:
        figure.savefig(part, format="png", dpi=150)


def flat_map(rows, method):
    """(xy [n, 2], "t-SNE" or "PCA"). t-SNE starts at the principal components; too few rows, or all equal, leave it at these."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    spread = centred.std()
    if spread <= 1e-12 * np.abs(rows).max():
        print("all embeddings are equal: the picture shows one point")
        return np.zeros((len(rows), 2)), "PCA"
    centred = np.pad(centred, ((0, 0), (0, 1)))  # so that one dimension has a plane, too
    xy = PCA(2, random_state=0).fit_transform(centred)
    if method == "pca" or len(rows) < 10:
        return xy, "PCA"
    tsne = TSNE(
        2,
        init=(xy / xy[:, 0].std() * 1e-4).astype(np.float32),
        perplexity=min(30, (len(rows) - 1) / 3),
        random_state=0,
    )
    print(f"t-SNE of {len(rows)} images", flush=True)
    with threadpool_limits(1):  # several wait for each other on a busy machine: 10x
        return tsne.fit_transform(
            (centred / spread).astype(np.float32)
        ), "t-SNE"  # scaled: a tight cloud is mapped like a wide one


if __name__ == "__main__":
    run_main(main)
