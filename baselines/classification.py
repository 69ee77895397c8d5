"""Classifier, heads and losses of supervised training; the names are those of finetune.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines.supervised import (
    CosineClassifier,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
)
from common import class_weights, focal_loss

LOSSES = ("ce", "weighted_ce", "focal", "ldam_drw", "logit_adjusted")
SCALE = 30.0  # of the cosine classifier's logits

# Each builds a classifier on features [B, dim] with logits [B, 2].
HEADS = {
    "linear": lambda dim: nn.Linear(dim, 2),
    "mlp": lambda dim: nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, 2)
    ),
    "cosine": lambda dim: CosineClassifier(dim, SCALE),
}


class Classifier(nn.Module):
    """An encoder and a head with two logits.

    has_fixed_encoder: the encoder stays in eval mode; its batch-norm statistics are fixed, too.
    """

    def __init__(self, encoder, head, has_fixed_encoder):
        super().__init__()
        self.encoder, self.head, self.has_fixed_encoder = encoder, head, has_fixed_encoder

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.has_fixed_encoder)
        return self

    def forward(self, x):  # [B, 3, H, W] -> [B, 2]
        return self.head(self.encoder(x))


def make_loss(name, counts, epochs, gamma=2.0):
    """Return a loss of LOSSES: (logits [B, 2], targets [B], epoch) -> scalar (nats).

    counts [2]: images of each class; weights, margins and priors come from them. epochs: of the
    training, for ldam_drw. gamma: of the focal loss.
    """
    weights, prior = class_weights(counts), torch.tensor(counts) / sum(counts)
    margins, late_weights = ldam_margins(counts), effective_number_weights(counts)

    def ldam_drw(logits, targets, epoch):
        used = late_weights if epoch >= first_selectable_epoch("ldam_drw", epochs) else None
        return ldam_loss(logits / SCALE, targets, margins, SCALE, used)

    losses = {
        "ce": lambda logits, targets, epoch: F.cross_entropy(logits, targets),
        # A batch of one class is not weighted: the mean divides by the weights in the batch. The
        # published code does the same.
        "weighted_ce": lambda logits, targets, epoch: F.cross_entropy(logits, targets, weights),
        "focal": lambda logits, targets, epoch: focal_loss(logits, targets, gamma, weights),
        "ldam_drw": ldam_drw,
        "logit_adjusted": lambda logits, targets, epoch: logit_adjusted_loss(
            logits, targets, prior
        ),
    }
    return losses[name]


def first_selectable_epoch(name, epochs):
    """Return the first 0-based epoch that validation may choose.

    ldam_drw defers its class weights to the last fifth of the epochs; only those may be chosen.
    """
    return 4 * epochs // 5 if name == "ldam_drw" else 0
