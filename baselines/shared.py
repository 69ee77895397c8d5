"""What they share."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_labels
from utils.contrast_kernel import flatten_views
from utils.distributed import at_least_float32


def mark_equal_pairs(values, views):
    """Which rows are of images with equal values: [N] -> bool [V*N, V*N], view-major."""
    values = values.repeat(views)
    return values[:, None] == values[None, :]


def compute_similarities(z, labels, positives, temperature, queue=None, targets=None):
    """Similarities of all anchors to all columns, and which of these are in the anchor's contrast set: [R, M], bool [R, M].

    Columns are all views, or the own key and the queue; then the targets, if any.
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        if queue is None:
            anchors = flatten_views(z)
            cosines = anchors @ anchors.T
            contrast = ~torch.eye(len(anchors), dtype=torch.bool, device=z.device)
        else:
            anchors, keys = at_least_float32(z[:, 0]), at_least_float32(z[:, 1].detach())
            own_key = (anchors * keys).sum(1, keepdim=True)
            cosines = torch.cat([own_key, anchors @ queue.detach().to(anchors).T], dim=1)
            contrast = torch.ones_like(cosines, dtype=torch.bool)
        if positives.shape != cosines.shape:
            raise ValueError(
                f"positives must be {list(cosines.shape)}, not {list(positives.shape)}"
            )
        if targets is not None:
            cosines = torch.cat([cosines, anchors @ targets.to(anchors).T], dim=1)
            contrast = F.pad(contrast, (0, len(targets)), value=True)
    return cosines / temperature, contrast


def weighted_contrast(s, contrast, weights):
    """Equation (2) before the mean over anchors: [R]. s, contrast, weights [R, M]."""
    log_sum = s.masked_fill(~contrast, -torch.inf).logsumexp(1)
    return weights.sum(1) * log_sum - (weights * s).sum(1)


def uniform_weights(mask, like):
    """Equal weights of what the mask [R, M] holds, summing to 1 in each row; in the precision of `like`."""
    return mask.to(like) / mask.sum(1, keepdim=True)


def class_prior(subset):
    """Shares of the two classes among the training images: [2]."""
    counts = torch.tensor(subset.train_counts(), dtype=torch.float32)
    return counts / counts.sum()


class Queue(nn.Module):
    """The last `size` keys and their labels, first in, first out. It begins with random unit vectors of label -1, nobody's positives."""

    def __init__(self, size, dim, generator):
        super().__init__()
        keys = torch.randn(size, dim, generator=generator)
        self.register_buffer("keys", F.normalize(keys, dim=1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys, labels):
        size = len(self.keys)
        if size:
            keys, labels = keys[-size:], labels[-size:]
            slots = (self.next + torch.arange(len(keys), device=keys.device)) % size
            self.keys[slots], self.labels[slots] = keys.to(self.keys), labels
            self.next.copy_((self.next + len(keys)) % size)


class MomentumEncoder(nn.Module):
    """The key network of MoCo (He et al. 2020, arXiv:1911.05722): a copy that follows the trained one slowly. In train mode,
    without the shuffling of batches between devices: batch norm sees the images of all."""

    def __init__(self, model, momentum=0.999):
        super().__init__()
        self.model, self.momentum = copy.deepcopy(model).requires_grad_(False), momentum

    @torch.no_grad()
    def forward(self, model, x):
        for key, query in zip(self.model.parameters(), model.parameters(), strict=True):
            key.lerp_(query, 1 - self.momentum)
        return self.model(x)
