"""Supervised: LDAM-DRW, logit adjustment, and re-training of the classifier on a frozen encoder (cRT, LWS, tau-normalisation)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.distributed import at_least_float32


class CosineClassifier(nn.Module):
    """Logits `scale` * cos(f, w_c), without bias: the classifier of LDAM and of BCL. f [B, D] -> [B, 2]."""

    def __init__(self, dim, scale=30.0):
        super().__init__()
        weight = torch.rand(2, dim) * 2 - 1
        self.weight, self.scale = nn.Parameter(F.normalize(weight, dim=1)), scale

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(at_least_float32(features), dim=1)
            return self.scale * features @ F.normalize(self.weight, dim=1).T


def ldam_margins(counts, max_margin=0.5):
    """Margins of LDAM (Cao et al. 2019, arXiv:1906.07413): m_c = max_margin * (n_c / n_min)^(-1/4), the rarer the larger. Returns [2]."""
    counts = torch.as_tensor(counts, dtype=torch.get_default_dtype())
    return max_margin * (counts / counts.min()) ** -0.25


def ldam_loss(cosines, targets, margins, scale=30.0, weights=None):
    """LDAM (Cao et al. 2019, arXiv:1906.07413): cross entropy of scale * (cos_c - m_c [c = y]), so the own class has to win by its margin.

    cosines [B, 2] between features and class weights, in [-1, 1] (CosineClassifier's logits divided by its scale); targets int [B];
    margins [2]; weights [2] or None: then divided by the sum of the
    weights in the batch. Returns a scalar (nats).
    """
    cosines, targets = at_least_float32(cosines), targets.long()
    adjusted = scale * (cosines - F.one_hot(targets, 2) * margins.to(cosines))
    weights = None if weights is None else weights.to(cosines)
    return F.cross_entropy(adjusted, targets, weight=weights)


def effective_number_weights(counts, beta=0.9999):
    """Class weights (1 - beta) / (1 - beta^n_c) (Cui et al. 2019, arXiv:1901.05555) that sum to 2; nearly 1/n_c while n_c << 1/(1 - beta)."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (2 * weights / weights.sum()).to(torch.get_default_dtype())


def logit_adjusted_loss(logits, targets, prior):
    """Logit adjustment (Menon et al. 2021, arXiv:2007.07314, tau = 1), the same as balanced softmax (Ren et al. 2020, arXiv:2007.10740).

    Cross entropy of logits + log prior: the classifier learns what is left when the prior is taken out, and predicts without it.
    logits [B, 2]; targets int [B]; prior [2], shares of the training images. Returns a scalar (nats).
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + prior.to(logits).log(), targets.long())


def tau_normalized(weight, tau):
    """tau-normalisation (Kang et al. 2020, arXiv:1910.09217): rows w_c / ||w_c||^tau. weight [2, D]; the bias is dropped by the caller."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


class LearnableScale(nn.Module):
    """LWS (Kang et al. 2020, arXiv:1910.09217): a trained linear classifier that stays as it is, times one learned scale per class.

    With two classes w_1 - w_0 is what was trained and w_0 + w_1 is left of the initialisation, and unequal scales mix the two: AUROC can fall.
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.scale = classifier.requires_grad_(False), nn.Parameter(torch.ones(2))

    def forward(self, features):  # [B, D] -> [B, 2]
        return self.classifier(features) * self.scale
