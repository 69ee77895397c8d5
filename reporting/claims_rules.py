"""The cases of each claim: functions from a regime to one primary Case, or to further Cases.

A primary case is that of the rarest imbalanced ratio with at least 25 minority training images, by
the probe on balanced rows, where the function names nothing else. None stands for "not run".
"""

import itertools
import json
from pathlib import Path

import numpy as np

from reporting.claims_runs import (
    SCORES,
    class_mean,
    compare,
    difference,
    mean_text,
    measured_values,
    probe_score,
)
from reporting.claims_statistics import TOLERANCE, Case, Difference, all_of, p_text
from reporting.collect import METHODS, METRICS, setting_text

REPAIRS = ("supmin", "suppro")
LONG_TAIL = ("kcl", "tsc", "sbcl", "bcl", "paco")
SUPERVISED = ("ldam_drw", "crt")
# Sign of a change that a reader of the metric takes for worse.
WORSE_SIGN = {"saa": -1, "cac": -1, "sad": 1, "cad": 1, "gpu": 1, "peu": -1}
# The metrics that the paper's claim b is about.
CLASS_METRICS = ("saa", "cac")
CAC_R2 = 0.6
CAC_CELLS = 8  # settings (ratio and method), at least, that R² is taken over
DRAWS = 2000
OVERHEAD = 1.05  # of SupCon's time per step
BENCHMARK = Path(__file__).parents[1] / "results" / "benchmark" / "methods.json"


# cases --------------------------------------------------------------------------------------------


def rarest(regime):
    """Return the rarest ratio that may judge; None if the regime has none."""
    return next(iter(regime.imbalanced()), None)


def over(regime, ratio, method, other, where=None, **options):
    """Compare the base runs of two methods at a ratio."""
    members = regime.base(ratio, method), regime.base(ratio, other)
    return compare(where or f"{name_of(method)} over {name_of(other)}", *members, **options)


def name_of(method):
    return METHODS.get(method, "the untrained network" if method == "untrained" else method)


def place(regime, ratio, text=""):
    return f"{regime.name}, {ratio}{': ' * bool(text)}{text}"


def required(where, cases):
    """Return all_of the cases; None if there is none or one of them was not run."""
    cases = list(cases)
    return None if None in cases else all_of(where, cases)


def measured(where, cases):
    """Return all_of the cases that were run; None if there is none."""
    return all_of(where, [case for case in cases if case])


def placed(regime, ratio, case):
    """Name the place before a Case that was run."""
    if case:
        case.where = place(regime, ratio, case.where)
    return case


# a, b: the collapse -------------------------------------------------------------------------------


def judge_fall(regime):
    ratio = rarest(regime)
    for balanced in regime.balanced() if ratio else ():
        members = regime.base(balanced, "supcon"), regime.base(ratio, "supcon")
        return measured(
            f"{regime.name}: SupCon, {balanced} over {ratio}", [compare(balanced, *members)]
        )
    return None


def judge_floor(regime):
    ratio = rarest(regime)
    return measured(
        place(regime, ratio, "untrained network not below SupCon"),
        [over(regime, ratio, "untrained", "supcon", margin=TOLERANCE)],
    )


def measure_floor(regime):
    for ratio in regime.imbalanced():
        where = "untrained network not below SupCon, own rows"
        options = {"margin": TOLERANCE, "rows": "own"}
        yield placed(regime, ratio, over(regime, ratio, "untrained", "supcon", where, **options))


def judge_class_metrics(regime):
    ratio = rarest(regime)
    cases = [metric_case(regime, ratio, key, repair) for key in CLASS_METRICS for repair in REPAIRS]
    return required(place(regime, ratio, "SAA and CAC of SupCon below both losses"), cases)


def metric_case(regime, ratio, key, repair, is_worse=True):
    """Return the Case that SupCon is worse, or better, than a repair by one metric."""
    value = class_mean(key)
    members = regime.base(ratio, "supcon"), regime.base(ratio, repair)
    d = difference(*members, value)
    if d is None:
        return None
    sign = WORSE_SIGN[key] * (1 if is_worse else -1)
    signed = Difference([sign * v for v in d.values])
    texts = [mean_text(rows, value, 2) for rows in members]
    evidence = f"{texts[0]} against {texts[1]}, {p_text(min(signed.p_yes, signed.p_no))}"
    where = f"{METRICS[key]} against {METHODS[repair]}"
    unit = f"points of {METRICS[key]}"
    return Case(where, evidence, signed.p_yes, signed.p_no, d.mean, unit)


def measure_other_metrics(regime):
    for ratio in regime.imbalanced():
        for key in (key for key in METRICS if key not in CLASS_METRICS):
            cases = [metric_case(regime, ratio, key, repair, is_worse=False) for repair in REPAIRS]
            where = f"{METRICS[key]} calls SupCon better"
            yield placed(regime, ratio, required(where, cases))


# c, d, h, k: methods against methods --------------------------------------------------------------


def judge_repairs(regime):
    ratio = rarest(regime)
    cases = [over(regime, ratio, repair, "supcon") for repair in REPAIRS]
    return required(place(regime, ratio, "both losses over SupCon"), cases)


def measure_repairs(regime):
    for ratio in regime.imbalanced():
        for repair in REPAIRS:
            for other in ("supcon", "untrained", "ntxent"):
                yield placed(regime, ratio, over(regime, ratio, repair, other))
            where = f"{METHODS[repair]} over SupCon, own rows"
            case = over(regime, ratio, repair, "supcon", where, rows="own")
            yield placed(regime, ratio, case)


def judge_long_tail(regime):
    ratio = rarest(regime)
    cases = [over(regime, ratio, regime.repair, other) for other in LONG_TAIL]
    where = f"{METHODS[regime.repair]} over the long-tail methods that were run"
    return measured(place(regime, ratio, where), cases)


def measure_long_tail(regime):
    for ratio in regime.imbalanced():
        for repair, other in itertools.product(REPAIRS, LONG_TAIL):
            yield placed(regime, ratio, over(regime, ratio, repair, other))


def judge_domain(regime):
    ratio = rarest(regime)
    if regime.kind == "neither":
        return None
    other = next(method for method in REPAIRS if method != regime.repair)
    where = f"{regime.kind} images: {METHODS[regime.repair]} ahead"
    return measured(place(regime, ratio, where), [over(regime, ratio, regime.repair, other)])


def measure_domain(regime):
    """Yield the same at the other ratios, and where the images are of neither kind."""
    for ratio in regime.imbalanced()[regime.kind != "neither" :]:
        other = next(method for method in REPAIRS if method != regime.repair)
        yield placed(regime, ratio, over(regime, ratio, regime.repair, other))


def judge_balanced_data(regime):
    for ratio in regime.balanced():
        cases = [over(regime, ratio, repair, "supcon", margin=TOLERANCE) for repair in REPAIRS]
        return required(place(regime, ratio, "both losses not below SupCon"), cases)
    return None


def judge_supervised(regime):
    ratio = rarest(regime)
    cases = [supervised_case(regime, ratio, regime.repair, other) for other in SUPERVISED]
    where = f"{METHODS[regime.repair]}, own rows, over LDAM-DRW and cRT"
    return required(place(regime, ratio, where), cases)


def supervised_case(regime, ratio, repair, other):
    """Compare with a supervised method of equal views: it sees one per image, so twice the epochs.

    cRT re-trains the classifier of a network, whose epochs count.
    """
    if not has_equal_views(regime, ratio, repair, "ce" if other == "crt" else other):
        return None
    return over(regime, ratio, repair, other, rows="own")


def has_equal_views(regime, ratio, method, supervised):
    views = {2 * row["epochs"] for row in regime.base(ratio, method).values()}
    return views == {row["epochs"] for row in regime.base(ratio, supervised).values()}


def measure_supervised(regime):
    others = (*SUPERVISED, "weighted_ce", "focal", "logit_adjusted")
    for ratio in regime.imbalanced():
        for repair in REPAIRS:
            for other in others:
                yield placed(regime, ratio, supervised_case(regime, ratio, repair, other))


# e: CAC and accuracy ------------------------------------------------------------------------------


def judge_cac(regime):
    """R² of the probe's scores on CAC over settings; the interval draws settings again."""
    cases = [cac_case(regime, score) for score in SCORES]
    return required(f"{regime.name}: R² of the probe on CAC above {CAC_R2}", cases)


def cac_case(regime, score):
    points = base_points(regime, "cac", score)
    if len(points) < CAC_CELLS:
        return None
    rng = np.random.default_rng(0)
    drawn = r_squared(points[rng.integers(0, len(points), (DRAWS, len(points)))])
    above = np.sum(drawn > CAC_R2)
    p_yes, p_no = (min(1.0, 2 * (side + 1) / (DRAWS + 1)) for side in (DRAWS - above, above))
    (low, high), r2 = np.percentile(drawn, [2.5, 97.5]), float(r_squared(points))
    evidence = f"{r2:.2f} ({low:.2f} to {high:.2f}) over {len(points)} settings"
    return Case(SCORES[score], evidence, p_yes, p_no, r2, "of the variance")


def base_points(regime, key, score):
    """Return [n, 2]: mean metric and mean test score of each trained base setting of a regime."""
    cells = {}
    for row in regime.rows:
        pair = class_mean(key)(row), probe_score(score)(row)
        is_base = row["kind"] == "contrastive" and not row["changes"]
        if is_base and row["method"] != "untrained" and None not in pair:
            cells.setdefault((row["ratio"], row["method"]), []).append(pair)
    return np.array([np.mean(pairs, axis=0) for pairs in cells.values()])


def r_squared(points):
    """Return R² of y on x of points [..., n, 2], negative if the slope is; 0 without variation."""
    x, y = np.moveaxis(points - points.mean(axis=-2, keepdims=True), -1, 0)
    covariance, variances = (x * y).sum(-1), (x**2).sum(-1) * (y**2).sum(-1)
    return covariance * np.abs(covariance) / np.maximum(variances, 1e-12)


# f, i, j, m, n, p: changed settings ---------------------------------------------------------------


def batch_sizes(regime, ratio, method):
    """Return {batch size: members} of base runs and of runs with as many steps, smallest first."""
    sizes = regime.changed(ratio, method, "batch_size", "epochs", "warmup_epochs")
    base = regime.base(ratio, method)
    if sizes and base:
        sizes[next(iter(base.values()))["batch_size"]] = base
    return dict(sorted(sizes.items()))


def judge_batch_sizes(regime):
    for ratio in regime.imbalanced():
        sizes = batch_sizes(regime, ratio, "supcon")
        if len(sizes) > 1:
            (small, a), *_, (large, b) = sizes.items()
            where = f"SupCon, batch {small} over {large}"
            return measured(place(regime, ratio, where), [compare(where, a, b)])
    return None


def against_changes(regime, method, key, margin=TOLERANCE):
    """Yield (ratio, Case) of base runs against each changed value: not below it."""
    for ratio in regime.imbalanced():
        for value, members in regime.changed(ratio, method, key).items():
            case = compare(f"against {value:g}", regime.base(ratio, method), members, margin)
            yield ratio, case


def judge_margin(regime):
    cases = list(against_changes(regime, "suppro", "margin"))
    cases = [case for ratio, case in cases if case and ratio == cases[0][0]]
    return measured(f"{regime.name}: margin 1 not below the others", cases)


def judge_majority_supervision(regime):
    cases = list(against_changes(regime, "supmin", "majority_supervision"))
    cases = [case for ratio, case in cases if case and ratio == cases[0][0]]
    return measured(f"{regime.name}: a share of 0 not below the others", cases)


def judge_sampler(regime):
    return next(iter(sampler_cases(regime, "minority_per_batch", "supcon", 0.0)), None)


def measure_sampler(regime):
    for repair in REPAIRS:
        yield from sampler_cases(regime, "minority_per_batch", repair, TOLERANCE)


def sampler_cases(regime, key, other, margin):
    """Yield the Case of each changed value of SupCon against the base runs of a method."""
    verb = "not below" if margin else "over"
    for ratio in regime.imbalanced():
        for value, members in regime.changed(ratio, "supcon", key).items():
            where = f"SupCon ({setting_text(key, value)}) {verb} {METHODS[other]}"
            yield placed(regime, ratio, compare(where, members, regime.base(ratio, other), margin))


def judge_relu(regime):
    return next(iter(sampler_cases(regime, "relu", regime.repair, TOLERANCE)), None)


def measure_relu(regime):
    yield from sampler_cases(regime, "minority_per_batch", regime.repair, TOLERANCE)
    yield from sampler_cases(regime, "relu", "supcon", 0.0)


def judge_init(regime):
    """Compare the repair with SupCon where both start from the same other weights."""
    for ratio in regime.imbalanced():
        started = regime.changed(ratio, regime.repair, "init")
        others = regime.changed(ratio, "supcon", "init")
        for weights in sorted(started.keys() & others.keys()):
            where = f"from {weights}, {METHODS[regime.repair]} over SupCon"
            case = compare(where, started[weights], others[weights])
            return measured(place(regime, ratio, where), [case])
    return None


# l, r: numbers during training --------------------------------------------------------------------


def judge_early_choice(regime):
    return early_choice(regime, "early_val_knn", "kNN accuracy")


def measure_early_choice(regime):
    yield early_choice(regime, "early_val_cac", "CAC")


def early_choice(regime, key, name):
    """Choose by an early number, seed by seed, against always taking the better repair."""
    ratio, methods = rarest(regime), ("supcon", *REPAIRS)
    cases = []
    for score in SCORES:
        value, members = probe_score(score), [regime.base(ratio, method) for method in methods]
        seeds = set.intersection(*(set(measured_values(rows, value)) for rows in members))
        runs = [[rows[seed] for rows in members] for seed in sorted(seeds)]
        runs = [trio for trio in runs if all(row.get(key) is not None for row in trio)]
        if not runs:
            return None
        chosen = [value(max(trio, key=lambda row: row[key])) for trio in runs]
        fixed = max((np.array([value(trio[i]) for trio in runs]) for i in (1, 2)), key=np.mean)
        d = Difference(list(np.array(chosen) - fixed))
        evidence = f"{np.mean(chosen):.1f} against {np.mean(fixed):.1f} ({d}), n {len(runs)}"
        cases.append(Case(SCORES[score], evidence, d.p_yes, d.p_no, d.mean))
    where = f"choice by the highest early {name} over always the better loss"
    return all_of(place(regime, ratio, where), cases)


def judge_settling(regime):
    return settling_case(regime, "val_cac", "val_knn")


def measure_settling(regime):
    yield settling_case(regime, "val_saa", "val_knn")
    yield settling_case(regime, "val_cac", "collapse_gap")


def settling_case(regime, key, other):
    """Ask whether one number tells the final order of SupCon and the repair before another."""
    ratio, names = rarest(regime), {"collapse_gap": "the loss", "val_knn": "kNN accuracy"}
    names |= {"val_cac": "CAC", "val_saa": "SAA"}
    runs = [regime.base(ratio, method) for method in (regime.repair, "supcon")]
    earlier = []
    for seed in sorted(runs[0].keys() & runs[1].keys()):
        pair = [rows[seed] for rows in runs]
        settled = [settling_percent(pair, regime.score, name) for name in (other, key)]
        if None not in settled:
            earlier.append(settled[0] - settled[1])
    if not earlier:
        return None
    d = Difference(earlier)
    evidence = f"{d} percent of the training earlier, n {len(earlier)}, {p_text(d.p_yes)}"
    where = place(regime, ratio, f"{names[key]} tells the final order before {names[other]}")
    return Case(where, evidence, d.p_yes, d.p_no, d.mean, "percent of the training")


def settling_percent(pair, score, key):
    """Return when the order of two runs by a logged number becomes the final one, in percent.

    100 if it never is. None where the number was not logged twice.
    """
    final = [probe_score(score)(row) for row in pair]
    curves = [row.get("history", {}).get(key, {}) for row in pair]
    epochs = sorted(curves[0].keys() & curves[1].keys(), key=int)
    if None in final or len(epochs) < 2:
        return None
    sign = np.sign(final[0] - final[1])
    orders = [np.sign(curves[0][epoch] - curves[1][epoch]) == sign for epoch in epochs]
    wrong = [i for i, is_right in enumerate(orders) if not is_right]
    first = wrong[-1] + 1 if wrong else 0
    last = max(map(int, epochs)) + 1
    return 100.0 if first == len(epochs) else 100.0 * (int(epochs[first]) + 1) / last


# g, o, q: other measurements ----------------------------------------------------------------------


def judge_overhead():
    """Judge by the benchmark. The range of n rounds holds the median with 1 - 2^(1-n)."""
    if not BENCHMARK.is_file():
        return None
    data = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    p_round = 2.0 ** (1 - data["rounds"])
    cases = []
    for method in REPAIRS:
        low, ratio, high = (data["methods"][method][key] for key in ("lowest", "ratio", "highest"))
        p_yes = p_round if high <= OVERHEAD else 1.0
        p_no = p_round if low > OVERHEAD else 1.0
        evidence = f"{ratio:.2f} of SupCon's time, {low:.2f} to {high:.2f}"
        options = {"unit": "of SupCon's time", "hint": "more rounds on a quiet machine"}
        cases.append(Case(METHODS[method], evidence, p_yes, p_no, ratio, **options))
    return all_of(f"benchmark, {data['arch']}, {data['size']} px", cases)


def judge_auc_margin(regime):
    ratio = rarest(regime)
    case = supervised_case(regime, ratio, regime.repair, "auc_margin") if ratio else None
    where = f"{METHODS[regime.repair]}, own rows, over AUC-margin training"
    return measured(place(regime, ratio, where), [case])


def measure_auc_margin(regime):
    """Yield the other encoders, and each after AUC-margin training against CE after it."""
    for ratio in regime.imbalanced():
        started = regime.changed(ratio, "auc_margin", "init")
        started = {Path(init).parent.name: members for init, members in started.items()}
        for method in ("ntxent", "supcon", *REPAIRS):
            yield placed(regime, ratio, supervised_case(regime, ratio, method, "auc_margin"))
            if "ce" in started and has_equal_views(regime, ratio, method, "ce"):
                where = f"{METHODS[method]} over CE, both then AUC-margin"
                case = compare(where, started.get(method, {}), started["ce"])
                yield placed(regime, ratio, case)


def judge_paper_probe(regime):
    ratio = rarest(regime)
    return paper_probe_case(regime, ratio, regime.repair, "supcon")


def measure_paper_probe(regime):
    for ratio in regime.imbalanced():
        yield paper_probe_case(regime, ratio, "supcon", "untrained")
        for repair in REPAIRS:
            where = f"{METHODS[repair]} over SupCon, one-percent rows, logistic regression"
            case = over(regime, ratio, repair, "supcon", where, rows="one_percent")
            yield placed(regime, ratio, case)


def paper_probe_case(regime, ratio, method, other):
    """Compare two methods by the paper's probe: SGD, 50 epochs, balanced 1 % of the rows."""
    cases = []
    for score, name in SCORES.items():
        members = regime.base(ratio, method), regime.base(ratio, other)
        value = paper_probe_score(score)
        if d := difference(*members, value):
            texts = [mean_text(rows, value) for rows in members]
            evidence = f"{texts[0]} against {texts[1]} ({d}), n {len(d.values)}"
            cases.append(Case(name, evidence, d.p_yes, d.p_no, d.mean))
    where = f"the paper's probe: {name_of(method)} over {name_of(other)}"
    return all_of(place(regime, ratio, where), cases)


def paper_probe_score(score):
    def value(row):
        for prefix, name in row["probes"].items():
            if "50 epochs" in name and "sgd" in name:
                found = row.get(f"{prefix}_test_one_percent_{score}")
                return None if found is None else 100 * found
        return None

    return value
