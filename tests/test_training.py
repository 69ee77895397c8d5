"""The scripts as a user runs them: one image's way from subset to scores, stops and restarts, and every mistake's one line."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, equal, log_of, one_line, run_script
from scipy.stats import hypergeom

import common
import finetune
import linear_probe
import pretrain
from common import ContrastiveModel, load_run, load_subset, supcon_loss
from utils.cli import UserError


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny SupMin run."""
    call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke", "--device", "cpu")
    return Path("runs/digits/99-1/supmin/seed0")


# pre-training ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_returns_at_once_when_repeated(run, capsys):
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.json",
        "log.jsonl",
        "checkpoint.pt",
        "encoder.pt",
        "curves.png",
    }
    header = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert {
        "command",
        "commit",
        "device",
        "torch",
        "torchvision",
    } <= header.keys() and "pretrain.py" in header["command"]
    assert (
        json.loads((run / "config.json").read_text())["sha256"]
        == load_subset("subsets/digits/99-1.json").sha256
    )
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke", "--device", "cpu")
    assert "finished already" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_encoder_loads_into_torchvision(run):
    network = torchvision.models.resnet18()
    loaded = network.load_state_dict(
        torch.load(run / "encoder.pt", weights_only=True), strict=False
    )
    assert loaded.missing_keys == ["fc.weight", "fc.bias"] and not loaded.unexpected_keys


@pytest.mark.parametrize(
    "method, flags",
    [
        ("ntxent", []),
        ("supcon", ["--amp", "bf16"]),
        ("supmin", ["--majority-supervision", 0.5]),
        ("suppro", ["--margin", 0.5]),
    ],
)
def test_every_method_is_repeatable(workplace, method, flags):
    for name in "ab":
        call(
            pretrain,
            "subsets/digits/95-5.json",
            "--method",
            method,
            "--smoke",
            "--watch-every",
            0,
            "--out",
            f"{method}/{name}",
            *flags,
        )
    a, b = (
        [common.load_tensors(f"{method}/{name}/{file}.pt") for file in ("checkpoint", "encoder")]
        for name in "ab"
    )
    assert equal(a, b) and log_of(Path(method, "a")) == log_of(Path(method, "b"))
    if method == "suppro":
        assert torch.equal(a[0]["method"]["prototypes"][0], -a[0]["method"]["prototypes"][1])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_batches_are_filled_up_with_minority_images(k):
    is_minority = np.arange(200) % 25 == 0  # 8 of 200
    batches = common.shuffled_batches(200, 16, common.make_generator(3))
    filled = common.guarantee_minority(batches, is_minority, k, common.make_generator(4))
    assert [len(batch) for batch in filled] == [16] * 12
    for before, after in zip(batches, filled):
        assert (
            is_minority[after].sum() == max(k, is_minority[before].sum()) and len(set(after)) == 16
        )
        stays = before == after
        assert not is_minority[before[~stays]].any() and is_minority[after[~stays]].all()
    assert k == 1 or set(np.concatenate(filled)) >= set(
        np.flatnonzero(is_minority)
    )  # the remainder of an epoch sits out


def test_a_run_with_minority_images_in_every_batch(workplace, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        pretrain,
        "supcon_loss",
        lambda z, labels, temperature: (seen.append(labels), supcon_loss(z, labels, temperature))[
            1
        ],
    )
    call(
        pretrain,
        "subsets/digits/99-1.json",
        "--method",
        "supcon",
        "--smoke",
        "--minority-per-batch",
        5,
        "--out",
        "filled",
    )
    assert len(seen) == 2 and all((labels == 1).sum() >= 5 for labels in seen)
    assert (
        "filled up to 5 in each" in capsys.readouterr().out
        and json.loads(Path("filled/config.json").read_text())["minority_per_batch"] == 5
    )


def test_another_seed_gives_other_weights_on_the_same_rows(run, workplace):
    call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke", "--seed", 1)
    other = run.with_name("seed1")
    assert not equal(*(common.load_tensors(folder / "encoder.pt") for folder in (run, other)))
    one, two = (load_run(folder)[1] for folder in (run, other))
    assert one.sha256 == two.sha256 and all(
        np.array_equal(one.splits[split], two.splits[split]) for split in common.SPLITS
    )


def test_overfitting_one_batch_with_the_real_network_reaches_the_floor():
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 2
    model = ContrastiveModel("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        z = (
            model(torch.cat([images, images + 0.1 * torch.randn_like(images)]))
            .unflatten(0, (2, -1))
            .transpose(0, 1)
        )
        loss = supcon_loss(z, labels, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(
        math.log(15), abs=0.02
    )  # log|P|: 8 images of 2 views, less the anchor itself


def test_watch_counts_minority_images_per_batch_and_flags_collapse(workplace, capsys):
    subset, args = (
        load_subset("subsets/digits/99-1.json"),
        SimpleNamespace(temperature=0.1, margin=1.0),
    )
    model = SimpleNamespace(dim=8)
    pretrain.describe_batches(
        subset, 256, pretrain.SupPro(args, subset, model, common.make_generator(0))
    )
    assert "no fixed collapse value" in capsys.readouterr().out
    pretrain.describe_batches(
        subset, 256, pretrain.SupCon(args, subset, model, common.make_generator(0))
    )
    out = capsys.readouterr().out
    assert f"none in {hypergeom(626, 6, 256).pmf(0):.1%}" in out and "log(511) = 6.236" in out
    z = torch.nn.functional.normalize(
        torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    labels = (z[:, 0] > 0).long()
    assert (
        pretrain.knn_balanced_accuracy(z, labels)
        > 75
        > 60
        > pretrain.knn_balanced_accuracy(z, torch.arange(200) % 2)
    )


def test_watch_tells_a_collapse_from_a_spread_embedding(workplace):
    subset = load_subset("subsets/digits/99-1.json")
    args = SimpleNamespace(batch_size=64, chunk=None)

    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.normalize(torch.ones(len(x), 8), dim=1)

    class Pixels(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.normalize(x[:, 0].flatten(1), dim=1)

    for network, loss, collapsed in (
        (Constant(), common.collapse_value(64), True),
        (Pixels(), common.collapse_value(64), False),
        (Constant(), 3.0, False),
    ):
        stats = {
            "collapse_gap": common.collapse_value(64) - loss,
            **pretrain.watch(network, subset, torch.device("cpu"), args),
        }
        assert pretrain.has_collapsed(stats) == collapsed and not pretrain.has_collapsed(
            {**stats, "collapse_gap": None}
        )
    assert stats["val_saa"] == pytest.approx(
        [100 / 357] * 2, abs=1e-3
    )  # chance: one of the 357 other views


# probe and fine-tuning ------------------------------------------------------------------------------------------------


def test_a_real_run_takes_the_place_of_a_smoke_run_and_of_nothing_else(run, workplace):
    shutil.copytree(run, "runs/digits/99-1/supmin/seed7")
    place = Path("runs/digits/99-1/supmin/seed7")
    (place / "notes.txt").write_text("mine")
    call(
        pretrain,
        "subsets/digits/99-1.json",
        "--method",
        "supmin",
        "--arch",
        "resnet18",
        "--size",
        16,
        "--epochs",
        1,
        "--batch-size",
        313,
        "--out",
        place,
    )
    assert (
        json.loads((place / "config.json").read_text())["epochs"] == 1
        and (place / "notes.txt").exists()
    )
    with pytest.raises(UserError, match="smoke False there, True now"):
        call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke", "--out", place)


def test_predict_writes_a_probability_for_every_image(run, workplace):
    from PIL import Image
    from sklearn.datasets import load_digits

    Path("new/a folder").mkdir(parents=True, exist_ok=True)
    for i, scan in enumerate(load_digits().images[:4]):
        Image.fromarray((scan * 255 / 16).astype(np.uint8)).save(f"new/a folder/ziffer ä {i}.png")
    for script, args in ((linear_probe, ()), (finetune, ("--smoke",))):
        call(script, run, *args, "--predict", "new", "--csv", "new.csv")
        lines = Path("new.csv").read_text(encoding="utf-8").splitlines()
        assert (
            lines[0] == "file,p_5-9,predicted"
            and len(lines) == 5
            and lines[1].startswith("a folder/ziffer ä 0.png,")
        )
        for line in lines[1:]:
            _, p, predicted = line.split(",")
            assert 0 <= float(p) <= 1 and predicted == ("5-9" if float(p) > 0.5 else "0-4")
    Path("new/a folder/kaputt.jpg").write_bytes(b"not a picture")
    Path("new/broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(
        UserError,
        match="kaputt.jpg: cannot be read as an image .*, and 1 more like it; empty cells in new.csv",
    ):
        call(linear_probe, run, "--predict", "new", "--csv", "new.csv")
    with_broken = Path("new.csv").read_text(encoding="utf-8").splitlines()
    assert [line for line in with_broken if line.endswith(",,")] == [
        "a folder/kaputt.jpg,,",
        "broken.jpg,,",
    ]
    assert len(with_broken) == 7 and with_broken[2].startswith("a folder/ziffer ä 0.png,0.")
    with pytest.raises(
        UserError, match="--predict nowhere: no such folder"
    ):  # before any probe is trained
        call(linear_probe, "runs/no/run", "--predict", "nowhere", "--csv", "new.csv")


# mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_exit_code_2(run, workplace):
    one_line(
        run_script(
            "pretrain.py", "subsets/digits/99-1.json", "--method", "supcom", cwd=workplace, code=2
        ),
        "supcom",
        "supcon",
    )
    one_line(
        run_script("linear_probe.py", "runs/nowhere", cwd=workplace, code=2),
        "runs/nowhere/config.json",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(workplace):
    with pytest.raises(UserError, match="--device cuda"):
        call(pretrain, "subsets/digits/99-1.json", "--device", "cuda", "--smoke")


@pytest.mark.parametrize(
    "args, words",
    [
        (["subsets/digits/98-2.json"], "98-2.json: no such file.*make_subsets.py"),
        (["subsets/digits/99-1.json", "--batch-size", "627"], "--batch-size 627: .*only 626"),
        (["subsets/digits/99-1.json", "--arch", "vgg16"], "vgg16.*resnet50"),
        (["subsets/digits/99-1.json", "--method", "supcon", "--margin", "1"], "--margin.*suppro"),
        (
            ["subsets/digits/99-1.json", "--method", "supmin", "--majority-supervision", "1.5"],
            "--majority-supervision 1.5",
        ),
        (["subsets/digits/99-1.json", "--epochs", "0"], "--epochs"),
        (["subsets/digits/99-1.json", "--amp", "fp16"], "--amp fp16"),
        (["subsets/digits/99-1.json", "--lr", "nan"], "--lr"),
        (
            ["subsets/digits/99-1.json", "--minority-per-batch", "7", "--batch-size", "64"],
            "--minority-per-batch 7: .*use 6 or less",
        ),
        (
            [
                "subsets/digits/99-1.json",
                "--method",
                "paco",
                "--minority-per-batch",
                "2",
                "--batch-size",
                "64",
            ],
            "--minority-per-batch: paco corrects",
        ),
        (["subsets/digits/index.csv"], "index.csv: not a JSON file"),
    ],
)
def test_pretrain_refuses(workplace, args, words):
    with pytest.raises(UserError, match=words) as error:
        call(pretrain, *args, "--device", "cpu", "--out", "refused")
    assert "\n" not in str(error.value) and not Path("refused").exists()


def test_other_settings_and_foreign_checkpoints_are_refused_and_nothing_is_lost(run, workplace):
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="other settings.*epochs 2 there, 3 now"):
        call(pretrain, "subsets/digits/99-1.json", "--method", "supmin", "--smoke", "--epochs", 3)
    assert (run / "checkpoint.pt").read_bytes() == before
    shutil.copytree(run, "foreign")
    for content, words in (
        (b"not a checkpoint", "not a checkpoint"),
        (before[: len(before) // 2], "not a checkpoint"),
    ):
        Path("foreign/checkpoint.pt").write_bytes(content)
        Path("foreign/encoder.pt").write_bytes(content)
        config = json.loads(Path("foreign/config.json").read_text())
        Path("foreign/config.json").write_text(
            json.dumps({**config, "subset": "../subsets/digits/99-1.json"})
        )
        with pytest.raises(UserError, match=words):
            call(
                pretrain,
                "subsets/digits/99-1.json",
                "--method",
                "supmin",
                "--smoke",
                "--out",
                "foreign",
            )
        with pytest.raises(UserError, match="encoder.pt: not a checkpoint"):
            call(linear_probe, "foreign")
    torch.save(torchvision.models.resnet34().state_dict(), "foreign/encoder.pt")
    with pytest.raises(UserError, match="encoder.pt: holds other weights"):
        call(linear_probe, "foreign")


def test_changed_or_cut_images_are_noticed(run, workplace):
    shutil.copytree("subsets", "damaged/subsets")
    images = Path("damaged/subsets/digits/images.npy")
    content = images.read_bytes()
    for bad in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        images.write_bytes(bad)
        with pytest.raises(UserError, match="99-1.json.*checksum"):
            call(pretrain, "damaged/subsets/digits/99-1.json", "--smoke", "--out", "damaged/run")
    images.unlink()
    with pytest.raises(UserError, match="images.npy: no such file"):
        call(pretrain, "damaged/subsets/digits/99-1.json", "--smoke", "--out", "damaged/run")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r["splits"]["train"].append(10**6), "out of range"),
        (lambda r: r["splits"]["train"].append(r["splits"]["train"][0]), "doubled"),
        (lambda r: r["counts"]["val"].update({"0": 1}), "disagree"),
        (lambda r: r.pop("classes"), "not a subset"),
        (lambda r: r.update(recipe="strong"), "does not fit"),
    ],
)
def test_a_subset_file_edited_by_hand_is_refused(workplace, change, words):
    record = json.loads(Path("subsets/digits/99-1.json").read_text())
    change(record)
    Path("subsets/digits/edited.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=words):
        load_subset("subsets/digits/edited.json")


def test_an_output_that_cannot_be_written_is_one_line(workplace):
    Path("a file").write_text("")
    one_line(
        run_script(
            "pretrain.py",
            "subsets/digits/99-1.json",
            "--smoke",
            "--out",
            "a file/run",
            cwd=workplace,
            code=2,
        ),
        "a file",
        "--out",
    )
