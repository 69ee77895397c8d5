"""A run folder: settings, log, checkpoints and provenance."""

import hashlib
import io
import json
import platform
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic as read_clock

import numpy as np
import torch
import torch.nn as nn
import torchvision

from utils.cli import UserError, command_line, number_from
from utils.distributed import assert_same_on_all_ranks, on_rank_zero, rank, world_size
from utils.files import atomic_write, lock_folder, name_errors, read_json, read_log, write_json

RUN_FILES = (
    *("config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "curves.png", "not-finite.json"),
    *("probe.json", "probe.pt", "metrics.json", "embedding.png", "embedding.npz"),
    *("neighbours.csv", "hard_examples.png"),
    *("finetune.json", "classifier.pt", "predictions.csv", "probe_predictions.csv"),
    *("classifier.json", "probe_classifier.json"),
)
SECONDS_BETWEEN_CHECKPOINTS = 60  # of --save-every auto
AMP_MODES = ("auto", "off", "bf16", "fp16", "fp32")
DELETE_OR_MOVE = "delete it, or choose another folder with --out"


def add_machine_flags(add):
    """Add the flags that pretrain.py and finetune.py share; add: a parser's add_argument."""
    text = "auto: bf16 if the GPU has it; fp32: no TF32"
    add("--amp", choices=AMP_MODES, default="auto", help=text)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if present")
    add("--deterministic", action="store_true", help="same bits in every run on a GPU; slower")
    add("--compile", action="store_true", help="compile the encoder; for long runs")
    text = "epochs between checkpoints; auto: at most one a minute"
    add("--save-every", type=save_interval, default="auto", metavar="E", help=text)


def save_interval(text):
    """Return the value of --save-every: "auto" or a number of epochs from 1 up."""
    return text if text == "auto" else number_from(1)(text)


class Run:
    """config.json, log.jsonl and checkpoint.pt of one training, written by rank 0.

    As a context manager it saves the last finished epoch at the end, whatever ends the training.
    folder: where to write. config: every setting that decides the result, with "epochs" and
    "smoke". state: name -> module, optimizer or anything else with state_dict and load_state_dict.
    Raises UserError if the folder holds a run with other settings.
    """

    def __init__(self, folder, config, device, save_every="auto", **state):
        self.folder, self.config, self.save_every = Path(folder), config, save_every
        self.device, self.state = device, state
        # A thread writes checkpoints; `unsaved` is a copy of the last epoch while it is not given
        # to the thread, `pending_write` the future of the last one that was.
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.unsaved = self.pending_write = None
        self.last_save = read_clock()
        on_rank_zero(self._start)

    def _start(self):
        lock_folder(self.folder)
        if (self.folder / "config.json").exists():
            self._check_settings(read_json(self.folder / "config.json", DELETE_OR_MOVE))
        if not (self.folder / "log.jsonl").exists():
            first_line = {**provenance(self.device), "data_sha256": self.config["sha256"]}
            with atomic_write(self.folder / "log.jsonl") as temporary:
                temporary.write_text(json.dumps(first_line) + "\n", encoding="utf-8")
        if not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", self.config)
        (self.folder / "not-finite.json").unlink(missing_ok=True)
        hidden = ("sha256", "rows_sha256", "classes", "subset")
        settings = [f"{key}={value}" for key, value in self.config.items() if key not in hidden]
        print(f"{self.folder}\n  " + "  ".join(settings))

    def _check_settings(self, old):
        """Refuse another run; replace a smoke run by a real one, or a run without a checkpoint."""
        keys = [key for key in {**old, **self.config} if old.get(key) != self.config.get(key)]
        if not keys:
            return
        has_results = any((self.folder / name).exists() for name in ("checkpoint.pt", "encoder.pt"))
        if old.get("smoke") and not self.config["smoke"] or not has_results:
            print(f"{self.folder}: replacing an earlier --smoke run or a run without a checkpoint")
            for name in RUN_FILES:
                (self.folder / name).unlink(missing_ok=True)
        elif {"sha256", "rows_sha256"} & set(keys):
            raise UserError(f"{self.folder}: made with other images or splits; {DELETE_OR_MOVE}")
        else:
            differ = [f"{k} was {old.get(k)!r}, is {self.config.get(k)!r}" for k in keys[:4]]
            raise UserError(
                f"{self.folder}: made with other settings ({'; '.join(differ)}); {DELETE_OR_MOVE}"
            )

    def resume(self):
        """Load checkpoint.pt into the state; return the next epoch, 0 for a new run."""
        path, epoch = self.folder / "checkpoint.pt", 0
        if path.exists():
            checkpoint = load_tensors(path, keys=[*self.state, "epoch", "config"])
            if checkpoint["config"] != self.config:
                raise UserError(f"{path}: belongs to other settings; {DELETE_OR_MOVE}")
            for name, stateful in self.state.items():
                load_strict(stateful, checkpoint[name], path)
            epoch = checkpoint["epoch"]
            if epoch < self.config["epochs"]:
                print(f"  continuing after epoch {epoch} of {self.config['epochs']}")
        message = f"{self.folder}: the ranks see different files or commands; use a shared disk"
        assert_same_on_all_ranks((self.device.type, self.config, epoch), message)
        on_rank_zero(self._rewind_log, epoch)
        return epoch

    def _rewind_log(self, epoch):
        """Drop the lines of epochs after the last checkpoint, and a line that a kill cut short."""
        path = self.folder / "log.jsonl"
        kept = [line for line in read_log(self.folder) if line.get("epoch", -1) < epoch]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text != path.read_text(encoding="utf-8"):
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def log(self, **values):
        path = self.folder / "log.jsonl"
        with name_errors(path), open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(values) + "\n")

    def finish_epoch(self, epoch, stats):
        """Log the epoch; save a checkpoint every `save_every` epochs, or once a minute."""
        if rank() > 0:
            return
        self.log(epoch=epoch, **stats)
        is_last = epoch + 1 == self.config["epochs"]
        if is_last and stats.get("skipped_steps") and stats["loss"] == 0:
            raise UserError(f"{self.folder}: fp16 overflowed in every step; use --amp bf16 or off")
        self.copy_checkpoint(epoch + 1)
        if self.save_every == "auto":
            is_due = read_clock() - self.last_save >= SECONDS_BETWEEN_CHECKPOINTS
        else:
            is_due = (epoch + 1) % self.save_every == 0
        if is_due:
            self._wait_for_write()
            self._start_write()

    def copy_checkpoint(self, epoch):
        """Copy what checkpoint.pt will hold: all state, the next epoch, the settings."""
        state = {name: stateful.state_dict() for name, stateful in self.state.items()}
        copies = map_tensors(torch.clone, state)
        self.unsaved = {**copies, "epoch": epoch, "config": self.config}

    def _start_write(self):
        """Let the thread write checkpoint.pt, after the one before."""
        # In the thread every tensor would wait for all steps that the GPU has queued.
        state = map_tensors(torch.Tensor.cpu, self.unsaved)
        self.pending_write = self.writer.submit(save_tensors, self.folder / "checkpoint.pt", state)
        self.unsaved, self.last_save = None, read_clock()

    def _wait_for_write(self):
        """Wait for the last write; raise its error."""
        if self.pending_write:
            self.pending_write.result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Save the last finished epoch, also after a signal or a failed write."""
        if self.unsaved:
            self._start_write()
        self._wait_for_write()


def check_finite(losses, optimizer, batches, folder):
    """Raise UserError if a loss or a weight is not finite, and name the images of that step.

    The step before is named, too: its gradient may be the cause.
    """
    # The sum of a weight is quicker to check than its entries.
    weights = [p.detach().sum() for group in optimizer.param_groups for p in group["params"]]
    if bool(losses.isfinite().all() & torch.stack(weights).isfinite().all()):
        return
    bad = (~losses.isfinite()).nonzero()
    step = int(bad[0]) if len(bad) else len(losses) - 1
    if rank() == 0:
        steps = range(max(0, step - 1), step + 1)
        rows = {str(i + 1): batches.loader.rows[batches.positions[i]].tolist() for i in steps}
        place = {"epoch": batches.epoch + 1, "step": step + 1}
        write_json(Path(folder) / "not-finite.json", {**place, "rows": rows})
    raise UserError(
        f"{folder}: the loss is not finite in epoch {batches.epoch + 1}, step {step + 1}; images "
        "in not-finite.json; try a lower --lr or --amp off with another --out"
    )


def provenance(device, exclude=()):
    """Return what a number needs beside it: command, versions, commit, hardware.

    exclude: words of the command line that belong to other runs.
    """
    commit = run_git("rev-parse", "--short", "HEAD")
    # The records of other benchmarks are no code.
    words = "status --porcelain --untracked-files=no :!results/benchmark".split()
    if commit and run_git(*words):
        commit += "-dirty"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads"
    if world_size() > 1:
        hardware += f", {world_size()} processes"
    return {
        "command": command_line(exclude),
        "commit": commit or "unknown",
        "device": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def run_git(*words):
    """Return the output of a git command in the kit's folder, or "" if it fails."""
    command = ["git", "-C", Path(__file__).parents[1], *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def save_tensors(path, state):
    """Save tensors, on the CPU, and builtins so that torch.load(weights_only=True) reads them."""
    # torch.save to a path does not say that the disk is full.
    buffer = io.BytesIO()
    torch.save(map_tensors(torch.Tensor.cpu, state), buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def map_tensors(function, state):
    """Return nested dicts and lists with the function applied to every tensor."""
    if isinstance(state, dict):
        return {key: map_tensors(function, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(function, value) for value in state)
    return function(state) if torch.is_tensor(state) else state


def load_tensors(path, keys=()):
    """Load what save_tensors wrote.

    Raises UserError if the file is missing, damaged, holds a pickled object, or lacks a key.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; finish the training of this run first") from None
    except Exception as error:
        # torch reports a damaged or foreign file by many exceptions.
        kind = type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of this kit ({kind}); delete it to start again"
        ) from None
    if not isinstance(state, dict) or any(key not in state for key in keys):
        raise UserError(f"{path}: lacks an entry; delete it to start again")
    return state


def load_strict(module, state, path):
    """Call load_state_dict with exactly the expected keys, shapes and dtypes.

    Raises UserError that names the file otherwise.
    """
    try:
        if isinstance(module, nn.Module):
            expected = module.state_dict()
            if any(tensor.dtype != state[name].dtype for name, tensor in expected.items()):
                raise TypeError("other dtypes")
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{path}: holds other weights than this run's network; delete it to start again"
        ) from None


def module_sha256(module):
    """Return the sha256 of all tensors, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_generator(*numbers):
    """Return a CPU torch.Generator seeded by integers, e.g. make_generator(seed, epoch).

    Every epoch has its own generator, so a resumed run needs no generator state. The count comes
    first, since SeedSequence pads with zeros: (s,) and (s, 0) must not give the same stream.
    """
    seed = np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))
