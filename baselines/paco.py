"""PaCo and GPaCo: a linear classifier's logits as one more positive, and a queue."""

import torch
import torch.nn as nn

from baselines.shared import MomentumEncoder, Queue, class_prior
from common import Method, check_labels
from utils.contrast_kernel import flatten_views
from utils.distributed import at_least_float32


def paco_loss(z, labels, logits, prior, queue, temperature=0.2, alpha=0.05):
    """Parametric contrastive learning (Cui et al. 2021, arXiv:2107.12028; GPaCo: Cui et al. 2023, arXiv:2209.12400).

    With o = logits + log prior, K(i) all other views and the queue, and P(i) the rows of K(i) of the own class,
        Z_i = sum_c exp(o_ic) + gamma sum_{j in K(i)} exp(s_ij)
        L_i = -[ beta (o_iy - log Z_i) + alpha sum_{j in P(i)} (s_ij - log Z_i) ] / (beta + alpha |P(i)|).
    z [N, 2, D] unit vectors; labels int [N]; logits [N, A, 2] of the first A views, which are the anchors: A = 1 is PaCo, where the second
    view is a key without gradient, A = 2 is GPaCo; prior [2]; queue [K, D] and queue_labels [K] without gradient; alpha a float or one per
    class (0.05 as published, for many classes: see PaCo). No queue is one of length 0. Returns a scalar (nats).
    """
    check_labels(z, labels)
    if z.shape[1] != 2 or logits.ndim != 3 or logits.shape[1] not in (1, 2):
        raise ValueError(
            f"PaCo takes two views and logits [N, 1 or 2, 2], not {z.shape[1]} views and logits {list(logits.shape)}"
        )
    (keys, key_labels), anchor_views = queue, logits.shape[1]
    if anchor_views == 1:
        z = torch.stack([z[:, 0], z[:, 1].detach()], dim=1)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        columns = torch.cat([rows, keys.detach().to(rows)])  # [2N + K, D]
        s = rows[: anchor_views * len(z)] @ columns.T / temperature  # [A*N, 2N + K]
    o = at_least_float32(logits).transpose(0, 1).flatten(0, 1) + prior.to(s).log()  # [A*N, 2]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    y = labels.long().repeat(anchor_views)  # [A*N]
    positives = others & (y[:, None] == torch.cat([labels.repeat(2), key_labels])[None, :])
    log_z = torch.logaddexp(o.logsumexp(1), s.masked_fill(~others, -torch.inf).logsumexp(1))
    alpha = torch.as_tensor(alpha, dtype=s.dtype).to(s.device, non_blocking=True).expand(2)[y]
    pulled = o.gather(1, y[:, None]).squeeze(1) + alpha * (s * positives).sum(1)
    return (log_z - pulled / (1 + alpha * positives.sum(1))).mean()


class PaCo(Method):
    """alpha is set per class by default: with two classes one published value (0.05, for a thousand classes) all but switches the classifier
    off for the majority. alpha_c = 0.4 / E[|P|] gives the centre of either class the share of the probability, 1 / 1.4, that it has there.

    Variant "gpaco" has no momentum encoder: both views go through the network, both are anchors. The second view's embedding is queued.
    """

    def __init__(self, model, subset, training, variant, alpha, queue, randaugment):
        super().__init__(model, subset, training)
        self.centres = nn.Linear(model.encoder.dim, 2)
        self.queue = Queue(queue, model.dim, training.generator)
        self.key_encoder = MomentumEncoder(model) if variant == "paco" else None
        self.register_buffer("prior", class_prior(subset))
        # The own other view, and the rows of the own class.
        expected = 1 + self.prior * (2 * training.batch_size - 2 + queue)
        self.register_buffer("alpha", 0.4 / expected if alpha is None else torch.full((2,), alpha))
        self.log_fields = {"alpha": [float(f"{a:.3g}") for a in self.alpha.tolist()]}
        self.randaugment_views = (0,) if randaugment else ()

    def forward(self, model, batch):
        x, labels = batch.x, batch.labels
        if self.key_encoder:
            features = model.features(x[0])[:, None]  # [N, 1, dim]
            z = torch.stack([model.project(features[:, 0]), self.key_encoder(model, x[1])], dim=1)
        else:
            features = model.features(x).transpose(0, 1)  # [N, 2, dim]
            z = model.project(features.contiguous())
        logits, queue = self.centres(features), (self.queue.keys.clone(), self.queue.labels)
        loss = paco_loss(z, labels, logits, self.prior, queue, self.temperature, self.alpha)
        self.queue.push(z[:, 1].detach(), labels)
        return loss

    def collapse_value(self, images):
        return None
