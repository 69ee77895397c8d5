"""The paper in one file: model, losses, training loop, embeddings.

    from common import supcon_loss, supmin_loss, suppro_loss
    loss = supmin_loss(z, labels, minority=1)          # z [N images, V views, D], unit vectors

Letters: N images in the batch, V views of each, D dimensions, T temperature. Inside the losses all
V*N views are rows, view-major: row = view * N + image.
"""

import math
import numbers
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# Public names that stay importable from here.
from datasets.augment import (  # noqa: F401
    RECIPES,
    augment,
    augment_views,
    center_crops,
    center_view,
    color_jitter,
    crop_resize,
    draw_crops,
    draw_jitter,
    grayscale,
    normalize,
    rotate,
    shift_hue,
)
from datasets.loader import ImageReader
from datasets.subset import Subset, load_subset  # noqa: F401
from utils.cli import UserError, run_main
from utils.contrast_kernel import chunked_contrastive_loss, flatten_views
from utils.distributed import at_least_float32, gather_views, rank, sum_gradients, world_size
from utils.encoders import IMAGENET_MEAN, IMAGENET_STD, build_encoder
from utils.files import read_json
from utils.runs import check_finite, load_strict, load_tensors

cli = run_main

# --------------------------------------------------------------------------------------------------
# model: encoder, projection head, what a method adds
# --------------------------------------------------------------------------------------------------


class ContrastiveModel(nn.Module):
    """Encoder, SimCLR's two-layer projection head without batch norm, unit sphere.

    In training the output is that of the whole batch on every rank. chunk: this many images go
    through the encoder at a time. No activations are kept: the gradient passes each chunk through
    the encoder again. Batch norm then uses the statistics of a chunk. relu: end the head with a
    ReLU (Kini et al. 2023, arXiv:2306.07960).
    """

    def __init__(self, arch, projection_dim=128, chunk=None, stem="imagenet", relu=False):
        super().__init__()
        self.encoder, self.dim, self.chunk = build_encoder(arch, stem), projection_dim, chunk
        width = self.encoder.dim
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)]
        self.head = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))

    def forward(self, x):  # [..., n, 3, H, W] -> [..., N, projection_dim], unit vectors
        return self.project(self.features(x))

    def features(self, x):
        """[..., n, 3, H, W] of this rank -> [..., N, dim] of all ranks (eval mode: N = n)."""
        if not self.training:
            return self.encode(x)
        if not self.chunk:
            return gather_views(self.encode(x))
        return gather_views(torch.cat(list(self.encode_chunks(x)), dim=-2))

    def encode(self, x):  # [..., 3, H, W] -> [..., dim]
        return self.encoder(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    def encode_chunks(self, x):
        options = dict(use_reentrant=False, preserve_rng_state=False)
        options["context_fn"] = lambda: (nullcontext(), preserve_buffers(self.encoder))
        for images in x.split(self.chunk // world_size(), dim=-4):
            yield checkpoint(self.encode, images, **options)

    def project(self, features):  # [..., dim] -> [..., projection_dim], unit vectors
        # In float32 under autocast, too: bf16 is too coarse for embeddings near a collapse.
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.head(at_least_float32(features)), dim=-1)


def build_model(config):
    """Build the untrained ContrastiveModel that config.json describes."""
    stem, relu = config.get("stem", "imagenet"), config.get("relu", False)
    return ContrastiveModel(config["arch"], config["projection_dim"], stem=stem, relu=relu)


@contextmanager
def preserve_buffers(network):
    """Restore the buffers at the end: the second pass of a chunk must not update batch norm."""
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:
        # checkpoint leaves by an exception as soon as it has what it needs.
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)


@dataclass
class Training:
    """What a method may need to know about the training it is part of."""

    epochs: int
    batch_size: int
    seed: int
    temperature: float
    generator: torch.Generator  # for the initial state: prototypes, queues


class Method(nn.Module):
    """A contrastive method: the loss of a batch, and the state it keeps between steps.

    Buffers and parameters go into the checkpoint. A method that needs only embeddings and labels
    defines `loss`; the others define `forward`.
    """

    views = 2  # of each image
    randaugment_views = ()  # indices of the views that also get RandAugment
    log_fields = {}  # logged beside the loss

    def __init__(self, model, subset, training):
        super().__init__()
        self.temperature, self.epochs = training.temperature, training.epochs

    def forward(self, model, batch):
        """Return the loss of the whole batch, a scalar. batch: datasets.loader.Batch."""
        return self.loss(model(batch.x).transpose(0, 1), batch.labels, batch.generator)

    def loss(self, z, labels, generator):
        """Return the loss of the whole batch, which may hold no minority image.

        z [N, V, D] unit vectors in float32; labels int [N]; generator: of the epoch, on the CPU.
        Called under autocast: products of z need torch.autocast(enabled=False).
        """
        raise NotImplementedError

    def start_epoch(self, epoch, model):
        """Do what is due before the epoch."""

    def schedule_span(self, epoch):
        """Return (first, end) of the epochs that share one learning-rate schedule with `epoch`.

        The optimizer starts anew with each span.
        """
        return 0, self.epochs

    def collapse_value(self, images):
        """Return the loss if all embeddings are equal; None if that is no constant."""
        return collapse_value(images)


def load_run(folder, smoke=False):
    """Load a finished run: (config, subset, encoder in eval mode).

    Raises UserError if the run is not finished, or if its subset has changed.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", "give a run folder of pretrain.py or finetune.py")
    if not {"arch", "subset", "size", "sha256", "rows_sha256"} <= config.keys():
        raise UserError(f"{folder / 'config.json'}: not the settings of a run; give a run folder")
    subset = load_subset(os.path.normpath(folder / config["subset"]))
    if (subset.sha256, subset.rows_sha256) != (config["sha256"], config["rows_sha256"]):
        raise UserError(f"{subset.path}: changed since {folder} was trained; make the subset again")
    if (folder / "classifier.pt").exists() and not (folder / "encoder.pt").exists():
        raise UserError(f"{folder}: holds only a classifier; give the run of its encoder")
    subset.change_views(config["size"], config.get("recipe"), config.get("no_flip"))
    if config.get("init") == "imagenet":
        subset = replace(subset, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    encoder = build_encoder(config["arch"], config.get("stem", "imagenet"))
    load_strict(encoder, load_tensors(folder / "encoder.pt"), folder / "encoder.pt")
    encoder.eval().requires_grad_(False)
    return config, subset.limit_for_smoke() if smoke else subset, encoder


# --------------------------------------------------------------------------------------------------
# losses: with s_ij = z_i . z_j / T, A(i) the other views and P(i) the positives of view i,
#
#     L = mean_i [ log sum_{a in A(i)} exp(s_ia)  -  mean_{p in P(i)} s_ip ]                   (1)
#
# The methods differ in P(i) alone. (1) is L_out of Khosla et al. 2020 (arXiv:2004.11362), as a mean
# over anchors and without the factor temperature / base_temperature of SupContrast's code.
# If all embeddings are equal, (1) is log(V*N - 1) for any views in P: the collapse value.
# --------------------------------------------------------------------------------------------------

LARGE_BATCH = 2048  # rows; above it, the kernel with linear memory takes over


def contrastive_loss(z, group, temperature, attracted=0.0, own_cosine=0.0):
    """Equation (1). P(i) = the other views of i's group, and its prototype where `attracted` is 1.

    z [N, V, D] unit vectors; group int [N]; attracted [V*N]: 1 where the prototype of the own class
    is a positive, else 0; own_cosine [V*N]: the cosine with it, so s_ip = own_cosine / T.
    Returns a scalar (nats), in float32 or better.
    """
    rows, group = flatten_views(z), group.repeat(z.shape[1])  # [V*N, D], [V*N]
    if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
        raise ValueError("the temperature is a number; it gets no gradient")
    if len(rows) > LARGE_BATCH:
        return chunked_contrastive_loss(rows, group, temperature, attracted, own_cosine)
    positive = (group[:, None] == group).to(rows).fill_diagonal_(0)  # P(i): 0 or 1, [V*N, V*N]
    # .float() alone is not enough: autocast would compute this product in half precision.
    with torch.autocast(z.device.type, enabled=False):
        s = (rows / temperature) @ rows.T  # s_ij
    s = s.fill_diagonal_(-1e9)  # no view is compared with itself; -inf would give 0 * inf
    pulled = (s * positive).sum(1) + attracted * own_cosine / temperature
    return (s.logsumexp(1) - pulled / (positive.sum(1) + attracted)).mean()


def ntxent_loss(z, temperature=0.07):
    """NT-Xent (SimCLR): P(i) = the other views of the same image.

    z [N, V, D] unit vectors, V >= 2. Returns a scalar (nats).
    Source: Chen et al. 2020, arXiv:2002.05709.
    """
    return contrastive_loss(z, torch.arange(len(z), device=z.device), temperature)


def supcon_loss(z, labels, temperature=0.07):
    """Supervised contrastive loss: P(i) = all other views of the same class.

    z [N, V, D] unit vectors, V >= 2; labels int [N]. Returns a scalar (nats).
    Source: Khosla et al. 2020, arXiv:2004.11362, L_out.
    """
    return contrastive_loss(z, check_labels(z, labels), temperature)


def supmin_loss(z, labels, minority, temperature=0.07, supervised_majority=None):
    """Supervised Minority: SupCon for minority anchors, NT-Xent for majority anchors.

    Equation (1) with P(i) = all other views of the class of i if that is a minority class, else the
    other views of the image of i.

    z [N, V, D] unit vectors, V >= 2; labels int [N]; minority: label of the rare class, or several.
    supervised_majority: bool [N] or None, the majority images that are also positives of each other
    within their class (draw_supervised_majority); all of them gives SupCon. Returns a scalar
    (nats). Source: arXiv:2503.17024, for one minority class.
    """
    labels = check_labels(z, labels)
    supervised = is_minority(labels, minority)  # [N]
    if supervised_majority is not None:
        supervised = supervised | check_labels(z, supervised_majority).bool()
    # Every other image is a group of its own.
    single = labels.max() + 1 + torch.arange(len(z), device=z.device)
    return contrastive_loss(z, torch.where(supervised, labels, single), temperature)


def suppro_loss(z, labels, prototypes, temperature=0.07, margin=1.0):
    """Supervised Prototypes: NT-Xent plus attraction to the fixed prototype of the own class.

    P(i) = the other views of the same image and, while cos(z_i, p_own) <= max cos(z_i, p_other) +
    margin, the own prototype. Antipodal prototypes thus attract until cos(z_i, p_own) = margin / 2:
    0.5 by default, the paper's threshold. Prototypes stand in no denominator and get no gradient,
    so the loss can be negative, and its collapse value differs.

    z [N, V, D] unit vectors, V >= 2; labels int [N]; prototypes [C, D], row = class, as of
    simplex_prototypes; margin: a float, or one per class. Returns a scalar (nats).
    Source: arXiv:2503.17024, for two classes.
    """
    labels = check_labels(z, labels).repeat(z.shape[1])  # [V*N]
    rows = flatten_views(z)  # [V*N, D]
    prototypes = prototypes.detach().to(rows)
    cosines = (rows[:, None] * prototypes).sum(2)  # [V*N, C]
    own_cosine = cosines.gather(1, labels[:, None]).squeeze(1)
    other_cosine = cosines.scatter(1, labels[:, None], -torch.inf).amax(1)
    margins = torch.as_tensor(margin, dtype=rows.dtype).to(rows.device, non_blocking=True)
    attracted = own_cosine <= other_cosine + margins.expand(len(prototypes))[labels]
    group = torch.arange(len(z), device=z.device)
    return contrastive_loss(z, group, temperature, attracted.to(rows), own_cosine)


def check_labels(z, labels):
    """Return int64 labels [N]. Raises ValueError for another shape."""
    if labels.shape != z.shape[:1]:
        raise ValueError(f"{len(z)} images need labels [{len(z)}], not {list(labels.shape)}")
    return labels.long()


def is_minority(labels, minority):
    """Return bool [N], true for images of the minority: a label, or the labels of several."""
    if isinstance(minority, numbers.Integral):
        return labels == minority
    if not torch.is_tensor(minority):
        minority = torch.as_tensor([*minority])
    return torch.isin(labels, minority.to(labels.device, non_blocking=True))


def collapse_value(images, views=2):
    """Return the loss of a batch whose embeddings are all equal: log(V*N - 1)."""
    return math.log(views * images - 1)


def draw_supervised_majority(labels, minority, ratio, generator):
    """Draw floor(ratio * n_majority) majority images for supmin_loss, without replacement.

    Returns bool [N]. ratio 0 is Supervised Minority as published, 1 is SupCon.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the ratio of supervised majority images is from 0 to 1, not {ratio}")
    majority = (~is_minority(labels, minority)).nonzero().squeeze(1)
    order = torch.randperm(len(majority), generator=generator, device=generator.device)
    drawn = torch.zeros_like(labels, dtype=torch.bool)
    drawn[majority[order.to(labels.device)[: int(ratio * len(majority))]]] = True
    return drawn


def antipodal_prototypes(dim, generator):
    """Return a random unit vector and its opposite, [2, dim], row = class."""
    return simplex_prototypes(2, dim, generator)


def simplex_prototypes(classes, dim, generator):
    """Return C random unit vectors with cosine -1/(C-1) to each other, [C, dim], row = class.

    They are the corners of a regular simplex. Raises ValueError if it does not fit: dim < C - 1.
    """
    if not 2 <= classes <= dim + 1:
        raise ValueError(f"{classes} prototypes need 2 or more, and {classes - 1} dimensions")
    drawn = torch.randn(classes - 1, dim, generator=generator, device=generator.device)
    axes, prototypes = torch.zeros_like(drawn), drawn.new_zeros(classes, dim)
    for c, direction in enumerate(drawn):
        axes[c] = F.normalize(direction - axes.T @ (axes @ direction), dim=0)
        # Along this axis, corner c is opposite to all corners after it.
        after = classes - 1 - c
        height = math.sqrt(classes / (classes - 1) * after / (after + 1))
        prototypes[c] += height * axes[c]
        prototypes[c + 1 :] -= height / after * axes[c]
    return prototypes


def class_weights(counts):
    """Return inverse class frequencies that sum to 1: w_c = (1/n_c) / sum_k (1/n_k), [C]."""
    counts = torch.as_tensor(counts, dtype=torch.get_default_dtype())
    if counts.ndim != 1 or len(counts) < 2 or (counts <= 0).any():
        raise ValueError(f"class weights need a positive count per class, not {counts.tolist()}")
    return (1 / counts) / (1 / counts).sum()


def focal_loss(logits, targets, gamma=2.0, weights=None):
    """Focal loss: mean over images of -w_y (1 - p_y)^gamma log p_y.

    logits [B, C]; targets int [B]; weights [C] or None; p_y is the unweighted softmax.
    Returns a scalar (nats). Source: Lin et al. 2017, arXiv:1708.02002.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = at_least_float32(logits).log_softmax(dim=1)
        log_p = log_p.gather(1, targets[:, None].long()).squeeze(1)  # [B]
        # The derivative of 0 ** gamma is infinite for gamma < 1.
        one_minus_p = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        loss = -(one_minus_p**gamma) * log_p
        if weights is not None:
            loss = loss * weights.to(loss)[targets.long()]
        return loss.mean()


# --------------------------------------------------------------------------------------------------
# loop: learning rate, mixed precision, one epoch
# --------------------------------------------------------------------------------------------------


def warmup_cosine(epoch, epochs, lr, warmup_epochs=10):
    """Return the learning rate of 0-based `epoch`.

    Linear from lr/10 to lr over the warm-up, then a cosine that would reach lr/1000 at `epochs`.
    """
    if epoch < warmup_epochs:
        return lr * (0.1 + 0.9 * epoch / max(warmup_epochs - 1, 1))
    low = lr * 0.1**3
    half = 0.5 * (1 + np.cos(np.pi * (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)))
    # A NumPy number would enter the checkpoint with the optimizer.
    return float(low + (lr - low) * half)


class Amp:
    """Mixed precision: autocast, and a gradient scaler for fp16. "off" passes through both.

    mode: auto (bf16 where the GPU has it, else off), off, bf16, fp16, or fp32: off, and without
    TF32, which torch otherwise uses in the convolutions of Ampere and later GPUs. Raises UserError
    for fp16 on the CPU, and for bf16 on the CPU with images of at most 16 px: torch 2.11 computes
    wrong gradients of stride-2 convolutions of a single pixel.
    """

    def __init__(self, device, mode, size):
        if mode == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
            mode = "bf16" if has_bf16 else "off"
        if mode == "fp16" and device.type == "cpu":
            raise UserError("--amp fp16: needs a CUDA device; use --amp bf16 or off on the CPU")
        if mode == "bf16" and device.type == "cpu" and size <= 16:
            raise UserError(f"--amp bf16: gives wrong gradients on the CPU at {size} px; use off")
        if mode == "fp32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        dtype = torch.float16 if mode == "fp16" else torch.bfloat16
        self.mode = mode
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=mode in ("bf16", "fp16"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode == "fp16")

    def step(self, loss, optimizer):
        """Make one optimizer step; return whether fp16 overflowed and the step was skipped."""
        scale = self.scaler.get_scale()
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss / world_size()).backward()
        sum_gradients(p for group in optimizer.param_groups for p in group["params"])
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() < scale


def train_one_epoch(loss_of_batch, batches, optimizer, amp, folder):
    """Make one optimizer step per batch; return the statistics of the epoch for the log.

    loss_of_batch: datasets.loader.Batch -> scalar. batches: datasets.loader.EpochBatches. With
    learning rate 0 there is only a forward pass, which settles the statistics of batch norm.
    Raises UserError if a loss or a weight is not finite; the rows of that step are written to
    folder/not-finite.json.
    """
    started, skipped, images = time.time(), 0, 0
    is_training = any(group["lr"] > 0 for group in optimizer.param_groups)
    losses = torch.zeros(len(batches), device=batches.device)
    bar = tqdm(batches, leave=False, unit="step", disable=True if rank() else None)
    for step, batch in enumerate(bar):
        with torch.set_grad_enabled(is_training), amp.autocast:
            loss = loss_of_batch(batch)
        overflow = amp.step(loss, optimizer) if is_training else False
        # No .item() here: it would wait for the GPU.
        losses[step] = 0 if overflow else loss.detach()
        skipped, images = skipped + overflow, images + len(batch.labels)
    check_finite(losses, optimizer, batches, folder)
    if skipped == len(losses) and (batches.epoch > 0 or amp.scaler.get_scale() < 1):
        raise UserError(
            f"{folder}: fp16 overflowed in every step of an epoch; use --amp bf16 or off"
        )
    seconds = time.time() - started
    mean_loss = losses.double().sum().item() / max(1, len(losses) - skipped)
    stats = {"loss": mean_loss, "lr": optimizer.param_groups[0]["lr"], "seconds": round(seconds, 3)}
    stats["images_per_s"] = round(images / seconds, 1)
    return stats | ({"skipped_steps": skipped} if amp.mode == "fp16" else {})


# --------------------------------------------------------------------------------------------------
# evaluation: the output of a network for rows of a subset
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(network, subset, rows, device, batch_size=256, views=0, generator=None):
    """Return the outputs of a network in eval mode for some rows of a subset.

    views = 0: the evaluation view, float32 [n, D]; else augmented views drawn by `generator`,
    [views, n, D]. Raises UserError if an output is not finite.
    """
    was_training = network.training
    network.eval()
    sizes = torch.from_numpy(subset.sizes[rows])
    batches = list(np.array_split(np.arange(len(rows)), -(-len(rows) // batch_size)))
    reader = ImageReader(subset.images, rows, device)
    outputs = []
    progress = dict(total=len(batches), desc="embed", leave=False, disable=None)
    for positions, images in tqdm(reader(batches), **progress):
        if views:
            recipe = subset.augmentation(), subset.size, generator
            x = augment_views(images, sizes[positions], *recipe, [False] * views)
        else:
            x = center_view(images, sizes[positions], subset.size)[None]
        output = network(normalize(x.flatten(0, 1), subset.mean, subset.std))
        outputs.append(output.float().cpu().unflatten(0, (len(x), -1)))
    network.train(was_training)
    z = torch.cat(outputs, dim=1)
    if not z.isfinite().all():
        raise UserError("the network's output is not finite; train again with a lower --lr")
    return z if views else z[0]
