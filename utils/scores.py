"""Scores of a binary classifier."""

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from utils.cli import UserError


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
