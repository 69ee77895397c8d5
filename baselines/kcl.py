"""KCL: every anchor has at most k positives of its class beside the views of its image."""

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
    """k-positive contrastive learning: SupCon with few positives, drawn at random.

        L = mean_i [ log sum_{a in D(i)} exp(s_ia)  -  mean_{p in P(i)} s_ip ]

    P(i): the other views of the image and k drawn views of its class. D(i): all other views, also
    those of the class that were not drawn. With queue [K, D], the form of MoCo: anchors are the
    first views; D(i) is the second view of the image, the key without gradient, and the queue.
    z [N, V, D] unit vectors; labels int [N]; positives: bool [V*N, V*N] of draw_k_positives, with a
    queue bool [N, 1 + K] of draw_k_from_queue. Returns a scalar (nats).
    Source: Kang et al. 2021, ICLR, "Exploring Balanced Feature Spaces".
    """
    s, contrast = compute_similarities(z, labels, positives, temperature, queue)
    return weighted_contrast(s, contrast, uniform_weights(positives, s.dtype)).mean()


def draw_k_positives(labels, views, k, generator):
    """Draw min(k, candidates) rows for each anchor, and add the other views of its image.

    Candidates are all views of the other images of its class, drawn without replacement.
    labels int [N]. Returns bool [V*N, V*N], view-major, row = anchor.
    """
    same_image = mark_equal_pairs(torch.arange(len(labels), device=labels.device), views)
    candidates = mark_equal_pairs(labels, views) & ~same_image
    return draw_candidates(candidates, k, generator) | same_image.fill_diagonal_(False)


def draw_k_from_queue(labels, queue_labels, k, generator):
    """Draw min(k, candidates) keys of the class for each image, and add its own key.

    labels int [N]; queue_labels int [K]. Returns bool [N, 1 + K], column 0 = own key.
    """
    drawn = draw_candidates(labels[:, None] == queue_labels[None, :], k, generator)
    return F.pad(drawn, (1, 0), value=True)


def draw_candidates(candidates, k, generator):
    """Draw min(k, candidates) of each row without replacement: bool [R, M] -> bool [R, M].

    Every candidate gets a random number; the k largest are drawn.
    """
    # On the CPU: the numbers that a GPU draws depend on its model.
    order = torch.rand(candidates.shape, generator=generator, pin_memory=candidates.is_cuda)
    order = order.to(candidates.device, non_blocking=True)
    chosen = order.masked_fill(~candidates, -1).topk(min(k, candidates.shape[1]), dim=1).indices
    return torch.zeros_like(candidates).scatter_(1, chosen, True) & candidates


class KCL(Method):
    """KCL within the batch, or with a queue whose keys come from a momentum encoder."""

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
        # With a queue it changes while keys replace the random vectors.
        return collapse_value(images) if self.queue is None else None
