"""The figure of docs/gradients.md, from the numbers in gradients.json."""

import math

from matplotlib.figure import Figure

from reporting.styles import METHOD_STYLES
from utils.files import atomic_write

GREY = "0.35"


def draw_gradients(record, path):
    """Write three panels: the way into the collapse, the batch, and who is moved."""
    panels = {
        "SupCon draws majority rows into one point,\n"
        "and nothing drives them out again": draw_way_into_collapse,
        "Near one point, larger batches\nweaken SupCon's majority gradient": draw_batch_sizes,
        "The rarer the minority, the more\nSupCon leaves majority rows alone": draw_minority_counts,
    }
    figure = Figure(figsize=(13, 4.7), layout="constrained")
    for axes, (title, draw) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        draw(axes, record)
        axes.set_title(title, loc="left", fontsize=11)
        axes.margins(y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def add_line(axes, method, x, y, label, at=-1, offset=(6, 0), line=None, **options):
    """Draw the line of a method with its name beside the point number `at`."""
    style = METHOD_STYLES[method]
    look = dict(color=style.colour, marker=style.marker, ls=line or style.line, ms=5, lw=1.8)
    axes.plot(x, y, **look)
    options = (
        dict(textcoords="offset points", va="center", fontsize=9, color=style.colour) | options
    )
    axes.annotate(label, (x[at], y[at]), offset, **options)


def series(results, *keys):
    """Return the settings of a sweep as numbers, and a value measured at each."""
    values = []
    for result in results.values():
        for key in keys:
            result = result[key]
        values.append(result)
    return [float(name) for name in results], values


def draw_way_into_collapse(axes, record):
    sweep = record["any"]["spread"]
    # uniform on the sphere stands right of the largest number
    spreads = [10.0 if math.isinf(x) else x for x in map(float, sweep)]
    axes.axhline(0, color=GREY, lw=0.8)
    labels = {
        "suppro": ("Supervised Prototypes", 4, (-10, 10), "right"),
        "supmin": ("NT-Xent and\nSupervised Minority", 3, (12, -18), "left"),
        "supcon": ("SupCon", 5, (-12, 0), "right"),
    }
    for method, (label, at, offset, side) in labels.items():
        _, outwards = series(sweep, method, "outwards_of_majority")
        add_line(axes, method, spreads, outwards, label, at, offset, ha=side)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "sphere"])
    axes.set(
        xlabel="distance of the rows from one point (0: collapse)",
        ylabel="part of the step that leads outwards (+), inwards (-)",
    )


def draw_batch_sizes(axes, record):
    sweep = record["collapsed"]["images"]
    images, bound = series(sweep, "supcon_bound")
    axes.plot(images, bound, color=GREY, lw=1.2)
    axes.annotate("bound", (images[0], bound[0]), (8, 4), textcoords="offset points", color=GREY)
    labels = {"suppro": (0, -12), "supmin": (0, 13), "supcon": (0, -14)}
    for method, offset in labels.items():
        name = (
            "NT-Xent and Supervised Minority" if method == "supmin" else METHOD_STYLES[method].name
        )
        line = "none" if method == "supcon" else None
        options = dict(at=0, offset=offset, line=line)
        add_line(axes, method, *series(sweep, method, "majority"), name, **options)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"images in the batch, {record['settings']['minority']} of the minority",
        ylabel="length of the gradient, near the collapse",
    )
    axes.set_xticks(images, [f"{n:.0f}" for n in images])
    axes.minorticks_off()


def draw_minority_counts(axes, record):
    sweep, n = record["collapsed"]["minority"], record["settings"]["images"]
    lines = {
        ("supmin", "majority", "-"): ("Supervised Minority, majority row", 2, (0, -12)),
        ("supmin", "minority", "--"): ("both, minority row", 5, (6, 12)),
        ("supcon", "minority", "--"): ("", 0, (0, 0)),
        ("supcon", "majority", "-"): ("SupCon, majority row", 2, (6, -14)),
    }
    for (method, rows, line), (label, at, offset) in lines.items():
        add_line(axes, method, *series(sweep, method, rows), label, at, offset, line)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"minority images in a batch of {n}",
        ylabel="length of the gradient, near the collapse",
    )
    counts = [float(name) for name in sweep]
    axes.set_xticks(counts[::2], [f"{count:.0f}" for count in counts[::2]])
    axes.minorticks_off()
