"""The map of a run's embeddings: embedding.png, and embedding.npz for the report."""

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from reporting.styles import MAJORITY, MINORITY
from utils.files import atomic_write

# Points of the picture, at most: t-SNE of more takes longer than all metrics.
MAX_PLOT_POINTS = 3000


def plot_embedding(out, embeddings, metrics, args):
    """Draw the evaluation views of the first space in two dimensions.

    Writes embedding.png and embedding.npz: xy float32 [n, 2], labels, images (place of each point
    in the test split), minority, map ("t-SNE" or "PCA"), limit of the axes.
    """
    space, (_, rows) = next(iter(embeddings.spaces.items()))
    rows, labels, minority = rows.numpy(), embeddings.labels.numpy(), embeddings.minority
    pairs = [metrics[name] for name in ("saa", "cac")]
    others = np.arange(len(embeddings.classes)) != minority
    saa, cac = (
        f"{p[minority]:.0f} / {np.array(p)[others].mean():.0f}" if p else "-" for p in pairs
    )
    title = f"{embeddings.title}, {space}\nSAA {saa} %, CAC {cac} % (minority / majority)"
    chosen = np.arange(len(rows))
    if len(rows) > MAX_PLOT_POINTS:
        generator = np.random.default_rng(args.seed)
        chosen = np.sort(generator.choice(len(rows), MAX_PLOT_POINTS, replace=False))
        title += f"   ({MAX_PLOT_POINTS} of {len(rows)} images)"
        rows, labels = rows[chosen], labels[chosen]
        print(f"the picture shows {MAX_PLOT_POINTS} images, drawn by --seed")
    xy, method = project_2d(rows, args.picture)
    # the axes of a PCA map show the rows' length: a collapse is one dot. t-SNE has no scale
    length = np.linalg.norm(rows, axis=1).mean()
    limit = 1.05 * max(length, np.abs(xy).max()) if method == "PCA" else np.inf
    arrays = dict(labels=labels, images=chosen, minority=minority, map=method, limit=limit)
    with atomic_write(out / "embedding.npz") as tmp, open(tmp, "wb") as file:
        np.savez(file, xy=xy.astype(np.float32), **arrays)
    names = [f"{name} ({(labels == c).sum()})" for c, name in enumerate(embeddings.classes)]
    figure = draw_scatter(xy, labels, names, minority, limit, title)
    with atomic_write(out / "embedding.png") as tmp:
        figure.savefig(tmp, format="png", dpi=150)


def draw_scatter(xy, labels, names, minority, limit, title):
    """Return a figure with one dot per image, the minority on top. limit: inf for t-SNE."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    majority_style = dict(c=MAJORITY, marker="o", s=14, linewidths=0)
    minority_style = dict(c=MINORITY, marker="^", s=30, linewidths=0.5, edgecolors="w")
    others = [c for c in range(len(names)) if c != minority]
    for i, c in enumerate(others):
        style = majority_style | ({"c": f"C{i}"} if len(others) > 1 else {})
        axes.scatter(*xy[labels == c].T, label=names[c], **style)
    axes.scatter(*xy[labels == minority].T, label=names[minority], **minority_style)
    axes.set(title=title, aspect="equal", xlabel="PCA 1", ylabel="PCA 2")
    if np.isinf(limit):
        note = "t-SNE: shows neighbours, not distances; a collapse is magnified"
        axes.set(xticks=[], yticks=[], xlabel=note, ylabel="")
    else:
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    axes.legend(loc="best", framealpha=0.8)
    return figure


def project_2d(rows, method):
    """Project rows [n, D] by t-SNE or PCA. Returns (xy [n, 2], "t-SNE" or "PCA").

    t-SNE starts at the principal components. Fewer than 10 rows, or equal rows, stay there.
    """
    centered = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    spread = centered.std()
    if spread <= 1e-12 * np.abs(rows).max():
        print("all embeddings are equal: the picture shows one point")
        return np.zeros((len(rows), 2)), "PCA"
    # a column of zeros: one-dimensional rows need a plane, too
    centered = np.pad(centered, ((0, 0), (0, 1)))
    xy = PCA(2, random_state=0).fit_transform(centered)
    if method == "pca" or len(rows) < 10:
        return xy, "PCA"
    start = (xy / xy[:, 0].std() * 1e-4).astype(np.float32)
    tsne = TSNE(2, init=start, perplexity=min(30, (len(rows) - 1) / 3), random_state=0)
    print(f"t-SNE of {len(rows)} images", flush=True)
    # one thread: on a busy machine several wait for each other, up to 10 times as long
    with threadpool_limits(1):
        # scaled: a tight cloud is mapped like a wide one
        return tsne.fit_transform((centered / spread).astype(np.float32)), "t-SNE"
