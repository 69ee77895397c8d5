"""Two ranks equal one process, and a batch in chunks equals the batch."""

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

import finetune
import pretrain
from common import Amp, ContrastiveModel, load_subset, normalize, supcon_loss
from datasets.loader import Batch
from utils import distributed
from utils.cli import UserError, run_main
from utils.encoders import build_encoder
from utils.runs import load_tensors, make_generator, save_tensors

SUBSET = "subsets/digits/95-5.json"
CHUNKED = {"supmin": 4, "kcl queue": 4, "bcl": 4, "paco gpaco": 4}  # forms also tried with --chunk


def small(arch, stem="imagenet"):
    """A stand-in for build_encoder: two convolutions."""
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
    """Loss, gradients and buffers after one step on eight images, in float64.

    This process has its share of the images.
    """
    args = pretrain.parse_args([SUBSET, *words(form), "--batch-size", "8", "--epochs", "4"])
    torch.manual_seed(0)
    encoder = build_encoder if form == "supmin" else small
    with (
        patch("common.build_encoder", encoder),
        patch("baselines.sbcl.count_subclasses", lambda counts: [3, 1]),
    ):
        model = distributed.convert_sync_batchnorm(ContrastiveModel("resnet18", 16, chunk))
        method = second_phase(args, load_subset(SUBSET).limit_for_smoke(), model).double()
    model.double()
    x = torch.randn(method.views, 8, 3, 8, 8, generator=make_generator(1), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0])
    batch = Batch(
        x=x[:, distributed.local_slice()],
        labels=labels,
        cpu_labels=labels,
        positions=torch.arange(8),
        generator=make_generator(2),
    )
    modules = torch.nn.ModuleDict({"model": model, "method": method})
    optimizer = torch.optim.SGD([p for p in modules.parameters() if p.requires_grad], lr=0.0)
    loss = method(model, batch)
    Amp(torch.device("cpu"), "off", 32).step(loss, optimizer)
    named = modules.named_parameters()
    return {
        "loss": loss.detach(),
        **{f"gradient of {name}": p.grad for name, p in named if p.grad is not None},
        **{name: buffer.clone() for name, buffer in modules.named_buffers()},
    }


@contextmanager
def small_and_double():
    """pretrain.py with a small network in float64: float32 rounding grows from step to step."""
    model = pretrain.ContrastiveModel

    def normalize64(*args):
        return normalize(*args).double()

    with (
        patch("datasets.loader.normalize", normalize64),
        patch("common.normalize", normalize64),
        patch("common.build_encoder", small),
        patch("pretrain.ContrastiveModel", lambda *args: model(*args).double()),
    ):
        yield


COMMAND = [
    *(SUBSET, "--method", "supmin", "--majority-supervision", "0.5", "--smoke", "--size", "16"),
    *("--epochs", "40", "--warmup-epochs", "5", "--device", "cpu", "--watch-every", "20"),
    *("--save-every", "1", "--out"),
]
# The process group of these tests is there already.
PRETRAIN = SimpleNamespace(main=pretrain.main.__wrapped__, __name__="pretrain")


@distributed.torchrun_main
def pair():
    """What each of two ranks does; it saves what it saw for the tests below."""
    torch.set_num_threads(1)
    rank, seen = distributed.rank(), {}
    for form in FORMS:
        seen[form] = step_of(form)
    for form, chunk in CHUNKED.items():
        seen[f"{form} in chunks"] = step_of(form, chunk)

    # A gradient overflows on one rank: both skip the step.
    w = torch.nn.Parameter(torch.ones(3))
    optimizer, amp = torch.optim.SGD([w], lr=0.1), Amp(torch.device("cpu"), "off", 32)
    amp.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    factors = (1.0, torch.inf if rank else 1.0, 1.0)
    skipped = sum(amp.step((factor * w).sum(), optimizer) for factor in factors)
    seen["overflow"] = {"skipped": int(skipped), "w": w.tolist()}

    buffers = torch.nn.BatchNorm1d(2)
    buffers.running_mean += rank
    distributed.broadcast_buffers(buffers)
    seen["mean"] = buffers.running_mean.tolist()

    mistakes = ["--batch-size 15", "--batch-size 16 --chunk 5", "--batch-size 12 --chunk 3"]
    seen["refused"] = []
    for line in [*mistakes, f"--lr 0.{1 + rank}"]:
        try:
            call(PRETRAIN, SUBSET, "--smoke", *line.split(), "--out", "refused")
        except UserError as error:
            seen["refused"].append(str(error))
    save_tensors(f"{rank}.pt", seen)
    with small_and_double():
        call(PRETRAIN, *COMMAND, "two")  # until the signal comes


@pytest.fixture(scope="module")
def two_ranks(workplace):
    """What both ranks saw, and the finished torchrun, which a signal ended in mid-run."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    started = subprocess.Popen(
        [sys.executable, *launch, __file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not Path("two/checkpoint.pt").exists():
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    out, error = started.communicate(timeout=120)
    ended = SimpleNamespace(returncode=started.returncode, stdout=out, stderr=error)
    return [load_tensors(f"{rank}.pt") for rank in range(2)], ended


def assert_close(one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = (other[name].double() - value.double()).norm()
        assert error <= tolerance * max(1e-3, value.double().norm()), f"{name}: {error}"


@pytest.mark.parametrize("form", [*FORMS, *(f"{form} in chunks" for form in CHUNKED)])
def test_two_ranks_compute_what_one_process_does(workplace, two_ranks, form):
    name = form.removesuffix(" in chunks")
    first, second = two_ranks[0]
    assert_close(step_of(name, None if form == name else CHUNKED[name]), first[form])
    assert_close(first[form], second[form])


def test_two_ranks_skip_the_same_step_and_share_buffers(two_ranks):
    for seen in two_ranks[0]:
        assert seen["overflow"] == {"skipped": 1, "w": pytest.approx([0.8] * 3)}
        assert seen["mean"] == [0, 0]


def test_two_ranks_refuse_the_same_mistakes(two_ranks):
    first, second = (seen["refused"] for seen in two_ranks[0])
    messages = (
        "--batch-size 15: .* multiple of the 2 processes",
        "--chunk 5: must divide --batch-size 16",
        "--chunk 3: .* multiple of the 2 processes",
        "refused: the ranks see different files or commands",
    )
    assert first == second and len(first) == len(messages)
    assert all(re.search(*pair) for pair in zip(messages, first, strict=True))


def test_a_run_of_two_ranks_continues_in_one_process(workplace, two_ranks, capsys):
    ended = two_ranks[1]
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if "run the same command again" in line]
    assert len(lines) == 1, ended.stderr
    header = json.loads(Path("two/log.jsonl").read_text().splitlines()[0])
    assert header["device"].endswith(", 2 processes")
    assert load_tensors("two/checkpoint.pt")["epoch"] < 40
    with small_and_double():
        call(pretrain, *COMMAND, "two")
        assert "continuing after epoch" in capsys.readouterr().out
        call(pretrain, *COMMAND, "one")
    one, two = ([line["loss"] for line in log_of(Path(name))] for name in ("one", "two"))
    assert len(one) == len(two) == 40
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert_close(*(load_tensors(f"{name}/encoder.pt") for name in ("one", "two")), tolerance=1e-8)


def test_a_lost_process_is_one_line_of_the_others(monkeypatch):
    """gloo raises a RuntimeError with its name where the other end of a connection is gone."""

    def lose_connection(*args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: None)
    with pytest.raises(UserError, match="another process of this run has ended"):
        distributed.torchrun_main(lose_connection)()
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("torch.distributed.init_process_group", lose_connection)
    with pytest.raises(UserError, match="torchrun: cannot connect"):
        distributed.torchrun_main(lose_connection)()
    signal.signal(signal.SIGTERM, handler)


def test_other_scripts_refuse_torchrun(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="this script uses one device.*not with torchrun"):
        call(finetune, SUBSET, "--smoke", "--out", "fine")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but not from torchrun"):
        call(pretrain, SUBSET, "--smoke", "--out", "fine")
    assert not Path("fine").exists()


def encode_in_one_graph(model, x, chunk):
    """What --chunk computes, with one graph over all chunks."""
    return model.project(torch.cat([model.encode(part) for part in x.split(chunk, dim=1)], dim=1))


def embed_in_chunks(chunk, x, one_graph=False, frozen_statistics=False):
    """z, gradients and buffers of a network that sees `chunk` images at a time."""
    torch.manual_seed(0)
    with patch("common.build_encoder", small):
        model = ContrastiveModel("small", 16, chunk).double()
    for norm in model.modules():
        if frozen_statistics and isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    z = encode_in_one_graph(model, x, chunk) if one_graph else model(x)
    supcon_loss(z.transpose(0, 1), torch.arange(x.shape[1]) % 3 == 0).backward()
    return {
        "z": z.detach(),
        **{name: p.grad for name, p in model.named_parameters()},
        **{f"buffer {name}": b for name, b in model.named_buffers()},
    }


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 12, 3, 8, 8, generator=make_generator(0), dtype=torch.float64)


def test_chunks_equal_one_graph_over_them(images):
    assert_close(embed_in_chunks(4, images, one_graph=True), embed_in_chunks(4, images))
    batch, one_chunk = embed_in_chunks(None, images), embed_in_chunks(12, images)
    assert all(torch.equal(batch[name], one_chunk[name]) for name in batch)


def test_chunks_equal_the_batch_without_batch_statistics(images):
    frozen = [embed_in_chunks(chunk, images, frozen_statistics=True) for chunk in (None, 4)]
    assert_close(*frozen)
    with pytest.raises(AssertionError):
        assert_close(embed_in_chunks(None, images), embed_in_chunks(4, images))


def test_only_the_activations_of_one_chunk_are_kept(images):
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

    assert peak(2) < 1.3 * peak(None) / 6


def test_chunks_under_bfloat16(images):
    torch.manual_seed(0)
    model = ContrastiveModel("resnet8", 16, 4)
    x, grads = images.float().repeat_interleave(4, 3).repeat_interleave(4, 4), []
    for one_graph in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = encode_in_one_graph(model, x, 4) if one_graph else model(x)
        supcon_loss(z.transpose(0, 1), torch.arange(12) % 3).backward()
        grads.append(model.encoder.conv1.weight.grad.clone())
    assert torch.equal(*grads)


def test_a_run_in_chunks_is_another_run(workplace):
    command = [SUBSET, "--smoke", "--size", "8", "--epochs", "1", "--out"]
    with patch("common.build_encoder", small):
        call(pretrain, *command, "chunked", "--chunk", "4")
    assert json.loads(Path("chunked/config.json").read_text())["chunk"] == 4
    assert np.isfinite(log_of(Path("chunked"))[0]["loss"])
    with pytest.raises(UserError, match="other settings.*chunk was 4, is None"):
        call(pretrain, *command, "chunked")
    with pytest.raises(UserError, match="--chunk 5: must divide --batch-size 16"):
        call(pretrain, *command, "other", "--chunk", "5")


if __name__ == "__main__":
    run_main(pair)
