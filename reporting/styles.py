"""One look for each method, the same in every figure. Needs no torch.

Colours keep a contrast of 3 against white and against the dark theme of the HTML report. The first
four are told apart by colour-blind readers (Okabe and Ito, 2008); the others were chosen as far
apart as that contrast permits. Markers and lines tell all methods apart in grey.
"""

from typing import NamedTuple

from matplotlib.figure import Figure


class Style(NamedTuple):
    name: str  # in full
    colour: str
    marker: str
    line: str | tuple = "-"  # a line style of matplotlib


DASHES, DOTS, DASH_DOT, LONG = "--", ":", "-.", (0, (7, 2))
# In the order of the tables.
METHOD_STYLES = {
    "raw pixels": Style("raw pixels", "#7F7F7F", "+", DOTS),
    "untrained": Style("untrained", "#7F7F7F", "x", DOTS),
    "ntxent": Style("NT-Xent", "#0072B2", "o"),
    "supcon": Style("SupCon", "#D55E00", "X", DASHES),
    "supmin": Style("Supervised Minority", "#009E73", "^", DASH_DOT),
    "suppro": Style("Supervised Prototypes", "#C4589A", "s", LONG),
    "kcl": Style("KCL", "#4B693C", "D", DOTS),
    "tsc": Style("TSC", "#5AA52D", "v"),
    "sbcl": Style("SBC", "#3C6978", "P", DASHES),
    "bcl": Style("BCL", "#B487C3", "*", DASH_DOT),
    "paco": Style("PaCo", "#872DD2", "<", LONG),
    "ce": Style("cross entropy", "#8778FF", ">", DOTS),
    "weighted_ce": Style("weighted CE", "#780FFF", "p"),
    "focal": Style("focal loss", "#D200B4", "h", DASHES),
    "ldam_drw": Style("LDAM-DRW", "#C30F0F", "8", DASH_DOT),
    "logit_adjusted": Style("logit adjustment", "#F06978", "d", LONG),
    "auc_margin": Style("AUC margin", "#8C6A1A", "3", DASH_DOT),
    "crt": Style("cRT", "#E1004B", "H", DOTS),
    "tau_norm": Style("tau-normalisation", "#D269E1", "1"),
    "lws": Style("LWS", "#FF00FF", "2", DASHES),
}

# What was not trained: no colour, and above the methods in the tables.
FLOORS = ("raw pixels", "untrained")
# The methods that figures show in colour, in this order; at most LEADING of them at once.
CARRIERS = ("supcon", "supmin", "suppro", "ntxent", "weighted_ce")
LEADING = 5
# Text and axes, the filling of hollow markers, and what stands in the background.
INK, PAPER, REST = "#1A1B1E", "#FEFEFE", "#8C8C8C"
MINORITY, MAJORITY = "#D1495B", "#6FA8DC"
# For matplotlib.rc_context. The HTML report turns INK and PAPER into the colours of its theme.
RC = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": REST,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The same figure gives the same file.
    "svg.hashsalt": "report",
}


def panel_grid(heights, columns, width):
    """Return a figure and a panel for each of `heights`; heights and width in inches."""
    rows = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    figure = Figure(figsize=(columns * width, sum(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows)
    axes = list(grid.flat)
    for ax in axes[len(heights) :]:
        ax.remove()
    return figure, axes[: len(heights)]


def style_of(method):
    return METHOD_STYLES.get(method, Style(method, REST, "o"))


def full_name(group):
    """Name a group as a reader knows its method: "Supervised Minority (minority per batch 4)"."""
    return style_of(group.method).name + group.name.removeprefix(group.method)


def leading_methods(groups):
    """Return the methods in colour: those of the paper and the usual baseline come first."""
    found = {group.method for group in groups} & METHOD_STYLES.keys() - set(FLOORS)
    return [m for m in dict.fromkeys([*CARRIERS, *METHOD_STYLES]) if m in found][:LEADING]


def marker_looks(group, leading):
    """Return colour, marker and line of a group; a variant of a method has a hollow marker."""
    style = style_of(group.method)
    colour = style.colour if group.method in leading else REST
    face = colour if group.is_plain else PAPER
    return {"color": colour, "marker": style.marker, "ls": style.line, "mfc": face, "mew": 1.2}
