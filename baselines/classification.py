"""Classifier, heads and losses of supervised training; the names are those of finetune.py."""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines.supervised import (
    CosineClassifier,
    LearnableScale,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
)
from common import class_weights, focal_loss
from datasets.predict import ImageClassifier
from utils.cli import UserError
from utils.distributed import at_least_float32
from utils.encoders import Pixels, build_encoder
from utils.files import read_json, write_json
from utils.runs import load_strict, load_tensors, module_sha256

LOSSES = ("ce", "weighted_ce", "focal", "ldam_drw", "logit_adjusted", "auc_margin")
SCALE = 30.0  # of the cosine classifier's logits

# Each builds a classifier on features [B, dim] with logits [B, C].
HEADS = {
    "linear": nn.Linear,
    "mlp": lambda dim, classes: nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, classes)
    ),
    "cosine": lambda dim, classes: CosineClassifier(dim, SCALE, classes),
    "lws": lambda dim, classes: LearnableScale(nn.Linear(dim, classes)),
}


class Classifier(nn.Module):
    """An encoder and a head with a logit per class.

    has_fixed_encoder: the encoder stays in eval mode; its batch-norm statistics are fixed, too.
    """

    def __init__(self, encoder, head, has_fixed_encoder):
        super().__init__()
        self.encoder, self.head, self.has_fixed_encoder = encoder, head, has_fixed_encoder

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.has_fixed_encoder)
        return self

    def forward(self, x):  # [B, 3, H, W] -> [B, C]
        return self.head(self.encoder(x))


def make_loss(name, counts, epochs, gamma=2.0):
    """Return a loss of LOSSES: (logits [B, C], targets [B], epoch) -> scalar (nats).

    counts [C]: images of each class; weights, margins and priors come from them. epochs: of the
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
        "auc_margin": lambda logits, targets, epoch: auc_margin_loss(logits, targets),
    }
    return losses[name]


def auc_margin_loss(logits, targets, margin=1.0):
    """AUC-margin loss with its inner optimum in closed form.

        L = var(h+) + var(h-) + max(0, m + mean(h-) - mean(h+))^2

    h is the probability of class 1; + and - are the images of class 1 and 0 in the batch, and
    variances are divided by their number. Swapping the classes gives the same loss. A class without
    an image adds nothing: its variance and the last term, which compares the classes, are 0.

    logits [B, 2]; targets int [B]. Returns a scalar. It is the min-max form of the source,
    min_ab max_alpha mean((h+ - a)^2) + mean((h- - b)^2) + 2 alpha (m + mean(h-) - mean(h+)) -
    alpha^2, at its saddle point. Source: Yuan et al. 2021, arXiv:2012.03173.
    """
    with torch.autocast(logits.device.type, enabled=False):
        h = at_least_float32(logits).softmax(1)[:, 1:]  # [B, 1]
        members = F.one_hot(targets.long(), 2).to(h)  # [B, 2]
        counts = members.sum(0)
        means = (h * members).sum(0) / counts.clamp(min=1)  # [2]
        variances = ((h - means).square() * members).sum(0) / counts.clamp(min=1)
        gap = (margin + means[0] - means[1]).clamp(min=0)
        return variances.sum() + gap.square() * (counts > 0).all()


def first_selectable_epoch(name, epochs):
    """Return the first 0-based epoch that validation may choose.

    ldam_drw defers its class weights to the last fifth of the epochs; only those may be chosen.
    """
    return 4 * epochs // 5 if name == "ldam_drw" else 0


# --------------------------------------------------------------------------------------------------
# a trained classifier in its run folder; it needs neither the subset nor its images
# --------------------------------------------------------------------------------------------------


def write_classifier(path, encoder, encoder_path, subset, **settings):
    """Write the JSON file of a trained classifier: what load_classifier needs beside weights.

    encoder_path: the file of the encoder's weights, None for pixels. settings: arch, stem, head,
    weights (the file of the head, beside `path`), threshold, threshold_rule and smoke.
    """
    of_subset = ("classes", "minority", "size", "recipe", "mean", "std")
    settings |= {key: getattr(subset, key) for key in of_subset}
    settings["stored_size"], settings["channels"] = subset.images.shape[2:]
    settings["encoder"] = encoder_path and os.path.relpath(encoder_path, path.parent)
    settings["encoder_sha256"] = module_sha256(encoder)
    write_json(path, settings)


def load_classifier(path):
    """Load the classifier that a JSON file of write_classifier describes, as an ImageClassifier.

    Raises UserError if a file is missing, or if the encoder is another than in training.
    """
    settings = read_json(path, "run the training command again; it writes this file")
    if settings["arch"] == "pixels":
        encoder = Pixels(settings["channels"], settings["size"])
    else:
        encoder, file = build_encoder(settings["arch"], settings["stem"]), settings["encoder"]
        if not (path.parent / file).exists():
            raise UserError(f"{path.parent / file}: no such file; keep {path.parent} in its run")
        load_strict(encoder, load_tensors(path.parent / file), path.parent / file)
    if module_sha256(encoder) != settings["encoder_sha256"]:
        raise UserError(f"{path}: belongs to another encoder; move it back, or train it again")
    if settings["smoke"]:
        print(f"  WARNING: {path} was trained with --smoke; its probabilities mean nothing")
    head = HEADS[settings["head"]](encoder.dim, len(settings["classes"]))
    weights = path.with_name(settings["weights"])
    load_strict(head, load_tensors(weights), weights)
    return ImageClassifier(Classifier(encoder, head, has_fixed_encoder=True), settings).eval()
