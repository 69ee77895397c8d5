"""Every contrastive method in pretrain.py: repeatable, resumable, finite for any batch."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, equal, log_of, real_data

import make_subsets
import pretrain
from baselines import TSC, sbcl_loss
from common import ContrastiveModel, load_subset, warmup_cosine
from datasets.augment import augment_views
from datasets.loader import Batch
from utils.cli import UserError
from utils.runs import load_tensors, make_generator

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
SUBSET = "subsets/digits/99-1.json"
SMOKE = "--smoke --arch resnet8 --size 8 --watch-every 0".split()


def words(form):
    """Return the flags of a form of a method."""
    return ["--method", form.split()[0], *FORMS[form].split()]


def train(*flags, out):
    call(pretrain, "subsets/digits/95-5.json", *SMOKE, *flags, "--out", out)


def build(model, *flags, subset=None):
    """Return the method that these flags of pretrain.py select, untrained."""
    args = pretrain.parse_args([SUBSET, *map(str, flags)])
    return pretrain.build_method(args, model, subset or load_subset(SUBSET))


def second_phase(args, subset, model):
    """Return the method in its last epoch: TSC with its targets, SBCL with sub-classes."""
    subset.size = 8
    method = pretrain.build_method(args, model, subset)
    for epoch in (0, args.epochs // 2, args.epochs - 1):
        method.start_epoch(epoch, model)
    return method


def method_state(run):
    return load_tensors(Path(run, "checkpoint.pt"))["method"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these small trainings."""
    monkeypatch.setattr(pretrain, "plot_curves", lambda out, value: None)


@pytest.fixture
def small_subset(workplace, monkeypatch):
    """32 training images, and three sub-classes of the majority, which --smoke has not."""
    monkeypatch.setattr("baselines.sbcl.count_subclasses", lambda counts: [3, 1])
    return load_subset(SUBSET).limit_for_smoke()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ContrastiveModel("resnet8", 128)


def test_every_method_and_variant_is_a_form():
    assert {form.split()[0] for form in FORMS} == set(pretrain.METHODS)
    for method, variants in pretrain.VARIANTS.items():
        args = [pretrain.parse_args([SUBSET, *words(form)]) for form in FORMS]
        assert {a.variant for a in args if a.method == method} == set(variants)


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_continues_to_the_same_bits(small_subset, monkeypatch, form):
    """Stop in epoch 4 of 4: TSC's switch and SBCL's clustering are then only in the checkpoint."""
    flags = [*words(form), "--epochs", 4, "--save-every", 3]
    train(*flags, out=f"{form}/straight")
    train_one_epoch, epochs = pretrain.train_one_epoch, []

    def stop_in_epoch_4(*args):
        epochs.append(len(epochs))
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return train_one_epoch(*args)

    monkeypatch.setattr(pretrain, "train_one_epoch", stop_in_epoch_4)
    with pytest.raises(KeyboardInterrupt):
        train(*flags, out=f"{form}/stopped")
    train(*flags, out=f"{form}/stopped")
    assert len(epochs) == 5
    straight, stopped = Path(form, "straight"), Path(form, "stopped")
    if form.startswith("sbcl"):
        assert len(method_state(straight)["subclasses"].unique()) > 2
    assert all(np.isfinite(line["loss"]) for line in log_of(straight))
    assert log_of(straight) == log_of(stopped)
    for file in ("checkpoint.pt", "encoder.pt"):
        assert equal(load_tensors(straight / file), load_tensors(stopped / file))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_with_no_or_one_minority_image_trains(small_subset, network, form, precision):
    args = pretrain.parse_args([SUBSET, *words(form), "--batch-size", "8", "--epochs", "4"])
    method = second_phase(args, small_subset, network)
    x = torch.rand(method.views, 8, 3, 24, 24, generator=make_generator(1))
    for labels in ([0] * 8, [0] * 7 + [1], [1] * 8):
        network.zero_grad()
        batch = Batch(x, *[torch.tensor(labels)] * 2, torch.arange(8), make_generator(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = method(network, batch)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_method_overfits_one_batch(small_subset, network, form):
    """The loss of 16 images of two kinds falls, and neighbours share their class."""
    args = pretrain.parse_args([SUBSET, *words(form), "--batch-size", "16", "--epochs", "4"])
    model = copy.deepcopy(network)
    method = second_phase(args, small_subset, model)
    trainable = [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9)
    labels = torch.tensor([0] * 12 + [1] * 4)
    pattern = 2 * torch.rand(3, 8, 8, generator=make_generator(2))
    x = torch.rand(16, 3, 8, 8, generator=make_generator(1)) + labels[:, None, None, None] * pattern
    x = x + 0.1 * torch.randn(method.views, 16, 3, 8, 8, generator=make_generator(3))
    batch, losses = Batch((x - 0.7) / 0.4, labels, labels, torch.arange(16), None), []
    for _ in range(25):
        batch.generator = make_generator(0)  # the same draws in each step
        loss = method(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # With a queue, KCL and TSC begin with random keys, which are easy to tell apart.
    if args.method == "paco" or not args.queue:
        assert np.mean(losses[-3:]) < losses[0] - 0.2
    # NT-Xent does not use the labels; chance is 50.
    z = model.eval()(batch.x[:2]).detach()
    assert form == "ntxent" or pretrain.knn_balanced_accuracy(z[0], labels, k=3) > 70


# TSC ----------------------------------------------------------------------------------------------


def test_tsc_switches_halfway_and_restarts_the_optimizer(workplace, monkeypatch):
    train_one_epoch, is_fresh = pretrain.train_one_epoch, []

    def record_state(loss_of_batch, batches, optimizer, *args):
        is_fresh.append(not optimizer.state)
        return train_one_epoch(loss_of_batch, batches, optimizer, *args)

    monkeypatch.setattr(pretrain, "train_one_epoch", record_state)
    flags = "--method tsc --variant paper --epochs 8 --warmup-epochs 2 --save-every 8"
    train(*flags.split(), out="switch")
    log, state = log_of(Path("switch")), method_state("switch")
    assert is_fresh == [True, False, False, False] * 2
    assert [line["targeted"] for line in log] == [False] * 4 + [True] * 4
    lr = [warmup_cosine(epoch, 4, 0.0625, warmup) for warmup in (2, 0) for epoch in range(4)]
    np.testing.assert_allclose([line["lr"] for line in log], lr)
    centroids, targets = state["centroids"], state["targets"]
    assert (centroids.norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.equal(targets[0], -targets[1])
    assert (centroids * targets).sum() >= (centroids * targets.flip(0)).sum()


def test_tsc_gives_each_class_the_nearer_target_for_good(workplace, network):
    method = build(network, "--method", "tsc", "--variant", "paper", "--epochs", 4)
    assert isinstance(method, TSC)
    before = method.targets.clone()
    for _ in range(60):
        method.update_centroids(before.flip(0), torch.tensor([0, 1]))
    for epoch in (2, 3):
        method.start_epoch(epoch, network)
        assert torch.equal(method.targets, before.flip(0))
    # The centroid of a class that the batch lacks stays.
    method.update_centroids(torch.ones(3, 128), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(method.centroids[1], before[0])


# SBCL ---------------------------------------------------------------------------------------------


def test_subclasses_split_the_classes_and_stay_until_the_next_clustering(workplace, network):
    flags = ["--method", "sbcl", "--variant", "paper"]
    subset = load_subset(SUBSET)
    subset.size = 8
    labels = torch.from_numpy(subset.labels[subset.splits["train"]])
    method = build(network, *flags, subset=subset)
    method.start_epoch(0, network)
    assert method.log_fields["supcon_warmup"] and torch.equal(method.subclasses, labels)
    method.start_epoch(10, network)
    assert not method.log_fields["supcon_warmup"]
    assert method.log_fields["subclasses"] == [62, 1] and len(method.subclasses.unique()) > 30
    ids = [set(method.subclasses[labels == c].tolist()) for c in (0, 1)]
    assert not ids[0] & ids[1]
    assert (method.coarse_temperatures > 0.07).all()
    before = method.subclasses.clone()
    method.start_epoch(11, network)
    assert torch.equal(before, method.subclasses)


@pytest.mark.parametrize("variant", pretrain.VARIANTS["sbcl"])
def test_clustering_repeats_from_its_generator(workplace, network, variant):
    subset = load_subset(SUBSET)
    subset.size = 8
    one, other = (
        build(network, "--method", "sbcl", "--variant", variant, subset=subset) for _ in range(2)
    )
    one.recluster(network, make_generator(1))
    other.recluster(network, make_generator(1))
    assert torch.equal(one.subclasses, other.subclasses)
    # The minority is one sub-class and keeps T.
    minority_keeps_t = one.coarse_temperatures[1].item() == pytest.approx(0.07)
    assert minority_keeps_t == (variant == "code")


def test_subclasses_are_looked_up_by_the_position_of_the_image(workplace, network):
    flags = [SUBSET, "--method", "sbcl", "--variant", "paper", "--epochs", "4"]
    method = second_phase(pretrain.parse_args(flags), load_subset(SUBSET), network)
    positions = torch.tensor([5, 600, 17, 3, 44, 610, 80, 9])
    subclasses = torch.tensor([1, 2, 1, 3, 3, 4, 1, 5])
    labels = torch.from_numpy(method.subset.labels[method.rows])[positions]
    method.subclasses[positions] = subclasses
    x = torch.rand(2, 8, 3, 8, 8, generator=make_generator(1))
    z, temperatures = network(x).transpose(0, 1), method.coarse_temperatures
    expected = sbcl_loss(z, labels, subclasses, 0.07, temperatures)
    loss = method(network, Batch(x, labels, labels, positions, make_generator(0)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_subclasses_do_not_depend_on_the_order_of_the_images(workplace, network, monkeypatch):
    """Three clear groups of the majority are found in any order of the rows."""
    subset = load_subset(SUBSET)
    rows = [np.flatnonzero(subset.labels == c)[:count] for c, count in ((0, 300), (1, 100))]
    rows = np.concatenate(rows)
    subset.counts["train"] = {"0": 300, "1": 100}
    groups = F.normalize(torch.randn(4, 128, generator=make_generator(5)), dim=1)
    z = {row: groups[i // 100] for i, row in enumerate(rows)}
    monkeypatch.setattr(
        "baselines.sbcl.embed",
        lambda model, subset, rows, *args, **options: torch.stack([z[row] for row in rows]),
    )
    partitions = []
    for order in (np.arange(400), np.random.default_rng(0).permutation(400)):
        subset.splits["train"] = rows[order]
        method = build(network, "--method", "sbcl", subset=subset)
        found = set()
        # k-means may start two centres in one group; some of 20 starts do not.
        for seed in range(20):
            method.recluster(network, make_generator(seed))
            ids = method.subclasses.numpy()
            partition = frozenset(frozenset(rows[order][ids == c]) for c in np.unique(ids))
            found |= {partition} if len(partition) == 4 else set()
        partitions.append(found)
    assert len(partitions[0]) == 1 and partitions[0] == partitions[1]


@pytest.mark.parametrize("every, epochs", [(1, [2, 3, 4]), (2, [2, 4]), (10, [2])])
def test_clustering_starts_after_the_warmup_and_recurs(
    workplace, network, monkeypatch, every, epochs
):
    method = build(network, "--method", "sbcl", "--epochs", 5, "--recluster-every", every)
    clustered = []
    monkeypatch.setattr(method, "recluster", lambda model, generator: clustered.append(epoch))
    for epoch in range(5):
        method.start_epoch(epoch, network)
    assert clustered == epochs


@pytest.mark.parametrize("noise", [0, 1e-8])
def test_temperatures_of_a_collapsed_network_do_not_come_from_rounding(
    workplace, network, monkeypatch, noise
):
    method = build(network, "--method", "sbcl", "--variant", "paper")
    z = noise * torch.randn(len(method.rows), 128, generator=make_generator(1))
    z = F.normalize(1 + z, dim=1)
    monkeypatch.setattr("baselines.sbcl.embed", lambda *args, **options: z)
    method.recluster(network, make_generator(0))
    torch.testing.assert_close(method.coarse_temperatures, torch.full((2,), 0.07 * np.e))


# BCL and PaCo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, views", [("bcl", [False, False, True]), ("paco", [True, False])])
def test_randaugment_is_on_the_view_of_the_classifier(workplace, monkeypatch, method, views):
    uses_randaugment = []

    def record(*args):
        uses_randaugment.extend(args[5])
        return augment_views(*args)

    monkeypatch.setattr("datasets.loader.augment_views", record)
    train("--method", method, "--randaugment", "--epochs", 1, out=f"randaugment/{method}")
    assert uses_randaugment == 2 * views  # two steps


def test_a_queue_fills_with_keys_and_their_labels(workplace):
    train("--method", "paco", "--queue", 24, "--epochs", 1, out="queue")
    state = method_state("queue")
    # Two steps of 16 images.
    assert (state["queue.labels"] >= 0).all() and state["queue.next"] == (2 * 16) % 24
    torch.testing.assert_close(state["queue.keys"].norm(dim=1), torch.ones(24))
    torch.manual_seed(0)
    start = ContrastiveModel("resnet8").encoder.conv1.weight
    key, query = state["key_encoder.model.encoder.conv1.weight"], load_tensors("queue/encoder.pt")
    # The key encoder follows by a thousandth per step.
    assert 0 < (key - start).norm() < 0.01 * (query["conv1.weight"] - start).norm()


# pretrain.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method tsc --variant published", "--variant published: tsc has ttc, paper, code"),
        ("--method supcon --variant paper", "--variant: only --method tsc, sbcl, bcl, paco reads"),
        ("--method supmin --k 3", "--k: only --method kcl, tsc reads it, not supmin"),
        ("--method kcl --queue -1", "--queue: -1 is not a number from 0"),
        ("--method sbcl --recluster-every 0", "--recluster-every: 0 is not a number from 1"),
        ("--method kcl --alpha 0.1", "--alpha: only --method paco reads it, not kcl"),
        ("--method tsc --randaugment", "--randaugment: only --method bcl, paco reads it"),
    ],
)
def test_an_option_of_another_method_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        pretrain.parse_args([SUBSET, *flags.split()])


def test_every_method_trains_on_photographs(tmp_path_factory, monkeypatch):
    root = real_data("inat21_mini")
    monkeypatch.chdir(tmp_path_factory.mktemp("photographs"))
    sizes = "--size 32 --store-size 32 --ratios 95-5 --workers 2".split()
    call(make_subsets, "inat21-mammals", "--data-root", root, *sizes)
    for method in pretrain.METHODS:
        flags = [*SMOKE, "--method", method, "--epochs", 1, "--out", method]
        call(pretrain, "subsets/inat21-mammals/95-5.json", *flags)
        assert all(np.isfinite(line["loss"]) for line in log_of(Path(method)))
        assert json.loads(Path(method, "config.json").read_text())["method"] == method
