"""Judge an embedding by six numbers per class: how close positives are, how evenly the sphere is used, and whether neighbours agree.

    python evaluate_metrics.py runs/digits/99-1/supmin/seed0          # a run: metrics.json, embedding.png beside its encoder
    python evaluate_metrics.py --embeddings z.npz                     # anyone's: z [V, n, D] or [n, D], labels [n] of 0 and 1

SAD, CAD, GPU and PEU are the usual measures of alignment and uniformity; SAA and CAC (arXiv:2503.17024) compare a row with its
neighbours and so tell a collapsed or mixed-up representation from a tight one. Importable, no file or flag needed:
from evaluate_metrics import sample_alignment_accuracy, class_alignment_consistency.
"""

import numbers

import torch

from common import seeded

# ------------------------------------------------------------------------------------------------------------------
# the metrics. Letters: V views, n images, D dimensions, M = V*n rows (view-major: row = view * n + image), n_c images of
# class c. Everything is float64, whatever comes in, and a row is never its own neighbour.
# ------------------------------------------------------------------------------------------------------------------

AT_ONCE = 2 ** 22               # distances held at a time (32 MB), so that memory grows with the rows and not with their square
ROUNDING = 1e-13                # squared distances that differ by less, relative to the rows' size, tie: rounding would decide


def sample_alignment_distance(z, labels):
    """SAD: mean distance from an image's view 0 to its other views. 0 = the views coincide.

    z [V, n, D], V >= 2, tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], L2 distance,
    the mean over the images of class 0 and of class 1. ValueError: one view, an empty class, wrong shapes, not finite.
    Source: alignment of Wang & Isola 2020 (arXiv:2005.10242) per class, not squared.
    """
    z, labels, _ = _checked(z, labels)
    _need_views(z)
    return _class_means((z[1:] - z[0]).norm(dim=2).mean(dim=0), labels)


def sample_alignment_accuracy(z, labels):
    """SAA: share of the rows whose nearest other row, of all M, is another view of the same image. 100 = images are told apart.

    z [V, n, D], V >= 2, tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], percent of the
    rows of class 0 and of class 1. Rows that are equally near share the credit, so a fully collapsed representation scores chance,
    100 (V - 1) / (M - 1). ValueError: one view, an empty class, wrong shapes, not finite. Source: arXiv:2503.17024.
    """
    z, labels, rows = _checked(z, labels)
    _need_views(z)
    image = torch.arange(z.shape[1], device=z.device).repeat(len(z))                    # [M]
    size, hits = _centred(rows).square().sum(dim=1, keepdim=True), []                   # [M, 1]
    for anchors, d2 in _squared_distances(rows, itself=torch.inf):
        least = d2.amin(dim=1, keepdim=True)                                            # [a, 1]
        nearest = d2 - least <= ROUNDING * (size[anchors] + least)                      # [a, M], one per anchor unless rows tie
        hits.append((nearest & (image[anchors, None] == image)).sum(1) / nearest.sum(1).double())
    return 100 * _class_means(torch.cat(hits), labels.repeat(len(z)))


def class_alignment_distance(z, labels):
    """CAD: mean distance from a row to the other rows of its class, all views. 0 = the class is one point.

    z [V, n, D], tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], L2 distance, the mean
    over the rows of class 0 and of class 1. ValueError: fewer than two rows in a class (V * n_c < 2), wrong shapes, not finite.

    Differs from the paper's code, which counts the row's zero distance to itself in the mean. With m = V * n_c rows,
    exactly: reference = ours * (m - 1) / m, and ours = reference * m / (m - 1).
    """
    def mean_distance(rows):
        return sum(d2.sqrt().sum() for _, d2 in _squared_distances(rows)) / (len(rows) * (len(rows) - 1))

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
    z, labels, rows = _checked(z, labels)
    k = _neighbors(neighborhood, len(rows))
    labels = labels.repeat(len(z))                                                      # [M]
    size, shares = _centred(rows).square().sum(dim=1, keepdim=True), []                 # [M, 1]
    for anchors, d2 in _squared_distances(rows, itself=torch.inf):
        last = d2.kthvalue(k, dim=1, keepdim=True).values                               # [a, 1]
        same = labels[anchors, None] == labels                                          # [a, M]
        tied = (d2 - last).abs() <= ROUNDING * (size[anchors] + last)                   # these share the places that are left
        nearer = (d2 < last) & ~tied
        places = k - nearer.sum(1)
        shares.append(((nearer & same).sum(1) + places * (tied & same).sum(1) / tied.sum(1).double()) / k)
    return 100 * _class_means(torch.cat(shares), labels)


def gaussian_potential(z, labels):
    """GPU: mean over pairs of different rows of a class of exp(-2 * distance^2). 1 = the class is one point, near 0 = spread out.

    z [V, n, D], tensor or array, unit length or not; labels int [n] of 0 and 1. Returns float64 [2], no unit, no logarithm.
    ValueError: fewer than two rows in a class (V * n_c < 2), wrong shapes, not finite.
    Source: the Gaussian potential of Wang & Isola 2020 (arXiv:2005.10242), t = 2, per class.
    """
    def potential(rows):
        return sum((-2 * d2).exp().sum() for _, d2 in _squared_distances(rows, itself=torch.inf)) / (len(rows) * (len(rows) - 1))

    return torch.stack([potential(rows) for rows in _classes(z, labels)])


def entropy_uniformity(z, labels, repeats=5, generator=None):
    """PEU: how evenly a class fills the sphere. 100 = every row in a place of its own, 0 = all rows in one.

    Throw 10 * M points uniformly on the unit sphere and send every row to its nearest one: the entropy (bits) of the class's rows
    over the points, divided by log2(rows of the class), in percent, mean over `repeats` throws.

    z [V, n, D], tensor or array, rows are scaled to unit length first; labels int [n] of 0 and 1; generator: a CPU torch.Generator,
    by default seeded(0), so that a second call agrees with the first. Returns float64 [2], percent.
    ValueError: fewer than two rows in a class (V * n_c < 2), repeats < 1, wrong shapes, not finite. Source: arXiv:2503.17024.
    """
    z, labels, rows = _checked(z, labels)
    if repeats < 1:
        raise ValueError(f"entropy uniformity needs at least one repeat, not {repeats}")
    rows = torch.nn.functional.normalize(rows, dim=1)
    classes = [torch.cat([labels == c] * len(z)) for c in (0, 1)]                       # bool [M] each
    _need_two_rows(classes[0].sum(), classes[1].sum())
    generator = generator or seeded(0)
    total = torch.zeros(2, dtype=torch.float64, device=rows.device)
    for _ in range(repeats):
        place = _nearest_random_point(rows, 10 * len(rows), generator)
        for c in (0, 1):
            counts = place[classes[c]].unique(return_counts=True)[1].double()
            p = counts / counts.sum()
            total[c] += -(p * p.log2()).sum() / counts.sum().log2()
    return 100 * total / repeats


# the pieces ---------------------------------------------------------------------------------------------------------

def _checked(z, labels):
    """z [V, n, D] and labels [n] as tensors (z float64), and the M rows view-major [M, D]. ValueError says what is wrong."""
    z, labels = torch.as_tensor(z).detach().double(), torch.as_tensor(labels)
    if z.ndim != 3 or 0 in z.shape:
        raise ValueError(f"embeddings must be [views, images, dimensions], not {list(z.shape)}")
    if labels.shape != z.shape[1:2]:
        raise ValueError(f"{z.shape[1]} images need labels [{z.shape[1]}], not {list(labels.shape)}")
    if not z.isfinite().all():
        raise ValueError("embeddings hold NaN or infinite values")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 and 1, not {labels.unique().tolist()[:5]}")
    if len(labels.unique()) < 2:
        raise ValueError(f"all {len(labels)} images are of class {int(labels[0])}; the metrics compare two classes")
    return z, labels.to(z.device).long(), z.flatten(0, 1)


def _need_views(z):
    if len(z) < 2:
        raise ValueError("sample alignment compares views of the same image and needs at least two, not 1")


def _need_two_rows(*rows):
    for c, count in enumerate(rows):
        if count < 2:
            raise ValueError(f"class {c} has a single row; pairs need two views or a second image")


def _neighbors(neighborhood, rows):
    """k of the neighborhood: an integer k itself, or int(share * rows)."""
    k = neighborhood if isinstance(neighborhood, numbers.Integral) else int(neighborhood * rows)
    if not isinstance(neighborhood, numbers.Integral) and not 0 < neighborhood < 1:
        raise ValueError(f"a neighborhood is a share between 0 and 1 or a whole number of neighbors, not {neighborhood}")
    if not 1 <= k <= rows - 1:
        raise ValueError(f"a neighborhood of {neighborhood} means {k} of {rows - 1} other rows; give a number between 1 and {rows - 1}")
    return int(k)


def _classes(z, labels):
    """The rows of class 0 and of class 1, [V * n_c, D] each."""
    z, labels, _ = _checked(z, labels)
    classes = [z[:, labels == c].flatten(0, 1) for c in (0, 1)]
    _need_two_rows(*map(len, classes))
    return classes


def _class_means(values, labels):
    return torch.stack([values[labels == c].mean() for c in (0, 1)])


def _centred(rows):
    return rows - rows.mean(dim=0)


def _squared_distances(rows, itself=0.0):
    """Yield (anchors, squared distances [a, M]) until every row was an anchor; `itself` stands for the distance to itself."""
    rows = _centred(rows)                       # distances stay, and those of a tight cluster lose nothing to its place
    square = rows.square().sum(dim=1)
    for anchors in torch.arange(len(rows), device=rows.device).split(max(1, AT_ONCE // len(rows))):
        d2 = torch.addmm(square, rows[anchors], rows.T, alpha=-2).add_(square[anchors, None]).clamp_(min=0)
        d2[torch.arange(len(anchors), device=rows.device), anchors] = itself
        yield anchors, d2


def _nearest_random_point(rows, points, generator):
    """Index [M] of the nearest of `points` uniform points on the sphere to every row [M, D] of unit length."""
    best = torch.full_like(rows[:, 0], -torch.inf)
    place = torch.zeros_like(best, dtype=torch.long)
    drawn = 1024                                # at a time, and never another number: randn's stream depends on the size asked for
    for start in range(0, points, drawn):
        block = torch.randn(drawn, rows.shape[1], generator=generator, dtype=torch.float64)[:points - start].to(rows.device)
        block = block / block.norm(dim=1, keepdim=True)
        for part in torch.arange(len(rows), device=rows.device).split(max(1, AT_ONCE // drawn)):
            cosine, nearest = (rows[part] @ block.T).max(dim=1)
            closer = cosine > best[part]
            best[part] = torch.where(closer, cosine, best[part])
            place[part] = torch.where(closer, start + nearest, place[part])
    return place
