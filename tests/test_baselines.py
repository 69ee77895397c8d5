"""The compared methods' losses against the reference's numbers, the golden table, closed forms and double loops; their parts one by one."""

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

import baselines
from baselines import (
    CosineClassifier,
    LearnableScale,
    MomentumEncoder,
    PaCo,
    Queue,
    balanced_batches,
    bcl_loss,
    class_spreads,
    cosine_kmeans,
    count_subclasses,
    draw_k_from_queue,
    draw_k_positives,
    effective_number_weights,
    is_swap_better,
    kcl_loss,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    paco_loss,
    sbcl_loss,
    tau_normalized,
    tsc_loss,
)
from common import antipodal_prototypes, collapse_value, ntxent_loss, supcon_loss

KCL_TSC, SUPERVISED = oracle("kcl_tsc.npz"), oracle("supervised.npz")
Z, Y = fixture_f5()


def on_circle(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


QUEUE, QUEUE_LABELS = on_circle(50, 180, 270, 120), torch.tensor([0, 0, 1, 1])
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


def seed(number=0):
    return torch.Generator().manual_seed(number)


def in_batch(k, generator=None):
    return draw_k_positives(Y, 2, k, generator or seed())


def from_queue(k, generator=None):
    return draw_k_from_queue(Y, QUEUE_LABELS, k, generator or seed())


# against numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KCL_TSC["cases"])
def test_kcl_and_tsc_equal_the_reference(case):
    f = {
        key.split("/")[-1]: KCL_TSC[key]
        for key in KCL_TSC.files
        if "/" not in key or key.startswith(f"{case}/")
    }
    labels, targets = torch.from_numpy(f["labels"]), torch.from_numpy(f["prototypes"])
    for (i, (t, base)), (j, k) in itertools.product(
        enumerate(zip(f["temperature"], f["base_temperature"])), enumerate(f["k"])
    ):
        positives = torch.from_numpy(f["positives"][j]).bool()
        drawn = draw_k_positives(labels, 2, int(k), seed())
        assert torch.equal(drawn.sum(1), positives.sum(1)) and (
            k == 3 or torch.equal(drawn, positives)
        )
        equals_reference(
            lambda z: t / base * kcl_loss(z, labels, positives, t),
            f["features"],
            f["loss_kcl"][i, j],
            f["grad_kcl"][i, j],
        )
        equals_reference(
            lambda z: t / base * tsc_loss(z, labels, targets, positives, t),
            f["features"],
            f["loss_tsc"][i, j],
            f["grad_tsc"][i, j],
        )


@pytest.mark.parametrize(
    "loss, golden",
    [
        (lambda: kcl_loss(Z, Y, in_batch(4), 0.1), 7.282728),
        (lambda: kcl_loss(Z, Y, from_queue(4), 0.1, QUEUE), 7.052661),
        (lambda: tsc_loss(Z, Y, TARGETS, in_batch(4), 0.1, "paper"), 8.842932),
        (lambda: tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "paper", queue=QUEUE), 8.815235),
        (
            lambda: tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "code", weight=0, queue=QUEUE),
            5.543863,
        ),
        (lambda: tsc_loss(Z, Y, TARGETS, from_queue(4), 0.1, "code", queue=QUEUE), 5.899717),
        (lambda: tsc_loss(Z, Y, TARGETS, in_batch(4), 0.1), 7.489980),
        (lambda: sbcl_loss(Z, Y, SUBCLASSES, 0.1, (0.12, 0.10), beta=0), 1.343219),
        (lambda: sbcl_loss(Z, Y, SUBCLASSES, 0.1, (0.12, 0.10), beta=1, fine_scale=0), 6.726820),
        (lambda: sbcl_loss(Z, Y, SUBCLASSES, 0.1, (0.12, 0.10)), 3.024924),
        (lambda: sbcl_loss(Z, Y, SUBCLASSES, 0.1, (0.12, 0.10), fine_scale=0.1 / 0.07), 3.600590),
        (
            lambda: (
                sbcl_loss(Z, Y, SUBCLASSES, 0.1, beta=0, fine_scale=0.1 / 0.07)
                + 0.25 * supcon_loss(Z, Y, 0.1)
            ),
            3.739566,
        ),  # "single temperature"
        (lambda: bcl_loss(Z, Y, CENTRES, 0.1), 5.462347),
        (lambda: paco_loss(Z, Y, LOGITS[:, :1], PRIOR, QUEUE, QUEUE_LABELS), 5.432562),
        (lambda: paco_loss(Z, Y, LOGITS, PRIOR, QUEUE, QUEUE_LABELS), 5.502707),
        (lambda: ldam_loss(COSINES, TARGETS_3, ldam_margins([300, 100])), 5.329018),
        (
            lambda: ldam_loss(
                COSINES,
                TARGETS_3,
                ldam_margins([300, 100]),
                weights=effective_number_weights([300, 100]),
            ),
            6.136489,
        ),
    ],
)
def test_golden_values(loss, golden):
    assert loss().item() == pytest.approx(golden, abs=1e-5)


COSINES, TARGETS_3 = (
    torch.tensor([[0.2, -0.1], [-0.3, 0.4], [0.1, 0.15]], dtype=torch.float64),
    torch.tensor([0, 1, 1]),
)


@pytest.mark.parametrize(
    "loss, golden",
    [
        (lambda g: kcl_loss(Z, Y, in_batch(3, g), 0.1), 6.899325),
        (lambda g: kcl_loss(Z, Y, from_queue(1, g), 0.1, QUEUE), 5.411026),
        (lambda g: tsc_loss(Z, Y, TARGETS, in_batch(3, g), 0.1), 7.103561),
    ],
)
def test_golden_expectations_over_draws(loss, golden):
    generator = seed()
    values = np.array([loss(generator).item() for _ in range(3000)])
    assert values.std() > 0 and abs(values.mean() - golden) < 3 * values.std() / np.sqrt(
        len(values)
    )


def test_ldam_margins_and_weights_of_two_classes():
    np.testing.assert_allclose(ldam_margins([300, 100]), [0.379918, 0.5], atol=1e-6)
    for counts, margins, weights, weights_999 in (
        ((9900, 100), (0.159, 0.5), (0.031, 1.969), (0.174, 1.826)),
        ((9500, 500), (0.240, 0.5), (0.147, 1.853), (0.565, 1.435)),
        ((950, 50), (0.240, 0.5), (0.104, 1.896), (0.147, 1.853)),
        ((70, 70), (0.5, 0.5), (1, 1), (1, 1)),
    ):
        np.testing.assert_allclose(ldam_margins(counts), margins, atol=1e-3)
        np.testing.assert_allclose(effective_number_weights(counts), weights, atol=1e-3)
        np.testing.assert_allclose(effective_number_weights(counts, 0.999), weights_999, atol=1e-3)
    np.testing.assert_allclose(
        effective_number_weights([300, 100]), (0.503747, 1.496253), atol=1e-6
    )


# KCL --------------------------------------------------------------------------------------------------------------------


def test_kcl_spans_from_ntxent_to_supcon():
    z, labels = random_batch()
    assert kcl_loss(z, labels, draw_k_positives(labels, 2, 0, seed())).item() == pytest.approx(
        ntxent_loss(z).item(), abs=1e-12
    )
    assert kcl_loss(z, labels, draw_k_positives(labels, 2, 100, seed())).item() == pytest.approx(
        supcon_loss(z, labels).item(), abs=1e-12
    )


def test_draws_come_from_the_generator_without_replacement_and_uniformly():
    labels = torch.tensor([0, 0, 0, 0, 1])
    a, b, c = (draw_k_positives(labels, 2, 2, seed(number)) for number in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    own, same = (
        torch.tensor([[i % 5 == j % 5 and i != j for j in range(10)] for i in range(10)]),
        torch.tensor(
            [[bool(labels[i % 5] == labels[j % 5]) for j in range(10)] for i in range(10)]
        ),
    )
    assert (a[own]).all() and not a[~same].any() and not a.diagonal().any()
    assert (
        a.sum(1).tolist() == [3, 3, 3, 3, 1] * 2
    )  # two drawn and the own view; a lone image has that alone
    generator, counts = seed(), torch.zeros(10, 10)
    for _ in range(2000):
        counts += draw_k_positives(labels, 2, 2, generator)
    drawn = counts[0, [1, 2, 3, 6, 7, 8]]
    assert drawn.sum() == 4000 and (drawn - 4000 / 6).abs().max() < 5 * math.sqrt(
        2000 * (1 / 3) * (2 / 3)
    )


def test_queue_positives_are_of_the_class_and_empty_places_are_nobodys():
    queue_labels = torch.tensor([0, -1, 1, -1, 0, 0])
    drawn = draw_k_from_queue(torch.tensor([0, 1, 1]), queue_labels, 2, seed())
    assert (
        drawn[:, 0].all()
        and drawn[0, 1:].sum() == 2
        and drawn[1].tolist() == [True, False, False, True, False, False, False]
    )
    assert (queue_labels[drawn[0, 1:]] == 0).all()


def test_queue_form_takes_no_gradient_through_keys():
    z = Z.clone().requires_grad_()
    kcl_loss(z, Y, from_queue(2), 0.1, QUEUE.requires_grad_()).backward()
    assert z.grad[:, 0].abs().sum() > 0 and not z.grad[:, 1].any() and QUEUE.grad is None


# TSC --------------------------------------------------------------------------------------------------------------------


def test_tsc_without_targets_is_kcl_and_knows_no_order_of_classes():
    z, labels = random_batch()
    positives, targets = (
        draw_k_positives(labels, 2, 3, seed()),
        antipodal_prototypes(8, seed()).double(),
    )
    assert torch.equal(targets[0], -targets[1]) and targets.norm(dim=1).sub(1).abs().max() < 1e-6
    swapped = tsc_loss(z, 1 - labels, targets.flip(0), positives)
    assert tsc_loss(z, labels, targets, positives).item() == pytest.approx(
        swapped.item(), abs=1e-12
    )
    z = F.pad(z, (0, 1), value=1.0)
    nowhere = F.pad(
        torch.zeros(2, 8, dtype=torch.float64), (0, 1), value=-1e4
    )  # exp(-1e4 / T) is 0: in no denominator
    without = tsc_loss(z, labels, nowhere, positives, variant="paper", weight=0)
    assert without.item() == pytest.approx(kcl_loss(z, labels, positives).item(), abs=1e-9)


def test_targets_get_no_gradient():
    targets = TARGETS.clone().requires_grad_()
    tsc_loss(Z.clone().requires_grad_(), Y, targets, in_batch(3)).backward()
    assert targets.grad is None


def test_centroids_are_float32_whatever_autocast_says():
    method = baselines.TSC(arguments(variant="paper", k=3, queue=0), SUBSET, MODEL, seed())
    other = copy.deepcopy(method)
    z, labels = F.normalize(torch.randn(16, 8, generator=seed()), dim=1), torch.arange(16) % 2
    method.update_centroids(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.update_centroids(z, labels)
    assert torch.equal(method.centroids, other.centroids)


def test_assignment_equals_a_search_over_permutations():
    generator = seed()
    for _ in range(50):
        centroids, targets = (
            F.normalize(torch.randn(2, 5, generator=generator), dim=1),
            antipodal_prototypes(5, generator),
        )
        best = max(
            itertools.permutations(range(2)),
            key=lambda order: sum(float(centroids[c] @ targets[order[c]]) for c in (0, 1)),
        )
        assert is_swap_better(centroids, targets).item() == (best == (1, 0))
    assert not is_swap_better(torch.zeros(2, 5), targets)


# SBCL -------------------------------------------------------------------------------------------------------------------


def test_sbcl_closed_forms():
    z, labels = random_batch()
    assert sbcl_loss(z, labels, labels, 0.1, beta=0).item() == pytest.approx(
        supcon_loss(z, labels, 0.1).item(), abs=1e-12
    )
    alone = torch.arange(len(z))
    expected = ntxent_loss(z, 0.1) + supcon_loss(z, labels, 0.1)
    assert sbcl_loss(z, labels, alone, 0.1, beta=1).item() == pytest.approx(
        expected.item(), abs=1e-12
    )
    pairs = torch.arange(len(z)) // 2
    assert sbcl_loss(z, labels, 9 - 7 * pairs, 0.1).item() == pytest.approx(
        sbcl_loss(z, labels, pairs, 0.1).item(), abs=1e-12
    )
    reused = torch.where(
        labels == 1, pairs - pairs[labels == 1].min(), pairs
    )  # the classes may number theirs alike
    assert sbcl_loss(z, labels, reused, 0.1).item() == pytest.approx(
        sbcl_loss(z, labels, pairs + 100 * labels, 0.1).item(), abs=1e-12
    )
    coarse = 0.0  # one sub-class each: the own view against the other class alone
    for i, v in itertools.product(range(len(z)), range(2)):
        own, others = (
            z[i, v] @ z[i, 1 - v] / 0.1,
            z[labels != labels[i]].flatten(0, 1) @ z[i, v] / 0.1,
        )
        coarse += (torch.cat([own[None], others]).logsumexp(0) - own) / (2 * len(z))
    assert sbcl_loss(z, labels, labels, 0.1, beta=1, fine_scale=0).item() == pytest.approx(
        coarse.item(), abs=1e-12
    )


@pytest.mark.parametrize(
    "counts, numbers",
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
def test_subclass_numbers(counts, numbers):
    assert count_subclasses(counts) == numbers


def test_clustering_finds_planted_groups_and_repeats():
    generator = seed()
    centres = F.normalize(torch.randn(6, 16, generator=generator), dim=1)
    truth = torch.randint(6, (600,), generator=generator)
    x = F.normalize(centres[truth] + 0.05 * torch.randn(600, 16, generator=generator), dim=1)
    found = min(
        (cosine_kmeans(x, 6, seed(s)) for s in range(5)), key=lambda ids: class_spread(x, ids)
    )
    assert torch.equal(cosine_kmeans(x, 6, seed(3)), cosine_kmeans(x, 6, seed(3)))
    assert len({(int(a), int(b)) for a, b in zip(found, truth)}) == 6  # one to one
    library = KMeans(6, n_init=5, random_state=0).fit_predict(x.numpy())
    assert len({(int(a), int(b)) for a, b in zip(found, library)}) == 6
    assert (
        cosine_kmeans(x[:5], 5, seed()).bincount().tolist() == [1] * 5
        and cosine_kmeans(x[:3], 9, seed()).max() < 3
    )
    assert cosine_kmeans(x[:1].repeat(20, 1), 4, seed()).shape == (20,)  # empty clusters all along


def class_spread(x, ids):
    return sum((x[ids == c] - x[ids == c].mean(0)).square().sum().item() for c in ids.unique())


def test_spread_is_the_published_concentration():
    z, labels = torch.tensor([[0.0, 0], [2, 0], [5, 5]]), torch.tensor([0, 0, 1])
    np.testing.assert_allclose(class_spreads(z, labels), [1 / math.log(12), 0], atol=1e-7)


# BCL --------------------------------------------------------------------------------------------------------------------


def bcl_double_loop(z, labels, centres, temperature):
    rows = [(z[i, v], int(labels[i])) for v in range(z.shape[1]) for i in range(len(z))] + [
        (centres[c], c) for c in (0, 1)
    ]
    total = 0.0
    for i in range(z.shape[0] * z.shape[1]):
        s = {j: float(rows[i][0] @ rows[j][0]) / temperature for j in range(len(rows)) if j != i}
        members = {c: [j for j in s if rows[j][1] == c] for c in (0, 1)}
        denominator = sum(np.mean([math.exp(s[j]) for j in members[c]]) for c in (0, 1))
        total -= np.mean([s[j] - math.log(denominator) for j in members[rows[i][1]]])
    return total / (len(rows) - 2)


def test_bcl_equals_a_double_loop():
    z, labels = random_batch()
    centres = F.normalize(torch.randn(2, 8, generator=seed(), dtype=torch.float64), dim=1)
    for y in (labels, labels * 0):
        assert bcl_loss(z, y, centres, 0.1).item() == pytest.approx(
            bcl_double_loop(z, y, centres, 0.1), abs=1e-10
        )


def test_bcl_does_not_change_for_minority_anchors_when_the_majority_is_repeated():
    centres = F.normalize(torch.randn(2, 8, generator=seed(), dtype=torch.float64), dim=1)
    minority, majority = (
        random_batch(3)[0],
        centres[0].expand(4, 2, 8),
    )  # the majority lies on its centre

    def anchors_total(loss, times):
        z = torch.cat([minority, *[majority] * times])
        return (loss(z, torch.tensor([1] * 3 + [0] * 4 * times)) * (3 + 4 * times)).item()

    for loss, constant in ((lambda z, y: bcl_loss(z, y, centres), True), (supcon_loss, False)):
        one, two, five = (anchors_total(loss, times) for times in (1, 2, 5))
        assert (
            five == pytest.approx(one + 4 * (two - one), abs=1e-9)
        ) == constant  # each anchor's loss does not depend on `times`


def test_two_centres_under_batch_norm_are_nearly_orthogonal_whatever_the_classifier():
    torch.manual_seed(0)
    method = {
        variant: baselines.BCL(arguments(variant=variant, randaugment=False), SUBSET, MODEL, seed())
        for variant in ("layernorm", "batchnorm")
    }
    for weights in (CosineClassifier(16).weight, CosineClassifier(16).weight * 0.01 + 1):
        hidden = {variant: m.centre_head[:3](weights) for variant, m in method.items()}
        assert not (
            (hidden["batchnorm"][0] > 0) & (hidden["batchnorm"][1] > 0)
        ).any()  # no unit active for both
        assert ((hidden["layernorm"][0] > 0) & (hidden["layernorm"][1] > 0)).any()


def test_the_classifier_is_reached_through_the_centre_head():
    method = baselines.BCL(arguments(variant="layernorm", randaugment=False), SUBSET, MODEL, seed())
    centres = F.normalize(method.centre_head(method.classifier.weight), dim=1)
    bcl_loss(Z.float() @ torch.eye(2, 8), Y, centres).backward()
    assert method.classifier.weight.grad.abs().sum() > 0


# PaCo -------------------------------------------------------------------------------------------------------------------


def test_paco_without_rows_is_balanced_softmax_and_with_gamma_has_more_negatives():
    none = QUEUE[:0], QUEUE_LABELS[:0]
    softmax = logit_adjusted_loss(LOGITS[:, 0], Y, PRIOR)
    assert paco_loss(
        Z, Y, LOGITS[:, :1], PRIOR, *none, alpha=0.0, gamma=0.0
    ).item() == pytest.approx(softmax.item(), abs=1e-7)
    o, s = (
        LOGITS[:, 0] + PRIOR.log(),
        torch.cat([Z[:, 0], Z[:, 1], QUEUE]) @ Z[:, 0].T / 0.2,
    )  # [5, 2], [14, 5]
    s[range(5), range(5)] = -torch.inf
    expected = torch.cat([o, s.T], dim=1).logsumexp(1) - o[range(5), Y]
    assert paco_loss(
        Z, Y, LOGITS[:, :1], PRIOR, QUEUE, QUEUE_LABELS, alpha=0.0
    ).item() == pytest.approx(expected.mean().item(), abs=1e-6)


def test_paco_keys_carry_no_gradient_and_gpacos_second_views_do():
    for views in (1, 2):
        z = Z.clone().requires_grad_()
        paco_loss(z, Y, LOGITS[:, :views], PRIOR, QUEUE, QUEUE_LABELS).backward()
        assert bool(z.grad[:, 1].any()) == (views == 2) and z.grad[:, 0].abs().sum() > 0


def test_alpha_gives_both_centres_the_published_share():
    method = PaCo(
        arguments(variant="paco", queue=1024, alpha=None, randaugment=False), SUBSET, MODEL, seed()
    )
    generator, counts, seen = (
        seed(),
        torch.zeros(2),
        torch.zeros(2),
    )  # own-class rows of the anchors of 3000 drawn batches
    for _ in range(3000):
        labels, queue = ((torch.rand(n, generator=generator) < 0.01).long() for n in (64, 1024))
        same = labels.repeat(2) == labels[:, None]
        rows = same.sum(1) - 1 + (queue == labels[:, None]).sum(1)
        counts.index_add_(0, labels, rows.float())
        seen.index_add_(0, labels, torch.ones(64))
    np.testing.assert_allclose(1 / (1 + method.alpha * counts / seen), [1 / 1.4] * 2, rtol=1e-2)
    assert PaCo(
        arguments(variant="paco", queue=8, alpha=0.05, randaugment=False), SUBSET, MODEL, seed()
    ).alpha.tolist() == pytest.approx([0.05] * 2)


def test_queue_is_first_in_first_out_wraps_and_takes_batches_of_any_size():
    queue = Queue(5, 2, seed())
    assert queue.keys.norm(dim=1).sub(1).abs().max() < 1e-6 and queue.labels.tolist() == [-1] * 5
    queue.push(torch.full((3, 2), 1.0), torch.tensor([1, 1, 1]))
    queue.push(torch.full((3, 2), 2.0), torch.tensor([0, 0, 2]))
    assert queue.labels.tolist() == [2, 1, 1, 0, 0] and queue.keys[0].tolist() == [2, 2]
    queue.push(torch.arange(14.0).reshape(7, 2), torch.arange(7))
    assert sorted(queue.labels.tolist()) == [2, 3, 4, 5, 6]  # the last five of seven
    Queue(0, 2, seed()).push(torch.ones(3, 2), torch.ones(3).long())


def test_the_key_encoder_follows_slowly_and_learns_nothing_itself():
    model = nn.Linear(2, 1)
    slow = MomentumEncoder(model, momentum=0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    out = slow(model, torch.ones(1, 2))
    torch.testing.assert_close(slow.model.weight, before + 0.1)
    assert not out.requires_grad and not any(p.requires_grad for p in slow.parameters())


# supervised -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SUPERVISED["cases"])
def test_logit_adjustment_with_equal_shares_is_cross_entropy(case):
    f = {
        key.split("/")[-1]: SUPERVISED[key]
        for key in SUPERVISED.files
        if key.startswith(f"{case}/")
    }
    equals_reference(
        lambda x: logit_adjusted_loss(x, torch.from_numpy(f["targets"]), torch.tensor([0.5, 0.5])),
        f["logits"],
        f["loss_ce"],
        f["grad_ce"],
    )


def test_ldam_without_margins_is_scaled_cosine_cross_entropy_and_touches_the_target_alone():
    expected = F.cross_entropy(30 * COSINES, TARGETS_3)
    assert ldam_loss(COSINES, TARGETS_3, torch.zeros(2)).item() == pytest.approx(
        expected.item(), abs=1e-12
    )
    assert torch.equal(ldam_margins([80, 80]), torch.full((2,), 0.5))
    moved = COSINES.clone()
    moved[range(3), TARGETS_3] -= torch.tensor([0.2, 0.5], dtype=torch.float64)[TARGETS_3]
    assert ldam_loss(COSINES, TARGETS_3, torch.tensor([0.2, 0.5])).item() == pytest.approx(
        F.cross_entropy(30 * moved, TARGETS_3).item(), abs=1e-6
    )
    cosines = CosineClassifier(4)(torch.randn(6, 4)) / 30
    assert cosines.abs().max() <= 1 and cosines.shape == (6, 2)


@pytest.mark.parametrize("size", [2, 4, 10, 20, 24, 64])
def test_balanced_batches_take_turns_and_go_through_a_class_before_repeating(size):
    labels = torch.tensor([0] * 50 + [1] * 7)
    batches = balanced_batches(labels, size, 400 // size, seed())
    assert {len(batch) for batch in batches} == {size} and len(batches) == 400 // size
    assert np.array_equal(batches, balanced_batches(labels, size, 400 // size, seed()))
    drawn = np.concatenate(batches)
    for batch in batches:
        assert abs((labels[batch] == 1).sum() - size / 2) <= (
            4 if size in (10, 20) else 0
        )  # whole rounds fit into the others
    for c, size in ((0, 50), (1, 7)):
        own = drawn[labels[drawn] == c]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size
    with pytest.raises(ValueError, match="both classes"):
        balanced_batches(torch.zeros(9), 4, 1, seed())


def test_tau_normalisation_spans_from_the_joint_classifier_to_unit_rows():
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert torch.equal(tau_normalized(weight, 0), weight)
    torch.testing.assert_close(tau_normalized(weight, 1).norm(dim=1), torch.ones(2))


def test_lws_has_one_number_per_class_to_learn():
    scaled = LearnableScale(nn.Linear(4, 2))
    x = torch.randn(3, 4)
    assert sum(p.numel() for p in scaled.parameters() if p.requires_grad) == 2 and torch.equal(
        scaled(x), scaled.classifier(x)
    )


# all contrastive losses ----------------------------------------------------------------------------------------------------


def arguments(**options):
    return SimpleNamespace(temperature=0.1, epochs=4, batch_size=64, seed=0, **options)


SUBSET = SimpleNamespace(train_counts=lambda: [990, 10])
MODEL = nn.Linear(1, 1)  # stands in for a network of these dimensions
MODEL.dim, MODEL.encoder = 8, SimpleNamespace(dim=16)


def every_loss(labels, dim=8):
    """Each loss as a function of z alone, with everything else drawn once."""
    generator = seed(5)
    targets, queue = (
        antipodal_prototypes(dim, generator),
        F.normalize(torch.randn(6, dim, generator=generator), dim=1),
    )
    queue_labels, logits = (
        torch.tensor([0, 1, -1, 0, 0, 1]),
        torch.randn(len(labels), 2, 2, generator=generator),
    )
    batch, queued = (
        draw_k_positives(labels, 2, 3, generator),
        draw_k_from_queue(labels, queue_labels, 3, generator),
    )
    return {
        "kcl": lambda z: kcl_loss(z, labels, batch),
        "kcl queue": lambda z: kcl_loss(z, labels, queued, queue=queue),
        **{
            f"tsc {variant}": lambda z, variant=variant: tsc_loss(
                z, labels, targets, batch, variant=variant
            )
            for variant in ("ttc", "paper", "code")
        },
        "tsc queue": lambda z: tsc_loss(z, labels, targets, queued, queue=queue),
        "sbcl": lambda z: sbcl_loss(z, labels, torch.arange(len(labels)) // 3),
        "bcl": lambda z: bcl_loss(z, labels, targets),
        "paco": lambda z: paco_loss(z, labels, logits[:, :1], PRIOR, queue, queue_labels),
        "gpaco": lambda z: paco_loss(z, labels, logits, PRIOR, queue, queue_labels),
    }


@pytest.mark.parametrize("labels", [[0] * 8, [1] * 8, [0] * 7 + [1], [1], [0, 1]], ids=str)
def test_finite_without_minority_with_one_and_for_one_image(labels):
    labels = torch.tensor(labels)
    z = F.normalize(torch.randn(len(labels), 2, 8, generator=seed()), dim=2)
    for name, loss in every_loss(labels).items():
        x = z.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all(), name


def test_autocast_and_half_embeddings_change_nothing():
    z, labels = random_batch()
    z = z.float()
    for name, loss in every_loss(labels).items():
        expected = loss(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(z).item() == expected.item(), name
        assert loss(z.half()).dtype == torch.float32 and loss(z.half()).item() == pytest.approx(
            expected.item(), rel=2e-2
        ), name


def test_equal_embeddings_give_the_collapse_value():
    z, labels = torch.ones(8, 2, 4) / 2, torch.tensor([0] * 6 + [1] * 2)
    assert kcl_loss(z, labels, draw_k_positives(labels, 2, 3, seed())).item() == pytest.approx(
        collapse_value(8), abs=1e-5
    )
    queue = torch.ones(9, 4) / 2
    positives = draw_k_from_queue(labels, torch.zeros(9).long(), 3, seed())
    assert kcl_loss(z, labels, positives, queue=queue).item() == pytest.approx(
        math.log(10), abs=1e-5
    )


def test_wrong_shapes_are_refused():
    z, labels = random_batch()
    with pytest.raises(ValueError, match="need labels"):
        kcl_loss(z, labels[:-1], draw_k_positives(labels, 2, 3, seed()))
    with pytest.raises(ValueError, match="need labels"):
        bcl_loss(z, labels[:-1], antipodal_prototypes(8, seed()))
    with pytest.raises(ValueError, match="logits"):
        paco_loss(z, labels, torch.zeros(12, 2), PRIOR, QUEUE[:0], QUEUE_LABELS[:0])
    with pytest.raises(ValueError, match="ttc, paper, code"):
        tsc_loss(
            z,
            labels,
            antipodal_prototypes(8, seed()),
            draw_k_positives(labels, 2, 3, seed()),
            variant="papers",
        )
    with pytest.raises(ValueError, match="positives must be"):
        tsc_loss(z, labels, antipodal_prototypes(8, seed()), draw_k_positives(labels, 3, 3, seed()))
