"""Scores of a classifier with a rare class, the threshold they use, and the predictions."""

import argparse
import re

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from utils.cli import UserError, share
from utils.files import read_table, write_table
from utils.intervals import bootstrap_intervals

# Rare test images, and rare validation images: with fewer there is a warning.
RARE_IMAGES_FOR_A_VERDICT, RARE_IMAGES_FOR_A_THRESHOLD = 25, 10
# {entry of a result: title} in the order of the tables; all are fractions
SCORE_TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy at 0.5",
    "sensitivity": "sensitivity at 0.5",
    "specificity": "specificity at 0.5",
    "balanced_accuracy_at_threshold": "balanced accuracy at the chosen threshold",
    "sensitivity_at_threshold": "sensitivity at the chosen threshold",
    "specificity_at_threshold": "specificity at the chosen threshold",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "ppv_at_threshold": "positive predictive value at the given prevalence",
    "npv_at_threshold": "negative predictive value at the given prevalence",
    "accuracy": "accuracy at 0.5",
    "f1": "F1 at 0.5",
    "brier": "Brier score (lower is better)",
}


def classification_scores(probabilities, labels, minority):
    """Return accuracy, balanced_accuracy, auroc and f1 as fractions.

    probabilities [n, C], or [n] of label 1 of two; labels [n]. The likeliest class is predicted.
    auroc and f1 take the minority of two classes as the positive class. Of more than two classes
    they are means over the classes, each against the rest. Raises UserError if a class is missing.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    check_classes(labels, max([2, *probabilities.shape[1:]]))
    if probabilities.ndim == 2 and probabilities.shape[1] > 2:
        return multiclass_scores(probabilities, labels)
    if probabilities.ndim == 2:
        probabilities = probabilities[:, 1]
    predicted = (probabilities > 0.5).astype(int)
    p_minority = probabilities if minority else 1 - probabilities
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "auroc": float(roc_auc_score(labels == minority, p_minority)),
        "f1": float(f1_score(labels, predicted, pos_label=minority, zero_division=0.0)),
    }


def multiclass_scores(p, labels):
    """Return the scores of classification_scores for p [n, C], C > 2."""
    predicted = p.argmax(1)
    # Against the rest, class by class: scikit-learn's own form needs rows that sum to 1.
    aurocs = [roc_auc_score(labels == c, p[:, c]) for c in range(p.shape[1])]
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "auroc": float(np.mean(aurocs)),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


def minority_probability(p, minority):
    """Return the probability of the minority, one label or several, float64 [n]; p [n, C]."""
    return np.asarray(p)[:, np.atleast_1d(minority)].sum(1)


def rare_class_scores(p_minority, is_minority, threshold):
    """Return the scores that take the minority as the positive class, as fractions.

    p_minority [n]; is_minority bool [n]. An image is positive above 0.5 and, for the scores
    `_at_threshold`, from `threshold` up. Raises UserError if a class has no image.
    """
    p, truth = np.asarray(p_minority, dtype=np.float64), np.asarray(is_minority, dtype=bool)
    check_classes(truth)
    sensitivity, specificity = sensitivity_specificity(truth, p > 0.5)
    chosen_sensitivity, chosen_specificity = sensitivity_specificity(truth, p >= threshold)
    return {
        "average_precision": float(average_precision_score(truth, p)),
        "brier": float(brier_score_loss(truth, p)),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "sensitivity_at_90_specificity": sensitivity_at_specificity(p, truth, 0.90),
        "sensitivity_at_95_specificity": sensitivity_at_specificity(p, truth, 0.95),
        "threshold": float(threshold),
        "sensitivity_at_threshold": chosen_sensitivity,
        "specificity_at_threshold": chosen_specificity,
        "balanced_accuracy_at_threshold": (chosen_sensitivity + chosen_specificity) / 2,
    }


def score_splits(probabilities, labels, minority, rule="youden", prevalence=None):
    """Score val and test with the threshold that `rule` chooses on val.

    probabilities: {"val": p [n, C], "test": p [n, C]}; labels: {"val": int [n], "test": int [n]};
    minority: label of the rare class, or several, which are the positive class of thresholds and
    intervals together; prevalence: its share where the classifier is used.
    Returns the dict of probe.json and finetune.json: val, test, test_interval, threshold and
    threshold_rule.
    """
    p_minority = {split: minority_probability(p, minority) for split, p in probabilities.items()}
    is_minority = {split: np.isin(y, minority) for split, y in labels.items()}
    threshold = choose_threshold(p_minority["val"], is_minority["val"], rule)
    result = {
        split: classification_scores(p, labels[split], np.atleast_1d(minority)[0])
        | rare_class_scores(p_minority[split], is_minority[split], threshold)
        for split, p in probabilities.items()
    }
    if prevalence is not None:
        result["test"] |= predictive_values(result["test"], prevalence)
    interval = bootstrap_intervals(p_minority["test"], is_minority["test"], threshold)
    if np.asarray(probabilities["test"]).shape[1] > 2:
        # Their scores are over all classes, these intervals for the tail against the rest.
        for name in ("accuracy", "balanced_accuracy", "auroc", "f1"):
            del interval[name]
    return result | dict(test_interval=interval, threshold=threshold, threshold_rule=rule)


def check_classes(labels, n_classes=2):
    found = len(np.unique(labels))
    if found < 2:
        raise UserError(f"all {len(labels)} images are of one class; scores need both")
    if found < n_classes:
        raise UserError(f"images of {found} of the {n_classes} classes; scores need all of them")


def sensitivity_specificity(is_minority, is_positive):
    """Return the share of minority images found, and of the others that are left alone."""
    recalls = (recall_score(is_minority, is_positive, pos_label=c) for c in (True, False))
    return tuple(map(float, recalls))


def sensitivity_at_specificity(p_minority, is_minority, specificity):
    """Return the highest sensitivity of a threshold that keeps at least this specificity."""
    found = choose_threshold(p_minority, is_minority, f"specificity={specificity}")
    return sensitivity_specificity(is_minority, p_minority >= found)[0]


# --------------------------------------------------------------------------------------------------
# threshold and prevalence
# --------------------------------------------------------------------------------------------------


def add_score_flags(add):
    add(
        "--threshold-for",
        type=threshold_rule,
        default="youden",
        metavar="RULE",
        help="threshold by validation: youden, sensitivity=S or specificity=S",
    )
    text = "also write predictive values for this share of rare images, as 0.01"
    add("--prevalence", type=share, metavar="SHARE", help=text)


def threshold_rule(text):
    """Parse --threshold-for: youden, sensitivity=0.95 or specificity=0.9."""
    if not re.fullmatch(r"youden|(sensitivity|specificity)=(1|0?\.\d*[1-9]\d*)", text):
        raise argparse.ArgumentTypeError("give youden, sensitivity=0.95 or specificity=0.9")
    return text


def choose_threshold(p_minority, is_minority, rule="youden"):
    """Choose the probability from which an image is positive, among those predicted.

    youden: the highest sensitivity + specificity. sensitivity=S or specificity=S: at least S, with
    the other as high as possible. Of equally good thresholds the highest one is taken, so constant
    predictions are negative if the rule permits. Images of equal probability share a side.
    Raises UserError if a class has no image.
    """
    check_classes(is_minority)
    p = np.asarray(p_minority, dtype=np.float64)
    fpr, sensitivity, thresholds = roc_curve(is_minority, p, drop_intermediate=False)
    # scikit-learn's first threshold, where nothing is positive, is infinite: no number for JSON
    thresholds[0] = np.nextafter(thresholds[1], 2)
    name, _, target = rule.partition("=")
    if name == "youden":
        return float(thresholds[np.argmax(sensitivity - fpr)])
    wanted, other = sensitivity, 1 - fpr
    if name == "specificity":
        wanted, other = other, wanted
    # 1 - 0.1 and its kin differ from the typed target in the last bit
    reached = wanted >= float(target) - 1e-12
    return float(thresholds[np.argmax(np.where(reached, other, -1))])


def predictive_values(scores, prevalence):
    """Return prevalence, ppv_at_threshold and npv_at_threshold for another share of rare images.

    A value is None if no image would get that answer.
    """
    sensitivity = scores["sensitivity_at_threshold"]
    specificity = scores["specificity_at_threshold"]
    hits, misses = sensitivity * prevalence, (1 - sensitivity) * prevalence
    alarms, rests = (1 - specificity) * (1 - prevalence), specificity * (1 - prevalence)
    return {
        "prevalence": prevalence,
        "ppv_at_threshold": hits / (hits + alarms) if hits + alarms else None,
        "npv_at_threshold": rests / (rests + misses) if rests + misses else None,
    }


# --------------------------------------------------------------------------------------------------
# predictions
# --------------------------------------------------------------------------------------------------


def write_predictions(path, files, labels, splits, probabilities, minority, classes):
    """Write a CSV table with file, split, label and p_minority of every predicted image.

    More than two classes have a column p_<class> each. files: names of all M images; labels: int
    [M]; splits: {split: rows [n]}; probabilities: {split: p [n, C]}; minority: one label or
    several. All digits are kept: scores can be computed again.
    """
    further = [f"p_{name}" for name in classes] if len(classes) > 2 else []
    table = []
    for split, p in probabilities.items():
        columns = minority_probability(p, minority)[:, None]
        columns = np.column_stack([columns, p]) if further else columns
        for row, values in zip(splits[split], columns.tolist(), strict=True):
            table.append((files[row], split, labels[row], *values))
    write_table(path, ["file", "split", "label", "p_minority", *further], table)


def read_predictions(path):
    """Read predictions.csv as {column: array}: label int [n], p_* float64 [n], others str [n]."""
    header, rows = read_table(path)
    columns = dict(zip(header, np.array(rows, dtype=str).reshape(-1, len(header)).T, strict=True))
    kinds = {name: float for name in header if name.startswith("p_")} | {"label": int}
    return {name: column.astype(kinds.get(name, str)) for name, column in columns.items()}


# --------------------------------------------------------------------------------------------------
# what the terminal shows
# --------------------------------------------------------------------------------------------------


def print_test_scores(result, p, labels, classes, minority):
    """Print the test scores at the chosen threshold with their intervals, in percent.

    result: of score_splits; p, labels and minority: those it was given; classes: names.
    """
    scores = result["test"]
    rare_val, rare = (int(np.isin(labels[split], minority).sum()) for split in ("val", "test"))
    n = len(labels["test"])
    positive = int((minority_probability(p["test"], minority) >= scores["threshold"]).sum())
    print(f"threshold {scores['threshold']:.3g} ({result['threshold_rule']}, on validation):")
    for names in SHOWN:
        shown = [name for name in names if name in result["test_interval"]]
        print(" ", "   ".join(format_interval(name, result) for name in shown))
    shares = f"{rare} of {n} ({rare / n:.1%}), predicted {positive} ({positive / n:.1%})"
    names = " + ".join(classes[c] for c in np.atleast_1d(minority))
    numbers = " + ".join(map(str, np.atleast_1d(minority)))
    print(f"  test images of '{names}' (label {numbers}): {shares}")
    if rare < RARE_IMAGES_FOR_A_VERDICT:
        print(f"  WARNING: {rare} rare test images: intervals are wide")
    if rare_val < RARE_IMAGES_FOR_A_THRESHOLD:
        print(f"  WARNING: {rare_val} rare validation images: the threshold is uncertain")
    if "prevalence" in scores:
        values = (scores[f"{name}_at_threshold"] for name in ("ppv", "npv"))
        ppv, npv = ("undefined" if value is None else f"{value:.1%}" for value in values)
        print(f"  at a prevalence of {scores['prevalence']:.3g}: PPV {ppv}, NPV {npv}")


SHOWN = (
    ("sensitivity_at_threshold", "specificity_at_threshold", "balanced_accuracy_at_threshold"),
    ("auroc", "average_precision", "sensitivity_at_95_specificity"),
)


def format_interval(name, result):
    low, high = (100 * bound for bound in result["test_interval"][name])
    title = SCORE_TITLES[name].removesuffix(" at the chosen threshold")
    return f"{title} {100 * result['test'][name]:.1f} [{low:.1f}, {high:.1f}]"
