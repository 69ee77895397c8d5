"""Scores and predictions of a binary classifier."""

import csv

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from utils.cli import UserError
from utils.files import atomic_write


def classification_scores(probabilities, labels, minority):
    """Return accuracy, balanced_accuracy, auroc and f1 as fractions.

    probabilities [n] of label 1; labels [n]. The predicted class is that above 0.5; auroc and f1
    take the minority as the positive class. Raises UserError if a class has no image.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {len(labels)} images are of one class; scores need both")
    predicted = (probabilities > 0.5).astype(int)
    p_minority = probabilities if minority else 1 - probabilities
    f1 = f1_score(labels, predicted, pos_label=minority, zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "auroc": float(roc_auc_score(labels == minority, p_minority)),
        "f1": float(f1),
    }


def write_predictions(path, files, labels, predictions):
    """Write a CSV table with file, split, label and p_minority of every predicted image.

    files: names of all M images; labels: int [M]; predictions: {split: (rows [n], p [n])}, where p
    is the probability of the minority class. All digits are kept: scores can be computed again.
    """
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(["file", "split", "label", "p_minority"])
        for split, (rows, probabilities) in predictions.items():
            for row, p in zip(rows, probabilities, strict=True):
                table.writerow([files[row], split, labels[row], float(p)])
