"""Judge the paper's claims, and the questions it leaves open, by the runs of a report.

    python report.py runs/evidence --claims --out results  # README.md, ablations.png, metrics.png

A claim has a rule: a function from the runs to cases. A case is for the claim, against it, or
undecided. A claim holds if all its cases are for it, and in part if some are. It does not hold if
none is for it and one is against it. All numbers are computed from the runs, except those of
claim g, which come from the benchmark.

Runs are compared in pairs of the same seed. A difference counts if there are at least three pairs
and Student's t-test on them gives p < 0.05. The test is two-sided. It is not corrected for the
number of tests.
"""

import itertools
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from datasets import DATASETS
from reporting.collect import METHODS, METRICS
from reporting.figures import MIN_RUNS_FOR_LINE
from reporting.styles import panel_grid
from reporting.tables import FIGURE_CAPTION, is_smoke, markdown_table

PROPOSED = ("supmin", "suppro")
CONTRASTED = ("supcon", *PROPOSED)
LONG_TAIL = ("kcl", "tsc", "sbcl", "bcl", "paco")
SUPERVISED = ("ldam_drw", "crt", "weighted_ce", "focal", "logit_adjusted")
# Kind of images; chestxray224 is a file that --data-root of the data set npz may name.
KINDS = {name: entry.kind for name, entry in DATASETS.items()} | {"chestxray224": "medical"}
# Sign of a change that a reader of the metric takes for worse.
WORSE_SIGN = {"saa": -1, "cac": -1, "sad": 1, "cad": 1, "gpu": 1, "peu": -1}
TITLE = "# The paper's claims, measured"
TOLERANCE = 2.0  # points of balanced accuracy that "costs nothing" may cost
RARE_PERCENT = 5.0  # share of the minority, at most, that is called rare
COLLAPSE_GAP = 0.1  # nats below the collapse value, as in the warning of pretrain.py


@dataclass
class Case:
    where: str
    holds: bool | None  # None: the runs do not decide it
    evidence: str
    size: float = 0.0  # of the difference, points; the summary shows the largest case


@dataclass
class Claim:
    letter: str
    text: str
    rule: str
    judge: Callable  # Runs -> Cases
    figure: str


# runs ---------------------------------------------------------------------------------------------


class Runs:
    """Finished runs that were scored with the defaults of the scripts, without smoke runs.

    Base runs have no setting of their own: their label is the name of the method.
    A subset is (data set, ratio). Members are {seed: row}.
    """

    def __init__(self, rows):
        self.rows = [row for row in rows if is_judged(row)]
        self.share = {(row["dataset"], row["ratio"]): row["minority_percent"] for row in self.rows}
        self.subsets = list(self.share)
        self.datasets = list(dict.fromkeys(dataset for dataset, _ in self.subsets))

    def rows_of(self, subset):
        """Return the rows of a subset."""
        return [row for row in self.rows if (row["dataset"], row["ratio"]) == subset]

    def base(self, subset, label):
        """Return the members with a label; the name of a method gives its base runs."""
        return {row["seed"]: row for row in self.rows_of(subset) if row["label"] == label}

    def changed(self, subset, method, *keys):
        """Return {value of keys[0]: members} of runs that differ from the base runs in it.

        They may also differ in the other keys, and in nothing else.
        """
        base = next(iter(self.base(subset, method).values()), None)
        found = {}
        for row in self.rows_of(subset) if base else ():
            a, b = row["settings"], base["settings"]
            different = {key for key in {*a, *b} if a.get(key) != b.get(key)}
            is_comparable = row["method"] == method and isinstance(row.get(keys[0]), (int, float))
            if is_comparable and keys[0] in different and different <= {*keys}:
                found.setdefault(row[keys[0]], {})[row["seed"]] = row
        return dict(sorted(found.items()))

    def untrained(self, subset):
        """Return members with learning rate 0; they differ from the others at most in epochs.

        The epochs settle the statistics of batch norm: as many as in the other runs, if there are.
        """
        rows = [row for row in self.rows_of(subset) if row["method"] == "untrained"]
        rows = [row for row in rows if row["label"] == f"untrained (epochs {row['epochs']})"]
        return {row["seed"]: row for row in rows} | self.base(subset, "untrained")

    def lengths(self, subset):
        """Return {"": {method: members}, ", 64 epochs": ...} of SupCon and the proposed losses."""
        found = {"": {method: self.base(subset, method) for method in CONTRASTED}}
        for method in CONTRASTED:
            changed = self.changed(subset, method, "epochs", "warmup_epochs")
            for epochs, members in changed.items():
                found.setdefault(f", {epochs} epochs", defaultdict(dict))[method] = members
        return found

    def batch_sizes(self, subset, method):
        """Return {batch size: members} of runs with as many steps as the base runs, to 15 %."""
        sizes = self.changed(subset, method, "batch_size", "epochs", "warmup_epochs")
        if not sizes:
            return {}
        base = self.base(subset, method)
        usual = next(iter(base.values()))
        steps = usual["epochs"] / usual["batch_size"]
        sizes[usual["batch_size"]] = base
        return {
            size: sizes[size]
            for size in sorted(sizes)
            if all(abs(row["epochs"] / size / steps - 1) < 0.15 for row in sizes[size].values())
        }

    def rare_subsets(self):
        return [s for s in self.subsets if (self.share[s] or 100) <= RARE_PERCENT]

    def imbalanced_subsets(self):
        return [s for s in self.subsets if (self.share[s] or 0) < 45]

    def balanced_subsets(self):
        return [s for s in self.subsets if (self.share[s] or 0) >= 45]

    def contrastive_by_dataset(self):
        """Return [(title, rows)] of each data set, and of all together if there are several."""
        rows = [row for row in self.rows if row["kind"] == "contrastive"]
        panels = [(name, [row for row in rows if row["dataset"] == name]) for name in self.datasets]
        panels = [(name, members) for name, members in panels if members]
        return [*panels, ("all runs", rows)] if len(panels) > 1 else panels


def is_judged(row):
    """Whether a run is finished and scored with the defaults of the scripts, if at all."""
    return (
        row["state"] == "finished"
        # Its default probe is cached, standardised, and has balanced class weights.
        and ("probe" in row["probes"] or not row["probes"])
        and row.get("metrics_neighborhood", 0.05) == 0.05
        and row.get("encoder_seed", row["seed"]) == row["seed"]
        and not is_smoke(row)
    )


def subset_name(subset):
    return " ".join(subset)


# values and differences ---------------------------------------------------------------------------


def balanced_accuracy(row):
    """Return the balanced test accuracy in percent, None if not measured.

    It is that of the linear probe, or of a supervised network itself.
    """
    result = "probe" if row["kind"] == "contrastive" else "finetune"
    value = row.get(f"{result}_test_balanced_accuracy")
    return None if value is None else 100 * value


def balanced_probe_accuracy(row):
    """Return the same for the probe that is trained on the 50-50 rows of the data set."""
    value = row.get("probe_test_balanced_train_balanced_accuracy")
    return None if value is None else 100 * value


def collapse_gap(row):
    return None if row["method"] == "untrained" else row.get("last_collapse_gap")


PROBES = {balanced_accuracy: "", balanced_probe_accuracy: ", probe on the 50-50 rows"}


def class_mean(key):
    """Return a function: row -> mean of both classes of a metric in the projection."""

    def value(row):
        pair = row.get(f"{key}_minority"), row.get(f"{key}_majority")
        return float(np.mean(pair)) if all(isinstance(v, (int, float)) for v in pair) else None

    return value


def measured_values(members, value=balanced_accuracy):
    """Return {seed: value} of the members for which it was measured."""
    found = {seed: value(row) for seed, row in members.items()}
    return {seed: v for seed, v in found.items() if v is not None and math.isfinite(v)}


def mean_text(members, value=balanced_accuracy, unit=" %", digits=1):
    values = list(measured_values(members, value).values())
    if not values:
        return "not run"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    # The sum with 0.0 turns -0.0 into 0.0.
    mean = f"{round(np.mean(values), digits) + 0.0:.{digits}f}"
    return f"{mean}{spread}{unit}" + ("" if len(values) == 3 else f" (n {len(values)})")


@dataclass
class Difference:
    """Differences of two methods in points, over the seeds that both have."""

    values: list

    @property
    def mean(self):
        return float(np.mean(self.values))

    @property
    def p(self):
        """Two-sided p of the t-test on the pairs; None for one pair."""
        if len(self.values) < 2:
            return None
        if np.ptp(self.values) < 1e-9:
            return 1.0 if abs(self.mean) < 1e-9 else 0.0
        return float(ttest_1samp(self.values, 0).pvalue)

    @property
    def sign(self):
        """1 or -1 if the difference counts, else 0."""
        return 0 if len(self.values) < 3 or self.p >= 0.05 else int(np.sign(self.mean))

    def __str__(self):
        spread = f" ± {np.std(self.values, ddof=1):.1f}" if len(self.values) > 1 else ""
        p = "" if self.p is None else f", p {self.p:.3f}" if self.p >= 0.001 else ", p < 0.001"
        return f"{self.mean:+.1f}{spread} points (n {len(self.values)}{p})"


def difference(a, b, value=balanced_accuracy):
    """Return a minus b; None without a common seed."""
    a, b = measured_values(a, value), measured_values(b, value)
    common = sorted(a.keys() & b.keys())
    return Difference([a[seed] - b[seed] for seed in common]) if common else None


def is_higher(difference):
    """Return whether the difference is positive; None if it does not count."""
    return {1: True, -1: False, 0: None}[difference.sign]


def not_lower(difference):
    """Return whether the difference is not negative.

    One that does not count may be TOLERANCE points below 0 on average; None beyond that.
    """
    if difference.sign or len(difference.values) < 3:
        return is_higher(difference)
    return True if difference.mean > -TOLERANCE else None


def compare(where, a, b, rule=is_higher, value=balanced_accuracy):
    """Yield the Case of members a against members b; nothing without a common seed."""
    if d := difference(a, b, value):
        evidence = f"{mean_text(a, value)} against {mean_text(b, value)}: {d}"
        yield Case(where, rule(d), evidence, abs(d.mean))


# the rules ----------------------------------------------------------------------------------------


def judge_collapse(runs):
    for dataset in runs.datasets:
        subsets = [
            subset
            for subset in runs.subsets
            if subset[0] == dataset
            and runs.share[subset]
            and measured_values(runs.base(subset, "supcon"))
        ]
        subsets.sort(key=lambda subset: -runs.share[subset])
        members = {subset[1]: runs.base(subset, "supcon") for subset in subsets}
        if len(subsets) > 1:
            balanced, *_, rarest = members.values()
            if fall := difference(balanced, rarest):
                means = ", ".join(f"{ratio} {mean_text(rows)}" for ratio, rows in members.items())
                evidence = f"{means}; first minus last {fall}"
                where = f"{dataset}: lower at the rarest ratio"
                yield Case(where, is_higher(fall), evidence, abs(fall.mean))
        for subset in subsets:
            if runs.share[subset] <= 1:
                yield from judge_rarest(runs, subset)


def judge_rarest(runs, subset):
    """Compare SupCon with 60 % and with an untrained network, by both probes."""
    members = runs.base(subset, "supcon")
    gap = mean_text(members, collapse_gap, " nats", 3)
    for value, probe in PROBES.items():
        if known := list(measured_values(members, value).values()):
            where = f"{subset_name(subset)}: collapses (below 60 %){probe}"
            holds = bool(np.mean(known) < 60) if len(known) > 2 else None
            evidence = f"{mean_text(members, value)}; final loss {gap} below its collapse value"
            yield Case(where, holds, evidence)
        where = f"{subset_name(subset)}: untrained network not worse than SupCon{probe}"
        yield from compare(where, runs.untrained(subset), members, not_lower, value)


def judge_metrics(runs):
    for subset in runs.rare_subsets():
        for length, members in runs.lengths(subset).items():
            for key, name in METRICS.items():
                value = class_mean(key)
                differences = [
                    difference(members["supcon"], members[method], value) for method in PROPOSED
                ]
                signs = {d.sign * WORSE_SIGN[key] for d in differences if d}
                if not signs:
                    continue
                is_worse = True if signs == {1} else False if signs == {-1} else None
                should_show = key in ("saa", "cac")
                holds = is_worse if should_show or is_worse is None else not is_worse
                verb = "shows it" if should_show else "does not show it"
                means = [
                    f"{METHODS[method]} {mean_text(members[method], value, '', 2)}"
                    for method in CONTRASTED
                ]
                where = f"{subset_name(subset)}{length}: {name} {verb}"
                yield Case(where, holds, ", ".join(means))


def judge_proposed_losses(runs):
    for subset in runs.imbalanced_subsets():
        for length, members in runs.lengths(subset).items():
            others = {"SupCon": members["supcon"], "an untrained network": runs.untrained(subset)}
            for method, (other, rows), (value, probe) in itertools.product(
                PROPOSED, others.items(), PROBES.items()
            ):
                where = f"{subset_name(subset)}{length}: {METHODS[method]} over {other}{probe}"
                yield from compare(where, members[method], rows, value=value)
        for method, other in itertools.product(PROPOSED, LONG_TAIL):
            where = f"{subset_name(subset)}: {METHODS[method]} over {METHODS[other]}"
            yield from compare(where, runs.base(subset, method), runs.base(subset, other))


def judge_domains(runs):
    for subset in runs.imbalanced_subsets():
        d = difference(runs.base(subset, "supmin"), runs.base(subset, "suppro"))
        kind = KINDS.get(subset[0])
        if d and kind:
            expected = {"natural": "supmin", "medical": "suppro"}[kind]
            where = f"{subset_name(subset)}, {kind}: {METHODS[expected]} ahead"
            holds = None if not d.sign else (d.sign > 0) == (expected == "supmin")
            evidence = f"Supervised Minority minus Supervised Prototypes {d}"
            yield Case(where, holds, evidence, abs(d.mean))


def judge_cac(runs):
    for title, rows in runs.contrastive_by_dataset():
        fits = {key: fit_metric(rows, key) for key in METRICS}
        if fits["cac"]:
            slope, r2, n = fits.pop("cac")
            others = ", ".join(f"{METRICS[key]} {fit[1]:.2f}" for key, fit in fits.items() if fit)
            evidence = f"R² {r2:.2f} over {n} runs (the others: {others})"
            yield Case(title, r2 > 0.6 and slope > 0, evidence)


def fit_metric(rows, key):
    """Fit balanced accuracy on a metric by least squares. Returns (slope, R², n).

    None for fewer than 8 runs or equal values.
    """
    pairs = [(class_mean(key)(row), balanced_accuracy(row)) for row in rows]
    pairs = [pair for pair in pairs if None not in pair and np.isfinite(pair).all()]
    if len(pairs) < 8:
        return None
    x, y = np.array(pairs, dtype=float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1] ** 2), len(x)


def judge_batch_sizes(runs):
    for subset, method in itertools.product(runs.subsets, CONTRASTED):
        sizes = runs.batch_sizes(subset, method)
        members = list(sizes.values())
        if len(sizes) > 1 and (d := difference(members[-1], members[0])):
            means = ", ".join(f"{size}: {mean_text(rows)}" for size, rows in sizes.items())
            holds = None if not d.sign else d.sign < 0
            evidence = f"batch {means}; largest minus smallest {d}"
            yield Case(f"{subset_name(subset)}, {method}", holds, evidence, abs(d.mean))


def judge_overhead(runs):
    path = Path(__file__).parents[1] / "results" / "benchmark" / "methods.json"
    if not path.is_file():
        return
    times = json.loads(path.read_text(encoding="utf-8"))["methods"]
    for method in PROPOSED:
        ratio, lowest, highest = (times[method][key] for key in ("ratio", "lowest", "highest"))
        evidence = f"{ratio:.2f} of SupCon's time per step, median of 7 rounds"
        yield Case(METHODS[method], ratio <= 1.05, f"{evidence} ({lowest:.2f} to {highest:.2f})")


def judge_balanced_data(runs):
    for subset, method in itertools.product(runs.balanced_subsets(), PROPOSED):
        where = f"{subset_name(subset)}: {METHODS[method]}"
        members = runs.base(subset, method), runs.base(subset, "supcon")
        yield from compare(where, *members, not_lower)


def judge_margins(runs):
    for subset in runs.subsets:
        for margin, members in runs.changed(subset, "suppro", "margin").items():
            where = f"{subset_name(subset)}: margin 1 against {margin:g}"
            yield from compare(where, runs.base(subset, "suppro"), members, not_lower)


def judge_majority_supervision(runs):
    for subset in runs.subsets:
        shares = runs.changed(subset, "supmin", "majority_supervision")
        shares |= {1.0: runs.base(subset, "supcon")} if shares else {}
        for share, members in shares.items():
            where = f"{subset_name(subset)}: 0 against {share:g}" + " (SupCon)" * (share == 1)
            yield from compare(where, runs.base(subset, "supmin"), members, not_lower)


def judge_supervised_baselines(runs):
    for subset, method, other in itertools.product(runs.imbalanced_subsets(), PROPOSED, SUPERVISED):
        proposed, members = runs.base(subset, method), runs.base(subset, other)
        where = f"{subset_name(subset)}: {METHODS[method]} over {METHODS[other]}"
        for case in compare(where, proposed, members):
            # cRT re-trains the classifier of plain cross entropy.
            trained = runs.base(subset, "ce") if other == "crt" else members
            epochs = [str(next(iter(m.values()))["epochs"]) for m in (proposed, trained) if m]
            case.evidence += f"; {' and '.join(epochs)} epochs"
            yield case


def judge_early_numbers(runs):
    for subset in runs.subsets:
        yield from judge_alarm(runs, subset)
    for key, name in (("early_val_knn", "kNN accuracy"), ("early_val_cac", "CAC")):
        if not (losses := selection_losses(runs, key)):
            continue
        chosen, *fixed = np.array(losses).T
        best = int(np.argmin(np.mean(fixed, axis=1)))
        d = Difference(list(fixed[best] - chosen))
        evidence = (
            f"loses {np.mean(chosen):.1f} points to the best of the three; always "
            f"{METHODS[PROPOSED[best]]} loses {np.mean(fixed[best]):.1f}: {d}"
        )
        where = f"choice by the highest validation {name}"
        yield Case(where, is_higher(d), evidence, abs(d.mean))


def judge_alarm(runs, subset):
    """Test whether an early loss at its collapse value identifies the runs with low accuracy."""
    collapsed, others = [], []
    for method in ("supcon", "supmin"):
        for row in runs.base(subset, method).values():
            gap, accuracy = row.get("early_collapse_gap"), balanced_accuracy(row)
            if gap is not None and accuracy is not None:
                (collapsed if abs(gap) < COLLAPSE_GAP else others).append(accuracy)
    if min(len(collapsed), len(others)) < 3:
        return
    where = f"{subset_name(subset)}: a loss within {COLLAPSE_GAP} nats of its collapse value"
    evidence = (
        f"{len(collapsed)} such runs end at {min(collapsed):.1f} to {max(collapsed):.1f} %, "
        f"{len(others)} others at {min(others):.1f} to {max(others):.1f} %"
    )
    size = np.mean(others) - np.mean(collapsed)
    yield Case(f"{where} identifies the low runs", max(collapsed) < min(others), evidence, size)


def selection_losses(runs, key):
    """List the points that choices lose to the best of SupCon and the proposed losses.

    A row per subset and seed. Its first entry chooses the method with the highest early number,
    the others always take the same proposed loss.
    """
    losses = []
    for subset in runs.imbalanced_subsets():
        members = [runs.base(subset, method) for method in CONTRASTED]
        for seed in sorted(set.intersection(*(set(measured_values(rows)) for rows in members))):
            rows = [rows[seed] for rows in members]
            if all(row.get(key) is not None for row in rows):
                best = max(map(balanced_accuracy, rows))
                chosen = max(rows, key=lambda row: row[key])
                losses.append([best - balanced_accuracy(row) for row in (chosen, *rows[1:])])
    return losses


def judge_sampler(runs):
    for subset in runs.subsets:
        changed = runs.changed(subset, "supcon", "minority_per_batch")
        for minimum, members in changed.items():
            start = f"{subset_name(subset)}: SupCon with at least {minimum} per batch"
            yield from compare(
                f"{start}, over SupCon without", members, runs.base(subset, "supcon")
            )
            for method in PROPOSED:
                where = f"{start}, not below {METHODS[method]} without"
                yield from compare(where, members, runs.base(subset, method), not_lower)


NOT_LOWER = (
    f"is not below {{}} by a difference that counts. A difference that does not count may be at "
    f"most {TOLERANCE:g} points on average; beyond that the case is undecided."
)
CLAIMS = (
    Claim(
        "a",
        "SupCon's probe accuracy falls as imbalance grows, and at 1 % it collapses.",
        "Per data set: accuracy at the rarest ratio is below that at the most balanced one. At 1 % "
        "of minority: accuracy is below 60 %, by the probe on the run's own rows and by that on "
        "the 50-50 rows. By both, an untrained network of the same seed (where one was probed) "
        + NOT_LOWER.format("SupCon"),
        judge_collapse,
        "accuracy.png",
    ),
    Claim(
        "b",
        "SAA and CAC show the collapse; SAD, CAD, GPU and PEU do not.",
        f"Where at most {RARE_PERCENT:g} % are minority: SAA and CAC of SupCon are worse than "
        "those of both proposed losses, the other metrics are better. Worse is lower SAA, CAC and "
        "PEU, and higher SAD, CAD and GPU.",
        judge_metrics,
        "saa_cac.png",
    ),
    Claim(
        "c",
        "Supervised Minority and Supervised Prototypes repair it: up to 35 points above SupCon, "
        "up to 5 above the long-tail methods.",
        "At every ratio but 50-50: each of the two proposed losses is above SupCon and above an "
        "untrained network (where one was probed), by both probes. Each is above every long-tail "
        "method, too.",
        judge_proposed_losses,
        "accuracy.png",
    ),
    Claim(
        "d",
        "Supervised Minority is better on natural images, Supervised Prototypes on medical ones.",
        "Per data set and ratio but 50-50: their difference has the expected sign.",
        judge_domains,
        "accuracy.png",
    ),
    Claim(
        "e",
        "CAC predicts accuracy, R² > 0.6.",
        "R² of balanced accuracy on CAC (mean of the classes) over all contrastive runs of a data "
        "set. The slope is positive.",
        judge_cac,
        "cac_accuracy.png",
    ),
    Claim(
        "f",
        "Larger batches hurt SupCon.",
        "At an equal number of steps (to 15 %) and the same learning rate: the largest batch is "
        "below the smallest.",
        judge_batch_sizes,
        "ablations.png",
    ),
    Claim(
        "g",
        "The overhead of the two proposed losses is negligible.",
        "They take at most 1.05 times SupCon's time per step. The times are those of the benchmark "
        "(ResNet-18 at 32 px on a CPU), not of these runs.",
        judge_overhead,
        "",
    ),
    Claim(
        "h",
        "At 50-50 the two proposed losses cost nothing.",
        f"Each {NOT_LOWER.format('SupCon')}",
        judge_balanced_data,
        "accuracy.png",
    ),
    Claim(
        "i",
        "Open: is 0.5 (margin 1) the right threshold of the prototypes?",
        f"Margin 1 {NOT_LOWER.format('any other margin')}",
        judge_margins,
        "ablations.png",
    ),
    Claim(
        "j",
        "Open: is it best to leave the majority without supervision?",
        f"A supervised share of 0 {NOT_LOWER.format('any other share')}",
        judge_majority_supervision,
        "ablations.png",
    ),
    Claim(
        "k",
        "Open: are the two proposed losses better than supervised methods for imbalance "
        "(LDAM-DRW, cRT) at equal budget?",
        "Each of the two is above each of the supervised methods. These train for twice the "
        "epochs, since they see one view of an image where contrastive methods see two.",
        judge_supervised_baselines,
        "accuracy.png",
    ),
    Claim(
        "l",
        "Open: is there a number, early in training, that tells which method to use?",
        "The numbers are read at the first validation between a quarter and half of the training. "
        "SupCon or a proposed loss is chosen by a number, seed by seed (50-50 left out). That "
        "loses less to the best of the three than always taking the better proposed loss. Per data "
        "set and ratio: all runs of SupCon and Supervised Minority whose loss is at its collapse "
        "value end below all the others.",
        judge_early_numbers,
        "",
    ),
    Claim(
        "m",
        "Open: does a sampler that guarantees minority images change the picture?",
        "SupCon with the sampler is above SupCon without it. It also "
        + NOT_LOWER.format("either proposed loss without it"),
        judge_sampler,
        "ablations.png",
    ),
)


def verdict(cases):
    held = [case.holds for case in cases]
    if not cases:
        return "not run"
    if True in held:
        return "holds" if all(held) else "holds in part"
    return "does not hold here" if False in held else "not decided"


# results/README.md --------------------------------------------------------------------------------

HOW_TO_READ = """\
Numbers are balanced accuracy on the test split, mean ± standard deviation over seeds. There are
three seeds unless another n is given. The linear probe is trained on the run's own rows unless the
case says otherwise. Differences are between runs of the same seed. p is that of Student's t-test on
these pairs, two-sided, not corrected for the number of tests. A difference counts if p < 0.05 and
there are three pairs or more: with three seeds, only large and steady differences count. An
undecided case counts neither for a claim nor against it."""


def claims_markdown(rows, figures, command):
    """Return README.md: the table of claims, then the rule and the cases of each claim."""
    runs = Runs(rows)
    judged = [(claim, list(claim.judge(runs))) for claim in CLAIMS]
    lines = [
        TITLE,
        "",
        f"Generated by `{command}` from the logs of {len(runs.rows)} runs in",
        "[runs.jsonl](runs.jsonl); nothing is typed by hand. `python report.py --check results`",
        "compares. [report.md](report.md) has all tables, [results.csv](results.csv) all runs,",
        "[summary.csv](summary.csv) all means. `bash results/evidence.sh` makes the runs again,",
        "`bash results/evidence.sh f m` those for claims f and m.",
        "",
        *setting_table(runs),
        "",
        *claim_table(judged, figures),
        "",
        HOW_TO_READ,
    ]
    for claim, cases in judged:
        lines += ["", f"## {claim.letter}. {claim.text}", "", claim.rule, "", *case_table(cases)]
    lines += ["", "## Changed settings", "", "The brackets name what was changed. Below collapse:"]
    lines += ["the loss of embeddings that are all equal, minus the final loss, in nats."]
    lines += changed_tables(runs)
    names = ["ablations", "metrics", "accuracy", "saa_cac", "cac_accuracy"]
    names = [name for name in names if f"{name}.png" in figures]
    lines += ["", "## Figures", "", FIGURE_CAPTION] if names else []
    for name in names:
        lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def claim_table(judged, figures):
    """Return the table of all claims: verdict, largest cases, figure, command."""
    rows = []
    for claim, cases in judged:
        command = f"bash results/evidence.sh {claim.letter}"
        if claim.letter == "g":
            command = "python -m benchmarks methods --out results/benchmark"
        has_figure = cases and claim.figure in figures
        figure = f"[{claim.figure}]({claim.figure})" if has_figure else "-"
        result = f"**{verdict(cases)}**"
        rows.append([claim.letter, claim.text, result, summary(cases), figure, f"`{command}`"])
    header = ["", "claim", "verdict", "evidence", "figure", "command"]
    return markdown_table(header, rows, text_columns=6)


def summary(cases):
    """Count the cases for and against, and show the one of each with the largest difference."""
    texts = []
    for word, holds in (("for it", True), ("against it", False), ("undecided", None)):
        members = [case for case in cases if case.holds is holds]
        if members:
            largest = max(members, key=lambda case: case.size)
            is_shown = holds is not None or not texts
            example = f" ({largest.where}: {largest.evidence})" if is_shown else ""
            texts.append(f"{len(members)} {word}{example}")
    return "; ".join(texts) or "-"


def case_table(cases):
    words = {True: "yes", False: "no", None: "undecided"}
    rows = [[case.where, words[case.holds], case.evidence] for case in cases]
    return markdown_table(["case", "holds", "measured"], rows, 3) if cases else ["Not run."]


def setting_table(runs):
    """List what the base runs were made with, a row per data set."""
    titles = ("network", "pixels", "epochs", "batch", "learning rate", "test images", "seeds")
    keys = ("arch", "size", "epochs", "batch_size", "lr", "test_images", "seed")
    table = []
    for dataset in runs.datasets:
        rows = [row for row in runs.rows if row["dataset"] == dataset]
        base = [row for row in rows if row["label"] in METHODS and row["kind"] == "contrastive"]
        if base:
            values = [*([row.get(key) for row in base] for key in keys)]
            values += [[row.get(key) for row in rows] for key in ("device", "commit")]
            texts = [", ".join(sorted({str(v) for v in column})) for column in values]
            table.append([dataset, *texts])
    return markdown_table(["data set", *titles, "device", "commits"], table, text_columns=10)


CHANGED_COLUMNS = {
    "balanced accuracy (%)": (balanced_accuracy, 1),
    "50-50 probe (%)": (balanced_probe_accuracy, 1),
    "SAA (%)": (class_mean("saa"), 1),
    "CAC (%)": (class_mean("cac"), 1),
    "SAD": (class_mean("sad"), 2),
    "CAD": (class_mean("cad"), 2),
    "GPU": (class_mean("gpu"), 2),
    "PEU (%)": (class_mean("peu"), 1),
    "below collapse": (collapse_gap, 3),
}


def changed_tables(runs):
    """List, per subset, methods with changed settings beside their base runs, and the floor."""
    lines = []
    for subset in runs.subsets:
        rows = runs.rows_of(subset)
        changed = {row["method"] for row in rows if row["label"] != row["method"]}
        if any(row["method"] == "untrained" for row in rows):
            changed |= {"untrained", "supcon"}
        rows = [row for row in rows if row["kind"] == "contrastive" and row["method"] in changed]
        table = []
        for label in dict.fromkeys(row["label"] for row in rows):
            members = runs.base(subset, label)
            cells = [
                mean_text(members, value, "", digits).split(" (n")[0].replace("not run", "-")
                for value, digits in CHANGED_COLUMNS.values()
            ]
            table.append([label, str(len(members)), *cells])
        if table:
            header = ["method", "n", *CHANGED_COLUMNS]
            lines += ["", f"{subset_name(subset)}:", "", *markdown_table(header, table)]
    return lines


# figures ------------------------------------------------------------------------------------------


def plan_claim_figures(groups):
    """Return {file name: function that draws it, or returns None without a value}."""
    runs = Runs([row for group in groups for row in group.rows])
    return {
        "ablations.png": lambda: ablations_figure(runs),
        "metrics.png": lambda: metrics_figure(runs),
    }


def ablations_figure(runs):
    """Draw balanced accuracy against what was varied: a panel each, a line per method."""
    varied = {
        "batch size, equal steps": ("batch_size", CONTRASTED),
        "margin of the prototypes": ("margin", ("suppro",)),
        "supervised share of the majority": ("majority_supervision", ("supmin",)),
        "minority images per batch, at least": ("minority_per_batch", CONTRASTED),
    }
    panels = {title: ablation_lines(runs, *options) for title, options in varied.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure, axes = panel_grid([3.8] * len(panels), len(panels), 4.2)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        styles = zip(itertools.cycle("osX^Dv"), itertools.cycle(("-", "--", "-.", ":")))
        for (name, points), (marker, line) in zip(lines.items(), styles, strict=False):
            stds = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in points.values()]
            means = [np.mean(v) for v in points.values()]
            looks = {"marker": marker, "ls": line, "color": "black", "mfc": "white", "capsize": 3}
            ax.errorbar(list(points), means, stds, label=name, **looks)
            for x, values in points.items():
                ax.plot([x] * len(values), values, ".", color="0.5", ms=4)
        if title.startswith("batch"):
            ax.set_xscale("log", base=2)
        ax.set(title=title, ylabel="balanced test accuracy (%)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return figure


def ablation_lines(runs, key, methods):
    """Return {name: {value of the setting: balanced accuracies}} with the base runs among them."""
    base_value = {"margin": 1.0, "majority_supervision": 0.0, "minority_per_batch": 0}
    lines = {}
    for subset, method in itertools.product(runs.subsets, methods):
        if key == "batch_size":
            found = runs.batch_sizes(subset, method)
        elif found := runs.changed(subset, method, key):
            found[base_value[key]] = runs.base(subset, method)
            if key == "majority_supervision":
                found[1.0] = runs.base(subset, "supcon")
        points = {float(x): list(measured_values(found[x]).values()) for x in sorted(found)}
        points = {x: values for x, values in points.items() if values}
        if len(points) > 1:
            lines[f"{method}, {subset_name(subset)}"] = points
    return lines


def metrics_figure(runs):
    """Draw how much of the variance of balanced accuracy each metric explains: R² as bars."""
    panels = {}
    for title, rows in runs.contrastive_by_dataset():
        fits = {key: fit_metric(rows, key) for key in METRICS}
        fits = {key: fit for key, fit in fits.items() if fit and fit[2] >= MIN_RUNS_FOR_LINE}
        if fits:
            panels[title] = fits
    if not panels:
        return None
    figure, axes = panel_grid([3.2] * len(panels), len(panels), 3.2)
    for ax, (title, fits) in zip(axes, panels.items(), strict=True):
        if ax is not axes[0]:
            ax.sharey(axes[0])
        slopes = {key: fits.get(key, (0, 0, 0)) for key in METRICS}
        heights = [np.sign(slope) * r2 for slope, r2, _ in slopes.values()]
        colours = ["0.25" if key in ("saa", "cac") else "0.8" for key in METRICS]
        ax.bar(list(METRICS.values()), heights, color=colours, edgecolor="black", lw=0.7)
        ax.axhline(0, color="black", lw=0.8)
        ax.axhline(0.6, color="black", lw=0.8, ls=":")
        n = max(fit[2] for fit in fits.values())
        ax.set_title(textwrap.fill(f"{title}, n = {n}", 30), fontsize=10)
        ax.set(ylabel="R², with the sign of the slope")
    return figure
