"""Losses, classifiers and the balanced sampler of the supervised baselines."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import equals_reference, oracle

from baselines import (
    CosineClassifier,
    LearnableScale,
    balanced_batches,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    tau_normalized,
)
from baselines.classification import auc_margin_loss

SUPERVISED = oracle("supervised.npz")
COSINES = torch.tensor([[0.2, -0.1], [-0.3, 0.4], [0.1, 0.15]], dtype=torch.float64)
COSINE_LABELS = torch.tensor([0, 1, 1])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_close(value, expected, tolerance=1e-12):
    assert float(value) == pytest.approx(float(expected), abs=tolerance)


def test_golden_values_of_ldam():
    margins, weights = ldam_margins([300, 100]), effective_number_weights([300, 100])
    assert_close(ldam_loss(COSINES, COSINE_LABELS, margins), 5.329018, 1e-5)
    assert_close(ldam_loss(COSINES, COSINE_LABELS, margins, weights=weights), 6.136489, 1e-5)


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
    weights = effective_number_weights([300, 100])
    np.testing.assert_allclose(weights, (0.503747, 1.496253), atol=1e-6)


@pytest.mark.parametrize("case", SUPERVISED["cases"])
def test_logit_adjustment_with_equal_shares_is_cross_entropy(case):
    f = {
        key.split("/")[-1]: SUPERVISED[key]
        for key in SUPERVISED.files
        if key.startswith(f"{case}/")
    }
    targets, prior = torch.from_numpy(f["targets"]), torch.tensor([0.5, 0.5])
    equals_reference(
        lambda x: logit_adjusted_loss(x, targets, prior), f["logits"], f["loss_ce"], f["grad_ce"]
    )


def test_ldam_subtracts_the_margin_from_the_target_only():
    expected = F.cross_entropy(30 * COSINES, COSINE_LABELS)
    assert_close(ldam_loss(COSINES, COSINE_LABELS, torch.zeros(2)), expected)
    assert torch.equal(ldam_margins([80, 80]), torch.full((2,), 0.5))
    margins, moved = torch.tensor([0.2, 0.5], dtype=torch.float64), COSINES.clone()
    moved[range(3), COSINE_LABELS] -= margins[COSINE_LABELS]
    expected = F.cross_entropy(30 * moved, COSINE_LABELS)
    assert_close(ldam_loss(COSINES, COSINE_LABELS, margins), expected)


def test_cosine_classifier_returns_scaled_cosines():
    cosines = CosineClassifier(4)(torch.randn(6, 4, generator=rng())) / 30
    assert cosines.abs().max() <= 1 and cosines.shape == (6, 2)


@pytest.mark.parametrize("size", [2, 4, 10, 20, 24, 64])
def test_balanced_batches_use_up_a_class_before_they_repeat_an_image(size):
    labels = torch.tensor([0] * 50 + [1] * 7)
    batches = balanced_batches(labels, size, 400 // size, rng())
    assert {len(batch) for batch in batches} == {size} and len(batches) == 400 // size
    assert np.array_equal(batches, balanced_batches(labels, size, 400 // size, rng()))
    # Batches of 10 and 20 cut a round of both classes in two.
    slack = 4 if size in (10, 20) else 0
    for batch in batches:
        assert abs((labels[batch] == 1).sum() - size / 2) <= slack
    drawn = np.concatenate(batches)
    for c, count in ((0, 50), (1, 7)):
        members = drawn[labels[drawn] == c]
        for start in range(0, len(members) - count + 1, count):
            assert len(set(members[start : start + count])) == count


def test_balanced_batches_need_every_class():
    with pytest.raises(ValueError, match="every class"):
        balanced_batches(torch.zeros(9), 4, 1, rng())


def test_tau_normalisation_keeps_rows_at_0_and_gives_unit_rows_at_1():
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert torch.equal(tau_normalized(weight, 0), weight)
    torch.testing.assert_close(tau_normalized(weight, 1).norm(dim=1), torch.ones(2))


def test_lws_trains_one_number_per_class():
    scaled, x = LearnableScale(nn.Linear(4, 2)), torch.randn(3, 4, generator=rng())
    assert sum(p.numel() for p in scaled.parameters() if p.requires_grad) == 2
    assert torch.equal(scaled(x), scaled.classifier(x))


# --------------------------------------------------------------------------------------------------
# AUC-margin loss
# --------------------------------------------------------------------------------------------------


def min_max_form(logits, targets, a, b, alpha, margin=1.0):
    """The objective of Yuan et al. 2021, before its inner optimum is taken."""
    h = logits.softmax(1)[:, 1]
    positive, negative = h[targets == 1], h[targets == 0]
    gap = margin + negative.mean() - positive.mean()
    spread = (positive - a).square().mean() + (negative - b).square().mean()
    return spread + 2 * alpha * gap - alpha**2


def solve_min_max_form(logits, targets):
    """Find the saddle point by one Newton step: the form is quadratic in a, b and alpha."""
    inner = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def gradient(values):
        form = min_max_form(logits.detach(), targets, *values)
        return torch.autograd.grad(form, values, create_graph=True)[0]

    hessian = torch.autograd.functional.jacobian(gradient, inner)
    return (-torch.linalg.solve(hessian, gradient(inner))).detach()


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_auc_margin_equals_the_min_max_form_at_its_saddle_point(scale):
    logits = scale * torch.randn(20, 2, generator=rng(), dtype=torch.float64)
    targets = (torch.arange(20) % 4 == 0).long()
    inner = solve_min_max_form(logits, targets)
    assert inner[2] > 0, "the saddle point lies inside alpha >= 0"
    values, gradients = [], []
    for loss in (auc_margin_loss, lambda z, y: min_max_form(z, y, *inner)):
        z = logits.clone().requires_grad_()
        value = loss(z, targets)
        value.backward()
        values.append(value.item())
        gradients.append(z.grad)
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert gradients[0].abs().max() > 1e-4
    swapped = auc_margin_loss(logits.flip(1), 1 - targets)
    assert_close(swapped, values[0])
    h = logits.softmax(1)[:, 1]
    by_hand = h[targets == 1].var(correction=0) + h[targets == 0].var(correction=0)
    assert_close(values[0], by_hand + (1 + h[targets == 0].mean() - h[targets == 1].mean()) ** 2)


def test_auc_margin_is_that_of_libauc_at_its_inner_optimum():
    """Its v1 weighs the same loss with p (1 - p); pip install --no-deps libauc is enough."""
    libauc = pytest.importorskip("libauc.losses.auc")
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5):
        targets = (torch.arange(40) < 40 * share).long()
        logits = torch.randn(40, 2, generator=generator, dtype=torch.float64)
        h = logits.softmax(1)[:, 1]
        reference = libauc.AUCMLoss(version="v1", device="cpu").double()
        means = [h[targets == label].mean() for label in (1, 0)]
        values = (*means, 1 + means[1] - means[0])
        for name, value in zip(("a", "b", "alpha"), values, strict=True):
            getattr(reference, name).data.fill_(value)
        expected = reference(h, targets).detach() / (share * (1 - share))
        assert_close(auc_margin_loss(logits, targets), expected, 1e-6)


def test_auc_margin_without_one_class_is_the_variance_of_the_other():
    logits = torch.randn(6, 2, generator=rng(), dtype=torch.float64, requires_grad=True)
    for label in (0, 1):
        loss = auc_margin_loss(logits, torch.full((6,), label))
        assert_close(loss.detach(), logits.detach().softmax(1)[:, 1].var(correction=0))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    single = auc_margin_loss(logits[:1], torch.ones(1))
    assert_close(single.detach(), 0)


def test_auc_margin_is_zero_for_a_perfect_classifier_and_keeps_float32_under_autocast():
    logits, targets = torch.tensor([[40.0, -40.0], [-40.0, 40.0]]), torch.tensor([0, 1])
    assert_close(auc_margin_loss(logits, targets), 0)
    assert_close(auc_margin_loss(-logits, targets), 4)
    logits = torch.randn(64, 2, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = auc_margin_loss(logits, torch.arange(64) % 2)
    assert_close(low, auc_margin_loss(logits, torch.arange(64) % 2), 1e-6)
