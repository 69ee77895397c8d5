"""Draw the figures."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from reporting import claims
from reporting.collect import sort_key
from reporting.tables import cell_text, encoder_groups, finite_cell, overview_groups, row_values
from utils.cli import UserError
from utils.files import atomic_write

# ------------------------------------------------------------------------------------------------------------------
# figures: readable in grey, so every method has its own marker and line
# ------------------------------------------------------------------------------------------------------------------

COLOURS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
)  # Okabe, Ito: for colour-blind eyes too
MARKERS = ("o", "X", "^", "s", "D", "v", "P", "*", "<", ">", "p", "h", "8", "d")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (7, 3)))  # 7 beside 8 colours


def draw_figures(groups, runs, out, judged):
    """Draw and save what there is data for. Returns the names that are there and a line for each figure left out.

    From a runs.jsonl, which holds no maps, the figures with maps are left as they are.
    """
    names = list(dict.fromkeys(g["name"] for g in groups))
    style = {
        name: dict(
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            ls=LINES[i % len(LINES)],
        )
        for i, name in enumerate(names)
    }
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    plans = {
        f"overview_{dataset}.png": lambda dataset=dataset: overview_figure(groups, runs, dataset)
        for dataset in datasets
    }
    plans |= {
        "accuracy.png": lambda: accuracy_figure(groups, style),
        "saa_cac.png": lambda: saa_cac_figure(groups, style),
        "cac_accuracy.png": lambda: cac_accuracy_figure(groups, style),
    }
    plans |= (
        claims.figures([row for g in encoder_groups(groups) for row in g["rows"]]) if judged else {}
    )
    plans |= {
        f"embeddings_{dataset}.png": lambda dataset=dataset: embeddings_figure(
            groups, runs, dataset
        )
        for dataset in datasets
    }
    there, missing = [], []
    for name, draw in tqdm(plans.items(), desc="figures", leave=False):
        if runs.is_file() and name.startswith(("overview", "embeddings")):
            there += [name] if (out / name).is_file() else []
            continue
        figure = draw()
        if figure is None:
            missing.append(f"{name}: not drawn, nothing measured for it yet")
            continue
        with atomic_write(out / name) as part:
            figure.savefig(part, dpi=130)
        there.append(name)
    return there, missing


def panels(rows, columns, width, height):
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def line_panel(axes, groups, key, style):
    """Mean over seeds with its standard deviation, and every seed as a dot, against the minority share; a line per method."""
    known = [g for g in groups if g["minority_percent"] is not None and finite_cell(g, key)]
    names = list(dict.fromkeys(g["name"] for g in known))
    step = min(
        1.1, 1.5 ** (1 / max(len(names), 1))
    )  # side by side, so that error bars do not cover each other
    for i, name in enumerate(names):
        points = sorted(
            (g for g in known if g["name"] == name), key=lambda g: g["minority_percent"]
        )
        x = np.array([g["minority_percent"] for g in points]) * step ** (i - (len(names) - 1) / 2)
        mean = [finite_cell(g, key)[0] for g in points]
        std = [finite_cell(g, key)[1] or 0 for g in points]
        axes.errorbar(
            x, mean, std, label=name, capsize=3, lw=1.4, ms=6, mfc="white", mew=1.4, **style[name]
        )
        for place_x, g in zip(x, points):
            values = finite_cell(g, key)[2]
            axes.plot(
                [place_x * step**0.45] * len(values), values, ".", color=style[name]["color"], ms=4
            )
    shares = sorted({g["minority_percent"] for g in known})
    ticks = [
        share for share, before in zip(shares, [0, *shares]) if share > 1.3 * before
    ]  # closer ones would overprint
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{share:.3g}" for share in ticks])
    axes.set_xticks([], minor=True)
    if shares:
        axes.set_xlim(shares[0] / 1.5, shares[-1] * 1.5)
    axes.grid(alpha=0.3)
    return bool(known)


def line_plot_groups(groups):
    """The groups that line figures show: not what was changed at one ratio of several, which would be dots beside the method's line."""
    ratios = {}
    for g in groups:
        ratios.setdefault(g["dataset"], {}).setdefault(g["name"], set()).add(g["ratio"])
    return [
        g
        for g in groups
        if g["label"] == g["method"]
        or len(ratios[g["dataset"]][g["name"]]) > 1
        or len(set.union(*ratios[g["dataset"]].values())) == 1
    ]


def legend_below(figure, axes):
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    longest = max(map(len, handles))
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 11 // (longest + 8))))
    figure.set_figheight(
        figure.get_figheight() + 0.24 * max(0, -(-len(handles) // columns) - 3)
    )  # room for a grid of methods
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        numpoints=1,
    )


def accuracy_figure(groups, style):
    """Balanced accuracy against imbalance, a panel per data set. None without a value."""
    groups = [
        g
        for g in groups
        if g["minority_percent"] is not None and finite_cell(g, "balanced_accuracy")
    ]
    groups = line_plot_groups([g for g in groups if not g["scored_by"].startswith("fine-tuned")])
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    if not datasets:
        return None
    columns = min(3, len(datasets))
    figure, axes = panels(-(-len(datasets) // columns), columns, 5.4 if columns < 3 else 4.6, 4.2)
    for ax, dataset in zip(axes.flat, datasets):
        line_panel(ax, [g for g in groups if g["dataset"] == dataset], "balanced_accuracy", style)
        ax.set(
            title=dataset,
            xlabel="minority share of training images (%, log)",
            ylabel="balanced test accuracy (%)",
        )
    for ax in list(axes.flat)[len(datasets) :]:
        ax.remove()
    legend_below(figure, figure.axes)
    return figure


def saa_cac_figure(groups, style):
    """SAA and CAC of both classes against imbalance, a row per data set. None without a value."""
    groups = line_plot_groups(
        [
            g
            for g in encoder_groups(groups)
            if g["minority_percent"] is not None and finite_cell(g, "saa_minority")
        ]
    )
    datasets = list(dict.fromkeys(g["dataset"] for g in groups))
    if not datasets:
        return None
    figure, axes = panels(len(datasets), 4, 3.5, 3.3)
    for row, dataset in zip(axes, datasets):
        for ax, key in zip(row, ("saa_minority", "saa_majority", "cac_minority", "cac_majority")):
            if key.endswith("majority"):
                ax.sharey(row[list(row).index(ax) - 1])  # the classes of a metric on one scale
            line_panel(ax, [g for g in groups if g["dataset"] == dataset], key, style)
            metric, side = key.split("_")
            metric = metric.upper()
            ax.set(
                title=f"{dataset}: {metric}, {side}",
                xlabel="minority share of training images (%, log)",
                ylabel=f"{metric} (%)",
            )
    legend_below(figure, figure.axes)
    return figure


def cac_accuracy_figure(groups, style):
    """CAC against balanced probe accuracy, a dot per run, with the least-squares line; all runs and each data set. None without a run."""
    points = []  # (data set, name, CAC, balanced accuracy)
    for g in groups:
        if g["scored_by"].startswith("linear probe"):
            for row in g["rows"]:
                values = row_values(row, g["scored_by"])
                x = [values["cac_minority"], values["cac_majority"], values["balanced_accuracy"]]
                if None not in x and np.isfinite(x).all():
                    points.append((g["dataset"], g["name"], (x[0] + x[1]) / 2, x[2]))
    datasets = list(dict.fromkeys(point[0] for point in points))
    if not datasets:
        return None
    shown = [("all runs", points)] if len(datasets) > 1 else []
    shown += [(dataset, [point for point in points if point[0] == dataset]) for dataset in datasets]
    columns = min(3, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, 5.4 if columns < 3 else 4.6, 4.4)
    for ax, (title, part) in zip(axes.flat, shown):
        for name in dict.fromkeys(point[1] for point in part):
            own = [point for point in part if point[1] == name]
            ax.plot(
                [p[2] for p in own],
                [p[3] for p in own],
                label=name,
                mfc="none",
                mew=1.4,
                ms=7,
                **{**style[name], "ls": ""},
            )
        x, y = np.array([p[2] for p in part]), np.array([p[3] for p in part])
        if len(part) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            ax.set_title(
                f"{title}, n = {len(part)}: "
                + ("no line, fewer than 3 runs" if len(part) < 3 else "no line, all values equal")
            )
        else:
            slope, intercept, r2 = line_fit(x, y)
            ends = np.array([x.min(), x.max()])
            ax.plot(ends, slope * ends + intercept, color="0.4", lw=1.2)
            ax.set_title(f"{title}, n = {len(part)}: R² = {r2:.2f}")
        ax.set(xlabel="CAC, mean of both classes (%)", ylabel="balanced probe accuracy (%)")
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(shown) :]:
        ax.remove()
    legend_below(figure, figure.axes)
    return figure


def line_fit(x, y):
    """Least-squares line through (x, y): slope, intercept, R² (the share of y's variance that the line explains)."""
    slope, intercept = np.polyfit(x, y, 1)
    return (
        slope,
        intercept,
        1 - np.sum((y - slope * x - intercept) ** 2) / np.sum((y - y.mean()) ** 2),
    )


def load_embedding(g, runs):
    """(row, xy, is_minority, limit of the axes) of the lowest seed that has embedding.npz, or None. UserError when the file is damaged."""
    for row in sorted(g["rows"], key=lambda row: row["seed"]):
        path = Path(runs) / row["path"] / "embedding.npz"
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    xy, labels, minority, limit = (
                        file["xy"],
                        file["labels"],
                        int(file["minority"]),
                        float(file["limit"]),
                    )
                if xy.shape != (len(labels), 2):
                    raise ValueError("xy and labels do not match")
            except Exception as error:  # numpy and zipfile report damage in many ways; all of them mean the same here
                raise UserError(
                    f"{path}: not an embedding ({type(error).__name__}); delete it and run evaluate_metrics.py again"
                ) from None
            return row, xy, labels == minority, limit
    return None


def map_panel(ax, found):
    """A 2-D embedding: pale dots for the majority, dark triangles on top for the minority."""
    ax.set(xticks=[], yticks=[])
    if found is None:
        ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color="0.5")
        ax.spines[:].set_visible(False)
        return
    _, xy, rare, limit = found
    if np.isfinite(limit):
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    size = np.clip(4000 / len(xy), 2, 14)
    ax.scatter(*xy[~rare].T, s=size, c="#9ecae1", marker="o", lw=0, label="majority")
    ax.scatter(*xy[rare].T, s=1.3 * size, c="#a50f15", marker="^", lw=0, label="minority")


def embeddings_figure(groups, runs, dataset):
    """Maps side by side: a row per ratio, a column per method. None without a map."""
    found = {
        (g["ratio"], g["label"]): load_embedding(g, runs)
        for g in line_plot_groups(encoder_groups(groups))
        if g["dataset"] == dataset
    }
    found = {key: value for key, value in found.items() if value}
    if not found:
        return None
    part = [g for g in groups if g["dataset"] == dataset]
    ratios = [
        r for r in dict.fromkeys(g["ratio"] for g in part) if any(key[0] == r for key in found)
    ]
    part.sort(
        key=lambda g: sort_key(g["rows"][0])[4:]
    )  # methods in their order, whichever ratio has them first
    labels = [
        name
        for name in dict.fromkeys(g["label"] for g in part)
        if any(key[1] == name for key in found)
    ]
    figure, axes = panels(len(ratios), len(labels), 2.5, 2.5)
    for i, ratio in enumerate(ratios):
        for j, label in enumerate(labels):
            ax = axes[i, j]
            map_panel(ax, found.get((ratio, label)))
            if i == 0:
                ax.set_title(textwrap.fill(label, 24), fontsize=10)
            if j == 0:
                ax.set_ylabel(ratio, fontsize=10)
            if (ratio, label) in found:
                ax.set_xlabel(f"seed {found[ratio, label][0]['seed']}", fontsize=8)
    figure.suptitle(f"{dataset}: test images in the embedding, two dimensions", fontsize=11)
    legend_maps(figure, figure.axes)
    return figure


def legend_maps(figure, axes):
    handles = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        markerscale=2.5,
    )


def overview_figure(groups, runs, dataset):
    """The story at a glance, for the most imbalanced ratio: maps above, bars of SAA, CAC and balanced accuracy below. None without a value."""
    part = overview_groups(groups, dataset)
    maps = [load_embedding(g, runs) for g in part]
    bars = {
        ("saa_minority", "saa_majority"): "SAA (%)",
        ("cac_minority", "cac_majority"): "CAC (%)",
        ("balanced_accuracy",): "balanced test accuracy (%)",
    }
    bars = {
        keys: title for keys, title in bars.items() if any(finite_cell(g, keys[0]) for g in part)
    }
    if not any(maps) and not bars:
        return None
    any_map = any(found is not None for found in maps)
    columns, many = (
        min(6, len(part)),
        len(part) > 6,
    )  # maps side by side; the bars of many methods one diagram below the other
    width, map_rows, bar_rows = (
        max(10, 2.5 * columns),
        -(-len(part) // columns),
        len(bars) if many else 1,
    )
    heights = [2.9 * map_rows] * any_map + [3.3 * bar_rows] * bool(bars)
    figure = Figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
    share = part[0]["minority_percent"]
    what = "" if share is None else f": {share:.3g} % of the training images are minority"
    figure.suptitle(f"{dataset} {part[0]['ratio']}{what}", fontsize=13)
    boxes = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if any_map:
        box = boxes.pop(0)
        axes = list(box.subplots(map_rows, columns, squeeze=False).flat)
        for ax in axes[len(part) :]:
            ax.remove()
        for ax, g, found in zip(axes, part, maps):
            map_panel(ax, found)
            ax.set_title(textwrap.fill(g["name"], 24), fontsize=10)
            below = finite_cell(g, "below_collapse")
            side = "below" if below and below[0] >= 0 else "above"
            under = [
                f"seed {found[0]['seed']}" if found else "",
                f"final loss {abs(below[0]):.3f} {side} collapse" if below else "",
            ]
            ax.set_xlabel("\n".join(under), fontsize=8)
        legend_maps(box, box.axes)
    if bars:
        for ax, (keys, title) in zip(
            boxes[0].subplots(bar_rows, len(bars) // bar_rows, squeeze=False).flat, bars.items()
        ):
            bar_panel(ax, part, keys, title)
    return figure


def bar_panel(ax, part, keys, title):
    """Bars of the mean, a group per method and a bar per key, with every seed as a dot."""
    looks = (
        [dict(color="#a50f15"), dict(color="#9ecae1", hatch="//")]
        if len(keys) > 1
        else [dict(color="#bdbdbd")]
    )
    w = 0.8 / len(keys)
    for j, (key, look) in enumerate(zip(keys, looks)):
        for i, g in enumerate(part):
            x = i + (j - (len(keys) - 1) / 2) * w
            if value := finite_cell(g, key):
                mean, _, values = value
                ax.bar(
                    x,
                    mean,
                    w,
                    edgecolor="black",
                    lw=0.7,
                    label=key.split("_")[1] if len(keys) > 1 else None,
                    **look,
                )
                ax.plot(
                    x + w / 4 * np.linspace(-1, 1, len(values) + 2)[1:-1],
                    values,
                    "o",
                    ms=4,
                    mfc="white",
                    mec="black",
                    mew=0.8,
                )
                ax.annotate(
                    f"{mean:.1f}",
                    (x, max(values)),
                    (0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            else:
                ax.text(
                    x,
                    0.02,
                    cell_text(g["cells"][key], g["n"], 1),
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color="0.4",
                    transform=ax.get_xaxis_transform(),
                )
    ax.set_xticks(range(len(part)), [textwrap.fill(g["name"], 14) for g in part], fontsize=8)
    ax.set(ylabel=title, xlim=(-0.6, len(part) - 0.4))
    ax.margins(y=0.12)
    if len(keys) > 1:
        handles = dict(zip(*ax.get_legend_handles_labels()[::-1]))
        ax.legend(
            handles.values(),
            handles.keys(),
            frameon=False,
            fontsize=8,
            ncols=2,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderpad=0,
        )
