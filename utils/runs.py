"""A run folder: its settings, log, checkpoints and provenance."""

import hashlib
import io
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torchvision

from utils.cli import UserError, command_line
from utils.distributed import world_size
from utils.files import atomic_write, lock_folder, naming, read_json, read_log, write_json


def provenance(device, others=()):
    """What a number needs beside it: command, versions, commit, hardware. others: further runs of the same command."""

    def git(*words):
        try:
            done = subprocess.run(
                ["git", "-C", Path(__file__).parents[1], *words],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    hardware += f", {world_size()} processes" if world_size() > 1 else ""
    return {
        "command": command_line(others),
        "commit": commit or "unknown",
        "device": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


RUN_FILES = (
    "config.json",
    "log.jsonl",
    "checkpoint.pt",
    "encoder.pt",
    "curves.png",
    "probe.json",
    "probe.pt",
    "metrics.json",
    "embedding.png",
    "embedding.npz",
    "finetune.json",
    "classifier.pt",
    "not-finite.json",
)


def start_run(folder, config, device):
    """Begin a run folder, or take up one that the same settings began: config.json and the first line of log.jsonl.

    config holds whatever decides the result, so another value of any of it in the folder's config.json is refused. Only a smoke run
    gives way to a real one.
    """
    folder = Path(folder)
    lock_folder(folder)
    if (folder / "config.json").exists():
        old = read_json(folder / "config.json", "delete the folder or choose another with --out")
        if old.get("smoke") and not config["smoke"]:
            print(f"{folder}: held a smoke run, which makes room")
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
            old = config
        differ = [
            f"{key} {old.get(key)!r} there, {config.get(key)!r} now"
            for key in {**old, **config}
            if old.get(key) != config.get(key)
        ]
        if differ:
            raise UserError(
                f"{folder}: made with other settings ({'; '.join(differ[:4])}); delete it or choose another folder with --out"
            )
    if not (folder / "log.jsonl").exists():
        with atomic_write(folder / "log.jsonl") as part:
            part.write_text(
                json.dumps({**provenance(device), "data_sha256": config["sha256"]}) + "\n",
                encoding="utf-8",
            )
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", config)
    (folder / "not-finite.json").unlink(missing_ok=True)  # of a try before
    print(
        f"{folder}\n  "
        + "  ".join(
            f"{key}={value}"
            for key, value in config.items()
            if key not in ("sha256", "rows_sha256", "classes", "subset")
        )
    )


def log_line(folder, **values):
    path = Path(folder) / "log.jsonl"
    with naming(path), open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(values) + "\n")


def rewind_log(folder, epoch):
    """Drop what was logged of `epoch` and later, before a run goes on from that epoch."""
    kept = [line for line in read_log(folder) if line.get("epoch", -1) < epoch]
    with atomic_write(Path(folder) / "log.jsonl") as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def save_tensors(path, state):
    """Save tensors and builtins so that torch.load(weights_only=True) reads them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # straight to the disk, it would not say that the disk is full
    with atomic_write(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_tensors(path, keys=()):
    """Load what save_tensors wrote. UserError when the file is missing, unreadable, not tensors, or lacks a key."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; finish pretrain.py (or finetune.py) on this run first"
        ) from None
    except Exception as error:  # torch reports a damaged or foreign file in many ways; all of them mean the same here
        raise UserError(
            f"{path}: not a checkpoint of this kit ({type(error).__name__}); delete it to start again"
        ) from None
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise UserError(f"{path}: not the checkpoint expected here; delete it to start again")
    return state


def pick_device(name, deterministic=False):
    """auto: CUDA where there is one, a GPU for each process of a machine. UserError when CUDA is asked for and absent.

    deterministic: torch takes only algorithms that give the same bits every time, as they do on a CPU anyway.
    """
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS asks for it, before it is used
        torch.use_deterministic_algorithms(True)
    if os.environ.get("WORLD_SIZE", "1") != "1" and world_size() == 1:
        raise UserError("runs on one device; start it with python, not with torchrun")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: no CUDA device is visible to torch; use --device cpu or auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda")
    there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted > there:
        raise UserError(
            f"torchrun has started {wanted} processes on a machine with {there} GPUs; use --nproc-per-node {there}"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def make_generator(*numbers):
    """A CPU torch.Generator from any integers, e.g. seeded(seed, epoch): each epoch has its own, so a resumed run needs no state."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def load_strict(module, state, path):
    """load_state_dict with exactly the expected keys, shapes and (of a network) dtypes, else a UserError that names the file."""
    try:
        if isinstance(module, nn.Module) and any(
            tensor.dtype != state[name].dtype for name, tensor in module.state_dict().items()
        ):
            raise TypeError
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{path}: holds other weights than this run's network; delete it to start again"
        ) from None


def module_sha256(module):
    """sha256 over every tensor of a module, batch-norm statistics included: equal means bit-identical."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(folder, parts, epoch, config, within=None):
    """Write checkpoint.pt: the state_dict of every part (name -> module, optimizer, ...), the epoch to go on with, the settings.

    within: where in that epoch, from Stopped.within; None at its start.
    """
    save_tensors(
        Path(folder) / "checkpoint.pt",
        {
            **{name: part.state_dict() for name, part in parts.items()},
            "epoch": epoch,
            "config": config,
            "within": within,
        },
    )


def resume(folder, parts, config):
    """Load checkpoint.pt into `parts` (name -> whatever has load_state_dict). Returns (epoch to go on with, within as it was saved)."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return 0, None
    checkpoint = load_tensors(path, keys=[*parts, "epoch", "config"])
    if checkpoint["config"] != config:
        raise UserError(
            f"{path}: belongs to a run with other settings; delete it or choose another folder with --out"
        )
    for name, part in parts.items():
        load_strict(part, checkpoint[name], path)
    epoch, within = checkpoint["epoch"], checkpoint.get("within")
    if not (type(epoch) is int and epoch >= 0):
        raise UserError(f"{path}: not the checkpoint expected here; delete it to start again")
    if epoch < config["epochs"]:
        print(
            f"  goes on after epoch {epoch} of {config['epochs']}"
            + (f" and {within['step']} steps" if within else "")
        )
    return epoch, within
