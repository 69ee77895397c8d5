"""Supervised losses and classifiers: LDAM, logit adjustment, LWS, tau-normalisation."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.distributed import at_least_float32


class CosineClassifier(nn.Module):
    """Logits scale * cos(f, w_c) without bias, as in LDAM and BCL: f [B, D] -> [B, C]."""

    def __init__(self, dim, scale=30.0, classes=2):
        super().__init__()
        weight = torch.rand(classes, dim) * 2 - 1
        self.weight, self.scale = nn.Parameter(F.normalize(weight, dim=1)), scale

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(at_least_float32(features), dim=1)
            return self.scale * features @ F.normalize(self.weight, dim=1).T


def ldam_margins(counts, max_margin=0.5):
    """Return the margins of LDAM, m_c = max_margin * (n_c / n_min)^(-1/4), [C].

    counts: n_c, one number per class. Source: Cao et al. 2019, arXiv:1906.07413.
    """
    counts = torch.as_tensor(counts, dtype=torch.get_default_dtype())
    return max_margin * (counts / counts.min()) ** -0.25


def ldam_loss(cosines, targets, margins, scale=30.0, weights=None):
    """LDAM: cross entropy of scale * (cos_c - m_c [c = y]); the own class must win by m_y.

    cosines [B, C] in [-1, 1]: logits of CosineClassifier / its scale; targets int [B]; margins [C];
    weights [C] or None. The weighted sum is divided by the sum of the weights in the batch. Returns
    a scalar (nats). Source: Cao et al. 2019, arXiv:1906.07413.
    """
    cosines, targets = at_least_float32(cosines), targets.long()
    adjusted = scale * (cosines - F.one_hot(targets, cosines.shape[1]) * margins.to(cosines))
    weights = None if weights is None else weights.to(cosines)
    return F.cross_entropy(adjusted, targets, weight=weights)


def effective_number_weights(counts, beta=0.9999):
    """Return class weights (1 - beta) / (1 - beta^n_c), scaled to sum to C, [C].

    They are nearly proportional to 1/n_c while n_c << 1/(1 - beta).
    Source: Cui et al. 2019, arXiv:1901.05555.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (len(weights) * weights / weights.sum()).to(torch.get_default_dtype())


def logit_adjusted_loss(logits, targets, prior):
    """Logit adjustment with tau = 1, or balanced softmax: cross entropy of logits + log prior.

    At test time the logits are used without the prior.
    logits [B, C]; targets int [B]; prior [C]: shares of the training images. Returns a scalar
    (nats). Sources: Menon et al. 2021, arXiv:2007.07314; Ren et al. 2020, arXiv:2007.10740.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + prior.to(logits).log(), targets.long())


def tau_normalized(weight, tau):
    """Return the rows w_c / ||w_c||^tau of a classifier's weight [C, D].

    The caller drops the bias. With two classes the rows get opposite gradients, so their norms stay
    as they began. The method then does little more than drop the bias.
    Source: Kang et al. 2020, arXiv:1910.09217.
    """
    return weight / weight.norm(dim=1, keepdim=True) ** tau


class LearnableScale(nn.Module):
    """LWS: a trained linear classifier, frozen, times one learned scale per class.

    With two classes, training changes only w_1 - w_0; w_0 + w_1 stays as initialised. Unequal
    scales mix the two, so AUROC can fall. Source: Kang et al. 2020, arXiv:1910.09217.
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(classifier.out_features))

    def forward(self, features):  # [B, D] -> [B, C]
        return self.classifier(features) * self.scale
