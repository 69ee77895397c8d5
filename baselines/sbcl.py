"""SBCL ("SBC" in the paper): sub-classes of the majority, each as large as the minority."""

import math

import torch
import torch.nn.functional as F

from baselines.shared import mark_equal_pairs, uniform_weights, weighted_contrast
from common import Method, check_labels, embed, supcon_loss
from utils.contrast_kernel import flatten_views
from utils.runs import make_generator


def sbcl_loss(
    z, labels, subclasses, temperature=0.1, coarse_temperatures=0.1, beta=0.25, fine_scale=1
):
    """Subclass-balancing contrastive learning: SupCon on sub-classes and, weakly, on classes.

        L = mean_i [ fine_scale * l_T(i; M(i), A(i))  +  beta * l_Tc(i; P(i), D(i)) ]
        l_T(i; P, D) = log sum_{a in D} exp(z_i . z_a / T)  -  mean_{p in P} z_i . z_p / T

    A(i): all other views; M(i): those of the own sub-class. D(i): A(i) without the own sub-class,
    but with the other views of the image; P(i): those of the class in D(i). Tc: the coarse
    temperature of the anchor's class.
    z [N, V, D] unit vectors; labels, subclasses int [N], where two classes may use the same ids;
    coarse_temperatures: a float, or one per class. Returns a scalar (nats).
    Source: Hou et al. 2023, arXiv:2306.15925.
    """
    check_labels(z, labels)
    check_labels(z, subclasses)
    rows, views, device = flatten_views(z), z.shape[1], z.device
    with torch.autocast(device.type, enabled=False):
        cosines = rows @ rows.T
    others = ~torch.eye(len(rows), dtype=torch.bool, device=device)  # A(i)
    images = torch.arange(len(z), device=device)
    same_class, same_subclass, same_image = (
        mark_equal_pairs(values, views) & others for values in (labels, subclasses, images)
    )
    siblings = same_class & same_subclass  # M(i)
    outside = others & ~siblings | same_image  # D(i)
    fine_weights = uniform_weights(siblings, rows.dtype)
    coarse_weights = uniform_weights(same_class & outside, rows.dtype)
    coarse_temperatures = torch.as_tensor(coarse_temperatures, dtype=rows.dtype)
    coarse_temperatures = coarse_temperatures.to(device, non_blocking=True)
    if coarse_temperatures.ndim:
        coarse_temperatures = coarse_temperatures[labels.long().repeat(views), None]  # [V*N, 1]
    fine = weighted_contrast(cosines / temperature, others, fine_weights)
    coarse = weighted_contrast(cosines / coarse_temperatures, outside, coarse_weights)
    return (fine_scale * fine + beta * coarse).mean()


def count_subclasses(counts, smallest=10):
    """Return the number of sub-classes of each class: max(1, floor(n_c / M)), a list.

    M = max(n_min, smallest). counts: n_c, one number per class.
    """
    size = max(min(counts), smallest)
    return [max(1, n // size) for n in counts]


def cosine_kmeans(x, clusters, generator, steps=35, tolerance=1e-3):
    """Cluster unit vectors x [n, D] by k-means with the cosine; return the clusters, int [n].

    Centres are the means of their rows. They start on distinct random rows; the centre of an empty
    cluster restarts on a random row. Stops after `steps`, or when the squared sum of the centres'
    moves falls below `tolerance`.
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
    """Return phi_c = mean distance of a class from its mean / log(n_c + 10), [C]; z [n, D]."""
    spreads = []
    for c in range(int(labels.max()) + 1):
        members = z[labels == c]
        distance = (members - members.mean(0)).norm(dim=1).mean()
        spreads.append(distance / math.log(len(members) + 10))
    return torch.stack(spreads)


def scale_temperatures(spreads, subclass_counts, variant):
    """Return each class's coarse temperature divided by T, [C].

    "paper": exp(phi_c / mean phi). "code": phi_c / mean phi, with phi clipped between its 20th and
    80th percentiles; 1 for a class with a single sub-class.
    """
    # If all embeddings are equal, only rounding is left of the spreads.
    spreads = spreads.clamp(min=1e-6)
    if variant == "paper":
        return (spreads / spreads.mean()).exp()
    clipped = spreads.clamp(spreads.quantile(0.2), spreads.quantile(0.8))
    return torch.where(torch.tensor(subclass_counts) == 1, 1.0, clipped / clipped.mean())


class SBCL(Method):
    """SupCon for 10 epochs or half of all, then sub-classes, made anew every few epochs.

    Sub-classes come from k-means of the projections. Variant "code" follows the published code,
    which gave the numbers in arXiv:2503.17024: it clusters an augmented view and multiplies the
    fine term by 0.1/0.07. Variant "paper" clusters the evaluation view. The coarse temperatures
    differ too: see scale_temperatures.
    """

    def __init__(self, model, subset, training, variant, recluster_every):
        super().__init__(model, subset, training)
        self.variant, self.recluster_every = variant, recluster_every
        self.warmup_epochs = min(10, training.epochs // 2)
        self.seed, self.batch_size = training.seed, model.chunk or training.batch_size
        self.subset, self.rows = subset, subset.splits["train"]
        self.subclass_counts = count_subclasses(subset.train_counts())
        self.register_buffer("subclasses", torch.from_numpy(subset.labels[self.rows]))
        temperatures = torch.full((len(subset.classes),), training.temperature)
        self.register_buffer("coarse_temperatures", temperatures)
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
        """Set sub-classes and coarse temperatures from the projections in eval mode."""
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
        fine_scale = 0.1 / 0.07 if self.variant == "code" else 1
        return sbcl_loss(
            z, labels, subclasses, self.temperature, self.coarse_temperatures, fine_scale=fine_scale
        )

    def collapse_value(self, images):
        # That of the coarse term depends on the labels of the batch.
        return None
