"""The paper's claims and the questions it leaves open, each judged by the runs of a report.

    python report.py runs/evidence --claims --out results      README.md: a verdict for every claim; ablations.png, metrics.png

A claim is a rule: a function from the runs to cases, each for it, against it, or undecided. All of them for it: it holds; some: it holds in part;
none, and some against it: it does not hold here. Every number is computed from the runs (but those of claim g, from the kit's benchmark). Runs
are paired by their seed, and a difference counts where there are three pairs or more and Student's t-test on them gives p < 0.05, two-sided, not
corrected for the number of tests.
"""

import itertools
import json
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROPOSED = {"supmin": "Supervised Minority", "suppro": "Supervised Prototypes"}
LONG_TAIL = {"kcl": "KCL", "tsc": "TSC", "sbcl": "SBC", "bcl": "BCL", "paco": "PaCo"}
SUPERVISED = {
    "ldam_drw": "LDAM-DRW",
    "crt": "cRT",
    "weighted_ce": "weighted CE",
    "focal": "focal loss",
    "logit_adjusted": "logit adjustment",
}
NATURAL = ("inat21-plants", "inat21-insects", "inat21-mammals", "inat21", "fashionmnist")
MEDICAL = ("breastmnist", "pneumoniamnist", "fracatlas", "infarction", "chestxray224")
METRICS = {"saa": "SAA", "cac": "CAC", "sad": "SAD", "cad": "CAD", "gpu": "GPU", "peu": "PEU"}
WORSE = {
    "saa": -1,
    "cac": -1,
    "sad": 1,
    "cad": 1,
    "gpu": 1,
    "peu": -1,
}  # sign of a change that a reader of the metric takes for worse
TITLE = "# The paper's claims, measured"
SAME = 2.0  # points of balanced accuracy that "costs nothing" may cost
RARE = 5.0  # percent of minority, at most, that is called rare
COLLAPSED = 0.1  # nats below the collapse value, as pretrain.py warns


@dataclass
class Case:
    where: str
    holds: bool | None  # None: the runs do not decide it
    evidence: str
    size: float = 0.0  # of the difference, points: the largest is told first


@dataclass
class Claim:
    letter: str
    text: str
    rule: str
    cases: callable  # Runs -> [Case]
    figure: str


class Runs:
    """Finished runs, scored as the scripts do by default, no smoke runs. Base runs have no setting of their own: their label is the method's name."""

    def __init__(self, rows):
        self.rows = [
            row
            for row in rows
            if row["state"] == "finished"
            and row.get("probe_protocol", "cached") == "cached"
            and row.get("metrics_neighborhood", 0.05) == 0.05
            and row.get("encoder_seed", row["seed"]) == row["seed"]
            and not any(
                row.get(key) for key in ("smoke", "probe_smoke", "metrics_smoke", "finetune_smoke")
            )
        ]
        self.places = list(dict.fromkeys((row["dataset"], row["ratio"]) for row in self.rows))
        self.share = {(row["dataset"], row["ratio"]): row["minority_percent"] for row in self.rows}

    def base(self, dataset, ratio, method):
        """{seed: row}"""
        return {
            row["seed"]: row
            for row in self.rows
            if (row["dataset"], row["ratio"], row["label"]) == (dataset, ratio, method)
        }

    def changed(self, dataset, ratio, method, *keys):
        """{value of keys[0]: {seed: row}} of runs that differ from the base in it, and in nothing else but the other keys."""
        base = next(iter(self.base(dataset, ratio, method).values()), None)
        found = {}
        for row in self.rows:
            if base and (row["dataset"], row["ratio"], row["method"]) == (dataset, ratio, method):
                own, usual = (json.loads(r["settings"]) for r in (row, base))
                apart = {key for key in {*own, *usual} if own.get(key) != usual.get(key)}
                if (
                    keys[0] in apart
                    and apart <= {*keys}
                    and isinstance(row.get(keys[0]), (int, float))
                ):
                    found.setdefault(row[keys[0]], {})[row["seed"]] = row
        return dict(sorted(found.items()))

    def untrained(self, dataset, ratio):
        """{seed: row} of networks with the weights they began with: SupCon's, one epoch at learning rate 0, which sets batch norm's statistics."""
        return self.changed(dataset, ratio, "supcon", "lr", "epochs").get(0, {})

    def lengths(self, dataset, ratio):
        """{"": {method: {seed: row}}, ", 64 epochs": ...} of SupCon and the repairs: base runs, and those with another number of epochs."""
        found = {
            "": {method: self.base(dataset, ratio, method) for method in ("supcon", *PROPOSED)}
        }
        for method in ("supcon", *PROPOSED):
            for epochs, rows in self.changed(
                dataset, ratio, method, "epochs", "warmup_epochs"
            ).items():
                found.setdefault(f", {epochs} epochs", defaultdict(dict))[method] = rows
        return found

    def rare(self):
        return [
            place
            for place in self.places
            if self.share[place] is not None and self.share[place] <= RARE
        ]

    def imbalanced(self):
        return [
            place for place in self.places if self.share[place] is None or self.share[place] < 45
        ]

    def balanced(self):
        return [
            place
            for place in self.places
            if self.share[place] is not None and self.share[place] >= 45
        ]


def subset_name(place):
    return " ".join(place)


def balanced_accuracy(row):
    """Balanced test accuracy in percent: of the linear probe, or of a supervised network itself. None if not measured."""
    value = row.get(
        f"{'probe' if row['kind'] == 'contrastive' else 'finetune'}_test_balanced_accuracy"
    )
    return None if value is None else 100 * value


def balanced_probe(row):
    """The same of the probe that is trained on the data set's 50-50 rows, whatever the run was trained on."""
    value = row.get("probe_test_balanced_train_balanced_accuracy")
    return None if value is None else 100 * value


PROBES = {
    balanced_accuracy: "",
    balanced_probe: ", probe trained on the 50-50 rows",
}  # the paper leaves open which rows its probe is trained on


def metric(key):
    """Mean of the classes at the projection."""

    def value(row):
        pair = row.get(f"{key}_minority"), row.get(f"{key}_majority")
        return float(np.mean(pair)) if all(isinstance(v, (int, float)) for v in pair) else None

    return value


def measured_values(members, value=balanced_accuracy):
    """The measured values of {seed: row}, by seed."""
    found = {seed: value(row) for seed, row in members.items()}
    return {seed: v for seed, v in found.items() if v is not None and math.isfinite(v)}


def mean_text(members, value=balanced_accuracy, unit=" %", digits=1):
    values = list(measured_values(members, value).values())
    if not values:
        return "not run"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{round(np.mean(values), digits) + 0.0:.{digits}f}{spread}{unit}" + (
        "" if len(values) == 3 else f" (n {len(values)})"
    )


@dataclass
class Difference:
    """Of two methods over the seeds that both have, in points."""

    values: list

    @property
    def mean(self):
        return float(np.mean(self.values))

    @property
    def p(self):
        """Two-sided, of the t-test on the pairs; None for one pair."""
        from scipy.stats import ttest_1samp

        if len(self.values) < 2:
            return None
        if np.ptp(self.values) < 1e-9:
            return 1.0 if abs(self.mean) < 1e-9 else 0.0
        return float(ttest_1samp(self.values, 0).pvalue)

    @property
    def sign(self):
        """1 or -1 where the difference counts, else 0."""
        return 0 if len(self.values) < 3 or self.p >= 0.05 else int(np.sign(self.mean))

    def __str__(self):
        spread = f" ± {np.std(self.values, ddof=1):.1f}" if len(self.values) > 1 else ""
        p = "" if self.p is None else f", p {self.p:.3f}" if self.p >= 0.001 else ", p < 0.001"
        return f"{self.mean:+.1f}{spread} points (n {len(self.values)}{p})"


def difference(a, b, value=balanced_accuracy):
    """a minus b; None without a common seed."""
    a, b = measured_values(a, value), measured_values(b, value)
    common = sorted(a.keys() & b.keys())
    return Difference([a[seed] - b[seed] for seed in common]) if common else None


def is_higher(difference):
    """True, False, or None where it is not decided."""
    return {1: True, -1: False, 0: None}[difference.sign]


def not_lower(difference):
    """Not lower by a difference that counts, nor by SAME points on average (which alone decides nothing)."""
    if difference.sign or len(difference.values) < 3:
        return is_higher(difference)
    return True if difference.mean > -SAME else None


# ------------------------------------------------------------------------------------------------------------------
# the claims: Runs -> cases
# ------------------------------------------------------------------------------------------------------------------


def judge_collapse(runs):
    cases = []
    for dataset in dict.fromkeys(dataset for dataset, _ in runs.places):
        places = sorted(
            (
                place
                for place in runs.places
                if place[0] == dataset
                and runs.share[place]
                and measured_values(runs.base(*place, "supcon"))
            ),
            key=lambda place: -runs.share[place],
        )
        if len(places) > 1:
            text = ", ".join(
                f"{ratio} {mean_text(runs.base(dataset, ratio, 'supcon'))}" for _, ratio in places
            )
            if fall := difference(
                runs.base(*places[0], "supcon"), runs.base(*places[-1], "supcon")
            ):
                cases.append(
                    Case(
                        f"{dataset}: falls",
                        is_higher(fall),
                        f"{text}: from the first to the last {fall}",
                        abs(fall.mean),
                    )
                )
        for place in places:
            if runs.share[place] <= 1:
                rows = runs.base(*place, "supcon")
                gap = mean_text(rows, lambda row: row.get("last_collapse_gap"), " nats", 3)
                for value, on in PROBES.items():
                    if known := list(measured_values(rows, value).values()):
                        cases.append(
                            Case(
                                f"{dataset} {place[1]}: collapses (below 60 %){on}",
                                bool(np.mean(known) < 60) if len(known) > 2 else None,
                                f"{mean_text(rows, value)}, loss below its collapse value by {gap}",
                            )
                        )
                    if d := difference(untrained := runs.untrained(*place), rows, value):
                        cases.append(
                            Case(
                                f"{subset_name(place)}: no better than untrained{on}",
                                not_lower(d),
                                f"untrained {mean_text(untrained, value)} against {mean_text(rows, value)}: {d}",
                                abs(d.mean),
                            )
                        )
    return cases


def judge_metrics(runs):
    cases = []
    for place in runs.rare():
        for length, members in runs.lengths(*place).items():
            for key, name in METRICS.items():
                repaired = [
                    d
                    for method in PROPOSED
                    if (d := difference(members["supcon"], members[method], metric(key)))
                ]
                if repaired:
                    signs = {d.sign * WORSE[key] for d in repaired}
                    shown = True if signs == {1} else False if signs == {-1} else None
                    means = ", ".join(
                        f"{mean_text(members[method], metric(key), '', 2)} {label}"
                        for method, label in {"supcon": "SupCon", **PROPOSED}.items()
                    )
                    cases.append(
                        Case(
                            f"{subset_name(place)}{length}: {name} {'shows it' if key in ('saa', 'cac') else 'does not show it'}",
                            shown if key in ("saa", "cac") or shown is None else not shown,
                            means,
                        )
                    )
    return cases


def judge_proposed_losses(runs):
    cases = []
    for place in runs.imbalanced():
        for length, members in runs.lengths(*place).items():
            others = {"SupCon": members["supcon"], "an untrained network": runs.untrained(*place)}
            for (method, name), (other, rows), (value, on) in itertools.product(
                PROPOSED.items(), others.items(), PROBES.items()
            ):
                if d := difference(members[method], rows, value):
                    cases.append(
                        Case(
                            f"{subset_name(place)}{length}: {name} over {other}{on}",
                            is_higher(d),
                            f"{mean_text(members[method], value)} against {mean_text(rows, value)}: {d}",
                            abs(d.mean),
                        )
                    )
        for (method, name), (other, label) in itertools.product(
            PROPOSED.items(), LONG_TAIL.items()
        ):
            if d := difference(runs.base(*place, method), runs.base(*place, other)):
                cases.append(
                    Case(
                        f"{subset_name(place)}: {name} over {label}",
                        is_higher(d),
                        f"{mean_text(runs.base(*place, method))} against {mean_text(runs.base(*place, other))}: {d}",
                        abs(d.mean),
                    )
                )
    return cases


def judge_domains(runs):
    cases = []
    for place in runs.imbalanced():
        d = difference(runs.base(*place, "supmin"), runs.base(*place, "suppro"))
        if d and place[0] in (*NATURAL, *MEDICAL):
            natural = place[0] in NATURAL
            cases.append(
                Case(
                    f"{subset_name(place)}, {'natural: Supervised Minority' if natural else 'medical: Supervised Prototypes'} ahead",
                    None if not d.sign else (d.sign > 0) == natural,
                    f"Supervised Minority minus Supervised Prototypes: {d}",
                    abs(d.mean),
                )
            )
    return cases


def judge_cac(runs):
    cases = []
    for title, rows in contrastive_rows_by_dataset(runs):
        r2 = {key: fit_line(rows, key) for key in METRICS}
        if r2["cac"]:
            others = ", ".join(
                f"{METRICS[key]} {value[1]:.2f}"
                for key, value in r2.items()
                if key != "cac" and value
            )
            slope, share, n = r2["cac"]
            cases.append(
                Case(
                    title,
                    share > 0.6 and slope > 0,
                    f"R² {share:.2f} over {n} runs (the others: {others})",
                )
            )
    return cases


def contrastive_rows_by_dataset(runs):
    """(title, contrastive runs) of all data sets with one, and of all together where they are several."""
    rows = [row for row in runs.rows if row["kind"] == "contrastive"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    return [
        (dataset, [row for row in rows if row["dataset"] == dataset]) for dataset in datasets
    ] + ([("all runs", rows)] if len(datasets) > 1 else [])


def fit_line(rows, key):
    """(slope, R², n) of balanced accuracy on a metric, by least squares; None for fewer than 8 runs or equal values."""
    pairs = [(metric(key)(row), balanced_accuracy(row)) for row in rows]
    x, y = np.array(
        [pair for pair in pairs if None not in pair and np.isfinite(pair).all()] or [(0, 0)],
        dtype=float,
    ).T
    if len(x) < 8 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1] ** 2), len(x)


def judge_batch_sizes(runs):
    cases = []
    for place in runs.places:
        for method in ("supcon", *PROPOSED):
            sizes = runs_by_batch_size(runs, place, method)
            if len(sizes) > 1 and (
                d := difference(list(sizes.values())[-1], list(sizes.values())[0])
            ):
                text = ", ".join(f"{size}: {mean_text(rows)}" for size, rows in sizes.items())
                cases.append(
                    Case(
                        f"{subset_name(place)}, {method}",
                        None if not d.sign else d.sign < 0,
                        f"batch {text}; largest minus smallest {d}",
                        abs(d.mean),
                    )
                )
    return cases


def runs_by_batch_size(runs, place, method):
    """{batch size: {seed: row}} of runs with as many steps as the base, to 15 %; empty without another size."""
    sizes, base = (
        runs.changed(*place, method, "batch_size", "epochs", "warmup_epochs"),
        runs.base(*place, method),
    )
    if not sizes:
        return {}
    usual = next(iter(base.values()))
    sizes[usual["batch_size"]] = base
    return {
        size: sizes[size]
        for size in sorted(sizes)
        if all(
            abs(row["epochs"] / size * usual["batch_size"] / usual["epochs"] - 1) < 0.15
            for row in sizes[size].values()
        )
    }


def judge_overhead(runs):
    path = Path(__file__).parents[1] / "results" / "benchmark" / "methods.json"
    if not path.is_file():
        return []
    times = json.loads(path.read_text(encoding="utf-8"))["methods"]
    return [
        Case(
            name,
            times[method]["ratio"] <= 1.05,
            f"{times[method]['ratio']:.2f} of SupCon's time per step, median of 7 rounds "
            f"({times[method]['lowest']:.2f} to {times[method]['highest']:.2f})",
        )
        for method, name in PROPOSED.items()
    ]


def judge_balanced_data(runs):
    cases = []
    for place in runs.balanced():
        for method, name in PROPOSED.items():
            if d := difference(runs.base(*place, method), runs.base(*place, "supcon")):
                cases.append(
                    Case(
                        f"{subset_name(place)}: {name}",
                        not_lower(d),
                        f"{mean_text(runs.base(*place, method))} against {mean_text(runs.base(*place, 'supcon'))}: {d}",
                        abs(d.mean),
                    )
                )
    return cases


def judge_margins(runs):
    return [
        Case(
            f"{subset_name(place)}: margin 1 against {value:g}",
            not_lower(d),
            f"{mean_text(runs.base(*place, 'suppro'))} against {mean_text(rows)}: {d}",
            abs(d.mean),
        )
        for place in runs.places
        for value, rows in runs.changed(*place, "suppro", "margin").items()
        if (d := difference(runs.base(*place, "suppro"), rows))
    ]


def judge_majority_supervision(runs):
    cases = []
    for place in runs.places:
        shares = runs.changed(*place, "supmin", "majority_supervision")
        shares |= {1.0: runs.base(*place, "supcon")} if shares else {}
        for value, rows in shares.items():
            if d := difference(runs.base(*place, "supmin"), rows):
                cases.append(
                    Case(
                        f"{subset_name(place)}: 0 against {value:g}"
                        + (" (SupCon)" if value == 1 else ""),
                        not_lower(d),
                        f"{mean_text(runs.base(*place, 'supmin'))} against {mean_text(rows)}: {d}",
                        abs(d.mean),
                    )
                )
    return cases


def judge_supervised_baselines(runs):
    cases = []
    for place in runs.imbalanced():
        for (method, name), (other, label) in itertools.product(
            PROPOSED.items(), SUPERVISED.items()
        ):
            repaired, rows = runs.base(*place, method), runs.base(*place, other)
            if d := difference(repaired, rows):
                trained = (repaired, runs.base(*place, "ce") if other == "crt" else rows)
                epochs = " and ".join(
                    str(next(iter(members.values()))["epochs"]) for members in trained if members
                )
                cases.append(
                    Case(
                        f"{subset_name(place)}: {name} over {label}",
                        is_higher(d),
                        f"{mean_text(repaired)} against {mean_text(rows)}: {d}; {epochs} epochs",
                        abs(d.mean),
                    )
                )
    return cases


def judge_early_numbers(runs):
    """Choosing among SupCon and the repairs by a number read early in training, against always taking the same repair; and the collapse as an alarm."""
    lost, cases = (
        defaultdict(list),
        [],
    )  # by number: (points lost by its choice, points lost by each repair)
    for place in runs.places:
        members = {method: runs.base(*place, method) for method in ("supcon", *PROPOSED)}
        for seed in (
            sorted(set.intersection(*(set(measured_values(rows)) for rows in members.values())))
            if place in runs.imbalanced()
            else ()
        ):
            rows = [members[method][seed] for method in members]
            top = max(map(balanced_accuracy, rows))
            for key, name in (
                ("early_val_knn", "highest kNN accuracy"),
                ("early_val_cac", "highest CAC"),
            ):
                if all(row.get(key) is not None for row in rows):
                    lost[name].append(
                        (
                            top - balanced_accuracy(max(rows, key=lambda row: row[key])),
                            *(top - balanced_accuracy(row) for row in rows[1:]),
                        )
                    )
        told, others = [], []
        for row in (row for method in ("supcon", "supmin") for row in members[method].values()):
            if row.get("early_collapse_gap") is not None and balanced_accuracy(row) is not None:
                (told if abs(row["early_collapse_gap"]) < COLLAPSED else others).append(
                    balanced_accuracy(row)
                )
        if len(told) > 2 and len(others) > 2:
            cases.append(
                Case(
                    f"{subset_name(place)}: the loss within {COLLAPSED} nats of its collapse value foretells the lower runs",
                    max(told) < min(others),
                    f"{len(told)} runs told end at {min(told):.1f} to {max(told):.1f} %, "
                    f"{len(others)} others at {min(others):.1f} to {max(others):.1f} %",
                    np.mean(others) - np.mean(told),
                )
            )
    for name, choices in lost.items():
        chosen, *fixed = np.array(choices).T
        least = int(np.argmin(np.mean(fixed, axis=1)))
        d = Difference(list(fixed[least] - chosen))
        cases.append(
            Case(
                f"choice by the {name} of validation",
                is_higher(d),
                f"loses {np.mean(chosen):.1f} points to the best of the three, always "
                f"{list(PROPOSED.values())[least]} loses {np.mean(fixed[least]):.1f}: {d}",
                abs(d.mean),
            )
        )
    return cases


def judge_sampler(runs):
    cases = []
    for place in runs.places:
        for value, rows in runs.changed(*place, "supcon", "minority_per_batch").items():
            if d := difference(rows, runs.base(*place, "supcon")):
                cases.append(
                    Case(
                        f"{subset_name(place)}: SupCon with {value} at least per batch, over SupCon without",
                        is_higher(d),
                        f"{mean_text(rows)} against {mean_text(runs.base(*place, 'supcon'))}: {d}",
                        abs(d.mean),
                    )
                )
            for method, name in PROPOSED.items():
                if d := difference(rows, runs.base(*place, method)):
                    cases.append(
                        Case(
                            f"{subset_name(place)}: and as good as {name} without",
                            not_lower(d),
                            f"{mean_text(rows)} against {mean_text(runs.base(*place, method))}: {d}",
                            abs(d.mean),
                        )
                    )
    return cases


CLAIMS = (
    Claim(
        "a",
        "SupCon's probe accuracy falls as imbalance grows, and at 1 % it collapses.",
        "Per data set: lower at its rarest ratio than at its most balanced one; at 1 % of minority below 60 %, and less than 2 points above an "
        "untrained network of the same seed (where one was probed), by the probe on the run's own rows and by that on the 50-50 rows.",
        judge_collapse,
        "accuracy.png",
    ),
    Claim(
        "b",
        "SAA and CAC show the collapse; SAD, CAD, GPU and PEU do not.",
        f"Where at most {RARE:g} % are minority: SupCon's metric is worse than that of both repairs (SAA, CAC), or better (the others). "
        "Worse is lower SAA, CAC and PEU, higher SAD, CAD and GPU.",
        judge_metrics,
        "saa_cac.png",
    ),
    Claim(
        "c",
        "Supervised Minority and Supervised Prototypes repair it: up to 35 points above SupCon, up to 5 above the long-tail methods.",
        "At every ratio but 50-50: each repair above SupCon, above an untrained network (where one was probed), by both probes, and above each "
        "long-tail method.",
        judge_proposed_losses,
        "accuracy.png",
    ),
    Claim(
        "d",
        "Supervised Minority is better on natural images, Supervised Prototypes on medical ones.",
        "Per data set and ratio but 50-50: the sign of their difference.",
        judge_domains,
        "accuracy.png",
    ),
    Claim(
        "e",
        "CAC predicts accuracy, R² > 0.6.",
        "R² of balanced accuracy on CAC (mean of the classes), all contrastive runs of a data set, and slope > 0.",
        judge_cac,
        "cac_accuracy.png",
    ),
    Claim(
        "f",
        "Larger batches hurt SupCon.",
        "At an equal number of steps (to 15 %) and the same learning rate: the largest batch below the smallest.",
        judge_batch_sizes,
        "ablations.png",
    ),
    Claim(
        "g",
        "The overhead of the repairs is negligible.",
        "At most 1.05 of SupCon's time per step, as the kit's benchmark has it (ResNet-18 at 32 px on a CPU, not these runs).",
        judge_overhead,
        "",
    ),
    Claim(
        "h",
        "At 50-50 the repairs cost nothing.",
        f"Not lower than SupCon by a difference that counts, nor by {SAME:g} points on average (that alone: undecided).",
        judge_balanced_data,
        "accuracy.png",
    ),
    Claim(
        "i",
        "Open: is 0.5 (margin 1) the right threshold of the prototypes?",
        f"Margin 1 is not below another by a difference that counts, nor by {SAME:g} points on average (that alone: undecided).",
        judge_margins,
        "ablations.png",
    ),
    Claim(
        "j",
        "Open: is it best to leave the majority without supervision?",
        f"A share of 0 is not below another by a difference that counts, nor by {SAME:g} points on average (that alone: undecided).",
        judge_majority_supervision,
        "ablations.png",
    ),
    Claim(
        "k",
        "Open: are the repairs better than supervised methods for imbalance (LDAM-DRW, cRT) at equal budget?",
        "Each repair above each of them. Equal budget: twice the epochs, since a supervised network sees one view of an image.",
        judge_supervised_baselines,
        "accuracy.png",
    ),
    Claim(
        "l",
        "Open: is there a number, early in training, that tells which method to use?",
        "Read at the first look between a quarter and half of the training. Choosing SupCon or a repair by it, seed by seed, loses less, against "
        "the best of the three, than always taking the better repair (50-50 left out); and, per data set and ratio, all runs of SupCon and "
        "Supervised Minority whose loss sits on its collapse value end below all the others.",
        judge_early_numbers,
        "",
    ),
    Claim(
        "m",
        "Open: does a sampler that guarantees minority images change the picture?",
        f"SupCon with it is above SupCon without, and below neither repair without it by a difference that counts, nor by {SAME:g} points on "
        "average (that alone: undecided).",
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


# ------------------------------------------------------------------------------------------------------------------
# results/README.md
# ------------------------------------------------------------------------------------------------------------------


def markdown(rows, figures, command):
    """README.md: the claims table, then every claim with its rule and cases, and all changed settings."""
    runs = Runs(rows)
    judged = [(claim, claim.cases(runs)) for claim in CLAIMS]
    lines = [
        TITLE,
        "",
        f"Generated by `{command}` from [runs.jsonl](runs.jsonl), the logs of {len(runs.rows)} runs; nothing here is typed by hand, and "
        "`python report.py --check results` compares. All tables: [report.md](report.md); all values: [results.csv](results.csv), "
        "[summary.csv](summary.csv). The runs again: `bash run_all.sh evidence`, or those for some claims: `bash run_all.sh evidence f m`.",
        "",
        *setting_lines(runs),
        "",
        "| | claim | verdict | evidence | figure | command |",
        "|---|---|---|---|---|---|",
    ]
    for claim, cases in judged:
        figure = f"[{claim.figure}]({claim.figure})" if cases and claim.figure in figures else "-"
        again = (
            f"`bash run_all.sh evidence {claim.letter}`"
            if claim.letter != "g"
            else "`python benchmark.py methods --out results/benchmark`"
        )
        lines.append(
            f"| {claim.letter} | {claim.text} | **{verdict(cases)}** | {summary(cases)} | {figure} | {again} |"
        )
    lines += [
        "",
        "Balanced accuracy on the test split, mean ± standard deviation over seeds (three unless another n is given), linear probe on the "
        "run's own rows where nothing else is said. Differences are of pairs with the same seed, p by Student's t-test on the pairs, two-sided, "
        "not corrected for the number of tests: with three seeds, only large and steady differences count. An undecided case counts "
        "neither for a claim nor against it.",
    ]
    for claim, cases in judged:
        lines += ["", f"## {claim.letter}. {claim.text}", "", claim.rule, ""]
        if cases:
            lines += ["| case | | measured |", "|---|---|---|"]
            lines += [
                f"| {case.where} | {({True: 'yes', False: 'no', None: 'undecided'})[case.holds]} | {case.evidence} |"
                for case in cases
            ]
        else:
            lines += ["Not run."]
    lines += [
        "",
        "## Changed settings",
        "",
        "What sets these runs apart from the others stands in brackets. Last column: nats by which the loss ends "
        "below the value of embeddings that are all equal.",
        *changed_lines(runs),
    ]
    shown = [
        name
        for name in (
            "ablations.png",
            "metrics.png",
            "accuracy.png",
            "saa_cac.png",
            "cac_accuracy.png",
        )
        if name in figures
    ]
    made_with = {
        row["dataset"]: f"{row['dataset']} {row['arch']}, {row['size']} px, {row['epochs']} epochs"
        for row in runs.rows
        if row["kind"] == "contrastive" and row["label"] == row["method"]
    }
    caption = f"*{'; '.join(made_with.values())}; other settings as the legend says*\n"
    pictures = [
        line for name in shown for line in (f"![{name.removesuffix('.png')}]({name})\n", caption)
    ]
    return "\n".join([*lines, "", "## Figures", "", *pictures]).rstrip() + "\n"


def summary(cases):
    """How many cases are for the claim and against it, and of either the one with the largest difference."""
    if not cases:
        return "-"
    told = []
    for word, value in (("for it", True), ("against it", False), ("undecided", None)):
        some = sorted((case for case in cases if case.holds is value), key=lambda case: -case.size)
        told += (
            [
                f"{len(some)} {word}"
                + (
                    f", {some[0].where}: {some[0].evidence}"
                    if value is not None or not told
                    else ""
                )
            ]
            if some
            else []
        )
    return "; ".join(told)


def setting_lines(runs):
    """What the numbers were made with: a line per data set."""
    lines = []
    for dataset in dict.fromkeys(dataset for dataset, _ in runs.places):
        rows = [
            row
            for row in runs.rows
            if row["dataset"] == dataset
            and row["kind"] == "contrastive"
            and row["label"] == row["method"]
        ]
        if rows:
            names = {
                "arch": "network",
                "size": "pixels",
                "epochs": "epochs",
                "batch_size": "batch",
                "lr": "learning rate",
                "device": "device",
            }
            commits = dict.fromkeys(
                str(row.get("commit")) for row in runs.rows if row["dataset"] == dataset
            )
            said = [
                f"{name} {', '.join(dict.fromkeys(str(row.get(key)) for row in rows))}"
                for key, name in names.items()
            ]
            lines.append(
                f"* {dataset}: {'; '.join(said)}; commit {', '.join(commits)}; seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}"
            )
    return lines


def changed_lines(runs):
    lines = []
    columns = {
        "balanced accuracy (%)": (balanced_accuracy, 1),
        "50-50 probe (%)": (balanced_probe, 1),
        "SAA (%)": (metric("saa"), 1),
        "CAC (%)": (metric("cac"), 1),
        "SAD": (metric("sad"), 2),
        "CAD": (metric("cad"), 2),
        "GPU": (metric("gpu"), 2),
        "PEU (%)": (metric("peu"), 1),
        "below collapse": (lambda row: row.get("last_collapse_gap"), 3),
    }
    for place in runs.places:
        labels = list(
            dict.fromkeys(
                row["label"]
                for row in runs.rows
                if (row["dataset"], row["ratio"]) == place and row["kind"] == "contrastive"
            )
        )
        methods = {
            row["method"]
            for row in runs.rows
            if (row["dataset"], row["ratio"]) == place and row["label"] != row["method"]
        }
        labels = [label for label in labels if label.split(" (")[0] in methods]
        if labels:
            lines += [
                "",
                f"{subset_name(place)}:",
                "",
                "| | n | " + " | ".join(columns) + " |",
                "|---|---:|" + "---:|" * len(columns),
            ]
        for label in labels:
            members = {
                row["seed"]: row
                for row in runs.rows
                if (row["dataset"], row["ratio"], row["label"]) == (*place, label)
            }
            cells = [
                mean_text(members, value, "", digits).split(" (n")[0]
                for value, digits in columns.values()
            ]
            lines.append(
                f"| {label} | {len(members)} | "
                + " | ".join("-" if cell == "not run" else cell for cell in cells)
                + " |"
            )
    return lines


# ------------------------------------------------------------------------------------------------------------------
# figures, readable in grey
# ------------------------------------------------------------------------------------------------------------------


def figures(rows):
    """{file name: function that draws it, or returns None without a value}"""
    runs = Runs(rows)
    return {
        "ablations.png": lambda: ablations_figure(runs),
        "metrics.png": lambda: metrics_figure(runs),
    }


def ablations_figure(runs):
    """Balanced accuracy against what was varied: a panel for each, a line per data set and method. None where nothing was."""
    from matplotlib.figure import Figure

    panels = []
    for title, key, methods in (
        ("batch size, equal steps", "batch_size", ("supcon", *PROPOSED)),
        ("margin of the prototypes", "margin", ("suppro",)),
        ("supervised share of the majority", "majority_supervision", ("supmin",)),
        ("minority images per batch, at least", "minority_per_batch", ("supcon", *PROPOSED)),
    ):
        lines = {}
        for place, method in itertools.product(runs.places, methods):
            found = (
                runs_by_batch_size(runs, place, method)
                if key == "batch_size"
                else runs.changed(*place, method, key)
            )
            if found and key != "batch_size":
                found[
                    {"margin": 1.0, "majority_supervision": 0.0, "minority_per_batch": 0}[key]
                ] = runs.base(*place, method)
            if found and key == "majority_supervision":
                found[1.0] = runs.base(*place, "supcon")
            points = {float(x): list(measured_values(found[x]).values()) for x in sorted(found)}
            if len(points := {x: values for x, values in points.items() if values}) > 1:
                lines[f"{method}, {subset_name(place)}"] = points
        if lines:
            panels.append((title, lines))
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for ax, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for (name, points), marker, style in zip(
            lines.items(),
            itertools.cycle("osX^Dv"),
            itertools.cycle(("-", "--", "-.", ":", (0, (5, 1)))),
        ):
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in points.values()]
            mean = [np.mean(v) for v in points.values()]
            ax.errorbar(
                list(points),
                mean,
                spread,
                marker=marker,
                ls=style,
                color="black",
                mfc="white",
                capsize=3,
                label=name,
            )
            ax.plot(*zip(*((x, y) for x, v in points.items() for y in v)), ".", color="0.5", ms=4)
        if title.startswith("batch"):
            ax.set_xscale("log", base=2)
        ax.set(title=title, ylabel="balanced test accuracy (%)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return figure


def metrics_figure(runs):
    """How much of the balanced accuracy's variance each metric explains: bars of R², signed as the slope."""
    from matplotlib.figure import Figure

    parts = [
        (title, {key: fit_line(rows, key) for key in METRICS})
        for title, rows in contrastive_rows_by_dataset(runs)
    ]
    parts = [
        (title, {key: value for key, value in found.items() if value}) for title, found in parts
    ]
    parts = [(title, found) for title, found in parts if found]
    if not parts:
        return None
    figure = Figure(figsize=(3.2 * len(parts), 3.2), layout="constrained")
    for ax, (title, found) in zip(
        figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts
    ):
        heights = [np.sign(found[key][0]) * found[key][1] if key in found else 0 for key in METRICS]
        ax.bar(
            list(METRICS.values()),
            heights,
            color=["0.25", "0.25", *["0.8"] * 4],
            edgecolor="black",
            lw=0.7,
        )
        ax.axhline(0, color="black", lw=0.8)
        ax.axhline(0.6, color="black", lw=0.8, ls=":")
        ax.set_title(
            textwrap.fill(f"{title}, n = {max(value[2] for value in found.values())}", 30),
            fontsize=10,
        )
        ax.set(ylabel="R², with the sign of the slope")
    return figure
