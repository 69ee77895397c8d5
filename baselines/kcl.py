"""KCL: every anchor has k positives, whatever its class."""

import torch
import torch.nn.functional as F

from baselines.shared import (
    MomentumEncoder,
    Queue,
    compute_similarities,
    mark_equal_pairs,
    uniform_weights,
    weighted_contrast,
)
from common import Method, collapse_value


def kcl_loss(z, labels, positives, temperature=0.07, queue=None):
    """k-positive contrastive learning (Kang et al. 2021, ICLR, "Exploring Balanced Feature Spaces"): w = 1 / (drawn + 1).

    Pulled to are the own other views and the drawn views of the same class; those that were not drawn stay in the denominator.
    z [N, V, D] unit vectors; labels int [N]; positives bool [V*N, V*N] from draw_k_positives.
    With queue [K, D] the MoCo form: anchors are the first views, the contrast set is the own second view (the key, without gradient) and
    the queue; positives bool [N, 1 + K] from draw_k_from_queue. Returns a scalar (nats).
    """
    s, contrast = compute_similarities(z, labels, positives, temperature, queue)
    return weighted_contrast(s, contrast, uniform_weights(positives, s)).mean()


def draw_k_positives(labels, views, k, generator):
    """For each anchor its other views, and min(k, candidates) other rows of its class, drawn without replacement.

    Candidates are all views of the other images of its class. labels int [N]. Returns bool [V*N, V*N], view-major, row = anchor.
    """
    same_image = mark_equal_pairs(torch.arange(len(labels), device=labels.device), views)
    candidates = mark_equal_pairs(labels, views) & ~same_image
    return draw_candidates(candidates, k, generator) | same_image.fill_diagonal_(False)


def draw_k_from_queue(labels, queue_labels, k, generator):
    """For each anchor its key, and min(k, candidates) entries of the queue of its class. Returns bool [N, 1 + K], column 0 = own key."""
    drawn = draw_candidates(labels[:, None] == queue_labels[None, :], k, generator)
    return F.pad(drawn, (1, 0), value=True)


def draw_candidates(candidates, k, generator):
    """min(k, candidates) of each row's candidates, without replacement: the largest of random numbers. bool [R, M] -> bool [R, M]."""
    if candidates.is_cuda:  # millions of numbers with a long queue: drawn where they are needed
        generator = torch.Generator(candidates.device).manual_seed(
            int(torch.randint(2**62, (), generator=generator))
        )
    order = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    chosen = order.masked_fill(~candidates, -1).topk(min(k, candidates.shape[1]), dim=1).indices
    return torch.zeros_like(candidates).scatter_(1, chosen, True) & candidates


class KCL(Method):
    """In-batch by default; with a queue, keys come from a momentum encoder."""

    def __init__(self, model, subset, training, k, queue):
        super().__init__(model, subset, training)
        self.k = k
        self.queue = Queue(queue, model.dim, training.generator) if queue else None
        self.key_encoder = MomentumEncoder(model) if queue else None

    def forward(self, model, batch):
        x, labels, generator = batch.x, batch.labels, batch.generator
        if self.queue is None:
            positives = draw_k_positives(labels, self.views, self.k, generator)
            return self.compute_loss(model(x).transpose(0, 1), labels, positives)
        keys = self.key_encoder(model, x[1])
        z = torch.stack([model(x[0]), keys], dim=1)
        positives = draw_k_from_queue(labels, self.queue.labels, self.k, generator)
        loss = self.compute_loss(z, labels, positives, self.queue.keys.clone())
        self.queue.push(keys, labels)
        return loss

    def compute_loss(self, z, labels, positives, queue=None):
        return kcl_loss(z, labels, positives, self.temperature, queue)

    def collapse_value(self, images):
        # With a queue the number of terms grows while it fills.
        return collapse_value(images) if self.queue is None else None
