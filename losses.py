"""The losses: one pure function per equation, quotable alone.

Letters: N images in the batch, V views of each, D dimensions, T temperature. z is [N, V, D], unit vectors.
Inside, all V*N views are rows, view-major: row = view * N + image. With s_ij = z_i . z_j / T, A(i) the other
views and P(i) the positives of view i, every contrastive loss here is

    L = mean_i [ log sum_{a in A(i)} exp(s_ia)  -  mean_{p in P(i)} s_ip ]                                    (1)

and the methods differ in P(i) alone. Equation (1) is L_out of Khosla et al. 2020 (arXiv:2004.11362), as a mean over
anchors and without the factor temperature / base_temperature that SupContrast's code puts in front of it.
If all embeddings are equal, (1) is log(V*N - 1) whatever views are in P: the collapse value. (A prototype in P, as in Supervised
Prototypes, moves it.)
"""

import math

import torch
import torch.nn.functional as F


def collapse_value(images: int, views: int = 2) -> float:
    """The loss of a batch whose embeddings are all equal: log(V*N - 1)."""
    return math.log(views * images - 1)


def ntxent_loss(z, temperature=0.07):
    """NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709): P(i) = the other views of the same image.

    z [N, V, D] unit vectors, V >= 2. Returns a scalar (nats).
    """
    s = similarities(z, temperature)
    return _contrast(s, same_image(z)).mean()


def supcon_loss(z, labels, temperature=0.07):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, L_out): P(i) = all other views of the same class.

    z [N, V, D] unit vectors, V >= 2; labels int [N]. Returns a scalar (nats).
    """
    s = similarities(z, temperature)
    return _contrast(s, same_class(z, labels)).mean()


def supmin_loss(z, labels, minority, temperature=0.07, supervised_majority=None):
    """Supervised Minority (arXiv:2503.17024): SupCon for minority anchors, NT-Xent for majority anchors.

    z [N, V, D] unit vectors, V >= 2; labels int [N]; minority is the label of the rare class.
    supervised_majority: bool [N] or None, the majority images that are also each other's positives
    (draw_supervised_majority); all of them gives SupCon. Returns a scalar (nats).
    """
    supervised = labels == minority                                                     # [N]
    if supervised_majority is not None:
        if supervised_majority.shape != labels.shape:
            raise ValueError(f"supervised_majority must be [{len(labels)}], one per image, not {list(supervised_majority.shape)}")
        supervised = supervised | supervised_majority
    supervised = supervised.repeat(z.shape[1])                                          # [V*N]
    both_supervised = supervised[:, None] & supervised[None, :]
    positives = (same_class(z, labels) & both_supervised) | same_image(z)
    return _contrast(similarities(z, temperature), positives).mean()


def suppro_loss(z, labels, prototypes, temperature=0.07, margin=1.0):
    """Supervised Prototypes (arXiv:2503.17024): NT-Xent plus a pull to the fixed prototype of the own class.

    P(i) = the other views of the same image and, while cos(z_i, p_own) <= cos(z_i, p_other) + margin, the own prototype.
    With antipodal prototypes the pull therefore ends at cos(z_i, p_own) = margin / 2: 0.5 by default, the paper's threshold.
    Prototypes stand in no denominator and get no gradient, so the loss can be negative.

    z [N, V, D] unit vectors, V >= 2; labels int [N] in {0, 1}; prototypes [2, D], row = class; margin a float or
    one per class. Returns a scalar (nats).
    """
    labels = labels.long().repeat(z.shape[1])                                           # [V*N]
    rows = view_rows(z)                                                                 # [V*N, D]
    with torch.autocast(z.device.type, enabled=False):
        cosines = rows @ prototypes.detach().to(rows).T                                 # [V*N, 2]
    own = cosines.gather(1, labels[:, None]).squeeze(1)                                 # [V*N]
    other = cosines.gather(1, 1 - labels[:, None]).squeeze(1)
    margins = torch.as_tensor(margin, dtype=rows.dtype, device=rows.device).expand(2)   # a float serves both classes
    pull = (own <= other + margins[labels]).detach()                                    # [V*N]
    return _contrast(similarities(z, temperature), same_image(z), pull, own / temperature).mean()


def draw_supervised_majority(labels, minority, ratio, generator):
    """Draw floor(ratio * n_majority) majority images, without replacement, for supmin_loss. Returns bool [N].

    ratio 0 is Supervised Minority as published, 1 is SupCon. The reference's `ratio_supervised_majority`.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio of supervised majority images is between 0 and 1, not {ratio}")
    majority = (labels != minority).nonzero().squeeze(1)
    order = torch.randperm(len(majority), generator=generator, device=generator.device).to(labels.device)
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
        log_p = at_least_float32(logits).log_softmax(dim=1).gather(1, targets[:, None].long()).squeeze(1)   # [B]
        one_minus_p = -torch.expm1(log_p)
        loss = -(one_minus_p.clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma) * log_p          # 0 ** (gamma - 1) has no gradient
        if weights is not None:
            loss = loss * weights.to(loss)[targets.long()]
        return loss.mean()


# the pieces of equation (1) ---------------------------------------------------------------------------------------

def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def view_rows(z):
    """[N, V, D] -> [V*N, D], view-major, in float32 or better."""
    if z.ndim != 3 or z.shape[0] < 1 or z.shape[1] < 2:
        raise ValueError(f"embeddings must be [N, V, D] with at least one image and two views, not {list(z.shape)}")
    return at_least_float32(z).transpose(0, 1).flatten(0, 1)


def similarities(z, temperature):
    """s_ij = z_i . z_j / T, [V*N, V*N]."""
    with torch.autocast(z.device.type, enabled=False):           # .float() alone is not enough: autocast would halve the product
        rows = view_rows(z)
        return rows @ rows.T / temperature


def same_image(z):
    """bool [V*N, V*N]: different views of one image."""
    image = torch.arange(z.shape[0], device=z.device).repeat(z.shape[1])
    return (image[:, None] == image[None, :]).fill_diagonal_(False)


def check_labels(z, labels):
    if labels.shape != z.shape[:1]:
        raise ValueError(f"{z.shape[0]} images need labels [{z.shape[0]}], not {list(labels.shape)}")


def same_class(z, labels):
    """bool [V*N, V*N]: different views with the same label."""
    check_labels(z, labels)
    label = labels.repeat(z.shape[1])
    return (label[:, None] == label[None, :]).fill_diagonal_(False)


def _contrast(s, positives, pull=False, s_own=0.0):
    """Equation (1) before the mean over anchors: [V*N].

    s and positives [V*N, V*N]; where pull [V*N] is true, s_own [V*N] (similarity to the own prototype) counts as one more positive.
    """
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    log_sum = s.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    pull = torch.as_tensor(pull, device=s.device)
    mean_positive = ((s * positives).sum(1) + s_own * pull) / (positives.sum(1) + pull.int())
    return log_sum - mean_positive
