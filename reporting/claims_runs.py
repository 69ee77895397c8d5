"""Regimes of runs, their positive controls, and the values that claims are judged by.

A regime is a data set, a network, an image size and a number of steps. It may judge only if
contrastive learning works in it: NT-Xent beats the untrained network, and SupCon is at least as
good as NT-Xent where the classes are balanced.
"""

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from datasets import DATASETS
from reporting.claims_statistics import ALPHA, MIN_PAIRS, Case, Difference, p_text
from reporting.collect import LOSS_SETTINGS
from reporting.tables import is_smoke

SCORES = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
# Balanced rows that a probe is trained on, the first that was measured.
BALANCED_ROWS = ("balanced_train", "one_percent")
BALANCED_PERCENT = 45.0  # share of the minority from which a ratio is called balanced
RARE_IMAGES = 25  # training images of the minority, at least, where a claim is judged
MIN_STEPS = 1000
MIN_UNTRAINED_STEPS = 100  # they settle the statistics of batch norm
CONTROL_POINTS = 5.0  # NT-Xent over the untrained network
NEAR = 0.15  # step counts that differ by less are called equal
# Settings of a method alone; all others are compared between methods.
METHOD_SETTINGS = ("temperature", "k", "queue", "variant", "alpha", "recluster_every")
DEFAULTS = {"margin": 1.0, "majority_supervision": 0.0}
MAIN_METHODS = ("ntxent", "supcon")


# regimes ------------------------------------------------------------------------------------------


@dataclass
class Regime:
    """Runs of one data set, network, size and number of steps.

    rows: those runs, the untrained networks and the supervised runs. row["changes"] holds the
    settings that set a run apart from the base runs of its ratio. Members are {seed: row}.
    """

    dataset: str
    arch: str
    size: int
    steps: int | None
    rows: list

    def __post_init__(self):
        self.share = {row["ratio"]: row["minority_percent"] or 0.0 for row in self.rows}
        self.kind = image_kind(self.dataset, {row.get("recipe") for row in self.rows})
        for ratio in self.share:
            mark_changes([row for row in self.rows if row["ratio"] == ratio])

    @property
    def name(self):
        return f"{self.dataset} at {self.size} px"

    @property
    def full_name(self):
        steps = "unknown" if self.steps is None else f"{self.steps:,}"
        return f"{self.dataset}, {self.arch}, {self.size} px, {steps} steps"

    @property
    def score(self):
        """The score that the paper judges such images by."""
        return "auroc" if self.kind == "medical" else "balanced_accuracy"

    @property
    def repair(self):
        """The loss that the paper advises for such images."""
        return "suppro" if self.kind == "medical" else "supmin"

    def rare_images(self, ratio):
        """Return the smallest number of minority training images at a ratio; None if unknown."""
        counts = [row["train_minority"] for row in self.rows if row["ratio"] == ratio]
        return None if None in counts else min(counts)

    def imbalanced(self):
        """Return the imbalanced ratios that may judge a claim, the rarest minority first."""
        ratios = [ratio for ratio, share in self.share.items() if share < BALANCED_PERCENT]
        ratios = [ratio for ratio in ratios if (self.rare_images(ratio) or 0) >= RARE_IMAGES]
        return sorted(ratios, key=self.share.get)

    def balanced(self):
        return [ratio for ratio, share in self.share.items() if share >= BALANCED_PERCENT]

    def members(self, ratio, method, changes=frozenset()):
        """Return the runs of a method whose changed settings are exactly `changes`."""
        return {
            row["seed"]: row
            for row in self.rows
            if (row["ratio"], row["method"]) == (ratio, method) and set(row["changes"]) == changes
        }

    def base(self, ratio, method):
        """Return the runs without a changed setting; of untrained networks the settled ones."""
        if method == "untrained":
            rows = [row for row in self.rows if (row["ratio"], row["method"]) == (ratio, method)]
            return {row["seed"]: row for row in rows if not row["changes"]}
        return self.members(ratio, method)

    def changed(self, ratio, method, key, *others):
        """Return {value of key: members} of runs with this key changed, and at most the others."""
        found = defaultdict(dict)
        for row in self.rows:
            if (row["ratio"], row["method"]) == (ratio, method) and key in row["changes"]:
                if row["changes"].keys() <= {key, *others}:
                    found[row["changes"][key]][row["seed"]] = row
        return dict(sorted(found.items(), key=lambda item: str(item[0])))


def image_kind(dataset, recipes):
    """Return "natural" or "medical" if images and recipe are of that kind, else "neither"."""
    names = sorted((name for name in DATASETS if dataset.startswith(name)), key=len)
    kind = DATASETS[names[-1]].kind if names else "medical" if "xray" in dataset else None
    wanted = {"natural": {"natural"}, "medical": {"medical", "cardiac"}}.get(kind, set())
    return kind if recipes - {None} and recipes - {None} <= wanted else "neither"


def count_steps(row):
    """Return the optimizer steps of a run; None where its subset is missing."""
    images = row.get("train_images")
    return row["epochs"] * (images // row["batch_size"]) if images else None


def is_near(a, b):
    return a == b or None not in (a, b) and abs(a - b) <= NEAR * max(a, b)


def is_judged(row):
    """Whether a run of two classes is finished and scored with the defaults, if at all."""
    return (
        row["state"] == "finished"
        and "tail" not in row
        # Its default probe is cached, standardised, and has balanced class weights.
        and ("probe" in row["probes"] or not row["probes"])
        and row.get("metrics_neighborhood", 0.05) == 0.05
        and row.get("encoder_seed", row["seed"]) == row["seed"]
        and row["kind"] != "raw pixels"
        and not is_smoke(row)
    )


def find_regimes(rows):
    """Return the Regimes of the rows, in the order of the tables."""
    networks = defaultdict(list)
    for row in filter(is_judged, rows):
        networks[row["dataset"], row.get("arch"), row.get("size")].append({**row})
    regimes = []
    for (dataset, arch, size), members in networks.items():
        for steps in step_counts(members):
            kept = [row for row in members if belongs(row, steps)]
            regimes.append(Regime(dataset, arch, size, steps, [{**row} for row in kept]))
    return regimes


def step_counts(rows):
    """Return the step counts with runs of NT-Xent and of SupCon, else the most frequent one."""
    trained = [row for row in rows if row["kind"] == "contrastive" and row["method"] != "untrained"]
    found = []
    for steps, _ in Counter(map(count_steps, trained)).most_common():
        near = {row["method"] for row in trained if is_near(count_steps(row), steps)}
        if near >= set(MAIN_METHODS) and not any(is_near(steps, other) for other in found):
            found.append(steps)
    return found or [steps for steps, _ in Counter(map(count_steps, trained)).most_common(1)]


def belongs(row, steps):
    """Whether a run is part of the regime with this number of steps."""
    if row["method"] == "untrained":
        return (count_steps(row) or 0) >= MIN_UNTRAINED_STEPS
    return row["kind"] != "contrastive" or is_near(count_steps(row), steps)


def mark_changes(rows):
    """Set row["changes"] of the runs of one ratio: {setting: value} where it is not the usual.

    The usual value of a setting is its default, "off" where one run leaves it out, or else the
    most frequent value. Settings of a method alone are compared within the method.
    """
    trained = [row for row in rows if row["kind"] == "contrastive" and row["method"] != "untrained"]
    shared = usual_settings(trained)
    for row in rows:
        usual = usual_settings([other for other in rows if other["method"] == row["method"]])
        if row["kind"] == "contrastive":
            own = {key: usual.get(key) for key in METHOD_SETTINGS} | DEFAULTS
            usual = shared | {key: own[key] for key in own.keys() & row["settings"].keys()}
        row["changes"] = changed_settings(row, usual)


def changed_settings(row, usual):
    """Return {setting: value} of a run that differs; an untrained network may differ in length."""
    ignored = (*LOSS_SETTINGS, "epochs", "batch_size") if row["method"] == "untrained" else ()
    keys = sorted({*usual, *row["settings"]} - {*ignored})
    return {
        key: row["settings"].get(key) for key in keys if row["settings"].get(key) != usual.get(key)
    }


def usual_settings(rows):
    """Return {setting: most frequent value} of the settings that all rows have."""
    keys = set.intersection(*(set(row["settings"]) for row in rows)) if rows else ()
    values = {key: Counter(json.dumps(row["settings"][key]) for row in rows) for key in keys}
    return {key: json.loads(counts.most_common(1)[0][0]) for key, counts in values.items()}


# values and cases ---------------------------------------------------------------------------------


def probe_score(score, rows="balanced"):
    """Return a function: row -> test score in percent, None if not measured.

    rows: "balanced" (the 50-50 rows, else the one-percent rows), "own" or "one_percent". At a
    balanced ratio the own rows are balanced. A supervised network has its own scores.
    """

    def value(row):
        if row["kind"] != "contrastive":
            return percent(row, f"finetune_test_{score}")
        is_balanced = (row["minority_percent"] or 0) >= BALANCED_PERCENT
        if rows == "own" or rows == "balanced" and is_balanced:
            return percent(row, f"probe_test_{score}")
        names = BALANCED_ROWS if rows == "balanced" else (rows,)
        found = (percent(row, f"probe_test_{name}_{score}") for name in names)
        return next((v for v in found if v is not None), None)

    return value


def percent(row, key):
    value = row.get(key)
    return None if value is None else 100 * value


def class_mean(key):
    """Return a function: row -> mean of both classes of a metric in the projection."""

    def value(row):
        pair = row.get(f"{key}_minority"), row.get(f"{key}_majority")
        return float(np.mean(pair)) if all(isinstance(v, (int, float)) for v in pair) else None

    return value


def measured_values(members, value):
    """Return {seed: value} of the members for which it was measured."""
    found = {seed: value(row) for seed, row in members.items()}
    return {seed: v for seed, v in found.items() if v is not None and math.isfinite(v)}


def mean_text(members, value, digits=1):
    """Return "mean ± standard deviation", or "-" where nothing was measured."""
    values = list(measured_values(members, value).values())
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    # The sum with 0.0 turns -0.0 into 0.0.
    return f"{round(np.mean(values), digits) + 0.0:.{digits}f}{spread}"


def difference(a, b, value, margin=0.0):
    """Return the Difference of a minus b; None without a common seed."""
    a, b = measured_values(a, value), measured_values(b, value)
    common = sorted(a.keys() & b.keys())
    return Difference([a[seed] - b[seed] for seed in common], margin) if common else None


def compare(where, a, b, margin=0.0, rows="balanced"):
    """Return the Case that members a are above members b by both scores; None without pairs.

    With a margin the question is whether a is not worse than b by more than this.
    """
    values = {name: probe_score(score, rows) for score, name in SCORES.items()}
    found = {name: difference(a, b, value, margin) for name, value in values.items()}
    if None in found.values():
        return None
    p_yes, p_no = (max(getattr(d, key) for d in found.values()) for key in ("p_yes", "p_no"))
    texts = [
        f"{name} {mean_text(a, values[name])} against {mean_text(b, values[name])} ({d})"
        for name, d in found.items()
    ]
    smallest = min(found.values(), key=lambda d: abs(d.mean))
    n = len(smallest.values)
    p = p_text(min(p_yes, p_no))
    is_open = min(p_yes, p_no) >= ALPHA
    hint = needed_seeds(list(found.values()), [*a.values(), *b.values()]) if is_open else ""
    return Case(where, f"{', '.join(texts)}, n {n}, {p}", p_yes, p_no, smallest.mean, hint=hint)


def needed_seeds(differences, rows):
    """Name the seeds that would decide a comparison, and their price in minutes of training."""
    have = min(len(d.values) for d in differences)
    needed = [d.seeds_needed() for d in differences]
    if None in needed:
        return "more than 50 seeds, by the differences seen"
    n = max(*needed, MIN_PAIRS)
    minutes = [row["train_minutes"] for row in rows if row.get("train_minutes")]
    price = f", about {2 * (n - have) * np.mean(minutes):.0f} minutes" if minutes else ""
    return f"{n} seeds in all{price}" if n > have else f"{n + 1} seeds or more"


# controls -----------------------------------------------------------------------------------------


@dataclass
class Control:
    """A positive control of a regime: what was measured, and whether it passed."""

    text: str
    passed: bool


def control_means(regime, ratio, a, b):
    """Return {score: Difference} of two methods by the balanced probe; {} if not run."""
    members = regime.base(ratio, a), regime.base(ratio, b)
    found = {score: difference(*members, probe_score(score)) for score in SCORES}
    return {} if None in found.values() else found


def control_text(ratio, found):
    texts = [f"{SCORES[score]} {d}" for score, d in found.items()]
    return f"{ratio}: {', '.join(texts)} (n {len(found['auroc'].values)})"


def learning_control(regime):
    """NT-Xent beats the settled untrained network, at the most balanced ratio that has both."""
    for ratio in sorted(regime.share, key=regime.share.get, reverse=True):
        if found := control_means(regime, ratio, "ntxent", "untrained"):
            enough = len(found["auroc"].values) >= MIN_PAIRS
            best = max(d.mean for d in found.values())
            return Control(control_text(ratio, found), enough and best >= CONTROL_POINTS)
    return Control("not run", False)


def balanced_control(regime):
    """SupCon is at least as good as NT-Xent at a balanced ratio, by the paper's score."""
    for ratio in regime.balanced():
        if found := control_means(regime, ratio, "supcon", "ntxent"):
            d = found[regime.score]
            return Control(control_text(ratio, found), len(d.values) >= MIN_PAIRS and d.mean >= 0)
    return Control("not run", False)


def size_control(regime):
    """Enough steps, and enough minority training images at one imbalanced ratio."""
    counts = [
        f"{ratio} {'unknown' if regime.rare_images(ratio) is None else regime.rare_images(ratio)}"
        for ratio, share in regime.share.items()
        if share < BALANCED_PERCENT
    ]
    passed = (regime.steps or 0) >= MIN_STEPS and bool(regime.imbalanced())
    return Control(", ".join(counts) or "-", passed)


CONTROLS = (learning_control, balanced_control, size_control)


def may_judge(regime):
    """Whether a regime passes its positive controls."""
    return all(control(regime).passed for control in CONTROLS)
