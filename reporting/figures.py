"""Draw the figures of a report: one message each, a few methods in colour, the others grey."""

import re
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reporting.maps import (
    COLUMNS,
    add_class_legend,
    common_limit,
    embedding_panel,
    embeddings_figure,
    load_embedding,
)
from reporting.styles import (
    FLOORS,
    INK,
    MAJORITY,
    MINORITY,
    RC,
    REST,
    full_name,
    leading_methods,
    marker_looks,
    panel_grid,
)
from reporting.tables import cell_text, encoder_groups, finite_cell, first_probes, row_values
from utils.files import atomic_write

# A regression line through fewer runs would be noise.
MIN_RUNS_FOR_LINE = 10
# {first word of a figure's file name: what no run has if the figure was not drawn}
NEEDED = {
    "accuracy": "a probe or a classifier",
    "saa": "metrics at two ratios of a data set",
    "cac": "a run with a probe and metrics",
    "overview": "a probe or metrics",
    "embeddings": "embedding.npz of evaluate_metrics.py",
    "ablations": "a setting that was varied",
    "metrics": "runs that may judge claims",
}


def plan_figures(groups, source):
    """Return {file name: function that draws it, or returns None where nothing was measured}.

    Figures with embeddings need the folder of the runs; without it they are not planned.
    """
    groups = first_probes(groups)
    plans = {
        "accuracy.png": lambda: accuracy_figure(groups),
        "saa_cac.png": lambda: saa_cac_figure(groups),
        "cac_accuracy.png": lambda: cac_accuracy_figure(groups),
    }
    if not source.is_dir():
        return plans
    overviews, embeddings = {}, {}
    for dataset, members in split_by_dataset(groups).items():
        overviews[f"overview_{dataset}.png"] = lambda m=members: overview_figure(m, source)
        embeddings[f"embeddings_{dataset}.png"] = lambda m=members: embeddings_figure(m, source)
    return overviews | plans | embeddings


def save_figures(plans, out):
    """Draw and save the figures. Returns their names, and a note for each that was not drawn."""
    names, notes = [], []
    for name, draw in plans.items():
        with matplotlib.rc_context(RC):
            figure = draw()
            if figure is None:
                kind = re.match("[a-z]+", name)[0]
                notes.append(f"{name}: not drawn, it needs {NEEDED[kind]}")
                continue
            with atomic_write(out / name) as tmp:
                figure.savefig(tmp, dpi=100)
        names.append(name)
    return names, notes


def split_by_dataset(groups):
    """Return {data set: its Groups}."""
    found = {}
    for group in groups:
        found.setdefault(group.dataset, []).append(group)
    return found


def test_images_text(groups):
    """Name how many test images the numbers rest on: ", 361 test images", or "" if unknown."""
    counts = {row["test_images"] for group in groups for row in group.rows} - {None}
    return f", {' or '.join(map(str, sorted(counts)))} test images" if counts else ""


def chance_percent(groups):
    """Return the balanced accuracy of a guess, which is also the mean CAC of mixed classes."""
    return 100 / max(len(row["classes"]) for group in groups for row in group.rows)


def percent_limits(chance, values):
    """Return the limits of a percent axis. One that starts at the lowest value would exaggerate."""
    return min([chance - 5, *(value - 2 for value in values)]), 101


def score_limits(groups):
    values = [v for group in groups for v in group.cells["balanced_accuracy"].values]
    return percent_limits(chance_percent(groups), values)


# lines over the ratios ----------------------------------------------------------------------------


def known_groups(groups, key):
    """Return the Groups with a known minority share and a value of `key`."""
    return [g for g in groups if g.minority_percent is not None and finite_cell(g, key)]


def line_groups(groups, key):
    """Return {method: its Groups, from rare to balanced} of the methods with several ratios.

    Variants of a method stand in the rows and tables.
    """
    lines = {}
    for group in sorted(known_groups(groups, key), key=lambda group: group.minority_percent):
        if group.is_plain:
            lines.setdefault(full_name(group), []).append(group)
    return {name: points for name, points in lines.items() if len(points) > 1}


def accuracy_figure(groups):
    """Draw balanced accuracy: a row per method at one ratio, and lines over the ratios."""
    groups = [group for group in groups if not group.scored_by.startswith("fine-tuned")]
    groups = [group for group in groups if finite_cell(group, "balanced_accuracy")]
    datasets = split_by_dataset(groups)
    if not datasets:
        return None
    panels = []
    for found in datasets.values():
        panels.append((widest_ratio(found), {}))
        if lines := line_groups(found, "balanced_accuracy"):
            panels.append((widest_ratio(found), lines))
    heights = [row_height(rows) for rows, _ in panels]
    figure, axes = panel_grid(heights, min(2, len(panels)), 6.8)
    note = "Mean and standard deviation over n seeds; small dots: single seeds"
    figure.supxlabel(note, fontsize=9)
    for ax, (rows, lines) in zip(axes, panels, strict=True):
        if lines:
            line_panel(ax, lines, "balanced_accuracy", score_limits(groups))
            title = f"{rows[0].dataset}, all ratios"
            ax.set(title=title, ylabel="balanced test accuracy (%)")
            ax.axhline(chance_percent(rows), color=INK, lw=0.8, ls=":")
        else:
            score_rows(ax, rows)
            ax.set_title(f"{rows[0].dataset} {rows[0].ratio}{test_images_text(rows)}")
    return figure


def line_panel(ax, lines, key, limits, has_names=True):
    """Draw mean and deviation over seeds, and each seed as a dot. lines: of line_groups."""
    leading = leading_methods(points[0] for points in lines.values())
    # Methods stand side by side, so that error bars do not cover each other.
    step = min(1.1, 1.5 ** (1 / len(lines)))
    ends = []
    for i, (name, points) in enumerate(lines.items()):
        cells = [group.cells[key] for group in points]
        x = [g.minority_percent * step ** (i - (len(lines) - 1) / 2) for g in points]
        looks = {"capsize": 2, "lw": 1.6, "ms": 6, **marker_looks(points[0], leading)}
        means, stds = [cell.mean for cell in cells], [cell.std or 0 for cell in cells]
        is_leading = points[0].method in leading
        ax.errorbar(x, means, stds, label=name, zorder=3 if is_leading else 2, **looks)
        for share, cell in zip(x, cells, strict=True):
            dots = [share * step**0.45] * len(cell.values)
            ax.plot(dots, cell.values, ".", color=looks["color"], ms=3)
        ends.append((x[-1], means[-1], name, looks["color"]))
    ax.set_ylim(*limits)
    set_share_axis(ax, sorted({g.minority_percent for p in lines.values() for g in p}), has_names)
    if has_names:
        name_line_ends(ax, ends)


def set_share_axis(ax, shares, has_names):
    # Ticks that are closer would overprint.
    ticks = [b for a, b in zip([0, *shares], shares, strict=False) if b > 1.3 * a]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{share:.3g}" for share in ticks])
    ax.set_xticks([], minor=True)
    # The names of the lines take two fifths of the axis.
    right = max(1.5, (shares[-1] / shares[0]) ** 0.65) if has_names else 1.5
    ax.set_xlim(shares[0] / 1.5, shares[-1] * right)
    ax.set_xlabel("minority share of training images (%)")


def name_line_ends(ax, ends):
    """Write the names of lines beside their ends, moved apart where they would overprint."""
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # points
    gap = 12 * np.ptp(ax.get_ylim()) / height
    right = max(x for x, *_ in ends)
    heights = move_apart([y for _, y, *_ in ends], gap)
    for (x, y, name, colour), name_y in zip(ends, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
        looks = {"color": colour, "va": "center", "fontsize": 9, "arrowprops": arrow}
        ax.annotate(name, (x, y), (right * 1.35, name_y), **looks)


def move_apart(values, gap):
    """Return values moved so that neighbours differ by `gap` at least; their mean stays."""
    order = np.argsort(values)
    placed = np.array(values, dtype=float)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    moved = np.empty_like(placed)
    moved[order] = placed - placed.mean() + np.mean(values)
    return moved


def saa_cac_figure(groups):
    """Draw SAA and CAC of both classes over the ratios, a row per data set with several."""
    keys = ("saa_minority", "saa_majority", "cac_minority", "cac_majority")
    datasets = {
        name: found
        for name, found in split_by_dataset(encoder_groups(groups)).items()
        if all(line_groups(found, key) for key in keys)
    }
    if not datasets:
        return None
    panels = [(dataset, key) for dataset in datasets for key in keys]
    figure, axes = panel_grid([3.3] * len(panels), 4, 4)
    for ax, (dataset, key) in zip(axes, panels, strict=True):
        # The names stand once in each row.
        lines = line_groups(datasets[dataset], key)
        line_panel(ax, lines, key, (-2, 102), has_names=key == keys[-1])
        metric, side = key.split("_")
        ax.set(title=f"{dataset}: {metric.upper()}, {side}", ylabel=f"{metric.upper()} (%)")
    return figure


# dots ---------------------------------------------------------------------------------------------


def cac_accuracy_figure(groups):
    """Draw CAC against balanced probe accuracy: a dot per run, with the least-squares line."""
    points = cac_points(groups)
    if not points:
        return None
    panels = split_by_dataset([group for group, *_ in points])
    leading = leading_methods(group for group, *_ in points)
    figure, axes = panel_grid([4.4] * len(panels), min(3, len(panels)), 4.8)
    for ax, dataset in zip(axes, panels, strict=True):
        members = [point for point in points if point[0].dataset == dataset]
        for group, x, y in members:
            looks = marker_looks(group, leading) | {"ls": "", "ms": 6}
            is_named = group.is_plain and group.method in [*leading, *FLOORS]
            name = full_name(group) if is_named else "others"
            ax.plot([x], [y], label=name, zorder=2 if name == "others" else 3, **looks)
        x, y = np.array([point[1:] for point in members]).T
        ax.set_title(f"{dataset}, n = {len(members)} runs: {draw_line(ax, x, y)}")
        ax.set(xlabel="CAC, mean of the classes (%)", ylabel="balanced probe accuracy (%)")
        chance = chance_percent(panels[dataset])
        ax.set(xlim=percent_limits(chance, x), ylim=percent_limits(chance, y))
        for line in (ax.axhline, ax.axvline):
            line(chance, color=INK, lw=0.8, ls=":")
    handles = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    columns = min(2 * len(panels), 6)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def cac_points(groups):
    """Return (Group, mean CAC, balanced accuracy) of every probed run."""
    points = []
    for group in groups:
        for row in group.rows if group.scored_by.startswith("linear probe") else ():
            values = row_values(row, group.scored_by)
            names = ("cac_minority", "cac_majority", "balanced_accuracy")
            measured = [values[name] for name in names]
            if all(isinstance(v, (int, float)) and np.isfinite(v) for v in measured):
                # The majority is the mean of all classes but the rarest.
                cac = np.average(measured[:2], weights=[1, len(row["classes"]) - 1])
                points.append((group, cac, measured[2]))
    return points


def draw_line(ax, x, y):
    """Draw the least-squares line through enough runs. Returns its R², or why there is none."""
    if len(x) < MIN_RUNS_FOR_LINE:
        return f"no line, fewer than {MIN_RUNS_FOR_LINE}"
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return "no line, all values equal"
    slope, intercept, r2 = fit_line(x, y)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends + intercept, color=INK, lw=1.2)
    return f"R² = {r2:.2f}"


def fit_line(x, y):
    """Fit y on x by least squares. Returns slope, intercept and R²."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.sum((y - slope * x - intercept) ** 2)
    return slope, intercept, 1 - residual / np.sum((y - y.mean()) ** 2)


# rows: a method each ------------------------------------------------------------------------------


def row_height(groups):
    """Return the height in inches of a panel with a row per Group."""
    return max(2.4, 1.1 + 0.27 * len(groups))


def score_rows(ax, groups):
    """Draw the balanced accuracy of each Group in a row of its own, in its method's colour."""
    leading = leading_methods(groups)
    for y, group in enumerate(groups):
        draw_row(ax, y, group, "balanced_accuracy", marker_looks(group, leading) | {"ls": ""})
    name_rows(ax, groups)
    ax.axvline(chance_percent(groups), color=INK, lw=0.8, ls=":")
    found = [group for group in groups if finite_cell(group, "balanced_accuracy")]
    ax.set_xlim(score_limits(found))
    ax.set_xlabel("balanced test accuracy at 0.5 (%), dotted: chance")


def class_rows(ax, groups, metric):
    """Draw SAA or CAC of both classes, a row per Group; the minority has triangles."""
    for y, group in enumerate(groups):
        looks = {"color": MAJORITY, "marker": "o", "ls": ""}
        draw_row(ax, y + 0.13, group, f"{metric}_majority", looks)
        looks = {"color": MINORITY, "marker": "^", "ls": ""}
        draw_row(ax, y - 0.13, group, f"{metric}_minority", looks)
    name_rows(ax, groups)
    ax.set(xlim=(-2, 102), xlabel=f"{metric.upper()} (%)")


def draw_row(ax, y, group, key, looks):
    """Draw mean, deviation and seeds at height y, or the words that stand in their place."""
    cell = finite_cell(group, key)
    if cell is None:
        text = cell_text(group.cells[key], group.n, 1)
        ax.text(0.02, y, text, transform=ax.get_yaxis_transform(), va="center", color=REST)
        return
    ax.errorbar(cell.mean, y, xerr=cell.std or 0, ms=6, capsize=2, lw=1.4, zorder=3, **looks)
    if len(cell.values) > 1:
        ax.plot(cell.values, [y + 0.18] * len(cell.values), ".", color=looks["color"], ms=3)


def name_rows(ax, groups):
    names = [f"{textwrap.shorten(full_name(g), 60)}, n {g.n}" for g in groups]
    ax.set_yticks(range(len(groups)), names)
    ax.set_ylim(len(groups) - 0.4, -0.6)


# overview -----------------------------------------------------------------------------------------


def widest_ratio(groups):
    """Return the Groups of the ratio with the most methods; of several, the most imbalanced."""
    ratios = {}
    for group in groups:
        ratios.setdefault(group.ratio, []).append(group)
    return min(
        ratios.values(),
        key=lambda found: (-len({g.method for g in found}), found[0].minority_percent or 101),
    )


def overview_figure(groups, source):
    """Draw embeddings above, and rows of SAA, CAC and balanced accuracy below."""
    groups = widest_ratio(encoder_groups(groups))
    embeddings = {full_name(g): (g, load_embedding(g, source)) for g in groups}
    embeddings = {name: found for name, found in embeddings.items() if found[1]}
    has_scores = any(finite_cell(group, "balanced_accuracy") for group in groups)
    has_metrics = any(finite_cell(group, "cac_minority") for group in groups)
    if not (embeddings or has_scores or has_metrics):
        return None
    lines = -(-len(embeddings) // COLUMNS)
    heights = [2.9 * lines] if embeddings else []
    heights.append(row_height(groups))
    figure = Figure(figsize=(13, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(overview_title(groups), fontsize=13)
    boxes = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if embeddings:
        draw_overview_embeddings(boxes[0], embeddings, lines)
    panels = boxes[-1].subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.3))
    class_rows(panels[0], groups, "saa")
    class_rows(panels[1], groups, "cac")
    score_rows(panels[2], groups)
    return figure


def overview_title(groups):
    group, share = groups[0], groups[0].minority_percent
    known = "" if share is None else f": {share:.3g} % of the training images are minority"
    return f"{group.dataset} {group.ratio}{known}{test_images_text(groups)}"


def draw_overview_embeddings(box, embeddings, lines):
    """Draw the embedding of each method on one scale, with the distance from the collapse."""
    axes = list(box.subplots(lines, -(-len(embeddings) // lines), squeeze=False).flat)
    for ax in axes[len(embeddings) :]:
        ax.remove()
    common = common_limit(found for _, found in embeddings.values())
    for ax, (name, (group, found)) in zip(axes, embeddings.items(), strict=False):
        embedding_panel(ax, found, common)
        ax.set_title(textwrap.fill(name, 24), fontsize=10)
        if gap := finite_cell(group, "below_collapse"):
            side = "below" if gap.mean >= 0 else "above"
            text = f"{ax.get_xlabel()}\nfinal loss {abs(gap.mean):.3f} {side} collapse"
            ax.set_xlabel(text.strip(), fontsize=8)
    add_class_legend(box)
