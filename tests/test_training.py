"""Pre-training as a user runs it: files of a run, the collapse monitor, refused mistakes."""

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

import finetune
import linear_probe
import pretrain
from common import ContrastiveModel, Training, collapse_value, load_run, load_subset, supcon_loss
from datasets.loader import guarantee_minority, shuffled_batches
from datasets.source import SPLITS
from utils.cli import UserError
from utils.distributed import pick_device
from utils.runs import load_tensors, make_generator

SUBSET = "subsets/digits/99-1.json"
TINY = ["--smoke", "--arch", "resnet8", "--device", "cpu"]
RUN = [SUBSET, "--method", "supmin", "--smoke", "--stem", "imagenet", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny run of torchvision's smallest ResNet."""
    call(pretrain, *RUN)
    return Path("runs/digits/99-1/supmin/seed0")


def test_a_finished_run_has_its_files_and_returns_at_once(run, capsys):
    files = {"config.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "curves.png"}
    assert {path.name for path in run.iterdir()} == {".lock", *files}
    header = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert {"command", "commit", "device", "torch", "torchvision"} <= header.keys()
    config = json.loads((run / "config.json").read_text())
    assert config["sha256"] == load_subset(SUBSET).sha256
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    call(pretrain, *RUN)
    assert "finished already" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_encoder_loads_into_torchvision(run):
    weights = torch.load(run / "encoder.pt", weights_only=True)
    keys = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys


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
    words = [SUBSET, "--method", method, *TINY, "--size", 24, "--watch-every", 0, *flags]
    for name in "ab":
        call(pretrain, *words, "--out", f"{method}/{name}")
    a, b = (
        [load_tensors(f"{method}/{name}/{file}.pt") for file in ("checkpoint", "encoder")]
        for name in "ab"
    )
    assert equal(a, b) and log_of(Path(method, "a")) == log_of(Path(method, "b"))
    if method == "suppro":
        prototypes = a[0]["method"]["prototypes"]
        assert torch.equal(prototypes[0], -prototypes[1])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_every_batch_gets_its_minority_images(k):
    is_minority = np.arange(200) % 25 == 0  # 8 of 200
    batches = shuffled_batches(200, 16, make_generator(3))
    filled = guarantee_minority(batches, is_minority, k, make_generator(4))
    assert [len(batch) for batch in filled] == [16] * 12
    for before, after in zip(batches, filled, strict=True):
        assert is_minority[after].sum() == max(k, is_minority[before].sum())
        assert len(set(after)) == 16
        changed = before != after
        assert not is_minority[before[changed]].any() and is_minority[after[changed]].all()
    assert k == 1 or set(np.concatenate(filled)) >= set(np.flatnonzero(is_minority))


def test_a_run_guarantees_minority_images_in_every_batch(workplace, monkeypatch, capsys):
    seen = []

    def recording_loss(z, labels, temperature):
        seen.append(labels)
        return supcon_loss(z, labels, temperature)

    monkeypatch.setattr(pretrain, "supcon_loss", recording_loss)
    words = ["--method", "supcon", *TINY, "--size", 8, "--minority-per-batch", 5]
    call(pretrain, SUBSET, *words, "--out", "filled")
    assert len(seen) == 2 and all((labels == 1).sum() >= 5 for labels in seen)
    assert "filled up to 5" in capsys.readouterr().out
    assert json.loads(Path("filled/config.json").read_text())["minority_per_batch"] == 5


def test_another_seed_changes_weights_but_not_rows(workplace):
    for seed in (0, 1):
        call(pretrain, SUBSET, *TINY, "--epochs", 1, "--seed", seed, "--out", f"seeds/{seed}")
    assert not equal(*(load_tensors(f"seeds/{seed}/encoder.pt") for seed in (0, 1)))
    one, two = (load_run(f"seeds/{seed}")[1] for seed in (0, 1))
    assert one.sha256 == two.sha256
    assert all(np.array_equal(one.splits[split], two.splits[split]) for split in SPLITS)


def test_overfitting_one_batch_reaches_the_floor():
    """The floor of SupCon is log|P|: 8 images of 2 views, less the anchor itself."""
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 2
    model = ContrastiveModel("resnet8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        views = torch.stack([images, images + 0.1 * torch.randn_like(images)])
        loss = supcon_loss(model(views).transpose(0, 1), labels, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(15), abs=0.02)


def test_batch_statistics_are_printed(workplace, capsys):
    subset, model = load_subset(SUBSET), SimpleNamespace(dim=8)
    training = Training(10, 256, 0, 0.1, make_generator(0))
    args = SimpleNamespace(batch_size=256, minority_per_batch=None, warmup_epochs=1, epochs=10)
    pretrain.print_batch_statistics(args, subset, pretrain.SupPro(model, subset, training, 1.0))
    assert "no fixed collapse value" in capsys.readouterr().out
    pretrain.print_batch_statistics(args, subset, pretrain.SupCon(model, subset, training))
    out = capsys.readouterr().out
    assert (
        f"none in {hypergeom(626, 6, 256).pmf(0):.1%}" in out
        and "collapse value of the loss: 6.236" in out
    )


def test_knn_accuracy_is_high_for_labels_that_follow_the_embedding():
    z = torch.randn(200, 8, generator=make_generator(0))
    z = torch.nn.functional.normalize(z, dim=1)
    assert pretrain.knn_balanced_accuracy(z, (z[:, 0] > 0).long()) > 75
    assert pretrain.knn_balanced_accuracy(z, torch.arange(200) % 2) < 60


def test_monitor_tells_a_collapse_from_a_spread_embedding(workplace, monkeypatch):
    subset, value = load_subset(SUBSET), collapse_value(64)
    n = len(subset.splits["val"])
    spread = torch.randn(n, 8, generator=make_generator(0))
    spread[:, 0] += 9 * torch.from_numpy(subset.labels[subset.splits["val"]])
    spread = torch.nn.functional.normalize(spread, dim=1)
    point = torch.ones(n, 8) / 8**0.5
    for z, loss, collapsed in [(spread, value, False), (point, 3.0, False), (point, value, True)]:
        monkeypatch.setattr(pretrain, "embed", lambda *args, **options: torch.stack([z, z]))
        stats = pretrain.validate_embedding(None, subset, torch.device("cpu"), 64)
        assert pretrain.has_collapsed({**stats, "collapse_gap": value - loss}) == collapsed
        assert not pretrain.has_collapsed({**stats, "collapse_gap": None})
    # Chance: one of the 357 other views.
    assert stats["val_saa"] == pytest.approx([100 / 357] * 2, abs=1e-3)


def test_monitor_sees_every_class_of_a_large_validation_split(workplace, monkeypatch):
    subset, seen = load_subset(SUBSET), []
    first = [subset.splits["val"][subset.labels[subset.splits["val"]] == c][:1] for c in (0, 1)]
    subset.splits["val"] = np.concatenate([np.repeat(first[0], 90), first[1]])

    def embed(model, subset, rows, *args, **options):
        seen.append(subset.labels[rows].tolist())
        return torch.eye(len(rows), 8).expand(2, -1, -1)

    monkeypatch.setattr(pretrain, "embed", embed)
    monkeypatch.setattr(pretrain, "MONITORED_IMAGES", 20)
    pretrain.validate_embedding(None, subset, torch.device("cpu"), 64)
    assert sorted(seen[0]) == [0] * 20 + [1]


def test_a_real_run_replaces_a_smoke_run_and_not_the_reverse(run):
    folder = Path("runs/digits/99-1/supmin/seed7")
    shutil.copytree(run, folder)
    (folder / "notes.txt").write_text("mine")
    words = ["--method", "supmin", "--out", folder, "--arch", "resnet8", "--size", 16]
    call(pretrain, SUBSET, *words, "--epochs", 1, "--batch-size", 313)
    assert json.loads((folder / "config.json").read_text())["epochs"] == 1
    assert (folder / "notes.txt").exists()
    with pytest.raises(UserError, match="batch_size was 313, is 16; smoke was False, is True"):
        call(pretrain, SUBSET, *words, "--epochs", 1, "--batch-size", 16, "--smoke")


def test_a_run_without_a_checkpoint_gives_way_to_other_settings(workplace):
    folder = Path("early")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"smoke": False, "size": 224}))
    call(pretrain, SUBSET, *TINY, "--epochs", 1, "--watch-every", 0, "--out", folder)
    assert json.loads((folder / "config.json").read_text())["size"] == 32


def test_predict_writes_a_probability_for_every_image(run, workplace):
    from PIL import Image
    from sklearn.datasets import load_digits

    Path("new/a folder").mkdir(parents=True, exist_ok=True)
    for i, scan in enumerate(load_digits().images[:4]):
        Image.fromarray((scan * 255 / 16).astype(np.uint8)).save(f"new/a folder/ziffer ä {i}.png")
    for script in (linear_probe, finetune):
        call(script, run, "--smoke", "--predict", "new", "--csv", "new.csv")
        lines = Path("new.csv").read_text(encoding="utf-8").splitlines()
        assert lines[0] == "file,p_5-9,predicted,threshold" and len(lines) == 5
        assert lines[1].startswith("a folder/ziffer ä 0.png,")
        for line in lines[1:]:
            _, p, predicted, threshold = line.split(",")
            assert 0 <= float(p) <= 1
            assert predicted == ("5-9" if float(p) >= float(threshold) else "0-4")
    Path("new/a folder/kaputt.jpg").write_bytes(b"not a picture")
    Path("new/broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="kaputt.jpg: cannot be read as an image .*, and 1 more"):
        call(linear_probe, run, "--smoke", "--predict", "new", "--csv", "new.csv")
    lines = Path("new.csv").read_text(encoding="utf-8").splitlines()
    empty = [line for line in lines if line.endswith(",,,")]
    assert empty == ["a folder/kaputt.jpg,,,", "broken.jpg,,,"] and len(lines) == 7
    with pytest.raises(UserError, match="--predict nowhere: no such folder"):
        call(linear_probe, "runs/no/run", "--predict", "nowhere", "--csv", "new.csv")


def test_mistakes_are_one_line_and_exit_code_2(workplace):
    Path("a file").write_text("")
    refused = run_script("pretrain.py", SUBSET, "--method", "supcom", cwd=workplace, code=2)
    one_line(refused, "supcom", "supcon")
    words = [SUBSET, *TINY, "--out", "a file/run"]
    one_line(run_script("pretrain.py", *words, cwd=workplace, code=2), "a file", "another place")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused(workplace):
    with pytest.raises(UserError, match="--device cuda"):
        call(pretrain, SUBSET, "--device", "cuda", "--smoke")


@pytest.mark.parametrize(
    "words, message",
    [
        ("subsets/digits/98-2.json", "98-2.json: no such file.*make_subsets.py"),
        ("subsets/digits", "subsets/digits: is a folder; .*99-1.json"),
        ("subsets/digits/index.csv", "index.csv: not a JSON file"),
        (f"{SUBSET} --batch-size 627", "--batch-size 627: .* 626 training images"),
        (f"{SUBSET} --arch vgg16", "vgg16.*resnet8.*resnet50"),
        (f"{SUBSET} --method supcon --margin 1", "--margin: .*suppro"),
        (f"{SUBSET} --majority-supervision 1.5", "--majority-supervision 1.5"),
        (f"{SUBSET} --epochs 0", "--epochs"),
        (f"{SUBSET} --amp fp16", "--amp fp16"),
        (f"{SUBSET} --lr nan", "--lr"),
        (f"{SUBSET} --minority-per-batch 7 --batch-size 64", "-per-batch 7: .* at most 6"),
        (f"{SUBSET} --method paco --minority-per-batch 2", "--minority-per-batch: paco"),
    ],
)
def test_pretrain_refuses(workplace, words, message):
    with pytest.raises(UserError, match=message) as error:
        call(pretrain, *words.split(), "--device", "cpu", "--out", "refused")
    assert "\n" not in str(error.value) and not Path("refused").exists()


def test_other_settings_and_foreign_checkpoints_are_refused(run):
    words = RUN
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="other settings.*epochs was 2, is 3"):
        call(pretrain, *words, "--epochs", 3)
    assert (run / "checkpoint.pt").read_bytes() == before
    shutil.copytree(run, "foreign")
    config = json.loads(Path("foreign/config.json").read_text())
    config["subset"] = f"../{SUBSET}"
    Path("foreign/config.json").write_text(json.dumps(config))
    for content in (b"not a checkpoint", before[: len(before) // 2]):
        Path("foreign/checkpoint.pt").write_bytes(content)
        Path("foreign/encoder.pt").write_bytes(content)
        with pytest.raises(UserError, match="checkpoint.pt: not a checkpoint"):
            call(pretrain, *words, "--out", "foreign")
        with pytest.raises(UserError, match="encoder.pt: not a checkpoint"):
            call(linear_probe, "foreign")
    torch.save(torchvision.models.resnet34().state_dict(), "foreign/encoder.pt")
    with pytest.raises(UserError, match="encoder.pt: holds other weights"):
        call(linear_probe, "foreign")


def test_changed_images_are_noticed(workplace):
    shutil.copytree("subsets", "damaged/subsets")
    images = Path("damaged/subsets/digits/images.npy")
    content = images.read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        images.write_bytes(changed)
        with pytest.raises(UserError, match="images.npy or index.csv has changed"):
            load_subset(f"damaged/{SUBSET}")
    images.unlink()
    with pytest.raises(UserError, match="images.npy: no such file"):
        load_subset(f"damaged/{SUBSET}")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["splits"]["train"].append(10**6), "out of range"),
        (lambda r: r["splits"]["train"].append(r["splits"]["train"][0]), "overlap"),
        (lambda r: r["counts"]["val"].update({"0": 1}), "disagree"),
        (lambda r: r.pop("classes"), "not a subset"),
        (lambda r: r.update(recipe="strong"), "no augmentation recipe strong"),
    ],
)
def test_an_inconsistent_subset_is_refused(workplace, change, message):
    record = json.loads(Path(SUBSET).read_text())
    change(record)
    Path("subsets/digits/edited.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        load_subset("subsets/digits/edited.json")


def test_cudnn_tries_algorithms_where_a_script_asks_for_the_fastest():
    for deterministic, is_trying in ((False, True), (None, False)):
        pick_device("cpu", deterministic)
        assert torch.backends.cudnn.benchmark is is_trying
