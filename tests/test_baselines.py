"""Contrastive losses of the compared methods: reference numbers, closed forms, double loops."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import equals_reference, fixture_f5, oracle, random_batch
from sklearn.cluster import KMeans

from baselines import (
    BCL,
    TSC,
    PaCo,
    bcl_loss,
    draw_k_from_queue,
    draw_k_positives,
    kcl_loss,
    logit_adjusted_loss,
    paco_loss,
    sbcl_loss,
    tsc_loss,
)
from baselines.sbcl import class_spreads, cosine_kmeans, count_subclasses
from baselines.shared import MomentumEncoder, Queue
from baselines.supervised import CosineClassifier
from baselines.tsc import assign_targets
from common import (
    Training,
    antipodal_prototypes,
    collapse_value,
    ntxent_loss,
    simplex_prototypes,
    supcon_loss,
)

KCL_TSC = oracle("kcl_tsc.npz")
Z, Y = fixture_f5()


def on_circle(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


KEYS, KEY_LABELS = on_circle(50, 180, 270, 120), torch.tensor([0, 0, 1, 1])
QUEUE, EMPTY_QUEUE = (KEYS, KEY_LABELS), (KEYS[:0], KEY_LABELS[:0])
TARGETS, CENTRES = on_circle(0, 180), on_circle(30, 110)
SUBCLASSES = torch.tensor([0, 0, 1, 2, 2])
LOGITS = torch.tensor(
    [
        [[1, -1], [0.9, -0.8]],
        [[0.5, 0.2], [0.4, 0.1]],
        [[2, 0], [1.5, 0.2]],
        [[-1, 1.5], [-0.7, 1.1]],
        [[0, 0.3], [0.2, 0.1]],
    ],
    dtype=torch.float64,
)
PRIOR = torch.tensor([0.6, 0.4])

SUBSET = SimpleNamespace(classes=["a", "b"], train_counts=lambda: [990, 10])
MODEL = nn.Linear(1, 1)  # stands in for a network of these dimensions
MODEL.dim, MODEL.encoder = 8, SimpleNamespace(dim=16)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def build(method, **options):
    training = Training(epochs=4, batch_size=64, seed=0, temperature=0.1, generator=rng())
    return method(MODEL, SUBSET, training, **options)


def in_batch(k, generator=None):
    return draw_k_positives(Y, 2, k, generator or rng())


def from_queue(k, generator=None):
    return draw_k_from_queue(Y, KEY_LABELS, k, generator or rng())


def assert_close(value, expected, tolerance=1e-12):
    assert float(value) == pytest.approx(float(expected), abs=tolerance)


# reference numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KCL_TSC["cases"])
def test_kcl_and_tsc_equal_the_reference(case):
    f = {
        key.split("/")[-1]: KCL_TSC[key]
        for key in KCL_TSC.files
        if "/" not in key or key.startswith(f"{case}/")
    }
    labels, targets = torch.from_numpy(f["labels"]), torch.from_numpy(f["prototypes"])
    temperatures = list(zip(f["temperature"], f["base_temperature"], strict=True))
    for (i, (t, base)), (j, k) in itertools.product(enumerate(temperatures), enumerate(f["k"])):
        positives = torch.from_numpy(f["positives"][j]).bool()
        drawn = draw_k_positives(labels, 2, int(k), rng())
        assert torch.equal(drawn.sum(1), positives.sum(1))
        assert k == 3 or torch.equal(drawn, positives)
        arguments = (labels, positives, t, base)
        losses = {
            "kcl": lambda z, y, p, t, base: t / base * kcl_loss(z, y, p, t),
            "tsc": lambda z, y, p, t, base: t / base * tsc_loss(z, y, targets, p, t),
        }
        for name, loss in losses.items():
            equals_reference(
                lambda z, loss=loss, arguments=arguments: loss(z, *arguments),
                f["features"],
                f[f"loss_{name}"][i, j],
                f[f"grad_{name}"][i, j],
            )


TWO_TEMPERATURES = dict(temperature=0.1, coarse_temperatures=(0.12, 0.10))
GOLDEN = {
    "kcl": (7.282728, lambda: kcl_loss(Z, Y, in_batch(4), 0.1)),
    "kcl, queue": (7.052661, lambda: kcl_loss(Z, Y, from_queue(4), 0.1, KEYS)),
    "tsc": (7.489980, lambda: tsc_loss(Z, Y, TARGETS, in_batch(4), 0.1)),
    "tsc paper": (8.842932, lambda: tsc_loss(Z, Y, TARGETS, in_batch(4), 0.1, "paper")),
    "tsc paper, queue": (
        8.815235,
        lambda: tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "paper", KEYS),
    ),
    "tsc code, queue": (
        5.899717,
        lambda: tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "code", KEYS),
    ),
    "sbcl, fine": (1.343219, lambda: sbcl_loss(Z, Y, SUBCLASSES, **TWO_TEMPERATURES, beta=0)),
    "sbcl, coarse": (
        6.726820,
        lambda: sbcl_loss(Z, Y, SUBCLASSES, **TWO_TEMPERATURES, beta=1, fine_scale=0),
    ),
    "sbcl": (3.024924, lambda: sbcl_loss(Z, Y, SUBCLASSES, **TWO_TEMPERATURES)),
    "sbcl code": (
        3.600590,
        lambda: sbcl_loss(Z, Y, SUBCLASSES, **TWO_TEMPERATURES, fine_scale=0.1 / 0.07),
    ),
    "sbcl, one temperature": (
        3.739566,
        lambda: (
            sbcl_loss(Z, Y, SUBCLASSES, 0.1, beta=0, fine_scale=0.1 / 0.07)
            + 0.25 * supcon_loss(Z, Y, 0.1)
        ),
    ),
    "bcl": (5.462347, lambda: bcl_loss(Z, Y, CENTRES, 0.1)),
    "paco": (5.432562, lambda: paco_loss(Z, Y, LOGITS[:, :1], PRIOR, *QUEUE)),
    "gpaco": (5.502707, lambda: paco_loss(Z, Y, LOGITS, PRIOR, *QUEUE)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    golden, loss = GOLDEN[name]
    assert_close(loss(), golden, 1e-5)


def test_golden_value_of_tsc_without_the_target_term(monkeypatch):
    monkeypatch.setattr("baselines.tsc.TARGET_WEIGHT", 0)
    assert_close(tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "code", KEYS), 5.543863, 1e-5)


@pytest.mark.parametrize(
    "loss, golden",
    [
        (lambda g: kcl_loss(Z, Y, in_batch(3, g), 0.1), 6.899325),
        (lambda g: kcl_loss(Z, Y, from_queue(1, g), 0.1, KEYS), 5.411026),
        (lambda g: tsc_loss(Z, Y, TARGETS, in_batch(3, g), 0.1), 7.103561),
    ],
)
def test_golden_expectations_over_draws(loss, golden):
    generator = rng()
    values = np.array([loss(generator).item() for _ in range(600)])
    standard_error = values.std() / np.sqrt(len(values))
    assert standard_error > 0 and abs(values.mean() - golden) < 3 * standard_error


# KCL ----------------------------------------------------------------------------------------------


def test_kcl_equals_ntxent_for_k_0_and_supcon_for_large_k():
    z, labels = random_batch()
    assert_close(kcl_loss(z, labels, draw_k_positives(labels, 2, 0, rng())), ntxent_loss(z))
    all_positives = draw_k_positives(labels, 2, 100, rng())
    assert_close(kcl_loss(z, labels, all_positives), supcon_loss(z, labels))


def test_drawn_positives_come_from_the_class_without_replacement():
    labels = torch.tensor([0, 0, 0, 0, 1])
    a, b, c = (draw_k_positives(labels, 2, 2, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    image, label = torch.arange(10) % 5, labels.repeat(2)
    other_view = (image[:, None] == image) & ~torch.eye(10, dtype=torch.bool)
    assert a[other_view].all()
    assert not a[label[:, None] != label].any() and not a.diagonal().any()
    # Two drawn rows and the other view; the lone image of class 1 has only its other view.
    assert a.sum(1).tolist() == [3, 3, 3, 3, 1] * 2


def test_drawn_positives_are_uniform():
    labels, generator = torch.tensor([0, 0, 0, 0, 1]), rng()
    draws = torch.stack([draw_k_positives(labels, 2, 2, generator)[0] for _ in range(1000)])
    counts = draws.sum(0)[[1, 2, 3, 6, 7, 8]]
    assert counts.sum() == 2000
    assert (counts - 2000 / 6).abs().max() < 5 * math.sqrt(1000 * (1 / 3) * (2 / 3))


def test_queue_positives_are_of_the_class_and_never_empty_slots():
    key_labels = torch.tensor([0, -1, 1, -1, 0, 0])
    drawn = draw_k_from_queue(torch.tensor([0, 1, 1]), key_labels, 2, rng())
    assert drawn[:, 0].all() and drawn[0, 1:].sum() == 2
    assert (key_labels[drawn[0, 1:]] == 0).all()
    assert drawn[1, 1:].tolist() == [False, False, True, False, False, False]


def test_queue_form_passes_no_gradient_to_keys():
    z, keys = Z.clone().requires_grad_(), KEYS.clone().requires_grad_()
    kcl_loss(z, Y, from_queue(2), 0.1, keys).backward()
    assert z.grad[:, 0].abs().sum() > 0 and not z.grad[:, 1].any() and keys.grad is None


# TSC ----------------------------------------------------------------------------------------------


def test_tsc_does_not_depend_on_the_order_of_classes():
    z, labels = random_batch()
    positives = draw_k_positives(labels, 2, 3, rng())
    targets = antipodal_prototypes(8, rng()).double()
    assert torch.equal(targets[0], -targets[1]) and (targets.norm(dim=1) - 1).abs().max() < 1e-6
    swapped = tsc_loss(z, 1 - labels, targets.flip(0), positives)
    assert_close(tsc_loss(z, labels, targets, positives), swapped)


def test_tsc_without_targets_equals_kcl(monkeypatch):
    monkeypatch.setattr("baselines.tsc.TARGET_WEIGHT", 0)
    z, labels = random_batch()
    positives = draw_k_positives(labels, 2, 3, rng())
    # Targets with s = -1e4 / T add nothing to a denominator.
    z, targets = F.pad(z, (0, 1), value=0.1), F.pad(torch.zeros(2, 8), (0, 1), value=-1e5)
    without = tsc_loss(z, labels, targets.double(), positives, variant="paper")
    assert_close(without, kcl_loss(z, labels, positives), 1e-9)


def test_tsc_targets_get_no_gradient():
    targets = TARGETS.clone().requires_grad_()
    tsc_loss(Z.clone().requires_grad_(), Y, targets, in_batch(3)).backward()
    assert targets.grad is None


def test_tsc_centroids_are_float32_under_autocast():
    method = build(TSC, variant="paper", k=3, queue=0)
    other = copy.deepcopy(method)
    z, labels = F.normalize(torch.randn(16, 8, generator=rng()), dim=1), torch.arange(16) % 2
    method.update_centroids(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.update_centroids(z, labels)
    assert torch.equal(method.centroids, other.centroids)


def test_tsc_assignment_equals_a_search_over_permutations():
    generator = rng()
    for classes in (2, 2, 2, 2, 3, 4) * 5:
        centroids = F.normalize(torch.randn(classes, 5, generator=generator), dim=1)
        targets = simplex_prototypes(classes, 5, generator)

        def total(order, centroids=centroids, targets=targets):
            return sum(float(centroids[c] @ targets[t]) for c, t in enumerate(order))

        best = max(itertools.permutations(range(classes)), key=total)
        assert tuple(assign_targets(centroids, targets)) == best
        assert list(assign_targets(torch.zeros_like(targets), targets)) == list(range(classes))


# SBCL ---------------------------------------------------------------------------------------------


def test_sbcl_closed_forms():
    z, labels = random_batch()
    fine = sbcl_loss(z, labels, labels, 0.1, beta=0)
    assert_close(fine, supcon_loss(z, labels, 0.1))
    single = sbcl_loss(z, labels, torch.arange(len(z)), 0.1, beta=1)
    assert_close(single, ntxent_loss(z, 0.1) + supcon_loss(z, labels, 0.1))
    # With one sub-class per class, the coarse term compares the other view with the other class.
    coarse = 0.0
    for i, v in itertools.product(range(len(z)), range(2)):
        own_view = z[i, v] @ z[i, 1 - v] / 0.1
        other_class = z[labels != labels[i]].flatten(0, 1) @ z[i, v] / 0.1
        log_sum = torch.cat([own_view[None], other_class]).logsumexp(0)
        coarse += (log_sum - own_view) / (2 * len(z))
    assert_close(sbcl_loss(z, labels, labels, 0.1, beta=1, fine_scale=0), coarse)


def test_sbcl_does_not_depend_on_the_ids_of_subclasses():
    z, labels = random_batch()
    pairs = torch.arange(len(z)) // 2
    expected = sbcl_loss(z, labels, pairs + 100 * labels, 0.1)
    assert_close(sbcl_loss(z, labels, 9 - 7 * pairs, 0.1), sbcl_loss(z, labels, pairs, 0.1))
    # Two classes may use the same ids.
    reused = torch.where(labels == 1, pairs - pairs[labels == 1].min(), pairs)
    assert_close(sbcl_loss(z, labels, reused, 0.1), expected)


@pytest.mark.parametrize(
    "counts, subclass_counts",
    [
        ((9900, 100), [99, 1]),
        ((4950, 50), [99, 1]),
        ((9500, 500), [19, 1]),
        ((995, 5), [99, 1]),
        ((1214, 3494), [1, 2]),
        ((193, 354), [1, 1]),
        ((70, 70), [1, 1]),
    ],
)
def test_number_of_subclasses(counts, subclass_counts):
    assert count_subclasses(counts) == subclass_counts


def test_kmeans_finds_planted_groups_and_repeats():
    generator = rng()
    centres = F.normalize(torch.randn(6, 16, generator=generator), dim=1)
    truth = torch.randint(6, (600,), generator=generator)
    x = F.normalize(centres[truth] + 0.05 * torch.randn(600, 16, generator=generator), dim=1)
    clusters = min(
        (cosine_kmeans(x, 6, rng(seed)) for seed in range(5)),
        key=lambda ids: sum((x[ids == c] - x[ids == c].mean(0)).norm() ** 2 for c in ids.unique()),
    )
    assert torch.equal(cosine_kmeans(x, 6, rng(3)), cosine_kmeans(x, 6, rng(3)))
    library = KMeans(6, n_init=5, random_state=0).fit_predict(x.numpy())
    for reference in (truth.tolist(), library.tolist()):
        # Six pairs of six ids each: a one-to-one map.
        assert len(set(zip(clusters.tolist(), reference, strict=True))) == 6


def test_kmeans_with_few_or_equal_rows():
    x = F.normalize(torch.randn(5, 16, generator=rng()), dim=1)
    assert cosine_kmeans(x, 5, rng()).bincount().tolist() == [1] * 5
    assert cosine_kmeans(x[:3], 9, rng()).max() < 3
    # Equal rows leave all clusters but one empty.
    assert cosine_kmeans(x[:1].repeat(20, 1), 4, rng()).shape == (20,)


def test_spread_equals_the_published_concentration():
    z, labels = torch.tensor([[0.0, 0], [2, 0], [5, 5]]), torch.tensor([0, 0, 1])
    np.testing.assert_allclose(class_spreads(z, labels), [1 / math.log(12), 0], atol=1e-7)


# BCL ----------------------------------------------------------------------------------------------


def bcl_double_loop(z, labels, centres, temperature):
    rows = [(z[i, v], int(labels[i])) for v in range(z.shape[1]) for i in range(len(z))]
    rows += [(centres[c], c) for c in (0, 1)]
    total = 0.0
    for i in range(z.shape[0] * z.shape[1]):
        s = {j: float(rows[i][0] @ rows[j][0]) / temperature for j in range(len(rows)) if j != i}
        members = {c: [j for j in s if rows[j][1] == c] for c in (0, 1)}
        denominator = sum(np.mean([math.exp(s[j]) for j in members[c]]) for c in (0, 1))
        total -= np.mean([s[j] - math.log(denominator) for j in members[rows[i][1]]])
    return total / (len(rows) - 2)


def test_bcl_equals_a_double_loop():
    z, labels = random_batch()
    centres = F.normalize(torch.randn(2, 8, generator=rng(), dtype=torch.float64), dim=1)
    for y in (labels, labels * 0):
        assert_close(bcl_loss(z, y, centres, 0.1), bcl_double_loop(z, y, centres, 0.1), 1e-10)


def test_bcl_of_an_anchor_does_not_depend_on_repeats_of_the_majority():
    centres = F.normalize(torch.randn(2, 8, generator=rng(), dtype=torch.float64), dim=1)
    # The majority lies on its centre.
    minority, majority = random_batch(3)[0], centres[0].expand(4, 2, 8)

    def sum_over_anchors(loss, repeats):
        z = torch.cat([minority, *[majority] * repeats])
        return (loss(z, torch.tensor([1] * 3 + [0] * 4 * repeats)) * len(z)).item()

    losses = [(lambda z, y: bcl_loss(z, y, centres), True), (supcon_loss, False)]
    for loss, is_linear in losses:
        one, two, five = (sum_over_anchors(loss, repeats) for repeats in (1, 2, 5))
        assert (five == pytest.approx(one + 4 * (two - one), abs=1e-9)) == is_linear


def test_batch_norm_over_two_centres_leaves_no_common_active_unit():
    torch.manual_seed(0)
    methods = {
        variant: build(BCL, variant=variant, randaugment=False)
        for variant in ("layernorm", "batchnorm")
    }
    for weights in (CosineClassifier(16).weight, CosineClassifier(16).weight * 0.01 + 1):
        common_units = {
            variant: (method.centre_head[:3](weights) > 0).all(0).any().item()
            for variant, method in methods.items()
        }
        assert common_units == {"layernorm": True, "batchnorm": False}


def test_bcl_trains_the_classifier_through_the_centre_head():
    method = build(BCL, variant="layernorm", randaugment=False)
    centres = F.normalize(method.centre_head(method.classifier.weight), dim=1)
    bcl_loss(Z.float() @ torch.eye(2, 8), Y, centres).backward()
    assert method.classifier.weight.grad.abs().sum() > 0


# PaCo ---------------------------------------------------------------------------------------------


def test_paco_without_positives_is_balanced_softmax_with_more_negatives():
    o = LOGITS[:, 0] + PRIOR.log()  # [5, 2]
    s = Z[:, 0] @ torch.cat([Z[:, 0], Z[:, 1], KEYS]).T / 0.2  # [5, 14]
    s[range(5), range(5)] = -torch.inf
    expected = (torch.cat([o, s], dim=1).logsumexp(1) - o[range(5), Y]).mean()
    assert_close(paco_loss(Z, Y, LOGITS[:, :1], PRIOR, *QUEUE, alpha=0.0), expected, 1e-6)


def test_paco_with_distant_rows_is_balanced_softmax():
    logits = LOGITS[:, :1] + 1e3  # exp(s) is nothing beside exp(o)
    value = paco_loss(Z, Y, logits, PRIOR, *EMPTY_QUEUE, alpha=0.0)
    assert_close(value, logit_adjusted_loss(LOGITS[:, 0], Y, PRIOR), 1e-6)


@pytest.mark.parametrize("anchor_views", [1, 2])
def test_only_gpaco_has_a_gradient_through_the_second_view(anchor_views):
    z = Z.clone().requires_grad_()
    paco_loss(z, Y, LOGITS[:, :anchor_views], PRIOR, *QUEUE).backward()
    assert z.grad[:, 0].abs().sum() > 0 and bool(z.grad[:, 1].any()) == (anchor_views == 2)


def test_default_alpha_gives_both_centres_the_published_share():
    method = build(PaCo, variant="paco", queue=1024, alpha=None, randaugment=False)
    generator, count, anchors = rng(), torch.zeros(2), torch.zeros(2)
    for _ in range(1500):
        labels, key_labels = (
            (torch.rand(n, generator=generator) < 0.01).long() for n in (64, 1024)
        )
        positives = 2 * (labels == labels[:, None]).sum(1) - 1
        positives += (key_labels == labels[:, None]).sum(1)
        count.index_add_(0, labels, positives.float())
        anchors.index_add_(0, labels, torch.ones(64))
    shares = 1 / (1 + method.alpha * count / anchors)
    np.testing.assert_allclose(shares, [1 / 1.4] * 2, rtol=1e-2)


def test_a_given_alpha_holds_for_both_classes():
    method = build(PaCo, variant="paco", queue=8, alpha=0.05, randaugment=False)
    assert method.alpha.tolist() == pytest.approx([0.05] * 2)


def test_queue_is_first_in_first_out_for_batches_of_any_size():
    queue = Queue(5, 2, rng())
    assert (queue.keys.norm(dim=1) - 1).abs().max() < 1e-6 and queue.labels.tolist() == [-1] * 5
    queue.push(torch.full((3, 2), 1.0), torch.tensor([1, 1, 1]))
    queue.push(torch.full((3, 2), 2.0), torch.tensor([0, 0, 2]))
    assert queue.labels.tolist() == [2, 1, 1, 0, 0] and queue.keys[0].tolist() == [2, 2]
    queue.push(torch.arange(14.0).reshape(7, 2), torch.arange(7))
    assert sorted(queue.labels.tolist()) == [2, 3, 4, 5, 6]  # the last five of seven
    Queue(0, 2, rng()).push(torch.ones(3, 2), torch.ones(3).long())


def test_momentum_encoder_follows_slowly_and_is_not_trained():
    model = nn.Linear(2, 1)
    encoder = MomentumEncoder(model, momentum=0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    out = encoder(model, torch.ones(1, 2))
    torch.testing.assert_close(encoder.model.weight, before + 0.1)
    assert not out.requires_grad and not any(p.requires_grad for p in encoder.parameters())


# all contrastive losses ---------------------------------------------------------------------------


def every_loss(labels, dim=8):
    """Return {name: loss as a function of z}, with all other arguments drawn once."""
    generator = rng(5)
    targets = antipodal_prototypes(dim, generator)
    keys = F.normalize(torch.randn(6, dim, generator=generator), dim=1)
    key_labels = torch.tensor([0, 1, -1, 0, 0, 1])
    logits = torch.randn(len(labels), 2, 2, generator=generator)
    drawn = draw_k_positives(labels, 2, 3, generator)
    drawn_keys = draw_k_from_queue(labels, key_labels, 3, generator)
    queue = keys, key_labels
    return {
        "kcl": lambda z: kcl_loss(z, labels, drawn),
        "kcl queue": lambda z: kcl_loss(z, labels, drawn_keys, queue=keys),
        "tsc ttc": lambda z: tsc_loss(z, labels, targets, drawn),
        "tsc paper": lambda z: tsc_loss(z, labels, targets, drawn, variant="paper"),
        "tsc code": lambda z: tsc_loss(z, labels, targets, drawn, variant="code"),
        "tsc queue": lambda z: tsc_loss(z, labels, targets, drawn_keys, queue=keys),
        "sbcl": lambda z: sbcl_loss(z, labels, torch.arange(len(labels)) // 3),
        "bcl": lambda z: bcl_loss(z, labels, targets),
        "paco": lambda z: paco_loss(z, labels, logits[:, :1], PRIOR, *queue),
        "gpaco": lambda z: paco_loss(z, labels, logits, PRIOR, *queue),
    }


@pytest.mark.parametrize("labels", [[0] * 8, [1] * 8, [0] * 7 + [1], [1], [0, 1]], ids=str)
def test_losses_are_finite_for_one_class_one_minority_image_and_one_image(labels):
    labels = torch.tensor(labels)
    z = F.normalize(torch.randn(len(labels), 2, 8, generator=rng()), dim=2)
    for name, loss in every_loss(labels).items():
        x = z.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all(), name


def test_losses_are_float32_under_autocast_and_for_half_embeddings():
    z, labels = random_batch()
    z = z.float()
    for name, loss in every_loss(labels).items():
        expected = loss(z).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(z).item() == expected, name
        half = loss(z.half())
        assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=2e-2)


def test_equal_embeddings_give_the_collapse_value():
    z, labels = torch.ones(8, 2, 4) / 2, torch.tensor([0] * 6 + [1] * 2)
    positives = draw_k_positives(labels, 2, 3, rng())
    assert_close(kcl_loss(z, labels, positives), collapse_value(8), 1e-5)
    positives = draw_k_from_queue(labels, torch.zeros(9).long(), 3, rng())
    assert_close(kcl_loss(z, labels, positives, queue=torch.ones(9, 4) / 2), math.log(10), 1e-5)


def test_wrong_shapes_raise():
    z, labels = random_batch()
    positives, targets = draw_k_positives(labels, 2, 3, rng()), antipodal_prototypes(8, rng())
    with pytest.raises(ValueError, match="need labels"):
        kcl_loss(z, labels[:-1], positives)
    with pytest.raises(ValueError, match="need labels"):
        bcl_loss(z, labels[:-1], targets)
    with pytest.raises(ValueError, match="logits"):
        paco_loss(z, labels, torch.zeros(12, 2), PRIOR, *EMPTY_QUEUE)
    with pytest.raises(ValueError, match="ttc, paper, code"):
        tsc_loss(z, labels, targets, positives, variant="papers")
    with pytest.raises(ValueError, match="positives must be"):
        tsc_loss(z, labels, targets, draw_k_positives(labels, 3, 3, rng()))
