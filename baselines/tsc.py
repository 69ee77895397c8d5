"""TSC: KCL, and a fixed target per class."""

import torch
import torch.nn.functional as F

from baselines.kcl import KCL, kcl_loss
from baselines.shared import compute_similarities, weighted_contrast
from common import antipodal_prototypes

TARGET_WEIGHT = 0.2  # lambda of the paper


def tsc_loss(z, labels, targets, positives, temperature=0.07, variant="ttc", queue=None):
    """Targeted supervised contrastive learning (Li et al. 2022, arXiv:2111.13998): KCL that is also pulled to the target of the own class.

    Both targets stand in every denominator. Of an anchor with d drawn views and own views (k_i + 1 of them), a view and the target weigh
        "ttc"    1/(d + 1)  and  1/(d + 1)          the variant of arXiv:2503.17024
        "paper"  1/d        and  weight             as published, weight = lambda
        "code"   1/(d + 1)  and  weight/(d + 1)     as in the published code
    targets [2, D] unit vectors, row = class, without gradient; z, labels, positives, queue as in kcl_loss. Returns a scalar (nats).
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
    """Whether class 0 is to get targets[1]: the assignment that maximises sum_c c_c . t_c, in closed form for two classes; a tie is no swap.

    centroids [2, D]; targets [2, D]. Returns bool [].
    """
    return ((centroids[0] - centroids[1]) @ (targets[0] - targets[1])) < 0


class TSC(KCL):
    """Targets are a fixed antipodal pair: for two classes the optimum of the published objective, whichever pair it is.

    Variant "ttc" has them from the first epoch, class 0 on the first. "paper" and "code" train KCL for half of the epochs, meanwhile follow
    the class centroids, then give each class the target nearer to it, for good, and start optimizer and schedule afresh.
    """

    def __init__(self, model, subset, training, k, queue, variant):
        super().__init__(model, subset, training, k, queue)
        self.variant, self.has_targets = variant, False
        self.switch_epoch = 0 if variant == "ttc" else training.epochs // 2
        targets = antipodal_prototypes(model.dim, training.generator)
        # Row = class, from the switch on.
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
                z, labels, self.targets, positives, self.temperature, self.variant, queue=queue
            )
        self.update_centroids(z[:, 0].detach(), labels)
        return kcl_loss(z, labels, positives, self.temperature, queue)

    def update_centroids(self, z, labels, momentum=0.9):
        """Move the centroid of each class that the batch has a tenth of the way to its mean. z [N, D]."""
        members = F.one_hot(labels.long(), 2).to(z)  # [N, 2]
        with torch.autocast(z.device.type, enabled=False):
            mean = F.normalize(members.T @ z, dim=1)  # [2, D]; zero for a class that is not there
        moved = F.normalize(momentum * self.centroids + (1 - momentum) * mean, dim=1)
        self.centroids.copy_(torch.where(members.any(0)[:, None], moved, self.centroids))

    def schedule_span(self, epoch):
        return (
            (0, self.switch_epoch)
            if epoch < self.switch_epoch
            else (self.switch_epoch, self.epochs)
        )

    def collapse_value(self, images):
        return None  # the targets stand in the denominator
