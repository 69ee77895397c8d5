"""The paper's numbers, as transcribed by a public rerun and not checked against the paper.

The transcription is that of github.com/XiaoSha59/TTC, September 2026. The same people ran the
official code again; of its numbers only the range for the two losses is known here.
"""

NOTE = "as transcribed by a public rerun, not checked"
GROUPS = ("plants", "insects", "mammals")
# Balanced accuracy of the linear probe on iNaturalist 2021: {method: {ratio: one per GROUPS}}.
TABLE_1 = {
    "weighted_ce": {
        "50-50": (81.1, 82.4, 70.7),
        "95-5": (61.4, 63.4, 61.9),
        "99-1": (60.1, 62.8, 57.3),
    },
    "supcon": {
        "50-50": (93.7, 93.3, 80.8),
        "95-5": (56.2, 62.6, 54.4),
        "99-1": (54.4, 56.4, 56.9),
    },
    "supmin": {"95-5": (89.8, 82.8, 77.9), "99-1": (85.4, 78.8, 75.3)},
    "suppro": {
        "50-50": (95.1, 93.0, 82.9),
        "95-5": (88.7, 81.2, 79.2),
        "99-1": (83.4, 73.7, 73.0),
    },
    "paco": {"95-5": (None, 66.4, None)},
}
# Balanced accuracy of the rerun of the official code, lowest and highest.
RERUN = {
    "supmin": {"95-5": (46, 66), "99-1": (46, 66)},
    "suppro": {"95-5": (46, 66), "99-1": (46, 66)},
}
# AUROC at the natural ratio: {method: {data set: value}}.
TABLE_2 = {
    "weighted_ce": {"breastmnist": 75.1, "pneumoniamnist": 98.8, "fracatlas": 79.8},
    "supcon": {"breastmnist": 75.1, "pneumoniamnist": 99.5, "fracatlas": 84.8},
    "supmin": {"breastmnist": 86.4, "pneumoniamnist": 99.6, "fracatlas": 82.3},
    "suppro": {"breastmnist": 90.7, "pneumoniamnist": 99.8, "fracatlas": 86.0},
}


def table_1_text(dataset, ratio, method):
    """Return the paper's balanced accuracies of iNaturalist: "54.4 / 56.4 / 56.9", or "-"."""
    values = TABLE_1.get(method, {}).get(ratio)
    if not values or not dataset.startswith("inat21"):
        return "-"
    return " / ".join("-" if v is None else f"{v:.1f}" for v in values)


def rerun_text(dataset, ratio, method):
    """Return the range of the public rerun: "46 to 66", or "-"."""
    bounds = RERUN.get(method, {}).get(ratio)
    return f"{bounds[0]} to {bounds[1]}" if bounds and dataset.startswith("inat21") else "-"


def table_2_text(dataset, ratio, method):
    """Return the paper's AUROC at the natural ratio of a data set that starts with its name."""
    values = TABLE_2.get(method, {}) if ratio == "natural" else {}
    return next((f"{v:.1f}" for name, v in values.items() if dataset.startswith(name)), "-")
