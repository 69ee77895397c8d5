"""Several processes are one: the same loss, gradients and statistics, the same run, the same end; and a batch in chunks is a batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT, call, log_of
from test_methods import FORMS, second_phase, words
from torch.multiprocessing.reductions import StorageWeakRef

import common
import finetune
import pretrain
from common import ContrastiveModel, Epoch, Stop, Stopped, load_subset
from utils import distributed
from utils.cli import UserError, run_main
from utils.runs import make_generator

SUBSET = "subsets/digits/95-5.json"
CHUNKED = {"supmin": 4, "kcl queue": 4, "bcl": 4, "paco gpaco": 4}  # forms also tried with --chunk


def small(arch):
    """A network for what does not depend on its depth."""
    layers = [
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.BatchNorm2d(8),
    ]
    network = torch.nn.Sequential(
        *layers, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    network.dim = 8
    return network


def step_of(form, chunk=None):
    """Loss, gradients and what is kept after one step on eight images, of which this process has its share, in float64."""
    args = pretrain.parse_args([SUBSET, *words(form), "--batch-size", "8", "--epochs", "4"])
    torch.manual_seed(0)
    with (
        patch("common.resnet", common.resnet if form == "supmin" else small),
        patch("baselines.sbcl.count_subclasses", lambda counts: [3, 1]),
    ):
        model = distributed.convert_sync_batchnorm(ContrastiveModel("resnet18", 16, chunk))
        method = second_phase(args, load_subset(SUBSET).limit_for_smoke(), model).double()
    model.double()
    x = torch.randn(method.views, 8, 3, 8, 8, generator=make_generator(1), dtype=torch.float64)
    parts = torch.nn.ModuleDict({"model": model, "method": method})
    optimizer = torch.optim.SGD([p for p in parts.parameters() if p.requires_grad], lr=0.0)
    progress = Epoch(0, 0, lambda generator: [np.arange(8)], torch.device("cpu"), Stop())
    loss = method(
        model,
        x[:, distributed.local_slice()],
        torch.tensor([0, 0, 1, 0, 0, 1, 0, 0]),
        torch.arange(8),
        make_generator(2),
    )
    progress.step(loss, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return {
        "loss": loss.detach(),
        **{
            f"gradient of {name}": p.grad
            for name, p in parts.named_parameters()
            if p.grad is not None
        },
        **{name: buffer.clone() for name, buffer in parts.named_buffers()},
    }


@contextmanager
def small_and_double():
    """pretrain.py with a small network in float64: the rounding of float32 grows from step to step."""
    normalize, model = pretrain.normalize, pretrain.ContrastiveModel
    wide = lambda *args: normalize(*args).double()  # noqa: E731
    with (
        patch("pretrain.normalize", wide),
        patch("common.normalize", wide),
        patch("common.resnet", small),
        patch("pretrain.ContrastiveModel", lambda *args: model(*args).double()),
    ):
        yield


COMMAND = [
    SUBSET,
    "--method",
    "supmin",
    "--majority-supervision",
    "0.5",
    "--smoke",
    "--size",
    "16",
    "--epochs",
    "40",
    "--warmup-epochs",
    "5",
    "--save-every",
    "40",
    "--device",
    "cpu",
    "--watch-every",
    "20",
    "--out",
]
PRETRAIN = SimpleNamespace(
    main=pretrain.main.__wrapped__, __name__="pretrain"
)  # the group is there already


# what both of the two processes do; they tell what they saw, and the tests below compare ------------------------------------


@distributed.torchrun_main
def pair():
    torch.set_num_threads(1)
    rank, told = distributed.rank(), {}
    for form in FORMS:
        told[form] = step_of(form)
    for form, chunk in CHUNKED.items():
        told[f"{form} in chunks"] = step_of(form, chunk)

    # a signal reaches one process: both stop after the same step
    w = torch.nn.Parameter(torch.ones(3))
    optimizer, off = torch.optim.SGD([w], lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    progress = Epoch(0, 0, lambda generator: [np.arange(2)] * 4, torch.device("cpu"), Stop())
    try:
        for step in range(4):
            progress.stop.number = signal.SIGTERM if step == rank == 1 else None
            progress.step((w * (1 + rank)).sum(), optimizer, off)
    except Stopped as stopped:
        told["stopped"] = {
            "number": stopped.number,
            "step": stopped.within["step"],
            "w": w.tolist(),
        }

    # a gradient overflows in one process: both leave the step out
    progress, scaler = (
        Epoch(0, 0, lambda generator: [np.arange(2)] * 4, torch.device("cpu"), Stop()),
        torch.amp.GradScaler("cpu", init_scale=8.0),
    )
    for factor in (1.0, torch.inf if rank else 1.0, 1.0):
        progress.step((factor * w).sum(), optimizer, scaler)
    told["overflow"] = {"skipped": int(progress.skipped), "w": w.tolist()}

    buffers = torch.nn.BatchNorm1d(2)
    buffers.running_mean += rank
    distributed.broadcast_buffers(buffers)
    told["mean"] = buffers.running_mean.tolist()

    # mistakes
    told["refused"] = []
    for line in (
        "--batch-size 15",
        "--batch-size 16 --chunk 5",
        "--batch-size 12 --chunk 3",
        f"--lr 0.{1 + rank}",
    ):
        try:
            call(PRETRAIN, SUBSET, "--smoke", *line.split(), "--out", "refused")
        except UserError as error:
            told["refused"].append(str(error))
    common.save_tensors(f"{rank}.pt", told)
    with small_and_double():
        call(PRETRAIN, *COMMAND, "two")  # until a signal comes


@pytest.fixture(scope="module")
def told(workplace):
    """What both saw, and how they ended: as a user starts and stops them, in the middle of a run."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    log = Path("two", "log.jsonl")
    while not log.exists() or log.read_text().count("\n") < 2:  # the header and one epoch
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    out, error = started.communicate(timeout=120)
    return [common.load_tensors(f"{rank}.pt") for rank in range(2)], SimpleNamespace(
        returncode=started.returncode, stdout=out, stderr=error
    )


def same(one, many, tolerance=1e-10):
    assert one.keys() == many.keys()
    for name, value in one.items():
        error = (many[name].double() - value.double()).norm()
        assert error <= tolerance * max(1e-3, value.double().norm()), (
            f"{name}: {error}, {value.double().norm()}"
        )


@pytest.mark.parametrize("form", [*FORMS, *(f"{form} in chunks" for form in CHUNKED)])
def test_two_processes_compute_what_one_does(workplace, told, form):
    name = form.removesuffix(" in chunks")
    one = step_of(name, None if form == name else CHUNKED[name])
    same(one, told[0][0][form])
    same(told[0][0][form], told[0][1][form])


def test_two_processes_end_the_same_step(told):
    for seen in told[0]:
        assert seen["stopped"] == {
            "number": signal.SIGTERM,
            "step": 2,
            "w": pytest.approx([0.7] * 3),
        }  # lr 0.1, mean of 1 and 2, two steps
        assert seen["overflow"] == {"skipped": 1, "w": pytest.approx([0.5] * 3)}
        assert seen["mean"] == [0, 0]


def test_two_processes_meet_the_same_mistakes(told):
    first, second = (seen["refused"] for seen in told[0])
    assert first == second and len(first) == 4
    for line, said in zip(
        first,
        (
            "--batch-size 15: .* multiple of 2",
            "--chunk 5: .* divide --batch-size 16",
            "--chunk 3: .* multiple of 2",
            "refused: not all processes .* same command",
        ),
    ):
        assert re.search(said, line)


def test_a_run_on_two_processes_stopped_and_finished_on_one_is_the_run_on_one(
    workplace, told, capsys
):
    ended = told[1]
    assert (
        ended.returncode != 0 and ended.stdout.count("method=supmin") == 1 + 1
    )  # one of them of the mistake above
    assert (
        ended.stderr.count("stopped by SIGTERM; the same command goes on")
        == ended.stderr.count("stopped by SIGTERM")
        == 1
    )
    assert "gloo" not in ended.stderr and "destroy" not in ended.stderr
    assert json.loads(Path("two/log.jsonl").read_text().splitlines()[0])["device"].endswith(
        ", 2 processes"
    )
    assert common.load_tensors("two/checkpoint.pt")["epoch"] < 40
    with small_and_double():
        call(pretrain, *COMMAND, "two")
        assert "goes on after epoch" in capsys.readouterr().out
        call(pretrain, *COMMAND, "one")
    one, two = ([line["loss"] for line in log_of(Path(name))] for name in ("one", "two"))
    assert len(one) == len(two) == 40
    np.testing.assert_allclose(one, two, rtol=1e-6)
    same(*(common.load_tensors(f"{name}/encoder.pt") for name in ("one", "two")), tolerance=1e-8)


def test_a_process_that_dies_is_one_line_of_the_others(monkeypatch):
    """gloo says what it says where the other end of a line is gone."""

    def alone():
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29610"
        )

    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: None)
    with pytest.raises(
        UserError,
        match="another process of this run has ended; the same command goes on from the last checkpoint",
    ):
        distributed.torchrun_main(alone)()
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: alone())
    with pytest.raises(UserError, match="the processes of torchrun do not find each other"):
        distributed.torchrun_main(alone)()
    signal.signal(signal.SIGTERM, handler)


def test_other_scripts_run_on_one_device(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs on one device.*not with torchrun"):
        call(finetune, SUBSET, "--smoke", "--out", "fine")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but not from torchrun"):
        call(pretrain, SUBSET, "--smoke", "--out", "fine")
    assert not Path("fine").exists()


# chunks -------------------------------------------------------------------------------------------------------------------------


def in_chunks(chunk, x, plain=False, still=False):
    """z, gradients and buffers of a network that sees `chunk` images at a time; plain: with one graph over them; still: batch norm as in eval."""
    torch.manual_seed(0)
    with patch("common.resnet", small):
        model = ContrastiveModel("small", 16, chunk).double()
    for norm in model.modules():
        if still and isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    z = (
        model.project(torch.cat([model.encode(part) for part in x.split(chunk, dim=1)], dim=1))
        if plain
        else model(x)
    )
    common.supcon_loss(z.transpose(0, 1), torch.arange(x.shape[1]) % 3 == 0).backward()
    return {
        "z": z.detach(),
        **{name: p.grad for name, p in model.named_parameters()},
        **{f"buffer {name}": b for name, b in model.named_buffers()},
    }


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 12, 3, 8, 8, generator=make_generator(0), dtype=torch.float64)


def test_chunks_are_one_graph_over_them(images):
    same(in_chunks(4, images, plain=True), in_chunks(4, images))
    whole, one = in_chunks(None, images), in_chunks(12, images)
    assert all(torch.equal(whole[name], one[name]) for name in whole)


def test_without_batch_statistics_chunks_are_the_whole_batch(images):
    same(in_chunks(None, images, still=True), in_chunks(4, images, still=True))
    with pytest.raises(AssertionError):  # which batch norm makes another matter
        same(in_chunks(None, images), in_chunks(4, images))


def test_chunks_hold_the_activations_of_one_of_them(images):
    """Bytes of the layers' outputs that live at the same time, forward and backward."""

    def peak(chunk):
        torch.manual_seed(0)
        model, living, most = ContrastiveModel("resnet18", 16, chunk).double(), {}, [0]

        def count(module, args, out):
            storage = out.untyped_storage()
            living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            for key in [key for key, (weak, _) in living.items() if weak.expired()]:
                del living[key]
            most[0] = max(most[0], sum(size for _, size in living.values()))

        for module in model.encoder.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        model(images).square().sum().backward()
        return most[0]

    whole, chunked = peak(None), peak(2)
    assert chunked < 1.3 * whole / 6


def test_chunks_under_bfloat16(images):
    torch.manual_seed(0)
    model, x = (
        ContrastiveModel("resnet18", 16, 4),
        images.float().repeat_interleave(4, 3).repeat_interleave(4, 4),
    )
    grads = []
    for plain in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = (
                model.project(torch.cat([model.encode(part) for part in x.split(4, dim=1)], dim=1))
                if plain
                else model(x)
            )
        common.supcon_loss(z.transpose(0, 1), torch.arange(12) % 3).backward()
        grads.append(model.encoder.conv1.weight.grad.clone())
    assert torch.equal(*grads)


def test_a_run_in_chunks_is_another_run(workplace):
    command = [SUBSET, "--smoke", "--size", "8", "--epochs", "1", "--out"]
    with patch("common.resnet", small):
        call(pretrain, *command, "chunked", "--chunk", "4")
    assert json.loads(Path("chunked/config.json").read_text())["chunk"] == 4 and np.isfinite(
        log_of(Path("chunked"))[0]["loss"]
    )
    with pytest.raises(UserError, match="other settings.*chunk 4 there, None now"):
        call(pretrain, *command, "chunked")
    with pytest.raises(UserError, match="--chunk 5: has to divide --batch-size 16"):
        call(pretrain, *command, "other", "--chunk", "5")


if __name__ == "__main__":
    run_main(pair)
