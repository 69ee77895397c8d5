"""Bootstrap intervals: equality with scikit-learn and scipy, pairing, coverage, speed."""

import numpy as np
import pytest
from scipy.stats import bootstrap, norm
from sklearn import metrics

from utils.intervals import (
    SCORES,
    bootstrap_difference,
    bootstrap_intervals,
    bootstrap_scores,
    observed_scores,
)


def simulate(rng, n_rare, n_common, gap=1.0, digits=None):
    """Draw a test set: p of the rare class around a gap; rounding makes ties."""
    is_minority = np.arange(n_rare + n_common) < n_rare
    logit = rng.normal(size=len(is_minority)) + gap * is_minority
    p = norm.cdf(logit - 0.5)
    return (p if digits is None else p.round(digits)), is_minority


@pytest.mark.parametrize("digits", [None, 1])
def test_scores_equal_scikit_learn_with_and_without_ties(digits):
    p, truth = simulate(np.random.default_rng(0), 30, 110, digits=digits)
    found = observed_scores(p, truth, threshold=0.3)
    false_alarms, hits, _ = metrics.roc_curve(truth, p, drop_intermediate=False)
    expected = {
        "accuracy": metrics.accuracy_score(truth, p > 0.5),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, p > 0.5),
        "auroc": metrics.roc_auc_score(truth, p),
        "f1": metrics.f1_score(truth, p > 0.5),
        "average_precision": metrics.average_precision_score(truth, p),
        "brier": metrics.brier_score_loss(truth, p),
        "sensitivity": metrics.recall_score(truth, p > 0.5),
        "specificity": metrics.recall_score(~truth, p <= 0.5),
        "sensitivity_at_90_specificity": hits[false_alarms <= 0.1 + 1e-12].max(),
        "sensitivity_at_95_specificity": hits[false_alarms <= 0.05 + 1e-12].max(),
        "sensitivity_at_threshold": metrics.recall_score(truth, p >= 0.3),
        "specificity_at_threshold": metrics.recall_score(~truth, p < 0.3),
        "balanced_accuracy_at_threshold": metrics.balanced_accuracy_score(truth, p >= 0.3),
    }
    assert found.keys() == expected.keys() == SCORES.keys()
    assert found == pytest.approx(expected)


def test_intervals_agree_with_the_bootstrap_of_scipy():
    p, truth = simulate(np.random.default_rng(1), 40, 120)

    def auroc(rare, common, axis):
        order = rare[..., :, None] > common[..., None, :]
        return order.mean(axis=(-2, -1))

    options = {"vectorized": True, "method": "percentile", "n_resamples": 2000, "batch": 100}
    reference = bootstrap(
        (p[truth], p[~truth]), auroc, rng=np.random.default_rng(0), **options
    ).confidence_interval
    # Two sets of 2,000 draws differ by about a tenth of the standard error.
    assert bootstrap_intervals(p, truth)["auroc"] == pytest.approx(reference, abs=0.012)


def test_a_draw_keeps_the_size_of_each_class():
    p, truth = simulate(np.random.default_rng(2), 5, 50)
    values = bootstrap_scores(p, truth, draws=300)
    assert set(np.round(values["sensitivity"] * 5, 9)) <= set(range(6))
    assert set(np.round(values["specificity"] * 50, 6)) <= set(range(51))
    again = bootstrap_scores(p, truth, draws=300)
    assert all((values[name] == again[name]).all() for name in SCORES)
    assert (bootstrap_scores(p, truth, draws=300, seed=1)["auroc"] != values["auroc"]).any()


def test_differences_are_paired_by_image():
    rng = np.random.default_rng(3)
    p, truth = simulate(rng, 60, 240)
    better = np.clip(p + 0.02 * truth, 0, 1)
    difference, (low, high) = bootstrap_difference(better, p, truth, "auroc")
    expected = metrics.roc_auc_score(truth, better) - metrics.roc_auc_score(truth, p)
    assert difference == pytest.approx(expected) and 0 < low < difference < high
    # Unpaired, the difference would be lost in the interval of each.
    alone = bootstrap_intervals(p, truth)["auroc"]
    assert high - low < 0.2 * (alone[1] - alone[0])
    same = bootstrap_difference(p, p, truth, "brier")
    assert same == (0.0, [0.0, 0.0])


def test_one_class_alone_has_no_scores():
    for truth in ([True, True], [False, False]):
        with pytest.raises(ValueError, match="one class"):
            bootstrap_intervals([0.2, 0.4], truth)


def coverage(n_tests, n_rare, n_common, draws):
    """Return {score: share of the 95 % intervals that hold the true value}.

    p is norm.cdf(x - 0.5) with x normal, around 1 for rare images and around 0 for common ones.
    """
    rng = np.random.default_rng(0)
    true = {"auroc": norm.cdf(1 / np.sqrt(2)), "balanced_accuracy": norm.cdf(0.5)}
    covered = dict.fromkeys(true, 0)
    for _ in range(n_tests):
        intervals = bootstrap_intervals(*simulate(rng, n_rare, n_common), draws=draws)
        for name, value in true.items():
            covered[name] += intervals[name][0] <= value <= intervals[name][1]
    return {name: count / n_tests for name, count in covered.items()}


def test_intervals_cover_the_true_value():
    """The standard error of a share of 95 % in 200 tests is 1.5 %."""
    for share in coverage(200, 100, 150, draws=200).values():
        assert 0.90 <= share <= 0.985
