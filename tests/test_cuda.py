"""What runs otherwise on a GPU than on a CPU, against the CPU. Skipped without one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, log_of
from PIL import Image
from test_methods import FORMS, words

import common as losses
import evaluate_metrics
import finetune
import linear_probe
import pretrain
from baselines.kcl import draw_candidates
from datasets.augment import RECIPES, augment
from datasets.loader import ImageReader
from utils.cli import UserError
from utils.runs import Run, load_tensors, make_generator

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
GPU = torch.device("cuda")
SUBSET = "subsets/digits/99-1.json"


@pytest.fixture(autouse=True)
def undo_deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_optimizers_are_fused_on_a_gpu_alone(device):
    model = torch.nn.Module()
    model.encoder, model.head = (torch.nn.Linear(2, 2, device=device) for _ in range(2))
    args = SimpleNamespace(lr=0.1, head_lr=None, retrain=None)
    for optimizer in (
        pretrain.build_optimizer(args, model, torch.nn.Identity()),
        finetune.make_optimizer(model, args),
    ):
        assert optimizer.defaults["fused"] is (device == "cuda")


@pytest.mark.parametrize("free", ["all", "none"])
def test_images_on_the_gpu_are_those_of_the_file(free, monkeypatch):
    """Kept there, or copied one batch ahead where they do not fit."""
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), dtype=np.uint8)
    if free == "none":
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 0))
    train, batches = (
        ImageReader(images, np.arange(10, 50), GPU),
        [np.arange(at, at + 8) for at in (0, 16, 32)],
    )
    assert (train.resident is None) == (free == "none")
    for wanted, (positions, batch) in zip(batches, train(batches, slice(0, 4)), strict=True):
        assert (positions == wanted).all() and batch.device.type == "cuda"
        assert (batch.cpu().permute(0, 2, 3, 1).numpy() == images[10 + wanted[:4]]).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_are_the_same(recipe):
    images, sizes = (
        torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8, generator=make_generator(0)),
        torch.full((9, 2), 40),
    )
    here, there = (
        augment(images.to(device), sizes, recipe, 32, make_generator(1)) for device in ("cpu", GPU)
    )
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ntxent", "supcon", "supmin", "suppro"])
def test_losses_and_gradients_are_the_same(name):
    labels, prototypes = (
        torch.arange(300) % 5 == 0,
        losses.antipodal_prototypes(16, make_generator(0)).double(),
    )
    seen = []
    for device in ("cpu", GPU):
        z = (
            F.normalize(
                torch.randn(300, 2, 16, dtype=torch.float64, generator=make_generator(1)), dim=2
            )
            .to(device)
            .requires_grad_()
        )
        y = labels.long().to(device)
        loss = {
            "ntxent": lambda: losses.ntxent_loss(z),
            "supcon": lambda: losses.supcon_loss(z, y),
            "supmin": lambda: losses.supmin_loss(z, y, 1),
            "suppro": lambda: losses.suppro_loss(z, y, prototypes.to(device)),
        }[name]()
        loss.backward()
        seen.append((loss.detach().cpu(), z.grad.cpu()))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-12)


def test_metrics_are_the_same():
    z, labels = (
        F.normalize(torch.randn(2, 400, 8, generator=make_generator(0)).double(), dim=2),
        (torch.arange(400) % 10 == 0).long(),
    )
    here, there = (
        evaluate_metrics.compute_metrics(z.to(device), labels, 0.05) for device in ("cpu", GPU)
    )
    assert here.keys() == there.keys()
    for name, values in here.items():
        assert there[name] == pytest.approx(values, rel=1e-9), name


def test_kcl_draws_what_it_draws_on_the_cpu():
    labels = (torch.arange(60) % 4 == 0).long()
    candidates = labels[:, None] == labels
    here, there = (
        draw_candidates(candidates.to(device), 5, make_generator(0)).cpu()
        for device in ("cpu", GPU)
    )
    assert torch.equal(here, there) and (here.sum(1) == 5).all()


def test_randaugment_is_drawn_as_on_the_cpu():
    """Values differ where an operation rounds to 8 bits, or picks pixels on a tie."""
    images = torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8, generator=make_generator(0))
    sizes, generators = torch.full((9, 2), 40), (make_generator(1), make_generator(1))
    here, there = (
        augment(images.to(device), sizes, "natural", 32, generator, randaugment=True).cpu()
        for device, generator in zip(("cpu", GPU), generators, strict=True)
    )
    assert (here - there).abs().mean() < 0.02
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


TINY = ["--smoke", "--arch", "resnet8", "--size", 24, "--amp", "fp32"]
METHODS = [*map(words, FORMS), ["--method", "supmin", "--chunk", "8"]]


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_every_method_trains_as_on_the_cpu(method, workplace):
    seen = []
    for k, flags in enumerate(("--device cpu", "--device cuda", "--device cuda --amp bf16")):
        out = f"{k}{' '.join(method)}"
        call(pretrain, SUBSET, *method, *TINY, *flags.split(), "--out", out)
        seen.append([line["loss"] for line in log_of(Path(out))])
    np.testing.assert_allclose(seen[1], seen[0], rtol=0.05)
    assert np.isfinite(seen[2]).all()


def test_a_stopped_run_continues_with_the_same_bits(workplace, monkeypatch):
    words = [SUBSET, *TINY, "--device", "cuda", "--deterministic", "--epochs", 3, "--out"]
    call(pretrain, *words, "whole")
    finish_epoch = Run.finish_epoch

    def stop_after_two(self, epoch, stats):
        finish_epoch(self, epoch, stats)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "finish_epoch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        call(pretrain, *words, "stopped")
    monkeypatch.undo()
    call(pretrain, *words, "stopped")
    assert Path("whole/encoder.pt").read_bytes() == Path("stopped/encoder.pt").read_bytes()


def test_a_compiled_encoder_has_the_same_keys_and_losses(workplace):
    for flags in ([], ["--compile"]):
        out = f"compiled{len(flags)}"
        call(pretrain, SUBSET, *TINY, "--device", "cuda", *flags, "--out", out)
    plain, compiled = (load_tensors(f"compiled{k}/encoder.pt") for k in (0, 1))
    assert plain.keys() == compiled.keys()
    losses = [[line["loss"] for line in log_of(Path(f"compiled{k}"))] for k in (0, 1)]
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_classifiers_are_trained_again_and_predict(workplace):
    call(finetune, SUBSET, "--loss", "ce", *TINY, "--device", "cuda", "--out", "ce")
    for method in ("crt", "lws", "tau_norm"):
        call(finetune, "ce", "--retrain", method, "--smoke", "--device", "cuda")
    Path("new").mkdir()
    Image.fromarray(np.full((8, 8), 99, dtype=np.uint8)).save("new/image.png")
    for device in ("cuda", "cpu"):
        call(finetune, "ce", "--predict", "new", "--csv", f"{device}.csv", "--device", device)
    here, there = (list(csv.DictReader(Path(f"{device}.csv").open())) for device in ("cpu", "cuda"))
    assert len(here) == len(there) == 1
    assert float(here[0]["p_minority"]) == pytest.approx(float(there[0]["p_minority"]), abs=0.01)


def test_weights_trained_on_it_load_without_it(workplace):
    call(pretrain, SUBSET, *TINY, "--device", "cuda", "--out", "moved")
    code = "import torch; torch.load('moved/encoder.pt', weights_only=True)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    assert all(not value.is_cuda for value in load_tensors("moved/checkpoint.pt")["model"].values())


def test_an_epoch_in_which_every_step_overflows_is_reported(workplace, monkeypatch):
    """With infinite losses the scaler skips every step of fp16."""
    monkeypatch.setattr(pretrain.SupCon, "loss", lambda self, z, labels, generator: z.sum() * 1e38)
    words = [SUBSET, "--method", "supcon", *TINY, "--amp", "fp16", "--device", "cuda"]
    with pytest.raises(UserError, match="overflowed"):
        call(pretrain, *words, "--out", "overflow")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_the_scripts_run_on_it(amp, workplace):
    call(
        pretrain,
        SUBSET,
        "--device",
        "cuda",
        "--amp",
        amp,
        "--smoke",
        "--seed",
        7,
        "--out",
        f"runs/{amp}",
    )
    call(linear_probe, f"runs/{amp}", "--device", "cuda", "--smoke")
    call(evaluate_metrics, f"runs/{amp}", "--device", "cuda", "--smoke", "--picture", "pca")
    call(finetune, f"runs/{amp}", "--device", "cuda", "--amp", amp, "--smoke")
    assert all(np.isfinite(line["loss"]) for line in log_of(Path(f"runs/{amp}")))
    for name in ("probe.json", "metrics.json", "finetune.json"):
        assert json.loads(Path(f"runs/{amp}/{name}").read_text())


def test_deterministic_means_the_same_bits(workplace):
    run = [
        sys.executable,
        ROOT / "pretrain.py",
        SUBSET,
        "--device",
        "cuda",
        "--deterministic",
        "--smoke",
        "--out",
    ]
    for k in (1, 2):
        subprocess.run([*run, f"same{k}"], check=True, timeout=300)
    assert Path("same1/encoder.pt").read_bytes() == Path("same2/encoder.pt").read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does(workplace):
    """NCCL, and torch's own synchronised batch norm."""
    flags = [
        str(ROOT / "pretrain.py"),
        SUBSET,
        "--device",
        "cuda",
        "--amp",
        "off",
        "--smoke",
        "--out",
    ]
    subprocess.run([sys.executable, *flags, "one"], check=True, timeout=300)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *flags,
            "two",
        ],
        check=True,
        timeout=300,
    )
    one, two = ([line["loss"] for line in log_of(Path(name))] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-3)
