"""What several methods share: the weighted contrast, queue, momentum encoder, class prior.

Letters as in common.py: N images, V views, D dimensions, T temperature; z [N, V, D] are unit
vectors, rows are view-major, s_ij = z_i . z_j / T. KCL, TSC and SBCL generalise equation (1) there.
Anchor i has a contrast set D(i) and weights w_ip of its positives:

    L = mean_i sum_p w_ip [ log sum_{a in D(i)} exp(s_ia)  -  s_ip ]                         (2)
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check_labels
from utils.contrast_kernel import flatten_views


def mark_equal_pairs(values, views):
    """Mark the pairs of rows with equal values: [N] -> bool [V*N, V*N], view-major."""
    values = values.repeat(views)
    return values[:, None] == values[None, :]


def compute_similarities(z, labels, positives, temperature, queue=None, targets=None):
    """Return s_ij [R, M] of R anchors and M columns, and the contrast sets D(i), bool [R, M].

    Without a queue, anchors and columns are all V*N views. With queue [K, D], anchors are the first
    views; columns are the second view of the image, the key, and the queue. targets [C, D] add C
    columns at the end. positives: bool [R, M], without the targets; only its shape is checked.
    Raises ValueError for another shape of labels or positives.
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        if queue is None:
            anchors = flatten_views(z)
            cosines = anchors @ anchors.T
            contrast = ~torch.eye(len(anchors), dtype=torch.bool, device=z.device)
        else:
            anchors, keys = flatten_views(z[:, :2]).chunk(2)
            own_key = (anchors * keys.detach()).sum(1, keepdim=True)
            cosines = torch.cat([own_key, anchors @ queue.detach().to(anchors).T], dim=1)
            contrast = torch.ones_like(cosines, dtype=torch.bool)
        if positives.shape != cosines.shape:
            expected, shape = list(cosines.shape), list(positives.shape)
            raise ValueError(f"positives must be {expected}, not {shape}")
        if targets is not None:
            cosines = torch.cat([cosines, anchors @ targets.to(anchors).T], dim=1)
            contrast = F.pad(contrast, (0, len(targets)), value=True)
    return cosines / temperature, contrast


def weighted_contrast(s, contrast, weights):
    """Return equation (2) before the mean over anchors, [R]; s, contrast, weights [R, M]."""
    log_sum = s.masked_fill(~contrast, -torch.inf).logsumexp(1)
    return weights.sum(1) * log_sum - (weights * s).sum(1)


def uniform_weights(mask, dtype):
    """Return weights [R, M] that are equal where mask is true, and sum to 1 in each row."""
    return mask.to(dtype) / mask.sum(1, keepdim=True)


def class_prior(subset):
    """Return the shares of the classes among the training images, float32 [C]."""
    counts = torch.tensor(subset.train_counts(), dtype=torch.float32)
    return counts / counts.sum()


class Queue(nn.Module):
    """The last `size` keys and their labels, first in, first out.

    It starts with random unit vectors of label -1, which are positives of no anchor.
    """

    def __init__(self, size, dim, generator):
        super().__init__()
        keys = torch.randn(size, dim, generator=generator)
        self.register_buffer("keys", F.normalize(keys, dim=1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys, labels):
        """Replace the oldest entries by keys [N, D] and labels int [N]."""
        size = len(self.keys)
        if size:
            keys, labels = keys[-size:], labels[-size:]
            slots = (self.next + torch.arange(len(keys), device=keys.device)) % size
            self.keys[slots], self.labels[slots] = keys.to(self.keys), labels
            self.next.copy_((self.next + len(keys)) % size)


class MomentumEncoder(nn.Module):
    """The key network of MoCo: a copy that follows the trained network slowly, in train mode.

    Differs from the paper: batches are not shuffled between devices, because batch norm uses the
    statistics of all images. Source: He et al. 2020, arXiv:1911.05722.
    """

    def __init__(self, model, momentum=0.999):
        super().__init__()
        self.model, self.momentum = copy.deepcopy(model).requires_grad_(False), momentum

    @torch.no_grad()
    def forward(self, model, x):
        """Move a step towards `model`; return the keys of images x."""
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for key_weight, query_weight in pairs:
            key_weight.lerp_(query_weight, 1 - self.momentum)
        return self.model(x)
