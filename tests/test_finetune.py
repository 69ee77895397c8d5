"""finetune.py: losses, frozen encoders, re-training, training rows, resumption and mistakes."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, equal, log_of
from PIL import Image

import finetune
import linear_probe
import pretrain
from baselines import effective_number_weights, finetune_task, ldam_loss, ldam_margins
from baselines.classification import HEADS, LOSSES, Classifier, load_classifier, make_loss
from common import build_encoder, embed, load_run, load_subset
from utils.cli import UserError
from utils.encoders import IMAGENET_MEAN
from utils.runs import load_tensors, module_sha256
from utils.scores import classification_scores, read_predictions, score_splits

SCRATCH = "subsets/digits/95-5.json"
SMALL = ("--arch", "resnet8", "--size", 8)
SCORES = ("accuracy", "balanced_accuracy", "auroc", "f1")


def pretrain_smoke(method, seed):
    call(pretrain, SCRATCH, "--method", method, "--smoke", *SMALL, "--seed", seed)
    return Path(f"runs/digits/95-5/{method}/seed{seed}")


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny contrastive run."""
    return pretrain_smoke("supmin", seed=3)


@pytest.fixture(scope="module")
def run_with_head(run):
    """The same run with the linear classifier that lws and tau_norm need."""
    call(finetune, run, "--train", "head", "--loss", "ce", "--smoke", "--lr", 1e-2)
    return run


@pytest.fixture(scope="module")
def supervised_run(workplace):
    """A supervised run that has learned a little."""
    call(finetune, SCRATCH, *"--loss ce --epochs 2 --batch-size 64 --lr 1e-3".split(), *SMALL)
    return Path("runs/digits/95-5/ce/seed0")


def read(path):
    return json.loads(Path(path).read_text())


def record_batches(monkeypatch):
    """Record the class counts that the loss gets, and (epoch, targets) of every batch."""
    counts_seen, batches_seen = [], []

    def make_recorded_loss(name, counts, epochs, gamma):
        loss = make_loss(name, counts, epochs, gamma)
        counts_seen.append(counts)

        def recorded(logits, targets, epoch):
            batches_seen.append((epoch, targets.tolist()))
            return loss(logits, targets, epoch)

        return recorded

    monkeypatch.setattr(finetune, "make_loss", make_recorded_loss)
    return counts_seen, batches_seen


# --------------------------------------------------------------------------------------------------
# losses
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_from_scratch_and_on_a_frozen_encoder(run, loss):
    call(finetune, SCRATCH, "--loss", loss, "--smoke", *SMALL, "--out", f"scratch/{loss}")
    result = read(f"scratch/{loss}/finetune.json")
    assert set(result["test"]) == set(result["val"]) > set(SCORES)
    assert result["loss"] == loss == read(f"scratch/{loss}/config.json")["method"]
    assert ("gamma" in result) == (loss == "focal")
    call(finetune, run, "--loss", loss, "--train", "head", "--smoke", "--out", f"tuned/{loss}")
    config = read(f"tuned/{loss}/config.json")
    assert config["loss"] == loss and "method" not in config
    assert config["seed"] == 3, "the default is the run's seed"


def test_scores_follow_from_predictions_csv(supervised_run):
    result, subset = read(supervised_run / "finetune.json"), load_subset(SCRATCH)
    table = read_predictions(supervised_run / "predictions.csv")
    assert list(table) == ["file", "split", "label", "p_minority"]
    p, labels = {}, {}
    for split in ("val", "test"):
        is_split = table["split"] == split
        p[split] = np.stack([1 - table["p_minority"], table["p_minority"]], 1)[is_split]
        labels[split] = table["label"][is_split]
        assert np.array_equal(labels[split], subset.labels[subset.splits[split]])
    assert score_splits(p, labels, minority=1).items() <= result.items()
    assert len(table["file"]) == len(set(table["file"])), "one line per image"


def test_an_encoder_trained_from_scratch_can_be_probed(supervised_run):
    call(linear_probe, supervised_run, "--smoke")
    assert (supervised_run / "probe.json").exists()


def test_training_from_scratch_learns(workplace):
    words = "--epochs 6 --batch-size 64 --lr 3e-3 --no-augment --out learns".split()
    call(finetune, "subsets/digits/50-50.json", *words, *SMALL)
    assert read("learns/finetune.json")["test"]["accuracy"] > 0.75


@pytest.mark.parametrize("epochs, switch", [(10, 8), (5, 4), (100, 80), (7, 5), (2, 1)])
def test_deferred_weights_begin_at_four_fifths_of_the_epochs(epochs, switch):
    torch.manual_seed(0)
    cosines, targets = torch.rand(12, 2) * 2 - 1, torch.arange(12) % 2
    margins, weights = ldam_margins([90, 10]), effective_number_weights([90, 10])
    unweighted = ldam_loss(cosines, targets, margins).item()
    weighted = ldam_loss(cosines, targets, margins, weights=weights).item()
    assert weighted != pytest.approx(unweighted, rel=1e-3)
    loss = make_loss("ldam_drw", [90, 10], epochs)
    values = [loss(30 * cosines, targets, epoch).item() for epoch in range(epochs)]
    assert values == pytest.approx([unweighted] * switch + [weighted] * (epochs - switch))


def test_only_epochs_with_deferred_weights_can_be_chosen(run, monkeypatch):
    tied = dict.fromkeys(SCORES, 0.5)
    monkeypatch.setattr(finetune, "classification_scores", lambda *args: tied)
    for loss, chosen in (("ldam_drw", 5), ("ce", 1)):
        words = f"--loss {loss} --train head --smoke --epochs 5 --out chosen/{loss}"
        call(finetune, run, *words.split())
        assert read(f"chosen/{loss}/finetune.json")["best_epoch"] == chosen


def test_logit_adjustment_adds_the_log_prior():
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 2), torch.arange(12) % 2
    plain = F.cross_entropy(logits, targets).item()
    assert make_loss("logit_adjusted", [50, 50], 1)(logits, targets, 0).item() == pytest.approx(
        plain
    )
    adjusted = F.cross_entropy(logits + torch.tensor([0.95, 0.05]).log(), targets).item()
    loss = make_loss("logit_adjusted", [95, 5], 1)
    assert loss(logits, targets, 0).item() == pytest.approx(adjusted)


def load_network(folder, head):
    """Build the network of a supervised run from its encoder.pt and classifier.pt."""
    encoder = build_encoder("resnet8")
    encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    head = HEADS[head](encoder.dim, 2)
    head.load_state_dict(torch.load(folder / "classifier.pt", weights_only=True))
    return Classifier(encoder, head, has_fixed_encoder=True).eval()


def score_logits(network, split):
    subset = load_subset(SCRATCH)
    subset.size, rows = 8, subset.splits[split]
    logits = embed(network, subset, rows, torch.device("cpu"))
    p = logits.double().softmax(1)[:, 1]
    return classification_scores(p, subset.labels[rows], subset.minority), logits


@pytest.mark.parametrize("loss, head", [("ldam_drw", "cosine"), ("logit_adjusted", "linear")])
def test_scores_use_logits_without_margin_or_prior(workplace, loss, head):
    words = f"--loss {loss} --epochs 2 --batch-size 64 --fraction 0.3 --out bare/{loss}"
    call(finetune, SCRATCH, *words.split(), *SMALL)
    network = load_network(Path("bare", loss), head)
    scores, logits = score_logits(network, "test")
    found = read(f"bare/{loss}/finetune.json")["test"]
    assert scores == pytest.approx({name: found[name] for name in SCORES})
    if head == "cosine":
        assert logits.abs().max() <= 30.001 and set(network.head.state_dict()) == {"weight"}


def test_predictions_that_were_deleted_are_written_again(run):
    words = "--train head --smoke --out deleted".split()
    for _ in range(2):
        call(finetune, run, *words)
        Path("deleted/predictions.csv").unlink()


# --------------------------------------------------------------------------------------------------
# what is trained, and on which images
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, changed_tensors",
    [
        ("--train head", "none"),
        ("--train head --head mlp", "none"),
        ("--train head --bn-train", "statistics"),
        ("--train all", "all"),
    ],
)
def test_only_what_is_trained_changes(run, flags, changed_tensors):
    before, out = load_tensors(run / "encoder.pt"), Path("changed", flags.replace(" ", ""))
    call(finetune, run, *flags.split(), "--smoke", "--out", out)
    model = load_tensors(out / "checkpoint.pt")["model"]
    changed = {key for key in before if not torch.equal(before[key], model[f"encoder.{key}"])}
    statistics = {key for key in before if "running" in key or "num_batches" in key}
    assert changed == {"none": set(), "statistics": statistics, "all": set(before)}[changed_tensors]
    assert (out / "encoder.pt").exists() == bool(changed)
    assert equal(before, load_tensors(run / "encoder.pt")), "the run keeps its encoder"
    if "mlp" in flags:
        assert load_tensors(out / "classifier.pt")["0.weight"].shape == (64, 64)


def test_fine_tuning_a_supervised_run_keeps_its_scores(supervised_run):
    before = (supervised_run / "finetune.json").read_bytes()
    call(finetune, supervised_run, "--train", "head", "--smoke")
    assert (supervised_run / "finetune.json").read_bytes() == before
    assert read(supervised_run / "finetune/finetune.json")["train"] == "head"


@pytest.mark.parametrize(
    "flags, tensor",
    [
        ("--train head", "conv1.weight"),
        ("--train head", "bn1.running_mean"),
        ("--retrain crt --bn-train", "conv1.weight"),
    ],
)
def test_a_change_of_the_frozen_encoder_is_an_error(run, monkeypatch, flags, tensor):
    def train_one_epoch(batch_loss, *args):
        model = batch_loss.args[0]
        model.encoder.state_dict()[tensor].add_(1e-3)
        return original(batch_loss, *args)

    original, out = finetune.train_one_epoch, f"frozen/{tensor}{len(flags)}"
    monkeypatch.setattr(finetune, "train_one_epoch", train_one_epoch)
    with pytest.raises(RuntimeError, match="changed the frozen encoder"):
        call(finetune, run, *flags.split(), "--smoke", "--out", out)
    assert not Path(out, "finetune.json").exists()


@pytest.mark.parametrize("lr, head_lr", [(0, 0), (0, 1e-3), (1e-3, 0)])
def test_encoder_and_head_have_their_own_learning_rates(run, lr, head_lr):
    out = Path(f"rates/{lr}-{head_lr}")
    call(finetune, run, "--smoke", "--lr", lr, "--head-lr", head_lr, "--out", out)
    first = log_of(out)[0]
    assert (first["lr"], first["head_lr"]) == (lr, head_lr)
    model, before = load_tensors(out / "checkpoint.pt")["model"], load_tensors(run / "encoder.pt")
    weights = [key for key in before if key.endswith(("weight", "bias"))]
    for key in weights:
        assert torch.equal(before[key], model[f"encoder.{key}"]) == (lr == 0), key
    torch.manual_seed(3)
    initial = torch.nn.Linear(64, 2)
    assert torch.equal(initial.weight, model["head.weight"]) == (head_lr == 0)


def select_rows(fraction, subsample_balanced=False):
    subset = load_subset(SCRATCH)
    flags = dict(fraction=fraction, subsample_balanced=subsample_balanced, batch_size=2)
    rows = finetune.select_training_rows(subset, SimpleNamespace(**flags))
    assert len(set(rows)) == len(rows) and set(rows) <= set(subset.splits["train"])
    return rows, np.bincount(subset.labels[rows]).tolist()


def test_training_rows_of_a_fraction_and_of_equal_classes(workplace):
    subset = load_subset(SCRATCH)
    majority, minority = subset.train_counts()
    assert np.array_equal(select_rows(1.0)[0], subset.splits["train"])
    assert select_rows(0.5)[1] == [round(majority / 2), round(minority / 2)]
    assert select_rows(1e-6)[1] == [1, 1], "at least one image of each class"
    assert select_rows(1.0, subsample_balanced=True)[1] == [minority] * 2
    assert select_rows(0.5, subsample_balanced=True)[1] == [round(minority / 2)] * 2
    assert set(select_rows(0.1)[0]) < set(select_rows(0.5)[0]), "smaller shares are contained"


def test_the_loss_gets_the_counts_of_the_images_trained_on(run, monkeypatch):
    counts, batches = record_batches(monkeypatch)
    words = "--train head --fraction 0.2 --epochs 2 --batch-size 32 --no-augment --out fraction"
    call(finetune, run, *words.split())
    expected = [round(n / 5) for n in load_subset(SCRATCH).train_counts()]
    steps = sum(expected) // 32
    assert counts == [expected]
    assert [epoch for epoch, _ in batches] == [0] * steps + [1] * steps


@pytest.mark.parametrize("flag", [None, "--balanced-batches", "--subsample-balanced"])
def test_balanced_batches_and_balanced_rows(run, monkeypatch, flag):
    counts, batches = record_batches(monkeypatch)
    words = f"--train head --epochs 1 --batch-size 32 --no-augment --out batches/{flag}".split()
    call(finetune, run, *words, *([flag] if flag else []))
    natural = load_subset(SCRATCH).train_counts()
    minority_per_batch = {sum(targets) for _, targets in batches}
    if flag == "--balanced-batches":
        assert counts == [[1, 1]] and minority_per_batch == {16}
    else:
        assert counts == [[min(natural)] * 2 if flag else natural]
        assert flag or max(minority_per_batch) < 16
    images = 2 * min(natural) if flag == "--subsample-balanced" else sum(natural)
    assert len(batches) == images // 32


# --------------------------------------------------------------------------------------------------
# --stem, --init, --recipe
# --------------------------------------------------------------------------------------------------


def test_the_stem_is_recorded_and_carried_to_the_next_training(workplace, tmp_path, capsys):
    words = "--arch resnet18 --size 16 --smoke --epochs 1".split()
    for stem, name, side in (("imagenet", "imagenet", 1), ("auto", "cifar", 2)):
        call(finetune, SCRATCH, *words, "--stem", stem, "--out", tmp_path / stem)
        config = read(tmp_path / stem / "config.json")
        assert (config["stem"], config["feature_map"]) == (name, side)
        has_warning = "last stage sees one pixel" in capsys.readouterr().out
        assert has_warning == (side == 1)
    call(finetune, tmp_path / "auto", "--train", "head", "--smoke")
    config = read(tmp_path / "auto/finetune/config.json")
    assert (config["arch"], config["stem"], config["feature_map"]) == ("resnet18", "cifar", 2)
    classifier = load_classifier(tmp_path / "auto/finetune/classifier.json")
    assert classifier.network.encoder.conv1.kernel_size == (3, 3)


def test_init_starts_from_the_weights_of_a_run(run, tmp_path):
    words = f"{SCRATCH} --smoke --lr 0 --init {run} --out".split()
    call(finetune, *words, tmp_path, *SMALL)
    config, encoder = read(tmp_path / "config.json"), load_run(run)[2]
    assert config["init"] == str(run) and config["init_sha256"] == module_sha256(encoder)
    expected, weights = encoder.state_dict(), load_tensors(tmp_path / "encoder.pt")
    for key in expected:
        assert "running" in key or "batches" in key or torch.equal(expected[key], weights[key])
    with pytest.raises(UserError, match=f"--init {run}: not weights of this resnet14; Missing"):
        call(finetune, *words, tmp_path / "other", "--arch", "resnet14", "--size", 8)
    assert not (tmp_path / "other").exists()


def test_imagenet_weights_come_with_imagenet_normalisation(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_task, "load_init", lambda *args: "checksum")
    words = "--init imagenet --arch resnet18 --size 8 --smoke --epochs 1 --out".split()
    call(finetune, SCRATCH, *words, tmp_path)
    config, subset, _ = load_run(tmp_path)
    assert subset.mean == IMAGENET_MEAN != load_subset(SCRATCH).mean
    assert (config["init_sha256"], config["stem"]) == ("checksum", "imagenet")


def test_the_recipe_is_the_one_of_the_subset_or_the_flag(run, tmp_path):
    logs = {}
    for flags in ("", "--recipe natural"):
        out = tmp_path / f"recipe{flags}"
        call(finetune, run, "--train", "head", "--smoke", *flags.split(), "--out", out)
        recipe = read(out / "config.json")["recipe"]
        logs[recipe] = log_of(out)
    assert set(logs) == {load_subset(SCRATCH).recipe, "natural"}
    assert len({log[0]["loss"] for log in logs.values()}) == 2, "other recipes give other views"


# --------------------------------------------------------------------------------------------------
# --retrain
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", finetune.RETRAIN)
def test_each_retraining_of_contrastive_and_supervised_runs(run_with_head, supervised_run, method):
    for source, encoder_method in ((run_with_head, "supmin"), (supervised_run, "ce")):
        call(finetune, source, "--retrain", method, "--smoke")
        config, result = (read(source / method / f"{name}.json") for name in ("config", "finetune"))
        assert (config["method"], config["encoder_method"]) == (method, encoder_method)
        assert config["seed"] == config["encoder_seed"] and config["encoder_epochs"] == 2
        has_settings_of_head = source == run_with_head and method != "crt"
        assert ("classifier_lr" in config) == has_settings_of_head
        assert "encoder_method" not in result and 0 <= result["test"]["auroc"] <= 1
        assert result["encoder_sha256"] == module_sha256(load_run(source)[2])
        assert (source / method / "classifier.pt").exists()
        assert not (source / method / "encoder.pt").exists()


def test_crt_and_lws_follow_their_recipe(supervised_run, monkeypatch):
    _, batches = record_batches(monkeypatch)
    checkpoints = {}
    recipe = {"crt": (10, "val_auroc"), "lws": (5, "val_balanced_accuracy")}
    for method, (epochs, criterion) in recipe.items():
        out = Path("recipe", method)
        call(finetune, supervised_run, "--retrain", method, "--batch-size", 128, "--out", out)
        log, config = log_of(out), read(out / "config.json")
        assert len(log) == config["epochs"] == epochs and config["augment"]
        assert log[0]["lr"] == config["lr"] == pytest.approx(0.2 * 128 / 512)
        checkpoints[method] = load_tensors(out / "checkpoint.pt")["optimizer"]
        group = checkpoints[method]["param_groups"][1]
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        best = max(range(epochs), key=lambda i, log=log, key=criterion: log[i][key])
        assert read(out / "finetune.json")["best_epoch"] == best + 1
    assert {sum(targets) for _, targets in batches} == {64}, "batches of 128 are balanced"
    momenta = [entry["momentum_buffer"].shape for entry in checkpoints["lws"]["state"].values()]
    assert momenta == [(2,)], "lws learns two numbers"
    before = load_tensors(supervised_run / "classifier.pt")
    scaled = load_tensors("recipe/lws/classifier.pt")
    assert all(torch.equal(before[key], scaled[f"classifier.{key}"]) for key in before)
    assert not torch.equal(scaled["scale"], torch.ones(2))
    new = load_tensors("recipe/crt/classifier.pt")
    assert not torch.equal(before["weight"], new["weight"])


def test_typed_flags_replace_the_defaults_of_a_recipe(supervised_run):
    words = "--retrain crt --epochs 1 --lr 0.5 --batch-size 64 --no-augment --seed 4 --out typed"
    call(finetune, supervised_run, *words.split())
    config = read("typed/config.json")
    assert (config["epochs"], config["lr"], config["batch_size"]) == (1, 0.5, 64)
    assert (config["augment"], config["seed"], config["encoder_seed"]) == (False, 4, 0)


def test_tau_normalisation_agrees_with_a_calculation_by_hand(supervised_run):
    call(finetune, supervised_run, "--retrain", "tau_norm", "--out", "taus")
    log, tau = log_of(Path("taus")), read("taus/finetune.json")["tau"]
    assert [line["tau"] for line in log] == pytest.approx(np.arange(21) / 10)
    network = load_network(supervised_run, "linear")
    weight = network.head.weight.detach().clone()
    torch.nn.init.zeros_(network.head.bias)
    for power in (0, 1, 2):
        network.head.weight.data = weight / weight.norm(dim=1, keepdim=True) ** power
        scores, _ = score_logits(network, "val")
        line = log[10 * power]
        assert scores == pytest.approx({name: line[f"val_{name}"] for name in SCORES})
    assert max(log, key=lambda line: line["val_balanced_accuracy"])["tau"] == tau
    left = load_tensors("taus/classifier.pt")
    assert torch.allclose(left["weight"].norm(dim=1), weight.norm(dim=1) ** (1 - tau))
    assert not left["bias"].any()


def test_cross_entropy_keeps_the_sum_of_the_two_weight_vectors(run):
    """The gradients at w_0 and w_1 are opposite, so tau-normalisation has little to balance."""
    heads = {}
    for lr in (0, 1e-2):
        words = f"--train head --loss ce --smoke --epochs 10 --lr {lr} --out sums/{lr}"
        call(finetune, run, *words.split())
        heads[lr] = load_tensors(f"sums/{lr}/checkpoint.pt")["model"]["head.weight"]
    moved = heads[1e-2] - heads[0]
    assert moved.norm(dim=1).min() > 0.2 and moved.sum(0).norm() < 0.01 * moved[0].norm()


def test_a_missing_or_unfit_classifier_is_an_error_with_the_command(workplace):
    run = pretrain_smoke("supcon", seed=0)
    command = f"python finetune.py {run} --train head --loss ce$"
    for method in ("lws", "tau_norm"):
        message = f"classifier.pt: no such file; --retrain {method} needs a linear .*{command}"
        with pytest.raises(UserError, match=message):
            call(finetune, run, "--retrain", method, "--smoke")
    call(finetune, run, "--smoke", "--head", "mlp")
    message = f"made with train all, head mlp, loss weighted_ce; move it away.*{command}"
    with pytest.raises(UserError, match=message) as error:
        call(finetune, run, "--retrain", "lws", "--smoke")
    assert "\n" not in str(error.value) and not (run / "lws").exists()
    call(finetune, SCRATCH, "--loss", "ldam_drw", "--smoke", *SMALL, "--out", "cosine")
    with pytest.raises(UserError, match="cosine/finetune/classifier.pt: no such file"):
        call(finetune, "cosine", "--retrain", "tau_norm", "--smoke")


# --------------------------------------------------------------------------------------------------
# stops, output and mistakes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "RUN",
        f"{SCRATCH} --loss ldam_drw --arch resnet8 --size 8",
        "RUN --retrain crt",
        "RUN --train head --bn-train --head mlp",
    ],
)
def test_a_stopped_run_ends_bit_identical(run, words, monkeypatch, capsys, tmp_path):
    words = words.replace("RUN", str(run)).split() + "--smoke --epochs 4 --out".split()
    call(finetune, *words, tmp_path / "whole")
    epochs = []

    def train_one_epoch(*args):
        epochs.append(len(epochs))
        if len(epochs) == 4:
            raise RuntimeError("stopped")
        return original(*args)

    original = finetune.train_one_epoch
    monkeypatch.setattr(finetune, "train_one_epoch", train_one_epoch)
    with pytest.raises(RuntimeError, match="stopped"):
        call(finetune, *words, tmp_path / "stopped")
    monkeypatch.undo()
    call(finetune, *words, tmp_path / "stopped")
    whole, stopped = (load_tensors(tmp_path / n / "checkpoint.pt") for n in ("whole", "stopped"))
    for name in ("model", "optimizer", "best"):
        assert equal(whole[name], stopped[name]), name
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    before = (tmp_path / "whole/finetune.json").stat().st_mtime_ns
    call(finetune, *words, tmp_path / "whole")
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "whole/finetune.json").stat().st_mtime_ns == before


def test_tau_norm_returns_when_finished_and_refuses_other_settings(run_with_head, capsys):
    words = "--retrain tau_norm --smoke --out again".split()
    for _ in range(2):
        call(finetune, run_with_head, *words)
    assert "finished already" in capsys.readouterr().out and len(log_of(Path("again"))) == 21
    with pytest.raises(UserError, match="other settings.*batch_size was 16, is 8"):
        call(finetune, run_with_head, *words, "--batch-size", 8)


def test_each_epoch_prints_one_line(run, capsys):
    call(finetune, run, "--train", "head", "--smoke", "--epochs", 3, "--out", "printed")
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for line, logged in zip(lines, log_of(Path("printed")), strict=True):
        assert f"loss {logged['loss']:.3f}" in line
        assert f"balanced accuracy {100 * logged['val_balanced_accuracy']:.1f} %" in line
        assert f"AUROC {100 * logged['val_auroc']:.1f} %" in line
    assert "\r" not in output.err, "no progress bar in a pipe"


@pytest.mark.parametrize(
    "words, message",
    [
        ("runs/nowhere", "runs/nowhere: no such run folder"),
        (f"{SCRATCH} --train head", "--train head: needs the trained encoder of a run"),
        (f"{SCRATCH} --retrain crt", "--retrain crt: needs the trained encoder of a run"),
        (f"{SCRATCH} --gamma 1", "--gamma: only --loss focal"),
        (f"{SCRATCH} --predict new", "--predict .*--csv"),
        (f"{SCRATCH} --fraction 0", "--fraction 0: give a share above 0"),
        (f"{SCRATCH} --fraction 1.5", "--fraction 1.5: give a share"),
        (f"{SCRATCH} --fraction 0.1", "--batch-size 256: .*; use --batch-size 63 or less"),
        (f"{SCRATCH} --no-augment --recipe natural", "--recipe: is not used with --no-augment"),
        (f"{SCRATCH} --export a.pth", "--export a.pth: give a file name that ends in .pt2"),
        (f"{SCRATCH} --bn-train", "--bn-train: needs a frozen encoder"),
        (f"{SCRATCH} --loss ldam_drw --head mlp", "--head: cannot .* with --loss ldam_drw"),
        ("RUN/encoder.pt", "encoder.pt: is a file of a run; give its folder, runs"),
        ("subsets/digits/images.npy", "images.npy: not a subset file; give weights as --init"),
        ("RUN --arch resnet18", "--arch: .* has its network"),
        ("RUN --stem cifar", "--stem: .* has its network"),
        ("RUN --init imagenet", "--init: .* has its network"),
        (f"{SCRATCH} --arch resnet8 --stem cifar", "--stem cifar: resnet8 has its own"),
        (f"{SCRATCH} --init nowhere.pt", "--init nowhere.pt: no such file"),
        ("RUN --train head --head-lr 1", "--head-lr: only the head is trained"),
        ("RUN --train head --compile", "--compile: only training compiles"),
        ("RUN --retrain crt --loss ce", "--loss: cannot .* with --retrain crt; leave it out"),
        ("RUN --retrain lws --train=head", "--train: cannot .* with --retrain lws"),
        ("RUN --retrain crt --subsample-balanced", "--subsample-balanced: cannot"),
        ("RUN --retrain tau_norm --epochs 3", "--epochs: cannot .* with --retrain tau_norm"),
        ("RUN --retrain tau_norm --lr 1", "--lr: cannot .* with --retrain tau_norm"),
        ("RUN --retrain tau_norm --bn-train", "--bn-train: cannot"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, words, message):
    with pytest.raises(UserError, match=message) as error:
        call(finetune, *words.replace("RUN", str(run)).split(), "--out", "refused")
    assert "\n" not in str(error.value) and not Path("refused").exists()


def test_diverged_training_is_one_line(workplace):
    with pytest.raises(UserError, match="not finite"):
        call(finetune, SCRATCH, "--smoke", *SMALL, "--lr", 1e12, "--out", "diverged")


def test_a_folder_without_encoder_cannot_be_probed(run_with_head):
    with pytest.raises(UserError, match="finetune: holds only a classifier"):
        call(linear_probe, run_with_head / "finetune")


def test_predict_reuses_a_finished_network(run_with_head, supervised_run, tmp_path, capsys):
    rng, table = np.random.default_rng(0), tmp_path / "new.csv"
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    for folder in (supervised_run, run_with_head / "finetune"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        call(finetune, folder, "--predict", tmp_path, "--csv", table)
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        is_smoke = folder != supervised_run
        assert ("trained with --smoke" in capsys.readouterr().out) == is_smoke
        with open(table, newline="") as file:
            assert [row["file"] for row in csv.DictReader(file)] == ["0.png", "1.png"]
