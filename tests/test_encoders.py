"""Networks for small images, stems, and the weights that a run starts from."""

import json
import pickle
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import call, log_of

import pretrain
from common import ContrastiveModel, load_run, load_subset
from utils.cli import UserError
from utils.encoders import (
    CIFAR_RESNETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_encoder,
    feature_map_side,
    resolve_stem,
)
from utils.runs import load_tensors, make_generator, module_sha256

SUBSET = "subsets/digits/95-5.json"
WORDS = [SUBSET, "--smoke", "--epochs", 1, "--watch-every", 0, "--device", "cpu"]
TINY = [*WORDS, "--arch", "resnet8"]


def reference_resnet(x, weights, blocks):
    """The CIFAR ResNet of He et al. 2016 in functional form, in eval mode."""

    def norm(x, name):
        parameters = [weights[f"{name}.{key}"] for key in ("weight", "bias")]
        statistics = [weights[f"{name}.running_{key}"] for key in ("mean", "var")]
        return F.batch_norm(x, *statistics, *parameters)

    x = F.relu(norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(y, f"{name}.bn1")), weights[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                x = F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=2)
                x = norm(x, f"{name}.downsample.1")
            x = F.relu(norm(y, f"{name}.bn2") + x)
    return x.mean((2, 3))


@pytest.mark.parametrize("arch, depth", CIFAR_RESNETS.items())
def test_cifar_resnets_equal_a_plain_reference(arch, depth):
    torch.manual_seed(0)
    encoder = build_encoder(arch).double().train()
    x = torch.randn(4, 3, 28, 28, dtype=torch.float64, generator=make_generator(0))
    encoder(x)  # moves the statistics of batch norm
    encoder.eval()
    convolutions = [name for name, p in encoder.named_parameters() if p.ndim == 4]
    assert len([name for name in convolutions if "downsample" not in name]) + 1 == depth
    expected = reference_resnet(x, encoder.state_dict(), blocks=(depth - 2) // 6)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-10, atol=1e-10)
    assert encoder.dim == 64 == expected.shape[1]


def test_parameter_counts():
    counts = {
        arch: sum(p.numel() for p in build_encoder(arch).parameters()) for arch in CIFAR_RESNETS
    }
    assert 77_000 < counts["resnet8"] < 78_500
    assert round(counts["resnet20"] / 1e6, 2) == 0.27 and round(counts["resnet56"] / 1e6, 2) == 0.86


@pytest.mark.parametrize(
    "arch, stem, size, side",
    [
        ("resnet18", "imagenet", 16, 1),
        ("resnet18", "imagenet", 28, 1),
        ("resnet18", "imagenet", 64, 2),
        ("resnet50", "imagenet", 224, 7),
        ("resnet18", "cifar", 28, 4),
        ("resnet18", "cifar", 32, 4),
        ("resnet8", "cifar", 28, 7),
        ("resnet20", "cifar", 33, 9),
    ],
)
def test_the_last_feature_map_has_the_side_that_is_printed(arch, stem, size, side):
    encoder, shapes = build_encoder(arch, stem).eval(), []
    last = encoder.layer3 if arch in CIFAR_RESNETS else encoder.layer4
    last.register_forward_hook(lambda module, args, out: shapes.append(out.shape[-2:]))
    encoder(torch.randn(1, 3, size, size))
    assert shapes == [(side, side)] and feature_map_side(arch, stem, size) == side


def test_the_cifar_stem_is_torchvisions_resnet_with_two_layers_replaced():
    encoder = build_encoder("resnet18", "cifar").eval()
    reference = torchvision.models.resnet18()
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    reference.maxpool = reference.fc = torch.nn.Identity()
    reference.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=make_generator(0))
    torch.testing.assert_close(encoder(x), reference.eval()(x))


def test_auto_takes_the_stem_for_the_image_size():
    assert resolve_stem("resnet18", "auto", 32) == "cifar"
    assert resolve_stem("resnet18", "auto", 33) == "imagenet"
    assert resolve_stem("resnet18", "auto", 28, init="imagenet") == "imagenet"
    assert resolve_stem("resnet18", "imagenet", 28) == "imagenet"
    assert resolve_stem("resnet8", "auto", 224) == "cifar"
    with pytest.raises(UserError, match="--stem cifar: resnet8 has its own 3x3 stem"):
        resolve_stem("resnet8", "cifar", 28)


def test_the_stem_is_printed_recorded_and_used_again(workplace, capsys):
    call(pretrain, *WORDS, "--arch", "resnet18", "--stem", "imagenet", "--size", 24, "--out", "one")
    out = capsys.readouterr().out
    assert "resnet18 with imagenet stem: the last feature map is 1 x 1" in out
    assert "WARNING: its last stage sees one pixel" in out
    call(pretrain, *WORDS, "--arch", "resnet18", "--size", 24, "--out", "three")
    assert "the last feature map is 3 x 3" in capsys.readouterr().out
    config = json.loads(Path("three/config.json").read_text())
    assert (config["stem"], config["feature_map"]) == ("cifar", 3)
    encoder = load_run("three")[2]
    assert encoder.conv1.kernel_size == (3, 3)


@pytest.fixture(scope="module")
def run(workplace):
    """A finished run of resnet8."""
    call(pretrain, *TINY, "--out", "start")
    return Path("start")


def test_init_continues_from_exactly_the_weights_of_a_run(run, monkeypatch):
    """The first step sees the weights of the run; their checksum is in config.json."""
    seen = []

    def record(model, *args):
        seen.append(module_sha256(model.encoder))
        return build_method(args[0], model, args[1])

    build_method = pretrain.build_method
    monkeypatch.setattr(
        pretrain, "build_method", lambda args, model, subset: record(model, args, subset)
    )
    call(pretrain, *TINY, "--init", run, "--out", "continued")
    config = json.loads(Path("continued/config.json").read_text())
    assert seen == [config["init_sha256"]] == [module_sha256(load_run(run)[2])]
    assert config["init"] == "start"
    assert module_sha256(load_run("continued")[2]) != seen[0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_init_takes_torchvisions_files(workplace, wrapped):
    torch.manual_seed(3)
    state = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": state} if wrapped else state, "resnet18.pth")
    words = [*WORDS, "--arch", "resnet18", "--stem", "imagenet", "--size", 24, "--lr", 0]
    call(pretrain, *words, "--init", "resnet18.pth", "--out", f"file{wrapped}")
    weights = load_tensors(f"file{wrapped}/encoder.pt")
    assert torch.equal(weights["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_init_from_safetensors(run):
    save_file = pytest.importorskip("safetensors.torch").save_file
    # Convolutions are stored channels last, which safetensors refuses.
    weights = load_tensors(run / "encoder.pt")
    save_file({key: w.contiguous() for key, w in weights.items()}, "encoder.safetensors")
    call(pretrain, *TINY, "--lr", 0, "--init", "encoder.safetensors", "--out", "safe")
    weights = [load_tensors(folder / "encoder.pt") for folder in (run, Path("safe"))]
    assert torch.equal(*(state["layer3.0.conv2.weight"] for state in weights))


def test_init_imagenet_downloads_and_brings_its_normalisation(workplace, monkeypatch, capsys):
    asked = []

    def download(self, **options):
        asked.append(self.url)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", download)
    words = [*WORDS, "--arch", "resnet18", "--size", 24, "--init", "imagenet", "--out", "imagenet"]
    call(pretrain, *words)
    assert len(asked) == 1 and "ImageNet's mean" in capsys.readouterr().out
    config, subset, _ = load_run("imagenet")
    assert config["stem"] == "imagenet" and (subset.mean, subset.std) == (
        IMAGENET_MEAN,
        IMAGENET_STD,
    )

    def fail(self, **options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", fail)
    with pytest.raises(UserError, match="cannot download https://.*resnet18.*put this file into"):
        call(pretrain, *words[:-1], "offline")


class Pickled:
    """An object that torch.load must not execute."""


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: torch.save(Pickled(), path), "no file of tensors"),
        (lambda path: path.write_bytes(pickle.dumps({"a": object()}, 4)), "no file of tensors"),
        (lambda path: path.write_bytes(b"text"), "no file of tensors"),
        (
            lambda path: torch.save(
                {k: v * torch.nan for k, v in build_encoder("resnet8").state_dict().items()}, path
            ),
            "holds NaN",
        ),
        (lambda path: torch.save({"epoch": 3}, path), "holds more than named tensors"),
        (
            lambda path: torch.save(build_encoder("resnet14").state_dict(), path),
            "not weights of this resnet8; Unexpected key.*layer1.1.conv1.weight",
        ),
        (
            lambda path: torch.save(torchvision.models.resnet18().state_dict(), path),
            r"size mismatch for conv1.weight: .*\[64, 3, 7, 7\].*\[16, 3, 3, 3\]",
        ),
    ],
)
def test_init_refuses_other_files(workplace, write, message):
    write(Path("other.pt"))
    with warnings.catch_warnings(), pytest.raises(UserError, match=message) as error:
        warnings.simplefilter("error")
        call(pretrain, *TINY, "--init", "other.pt", "--out", "refused")
    assert "\n" not in str(error.value) and not Path("refused").exists()
    Path("other.pt").unlink(missing_ok=True)


def test_init_of_a_run_with_other_classes_is_allowed_with_a_line(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "classes": ["cats", "dogs"]}))
    call(pretrain, *TINY, "--init", run, "--out", "other classes")
    assert "was trained on the classes ['cats', 'dogs']" in capsys.readouterr().out
    (run / "config.json").write_text(json.dumps(config))


def test_a_relu_ends_the_head_and_is_loaded_again(workplace):
    call(pretrain, *TINY, "--relu", "--out", "relu")
    assert json.loads(Path("relu/config.json").read_text())["relu"] is True
    model = ContrastiveModel("resnet8", relu=True)
    model.load_state_dict(load_tensors("relu/checkpoint.pt")["model"])
    z = model.eval()(torch.randn(4, 3, 16, 16, generator=make_generator(0)))
    assert (z >= 0).all() and (z == 0).any()


def test_the_recipe_is_a_flag(workplace):
    call(pretrain, *TINY, "--recipe", "natural", "--out", "natural")
    assert load_subset(SUBSET).recipe == "medical"
    config, subset, _ = load_run("natural")
    assert config["recipe"] == subset.recipe == "natural"


def test_the_untrained_floor_settles_batch_norm_and_keeps_the_weights(workplace, capsys):
    """--lr 0 is a forward pass: weights stay, running statistics move, as in a real run."""
    call(pretrain, *TINY, "--lr", 0, "--out", "floor")
    out = capsys.readouterr().out
    assert "do not settle batch norm; use the epochs of the real run" in out
    torch.manual_seed(0)
    untrained = ContrastiveModel("resnet8").encoder.state_dict()
    floor = load_tensors("floor/encoder.pt")
    assert torch.equal(floor["layer2.0.conv1.weight"], untrained["layer2.0.conv1.weight"])
    assert not torch.equal(floor["bn1.running_var"], untrained["bn1.running_var"])
    assert len(log_of(Path("floor"))) == 1


def test_random_streams_do_not_collide():
    numbers = [(7,), (7, 0), (7, 0, 0), (0, 7), (2**32,), (0, 1)]
    draws = {tuple(torch.rand(2, generator=make_generator(*n)).tolist()) for n in numbers}
    assert len(draws) == len(numbers)


def test_a_compiled_encoder_trains_to_the_same_file(workplace, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    call(pretrain, *TINY, "--out", "plain")
    call(pretrain, *TINY, "--compile", "--out", "compiled")
    assert {"dynamic": False} in compiled and "--compile: the first" in capsys.readouterr().out
    assert Path("plain/encoder.pt").read_bytes() == Path("compiled/encoder.pt").read_bytes()


def test_compile_without_a_compiler_is_refused_before_training(workplace, monkeypatch):
    def compile_nothing(function, **options):
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(UserError, match="^--compile: No working .* found; .* drop --compile$"):
        call(pretrain, *TINY, "--compile", "--out", "not compiled")
    assert not log_of(Path("not compiled"))
