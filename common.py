"""What the scripts share, in five rooms: run, data, model, losses, loop. Each room leans only on those above it.

What can be read and quoted alone has files of its own: the command line and its files (run.py), images on disk (datasets/), their
views (augment.py), the losses (losses.py), all of which can be imported from here, and several processes (distributed.py).
"""

import csv
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from datasets.augment import (  # noqa: F401
    RECIPES,
    augment,
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
from datasets.images import list_prediction_images, printable, read_image, squeeze  # noqa: F401
from datasets.loader import ImageReader  # noqa: F401
from datasets.source import SPLITS  # noqa: F401
from datasets.subset import Subset, load_subset  # noqa: F401
from losses import (  # noqa: F401
    antipodal_prototypes,
    class_weights,
    collapse_value,
    draw_supervised_majority,
    focal_loss,
    ntxent_loss,
    supcon_loss,
    supmin_loss,
    suppro_loss,
)
from utils.cli import ArgumentParser, Stop, Stopped, UserError, command_line, number_from, run_main  # noqa: F401
from utils.distributed import (
    all_reduce_max,
    at_least_float32,
    gather_views,
    rank,
    sum_gradients,
    world_size,
)
from utils.files import atomic_write, lock_folder, naming, read_json, read_log, sha256, write_json  # noqa: F401
from utils.runs import (  # noqa: F401
    load_strict,
    load_tensors,
    log_line,
    make_generator,
    module_sha256,
    pick_device,
    provenance,
    resume,
    rewind_log,
    save_checkpoint,
    save_tensors,
    start_run,
)

cli = run_main

# ------------------------------------------------------------------------------------------------------------------
# model: a torchvision ResNet, the projection head, and finding a finished encoder again
# ------------------------------------------------------------------------------------------------------------------


CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56)


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, no pooling, three stages of widths 16, 32 and 64.

    x [B, 3, H, W] -> features [B, 64]. depth = 6n + 2, with n blocks of two 3x3 convolutions in
    each stage; stages 2 and 3 begin with stride 2. Source: He et al. 2016 (arXiv:1512.03385),
    section 4.2. Differs from the paper: where the shape changes, the shortcut is a 1x1 convolution
    with batch norm (torchvision's BasicBlock, option B), not padding with zeros (option A).
    """

    dim = 64

    def __init__(self, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self.make_stage(16, 16, blocks, stride=1)
        self.layer2 = self.make_stage(16, 32, blocks, stride=2)
        self.layer3 = self.make_stage(32, 64, blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def make_stage(width_in, width, blocks, stride):
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
            )
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *[BasicBlock(width, width) for _ in range(blocks - 1)])

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))  # [B, 16, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64, H/4, W/4]
        return x.mean(dim=(2, 3))


def build_encoder(arch):
    """Build a ResNet without its classifier; `.dim` is the feature dimension.

    arch: a CIFAR ResNet (resnet8, 14, 20, 32, 44 or 56) or any ResNet of torchvision.
    Raises UserError for another name.
    """
    cifar = {f"resnet{depth}": depth for depth in CIFAR_DEPTHS}
    if arch in cifar:
        return CifarResNet(cifar[arch]).to(memory_format=torch.channels_last)
    names = [n for n in torchvision.models.list_models(torchvision.models) if "resn" in n]
    if arch not in names:
        choices = ", ".join([*cifar, *names])
        raise UserError(f"--arch {arch}: no such network; choose one of {choices}")
    encoder = torchvision.models.get_model(arch, weights=None)
    encoder.dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    # Same numbers up to rounding, in the memory layout that tensor cores take.
    return encoder.to(memory_format=torch.channels_last)


class ContrastiveModel(nn.Module):
    """Encoder, then the two-layer projection head of SimCLR without batch norm, then the unit sphere.

    In training, what comes out is of the whole batch, whatever the number of processes that share it. chunk: so many of its images go
    through the encoder at a time, by which activations and batch norm are those of a batch of that size; none are kept, and the gradient
    takes each chunk through the encoder again.
    """

    def __init__(self, arch, projection_dim=128, chunk=None):
        super().__init__()
        self.encoder, self.dim, self.chunk = build_encoder(arch), projection_dim, chunk
        self.head = nn.Sequential(
            nn.Linear(self.encoder.dim, self.encoder.dim),
            nn.ReLU(),
            nn.Linear(self.encoder.dim, projection_dim),
        )

    def features(self, x):
        """x [..., n, 3, H, W], this process's images -> [..., N, encoder.dim] of all images; in eval mode N = n."""
        if not self.training:
            return self.encode(x)
        if not self.chunk:
            return gather_views(self.encode(x))
        return gather_views(
            torch.cat(
                [
                    checkpoint(
                        self.encode,
                        part,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda: (nullcontext(), preserve_buffers(self.encoder)),
                    )
                    for part in x.split(self.chunk // world_size(), dim=-4)
                ],
                dim=-2,
            )
        )

    def encode(self, x):  # [..., 3, H, W] -> [..., encoder.dim]
        return self.encoder(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    def project(self, features):  # [..., encoder.dim] -> [..., projection_dim], unit vectors
        return F.normalize(at_least_float32(self.head(features)), dim=-1)

    def forward(self, x):  # [..., n, 3, H, W] -> [..., N, projection_dim], unit vectors
        return self.project(self.features(x))


@contextmanager
def preserve_buffers(network):
    """Its buffers leave the block as they entered it: batch norm counts no image twice."""
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:  # checkpoint leaves by an exception when it has what it needs
        for buffer, value in zip(network.buffers(), before):
            buffer.copy_(value)


class Method(nn.Module):
    """What pretrain.py trains with: the loss of a batch, and whatever the method keeps (buffers and parameters go into the checkpoint).

    Built as Method(args, subset, model, generator); what it reads of args stands in the tables of pretrain.py. A method that needs no more
    than embeddings and labels defines `loss`; the others define `forward`.
    """

    views = 2  # of each image
    strong = ()  # which of the views also get RandAugment
    facts = {}  # for the log, beside the loss

    def __init__(self, args, subset, model, generator):
        super().__init__()
        self.temperature = args.temperature

    def forward(self, model, x, labels, positions, generator):
        """The loss of the whole batch. x [V, n, 3, H, W], this process's share of its images; labels int [N]; positions int [N], which
        training images these are; generator of the epoch, on the CPU, the same in all processes."""
        return self.loss(model(x).transpose(0, 1), labels, generator)

    def start_epoch(self, epoch, model, resumed=False):
        """Called before each epoch; resumed: in the middle of it, where what was computed at its start is in the checkpoint."""

    def phase(self, epoch, epochs):
        """(first, end) of the stretch of epochs around `epoch` that has one learning-rate schedule; the optimizer starts afresh with each."""
        return 0, epochs

    def collapse_value(self, images):
        """The loss of a batch whose embeddings are all equal; None where it is no constant."""
        return collapse_value(images)


def load_run(folder, smoke=False):
    """A finished run: (config, subset, encoder in eval mode). UserError when the run is not finished or something else."""
    folder, way_out = Path(folder), "give a run folder that pretrain.py or finetune.py made"
    config = read_json(folder / "config.json", way_out)
    largest = {"size": 4096, "seed": 2**63, "batch_size": 2**31}
    for key in ("subset", "arch", "sha256", "rows_sha256", *largest):
        value = config.get(key)
        if not (
            type(value) is int and 0 <= value <= largest[key]
            if key in largest
            else isinstance(value, str)
        ):
            raise UserError(
                f"{folder / 'config.json'}: has no {key} that a run could have; {way_out}"
            )
    subset = replace(load_subset(os.path.normpath(folder / config["subset"])), size=config["size"])
    encoder = build_encoder(config["arch"])
    same = (subset.sha256, subset.rows_sha256) == (config["sha256"], config["rows_sha256"])
    if not same:
        raise UserError(
            f"{subset.path}: not the images and rows that {folder} was trained on (checksum); make the subset again as it was"
        )
    if (folder / "classifier.pt").exists() and not (folder / "encoder.pt").exists():
        raise UserError(
            f"{folder}: holds a classifier alone, which was trained on another run's encoder; give that run"
        )
    load_strict(encoder, load_tensors(folder / "encoder.pt"), folder / "encoder.pt")
    return (
        config,
        subset.limit_for_smoke() if smoke else subset,
        encoder.eval().requires_grad_(False),
    )


# ------------------------------------------------------------------------------------------------------------------
# loop: schedule, precision, shuffling, features, scores
# ------------------------------------------------------------------------------------------------------------------


class Epoch:
    """How far an epoch has come: its batches, its generator, the losses of its steps. Stopped within, it goes on with its next step."""

    def __init__(self, number, seed, draw, device, stop):
        """draw: generator -> batches, lists of positions. The generator is the epoch's own: order, augmentation and draws repeat."""
        self.number, self.stop, self.started = number, stop, time.time()
        self.generator = make_generator(seed, number)
        self.batches = draw(self.generator)
        self.resumed, stop.within = stop.within, None
        self.done, self.skipped = 0, 0
        self.losses = torch.zeros(len(self.batches), device=device)
        if self.resumed:
            if len(self.resumed["losses"]) != len(self.batches):
                raise UserError(
                    "checkpoint.pt: of an epoch with another number of steps; delete it to start again"
                )
            self.generator.set_state(self.resumed["generator"])
            self.done, self.skipped = self.resumed["step"], self.resumed["skipped"]
            self.losses.copy_(self.resumed["losses"])
            self.started -= self.resumed["seconds"]

    def step(self, loss, optimizer, scaler):
        """Backward and one step of the optimizer; Stopped, with what a checkpoint needs, if a signal has asked any process for it."""
        scale = scaler.get_scale()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss / world_size()).backward()
        sum_gradients(p for group in optimizer.param_groups for p in group["params"])
        scaler.step(optimizer)
        scaler.update()
        overflow = scaler.get_scale() < scale  # fp16: the scaler has left this step out
        self.skipped += overflow
        self.losses[self.done] = (
            0 if overflow else loss.detach()
        )  # no .item() here: it would wait for the GPU
        self.done += 1
        signal = all_reduce_max(self.stop.number or 0)
        if signal:
            within = {
                "step": self.done,
                "skipped": self.skipped,
                "losses": self.losses.cpu(),
                "generator": self.generator.get_state(),
                "seconds": self.seconds(),
            }
            raise Stopped(signal, within if self.is_finite(optimizer) else None)

    @staticmethod
    def can_go_on(within):
        """Whether this is what a Stopped epoch has left."""
        kinds = {
            "step": int,
            "skipped": int,
            "losses": torch.Tensor,
            "generator": torch.Tensor,
            "seconds": float,
        }
        if not (
            isinstance(within, dict)
            and kinds.keys() == within.keys()
            and all(isinstance(within[name], kind) for name, kind in kinds.items())
        ):
            return False
        try:
            torch.Generator().set_state(within["generator"])
        except (RuntimeError, TypeError):
            return False
        return within["losses"].ndim == 1 and 0 <= within["step"] <= len(within["losses"])

    def seconds(self):
        return time.time() - self.started

    def is_finite(self, optimizer):
        sums = [
            p.detach().sum() for group in optimizer.param_groups for p in group["params"]
        ]  # quicker than each weight, and one wait for the GPU
        return bool(self.losses.isfinite().all() & torch.stack(sums).isfinite().all())

    def loss(self, optimizer, train, folder):
        """Mean loss of the steps that were not skipped. UserError where a loss or a weight is not finite.

        The images of that step are listed, and those of the one before: a gradient that is not finite shows in the next loss.
        """
        if not self.is_finite(optimizer):
            bad = (~self.losses.isfinite()).nonzero()
            step = int(bad[0]) if len(bad) else self.done - 1
            rows = {
                str(at + 1): train.rows[self.batches[at]].tolist()
                for at in (step - 1, step)
                if at >= 0
            }
            if rank() == 0:
                write_json(
                    Path(folder) / "not-finite.json",
                    {"epoch": self.number + 1, "step": step + 1, "rows": rows},
                )
            raise UserError(
                f"{folder}: the loss is not finite in epoch {self.number + 1}, step {step + 1}; the rows of its images are listed in "
                "not-finite.json, the last checkpoint is kept; try a lower --lr or --amp off, in another folder (--out)"
            )
        return self.losses.double().sum().item() / max(1, self.done - self.skipped)


def warmup_cosine(epoch, epochs, lr, warmup_epochs=10):
    """Learning rate of 0-based `epoch`: linear from lr/10 to lr over the warm-up, then a cosine to lr/1000 at `epochs`."""
    if epoch < warmup_epochs:
        return lr if warmup_epochs == 1 else lr * (0.1 + 0.9 * epoch / (warmup_epochs - 1))
    low = lr * 0.1**3
    half = 0.5 * (1 + np.cos(np.pi * (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)))
    return float(
        low + (lr - low) * half
    )  # no numpy number: it goes into the checkpoint with the optimizer


def precision(device, amp, size):
    """autocast and gradient scaler for --amp. One path for all: switched off they do nothing. auto: bf16 where the GPU has it."""
    if amp == "auto":
        amp = (
            "bf16"
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else "off"
        )
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16: needs a CUDA device; use --amp bf16 or off on the CPU")
    if (
        amp == "bf16" and device.type == "cpu" and size <= 16
    ):  # torch 2.11: stride-2 convolutions of a single pixel read foreign memory
        raise UserError(
            f"--amp bf16: gives wrong gradients on the CPU for images as small as {size} px; use --amp off or --size 32"
        )
    autocast = torch.autocast(
        device.type, dtype=torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off"
    )
    return amp, autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def shuffled_batches(n, batch_size, generator):
    """A permutation of range(n) cut into full batches; the remainder sits this epoch out. Lists of positions."""
    return [
        b.numpy()
        for b in torch.randperm(n, generator=generator).split(batch_size)
        if len(b) == batch_size
    ]


def guarantee_minority(batches, is_minority, k, generator):
    """The same batches, in which minority images take the place of majority images until each holds k of them, none twice in a batch.

    batches: arrays of positions, as shuffled_batches gives them; is_minority bool [n], true k times at least. An image may thus be seen in
    several batches of an epoch. Where a batch holds k already it stays as it is.
    """
    members, filled = np.flatnonzero(is_minority), []
    for batch in batches:
        spare, places = members[~np.isin(members, batch)], np.flatnonzero(~is_minority[batch])
        lacking = max(0, k - (len(batch) - len(places)))
        batch, chosen = (
            batch.copy(),
            places[np.arange(lacking) * len(places) // max(lacking, 1)],
        )  # all over the batch: --chunk cuts it
        batch[chosen] = spare[torch.randperm(len(spare), generator=generator)[:lacking]]
        filled.append(batch)
    return filled


@torch.no_grad()
def embed(network, subset, rows, device, batch_size=256, views=0, generator=None, desc=None):
    """Run some rows through a network in eval mode.

    views = 0: the evaluation view; else that many augmented views (generator required).
    Returns float32 [n, D], or [views, n, D].
    """
    from tqdm import tqdm

    was_training = network.training
    network.eval()
    sizes = torch.from_numpy(subset.sizes[rows])
    batches = list(np.array_split(np.arange(len(rows)), -(-len(rows) // batch_size)))
    out = []
    for positions, images in tqdm(
        ImageReader(subset.images, rows, device)(batches),
        total=len(batches),
        desc=desc,
        disable=desc is None,
        leave=False,
    ):
        if views:
            x = torch.stack(
                [
                    augment(images, sizes[positions], subset.recipe, subset.size, generator)
                    for _ in range(views)
                ]
            )
        else:
            x = center_view(images, sizes[positions], subset.size)[None]
        out.append(
            network(normalize(x.flatten(0, 1), subset.mean, subset.std))
            .float()
            .cpu()
            .unflatten(0, (len(x), -1))
        )
    network.train(was_training)
    z = torch.cat(out, dim=1)
    if not z.isfinite().all():
        raise UserError(
            "the network's output is not finite: training diverged; try a lower --lr or --amp off, in another folder"
        )
    return z if views else z[0]


def predict_folder(network, subset, folder, files, csv_path, device):
    """Write file, probability of the minority class, predicted class for every image of `folder`, prepared like the subset's.

    network: [B, 3, H, W] -> logits [B, 2]; files: from images_to_predict. An image that cannot be read has empty cells; at the end, when
    the others are written, a UserError names the first.
    """
    from tqdm import tqdm

    side, channels, bad = subset.images.shape[1], subset.images.shape[3], []
    network.eval()
    with atomic_write(csv_path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", f"p_{subset.classes[subset.minority]}", "predicted"])
        for path in tqdm(files, desc="predict", leave=False):
            try:
                pixels = read_image(path, grayscale=channels == 1)
            except Exception as error:  # Pillow raises many kinds for a damaged file
                bad.append(
                    f"{printable(path)}: cannot be read as an image ({' '.join(str(error).split())})"
                )
                table.writerow([printable(path.relative_to(folder)), "", ""])
                continue
            image = torch.from_numpy(squeeze(pixels, side).copy()).permute(2, 0, 1)[None].to(device)
            x = normalize(
                center_view(image, torch.tensor([pixels.shape[:2]]), subset.size),
                subset.mean,
                subset.std,
            )
            with torch.no_grad():
                p = network(x).double().softmax(1)[0].cpu()
            table.writerow(
                [
                    printable(path.relative_to(folder)),
                    f"{p[subset.minority]:.6f}",
                    subset.classes[int(p[1] > 0.5)],
                ]
            )
    print(f"wrote {csv_path}: {len(files) - len(bad)} images")
    if bad:
        more = f", and {len(bad) - 1} more like it" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; empty cells in {csv_path}; remove it or repair it")


def classification_scores(probabilities, labels, minority):
    """Test scores as fractions. probabilities [n] of label 1; labels [n]; f1 and auroc take the minority as the positive class.

    Predictions are argmax (0.5). UserError when a class has no image, since AUROC is not defined then.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {len(labels)} images to be scored are of one class; AUROC needs both")
    predicted = (probabilities > 0.5).astype(int)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "auroc": float(
            roc_auc_score(labels == minority, probabilities if minority else 1 - probabilities)
        ),
        "f1": float(f1_score(labels, predicted, pos_label=minority, zero_division=0.0)),
    }
