"""Figures of the claims: what a changed setting does, and how much each metric explains."""

import itertools
import textwrap

import numpy as np

from reporting.claims_rules import REPAIRS, base_points, batch_sizes, r_squared
from reporting.claims_runs import find_regimes, may_judge, measured_values, probe_score
from reporting.collect import METRICS
from reporting.styles import METHOD_STYLES, panel_grid

CONTRASTED = ("supcon", *REPAIRS)
# Setting: (title of its panel, methods, value of the base runs).
ABLATIONS = {
    "batch_size": ("batch size, equal steps", CONTRASTED, None),
    "margin": ("margin of the prototypes", ("suppro",), 1.0),
    "majority_supervision": ("supervised share of the majority", ("supmin",), 0.0),
    "minority_per_batch": ("minority images per batch, at least", CONTRASTED, 0),
}


def plan_claim_figures(rows):
    """Return {file name: function that draws it, or returns None without a value}."""
    regimes = list(filter(may_judge, find_regimes(rows)))
    return {
        "ablations.png": lambda: ablations_figure(regimes),
        "metrics.png": lambda: metrics_figure(regimes),
    }


def ablations_figure(regimes):
    """Draw balanced accuracy against what was varied: a panel each, a line per method."""
    panels = {key: ablation_lines(regimes, key) for key in ABLATIONS}
    panels = {key: lines for key, lines in panels.items() if lines}
    if not panels:
        return None
    figure, axes = panel_grid([3.8] * len(panels), len(panels), 4.2)
    for ax, (key, lines) in zip(axes, panels.items(), strict=True):
        for (name, method), points in lines.items():
            look = METHOD_STYLES[method]
            means = [np.mean(values) for values in points.values()]
            stds = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in points.values()]
            style = {"color": look.colour, "marker": look.marker, "ls": look.line, "capsize": 3}
            ax.errorbar(list(points), means, stds, label=textwrap.fill(name, 40), **style)
        if key == "batch_size":
            ax.set_xscale("log", base=2)
        ax.set(title=ABLATIONS[key][0], ylabel="balanced accuracy, balanced rows (%)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return figure


def ablation_lines(regimes, key):
    """Return {(name, method): {value of the setting: balanced accuracies}} with the base runs."""
    _, methods, base_value = ABLATIONS[key]
    lines = {}
    for regime, method in itertools.product(regimes, methods):
        for ratio in regime.imbalanced():
            if key == "batch_size":
                found = batch_sizes(regime, ratio, method)
            elif found := regime.changed(ratio, method, key):
                found[base_value] = regime.base(ratio, method)
            value = probe_score("balanced_accuracy")
            points = {x: [*measured_values(found[x], value).values()] for x in sorted(found)}
            points = {x: values for x, values in points.items() if values}
            if len(points) > 1:
                name = f"{METHOD_STYLES[method].name}, {regime.dataset} {ratio}"
                lines[name, method] = points
    return lines


def metrics_figure(regimes):
    """Draw how much of the variance of balanced accuracy each metric explains: R² as bars."""
    panels = {}
    for regime in regimes:
        points = {key: base_points(regime, key, "balanced_accuracy") for key in METRICS}
        if all(map(len, points.values())):
            panels[regime.name] = {key: r_squared(found) for key, found in points.items()}
    if not panels:
        return None
    figure, axes = panel_grid([3.2] * len(panels), len(panels), 3.2)
    for ax, (title, heights) in zip(axes, panels.items(), strict=True):
        colours = ["0.25" if key in ("saa", "cac") else "0.8" for key in METRICS]
        ax.bar([*METRICS.values()], [*heights.values()], color=colours, edgecolor="black", lw=0.7)
        ax.axhline(0, color="black", lw=0.8)
        ax.axhline(0.6, color="black", lw=0.8, ls=":")
        ax.set_title(textwrap.fill(title, 30), fontsize=10)
        ax.set(ylabel="R², with the sign of the slope", ylim=(-1, 1))
    return figure
