"""Nothing lost: signals, two processes in one folder, numbers that are not finite."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, equal, log_of

import common
import finetune
import linear_probe
import make_subsets
import pretrain
from common import Epoch, Stop, Stopped
from utils import files
from utils.cli import UserError

SUBSET = "subsets/digits/95-5.json"
WORDS = [
    SUBSET,
    "--method",
    "supcon",
    "--smoke",
    "--size",
    "8",
    "--epochs",
    "4",
    "--watch-every",
    "0",
    "--out",
]


@pytest.fixture(scope="module")
def whole(workplace):
    """A run that nothing has stopped."""
    call(pretrain, *WORDS, "whole")
    return Path("whole")


def exit_code(script, *words):
    """As the command line ends."""
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, words)]
    try:
        common.run_main(script.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_is_followed_after_the_step_and_the_same_command_goes_on(
    whole, monkeypatch, capsys, handlers, name, code
):
    augment, seen = pretrain.augment, []

    def signalled(*args):
        seen.append(args)
        if len(seen) == 5:  # in the middle of the first step of epoch 2
            os.kill(os.getpid(), getattr(signal, name))
        return augment(*args)

    monkeypatch.setattr(pretrain, "augment", signalled)
    capsys.readouterr()
    assert (
        exit_code(pretrain, *WORDS, name) == code and len(seen) == 6
    )  # that step was finished: 2 + 1 steps of two views
    error = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    assert (
        error[-1]
        == f"pretrain.py: stopped by {name}; the same command goes on from what is finished"
    )
    monkeypatch.setattr(pretrain, "augment", augment)
    assert (
        exit_code(pretrain, *WORDS, name) == 0
        and "goes on after epoch 1 of 4 and 1 steps" in capsys.readouterr().out
    )
    assert log_of(whole) == log_of(Path(name)) and len(log_of(Path(name))) == 4
    assert equal(*(common.load_tensors(Path(folder, "encoder.pt")) for folder in (whole, name)))


def test_a_later_signal_does_not_wait_but_an_echo_of_the_first_does():
    with pytest.raises(Stopped), Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as where a process and its group are both told
        assert stop.number == signal.SIGTERM
        stop.at -= 3
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the last one was only noted")  # the handler runs before this line


def test_a_checkpoint_of_an_earlier_version_is_taken_up(whole, capsys):
    state = common.load_tensors("whole/checkpoint.pt")
    del state["within"]
    common.save_tensors("whole/checkpoint.pt", state)
    call(pretrain, *WORDS, "whole")
    assert "finished already" in capsys.readouterr().out


def test_a_signal_after_the_loss_went_wrong_spares_the_good_checkpoint(workplace, monkeypatch):
    seen = []

    def loss(self, z, labels, generator):
        seen.append(labels)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            return z.sum() * torch.nan
        return z.square().mean()

    monkeypatch.setattr(pretrain.SupCon, "loss", loss)
    with pytest.raises(Stopped):
        call(pretrain, *WORDS, "spared")
    state = common.load_tensors("spared/checkpoint.pt")
    assert (
        state["epoch"] == 1
        and not state["within"]
        and all(value.isfinite().all() for value in state["model"].values())
    )


@pytest.mark.parametrize("epoch, steps", [(1, " and 1 steps"), (3, "")])
def test_a_signal_between_epochs_loses_nothing(whole, monkeypatch, capsys, handlers, epoch, steps):
    """After the last epoch, too: what was to follow in the shell does not begin."""
    log_line, out = pretrain.log_line, Path(f"late{epoch}")

    def signalled(folder, **values):
        if values["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        log_line(folder, **values)

    monkeypatch.setattr(pretrain, "log_line", signalled)
    assert exit_code(pretrain, *WORDS, out) == 143 and not (out / "encoder.pt").exists()
    monkeypatch.setattr(pretrain, "log_line", log_line)
    capsys.readouterr()
    assert exit_code(pretrain, *WORDS, out) == 0
    assert epoch == 3 or f"goes on after epoch {epoch + 1} of 4{steps}" in capsys.readouterr().out
    assert log_of(whole) == log_of(out) and equal(
        *(common.load_tensors(folder / "encoder.pt") for folder in (whole, out))
    )


@pytest.fixture
def full_disk():
    """full_disk(n): no file may grow beyond n bytes; the system refuses the write as it does on a full disk or beyond a quota."""

    def full_disk(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield full_disk
    full_disk(before[0])


@pytest.mark.parametrize("where", ["checkpoint.pt", "log.jsonl"])
def test_a_full_disk_keeps_the_last_checkpoint_and_is_named(
    whole, monkeypatch, capsys, handlers, full_disk, where
):
    log_line, out = pretrain.log_line, Path(f"full-{Path(where).stem}")

    def on_full_disk(folder, **values):
        if values["epoch"] == 1:
            full_disk(
                100_000 if where == "checkpoint.pt" else (out / "log.jsonl").stat().st_size + 7
            )
        log_line(folder, **values)

    monkeypatch.setattr(pretrain, "log_line", on_full_disk)
    capsys.readouterr()
    code = exit_code(pretrain, *WORDS, out)
    full_disk(resource.RLIM_INFINITY)
    message = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line][
        -1
    ]
    assert (
        code == 1
        and message
        == f"pretrain.py: {out / where}: File too large; free some space and give the same command again"
    )
    assert common.load_tensors(out / "checkpoint.pt")["epoch"] == 1 and not list(
        out.glob(".part-*")
    )
    monkeypatch.setattr(pretrain, "log_line", log_line)
    assert exit_code(pretrain, *WORDS, out) == 0
    assert log_of(whole) == log_of(out) and equal(
        *(common.load_tensors(folder / "encoder.pt") for folder in (whole, out))
    )


@pytest.mark.parametrize(
    "script, words, file",
    [
        (
            make_subsets,
            ["digits", "--workers", 1, "--name", "full"],
            "subsets/full",
        ),  # images.npy takes 115 kB
        (make_subsets, ["digits", "--workers", 2, "--name", "full"], "subsets/full"),
        (linear_probe, ["whole", "--out", "full"], "full/probe.pt"),
        (finetune, ["whole", "--smoke", "--train", "head", "--out", "full"], "full/checkpoint.pt"),
    ],
)
def test_a_full_disk_is_named_by_every_script(
    whole, capsys, handlers, full_disk, script, words, file
):
    full_disk(1000 if script is linear_probe else 50_000)
    capsys.readouterr()
    code = exit_code(script, *words)
    full_disk(resource.RLIM_INFINITY)
    assert (
        code == 1
        and f"{script.__name__}.py: {file}: File too large; free some space"
        in capsys.readouterr().err
    )
    assert exit_code(script, *words) == 0
    shutil.rmtree(Path(file) if script is make_subsets else Path(file).parent)


@pytest.mark.parametrize(
    "script, words", [(pretrain, WORDS), (finetune, [SUBSET, "--smoke", "--out"])]
)
def test_a_folder_belongs_to_one_living_process(workplace, script, words):
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from utils import files; import time; files.hold('shared'); print('held', flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="shared: another process is at work in it; .*--out"):
        call(script, *words, "shared")
    assert [path.name for path in Path("shared").iterdir()] == [".lock"]
    other.kill()  # a dead process holds nothing
    other.wait()
    files.lock_folder("shared")
    Path("shared/.lock").unlink()


def test_the_same_seed_gives_the_same_run(whole, monkeypatch):
    """Bit for bit on the CPU, with one thread and with two; --deterministic asks torch for it everywhere and changes nothing there."""
    asked, threads = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    call(pretrain, *WORDS, "once", "--deterministic")
    assert asked == [True]
    try:
        torch.set_num_threads(2)
        for out in ("with two threads", "again"):
            call(pretrain, *WORDS, out, "--size", 24, "--epochs", 2)
    finally:
        torch.set_num_threads(threads)
    for one, other in (("whole", "once"), ("with two threads", "again")):
        assert log_of(Path(one)) == log_of(Path(other))
        assert equal(*(common.load_tensors(Path(folder, "encoder.pt")) for folder in (one, other)))


class Poison(torch.autograd.Function):
    """A loss of zero with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, z):
        ctx.shape = z.shape
        return z.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full(ctx.shape, torch.inf)


@pytest.mark.parametrize("what, step", [("loss", 1), ("gradient", 2)])
def test_a_number_that_is_not_finite_stops_with_its_images_named(
    workplace, monkeypatch, what, step
):
    """The gradient in the last step of epoch 2: no loss after it shows it, the weights do."""
    seen = []

    def loss(self, z, labels, generator):
        seen.append(labels)
        if len(seen) == 2 + step:
            return Poison.apply(z) if what == "gradient" else z.sum() * torch.nan
        return z.square().mean()

    monkeypatch.setattr(pretrain.SupCon, "loss", loss)
    with pytest.raises(
        UserError,
        match=f"not finite in epoch 2, step {step}; .*not-finite.json, the last checkpoint is kept",
    ):
        call(pretrain, *WORDS, what)
    told = json.loads(Path(what, "not-finite.json").read_text())
    assert (told["epoch"], told["step"]) == (2, step)
    subset = common.load_subset(SUBSET)
    assert list(told["rows"]) == [str(at) for at in range(1, step + 1)]
    np.testing.assert_array_equal(subset.labels[told["rows"][str(step)]], seen[1 + step])
    assert (
        common.load_tensors(Path(what, "checkpoint.pt"))["epoch"] == 1
        and len(log_of(Path(what))) == 1
    )


def test_an_overflow_of_fp16_is_skipped_and_counted():
    w = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([w])
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=2.0**120),
    )
    progress = Epoch(0, 0, lambda generator: [np.arange(2)] * 4, torch.device("cpu"), Stop())
    before = []
    for factor in (1e3, torch.inf, 1.0, 1.0):  # 1e3 * 2^120 and infinity overflow float32
        before.append(w.detach().clone())
        progress.step((factor * w).sum(), optimizer, scaler)
    assert progress.skipped == 2 and torch.equal(before[0], before[2])
    np.testing.assert_allclose(
        progress.loss(optimizer, None, "nowhere"), (3.0 + 2.7) / 2, rtol=1e-6
    )
