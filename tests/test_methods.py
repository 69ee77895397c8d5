"""Every contrastive method through pretrain.py: repeatable, resumed with all it keeps, finite on whatever a batch holds."""

import copy
import inspect
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, equal, log_of, real_data

import common
import make_subsets
import pretrain
from baselines import SBCL, TSC, sbcl_loss
from common import Stopped, load_subset
from utils.cli import UserError
from utils.runs import make_generator

FORMS = {
    "ntxent": "",
    "supcon": "",
    "supmin": "--majority-supervision 0.5",
    "suppro": "--margin 0.5",
    "kcl": "",
    "kcl queue": "--queue 40 --k 1",
    "tsc": "",
    "tsc paper": "--variant paper",
    "tsc code": "--variant code --queue 20 --k 6",
    "sbcl": "",
    "sbcl paper": "--variant paper --recluster-every 1",
    "bcl": "",
    "bcl batchnorm": "--variant batchnorm --randaugment",
    "paco": "--queue 40",
    "paco published": "--alpha 0.05 --queue 40",
    "paco gpaco": "--variant gpaco --randaugment --queue 40",
}


def words(form):
    return ["--method", form.split()[0], *FORMS[form].split()]


def test_every_method_is_tried_here():
    assert {form.split()[0] for form in FORMS} == set(pretrain.METHODS)
    tried = {
        (form.split()[0], variant)
        for form in FORMS
        for variant in pretrain.VARIANTS.get(form.split()[0], ())
        if f"--variant {variant}" in FORMS[form]
        or variant == pretrain.OPTIONS[form.split()[0]]["variant"]
    }
    assert tried == {
        (name, variant) for name, variants in pretrain.VARIANTS.items() for variant in variants
    }


@pytest.mark.parametrize("form", FORMS)
def test_stopped_or_not_a_run_ends_the_same_to_the_last_bit(workplace, monkeypatch, form):
    """Stopped within epoch 3 of 4, after TSC's switch and SBCL's first clustering at its start, which only the checkpoint remembers.

    SBCL is given three sub-classes of the majority, which --smoke alone would not have.
    """
    monkeypatch.setattr("baselines.sbcl.count_subclasses", lambda counts: [3, 1])
    command = [
        "subsets/digits/95-5.json",
        *words(form),
        "--smoke",
        "--epochs",
        4,
        "--save-every",
        3,
        "--size",
        8,
        "--watch-every",
        0,
        "--out",
    ]
    call(pretrain, *command, f"{form}/whole")
    train_one_epoch = pretrain.train_one_epoch

    def signalled(epoch, *args):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_one_epoch(epoch, *args)

    monkeypatch.setattr(pretrain, "train_one_epoch", signalled)
    with pytest.raises(Stopped):
        call(pretrain, *command, f"{form}/stopped")
    assert common.load_tensors(Path(form, "stopped", "checkpoint.pt"))["within"]["step"] == 1
    monkeypatch.setattr(pretrain, "train_one_epoch", train_one_epoch)
    call(pretrain, *command, f"{form}/stopped")
    if form.startswith("sbcl"):
        assert len(state(f"{form}/whole")["subclasses"].unique()) > 2
    assert all(np.isfinite(line["loss"]) for line in log_of(Path(form, "whole")))
    assert log_of(Path(form, "whole")) == log_of(Path(form, "stopped"))
    for file in ("checkpoint.pt", "encoder.pt"):
        assert equal(
            *(common.load_tensors(Path(form, name, file)) for name in ("whole", "stopped"))
        )


def second_phase(args, subset, model):
    """The method in its last epoch: TSC with its targets, SBCL with sub-classes (of eval views of 8 px: they are only to be there)."""
    subset.size = 8
    method = pretrain.METHODS[args.method](args, subset, model, make_generator(0))
    for epoch in (0, args.epochs // 2, args.epochs - 1):
        method.start_epoch(epoch, model)
    return method


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return common.ContrastiveModel("resnet18", 128)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_minority_or_with_one_image_of_it_trains(
    workplace, network, monkeypatch, form, precision
):
    """Also in the second phase of methods that have two."""
    subset = load_subset("subsets/digits/99-1.json")
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            *words(form),
            "--batch-size",
            "8",
            "--epochs",
            "4",
        ],
    )
    args = pretrain.parse_args()
    method = second_phase(args, subset, network)
    x = torch.rand(method.views, 8, 3, 24, 24, generator=make_generator(1))
    for labels in ([0] * 8, [0] * 7 + [1], [1] * 8):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = method(network, x, torch.tensor(labels), torch.arange(8), make_generator(2))
        loss.backward()
        assert (
            loss.dtype == torch.float32
            and loss.isfinite()
            and all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
        )


def state(run):
    return common.load_tensors(Path(run, "checkpoint.pt"))["method"]


def test_targeted_training_switches_halfway_and_starts_afresh(workplace, monkeypatch):
    command = [
        "subsets/digits/95-5.json",
        "--method",
        "tsc",
        "--variant",
        "paper",
        "--smoke",
        "--epochs",
        8,
        "--warmup-epochs",
        2,
    ]
    fresh, warmup_cosine = [], pretrain.warmup_cosine

    def look(
        epoch, epochs, lr, warmup_epochs
    ):  # called when an epoch starts, with its optimizer in the caller's frame
        if warmup_epochs == 0:
            fresh.append(not inspect.currentframe().f_back.f_locals["optimizer"].state)
        return warmup_cosine(epoch, epochs, lr, warmup_epochs)

    monkeypatch.setattr(pretrain, "warmup_cosine", look)
    call(pretrain, *command, "--size", 8, "--watch-every", 0, "--save-every", 8, "--out", "switch")
    log = log_of(Path("switch"))
    assert [line["targeted"] for line in log] == [False] * 4 + [True] * 4
    cosine = [
        common.warmup_cosine(epoch, 4, 0.0625, warmup) for warmup in (2, 0) for epoch in range(4)
    ]
    np.testing.assert_allclose([line["lr"] for line in log], cosine)
    kept = state("switch")
    assert fresh == [True, False, False, False]  # no momentum of the first phase in the second
    assert kept["centroids"].norm(dim=1).sub(1).abs().max() < 1e-5 and torch.equal(
        kept["targets"][0], -kept["targets"][1]
    )
    assert (kept["centroids"] * kept["targets"]).sum() >= (
        kept["centroids"] * kept["targets"].flip(0)
    ).sum()


def test_targets_go_to_the_nearer_centroid_and_stay(workplace, network, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            "--method",
            "tsc",
            "--variant",
            "paper",
            "--epochs",
            "4",
        ],
    )
    method = TSC(
        pretrain.parse_args(), load_subset("subsets/digits/99-1.json"), network, make_generator(0)
    )
    before = method.targets.clone()
    for _ in range(60):
        method.update_centroids(before.flip(0), torch.tensor([0, 1]))
    method.start_epoch(2, network)
    assert torch.equal(method.targets, before.flip(0))
    method.start_epoch(3, network)
    assert torch.equal(method.targets, before.flip(0))
    method.update_centroids(
        torch.ones(3, 128), torch.tensor([0, 0, 0])
    )  # a class that is not there keeps its centroid
    torch.testing.assert_close(method.centroids[1], before[0])


def test_subclasses_part_the_classes_and_stay_until_the_next_clustering(
    workplace, network, monkeypatch
):
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            "--method",
            "sbcl",
            "--variant",
            "paper",
            "--size",
            "16",
        ],
    )
    args, subset = pretrain.parse_args(), load_subset("subsets/digits/99-1.json")
    subset.size = 16
    labels = torch.from_numpy(subset.labels[subset.splits["train"]])
    method = SBCL(args, subset, network, make_generator(0))
    method.start_epoch(0, network)
    assert method.facts["supcon_warmup"] and torch.equal(method.subclasses, labels)
    method.start_epoch(10, network)
    assert (
        not method.facts["supcon_warmup"]
        and method.facts["subclasses"] == [62, 1]
        and len(method.subclasses.unique()) > 30
    )
    for c in (0, 1):
        assert not set(method.subclasses[labels == c].tolist()) & set(
            method.subclasses[labels != c].tolist()
        )
    assert (method.coarse_temperatures > args.temperature).all()
    before = method.subclasses.clone()
    method.start_epoch(11, network)
    assert torch.equal(before, method.subclasses)
    for variant in pretrain.VARIANTS["sbcl"]:
        args.variant = variant
        one, other = (
            SBCL(args, subset, network, make_generator(0)),
            SBCL(args, subset, network, make_generator(0)),
        )
        one.recluster(network, make_generator(1))
        other.recluster(network, make_generator(1))
        assert torch.equal(one.subclasses, other.subclasses)
        if variant == "code":
            assert one.coarse_temperatures[1] == pytest.approx(
                args.temperature
            )  # the minority is in one piece


def test_subclasses_are_looked_up_by_the_image(workplace, network, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            "--method",
            "sbcl",
            "--variant",
            "paper",
            "--epochs",
            "4",
        ],
    )
    method = second_phase(pretrain.parse_args(), load_subset("subsets/digits/99-1.json"), network)
    positions = torch.tensor([5, 600, 17, 3, 44, 610, 80, 9])
    labels = torch.from_numpy(method.subset.labels[method.rows])[positions]
    method.subclasses[positions] = torch.tensor([1, 2, 1, 3, 3, 4, 1, 5])
    x = torch.rand(2, 8, 3, 8, 8, generator=make_generator(1))
    expected = sbcl_loss(
        network(x).transpose(0, 1),
        labels,
        torch.tensor([1, 2, 1, 3, 3, 4, 1, 5]),
        0.07,
        method.coarse_temperatures,
    )
    assert method(network, x, labels, positions, make_generator(0)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_partition_does_not_depend_on_the_order_of_the_images(workplace, network, monkeypatch):
    """Three clear groups of the majority, shuffled among the minority: found either way."""
    monkeypatch.setattr("sys.argv", ["pretrain.py", "subsets/digits/99-1.json", "--method", "sbcl"])
    subset = load_subset("subsets/digits/99-1.json")
    subset.splits["train"] = np.concatenate(
        [np.flatnonzero(subset.labels == 0)[:300], np.flatnonzero(subset.labels == 1)[:100]]
    )
    subset.counts["train"] = {"0": 300, "1": 100}
    groups = torch.nn.functional.normalize(torch.randn(4, 128, generator=make_generator(5)), dim=1)
    point = {row: groups[i // 100] for i, row in enumerate(subset.splits["train"])}
    monkeypatch.setattr(
        "baselines.sbcl.embed",
        lambda model, subset, rows, *args, **options: torch.stack([point[row] for row in rows]),
    )
    found = []
    for order in (np.arange(400), np.random.default_rng(0).permutation(400)):
        subset.splits["train"] = (
            subset.splits["train"][order] if len(found) else subset.splits["train"]
        )
        method = SBCL(pretrain.parse_args(), subset, network, make_generator(0))
        parts = []
        for number in range(20):  # k-means may start two centres in one group; some start has none
            method.recluster(network, make_generator(number))
            parts.append(
                {
                    frozenset(subset.splits["train"][method.subclasses.numpy() == c])
                    for c in method.subclasses.unique().tolist()
                }
            )
        found.append({frozenset(part) for part in parts if len(part) == 4})
    assert len(found[0]) == 1 and found[0] == found[1]


@pytest.mark.parametrize("every, epochs", [(1, [2, 3, 4]), (2, [2, 4]), (10, [2])])
def test_clustering_comes_anew_every_so_many_epochs(workplace, network, monkeypatch, every, epochs):
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            "--method",
            "sbcl",
            "--epochs",
            "5",
            "--recluster-every",
            str(every),
        ],
    )
    method = SBCL(
        pretrain.parse_args(), load_subset("subsets/digits/99-1.json"), network, make_generator(0)
    )
    seen = []
    monkeypatch.setattr(method, "recluster", lambda model, generator: seen.append(epoch))
    for epoch in range(5):
        method.start_epoch(epoch, network)
    assert seen == epochs


def test_a_collapsed_network_gives_no_temperature_from_rounding(workplace, network, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["pretrain.py", "subsets/digits/99-1.json", "--method", "sbcl", "--variant", "paper"],
    )
    method = SBCL(
        pretrain.parse_args(), load_subset("subsets/digits/99-1.json"), network, make_generator(0)
    )
    for noise in (0, 1e-8):
        z = torch.nn.functional.normalize(
            torch.ones(len(method.rows), 128)
            + noise * torch.randn(len(method.rows), 128, generator=make_generator(1)),
            dim=1,
        )
        monkeypatch.setattr("baselines.sbcl.embed", lambda *args, **options: z)
        method.recluster(network, make_generator(0))
        torch.testing.assert_close(method.coarse_temperatures, torch.full((2,), 0.07 * np.e))


@pytest.mark.parametrize("method, strong", [("bcl", [False, False, True]), ("paco", [True, False])])
def test_randaugment_is_on_the_view_of_the_classifier(workplace, monkeypatch, method, strong):
    seen = []
    monkeypatch.setattr(
        pretrain, "augment", lambda *args: seen.append(args[5]) or common.augment(*args)
    )
    call(
        pretrain,
        "subsets/digits/95-5.json",
        "--method",
        method,
        "--randaugment",
        "--smoke",
        "--epochs",
        1,
        "--size",
        8,
        "--watch-every",
        0,
        "--out",
        f"strong/{method}",
    )
    assert seen == 2 * strong  # two steps


def test_queues_fill_with_keys_and_their_labels(workplace):
    call(
        pretrain,
        "subsets/digits/95-5.json",
        "--method",
        "paco",
        "--queue",
        24,
        "--smoke",
        "--epochs",
        1,
        "--watch-every",
        0,
        "--out",
        "queue",
    )
    kept = state("queue")
    assert (kept["queue.labels"] >= 0).all() and kept["queue.next"] == (
        2 * 16
    ) % 24  # two steps of 16
    torch.testing.assert_close(kept["queue.keys"].norm(dim=1), torch.ones(24))
    slow, fast = (
        kept["key_encoder.model.encoder.conv1.weight"],
        common.load_tensors("queue/encoder.pt")["conv1.weight"],
    )
    torch.manual_seed(0)
    first = common.ContrastiveModel("resnet18").encoder.conv1.weight
    moved, way = (slow - first).norm(), (fast - first).norm()
    assert 0 < moved < 0.01 * way  # two steps of a thousandth


@pytest.mark.parametrize("form", FORMS)
def test_a_method_overfits_one_batch(workplace, network, monkeypatch, form):
    """Sixteen fixed images of two kinds, 25 steps: the loss falls, and neighbours are of one class."""
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            "subsets/digits/99-1.json",
            *words(form),
            "--batch-size",
            "16",
            "--epochs",
            "4",
        ],
    )
    args = pretrain.parse_args()
    model = copy.deepcopy(network)
    method = second_phase(args, load_subset("subsets/digits/99-1.json"), model)
    optimizer = torch.optim.SGD(
        [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad],
        lr=0.02,
        momentum=0.9,
    )
    labels = torch.tensor([0] * 12 + [1] * 4)
    x = torch.rand(16, 3, 8, 8, generator=make_generator(1)) + labels[
        :, None, None, None
    ] * torch.rand(3, 8, 8, generator=make_generator(2))
    x = (x + 0.1 * torch.randn(method.views, 16, 3, 8, 8, generator=make_generator(3)) - 0.7) / 0.4
    losses = []
    for step in range(25):
        loss = method(model, x, labels, torch.arange(16), make_generator(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if args.method == "paco" or not args.queue:  # a queue is easy at first: its vectors are random
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    z = model.eval()(x[:2]).detach()
    assert pretrain.knn_balanced_accuracy(z[0], labels, k=3) > 80


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--method", "tsc", "--variant", "published"],
            ["--variant published", "ttc, paper, code"],
        ),
        (["--method", "supcon", "--variant", "paper"], ["--variant", "tsc, sbcl, bcl or paco"]),
        (["--method", "supmin", "--k", "3"], ["--k", "kcl or tsc"]),
        (["--method", "kcl", "--queue", "-1"], ["--queue", "-1"]),
        (["--method", "sbcl", "--recluster-every", "0"], ["--recluster-every"]),
        (["--method", "kcl", "--alpha", "0.1"], ["--alpha", "paco"]),
        (["--method", "tsc", "--randaugment"], ["--randaugment", "bcl or paco"]),
        (
            ["--method", "supcon", "--amp", "bf16", "--size", "16", "--device", "cpu"],
            ["--amp bf16", "16 px", "--amp off"],
        ),
    ],
)
def test_refusals_name_the_flag_and_who_reads_it(workplace, args, words):
    with pytest.raises(UserError) as error:
        call(pretrain, "subsets/digits/99-1.json", *args)
    assert all(word in str(error.value) for word in words)


def test_every_method_trains_on_photographs(tmp_path_factory, monkeypatch):
    root = real_data("inat21_mini")
    monkeypatch.chdir(tmp_path_factory.mktemp("photographs"))
    call(
        make_subsets,
        "inat21-mammals",
        "--data-root",
        root,
        "--size",
        32,
        "--store-size",
        32,
        "--ratios",
        "95-5",
        "--workers",
        2,
    )
    for form in pretrain.METHODS:
        call(
            pretrain,
            "subsets/inat21-mammals/95-5.json",
            "--method",
            form,
            "--smoke",
            "--epochs",
            1,
            "--size",
            16,
            "--watch-every",
            0,
            "--out",
            form,
        )
        assert all(np.isfinite(line["loss"]) for line in log_of(Path(form)))
        assert json.loads(Path(form, "config.json").read_text())["method"] == form
