"""finetune.py as a user runs it: every loss and every re-training, what stays frozen, which images are trained on, stops and mistakes."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, equal, log_of

import common
import finetune
import linear_probe
import pretrain
from common import Stopped, load_run, load_subset
from utils.cli import UserError

SCRATCH = "subsets/digits/95-5.json"


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny SupMin run, with the linear classifier that lws and tau_norm ask for."""
    call(
        pretrain,
        SCRATCH,
        "--method",
        "supmin",
        "--smoke",
        "--device",
        "cpu",
        "--size",
        16,
        "--seed",
        3,
    )
    return Path("runs/digits/95-5/supmin/seed3")


@pytest.fixture(scope="module")
def classified(run):
    call(finetune, run, "--train", "head", "--loss", "ce", "--smoke", "--lr", 1e-2)
    return run


@pytest.fixture(scope="module")
def trained(workplace):
    """A supervised run that has learned a little."""
    call(
        finetune,
        SCRATCH,
        "--loss",
        "ce",
        "--arch",
        "resnet18",
        "--size",
        16,
        "--epochs",
        2,
        "--batch-size",
        64,
        "--lr",
        1e-3,
        "--no-augment",
        "--out",
        "trained",
    )
    return Path("trained")


def read(path):
    return json.loads(Path(path).read_text())


def record_losses(monkeypatch, name="ce"):
    """What the loop hands to a loss: the class counts, and (epoch, targets) of every batch."""
    made, seen = finetune.LOSSES[name], []

    def recorded(args, counts):
        seen.append(counts)
        loss = made(args, counts)
        return lambda logits, targets, epoch: (
            seen.append((epoch, targets.tolist())) or loss(logits, targets, epoch)
        )

    monkeypatch.setitem(finetune.LOSSES, name, recorded)
    return seen


# losses -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", finetune.LOSSES)
def test_supervised_baselines_from_scratch_and_from_a_run(run, loss):
    call(finetune, SCRATCH, "--loss", loss, "--smoke", "--size", 16)
    out = Path("runs/digits/95-5", loss, "seed0")
    result = read(out / "finetune.json")
    assert (
        set(result["test"]) == {"accuracy", "balanced_accuracy", "auroc", "f1"}
        and result["loss"] == loss == read(out / "config.json")["method"]
    )
    if loss == "ldam_drw":  # its encoder is a run like any other
        call(linear_probe, out, "--smoke")
        assert (out / "probe.json").exists()
    call(finetune, run, "--loss", loss, "--train", "head", "--smoke", "--out", f"tuned/{loss}")
    config = read(f"tuned/{loss}/config.json")
    assert (
        config["loss"] == loss and "method" not in config and config["seed"] == 3
    )  # the run's own


def test_supervised_training_learns(workplace):
    call(
        finetune,
        "subsets/digits/50-50.json",
        "--arch",
        "resnet18",
        "--size",
        16,
        "--epochs",
        4,
        "--batch-size",
        64,
        "--lr",
        1e-3,
        "--no-augment",
        "--out",
        "learns",
    )
    assert read("learns/finetune.json")["test"]["accuracy"] > 0.75


def loss_of(name, counts, epochs=10):
    return finetune.LOSSES[name](SimpleNamespace(loss=name, epochs=epochs, gamma=2.0), counts)


@pytest.mark.parametrize("epochs, switch", [(10, 8), (5, 4), (100, 80), (7, 5), (2, 1)])
def test_deferred_weights_start_at_four_fifths_of_the_epochs(epochs, switch):
    torch.manual_seed(0)
    cosines, targets = torch.rand(12, 2) * 2 - 1, torch.arange(12) % 2
    rare, common_ = (
        finetune.ldam_loss(cosines, targets, finetune.ldam_margins([90, 10])),
        loss_of("ldam_drw", [90, 10], epochs),
    )
    values = [common_(30 * cosines, targets, epoch).item() for epoch in range(epochs)]
    assert values[:switch] == pytest.approx([rare.item()] * switch)
    assert len(set(values[switch:])) == 1 and values[switch] != pytest.approx(rare.item(), rel=1e-3)
    weights = finetune.effective_number_weights([90, 10])
    assert values[switch] == pytest.approx(
        finetune.ldam_loss(
            cosines, targets, finetune.ldam_margins([90, 10]), weights=weights
        ).item()
    )


def test_validation_chooses_among_the_epochs_with_deferred_weights(run, monkeypatch):
    monkeypatch.setattr(
        finetune,
        "evaluate",
        lambda *args: {"accuracy": 0.5, "balanced_accuracy": 0.5, "auroc": 0.5, "f1": 0.5},
    )  # the earliest wins
    for loss, chosen in (("ldam_drw", 5), ("ce", 1)):
        call(
            finetune,
            run,
            "--loss",
            loss,
            "--train",
            "head",
            "--smoke",
            "--epochs",
            5,
            "--out",
            f"chosen/{loss}",
        )
        assert read(f"chosen/{loss}/finetune.json")["best_epoch"] == chosen


def test_logit_adjustment_with_equal_counts_is_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 2), torch.arange(12) % 2
    plain = F.cross_entropy(logits, targets).item()
    assert loss_of("logit_adjusted", [50, 50])(logits, targets, 0).item() == pytest.approx(plain)
    assert loss_of("logit_adjusted", [95, 5])(logits, targets, 0).item() == pytest.approx(
        F.cross_entropy(logits + torch.tensor([0.95, 0.05]).log(), targets).item()
    )


def network_of(folder, head, arch="resnet18"):
    """The network that a supervised run left in encoder.pt and classifier.pt."""
    encoder = common.build_encoder(arch)
    encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    head = finetune.HEADS[head](encoder.dim)
    head.load_state_dict(torch.load(folder / "classifier.pt", weights_only=True))
    return finetune.Classifier(encoder, head, frozen=True).eval()


@pytest.mark.parametrize("loss, head", [("ldam_drw", "cosine"), ("logit_adjusted", "linear")])
def test_predictions_know_no_margin_and_no_prior(workplace, loss, head):
    """Scores are those of the bare logits, although the loss of the best epoch saw margins or a prior."""
    words = [
        SCRATCH,
        "--loss",
        loss,
        "--arch",
        "resnet18",
        "--size",
        16,
        "--epochs",
        2,
        "--batch-size",
        64,
        "--lr",
        1e-3,
        "--fraction",
        0.5,
        "--out",
        f"bare/{loss}",
    ]
    call(finetune, *words)
    subset = load_subset(SCRATCH)
    subset.size, rows = 16, subset.splits["test"]
    network = network_of(Path("bare", loss), head)
    logits = common.embed(network, subset, rows, torch.device("cpu"))
    assert common.classification_scores(
        logits.double().softmax(1)[:, 1], subset.labels[rows], subset.minority
    ) == pytest.approx(read(f"bare/{loss}/finetune.json")["test"])
    if head == "cosine":
        assert logits.abs().max() <= 30.001 and set(network.head.state_dict()) == {"weight"}


# what is trained, and on which images ------------------------------------------------------------------------------------


def test_training_the_head_leaves_the_encoder_and_all_of_it_does_not(run):
    before = common.load_tensors(run / "encoder.pt")
    changed = {}
    for name, flags in (
        ("head", ["--train", "head"]),
        ("drift", ["--train", "head", "--bn-train"]),
        ("mlp", ["--train", "head", "--head", "mlp"]),
        ("all", []),
    ):
        call(finetune, run, *flags, "--smoke", "--out", f"parts/{name}")
        model = common.load_tensors(f"parts/{name}/checkpoint.pt")["model"]
        changed[name] = [
            key for key in before if not torch.equal(before[key], model["encoder." + key])
        ]
    assert changed["head"] == changed["mlp"] == [] and equal(
        before, common.load_tensors(run / "encoder.pt")
    )
    statistics = [
        key
        for key in before
        if key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert changed["drift"] == statistics and len(changed["all"]) == len(before)
    assert [
        tuple(value.shape) for value in common.load_tensors("parts/mlp/classifier.pt").values()
    ][0] == (512, 512)


def test_fine_tuning_a_supervised_run_leaves_its_own_scores(trained):
    before = (trained / "finetune.json").read_bytes()
    call(finetune, trained, "--train", "head", "--smoke")
    assert (trained / "finetune.json").read_bytes() == before and read(
        trained / "finetune/finetune.json"
    )["train"] == "head"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--train", "head"], "conv1.weight"),
        (["--train", "head"], "bn1.running_mean"),
        (["--retrain", "crt", "--bn-train"], "conv1.weight"),
    ],
)
def test_training_that_touches_a_frozen_encoder_is_caught(run, monkeypatch, flags, words):
    train_one_epoch = finetune.train_one_epoch

    def careless(epoch, steps, model, *args):
        model.encoder.state_dict()[words].add_(1e-3)
        return train_one_epoch(epoch, steps, model, *args)

    monkeypatch.setattr(finetune, "train_one_epoch", careless)
    with pytest.raises(RuntimeError, match="leave frozen"):
        call(finetune, run, *flags, "--smoke", "--out", f"careless/{words}{len(flags)}")
    assert not Path(f"careless/{words}{len(flags)}/finetune.json").exists()


def test_encoder_and_head_have_their_own_learning_rates(run):
    before = common.load_tensors(run / "encoder.pt")
    weights = [key for key in before if key.endswith(("weight", "bias"))]
    ends = {}
    for lr, head_lr in ((0, 0), (0, 1e-3), (1e-3, 0)):
        call(
            finetune,
            run,
            "--smoke",
            "--lr",
            lr,
            "--head-lr",
            head_lr,
            "--out",
            f"rates/{lr}-{head_lr}",
        )
        ends[lr, head_lr] = common.load_tensors(f"rates/{lr}-{head_lr}/checkpoint.pt")["model"]
        first = log_of(Path(f"rates/{lr}-{head_lr}"))[0]
        assert (first["lr"], first["head_lr"]) == (lr, head_lr)
    for (lr, head_lr), model in ends.items():
        assert all(
            torch.equal(before[key], model["encoder." + key]) == (lr == 0) for key in weights
        )
        assert torch.equal(model["head.weight"], ends[0, 0]["head.weight"]) == (head_lr == 0)


def test_rows_of_a_fraction_and_of_equal_classes(workplace):
    subset = load_subset(SCRATCH)
    majority, minority = subset.train_counts()

    def counts(fraction=1.0, subsample_balanced=False):
        rows = finetune.training_rows(
            subset, SimpleNamespace(fraction=fraction, subsample_balanced=subsample_balanced)
        )
        assert len(set(rows)) == len(rows) and set(rows) <= set(subset.splits["train"])
        return rows, np.bincount(subset.labels[rows]).tolist()

    assert counts()[1] == [majority, minority] and np.array_equal(
        counts()[0], subset.splits["train"]
    )
    assert counts(0.5)[1] == [round(majority / 2), round(minority / 2)] and counts(1e-6)[1] == [
        1,
        1,
    ]
    assert (
        counts(subsample_balanced=True)[1] == [minority] * 2
        and counts(0.5, True)[1] == [round(minority / 2)] * 2
    )
    assert set(counts(0.1)[0]) < set(counts(0.5)[0])


@pytest.mark.parametrize("loss", ["weighted_ce", "logit_adjusted", "ldam_drw"])
def test_the_loss_counts_the_images_really_trained_on(run, monkeypatch, loss):
    seen = record_losses(monkeypatch, loss)
    call(
        finetune,
        run,
        "--loss",
        loss,
        "--train",
        "head",
        "--fraction",
        0.2,
        "--epochs",
        2,
        "--batch-size",
        32,
        "--no-augment",
        "--out",
        f"fraction/{loss}",
    )
    majority, minority = load_subset(SCRATCH).train_counts()
    assert seen[0] == [round(majority / 5), round(minority / 5)]
    steps = sum(seen[0]) // 32
    assert [epoch for epoch, _ in seen[1:]] == [0] * steps + [1] * steps


def test_balanced_batches_are_balanced_and_others_are_not(run, monkeypatch):
    seen = record_losses(monkeypatch)
    for flags in ([], ["--balanced-batches"], ["--subsample-balanced"]):
        call(
            finetune,
            run,
            "--loss",
            "ce",
            "--train",
            "head",
            *flags,
            "--epochs",
            1,
            "--batch-size",
            32,
            "--no-augment",
            "--out",
            f"batches/{len(flags)}{flags}",
        )
    plain, balanced, subsampled = (
        part
        for part in np.split(
            np.array(seen, dtype=object), [i for i, x in enumerate(seen) if isinstance(x, list)][1:]
        )
    )
    counts = load_subset(SCRATCH).train_counts()
    assert (
        list(plain[0]) == counts
        and list(balanced[0]) == [1, 1]
        and list(subsampled[0]) == [min(counts)] * 2
    )  # what the loss sees
    assert (
        len(plain) == len(balanced) == 1 + sum(counts) // 32
        and len(subsampled) == 1 + 2 * min(counts) // 32
    )
    assert (
        {sum(targets) for _, targets in balanced[1:]}
        == {16}
        != {sum(targets) for _, targets in plain[1:]}
    )


# the classifier on a frozen encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", finetune.RETRAIN_EPOCHS)
def test_every_retraining_of_either_kind_of_run(classified, trained, way):
    for source, encoder_method in ((classified, "supmin"), (trained, "ce")):
        call(finetune, source, "--retrain", way, "--smoke")
        config, result = read(source / way / "config.json"), read(source / way / "finetune.json")
        assert (
            config["method"] == way
            and config["encoder_method"] == encoder_method
            and config["seed"] == config["encoder_seed"]
        )
        assert config["encoder_epochs"] == 2 and ("classifier_lr" in config) == (
            source == classified and way != "crt"
        )
        assert 0 <= result["test"]["auroc"] <= 1 and result[
            "encoder_sha256"
        ] == common.module_sha256(load_run(source)[2])
        assert (source / way / "classifier.pt").exists() and not (
            source / way / "encoder.pt"
        ).exists()


def test_crt_and_lws_keep_to_their_recipe(trained, monkeypatch):
    seen = record_losses(monkeypatch)
    for way, epochs in (("crt", 10), ("lws", 5)):
        call(finetune, trained, "--retrain", way, "--batch-size", 128, "--out", f"recipe/{way}")
        log, config, checkpoint = (
            log_of(Path("recipe", way)),
            read(f"recipe/{way}/config.json"),
            common.load_tensors(f"recipe/{way}/checkpoint.pt"),
        )
        assert (
            len(log) == config["epochs"] == epochs
            and log[0]["lr"] == config["lr"] == pytest.approx(0.05)
            and config["augment"]
        )
        group = checkpoint["optimizer"]["param_groups"][1]
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        best = max(
            range(epochs),
            key=lambda i: log[i]["val_auroc" if way == "crt" else "val_balanced_accuracy"],
        )
        assert read(f"recipe/{way}/finetune.json")["best_epoch"] == best + 1
    assert {sum(batch[1]) for batch in seen if isinstance(batch, tuple)} == {
        64
    }  # of 128: class-balanced
    state = checkpoint["optimizer"]["state"]
    assert [tuple(entry["momentum_buffer"].shape) for entry in state.values()] == [
        (2,)
    ]  # lws learns two numbers
    before, after = (
        common.load_tensors(trained / "classifier.pt"),
        common.load_tensors("recipe/lws/classifier.pt"),
    )
    assert all(
        torch.equal(before[key], after["classifier." + key]) for key in before
    ) and not torch.equal(after["scale"], torch.ones(2))
    assert not torch.equal(
        before["weight"], common.load_tensors("recipe/crt/classifier.pt")["weight"]
    )


def test_typed_settings_go_before_the_preset(trained):
    call(
        finetune,
        trained,
        "--retrain",
        "crt",
        "--epochs",
        1,
        "--lr",
        0.5,
        "--batch-size",
        64,
        "--no-augment",
        "--seed",
        4,
        "--out",
        "typed",
    )
    config = read("typed/config.json")
    assert (
        config["epochs"],
        config["lr"],
        config["augment"],
        config["seed"],
        config["encoder_seed"],
    ) == (1, 0.5, False, 4, 0)


def test_tau_normalisation_by_hand(trained):
    call(finetune, trained, "--retrain", "tau_norm", "--batch-size", 64, "--out", "taus")
    log, tau = log_of(Path("taus")), read("taus/finetune.json")["tau"]
    assert [line["tau"] for line in log] == pytest.approx(np.arange(21) / 10)
    subset = load_subset(SCRATCH)
    subset.size, rows = 16, subset.splits["val"]
    network = network_of(trained, "linear")
    weight = network.head.weight.detach().clone()
    torch.nn.init.zeros_(network.head.bias)
    for i, power in (
        (0, 0),
        (10, 1),
        (20, 2),
    ):  # the joint classifier without its bias, unit rows, and the end of the grid
        network.head.weight.data = weight / weight.norm(dim=1, keepdim=True) ** power
        logits = common.embed(network, subset, rows, torch.device("cpu"))
        expected = common.classification_scores(
            logits.double().softmax(1)[:, 1], subset.labels[rows], subset.minority
        )
        assert {f"val_{key}": value for key, value in expected.items()} == pytest.approx(
            {key: log[i][key] for key in log[i] if key.startswith("val_")}
        )
    assert max(log, key=lambda line: line["val_balanced_accuracy"])["tau"] == tau
    left = common.load_tensors("taus/classifier.pt")
    assert (
        torch.allclose(left["weight"].norm(dim=1), weight.norm(dim=1) ** (1 - tau))
        and not left["bias"].any()
    )


def test_the_rows_of_two_classes_keep_their_sum(run):
    """Why tau has little to do with two classes: the gradients at w_0 and w_1 are opposite, so only the initialisation sets them apart."""
    heads = {}
    for lr in (0, 1e-2):
        call(
            finetune,
            run,
            "--train",
            "head",
            "--loss",
            "ce",
            "--smoke",
            "--epochs",
            10,
            "--lr",
            lr,
            "--out",
            f"sums/{lr}",
        )
        heads[lr] = common.load_tensors(f"sums/{lr}/checkpoint.pt")["model"]["head.weight"]
    moved = heads[1e-2] - heads[0]
    assert moved.norm(dim=1).min() > 0.2 and moved.sum(0).norm() < 0.01 * moved[0].norm()


def test_a_classifier_that_does_not_fit_is_one_line_with_the_way_out(workplace):
    call(pretrain, SCRATCH, "--method", "supcon", "--smoke", "--size", 16, "--device", "cpu")
    supcon, make = (
        "runs/digits/95-5/supcon/seed0",
        "python finetune.py runs/digits/95-5/supcon/seed0 --train head --loss ce$",
    )
    for way in ("lws", "tau_norm"):
        with pytest.raises(
            UserError,
            match=f"seed0/finetune/classifier.pt: no such file; --retrain {way} needs a linear classifier .*{make}",
        ):
            call(finetune, supcon, "--retrain", way, "--smoke")
    call(finetune, supcon, "--smoke", "--head", "mlp")
    with pytest.raises(
        UserError,
        match=f"seed0/finetune: was made with train all, head mlp, loss weighted_ce; move it away.*{make}",
    ) as error:
        call(finetune, supcon, "--retrain", "lws", "--smoke")
    assert "\n" not in str(error.value) and not Path(supcon, "lws").exists()
    call(finetune, SCRATCH, "--loss", "ldam_drw", "--smoke", "--size", 16, "--out", "cosine")
    with pytest.raises(
        UserError, match="cosine/finetune/classifier.pt: no such file.*linear classifier"
    ):
        call(finetune, "cosine", "--retrain", "tau_norm", "--smoke")


# stops and mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["RUN"],
        [SCRATCH, "--loss", "ldam_drw", "--size", 16],
        ["RUN", "--retrain", "crt"],
        ["RUN", "--train", "head", "--bn-train", "--head", "mlp"],
    ],
)
def test_a_stopped_run_ends_bit_identical_and_a_finished_one_returns(
    run, words, monkeypatch, capsys
):
    words = [run if word == "RUN" else word for word in words] + ["--smoke", "--epochs", 4, "--out"]
    place = Path("stops", "-".join(map(str, words[1:-4])) or "plain")
    call(finetune, *words, place / "whole")
    train_one_epoch = finetune.train_one_epoch

    def signalled(epoch, *args):
        if epoch == 3:  # the deferred weights of four epochs start there
            os.kill(os.getpid(), signal.SIGINT)
        return train_one_epoch(epoch, *args)

    monkeypatch.setattr(finetune, "train_one_epoch", signalled)
    with pytest.raises(Stopped):
        call(finetune, *words, place / "stopped")
    monkeypatch.undo()
    call(finetune, *words, place / "stopped")
    whole, stopped = (
        common.load_tensors(place / name / "checkpoint.pt") for name in ("whole", "stopped")
    )
    assert all(
        equal(whole[part], stopped[part]) for part in ("model", "optimizer", "best")
    ) and log_of(place / "whole") == log_of(place / "stopped")
    before = (place / "whole/finetune.json").stat().st_mtime_ns
    call(finetune, *words, place / "whole")
    assert (
        "finished already" in capsys.readouterr().out
        and (place / "whole/finetune.json").stat().st_mtime_ns == before
    )


def test_tau_norm_again_and_other_settings(classified, capsys):
    for _ in range(2):
        call(finetune, classified, "--retrain", "tau_norm", "--smoke", "--out", "again")
    assert "finished already" in capsys.readouterr().out and len(log_of(Path("again"))) == 21
    with pytest.raises(UserError, match="other settings.*batch_size 16 there, 8 now"):
        call(
            finetune,
            classified,
            "--retrain",
            "tau_norm",
            "--smoke",
            "--batch-size",
            8,
            "--out",
            "again",
        )


@pytest.mark.parametrize(
    "args, words",
    [
        (["runs/nowhere"], "runs/nowhere: no such run folder"),
        ([SCRATCH, "--train", "head"], "--train head: needs a run"),
        ([SCRATCH, "--retrain", "crt"], "--retrain crt: needs a run"),
        ([SCRATCH, "--gamma", "1"], "--gamma: is read by --loss focal"),
        ([SCRATCH, "--predict", "new"], "--predict and --csv"),
        ([SCRATCH, "--fraction", "0"], "--fraction 0: must lie above 0"),
        ([SCRATCH, "--fraction", "1.5"], "--fraction 1.5"),
        ([SCRATCH, "--fraction", "0.01"], "--batch-size 256: .*only"),
        ([SCRATCH, "--bn-train"], "--bn-train: is about a frozen encoder"),
        ([SCRATCH, "--loss", "ldam_drw", "--head", "mlp"], "--head mlp: --loss ldam_drw brings"),
        (["RUN", "--arch", "resnet18"], "--arch resnet18: is for training from scratch"),
        (["RUN", "--train", "head", "--head-lr", "1"], "--head-lr: with --train head"),
        (["RUN", "--retrain", "crt", "--loss", "ce"], "--loss: is no choice in --retrain crt"),
        (["RUN", "--retrain", "lws", "--train", "head"], "--train: is no choice in --retrain lws"),
        (["RUN", "--retrain", "crt", "--subsample-balanced"], "--subsample-balanced: is no choice"),
        (
            ["RUN", "--retrain", "tau_norm", "--epochs", "3"],
            "--epochs: is no choice in --retrain tau_norm",
        ),
        (
            ["RUN", "--retrain", "tau_norm", "--bn-train"],
            "--bn-train: is no choice in --retrain tau_norm",
        ),
    ],
)
def test_finetune_refuses(run, args, words):
    with pytest.raises(UserError, match=words) as error:
        call(finetune, *(run if word == "RUN" else word for word in args), "--out", "refused")
    assert "\n" not in str(error.value) and not Path("refused").exists()


def test_diverged_training_is_one_line(workplace):
    with pytest.raises(UserError, match="not finite"):
        call(finetune, SCRATCH, "--smoke", "--lr", 1e12, "--out", "diverged")


def test_a_classifier_alone_is_no_run_to_probe(trained):
    call(finetune, trained, "--retrain", "crt", "--smoke", "--out", "alone")
    with pytest.raises(UserError, match="alone: holds a classifier alone"):
        call(linear_probe, "alone")


def test_predict_takes_a_finished_network_and_trains_none(run, classified, trained, workplace):
    from PIL import Image

    Path("new").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(f"new/{i}.png")
    for folder in (
        trained,
        classified / "finetune",
    ):  # a supervised run; a head on a run's frozen encoder
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        call(finetune, folder, "--predict", "new", "--csv", "new.csv")
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert len(Path("new.csv").read_text().splitlines()) == 3
