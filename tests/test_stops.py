"""Nothing is lost: signals, full disks, locked folders, numbers that are not finite."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, equal, log_of

import finetune
import linear_probe
import make_subsets
import pretrain
from common import Amp, load_subset, train_one_epoch
from utils.cli import UserError, run_main
from utils.files import lock_folder
from utils.runs import Run, load_tensors, save_tensors

SUBSET = "subsets/digits/95-5.json"
TINY = ["--smoke", "--arch", "resnet8", "--size", "8", "--watch-every", "0", "--device", "cpu"]
WORDS = [SUBSET, "--method", "supcon", *TINY, "--epochs", "4", "--out"]


@pytest.fixture(scope="module")
def undisturbed(workplace):
    """A run that nothing has stopped."""
    call(pretrain, *WORDS, "undisturbed")
    return Path("undisturbed")


def exit_code(script, *words):
    """Run a script as the command line does; return its exit code."""
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, words)]
    try:
        run_main(script.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


def last_error(capsys):
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    return lines[-1]


def assert_same_run(folder, other):
    assert log_of(folder) == log_of(other)
    assert equal(*(load_tensors(run / "encoder.pt") for run in (folder, other)))


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_ends_the_run_at_once_and_the_same_command_continues(
    undisturbed, monkeypatch, capsys, handlers, name, code
):
    """The signal arrives in the second step of epoch 3; the checkpoint of epoch 2 stays."""
    losses = []

    def signalled_loss(self, z, labels, generator):
        losses.append(loss(self, z, labels, generator))
        if len(losses) == 6:
            os.kill(os.getpid(), getattr(signal, name))
        return losses[-1]

    loss = pretrain.SupCon.loss
    monkeypatch.setattr(pretrain.SupCon, "loss", signalled_loss)
    assert exit_code(pretrain, *WORDS, name) == code
    expected = f"pretrain.py: stopped by {name}; run the same command again to continue"
    assert last_error(capsys) == expected
    assert load_tensors(f"{name}/checkpoint.pt")["epoch"] == 2 and len(losses) == 6
    assert not Path(name, "encoder.pt").exists()
    monkeypatch.undo()
    assert exit_code(pretrain, *WORDS, name) == 0
    assert "continuing after epoch 2 of 4" in capsys.readouterr().out
    assert_same_run(undisturbed, Path(name))


def test_epochs_after_the_last_checkpoint_are_logged_once(undisturbed, monkeypatch):
    """With --save-every 3 a kill after epoch 2 leaves two lines that are made again."""

    def stop_after_two(self, epoch, stats):
        finish_epoch(self, epoch, stats)
        if epoch == 1:
            raise KeyboardInterrupt

    finish_epoch = Run.finish_epoch
    monkeypatch.setattr(Run, "finish_epoch", stop_after_two)
    # A killed process has no end at which it could save.
    monkeypatch.setattr(Run, "__exit__", lambda *arguments: None)
    with pytest.raises(KeyboardInterrupt):
        call(pretrain, *WORDS, "rewound", "--save-every", 3)
    assert len(log_of(Path("rewound"))) == 2 and not Path("rewound/checkpoint.pt").exists()
    monkeypatch.undo()
    call(pretrain, *WORDS, "rewound", "--save-every", 3)
    assert_same_run(undisturbed, Path("rewound"))


def test_auto_saves_once_a_minute_and_at_the_end(undisturbed, monkeypatch):
    """Epochs of 25 seconds: a checkpoint after epoch 3, which is 75 seconds old, and after 4."""
    seconds, saved = iter(range(0, 1000, 25)), []

    def record(path, state):
        if path.name == "checkpoint.pt":
            saved.append(state["epoch"])
        save_tensors(path, state)

    monkeypatch.setattr("utils.runs.read_clock", lambda: next(seconds))
    monkeypatch.setattr("utils.runs.save_tensors", record)
    call(pretrain, *WORDS, "auto")
    assert saved == [3, 4]
    assert_same_run(undisturbed, Path("auto"))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The file holds the state at the end of its epoch, not that of the moment of writing."""
    model = torch.nn.Linear(1, 1)
    run = Run(
        tmp_path, {"sha256": "", "epochs": 2, "smoke": True}, torch.device("cpu"), 1, model=model
    )
    is_changed = threading.Event()

    def save_late(path, state):
        assert is_changed.wait(10)
        save_tensors(path, state)

    monkeypatch.setattr("utils.runs.save_tensors", save_late)
    before = model.weight.item()
    with run:
        run.finish_epoch(0, {"loss": 1.0})
        model.weight.data += 1
        is_changed.set()
    assert load_tensors(tmp_path / "checkpoint.pt")["model"]["weight"].item() == before


def test_the_last_epoch_is_saved_after_a_write_that_failed(tmp_path, monkeypatch):
    model, failures = torch.nn.Linear(1, 1), [OSError("full")]
    run = Run(
        tmp_path, {"sha256": "", "epochs": 9, "smoke": True}, torch.device("cpu"), 1, model=model
    )

    def fail_once(path, state):
        if failures:
            raise failures.pop()
        save_tensors(path, state)

    monkeypatch.setattr("utils.runs.save_tensors", fail_once)
    with pytest.raises(OSError, match="full"), run:
        for epoch in range(9):
            run.finish_epoch(epoch, {"loss": 1.0})
    assert len(log_of(tmp_path)) == 2
    assert load_tensors(tmp_path / "checkpoint.pt")["epoch"] == 2


@pytest.fixture
def full_disk():
    """full_disk(n): no file can grow beyond n bytes, as on a full disk or beyond a quota."""

    def full_disk(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield full_disk
    full_disk(before[0])


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl"])
def test_a_full_disk_keeps_the_last_checkpoint(
    undisturbed, monkeypatch, capsys, handlers, full_disk, name
):
    out = Path(f"full-{Path(name).stem}")

    def finish_on_full_disk(self, epoch, stats):
        if epoch == 1:
            self._wait_for_write()
            full_disk(1000 if name == "checkpoint.pt" else (out / name).stat().st_size + 7)
        finish_epoch(self, epoch, stats)

    finish_epoch = Run.finish_epoch
    monkeypatch.setattr(Run, "finish_epoch", finish_on_full_disk)
    code = exit_code(pretrain, *WORDS, out, "--save-every", 1)
    full_disk(resource.RLIM_INFINITY)
    message = last_error(capsys)
    assert code == 1 and message.startswith(f"pretrain.py: {out / name}: File too large; ")
    assert load_tensors(out / "checkpoint.pt")["epoch"] == 1 and not list(out.glob(".part-*"))
    monkeypatch.undo()
    assert exit_code(pretrain, *WORDS, out) == 0
    assert_same_run(undisturbed, out)


@pytest.mark.parametrize(
    "script, words, file",
    [
        (make_subsets, ["digits", "--workers", 1, "--name", "full"], "subsets/full"),
        (linear_probe, ["undisturbed", "--out", "full"], "full/probe.pt"),
        (finetune, ["undisturbed", *TINY[:1], "--train", "head", "--out", "full"], "full/"),
    ],
)
def test_every_script_names_the_file_that_a_full_disk_refuses(
    undisturbed, capsys, handlers, full_disk, script, words, file
):
    full_disk(1000)
    code = exit_code(script, *words)
    full_disk(resource.RLIM_INFINITY)
    error = last_error(capsys)
    assert code == 1 and error.startswith(f"{script.__name__}.py: {file}"), error
    assert "File too large; " in error
    assert exit_code(script, *words) == 0
    shutil.rmtree("subsets/full" if script is make_subsets else "full")


@pytest.mark.parametrize("script, words", [(pretrain, WORDS), (finetune, [SUBSET, *TINY[:3]])])
def test_a_folder_belongs_to_one_living_process(workplace, script, words):
    folder = Path(f"locked by {script.__name__}")
    code = (
        f"import time; from utils.files import lock_folder; lock_folder('{folder}'); "
        "print('locked', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert other.stdout.readline() == b"locked\n"
    words = [word for word in words if word != "--out"]
    with pytest.raises(UserError, match=f"{folder}: another process works in it; .*--out"):
        call(script, *words, "--out", folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    other.kill()
    other.wait()
    lock_folder(folder)


def test_the_same_seed_gives_the_same_bits(undisturbed, monkeypatch):
    """With one thread and with two; --deterministic changes nothing on the CPU."""
    asked, threads = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    call(pretrain, *WORDS, "deterministic", "--deterministic")
    assert asked == [True]
    assert_same_run(undisturbed, Path("deterministic"))
    try:
        torch.set_num_threads(2)
        for out in ("two threads", "two threads again"):
            call(pretrain, *WORDS, out, "--size", 24, "--epochs", 2)
    finally:
        torch.set_num_threads(threads)
    assert_same_run(Path("two threads"), Path("two threads again"))


class InfiniteGradient(torch.autograd.Function):
    """A loss of zero whose gradient is not finite."""

    @staticmethod
    def forward(ctx, z):
        ctx.shape = z.shape
        return z.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full(ctx.shape, torch.inf)


@pytest.mark.parametrize("cause, step", [("loss", 1), ("gradient", 2)])
def test_a_number_that_is_not_finite_ends_the_run_and_names_the_images(
    workplace, monkeypatch, cause, step
):
    """The gradient is that of the last step of epoch 2: no loss shows it, the weights do."""
    seen = []

    def loss(self, z, labels, generator):
        seen.append(labels)
        if len(seen) == 2 + step:
            return InfiniteGradient.apply(z) if cause == "gradient" else z.sum() * torch.nan
        return z.square().mean()

    monkeypatch.setattr(pretrain.SupCon, "loss", loss)
    with pytest.raises(UserError, match=f"not finite in epoch 2, step {step}; .*not-finite.json"):
        call(pretrain, *WORDS, cause)
    record = json.loads(Path(cause, "not-finite.json").read_text())
    assert (record["epoch"], record["step"]) == (2, step)
    assert list(record["rows"]) == [str(i) for i in range(1, step + 1)]
    labels = load_subset(SUBSET).labels
    np.testing.assert_array_equal(labels[record["rows"][str(step)]], seen[1 + step])
    assert load_tensors(Path(cause, "checkpoint.pt"))["epoch"] == 1
    assert len(log_of(Path(cause))) == 1


class FourSteps:
    """Stand-in for EpochBatches: batches that hold the factor of a linear loss."""

    device, epoch = torch.device("cpu"), 0

    def __init__(self, factors):
        self.factors = factors

    def __len__(self):
        return len(self.factors)

    def __iter__(self):
        for factor in self.factors:
            yield type("Batch", (), {"labels": torch.zeros(2), "factor": factor})


def test_an_overflow_of_fp16_is_skipped_and_counted():
    """1e3 * 2^120 and infinity overflow float32; the other two steps count for the mean loss."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer, amp = torch.optim.SGD([w], lr=0.1), Amp(torch.device("cpu"), "off", 32)
    amp.mode, amp.scaler = "fp16", torch.amp.GradScaler("cpu", init_scale=2.0**120)
    batches = FourSteps([1e3, torch.inf, 1.0, 1.0])
    stats = train_one_epoch(lambda b: (b.factor * w).sum(), batches, optimizer, amp, "nowhere")
    assert stats["skipped_steps"] == 2
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))
    assert stats["loss"] == pytest.approx((3.0 + 2.7) / 2)
