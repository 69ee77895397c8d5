"""What the scripts share, in five rooms: run, data, model, losses, loop. Each room leans only on those above it.

What can be read and quoted alone has files of its own: the command line and its files (run.py), images on disk (sources.py), their
views (augment.py), the losses (losses.py), all of which can be imported from here, and several processes (distributed.py).
"""

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.checkpoint import checkpoint

from augment import (RECIPES, augment, center_crops, center_view, color_jitter, crop_resize, draw_crops, draw_jitter, grayscale,  # noqa: F401
                     normalize, rotate, shift_hue)
from distributed import gather, highest, processes, rank, sum_gradients
from losses import (antipodal_prototypes, at_least_float32, class_weights, collapse_value, draw_supervised_majority, focal_loss,  # noqa: F401
                    ntxent_loss, supcon_loss, supmin_loss, suppro_loss)
from run import (ArgumentParser, Stop, Stopped, UserError, at_least, cli, command_line, hold, naming, read_json, read_log,  # noqa: F401
                 sha256, whole, write_json)
from sources import SPLITS, images_to_predict, printable, read_image, squeeze  # noqa: F401

# ------------------------------------------------------------------------------------------------------------------
# run: folders, files that appear whole or not at all, one clear line for a user's mistake
# ------------------------------------------------------------------------------------------------------------------


def provenance(device, others=()):
    """What a number needs beside it: command, versions, commit, hardware. others: further runs of the same command."""
    def git(*words):
        try:
            done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    hardware += f", {processes()} processes" if processes() > 1 else ""
    return {"command": command_line(others), "commit": commit or "unknown", "device": hardware, "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}


RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "curves.png", "probe.json", "probe.pt", "metrics.json",
             "embedding.png", "embedding.npz", "finetune.json", "classifier.pt", "not-finite.json")


def start_run(folder, config, device):
    """Begin a run folder, or take up one that the same settings began: config.json and the first line of log.jsonl.

    config holds whatever decides the result, so another value of any of it in the folder's config.json is refused. Only a smoke run
    gives way to a real one.
    """
    folder = Path(folder)
    hold(folder)
    if (folder / "config.json").exists():
        old = read_json(folder / "config.json", "delete the folder or choose another with --out")
        if old.get("smoke") and not config["smoke"]:
            print(f"{folder}: held a smoke run, which makes room")
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
            old = config
        differ = [f"{key} {old.get(key)!r} there, {config.get(key)!r} now" for key in {**old, **config} if old.get(key) != config.get(key)]
        if differ:
            raise UserError(f"{folder}: made with other settings ({'; '.join(differ[:4])}); delete it or choose another folder with --out")
    if not (folder / "log.jsonl").exists():
        with whole(folder / "log.jsonl") as part:
            part.write_text(json.dumps({**provenance(device), "data_sha256": config["sha256"]}) + "\n", encoding="utf-8")
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", config)
    (folder / "not-finite.json").unlink(missing_ok=True)         # of a try before
    print(f"{folder}\n  " + "  ".join(f"{key}={value}" for key, value in config.items() if key not in ("sha256", "rows_sha256", "classes", "subset")))


def log_line(folder, **values):
    path = Path(folder) / "log.jsonl"
    with naming(path), open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(values) + "\n")


def rewind_log(folder, epoch):
    """Drop what was logged of `epoch` and later, before a run goes on from that epoch."""
    kept = [line for line in read_log(folder) if line.get("epoch", -1) < epoch]
    with whole(Path(folder) / "log.jsonl") as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def save_tensors(path, state):
    """Save tensors and builtins so that torch.load(weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)                                    # straight to the disk, it would not say that the disk is full
    with whole(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_tensors(path, keys=()):
    """Load what save_tensors wrote. UserError when the file is missing, unreadable, not tensors, or lacks a key."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; finish pretrain.py (or finetune.py) on this run first") from None
    except Exception as error:          # torch reports a damaged or foreign file in many ways; all of them mean the same here
        raise UserError(f"{path}: not a checkpoint of this kit ({type(error).__name__}); delete it to start again") from None
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise UserError(f"{path}: not the checkpoint expected here; delete it to start again")
    return state


def pick_device(name, deterministic=False):
    """auto: CUDA where there is one, a GPU for each process of a machine. UserError when CUDA is asked for and absent.

    deterministic: torch takes only algorithms that give the same bits every time, as they do on a CPU anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                               # cuBLAS asks for it, before it is used
        torch.use_deterministic_algorithms(True)
    if os.environ.get("WORLD_SIZE", "1") != "1" and processes() == 1:
        raise UserError("runs on one device; start it with python, not with torchrun")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes() == 1:
        return torch.device("cuda")
    there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted > there:
        raise UserError(f"torchrun has started {wanted} processes on a machine with {there} GPUs; use --nproc-per-node {there}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def seeded(*numbers):
    """A CPU torch.Generator from any integers, e.g. seeded(seed, epoch): each epoch has its own, so a resumed run needs no state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# ------------------------------------------------------------------------------------------------------------------
# data: images on disk, packed subsets, batches on the device; the views of a batch are in augment.py
# ------------------------------------------------------------------------------------------------------------------

@dataclass
class Subset:
    """One ratio of one data set: packed images, and which rows make up train, val and test."""
    path: Path
    name: str                      # data set
    ratio: str                     # "99-1": percent of majority and minority in train; or "natural"
    classes: list                  # two names, index = label
    minority: int                  # label of the rare class
    counts: dict                   # {"train": {"0": n, "1": n}, ...}
    splits: dict                   # {"train": int array of rows, ...}
    images: np.ndarray             # uint8 [M, S, S, C], memory-mapped, every image squeezed to a square
    labels: np.ndarray             # int64 [M]
    sizes: np.ndarray              # int64 [M, 2]: true height and width in pixels
    size: int                      # side of what the network sees, pixels
    recipe: str                    # augmentation, a key of RECIPES
    mean: list                     # per channel, of the train rows, in [0, 1]
    std: list
    sha256: str                    # of images.npy
    rows_sha256: str               # of splits

    def train_counts(self):
        return [self.counts["train"]["0"], self.counts["train"]["1"]]

    def shrink(self, per_class=16):
        """For --smoke: keep at most so many rows of each class in every split."""
        for split, rows in self.splits.items():
            kept = [rows[self.labels[rows] == c][:per_class] for c in (0, 1)]
            self.splits[split], self.counts[split] = np.sort(np.concatenate(kept)), {str(c): len(kept[c]) for c in (0, 1)}
        return self


def load_subset(path, verify=True):
    """Open subsets/<dataset>/<ratio>.json. UserError when a file is missing, or not what make_subsets.py wrote.

    verify: compare the checksums of images.npy and index.csv; not needed twice for two ratios of one folder.
    """
    path = Path(path)
    remake = "make it with make_subsets.py"
    record = read_json(path, remake)
    folder = path.parent
    try:
        if verify and (sha256(folder / "images.npy") != record["images_sha256"] or sha256(folder / "index.csv") != record["index_sha256"]):
            raise UserError(f"{folder}: images.npy or index.csv is not what {path.name} was made with (checksum); make the subset again")
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / "index.csv", newline="", encoding="utf-8") as file:
            index = list(csv.DictReader(file))
        labels = np.array([int(row["label"]) for row in index])
        sizes = np.array([(int(row["height"]), int(row["width"])) for row in index])
        splits = {split: np.array(record["splits"][split] or [], dtype=object) for split in SPLITS}
        if any(type(row) is not int for rows in splits.values() for row in rows):
            raise UserError(f"{path}: its splits are not lists of rows; {remake}")
        splits = {split: rows.astype(np.int64) for split, rows in splits.items()}
        subset = Subset(path, record["name"], record["ratio"], list(record["classes"]), int(record["minority"]), record["counts"], splits,
                        images, labels, sizes, int(record["size"]), record["recipe"], list(record["mean"]), list(record["std"]),
                        record["images_sha256"], hashlib.sha256(json.dumps(record["splits"], sort_keys=True).encode()).hexdigest())
        rows = np.concatenate(list(splits.values()))
        if len(np.unique(rows)) != len(rows) or len(rows) and not 0 <= rows.min() <= rows.max() < len(labels):
            raise UserError(f"{path}: rows of its splits are doubled or out of range; {remake}")
        for split in SPLITS:
            if [int((labels[splits[split]] == c).sum()) for c in (0, 1)] != [record["counts"][split][str(c)] for c in (0, 1)]:
                raise UserError(f"{path}: rows and counts of {split} disagree; {remake}")
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels) or not np.isin(labels, (0, 1)).all() or sizes.min() < 1:
            raise UserError(f"{path}: does not fit its images.npy; {remake}")
        names, numbers = (subset.name, subset.ratio, *subset.classes), np.array([subset.mean, subset.std], dtype=np.float64)
        if not all(isinstance(name, str) for name in names) or len(names) != 4 or subset.recipe not in RECIPES or subset.minority not in (0, 1):
            raise UserError(f"{path}: its name, ratio, classes, minority or recipe does not fit a subset; {remake}")
        if any(Path(name).name != name or name in ("", "..") for name in names[:2]):                    # they become folders below runs/
            raise UserError(f"{path}: its name or ratio is no folder name; {remake}")
        if numbers.shape != (2, images.shape[3]) or not np.isfinite(numbers).all() or numbers[1].min() <= 0 or not 1 <= subset.size <= 4096:
            raise UserError(f"{path}: its mean, std or size is no number for its images; {remake}")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; {remake}") from None
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{path}: not a subset of this kit ({type(error).__name__}: {error}); {remake}") from None
    return subset


class ImageBatches:
    """uint8 images of some rows of a subset, one batch at a time on the device.

    On CUDA they are kept resident if they fill less than half of the free memory. Otherwise they stay in the mapped
    file and a thread reads, pins and copies one batch ahead.
    """

    def __init__(self, images, rows, device):
        """images uint8 [M, S, S, C] (array or memory map); rows int [n]."""
        self.images, self.rows, self.device = images, np.asarray(rows), device
        size = int(np.prod(images.shape[1:])) * len(self.rows)
        fits = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2
        self.resident = torch.empty(len(self.rows), *images.shape[1:], dtype=torch.uint8, device=device) if fits else None
        for start in range(0, len(self.rows) if fits else 0, 1024):                              # never all of it in the host's memory
            self.resident[start:start + 1024] = torch.from_numpy(images[self.rows[start:start + 1024]])

    def _read(self, positions):
        batch = torch.from_numpy(self.images[self.rows[positions]]).permute(0, 3, 1, 2).contiguous()    # cheap as bytes, dear as floats later
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def __call__(self, batches, part=slice(None)):
        """batches: a list of position lists. Yields (positions, uint8 [B, C, S, S] on the device), the images of `part` of the positions."""
        if self.resident is not None:
            for positions in batches:
                yield positions, self.resident[torch.as_tensor(positions[part]).to(self.device, non_blocking=True)].permute(0, 3, 1, 2)
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming = [ahead.submit(self._read, positions[part]) for positions in batches[:1]]
            for i, positions in enumerate(batches):
                batch = coming.pop().result()
                if i + 1 < len(batches):
                    coming.append(ahead.submit(self._read, batches[i + 1][part]))
                yield positions, batch


# ------------------------------------------------------------------------------------------------------------------
# model: a torchvision ResNet, the projection head, and finding a finished encoder again
# ------------------------------------------------------------------------------------------------------------------


def resnet(arch):
    """A torchvision ResNet from scratch without its classifier; `.dim` is its feature dimension. UserError for another name."""
    names = [name for name in torchvision.models.list_models(torchvision.models) if "resn" in name]
    if arch not in names:
        raise UserError(f"--arch {arch}: not a torchvision ResNet; choose one of {', '.join(names)}")
    encoder = torchvision.models.get_model(arch, weights=None)
    encoder.dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder.to(memory_format=torch.channels_last)        # same numbers up to rounding; the layout that tensor cores take


class ContrastiveModel(nn.Module):
    """Encoder, then the two-layer projection head of SimCLR without batch norm, then the unit sphere.

    In training, what comes out is of the whole batch, whatever the number of processes that share it. chunk: so many of its images go
    through the encoder at a time, by which activations and batch norm are those of a batch of that size; none are kept, and the gradient
    takes each chunk through the encoder again.
    """

    def __init__(self, arch, projection_dim=128, chunk=None):
        super().__init__()
        self.encoder, self.dim, self.chunk = resnet(arch), projection_dim, chunk
        self.head = nn.Sequential(nn.Linear(self.encoder.dim, self.encoder.dim), nn.ReLU(), nn.Linear(self.encoder.dim, projection_dim))

    def features(self, x):
        """x [..., n, 3, H, W], this process's images -> [..., N, encoder.dim] of all images; in eval mode N = n."""
        if not self.training:
            return self.encode(x)
        if not self.chunk:
            return gather(self.encode(x))
        return gather(torch.cat([checkpoint(self.encode, part, use_reentrant=False, preserve_rng_state=False,
                                            context_fn=lambda: (nullcontext(), buffers_kept(self.encoder)))
                                 for part in x.split(self.chunk // processes(), dim=-4)], dim=-2))

    def encode(self, x):                                        # [..., 3, H, W] -> [..., encoder.dim]
        return self.encoder(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    def project(self, features):                                # [..., encoder.dim] -> [..., projection_dim], unit vectors
        return F.normalize(at_least_float32(self.head(features)), dim=-1)

    def forward(self, x):                                       # [..., n, 3, H, W] -> [..., N, projection_dim], unit vectors
        return self.project(self.features(x))


@contextmanager
def buffers_kept(network):
    """Its buffers leave the block as they entered it: batch norm counts no image twice."""
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:                                                     # checkpoint leaves by an exception when it has what it needs
        for buffer, value in zip(network.buffers(), before):
            buffer.copy_(value)


class Method(nn.Module):
    """What pretrain.py trains with: the loss of a batch, and whatever the method keeps (buffers and parameters go into the checkpoint).

    Built as Method(args, subset, model, generator); what it reads of args stands in the tables of pretrain.py. A method that needs no more
    than embeddings and labels defines `loss`; the others define `forward`.
    """
    views = 2                               # of each image
    strong = ()                             # which of the views also get RandAugment
    facts = {}                              # for the log, beside the loss

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
    largest = {"size": 4096, "seed": 2 ** 63, "batch_size": 2 ** 31}
    for key in ("subset", "arch", "sha256", "rows_sha256", *largest):
        value = config.get(key)
        if not (type(value) is int and 0 <= value <= largest[key] if key in largest else isinstance(value, str)):
            raise UserError(f"{folder / 'config.json'}: has no {key} that a run could have; {way_out}")
    subset = replace(load_subset(os.path.normpath(folder / config["subset"])), size=config["size"])
    encoder = resnet(config["arch"])
    same = (subset.sha256, subset.rows_sha256) == (config["sha256"], config["rows_sha256"])
    if not same:
        raise UserError(f"{subset.path}: not the images and rows that {folder} was trained on (checksum); make the subset again as it was")
    if (folder / "classifier.pt").exists() and not (folder / "encoder.pt").exists():
        raise UserError(f"{folder}: holds a classifier alone, which was trained on another run's encoder; give that run")
    load_exactly(encoder, load_tensors(folder / "encoder.pt"), folder / "encoder.pt")
    return config, subset.shrink() if smoke else subset, encoder.eval().requires_grad_(False)


def load_exactly(module, state, path):
    """load_state_dict with exactly the expected keys, shapes and (of a network) dtypes, else a UserError that names the file."""
    try:
        if isinstance(module, nn.Module) and any(tensor.dtype != state[name].dtype for name, tensor in module.state_dict().items()):
            raise TypeError
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError):
        raise UserError(f"{path}: holds other weights than this run's network; delete it to start again") from None


def state_sha256(module):
    """sha256 over every tensor of a module, batch-norm statistics included: equal means bit-identical."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# loop: schedule, precision, shuffling, features, scores
# ------------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder, parts, epoch, config, within=None):
    """Write checkpoint.pt: the state_dict of every part (name -> module, optimizer, ...), the epoch to go on with, the settings.

    within: where in that epoch, from Stopped.within; None at its start.
    """
    save_tensors(Path(folder) / "checkpoint.pt",
                 {**{name: part.state_dict() for name, part in parts.items()}, "epoch": epoch, "config": config, "within": within})


def resume(folder, parts, config):
    """Load checkpoint.pt into `parts` (name -> whatever has load_state_dict). Returns (epoch to go on with, within as it was saved)."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return 0, None
    checkpoint = load_tensors(path, keys=[*parts, "epoch", "config"])
    if checkpoint["config"] != config:
        raise UserError(f"{path}: belongs to a run with other settings; delete it or choose another folder with --out")
    for name, part in parts.items():
        load_exactly(part, checkpoint[name], path)
    epoch, within = checkpoint["epoch"], checkpoint.get("within")
    if not (type(epoch) is int and epoch >= 0) or within is not None and not Epoch.can_go_on(within):
        raise UserError(f"{path}: not the checkpoint expected here; delete it to start again")
    if epoch < config["epochs"]:
        print(f"  goes on after epoch {epoch} of {config['epochs']}" + (f" and {within['step']} steps" if within else ""))
    return epoch, within


class Epoch:
    """How far an epoch has come: its batches, its generator, the losses of its steps. Stopped within, it goes on with its next step."""

    def __init__(self, number, seed, draw, device, stop):
        """draw: generator -> batches, lists of positions. The generator is the epoch's own: order, augmentation and draws repeat."""
        self.number, self.stop, self.started = number, stop, time.time()
        self.generator = seeded(seed, number)
        self.batches = draw(self.generator)
        self.resumed, stop.within = stop.within, None
        self.done, self.skipped = 0, 0
        self.losses = torch.zeros(len(self.batches), device=device)
        if self.resumed:
            if len(self.resumed["losses"]) != len(self.batches):
                raise UserError("checkpoint.pt: of an epoch with another number of steps; delete it to start again")
            self.generator.set_state(self.resumed["generator"])
            self.done, self.skipped = self.resumed["step"], self.resumed["skipped"]
            self.losses.copy_(self.resumed["losses"])
            self.started -= self.resumed["seconds"]

    def step(self, loss, optimizer, scaler):
        """Backward and one step of the optimizer; Stopped, with what a checkpoint needs, if a signal has asked any process for it."""
        scale = scaler.get_scale()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss / processes()).backward()
        sum_gradients(p for group in optimizer.param_groups for p in group["params"])
        scaler.step(optimizer)
        scaler.update()
        overflow = scaler.get_scale() < scale                    # fp16: the scaler has left this step out
        self.skipped += overflow
        self.losses[self.done] = 0 if overflow else loss.detach()                                # no .item() here: it would wait for the GPU
        self.done += 1
        signal = highest(self.stop.number or 0)
        if signal:
            within = {"step": self.done, "skipped": self.skipped, "losses": self.losses.cpu(), "generator": self.generator.get_state(),
                      "seconds": self.seconds()}
            raise Stopped(signal, within if self.is_finite(optimizer) else None)

    @staticmethod
    def can_go_on(within):
        """Whether this is what a Stopped epoch has left."""
        kinds = {"step": int, "skipped": int, "losses": torch.Tensor, "generator": torch.Tensor, "seconds": float}
        if not (isinstance(within, dict) and kinds.keys() == within.keys() and all(isinstance(within[name], kind) for name, kind in kinds.items())):
            return False
        try:
            torch.Generator().set_state(within["generator"])
        except (RuntimeError, TypeError):
            return False
        return within["losses"].ndim == 1 and 0 <= within["step"] <= len(within["losses"])

    def seconds(self):
        return time.time() - self.started

    def is_finite(self, optimizer):
        sums = [p.detach().sum() for group in optimizer.param_groups for p in group["params"]]   # quicker than each weight, and one wait for the GPU
        return bool(self.losses.isfinite().all() & torch.stack(sums).isfinite().all())

    def loss(self, optimizer, train, folder):
        """Mean loss of the steps that were not skipped. UserError where a loss or a weight is not finite.

        The images of that step are listed, and those of the one before: a gradient that is not finite shows in the next loss.
        """
        if not self.is_finite(optimizer):
            bad = (~self.losses.isfinite()).nonzero()
            step = int(bad[0]) if len(bad) else self.done - 1
            rows = {str(at + 1): train.rows[self.batches[at]].tolist() for at in (step - 1, step) if at >= 0}
            if rank() == 0:
                write_json(Path(folder) / "not-finite.json", {"epoch": self.number + 1, "step": step + 1, "rows": rows})
            raise UserError(f"{folder}: the loss is not finite in epoch {self.number + 1}, step {step + 1}; the rows of its images are listed in "
                            "not-finite.json, the last checkpoint is kept; try a lower --lr or --amp off, in another folder (--out)")
        return self.losses.double().sum().item() / max(1, self.done - self.skipped)


def warmup_cosine(epoch, epochs, lr, warmup_epochs=10):
    """Learning rate of 0-based `epoch`: linear from lr/10 to lr over the warm-up, then a cosine to lr/1000 at `epochs`."""
    if epoch < warmup_epochs:
        return lr if warmup_epochs == 1 else lr * (0.1 + 0.9 * epoch / (warmup_epochs - 1))
    low = lr * 0.1 ** 3
    half = 0.5 * (1 + np.cos(np.pi * (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)))
    return float(low + (lr - low) * half)                        # no numpy number: it goes into the checkpoint with the optimizer


def precision(device, amp, size):
    """autocast and gradient scaler for --amp. One path for all: switched off they do nothing. auto: bf16 where the GPU has it."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16: needs a CUDA device; use --amp bf16 or off on the CPU")
    if amp == "bf16" and device.type == "cpu" and size <= 16:     # torch 2.11: stride-2 convolutions of a single pixel read foreign memory
        raise UserError(f"--amp bf16: gives wrong gradients on the CPU for images as small as {size} px; use --amp off or --size 32")
    autocast = torch.autocast(device.type, dtype=torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")
    return amp, autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def shuffled_batches(n, batch_size, generator):
    """A permutation of range(n) cut into full batches; the remainder sits this epoch out. Lists of positions."""
    return [b.numpy() for b in torch.randperm(n, generator=generator).split(batch_size) if len(b) == batch_size]


def with_minority(batches, is_minority, k, generator):
    """The same batches, in which minority images take the place of majority images until each holds k of them, none twice in a batch.

    batches: arrays of positions, as shuffled_batches gives them; is_minority bool [n], true k times at least. An image may thus be seen in
    several batches of an epoch. Where a batch holds k already it stays as it is.
    """
    members, filled = np.flatnonzero(is_minority), []
    for batch in batches:
        spare, places = members[~np.isin(members, batch)], np.flatnonzero(~is_minority[batch])
        lacking = max(0, k - (len(batch) - len(places)))
        batch, chosen = batch.copy(), places[np.arange(lacking) * len(places) // max(lacking, 1)]        # all over the batch: --chunk cuts it
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
    for positions, images in tqdm(ImageBatches(subset.images, rows, device)(batches), total=len(batches), desc=desc, disable=desc is None, leave=False):
        if views:
            x = torch.stack([augment(images, sizes[positions], subset.recipe, subset.size, generator) for _ in range(views)])
        else:
            x = center_view(images, sizes[positions], subset.size)[None]
        out.append(network(normalize(x.flatten(0, 1), subset.mean, subset.std)).float().cpu().unflatten(0, (len(x), -1)))
    network.train(was_training)
    z = torch.cat(out, dim=1)
    if not z.isfinite().all():
        raise UserError("the network's output is not finite: training diverged; try a lower --lr or --amp off, in another folder")
    return z if views else z[0]


def predict_folder(network, subset, folder, files, csv_path, device):
    """Write file, probability of the minority class, predicted class for every image of `folder`, prepared like the subset's.

    network: [B, 3, H, W] -> logits [B, 2]; files: from images_to_predict. An image that cannot be read has empty cells; at the end, when
    the others are written, a UserError names the first.
    """
    from tqdm import tqdm
    side, channels, bad = subset.images.shape[1], subset.images.shape[3], []
    network.eval()
    with whole(csv_path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", f"p_{subset.classes[subset.minority]}", "predicted"])
        for path in tqdm(files, desc="predict", leave=False):
            try:
                pixels = read_image(path, grayscale=channels == 1)
            except Exception as error:                            # Pillow raises many kinds for a damaged file
                bad.append(f"{printable(path)}: cannot be read as an image ({' '.join(str(error).split())})")
                table.writerow([printable(path.relative_to(folder)), "", ""])
                continue
            image = torch.from_numpy(squeeze(pixels, side).copy()).permute(2, 0, 1)[None].to(device)
            x = normalize(center_view(image, torch.tensor([pixels.shape[:2]]), subset.size), subset.mean, subset.std)
            with torch.no_grad():
                p = network(x).double().softmax(1)[0].cpu()
            table.writerow([printable(path.relative_to(folder)), f"{p[subset.minority]:.6f}", subset.classes[int(p[1] > 0.5)]])
    print(f"wrote {csv_path}: {len(files) - len(bad)} images")
    if bad:
        more = f", and {len(bad) - 1} more like it" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; empty cells in {csv_path}; remove it or repair it")


def scores(probabilities, labels, minority):
    """Test scores as fractions. probabilities [n] of label 1; labels [n]; f1 and auroc take the minority as the positive class.

    Predictions are argmax (0.5). UserError when a class has no image, since AUROC is not defined then.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {len(labels)} images to be scored are of one class; AUROC needs both")
    predicted = (probabilities > 0.5).astype(int)
    return {"accuracy": float(accuracy_score(labels, predicted)), "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
            "auroc": float(roc_auc_score(labels == minority, probabilities if minority else 1 - probabilities)),
            "f1": float(f1_score(labels, predicted, pos_label=minority, zero_division=0.0))}
