"""The losses: one pure function per equation, quotable alone.

Letters: N images in the batch, V views of each, D dimensions, T temperature. z is [N, V, D], unit vectors.
Inside, all V*N views are rows, view-major: row = view * N + image. With s_ij = z_i . z_j / T, A(i) the other
views and P(i) the positives of view i, every contrastive loss here is

    L = mean_i [ log sum_{a in A(i)} exp(s_ia)  -  mean_{p in P(i)} s_ip ]                                    (1)

and the methods differ in P(i) alone: each divides the images into groups, and P(i) is the other views in the group of view i.
Equation (1) is L_out of Khosla et al. 2020 (arXiv:2004.11362), as a mean over anchors and without the factor temperature /
base_temperature that SupContrast's code puts in front of it. No matrix of all views by all views is kept: the positives' sum is
sum_p s_ip = z_i . (sum of the group - z_i) / T, and the log-sum-exp is taken over a few rows at a time, so that memory grows with V*N.
Gradients go to z alone, once: no second derivatives.
If all embeddings are equal, (1) is log(V*N - 1) whatever views are in P: the collapse value. (A prototype in P, as in Supervised
Prototypes, moves it.)
"""

import math

import torch
import torch.nn.functional as F

from utils.distributed import at_least_float32

CHUNK = 256  # rows whose similarities are held at a time


def collapse_value(images: int, views: int = 2) -> float:
    """The loss of a batch whose embeddings are all equal: log(V*N - 1)."""
    return math.log(views * images - 1)


def ntxent_loss(z, temperature=0.07):
    """NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709): P(i) = the other views of the same image.

    z [N, V, D] unit vectors, V >= 2. Returns a scalar (nats).
    """
    return _contrast(z, by_image(z), temperature)


def supcon_loss(z, labels, temperature=0.07):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, L_out): P(i) = all other views of the same class.

    z [N, V, D] unit vectors, V >= 2; labels int [N]. Returns a scalar (nats).
    """
    return _contrast(z, by_class(z, labels), temperature)


def supmin_loss(z, labels, minority, temperature=0.07, supervised_majority=None):
    """Supervised Minority (arXiv:2503.17024): SupCon for minority anchors, NT-Xent for majority anchors.

    z [N, V, D] unit vectors, V >= 2; labels int [N]; minority is the label of the rare class.
    supervised_majority: bool [N] or None, the majority images that are also each other's positives
    (draw_supervised_majority); all of them gives SupCon. Returns a scalar (nats).
    """
    supervised = labels == minority  # [N]
    if supervised_majority is not None:
        if supervised_majority.shape != labels.shape:
            raise ValueError(
                f"supervised_majority must be [{len(labels)}], one per image, not {list(supervised_majority.shape)}"
            )
        supervised = supervised | supervised_majority
    group = torch.where(
        supervised, by_class(z, labels), len(z) + by_image(z)
    )  # below N a class, from N on a single image
    return _contrast(z, group, temperature)


def suppro_loss(z, labels, prototypes, temperature=0.07, margin=1.0):
    """Supervised Prototypes (arXiv:2503.17024): NT-Xent plus a pull to the fixed prototype of the own class.

    P(i) = the other views of the same image and, while cos(z_i, p_own) <= cos(z_i, p_other) + margin, the own prototype.
    With antipodal prototypes the pull therefore ends at cos(z_i, p_own) = margin / 2: 0.5 by default, the paper's threshold.
    Prototypes stand in no denominator and get no gradient, so the loss can be negative.

    z [N, V, D] unit vectors, V >= 2; labels int [N] in {0, 1}; prototypes [2, D], row = class; margin a float or
    one per class. Returns a scalar (nats).
    """
    labels = labels.long().repeat(z.shape[1])  # [V*N]
    rows = flatten_views(z)  # [V*N, D]
    prototypes = prototypes.detach().to(rows)
    own, other = ((rows * prototypes[c]).sum(1) for c in (labels, 1 - labels))  # cosines, [V*N]
    margins = (
        torch.as_tensor(margin, dtype=rows.dtype).to(rows.device, non_blocking=True).expand(2)
    )  # a float serves both classes
    pull = (own <= other + margins[labels]).detach()  # [V*N]
    return _contrast(z, by_image(z), temperature, pull, own / temperature)


def draw_supervised_majority(labels, minority, ratio, generator):
    """Draw floor(ratio * n_majority) majority images, without replacement, for supmin_loss. Returns bool [N].

    ratio 0 is Supervised Minority as published, 1 is SupCon. The reference's `ratio_supervised_majority`.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio of supervised majority images is between 0 and 1, not {ratio}")
    majority = (labels != minority).nonzero().squeeze(1)
    order = torch.randperm(len(majority), generator=generator, device=generator.device).to(
        labels.device
    )
    drawn = torch.zeros_like(labels, dtype=torch.bool)
    drawn[majority[order[: int(ratio * len(majority))]]] = True
    return drawn


def antipodal_prototypes(dim, generator):
    """A random unit vector p and its opposite: [2, D], row = class. Two points of the sphere cannot be further apart."""
    p = F.normalize(torch.randn(dim, generator=generator, device=generator.device), dim=0)
    return torch.stack([p, -p])


def class_weights(counts):
    """Inverse class frequencies that sum to 1: w_c = (1/n_c) / (1/n_0 + 1/n_1). counts: two positive numbers. Returns [2]."""
    counts = torch.as_tensor(counts, dtype=torch.get_default_dtype())
    if counts.shape != (2,) or (counts <= 0).any():
        raise ValueError(f"class weights need two positive counts, not {counts.tolist()}")
    return (1 / counts) / (1 / counts).sum()


def focal_loss(logits, targets, gamma=2.0, weights=None):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002): mean over the batch of  -w_y (1 - p_y)^gamma log p_y.

    p_y comes from the unweighted softmax; the mean is over images, not over weights.
    logits [B, C]; targets int [B]; weights [C] or None. Returns a scalar (nats).
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = (
            at_least_float32(logits)
            .log_softmax(dim=1)
            .gather(1, targets[:, None].long())
            .squeeze(1)
        )  # [B]
        one_minus_p = -torch.expm1(log_p)
        loss = (
            -(one_minus_p.clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma) * log_p
        )  # 0 ** (gamma - 1) has no gradient
        if weights is not None:
            loss = loss * weights.to(loss)[targets.long()]
        return loss.mean()


# the pieces of equation (1) ---------------------------------------------------------------------------------------


def flatten_views(z):
    """[N, V, D] -> [V*N, D], view-major, in float32 or better."""
    if z.ndim != 3 or z.shape[0] < 1 or z.shape[1] < 2:
        raise ValueError(
            f"embeddings must be [N, V, D] with at least one image and two views, not {list(z.shape)}"
        )
    return at_least_float32(z).transpose(0, 1).flatten(0, 1)


def check_labels(z, labels):
    if labels.shape != z.shape[:1]:
        raise ValueError(
            f"{z.shape[0]} images need labels [{z.shape[0]}], not {list(labels.shape)}"
        )


def by_image(z):
    """Each image its own group: int [N]."""
    return torch.arange(len(z), device=z.device)


def by_class(z, labels):
    """Each class a group: int [N], below N, the number of smaller labels. (torch.unique would wait for the GPU.)"""
    check_labels(z, labels)
    labels = labels.contiguous().long()  # torch has no searchsorted for bool
    return torch.searchsorted(labels.sort().values, labels)


def _contrast(z, group, temperature, pull=False, s_own=0.0):
    """Equation (1), a scalar. P(i) = the other views in the group of view i.

    group int [N], below 2N; where pull [V*N] is true, s_own [V*N] (similarity to the own prototype) counts as one more positive.
    """
    if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
        raise ValueError("the temperature is a number; it gets no gradient")
    rows, group = flatten_views(z), group.repeat(z.shape[1])  # [V*N, D], [V*N]
    size = torch.zeros_like(rows[:, 0]).index_add(0, group, torch.ones_like(rows[:, 0]))[
        group
    ]  # of the row's group, [V*N]
    share = 1 / (size - 1 + pull)  # weight of each positive, [V*N]
    return (_Contrast.apply(rows, group, share, temperature) - share * s_own * pull).mean()


class _Contrast(torch.autograd.Function):
    """log sum_{a in A(i)} exp(s_ia) - share_i sum_{p in P(i)} s_ip of every row i, [V*N]. The gradient makes the similarities again.

    s_ij = s_ji, so a chunk of rows is compared with itself and the rows below it alone: the rows of s are summed for the chunk, its
    columns for the rows below. Likewise the gradient: s_ij has the weight softmax_i(j) - share_i [j in P(i)] from anchor i, and that of
    anchor j. Near collapse both terms are large and nearly equal, so they are subtracted before they are multiplied with the rows.
    """

    @staticmethod
    def forward(ctx, rows, group, share, temperature):
        log_sum = rows.new_full((len(rows),), -torch.inf)
        for start, end, s in _similarities(rows, temperature):
            log_sum[start:end] = log_sum[start:end].logaddexp(s.logsumexp(1))
            log_sum[end:] = log_sum[end:].logaddexp(s[:, end - start :].logsumexp(0))
        ctx.save_for_backward(rows, group, share, log_sum)
        ctx.temperature = temperature
        wide = rows.double()  # thousands of nearly equal rows are summed
        positives = (
            (torch.zeros_like(wide).index_add(0, group, wide)[group] - wide).mul_(wide).sum(1)
        )  # T sum_p s_ip
        return log_sum - (share * positives / temperature).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("this loss has no second derivative")
        rows, group, share, log_sum = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        for start, end, s in _similarities(rows, ctx.temperature):
            positive = (group[start:end, None] == group[start:]).fill_diagonal_(False)
            weights = (
                (s - log_sum[start:end, None])
                .exp_()
                .sub_(share[start:end, None] * positive)
                .mul_(grad[start:end, None])
            )
            weights += (
                s.sub_(log_sum[start:]).exp_().sub_(share[start:] * positive).mul_(grad[start:])
            )
            with torch.autocast(rows.device.type, enabled=False):
                grad_rows[start:end] += weights @ rows[start:]
                grad_rows[end:] += weights[:, end - start :].T @ rows[start:end]
        return grad_rows / ctx.temperature, None, None, None


def _similarities(rows, temperature):
    """Yield (start, end, s): s [end - start, V*N - start] of the rows from start to end and all from start on, -inf for a row and itself."""
    for start in range(0, len(rows), CHUNK):
        end = min(start + CHUNK, len(rows))
        with torch.autocast(
            rows.device.type, enabled=False
        ):  # .float() alone is not enough: autocast would halve the product
            s = (rows[start:end] / temperature) @ rows[start:].T
        yield start, end, s.fill_diagonal_(-torch.inf)
