"""Draw the figures. They are readable in grey: every method has its own marker and line."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from reporting.collect import FLOORS, METHODS, sort_key
from reporting.tables import cell_text, encoder_groups, finite_cell, first_probes, row_values
from utils.cli import UserError
from utils.files import atomic_write

# Okabe and Ito's colours are told apart by colour-blind readers, too.
COLOURS = (
    *("#000000", "#D55E00", "#0072B2", "#009E73"),
    *("#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"),
)
MARKERS = ("o", "X", "^", "s", "D", "v", "P", "*", "<", ">", "p", "h", "8", "d")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (7, 3)))
# A regression line through fewer runs would be noise.
MIN_RUNS_FOR_LINE = 10


def plan_figures(groups, source):
    """Return {file name: function that draws it, or returns None where nothing was measured}.

    Figures with embeddings need the folder of the runs; without it they are not planned.
    """
    groups, style = first_probes(groups), line_styles(groups)
    plans = {
        "accuracy.png": lambda: accuracy_figure(groups, style),
        "saa_cac.png": lambda: saa_cac_figure(groups, style),
        "cac_accuracy.png": lambda: cac_accuracy_figure(groups, style),
    }
    if not source.is_dir():
        return plans
    overviews, embeddings = {}, {}
    for dataset in dict.fromkeys(group.dataset for group in groups):
        members = [group for group in groups if group.dataset == dataset]
        overviews[f"overview_{dataset}.png"] = lambda m=members: overview_figure(m, source)
        embeddings[f"embeddings_{dataset}.png"] = lambda m=members: embeddings_figure(m, source)
    return overviews | plans | embeddings


def save_figures(plans, out):
    """Draw and save the figures. Returns their names, and a note for each that was not drawn."""
    names, notes = [], []
    for name, draw in plans.items():
        figure = draw()
        if figure is None:
            notes.append(f"{name}: not drawn, nothing was measured for it")
            continue
        with atomic_write(out / name) as tmp:
            figure.savefig(tmp, dpi=100)
        names.append(name)
    return names, notes


def line_styles(groups):
    """Return {name: colour, marker and line}; a plain method looks the same in every report.

    What was not trained is grey.
    """
    names = dict.fromkeys([*METHODS, *(group.name for group in groups)])
    floors = {
        group.name: {"color": "0.5", "marker": "+x"[FLOORS.index(group.method)], "ls": ":"}
        for group in groups
        if group.method in FLOORS
    }
    styles = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": LINES[i % len(LINES)],
        }
        for i, name in enumerate(names)
    }
    return styles | floors


def panel_grid(count, columns, width, height):
    """Return a figure and its `count` panels; width and height of one panel in inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def add_legend(figure):
    """Put one legend for all panels below the figure, and make room for it."""
    handles = legend_handles(figure)
    columns = int(figure.get_figwidth() * 11 // (max(map(len, handles)) + 8))
    columns = max(1, min(len(handles), columns))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * max(0, rows - 3))
    looks = {"ncols": columns, "frameon": False, "handlelength": 3.2, "numpoints": 1}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **looks)


def legend_handles(figure):
    """Return {label: handle} of all panels."""
    panels = [ax.get_legend_handles_labels() for ax in figure.axes]
    return {name: handle for panel in panels for handle, name in zip(*panel, strict=True)}


# lines --------------------------------------------------------------------------------------------


def line_plot_groups(groups):
    """Return the Groups that line figures show.

    A variant that was run at one of several ratios would be a lone dot: the tables have it.
    """
    ratios = {}
    for group in groups:
        for key in (group.dataset, (group.dataset, group.name)):
            ratios.setdefault(key, set()).add(group.ratio)
    return [
        group
        for group in groups
        if group.is_plain
        or len(ratios[group.dataset, group.name]) > 1
        or len(ratios[group.dataset]) == 1
    ]


def known_groups(groups, key):
    """Return the Groups with a known minority share and a value of `key`."""
    return [g for g in groups if g.minority_percent is not None and finite_cell(g, key)]


def line_panel(ax, groups, key, style):
    """Draw mean and deviation over seeds, and each seed as a dot; one line per method."""
    names = list(dict.fromkeys(group.name for group in groups))
    # Methods stand side by side, so that error bars do not cover each other.
    step = min(1.1, 1.5 ** (1 / max(len(names), 1)))
    for i, name in enumerate(names):
        points = [group for group in groups if group.name == name]
        points.sort(key=lambda group: group.minority_percent)
        cells = [finite_cell(group, key) for group in points]
        shift = step ** (i - (len(names) - 1) / 2)
        x = np.array([group.minority_percent for group in points]) * shift
        looks = {"capsize": 3, "lw": 1.4, "ms": 6, "mfc": "white", "mew": 1.4, **style[name]}
        means, stds = [cell.mean for cell in cells], [cell.std or 0 for cell in cells]
        ax.errorbar(x, means, stds, label=name, **looks)
        for share, cell in zip(x, cells, strict=True):
            shares = [share * step**0.45] * len(cell.values)
            ax.plot(shares, cell.values, ".", color=style[name]["color"], ms=4)
    set_share_axis(ax, sorted({group.minority_percent for group in groups}))


def set_share_axis(ax, shares):
    # Ticks that are closer would overprint.
    ticks = [b for a, b in zip([0, *shares], shares, strict=False) if b > 1.3 * a]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{share:.3g}" for share in ticks])
    ax.set_xticks([], minor=True)
    if shares:
        ax.set_xlim(shares[0] / 1.5, shares[-1] * 1.5)
    ax.set_xlabel("minority share of training images (%, log)")
    ax.grid(alpha=0.3)


def accuracy_figure(groups, style):
    """Draw balanced accuracy against imbalance, a panel per data set."""
    groups = [group for group in groups if not group.scored_by.startswith("fine-tuned")]
    groups = line_plot_groups(known_groups(groups, "balanced_accuracy"))
    datasets = list(dict.fromkeys(group.dataset for group in groups))
    if not datasets:
        return None
    columns = min(3, len(datasets))
    figure, axes = panel_grid(len(datasets), columns, 5.4 if columns < 3 else 4.6, 4.2)
    for ax, dataset in zip(axes, datasets, strict=True):
        members = [group for group in groups if group.dataset == dataset]
        line_panel(ax, members, "balanced_accuracy", style)
        ax.set(title=dataset, ylabel="balanced test accuracy (%)")
    add_legend(figure)
    return figure


def saa_cac_figure(groups, style):
    """Draw SAA and CAC of both classes against imbalance, a row per data set."""
    groups = line_plot_groups(known_groups(encoder_groups(groups), "saa_minority"))
    datasets = list(dict.fromkeys(group.dataset for group in groups))
    if not datasets:
        return None
    keys = ("saa_minority", "saa_majority", "cac_minority", "cac_majority")
    figure, axes = panel_grid(4 * len(datasets), 4, 3.5, 3.3)
    panels = [(dataset, key) for dataset in datasets for key in keys]
    for i, (ax, (dataset, key)) in enumerate(zip(axes, panels, strict=True)):
        if key.endswith("majority"):
            # Both classes of a metric share one scale.
            ax.sharey(axes[i - 1])
        members = [group for group in groups if group.dataset == dataset]
        line_panel(ax, known_groups(members, key), key, style)
        metric, side = key.split("_")
        ax.set(title=f"{dataset}: {metric.upper()}, {side}", ylabel=f"{metric.upper()} (%)")
    add_legend(figure)
    return figure


# dots ---------------------------------------------------------------------------------------------


def cac_accuracy_figure(groups, style):
    """Draw CAC against balanced probe accuracy: a dot per run, with the least-squares line."""
    points = cac_points(groups)
    datasets = list(dict.fromkeys(point[0] for point in points))
    if not datasets:
        return None
    panels = {name: [point for point in points if point[0] == name] for name in datasets}
    if len(datasets) > 1:
        panels = {"all runs": points} | panels
    columns = min(3, len(panels))
    figure, axes = panel_grid(len(panels), columns, 5.4 if columns < 3 else 4.6, 4.4)
    for ax, (title, members) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(point[1] for point in members):
            x, y = np.array([point[2:] for point in members if point[1] == name]).T
            looks = {"mfc": "none", "mew": 1.4, "ms": 7, **style[name], "ls": ""}
            ax.plot(x, y, label=name, **looks)
        x, y = np.array([point[2:] for point in members]).T
        ax.set_title(f"{title}, n = {len(members)}: {draw_line(ax, x, y)}")
        ax.set(xlabel="CAC, mean of both classes (%)", ylabel="balanced probe accuracy (%)")
        ax.grid(alpha=0.3)
    add_legend(figure)
    return figure


def cac_points(groups):
    """Return (data set, name, mean CAC, balanced accuracy) of every probed run."""
    points = []
    for group in groups:
        for row in group.rows if group.scored_by.startswith("linear probe") else ():
            values = row_values(row, group.scored_by)
            names = ("cac_minority", "cac_majority", "balanced_accuracy")
            measured = [values[name] for name in names]
            if all(isinstance(v, (int, float)) and np.isfinite(v) for v in measured):
                points.append((group.dataset, group.name, np.mean(measured[:2]), measured[2]))
    return points


def draw_line(ax, x, y):
    """Draw the least-squares line through enough runs. Returns its R², or why there is none."""
    if len(x) < MIN_RUNS_FOR_LINE:
        return f"no line, fewer than {MIN_RUNS_FOR_LINE} runs"
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return "no line, all values equal"
    slope, intercept, r2 = fit_line(x, y)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends + intercept, color="0.4", lw=1.2)
    return f"R² = {r2:.2f}"


def fit_line(x, y):
    """Fit y on x by least squares. Returns slope, intercept and R²."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.sum((y - slope * x - intercept) ** 2)
    return slope, intercept, 1 - residual / np.sum((y - y.mean()) ** 2)


# embeddings ---------------------------------------------------------------------------------------


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


def embedding_panel(ax, found):
    """Draw test images in two dimensions: the majority as pale dots, the minority on top."""
    ax.set(xticks=[], yticks=[])
    if found is None:
        ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color="0.5")
        ax.spines[:].set_visible(False)
        return
    row, xy, is_minority, limit = found
    if np.isfinite(limit):
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    size = np.clip(4000 / len(xy), 2, 14)
    ax.scatter(*xy[~is_minority].T, s=size, c="#9ecae1", marker="o", lw=0, label="majority")
    ax.scatter(*xy[is_minority].T, s=1.3 * size, c="#a50f15", marker="^", lw=0, label="minority")
    # t-SNE magnifies a collapse: the reader needs its name.
    texts = f"seed {row['seed']}", row.get("metrics_picture")
    ax.set_xlabel(", ".join(filter(None, texts)), fontsize=8)


def add_embedding_legend(figure):
    handles = legend_handles(figure)
    looks = {"ncols": 2, "frameon": False, "markerscale": 2.5}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **looks)


def embeddings_figure(groups, source):
    """Draw the embeddings of one data set side by side: a row per ratio, a column per method."""
    groups = line_plot_groups(encoder_groups(groups))
    found = {(g.ratio, g.label): load_embedding(g, source) for g in groups}
    found = {key: value for key, value in found.items() if value}
    if not found:
        return None
    ratios = list(dict.fromkeys(ratio for ratio, _ in found))
    # Methods stand in their order, whichever ratio has them first.
    groups.sort(key=lambda group: sort_key(group.rows[0])[4:])
    labels = list(dict.fromkeys(g.label for g in groups if (g.ratio, g.label) in found))
    figure, axes = panel_grid(len(ratios) * len(labels), len(labels), 2.5, 2.5)
    panels = [(ratio, label) for ratio in ratios for label in labels]
    for ax, (ratio, label) in zip(axes, panels, strict=True):
        embedding_panel(ax, found.get((ratio, label)))
        if ratio == ratios[0]:
            ax.set_title(textwrap.fill(label, 24), fontsize=10)
        if label == labels[0]:
            ax.set_ylabel(ratio, fontsize=10)
    figure.suptitle(
        f"{groups[0].dataset}: test images in the embedding, two dimensions", fontsize=11
    )
    add_embedding_legend(figure)
    return figure


# overview -----------------------------------------------------------------------------------------


def overview_groups(groups):
    """Return one Group per method of a data set, at the ratio with the most methods.

    Of several such ratios the most imbalanced is taken. Variants stand in only where the plain
    method was not run.
    """
    ratios = {}
    for group in encoder_groups(groups):
        if group.method != "raw pixels":
            ratios.setdefault(group.ratio, []).append(group)
    members = min(
        ratios.values(),
        key=lambda found: (-len({g.method for g in found}), found[0].minority_percent or 101),
        default=[],
    )
    plain = {group.method for group in members if group.is_plain}
    return [group for group in members if group.is_plain or group.method not in plain]


def overview_figure(groups, source):
    """Draw embeddings above, and bars of SAA, CAC and balanced accuracy below."""
    groups = overview_groups(groups)
    found = [load_embedding(group, source) for group in groups]
    bars = {
        ("saa_minority", "saa_majority"): "SAA (%)",
        ("cac_minority", "cac_majority"): "CAC (%)",
        ("balanced_accuracy",): "balanced test accuracy (%)",
    }
    measured = {keys for keys in bars if any(finite_cell(group, keys[0]) for group in groups)}
    bars = {keys: title for keys, title in bars.items() if keys in measured}
    has_embeddings = any(value is not None for value in found)
    if not has_embeddings and not bars:
        return None
    columns = min(6, len(groups))
    # The bars of many methods stand one diagram below the other.
    bar_rows = len(bars) if len(groups) > 6 else 1
    heights = [2.9 * -(-len(groups) // columns)] * has_embeddings + [3.3 * bar_rows] * bool(bars)
    figure = Figure(figsize=(max(10, 2.5 * columns), sum(heights) + 0.4), layout="constrained")
    figure.suptitle(overview_title(groups), fontsize=13)
    boxes = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if has_embeddings:
        draw_overview_embeddings(boxes[0], groups, found, columns)
    if bars:
        axes = boxes[-1].subplots(bar_rows, len(bars) // bar_rows, squeeze=False).flat
        for ax, (keys, title) in zip(axes, bars.items(), strict=True):
            bar_panel(ax, groups, keys, title)
    return figure


def overview_title(groups):
    group, share = groups[0], groups[0].minority_percent
    images = next(
        (row["test_images"] for g in groups for row in g.rows if row["test_images"]), None
    )
    return (
        f"{group.dataset} {group.ratio}"
        + ("" if share is None else f": {share:.3g} % of the training images are minority")
        + (f", {images} test images" if images else "")
    )


def draw_overview_embeddings(box, groups, found, columns):
    axes = list(box.subplots(-(-len(groups) // columns), columns, squeeze=False).flat)
    for ax in axes[len(groups) :]:
        ax.remove()
    for ax, group, embedding in zip(axes, groups, found, strict=False):
        embedding_panel(ax, embedding)
        ax.set_title(textwrap.fill(group.name, 24), fontsize=10)
        if gap := finite_cell(group, "below_collapse"):
            side = "below" if gap.mean >= 0 else "above"
            text = f"{ax.get_xlabel()}\nfinal loss {abs(gap.mean):.3f} {side} collapse"
            ax.set_xlabel(text.strip(), fontsize=8)
    add_embedding_legend(box)


def bar_panel(ax, groups, keys, title):
    """Draw bars of the mean, a cluster per method and a bar per key, and each seed as a dot."""
    looks = [{"color": "#a50f15"}, {"color": "#9ecae1", "hatch": "//"}]
    looks = looks if len(keys) > 1 else [{"color": "#bdbdbd"}]
    width = 0.8 / len(keys)
    for j, key in enumerate(keys):
        # An empty bar carries the label of the legend.
        ax.bar([0], [0], width, lw=0.7, edgecolor="black", label=key.split("_")[-1], **looks[j])
        for i, group in enumerate(groups):
            x = i + (j - (len(keys) - 1) / 2) * width
            draw_bar(ax, x, width, group, key, looks[j])
    if keys == ("balanced_accuracy",):
        ax.axhline(50, color="black", lw=0.8, ls=":")  # chance
    ax.set_xticks(range(len(groups)), [textwrap.fill(g.name, 14) for g in groups], fontsize=8)
    ax.set(ylabel=title, xlim=(-0.6, len(groups) - 0.4))
    ax.margins(y=0.12)
    if len(keys) > 1:
        looks = {"frameon": False, "fontsize": 8, "ncols": 2, "borderpad": 0}
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), **looks)


def draw_bar(ax, x, width, group, key, looks):
    """Draw one bar with its seeds, or the words that stand in its place."""
    cell = finite_cell(group, key)
    if cell is None:
        text = cell_text(group.cells[key], group.n, 1)
        place = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8, "color": "0.4"}
        ax.text(x, 0.02, text, transform=ax.get_xaxis_transform(), **place)
        return
    ax.bar(x, cell.mean, width, edgecolor="black", lw=0.7, **looks)
    shifts = width / 4 * np.linspace(-1, 1, len(cell.values) + 2)[1:-1]
    ax.plot(x + shifts, cell.values, "o", ms=4, mfc="white", mec="black", mew=0.8)
    place = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    ax.annotate(f"{cell.mean:.1f}", (x, max(cell.values)), (0, 5), **place)
