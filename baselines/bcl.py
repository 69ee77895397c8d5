"""BCL: the denominator averages the classes, and each class has a learned centre."""

from functools import reduce

import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines.shared import class_prior
from baselines.supervised import CosineClassifier, logit_adjusted_loss
from common import Method, check_labels
from utils.contrast_kernel import flatten_views

CONTRAST_WEIGHT = 0.35  # of bcl_loss beside the classifier's loss, as for ImageNet-LT


def bcl_loss(z, labels, centres, temperature=0.07):
    """Balanced contrastive learning: the denominator is a sum over classes of means.

        L = mean_i [ log sum_c mean_{a in B_c(i)} exp(s_ia)  -  mean_{p in B_y(i)} s_ip ]

    B_c(i): the views of class c without i, and the centre of c; y: the class of i. Centres are no
    anchors; they represent a class that the batch lacks.
    z [N, V, D] unit vectors; labels int [N]; centres [C, D] unit vectors, row = class, with
    gradient. Returns a scalar (nats). Source: Zhu et al. 2022, arXiv:2207.09052.
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        s = rows @ torch.cat([rows, centres.to(rows)]).T / temperature  # [V*N, V*N + C]
    centre_labels = torch.arange(len(centres), device=labels.device)
    column_labels = torch.cat([labels.repeat(z.shape[1]), centre_labels])  # [V*N + C]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    log_means = []
    for c in range(len(centres)):
        members = others & (column_labels == c)
        log_sum = s.masked_fill(~members, -torch.inf).logsumexp(1)
        log_means.append(log_sum - members.sum(1).to(s).log())
    positives = others & (column_labels[: len(s), None] == column_labels[None, :])
    pulled = (s * positives).sum(1) / positives.sum(1)
    return (reduce(torch.logaddexp, log_means) - pulled).mean()


class BCL(Method):
    """Two views for bcl_loss; a third view trains a cosine classifier by logit adjustment.

    A head turns the weights of the classifier into centres. As published, the head has a batch norm
    (variant "batchnorm"). Over two centres it makes every hidden unit of one the opposite of the
    other's. After the ReLU no unit is active for both, so the centres are nearly orthogonal for any
    weights. Variant "layernorm" avoids that.
    """

    views = 3

    def __init__(self, model, subset, training, variant, randaugment):
        super().__init__(model, subset, training)
        norm = {"layernorm": nn.LayerNorm, "batchnorm": nn.BatchNorm1d}[variant]
        dim = model.encoder.dim
        self.classifier = CosineClassifier(dim, classes=len(subset.classes))
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
        # The loss of the classifier adds to it.
        return None
