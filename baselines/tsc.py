"""TSC: KCL, and a fixed target for each class."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from baselines.kcl import KCL, kcl_loss
from baselines.shared import compute_similarities, weighted_contrast
from common import simplex_prototypes

TARGET_WEIGHT = 0.2  # lambda of the paper


def tsc_loss(z, labels, targets, positives, temperature=0.07, variant="ttc", queue=None):
    """Targeted supervised contrastive learning: KCL with the target of the class as a positive.

    Equation (2) of shared.py; all targets stand in every denominator. An anchor with d positives
    among the views has these weights of a view and of its target:

        "ttc"    1/(d + 1)  and  1/(d + 1)         the variant of arXiv:2503.17024
        "paper"  1/d        and  lambda            as published
        "code"   1/(d + 1)  and  lambda/(d + 1)    as in the published code

    targets [C, D] unit vectors, row = class, without gradient; the rest as in kcl_loss. Returns a
    scalar (nats). Source: Li et al. 2022, arXiv:2111.13998.
    """
    s, contrast = compute_similarities(z, labels, positives, temperature, queue, targets.detach())
    positives = positives.to(s)
    own_target = F.one_hot(labels.long(), len(targets)).to(s).repeat(len(s) // len(labels), 1)
    count = positives.sum(1, keepdim=True)
    weights = {
        "ttc": (1 / (count + 1), 1 / (count + 1)),
        "paper": (1 / count, TARGET_WEIGHT),
        "code": (1 / (count + 1), TARGET_WEIGHT / (count + 1)),
    }
    if variant not in weights:
        raise ValueError(f"tsc_loss has the variants {', '.join(weights)}, not {variant}")
    view_weight, target_weight = weights[variant]
    weights = torch.cat([view_weight * positives, target_weight * own_target], dim=1)
    return weighted_contrast(s, contrast, weights).mean()


def assign_targets(centroids, targets):
    """Return the index of each class's target, int [C]: the largest sum_c centroid_c . target_c.

    Every target goes to one class. centroids [C, D]; targets [C, D].
    """
    return linear_sum_assignment((centroids @ targets.T).cpu(), maximize=True)[1]


class TSC(KCL):
    """KCL with targets on a simplex: as far apart as unit vectors can be.

    Variant "ttc" uses the targets from the first epoch; class c has target c. Variants "paper" and
    "code" train KCL for half of the epochs and follow the class centroids. Then each class gets a
    target for good, the nearest in sum. Optimizer and schedule start anew. Differs from the
    published code, in which the assignment may change at every step.
    """

    def __init__(self, model, subset, training, k, queue, variant):
        super().__init__(model, subset, training, k, queue)
        self.variant, self.has_targets = variant, False
        self.switch_epoch = 0 if variant == "ttc" else training.epochs // 2
        # Row = class from the switch on.
        targets = simplex_prototypes(len(subset.classes), model.dim, training.generator)
        self.register_buffer("targets", targets)
        self.register_buffer("centroids", torch.zeros_like(targets))

    def start_epoch(self, epoch, model):
        self.has_targets = epoch >= self.switch_epoch
        if epoch == self.switch_epoch:
            self.targets.copy_(self.targets[assign_targets(self.centroids, self.targets)])
        self.log_fields = {"targeted": self.has_targets}

    def compute_loss(self, z, labels, positives, queue=None):
        if self.has_targets:
            return tsc_loss(
                z, labels, self.targets, positives, self.temperature, self.variant, queue
            )
        self.update_centroids(z[:, 0].detach(), labels)
        return kcl_loss(z, labels, positives, self.temperature, queue)

    def update_centroids(self, z, labels, momentum=0.9):
        """Move centroids a tenth of the way to the class means of z [N, D].

        The centroid of a class that the batch lacks stays.
        """
        members = F.one_hot(labels.long(), len(self.targets)).to(z)  # [N, C]
        with torch.autocast(z.device.type, enabled=False):
            mean = F.normalize(members.T @ z, dim=1)  # [C, D]
        moved = F.normalize(momentum * self.centroids + (1 - momentum) * mean, dim=1)
        self.centroids.copy_(torch.where(members.any(0)[:, None], moved, self.centroids))

    def schedule_span(self, epoch):
        if epoch < self.switch_epoch:
            return 0, self.switch_epoch
        return self.switch_epoch, self.epochs

    def collapse_value(self, images):
        # The targets in the denominator change it.
        return None
