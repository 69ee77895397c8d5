"""The methods that the paper compares with, and later ones: losses, heads, queues, clustering.

Letters as in losses.py: N images, V views of each, D dimensions, T temperature; z is [N, V, D], unit vectors; rows are view-major.
KCL, TSC and SBCL are weighted forms of equation (1) there: anchor i has a contrast set D(i) and weights w_ip of what it is pulled to,

    L = mean_i sum_p w_ip [ log sum_{a in D(i)} exp(s_ia)  -  s_ip ],                                         (2)

and they differ in D and w; BCL averages classes in the denominator, PaCo has a classifier's logits in it. Each is a pure loss, followed by
a Method (common.py), which holds what is kept between steps.
Written from the papers; where paper and published code differ, `variant` names which one is computed.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import Method, antipodal_prototypes, check_labels, collapse_value, embed, supcon_loss
from datasets.loader import balanced_batches  # noqa: F401
from utils.contrast_kernel import flatten_views
from utils.distributed import at_least_float32
from utils.runs import make_generator

# ------------------------------------------------------------------------------------------------------------------
# KCL: every anchor has k positives, whatever its class
# ------------------------------------------------------------------------------------------------------------------


def kcl_loss(z, labels, positives, temperature=0.07, queue=None):
    """k-positive contrastive learning (Kang et al. 2021, ICLR, "Exploring Balanced Feature Spaces"): w = 1 / (drawn + 1).

    Pulled to are the own other views and the drawn views of the same class; those that were not drawn stay in the denominator.
    z [N, V, D] unit vectors; labels int [N]; positives bool [V*N, V*N] from draw_k_positives.
    With queue [K, D] the MoCo form: anchors are the first views, the contrast set is the own second view (the key, without gradient) and
    the queue; positives bool [N, 1 + K] from draw_k_from_queue. Returns a scalar (nats).
    """
    s, contrast = _contrast_set(z, labels, positives, temperature, queue)
    return _pull(s, contrast, _shares(positives, s)).mean()


def draw_k_positives(labels, views, k, generator):
    """For each anchor its other views, and min(k, candidates) other rows of its class, drawn without replacement.

    Candidates are all views of the other images of its class. labels int [N]. Returns bool [V*N, V*N], view-major, row = anchor.
    """
    own = _equal_pairs(torch.arange(len(labels), device=labels.device), views)
    drawn = _draw(_equal_pairs(labels, views) & ~own, k, generator)
    return drawn | own.fill_diagonal_(False)


def draw_k_from_queue(labels, queue_labels, k, generator):
    """For each anchor its key, and min(k, candidates) entries of the queue of its class. Returns bool [N, 1 + K], column 0 = own key."""
    drawn = _draw(labels[:, None] == queue_labels[None, :], k, generator)
    return F.pad(drawn, (1, 0), value=True)


def _draw(candidates, k, generator):
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
            return self.loss(
                model(x).transpose(0, 1),
                labels,
                draw_k_positives(labels, len(x), self.k, generator),
            )
        keys = self.key_encoder(model, x[1])
        positives = draw_k_from_queue(labels, self.queue.labels, self.k, generator)
        loss = self.loss(
            torch.stack([model(x[0]), keys], dim=1), labels, positives, self.queue.keys.clone()
        )
        self.queue.push(keys, labels)
        return loss

    def loss(self, z, labels, positives, queue=None):
        return kcl_loss(z, labels, positives, self.temperature, queue)

    def collapse_value(self, images):
        return (
            collapse_value(images) if self.queue is None else None
        )  # it grows while the queue fills


# ------------------------------------------------------------------------------------------------------------------
# TSC: KCL, and a fixed target per class
# ------------------------------------------------------------------------------------------------------------------


def tsc_loss(
    z, labels, targets, positives, temperature=0.07, variant="ttc", weight=0.2, queue=None
):
    """Targeted supervised contrastive learning (Li et al. 2022, arXiv:2111.13998): KCL that is also pulled to the target of the own class.

    Both targets stand in every denominator. Of an anchor with d drawn views and own views (k_i + 1 of them), a view and the target weigh
        "ttc"    1/(d + 1)  and  1/(d + 1)          the variant of arXiv:2503.17024
        "paper"  1/d        and  weight             as published, weight = lambda
        "code"   1/(d + 1)  and  weight/(d + 1)     as in the published code
    targets [2, D] unit vectors, row = class, without gradient; z, labels, positives, queue as in kcl_loss. Returns a scalar (nats).
    """
    s, contrast = _contrast_set(z, labels, positives, temperature, queue, targets.detach())
    positives, own_target = (
        positives.to(s),
        F.one_hot(labels.long(), 2).to(s).repeat(len(s) // len(labels), 1),
    )
    d = positives.sum(1, keepdim=True)
    variants = {
        "ttc": (1 / (d + 1), 1 / (d + 1)),
        "paper": (1 / d, weight),
        "code": (1 / (d + 1), weight / (d + 1)),
    }
    if variant not in variants:
        raise ValueError(f"tsc_loss has the variants {', '.join(variants)}, not {variant}")
    view, target = variants[variant]
    return _pull(s, contrast, torch.cat([view * positives, target * own_target], dim=1)).mean()


def targets_swapped(centroids, targets):
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
        self.variant, self.switch = variant, 0 if variant == "ttc" else training.epochs // 2
        self.register_buffer(
            "targets", antipodal_prototypes(model.dim, training.generator)
        )  # row = class, once assigned
        self.register_buffer("centroids", torch.zeros(2, model.dim))
        self.targeted = False

    def start_epoch(self, epoch, model):
        self.targeted = epoch >= self.switch
        if epoch == self.switch and targets_swapped(self.centroids, self.targets):
            self.targets.copy_(self.targets.flip(0))
        self.log_fields = {"targeted": self.targeted}

    def loss(self, z, labels, positives, queue=None):
        if self.targeted:
            return tsc_loss(
                z, labels, self.targets, positives, self.temperature, self.variant, queue=queue
            )
        self.follow_centroids(z[:, 0].detach(), labels)
        return kcl_loss(z, labels, positives, self.temperature, queue)

    def follow_centroids(self, z, labels, momentum=0.9):
        """Move the centroid of each class that the batch has a tenth of the way to its mean. z [N, D]."""
        members = F.one_hot(labels.long(), 2).to(z)  # [N, 2]
        with torch.autocast(z.device.type, enabled=False):
            mean = F.normalize(members.T @ z, dim=1)  # [2, D]; zero for a class that is not there
        moved = F.normalize(momentum * self.centroids + (1 - momentum) * mean, dim=1)
        self.centroids.copy_(torch.where(members.any(0)[:, None], moved, self.centroids))

    def schedule_span(self, epoch):
        return (0, self.switch) if epoch < self.switch else (self.switch, self.epochs)

    def collapse_value(self, images):
        return None  # the targets stand in the denominator


# ------------------------------------------------------------------------------------------------------------------
# SBCL ("SBC"): the majority in sub-classes about as large as the minority
# ------------------------------------------------------------------------------------------------------------------


def sbcl_loss(
    z,
    labels,
    subclasses,
    temperature=0.1,
    coarse_temperatures=(0.1, 0.1),
    beta=0.25,
    fine_scale=1.0,
):
    """Subclass-balancing contrastive learning (Hou et al. 2023, arXiv:2306.15925): fine_scale * fine + beta * coarse.

    fine is SupCon on the sub-classes. coarse is SupCon on the classes without the own sub-class: of that, only the own other views are
    pulled to or stand in the denominator; its temperature is that of the anchor's class.
    z [N, V, D] unit vectors; labels, subclasses int [N] (two classes may use the same ids); coarse_temperatures a pair, one per class.
    Returns a scalar (nats).
    """
    check_labels(z, labels)
    check_labels(z, subclasses)
    rows = flatten_views(z)
    with torch.autocast(z.device.type, enabled=False):
        s = rows @ rows.T
    others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    same, same_subclass, own = (
        _equal_pairs(values, z.shape[1]) & others
        for values in (labels, subclasses, torch.arange(len(z), device=z.device))
    )
    members = same & same_subclass
    outside = others & ~members | own
    positives = same & outside
    t = torch.as_tensor(coarse_temperatures, dtype=s.dtype).to(s.device, non_blocking=True)[
        labels.long().repeat(z.shape[1]), None
    ]  # [V*N, 1]
    fine = _pull(s / temperature, others, _shares(members, s))
    coarse = _pull(s / t, outside, _shares(positives, s))
    return (fine_scale * fine + beta * coarse).mean()


def subclass_numbers(counts, smallest=10):
    """How many sub-classes each class has: max(1, floor(n_c / M)), with M = max(n_min, smallest). counts: two numbers. Returns a list."""
    size = max(min(counts), smallest)
    return [max(1, n // size) for n in counts]


def cosine_kmeans(x, clusters, generator, steps=35, tolerance=1e-3):
    """k-means by cosine: centres are means of their unit vectors, an empty one restarts on a random row. x [n, D]. Returns int [n].

    Starts on distinct random rows; stops when the square of the centres' summed moves is below `tolerance`, or after `steps`.
    """
    centres = x[torch.randperm(len(x), generator=generator)[:clusters]]
    for _ in range(steps):
        nearest = (x @ F.normalize(centres, dim=1).T).argmax(1)
        sizes = nearest.bincount(minlength=len(centres))[:, None]
        moved = torch.zeros_like(centres).index_add_(0, nearest, x) / sizes.clamp(min=1)
        moved = torch.where(
            sizes > 0, moved, x[torch.randint(len(x), (len(centres),), generator=generator)]
        )
        shift, centres = (moved - centres).norm(dim=1).sum().square(), moved
        if shift < tolerance:
            break
    return (x @ F.normalize(centres, dim=1).T).argmax(1)


def class_spreads(z, labels):
    """phi_c = mean distance from the class mean / log(n_c + 10), the spread that sets SBCL's coarse temperature. z [n, D]. Returns [2]."""
    return torch.stack(
        [
            (z[labels == c] - z[labels == c].mean(0)).norm(dim=1).mean()
            / math.log((labels == c).sum() + 10)
            for c in (0, 1)
        ]
    )


class SBCL(Method):
    """SupCon for 10 epochs (half of them all, if that is less); then sub-classes by k-means of the projections, anew every few epochs.

    Variant "code", as the published code, which gave the numbers in arXiv:2503.17024: coarse temperature T phi_c / mean phi, with phi clipped
    between its percentiles 20 and 80, and T itself for a class in one piece; clustered on an augmented view; the fine term times 0.1/0.07.
    "paper": coarse temperature T exp(phi_c / mean phi), clustered on the evaluation view. Sub-classes belong to rows by their label, so the
    images need not be sorted by class.
    """

    def __init__(self, model, subset, training, variant, recluster_every):
        super().__init__(model, subset, training)
        self.variant, self.every, self.warmup = (
            variant,
            recluster_every,
            min(10, training.epochs // 2),
        )
        self.seed, self.batch_size, self.subset, self.rows = (
            training.seed,
            model.chunk or training.batch_size,
            subset,
            subset.splits["train"],
        )
        self.numbers = subclass_numbers(subset.train_counts())
        self.register_buffer("subclasses", torch.from_numpy(subset.labels[self.rows]))
        self.register_buffer("coarse_temperatures", torch.full((2,), training.temperature))
        self.warming_up, self.log_fields = False, {"subclasses": self.numbers}

    def start_epoch(self, epoch, model):
        self.warming_up = epoch < self.warmup
        if not self.warming_up and (epoch - self.warmup) % self.every == 0:
            self.recluster(model, make_generator(self.seed, epoch, 1))
        self.log_fields = {
            "subclasses": self.numbers,
            "supcon_warmup": self.warming_up,
            "coarse_temperatures": [round(t, 4) for t in self.coarse_temperatures.tolist()],
        }

    def recluster(self, model, generator):
        """Sub-classes and coarse temperatures from the projections of all training images, in eval mode."""
        device, views = self.subclasses.device, 1 if self.variant == "code" else 0
        z = embed(
            model, self.subset, self.rows, device, self.batch_size, views=views, generator=generator
        ).reshape(len(self.rows), -1)
        labels = torch.from_numpy(self.subset.labels[self.rows])
        subclasses = torch.empty_like(labels)
        for c in (0, 1):
            subclasses[labels == c] = (
                cosine_kmeans(z[labels == c], self.numbers[c], generator) + c * self.numbers[0]
            )
        phi = class_spreads(z, labels).clamp(
            min=1e-6
        )  # where all embeddings are equal, what is left is rounding
        if self.variant == "code":
            clipped = phi.clamp(phi.quantile(0.2), phi.quantile(0.8))
            t = torch.where(torch.tensor(self.numbers) == 1, 1.0, clipped / clipped.mean())
        else:
            t = (phi / phi.mean()).exp()
        self.subclasses.copy_(subclasses)
        self.coarse_temperatures.copy_(self.temperature * t)

    def forward(self, model, batch):
        x, labels, positions = batch.x, batch.labels, batch.positions
        z = model(x).transpose(0, 1)
        if self.warming_up:
            return supcon_loss(z, labels, self.temperature)
        scale = 0.1 / 0.07 if self.variant == "code" else 1.0
        return sbcl_loss(
            z,
            labels,
            self.subclasses[positions],
            self.temperature,
            self.coarse_temperatures,
            fine_scale=scale,
        )

    def collapse_value(self, images):
        return None  # the coarse term's depends on what the batch holds


# ------------------------------------------------------------------------------------------------------------------
# BCL: classes averaged in the denominator, and a learned centre of each class
# ------------------------------------------------------------------------------------------------------------------


def bcl_loss(z, labels, centres, temperature=0.07):
    """Balanced contrastive learning (Zhu et al. 2022, arXiv:2207.09052): the denominator is a sum over classes of means.

    Den_i = sum_c mean_{j in B_c, j != i} exp(s_ij), with B_c the views of class c and its centre; pulled to is all of the own class, centre
    included. Centres are no anchors; they stand for a class that the batch has not.
    z [N, V, D] unit vectors; labels int [N]; centres [2, D] unit vectors, row = class, with gradient. Returns a scalar (nats).
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        s = rows @ torch.cat([rows, centres.to(rows)]).T / temperature  # [V*N, V*N + 2]
    label = torch.cat(
        [labels.repeat(z.shape[1]), torch.arange(2, device=labels.device)]
    )  # [V*N + 2]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    classes = [others & (label == c) for c in (0, 1)]
    log_means = [
        s.masked_fill(~members, -torch.inf).logsumexp(1) - members.sum(1).to(s).log()
        for members in classes
    ]
    own = others & (label[: len(s), None] == label[None, :])
    return (torch.logaddexp(*log_means) - (s * own).sum(1) / own.sum(1)).mean()


class BCL(Method):
    """Two views are contrasted; a third trains a cosine classifier (logit-adjusted cross entropy), whose weights a head turns into centres.

    Over two centres batch norm makes every hidden unit of the one the opposite of the other's, and the ReLU then leaves them nearly
    orthogonal whatever the weights: variant "layernorm" avoids that, "batchnorm" is as published. Loss weights 1 and 0.35 as published
    for ImageNet-LT.
    """

    views = 3

    def __init__(self, model, subset, training, variant, randaugment):
        super().__init__(model, subset, training)
        dim, norm = (
            model.encoder.dim,
            {"layernorm": nn.LayerNorm, "batchnorm": nn.BatchNorm1d}[variant],
        )
        self.classifier = CosineClassifier(dim)
        self.centre_head = nn.Sequential(
            nn.Linear(dim, dim), norm(dim), nn.ReLU(), nn.Linear(dim, model.dim)
        )
        self.register_buffer("prior", class_prior(subset))
        self.randaugment_views = (2,) if randaugment else ()

    def forward(self, model, batch):
        x, labels = batch.x, batch.labels
        features = model.features(x)  # [3, N, dim]
        z = model.project(features[:2]).transpose(0, 1)
        centres = F.normalize(self.centre_head(self.classifier.weight).float(), dim=1)
        return logit_adjusted_loss(
            self.classifier(features[2]), labels, self.prior
        ) + 0.35 * bcl_loss(z, labels, centres, self.temperature)

    def collapse_value(self, images):
        return None


# ------------------------------------------------------------------------------------------------------------------
# PaCo and GPaCo: a linear classifier's logits as one more positive, and a queue
# ------------------------------------------------------------------------------------------------------------------


def paco_loss(
    z, labels, logits, prior, queue, queue_labels, temperature=0.2, alpha=0.05, beta=1.0, gamma=1.0
):
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
    anchor_views = logits.shape[1]
    if anchor_views == 1:
        z = torch.stack([z[:, 0], z[:, 1].detach()], dim=1)
    with torch.autocast(z.device.type, enabled=False):
        rows = flatten_views(z)
        s = (
            rows[: anchor_views * len(z)]
            @ torch.cat([rows, queue.detach().to(rows)]).T
            / temperature
        )  # [A*N, 2N + K]
    o = at_least_float32(logits).transpose(0, 1).flatten(0, 1) + prior.to(s).log()  # [A*N, 2]
    others = ~torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    y = labels.long().repeat(anchor_views)  # [A*N]
    same = others & (y[:, None] == torch.cat([labels.repeat(2), queue_labels])[None, :])
    log_z = o.logsumexp(1)
    if gamma:
        log_z = torch.logaddexp(
            log_z, s.masked_fill(~others, -torch.inf).logsumexp(1) + math.log(gamma)
        )
    weight = (
        torch.as_tensor(alpha, dtype=s.dtype).to(s.device, non_blocking=True).expand(2)[y]
    )  # [A*N]
    pulled = beta * o.gather(1, y[:, None]).squeeze(1) + weight * (s * same).sum(1)
    return (log_z - pulled / (beta + weight * same.sum(1))).mean()


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
        expected = 1 + self.prior * (
            2 * training.batch_size - 2 + queue
        )  # the own other view, and rows of the own class
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
        loss = paco_loss(
            z,
            labels,
            self.centres(features),
            self.prior,
            self.queue.keys.clone(),
            self.queue.labels,
            self.temperature,
            self.alpha,
        )
        self.queue.push(z[:, 1].detach(), labels)
        return loss

    def collapse_value(self, images):
        return None


# ------------------------------------------------------------------------------------------------------------------
# what they share
# ------------------------------------------------------------------------------------------------------------------


def _equal_pairs(values, views):
    """Which rows are of images with equal values: [N] -> bool [V*N, V*N], view-major."""
    values = values.repeat(views)
    return values[:, None] == values[None, :]


def _contrast_set(z, labels, positives, temperature, queue=None, targets=None):
    """Similarities of all anchors to all columns, and which of these are in the anchor's contrast set: [R, M], bool [R, M].

    Columns are all views, or the own key and the queue; then the targets, if any.
    """
    check_labels(z, labels)
    with torch.autocast(z.device.type, enabled=False):
        if queue is None:
            anchors = flatten_views(z)
            cosines, contrast = (
                anchors @ anchors.T,
                ~torch.eye(len(anchors), dtype=torch.bool, device=z.device),
            )
        else:
            anchors, keys = at_least_float32(z[:, 0]), at_least_float32(z[:, 1].detach())
            cosines = torch.cat(
                [(anchors * keys).sum(1, keepdim=True), anchors @ queue.detach().to(anchors).T],
                dim=1,
            )
            contrast = torch.ones_like(cosines, dtype=torch.bool)
        if positives.shape != cosines.shape:
            raise ValueError(
                f"positives must be {list(cosines.shape)}, anchors by what they are compared with, not {list(positives.shape)}"
            )
        if targets is not None:
            cosines, contrast = (
                torch.cat([cosines, anchors @ targets.to(anchors).T], dim=1),
                F.pad(contrast, (0, len(targets)), value=True),
            )
    return cosines / temperature, contrast


def _pull(s, contrast, weights):
    """Equation (2) before the mean over anchors: [R]. s, contrast, weights [R, M]."""
    log_sum = s.masked_fill(~contrast, -torch.inf).logsumexp(1)
    return weights.sum(1) * log_sum - (weights * s).sum(1)


def _shares(mask, like):
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
        self.register_buffer(
            "keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        )
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys, labels):
        size = len(self.keys)
        if size:
            keys, labels = keys[-size:], labels[-size:]
            places = (self.next + torch.arange(len(keys), device=keys.device)) % size
            self.keys[places], self.labels[places] = keys.to(self.keys), labels
            self.next.copy_((self.next + len(keys)) % size)


class MomentumEncoder(nn.Module):
    """The key network of MoCo (He et al. 2020, arXiv:1911.05722): a copy that follows the trained one slowly. In train mode,
    without the shuffling of batches between devices: batch norm sees the images of all."""

    def __init__(self, model, momentum=0.999):
        super().__init__()
        self.model, self.momentum = copy.deepcopy(model).requires_grad_(False), momentum

    @torch.no_grad()
    def forward(self, model, x):
        for slow, fast in zip(self.model.parameters(), model.parameters()):
            slow.lerp_(fast, 1 - self.momentum)
        return self.model(x)


# ------------------------------------------------------------------------------------------------------------------
# supervised: LDAM-DRW, logit adjustment, and re-training of the classifier on a frozen encoder (cRT, LWS, tau-normalisation)
# ------------------------------------------------------------------------------------------------------------------


class CosineClassifier(nn.Module):
    """Logits `scale` * cos(f, w_c), without bias: the classifier of LDAM and of BCL. f [B, D] -> [B, 2]."""

    def __init__(self, dim, scale=30.0):
        super().__init__()
        self.weight, self.scale = (
            nn.Parameter(F.normalize(torch.rand(2, dim) * 2 - 1, dim=1)),
            scale,
        )

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return (
                self.scale
                * F.normalize(at_least_float32(features), dim=1)
                @ F.normalize(self.weight, dim=1).T
            )


def ldam_margins(counts, max_margin=0.5):
    """Margins of LDAM (Cao et al. 2019, arXiv:1906.07413): m_c = max_margin * (n_c / n_min)^(-1/4), the rarer the larger. Returns [2]."""
    counts = torch.as_tensor(counts, dtype=torch.get_default_dtype())
    return max_margin * (counts / counts.min()) ** -0.25


def ldam_loss(cosines, targets, margins, scale=30.0, weights=None):
    """LDAM (Cao et al. 2019, arXiv:1906.07413): cross entropy of scale * (cos_c - m_c [c = y]), so the own class has to win by its margin.

    cosines [B, 2] between features and class weights, in [-1, 1] (CosineClassifier's logits divided by its scale); targets int [B];
    margins [2]; weights [2] or None: then divided by the sum of the
    weights in the batch. Returns a scalar (nats).
    """
    cosines = at_least_float32(cosines)
    return F.cross_entropy(
        scale * (cosines - F.one_hot(targets.long(), 2) * margins.to(cosines)),
        targets.long(),
        weight=None if weights is None else weights.to(cosines),
    )


def effective_number_weights(counts, beta=0.9999):
    """Class weights (1 - beta) / (1 - beta^n_c) (Cui et al. 2019, arXiv:1901.05555) that sum to 2; nearly 1/n_c while n_c << 1/(1 - beta)."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (2 * weights / weights.sum()).to(torch.get_default_dtype())


def logit_adjusted_loss(logits, targets, prior):
    """Logit adjustment (Menon et al. 2021, arXiv:2007.07314, tau = 1), the same as balanced softmax (Ren et al. 2020, arXiv:2007.10740).

    Cross entropy of logits + log prior: the classifier learns what is left when the prior is taken out, and predicts without it.
    logits [B, 2]; targets int [B]; prior [2], shares of the training images. Returns a scalar (nats).
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits + prior.to(logits).log(), targets.long())


def tau_normalized(weight, tau):
    """tau-normalisation (Kang et al. 2020, arXiv:1910.09217): rows w_c / ||w_c||^tau. weight [2, D]; the bias is dropped by the caller."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


class LearnableScale(nn.Module):
    """LWS (Kang et al. 2020, arXiv:1910.09217): a trained linear classifier that stays as it is, times one learned scale per class.

    With two classes w_1 - w_0 is what was trained and w_0 + w_1 is left of the initialisation, and unequal scales mix the two: AUROC can fall.
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.scale = classifier.requires_grad_(False), nn.Parameter(torch.ones(2))

    def forward(self, features):  # [B, D] -> [B, 2]
        return self.classifier(features) * self.scale
