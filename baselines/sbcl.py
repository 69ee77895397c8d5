"""SBCL ("SBC"): the majority in sub-classes about as large as the minority."""

import math

import torch
import torch.nn.functional as F

from baselines.shared import mark_equal_pairs, uniform_weights, weighted_contrast
from common import Method, check_labels, embed, supcon_loss
from utils.contrast_kernel import flatten_views
from utils.runs import make_generator


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
    rows, views = flatten_views(z), z.shape[1]
    with torch.autocast(z.device.type, enabled=False):
        cosines = rows @ rows.T
    others = ~torch.eye(len(rows), dtype=torch.bool, device=z.device)
    images = torch.arange(len(z), device=z.device)
    same_class, same_subclass, same_image = (
        mark_equal_pairs(values, views) & others for values in (labels, subclasses, images)
    )
    siblings = same_class & same_subclass
    outside = others & ~siblings | same_image
    positives = same_class & outside
    coarse_temperatures = torch.as_tensor(coarse_temperatures, dtype=cosines.dtype)
    coarse_temperatures = coarse_temperatures.to(z.device, non_blocking=True)
    anchor_temperature = coarse_temperatures[labels.long().repeat(views), None]  # [V*N, 1]
    fine = weighted_contrast(cosines / temperature, others, uniform_weights(siblings, cosines))
    coarse_weights = uniform_weights(positives, cosines)
    coarse = weighted_contrast(cosines / anchor_temperature, outside, coarse_weights)
    return (fine_scale * fine + beta * coarse).mean()


def count_subclasses(counts, smallest=10):
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
        means = torch.zeros_like(centres).index_add_(0, nearest, x) / sizes.clamp(min=1)
        restarts = x[torch.randint(len(x), (len(centres),), generator=generator)]
        means = torch.where(sizes > 0, means, restarts)
        shift, centres = (means - centres).norm(dim=1).sum().square(), means
        if shift < tolerance:
            break
    return (x @ F.normalize(centres, dim=1).T).argmax(1)


def class_spreads(z, labels):
    """phi_c = mean distance from the class mean / log(n_c + 10), the spread that sets SBCL's coarse temperature. z [n, D]. Returns [2]."""
    spreads = []
    for c in (0, 1):
        members = z[labels == c]
        distance = (members - members.mean(0)).norm(dim=1).mean()
        spreads.append(distance / math.log(len(members) + 10))
    return torch.stack(spreads)


def scale_temperatures(spreads, subclass_counts, variant):
    # If all embeddings are equal, only rounding is left of the spreads.
    spreads = spreads.clamp(min=1e-6)
    if variant == "paper":
        return (spreads / spreads.mean()).exp()
    clipped = spreads.clamp(spreads.quantile(0.2), spreads.quantile(0.8))
    return torch.where(torch.tensor(subclass_counts) == 1, 1.0, clipped / clipped.mean())


class SBCL(Method):
    """SupCon for 10 epochs (half of them all, if that is less); then sub-classes by k-means of the projections, anew every few epochs.

    Variant "code", as the published code, which gave the numbers in arXiv:2503.17024: coarse temperature T phi_c / mean phi, with phi clipped
    between its percentiles 20 and 80, and T itself for a class in one piece; clustered on an augmented view; the fine term times 0.1/0.07.
    "paper": coarse temperature T exp(phi_c / mean phi), clustered on the evaluation view. Sub-classes belong to rows by their label, so the
    images need not be sorted by class.
    """

    def __init__(self, model, subset, training, variant, recluster_every):
        super().__init__(model, subset, training)
        self.variant, self.recluster_every = variant, recluster_every
        self.warmup_epochs = min(10, training.epochs // 2)
        self.seed, self.batch_size = training.seed, model.chunk or training.batch_size
        self.subset, self.rows = subset, subset.splits["train"]
        self.subclass_counts = count_subclasses(subset.train_counts())
        self.register_buffer("subclasses", torch.from_numpy(subset.labels[self.rows]))
        self.register_buffer("coarse_temperatures", torch.full((2,), training.temperature))
        self.is_warmup, self.log_fields = False, {"subclasses": self.subclass_counts}

    def start_epoch(self, epoch, model):
        self.is_warmup = epoch < self.warmup_epochs
        if not self.is_warmup and (epoch - self.warmup_epochs) % self.recluster_every == 0:
            self.recluster(model, make_generator(self.seed, epoch, 1))
        self.log_fields = {
            "subclasses": self.subclass_counts,
            "supcon_warmup": self.is_warmup,
            "coarse_temperatures": [round(t, 4) for t in self.coarse_temperatures.tolist()],
        }

    def recluster(self, model, generator):
        """Sub-classes and coarse temperatures from the projections of all training images, in eval mode."""
        device, views = self.subclasses.device, 1 if self.variant == "code" else 0
        options = dict(views=views, generator=generator)
        z = embed(model, self.subset, self.rows, device, self.batch_size, **options)
        z = z.reshape(len(self.rows), -1)  # [n, D]
        labels = torch.from_numpy(self.subset.labels[self.rows])
        subclasses, first = torch.empty_like(labels), 0
        for c, count in enumerate(self.subclass_counts):
            subclasses[labels == c] = cosine_kmeans(z[labels == c], count, generator) + first
            first += count
        scales = scale_temperatures(class_spreads(z, labels), self.subclass_counts, self.variant)
        self.subclasses.copy_(subclasses)
        self.coarse_temperatures.copy_(self.temperature * scales)

    def forward(self, model, batch):
        z, labels = model(batch.x).transpose(0, 1), batch.labels
        if self.is_warmup:
            return supcon_loss(z, labels, self.temperature)
        subclasses = self.subclasses[batch.positions]
        temperatures = self.temperature, self.coarse_temperatures
        fine_scale = 0.1 / 0.07 if self.variant == "code" else 1.0
        return sbcl_loss(z, labels, subclasses, *temperatures, fine_scale=fine_scale)

    def collapse_value(self, images):
        return None  # the coarse term's depends on what the batch holds
