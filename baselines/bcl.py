"""BCL: classes averaged in the denominator, and a learned centre of each class."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines.shared import class_prior
from baselines.supervised import CosineClassifier, logit_adjusted_loss
from common import Method, check_labels
from utils.contrast_kernel import flatten_views

CONTRAST_WEIGHT = 0.35


def bcl_loss(z, labels, centres, temperature=0.07):
    """Balanced contrastive learning (Zhu et al. 2022, arXiv:2207.09052): the denominator is a sum over classes of means.

    Den_i = sum_c mean_{j in B_c, j != i} exp(s_ij), with B_c the views of class c and its centre; pulled to is all of the own class, centre
    included. Centres are no anchors; they stand for a class that the batch has not.
    z [N, V, D] unit vectors; labels int [N]; centres [2, D] unit vectors, row = class, with gradient. Returns a scalar (nats).
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        s = rows @ torch.cat([rows, centres.to(rows)]).T / temperature  # [V*N, V*N + 2]
    columns = torch.arange(2, device=labels.device)
    columns = torch.cat([labels.repeat(z.shape[1]), columns])  # class of each column, [V*N + 2]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    log_means = []
    for c in (0, 1):
        members = others & (columns == c)
        log_sum = s.masked_fill(~members, -torch.inf).logsumexp(1)
        log_means.append(log_sum - members.sum(1).to(s).log())
    positives = others & (columns[: len(s), None] == columns[None, :])
    pulled = (s * positives).sum(1) / positives.sum(1)
    return (torch.logaddexp(*log_means) - pulled).mean()


class BCL(Method):
    """Two views are contrasted; a third trains a cosine classifier (logit-adjusted cross entropy), whose weights a head turns into centres.

    Over two centres batch norm makes every hidden unit of the one the opposite of the other's, and the ReLU then leaves them nearly
    orthogonal whatever the weights: variant "layernorm" avoids that, "batchnorm" is as published. Loss weights 1 and 0.35 as published
    for ImageNet-LT.
    """

    views = 3

    def __init__(self, model, subset, training, variant, randaugment):
        super().__init__(model, subset, training)
        norm = {"layernorm": nn.LayerNorm, "batchnorm": nn.BatchNorm1d}[variant]
        dim = model.encoder.dim
        self.classifier = CosineClassifier(dim)
        self.centre_head = nn.Sequential(
            nn.Linear(dim, dim), norm(dim), nn.ReLU(), nn.Linear(dim, model.dim)
        )
        self.register_buffer("prior", class_prior(subset))
        self.randaugment_views = (2,) if randaugment else ()

    def forward(self, model, batch):
        features = model.features(batch.x)  # [3, N, dim]
        z = model.project(features[:2]).transpose(0, 1)
        centres = F.normalize(self.centre_head(self.classifier.weight).float(), dim=1)
        classification = logit_adjusted_loss(self.classifier(features[2]), batch.labels, self.prior)
        contrast = bcl_loss(z, batch.labels, centres, self.temperature)
        return classification + CONTRAST_WEIGHT * contrast

    def collapse_value(self, images):
        return None
