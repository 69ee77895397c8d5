"""Scores against scikit-learn, thresholds chosen on validation, and the table of predictions."""

import csv

import numpy as np
import pytest
from sklearn import metrics

from utils.cli import UserError
from utils.intervals import SCORES, observed_scores
from utils.scores import (
    choose_threshold,
    classification_scores,
    predictive_values,
    print_test_scores,
    rare_class_scores,
    read_predictions,
    score_splits,
    sensitivity_specificity,
    threshold_rule,
    write_predictions,
)


def simulate(n_rare=20, n_common=180, digits=None, seed=0):
    """Probabilities of a mediocre classifier, and the truth; rounding makes ties."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(n_rare + n_common) < n_rare)
    p = 1 / (1 + np.exp(1.5 - 2 * truth - rng.normal(size=len(truth))))
    return (p if digits is None else p.round(digits)), truth


def simulate_splits(minority=1):
    splits = {"val": simulate(seed=1), "test": simulate(seed=2)}
    p = {split: np.stack([p, 1 - p][:: 1 - 2 * minority], 1) for split, (p, _) in splits.items()}
    labels = {split: np.where(t, minority, 1 - minority) for split, (_, t) in splits.items()}
    return p, labels


@pytest.mark.parametrize("digits", [None, 1])
def test_scores_equal_scikit_learn_and_the_scores_of_the_bootstrap(digits):
    p, truth = simulate(digits=digits)
    found = rare_class_scores(p, truth, threshold=0.3)
    fpr, tpr, _ = metrics.roc_curve(truth, p, drop_intermediate=False)
    expected = {
        "average_precision": metrics.average_precision_score(truth, p),
        "brier": metrics.brier_score_loss(truth, p),
        "sensitivity": metrics.recall_score(truth, p > 0.5),
        "specificity": metrics.recall_score(~truth, p <= 0.5),
        "sensitivity_at_90_specificity": tpr[fpr <= 0.1 + 1e-12].max(),
        "sensitivity_at_95_specificity": tpr[fpr <= 0.05 + 1e-12].max(),
        "threshold": 0.3,
        "sensitivity_at_threshold": metrics.recall_score(truth, p >= 0.3),
        "specificity_at_threshold": metrics.recall_score(~truth, p < 0.3),
        "balanced_accuracy_at_threshold": metrics.balanced_accuracy_score(truth, p >= 0.3),
    }
    assert found == pytest.approx(expected, abs=1e-12)
    found |= classification_scores(p, truth.astype(int), minority=1)
    assert found.pop("threshold") == 0.3 and found.keys() == SCORES.keys()
    assert found == pytest.approx(observed_scores(p, truth, threshold=0.3), abs=1e-12)
    means = (found["sensitivity"] + found["specificity"]) / 2
    assert found["balanced_accuracy"] == pytest.approx(means)


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("rule", ["youden", "sensitivity=0.95", "specificity=0.9"])
def test_the_threshold_is_the_best_one_of_a_search_through_all(rule, digits):
    p, truth = simulate(digits=digits)
    found = choose_threshold(p, truth, rule)
    every = {t: sensitivity_specificity(truth, p >= t) for t in (*np.unique(p), 1.1)}
    if rule == "youden":
        best = max(every.values(), key=sum)
        assert sum(sensitivity_specificity(truth, p >= found)) == pytest.approx(sum(best))
    else:
        side, target = rule.split("=")
        wanted = int(side == "specificity")
        reached = [values for values in every.values() if values[wanted] >= float(target) - 1e-12]
        best = max(values[1 - wanted] for values in reached)
        chosen = sensitivity_specificity(truth, p >= found)
        assert chosen[wanted] >= float(target) - 1e-12 and chosen[1 - wanted] == best
    same = [t for t in every if np.array_equal(p >= t, p >= found)]
    assert found == pytest.approx(max(same)), "a probability that occurs"


def test_a_target_is_reached_in_spite_of_rounding():
    p, truth = np.arange(40) / 40, np.arange(40) % 2 == 1
    for k in range(1, 21):
        threshold = choose_threshold(p, truth, f"specificity={k / 20}")
        assert np.count_nonzero(p[~truth] < threshold) == k
        threshold = choose_threshold(p, truth, f"sensitivity={k / 20}")
        assert np.count_nonzero(p[truth] >= threshold) == k


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_constant_predictions_are_negative_where_the_rule_permits(p):
    p, truth = np.full(10, p), np.arange(10) < 3
    for rule, expected in (
        ("youden", (0, 1)),
        ("specificity=0.9", (0, 1)),
        ("sensitivity=0.95", (1, 0)),
    ):
        threshold = choose_threshold(p, truth, rule)
        assert np.isfinite(threshold)
        scores = rare_class_scores(p, truth, threshold)
        found = scores["sensitivity_at_threshold"], scores["specificity_at_threshold"]
        assert found == expected
        assert scores["average_precision"] == pytest.approx(0.3)
        assert scores["sensitivity_at_90_specificity"] == 0
        assert scores["balanced_accuracy_at_threshold"] == 0.5


@pytest.mark.parametrize("label", [0, 1])
def test_a_missing_class_is_one_line(label):
    p, labels = np.linspace(0, 1, 5), np.full(5, label)
    for call in (
        lambda: classification_scores(p, labels, 1),
        lambda: rare_class_scores(p, labels == 1, 0.5),
        lambda: choose_threshold(p, labels == 1),
    ):
        with pytest.raises(UserError, match="all 5 images are of one class"):
            call()


@pytest.mark.parametrize("rule", ["youden", "sensitivity=0.95", "specificity=0.9"])
def test_test_labels_never_move_the_threshold(rule):
    p, labels = simulate_splits()
    before = score_splits(p, labels, 1, rule)
    labels["test"], p["test"] = 1 - labels["test"], p["test"][::-1]
    after = score_splits(p, labels, 1, rule)
    assert after["threshold"] == before["threshold"] and after["val"] == before["val"]
    assert after["test"]["auroc"] != before["test"]["auroc"]
    labels["val"] = 1 - labels["val"]
    assert score_splits(p, labels, 1, rule)["threshold"] != before["threshold"]


def test_results_do_not_depend_on_the_number_of_the_rare_label():
    first, second = (score_splits(*simulate_splits(minority), minority) for minority in (1, 0))
    for split in ("val", "test"):
        assert first[split] == pytest.approx(second[split])
    assert first["threshold_rule"] == "youden" and first["threshold"] == second["threshold"]
    interval = first["test_interval"]
    assert interval.keys() == SCORES.keys()
    for score, (low, high) in interval.items():
        assert low <= first["test"][score] <= high, score


def test_predictive_values_follow_bayes():
    scores = dict(sensitivity_at_threshold=0.9, specificity_at_threshold=0.8)
    found = predictive_values(scores, 0.01)
    assert found["ppv_at_threshold"] == pytest.approx(0.009 / (0.009 + 0.198))
    assert found["npv_at_threshold"] == pytest.approx(0.792 / (0.792 + 0.001))
    nothing = dict(sensitivity_at_threshold=0.0, specificity_at_threshold=1.0)
    found = predictive_values(nothing, 0.01)
    assert found["ppv_at_threshold"] is None and found["npv_at_threshold"] == pytest.approx(0.99)
    p, labels = simulate_splits()
    test = score_splits(p, labels, 1, prevalence=labels["test"].mean())["test"]
    predicted = p["test"][:, 1] >= test["threshold"]
    precision = metrics.precision_score(labels["test"], predicted)
    assert test["ppv_at_threshold"] == pytest.approx(precision)


@pytest.mark.parametrize("text", ["", "j", "youden=1", "sensitivity", "specificity=90", "f1=0.5"])
def test_unknown_rules_are_refused(text):
    with pytest.raises(Exception, match="give youden, sensitivity=0.95 or specificity=0.9"):
        threshold_rule(text)


def test_few_rare_images_and_the_rare_label_are_named(capsys):
    p, labels = simulate_splits(minority=0)
    result = score_splits(p, labels, 0)
    print_test_scores(result, p, labels, ["ill", "well"], 0)
    printed = capsys.readouterr().out
    assert "test images of 'ill' (label 0): 20 of 200" in printed
    assert "20 rare test images: intervals are wide" in printed
    assert "validation images" not in printed
    rare = np.flatnonzero(labels["val"] == 0)
    labels["val"][rare[9:]] = 1
    print_test_scores(result, p, labels, ["ill", "well"], 0)
    assert "9 rare validation images: the threshold is uncertain" in capsys.readouterr().out


NAMES = ["=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@a.png", "\ta", "\ra", "'=a", "'a", "a=b,ä"]


def test_predictions_are_read_as_they_were_and_hold_no_formulas(tmp_path):
    path, p = tmp_path / "predictions.csv", np.random.default_rng(0).random(len(NAMES))
    rows, labels = np.arange(len(NAMES)), np.arange(len(NAMES)) % 2
    splits, both = {"val": rows[:4], "test": rows[4:]}, np.stack([1 - p, p], 1)
    probabilities = {split: both[some] for split, some in splits.items()}
    write_predictions(path, NAMES, labels, splits, probabilities, 1, ["a", "b"])
    with open(path, newline="", encoding="utf-8") as file:
        header, *cells = csv.reader(file)
    assert header == ["file", "split", "label", "p_minority"]
    assert not [row for row in cells if row[0][0] in "=+-@\t\r"]
    assert [row[0] for row in cells[-2:]] == NAMES[-2:], "other names stay as they are"
    table = read_predictions(path)
    assert list(table) == header and table["file"].tolist() == NAMES
    assert table["split"].tolist() == ["val"] * 4 + ["test"] * 5
    np.testing.assert_array_equal(table["label"], labels)
    np.testing.assert_array_equal(table["p_minority"], p)
