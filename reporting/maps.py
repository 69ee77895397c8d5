"""Draw the test images in the embedding, in two dimensions."""

import textwrap
from pathlib import Path

import numpy as np

from reporting.collect import sort_key
from reporting.styles import MAJORITY, MINORITY, REST, full_name, panel_grid
from reporting.tables import encoder_groups
from utils.cli import UserError

# Panels side by side.
COLUMNS = 6


def load_embedding(group, source):
    """Return (row, xy, is_minority, axis limit) of the lowest seed with a picture, or None."""
    for row in sorted(group.rows, key=lambda row: row["seed"]):
        path = Path(source) / row["path"] / "embedding.npz"
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    is_minority = file["labels"] == int(file["minority"])
                    return row, file["xy"], is_minority, float(file["limit"])
            except Exception:  # numpy and zipfile report damage in many ways
                hint = "delete it and run evaluate_metrics.py again"
                raise UserError(f"{path}: not an embedding; {hint}") from None
    return None


def common_limit(found):
    """Return one axis limit for all PCA maps, so that a collapse is a dot; inf without any."""
    limits = [limit for *_, limit in filter(None, found) if np.isfinite(limit)]
    return max(limits, default=np.inf)


def embedding_panel(ax, embedding, common):
    """Draw the majority as pale dots and the minority on top. `common`: limit of PCA maps."""
    ax.set(xticks=[], yticks=[])
    if embedding is None:
        ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color=REST)
        ax.spines[:].set_visible(False)
        return
    row, xy, is_minority, limit = embedding
    if np.isfinite(limit):
        ax.set(xlim=(-common, common), ylim=(-common, common))
    ax.spines[:].set_visible(True)
    ax.set_box_aspect(1)
    size = np.clip(4000 / len(xy), 2, 14)
    # Thousands of points would make an SVG file of megabytes.
    looks = {"lw": 0, "rasterized": True}
    ax.scatter(*xy[~is_minority].T, s=size, c=MAJORITY, marker="o", label="majority", **looks)
    ax.scatter(*xy[is_minority].T, s=1.3 * size, c=MINORITY, marker="^", label="minority", **looks)
    # t-SNE magnifies a collapse: the reader needs its name.
    method = "" if np.isfinite(limit) else ", t-SNE: not to scale"
    ax.set_xlabel(f"seed {row['seed']}{method}", fontsize=8)


def add_class_legend(figure):
    """Name the two classes once below all panels."""
    panels = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {name: handle for panel in panels for handle, name in zip(*panel, strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, markerscale=2.5
    )


def embeddings_figure(groups, source):
    """Draw the embeddings of one data set side by side: a row per ratio, a column per method."""
    groups = [group for group in encoder_groups(groups) if group.method != "raw pixels"]
    found = {(g.ratio, g.label): load_embedding(g, source) for g in groups}
    ratios = list(dict.fromkeys(ratio for (ratio, _), value in found.items() if value))
    if not ratios:
        return None
    # Methods stand in their order, whichever ratio has them first.
    groups.sort(key=lambda group: sort_key(group.rows[0])[4:])
    names = {g.label: full_name(g) for g in groups if found[g.ratio, g.label]}
    panels = [(ratio, label) for ratio in ratios for label in names]
    figure, axes = panel_grid([2.5] * len(panels), len(names), 2.5)
    common = common_limit(found.values())
    for ax, (ratio, label) in zip(axes, panels, strict=True):
        embedding_panel(ax, found.get((ratio, label)), common)
        if ratio == ratios[0]:
            ax.set_title(textwrap.fill(names[label], 24), fontsize=10)
        if label == next(iter(names)):
            ax.set_ylabel(ratio, fontsize=10)
    figure.suptitle(f"{groups[0].dataset}: test images in the embedding, on one scale")
    add_class_legend(figure)
    return figure
