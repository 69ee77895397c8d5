"""PaCo and GPaCo: the logit of the class is one more positive; a queue gives the others."""

import math

import torch
import torch.nn as nn

from baselines.shared import MomentumEncoder, Queue, class_prior
from common import Method, check_labels
from utils.contrast_kernel import flatten_views
from utils.distributed import at_least_float32


def paco_loss(
    z, labels, logits, prior, queue, queue_labels, temperature=0.2, alpha=0.05, beta=1.0, gamma=1.0
):
    """Parametric contrastive learning: the logit of the class is one more positive.

        Z_i = sum_c exp(o_ic) + gamma sum_{j in K(i)} exp(s_ij),   o = logits + log prior
        L_i = -[ beta (o_iy - log Z_i) + alpha sum_{j in P(i)} (s_ij - log Z_i) ]
              / (beta + alpha |P(i)|)

    K(i): all other views and the queue; y: the class of i; P(i): the rows of K(i) of class y.
    z [N, 2, D] unit vectors; labels int [N]; logits [N, A, C] of the first A views, the anchors.
    A = 1 is PaCo: the second view is a key without gradient. A = 2 is GPaCo. prior [C];
    queue [K, D] and queue_labels int [K] without gradient, K >= 0; alpha: a float, or one per
    class. Returns the mean of L_i, a scalar (nats).
    Sources: Cui et al. 2021, arXiv:2107.12028; GPaCo: Cui et al. 2023, arXiv:2209.12400.
    """
    check_labels(z, labels)
    if z.shape[1] != 2 or logits.ndim != 3 or logits.shape[1] not in (1, 2):
        shapes = f"z {list(z.shape)} and logits {list(logits.shape)}"
        raise ValueError(f"paco_loss needs z [N, 2, D] and logits [N, 1 or 2, C], not {shapes}")
    anchor_views = logits.shape[1]
    if anchor_views == 1:
        z = torch.stack([z[:, 0], z[:, 1].detach()], dim=1)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        columns = torch.cat([rows, queue.detach().to(rows)])  # [2N + K, D]
        s = rows[: anchor_views * len(z)] @ columns.T / temperature  # [A*N, 2N + K]
    o = at_least_float32(logits).transpose(0, 1).flatten(0, 1) + prior.to(s).log()  # [A*N, C]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    y = labels.long().repeat(anchor_views)  # [A*N]
    positives = others & (y[:, None] == torch.cat([labels.repeat(2), queue_labels])[None, :])
    log_z = o.logsumexp(1)
    if gamma:
        log_sum = s.masked_fill(~others, -torch.inf).logsumexp(1)
        log_z = torch.logaddexp(log_z, log_sum + math.log(gamma))
    alpha = torch.as_tensor(alpha, dtype=s.dtype).to(s.device, non_blocking=True)
    alpha = alpha.expand(len(prior))[y]
    pulled = beta * o.gather(1, y[:, None]).squeeze(1) + alpha * (s * positives).sum(1)
    return (log_z - pulled / (beta + alpha * positives.sum(1))).mean()


class PaCo(Method):
    """A linear classifier beside the projection head, and a queue of keys.

    Variant "paco": keys come from a momentum encoder. Variant "gpaco": both views pass through the
    network and are anchors; the second is queued.
    The published alpha, 0.05, is meant for a thousand classes. With two classes and a long queue it
    leaves hardly any probability to the majority's logit. So the default is one alpha per class,
    0.4 / E[|P|], which gives either logit its published share of the probability, 1 / 1.4.
    """

    def __init__(self, model, subset, training, variant, alpha, queue, randaugment):
        super().__init__(model, subset, training)
        self.centres = nn.Linear(model.encoder.dim, len(subset.classes))
        self.queue = Queue(queue, model.dim, training.generator)
        self.key_encoder = MomentumEncoder(model) if variant == "paco" else None
        self.register_buffer("prior", class_prior(subset))
        # E[|P|]: the other view of the image, and the rows of its class.
        expected = 1 + self.prior * (2 * training.batch_size - 2 + queue)
        constant = torch.full_like(self.prior, alpha or 0)
        self.register_buffer("alpha", 0.4 / expected if alpha is None else constant)
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
        loss = paco_loss(z, labels, logits, self.prior, *queue, self.temperature, self.alpha)
        self.queue.push(z[:, 1].detach(), labels)
        return loss

    def collapse_value(self, images):
        # The logits change it.
        return None
