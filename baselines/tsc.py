"""TSC: KCL, and a fixed target for each class."""

import torch
import torch.nn.functional as F

from baselines.kcl import KCL, kcl_loss
from baselines.shared import compute_similarities, weighted_contrast
from common import antipodal_prototypes

TARGET_WEIGHT = 0.2  # lambda of the paper


def tsc_loss(z, labels, targets, positives, temperature=0.07, variant="ttc", queue=None):
    """Targeted supervised contrastive learning: KCL with the target of the class as a positive.

    Equation (2) of shared.py; both targets stand in every denominator. An anchor with d positives
    among the views has these weights of a view and of its target:

        "ttc"    1/(d + 1)  and  1/(d + 1)         the variant of arXiv:2503.17024
        "paper"  1/d        and  lambda            as published
        "code"   1/(d + 1)  and  lambda/(d + 1)    as in the published code

    targets [2, D] unit vectors, row = class, without gradient; the rest as in kcl_loss. Returns a
    scalar (nats). Source: Li et al. 2022, arXiv:2111.13998.
    """
    s, contrast = compute_similarities(z, labels, positives, temperature, queue, targets.detach())
    positives = positives.to(s)
    own_target = F.one_hot(labels.long(), 2).to(s).repeat(len(s) // len(labels), 1)
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


def is_swap_better(centroids, targets):
    """Return whether class 0 should get targets[1] and class 1 targets[0], bool [].

    The better assignment has the larger sum_c centroid_c . target_c; a tie is no swap.
    centroids [2, D]; targets [2, D].
    """
    return ((centroids[0] - centroids[1]) @ (targets[0] - targets[1])) < 0


class TSC(KCL):
    """KCL with an antipodal pair of targets; for two classes, any such pair is optimal.

    Variant "ttc" uses the targets from the first epoch; class 0 has the first. Variants "paper" and
    "code" train KCL for half of the epochs and follow the class centroids. Then each class gets the
    nearer target for good, and optimizer and schedule start anew. Differs from the published code,
    in which the assignment may change at every step.
    """

    def __init__(self, model, subset, training, k, queue, variant):
        super().__init__(model, subset, training, k, queue)
        self.variant, self.has_targets = variant, False
        self.switch_epoch = 0 if variant == "ttc" else training.epochs // 2
        # Row = class from the switch on.
        targets = antipodal_prototypes(model.dim, training.generator)
        self.register_buffer("targets", targets)
        self.register_buffer("centroids", torch.zeros(2, model.dim))

    def start_epoch(self, epoch, model):
        self.has_targets = epoch >= self.switch_epoch
        if epoch == self.switch_epoch and is_swap_better(self.centroids, self.targets):
            self.targets.copy_(self.targets.flip(0))
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
        members = F.one_hot(labels.long(), 2).to(z)  # [N, 2]
        with torch.autocast(z.device.type, enabled=False):
            mean = F.normalize(members.T @ z, dim=1)  # [2, D]
        moved = F.normalize(momentum * self.centroids + (1 - momentum) * mean, dim=1)
        self.centroids.copy_(torch.where(members.any(0)[:, None], moved, self.centroids))

    def schedule_span(self, epoch):
        if epoch < self.switch_epoch:
            return 0, self.switch_epoch
        return self.switch_epoch, self.epochs

    def collapse_value(self, images):
        # The targets in the denominator change it.
        return None
