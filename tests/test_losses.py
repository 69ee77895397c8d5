"""The losses equal reference numbers, golden values, a library, closed forms and double loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    LargestTensor,
    equals_reference,
    fixture_f5,
    oracle,
    random_batch,
    value_and_grad,
)
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from sklearn.datasets import make_blobs

import common
from common import (
    antipodal_prototypes,
    class_weights,
    collapse_value,
    draw_supervised_majority,
    focal_loss,
    ntxent_loss,
    supcon_loss,
    supmin_loss,
    suppro_loss,
    warmup_cosine,
)
from utils import contrast_kernel

CONTRASTIVE, PROTOTYPE, RATIO, SUPERVISED, SCHEDULE = (
    oracle(f"{name}.npz")
    for name in ("contrastive", "prototype", "supmin_ratio", "supervised", "lr_schedule")
)


@pytest.mark.parametrize("case", CONTRASTIVE["cases"])
def test_ntxent_supcon_supmin_equal_the_reference(case):
    f = {
        key.split("/")[-1]: CONTRASTIVE[key]
        for key in CONTRASTIVE.files
        if "/" not in key or key.startswith(f"{case}/")
    }
    labels = torch.from_numpy(f["labels"])
    for i, (t, base) in enumerate(zip(f["temperature"], f["base_temperature"], strict=True)):
        scale = t / base if base > 0 else 1  # the kit leaves this factor out
        for name, loss in {
            "ntxent": lambda z: ntxent_loss(z, t),
            "supcon": lambda z: supcon_loss(z, labels, t),
            "supmin": lambda z: supmin_loss(z, labels, int(f["minority"]), t),
        }.items():
            equals_reference(
                lambda z: scale * loss(z), f["features"], f[f"loss_{name}"][i], f[f"grad_{name}"][i]
            )


@pytest.mark.parametrize("case", RATIO["cases"])
def test_supmin_with_supervised_majority_equals_the_reference(case):
    labels, minority = torch.from_numpy(RATIO[f"{case}/labels"]), int(RATIO[f"{case}/minority"])
    for i, drawn in enumerate(RATIO[f"{case}/selected_majority"]):
        equals_reference(
            lambda z: supmin_loss(z, labels, minority, 0.07, torch.from_numpy(drawn)),
            RATIO[f"{case}/features"],
            RATIO[f"{case}/loss"][i],
            RATIO[f"{case}/grad"][i],
        )
        assert (
            drawn.sum()
            == draw_supervised_majority(
                labels, minority, RATIO["ratio"][i], torch.Generator()
            ).sum()
        )


@pytest.mark.parametrize("case", PROTOTYPE["cases"])
def test_suppro_equals_the_reference(case):
    labels, prototypes = (
        torch.from_numpy(PROTOTYPE[f"{case}/labels"]),
        torch.from_numpy(PROTOTYPE[f"{case}/prototypes"]),
    )
    for c, (t, base) in enumerate(
        zip(PROTOTYPE["temperature"], PROTOTYPE["base_temperature"], strict=True)
    ):
        for e, margin in enumerate(zip(PROTOTYPE["eps_0"], PROTOTYPE["eps_1"], strict=True)):
            value, grad = value_and_grad(
                lambda z: (
                    suppro_loss(z, labels, prototypes, t, margin) * (t / base if base > 0 else 1)
                ),
                PROTOTYPE[f"{case}/features"],
            )
            np.testing.assert_allclose(
                value, PROTOTYPE[f"{case}/loss"][c, e], rtol=1e-9, atol=1e-10
            )
            np.testing.assert_allclose(grad, PROTOTYPE[f"{case}/grad"][c, e], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", SUPERVISED["cases"])
def test_focal_and_class_weights_equal_the_reference(case):
    f = {
        key.split("/")[-1]: SUPERVISED[key]
        for key in SUPERVISED.files
        if key.startswith(f"{case}/")
    }
    targets, weights = torch.from_numpy(f["targets"]), class_weights(f["class_counts"])
    np.testing.assert_allclose(weights, f["class_weights"], rtol=1e-6)
    close = dict(rtol=1e-6, atol=1e-9)
    for i, gamma in enumerate(SUPERVISED["gamma"]):
        for name, w in (("focal", None), ("focal_weighted", weights)):
            value, grad = value_and_grad(lambda x: focal_loss(x, targets, gamma, w), f["logits"])
            np.testing.assert_allclose(value, f[f"loss_{name}"][i], **close)
            np.testing.assert_allclose(grad, f[f"grad_{name}"][i], **close)
    np.testing.assert_allclose(
        F.cross_entropy(torch.from_numpy(f["logits"]), targets, weight=weights.double()),
        f["loss_wce"],
        **close,
    )


@pytest.mark.parametrize("case", SCHEDULE["cases"])
def test_schedule_equals_the_reference(case):
    f = {key: SCHEDULE[f"{case}/{key}"] for key in ("lr", "base_lr", "max_epochs", "warmup_epochs")}
    ours = [
        warmup_cosine(e, int(f["max_epochs"]), float(f["base_lr"]), int(f["warmup_epochs"]))
        for e in range(int(f["max_epochs"]) + 1)
    ]
    np.testing.assert_allclose(ours, f["lr"], rtol=1e-9)


def test_schedule_shorter_than_its_warmup_stays_finite():
    assert [warmup_cosine(e, 1, 1.0, 1) for e in range(2)] == [0.1, 1.0]
    assert all(0.1 <= warmup_cosine(e, 3, 1.0, 10) < 0.4 for e in range(3))


def test_focal_loss_has_a_gradient_where_the_network_is_certain():
    for gamma in (0.0, 0.5, 2.0):
        value, grad = value_and_grad(
            lambda x: focal_loss(x, torch.tensor([0]), gamma),
            np.array([[50.0, 0.0]], dtype=np.float32),
        )
        assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize(
    "loss, golden",
    [
        (lambda z, y: supcon_loss(z, y, 0.1), 7.282728),
        (lambda z, y: ntxent_loss(z, 0.1), 0.432170),
        (lambda z, y: supmin_loss(z, y, 1, 0.1), 1.148265),
        (
            lambda z, y: suppro_loss(z, y, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.1, 1.0),
            3.122715,
        ),
    ],
)
def test_golden_values(loss, golden):
    assert loss(*fixture_f5()).item() == pytest.approx(golden, abs=1e-5)


def double_loop(z, positives, temperature):
    """Equation (1) term by term; positives(i, v, j, w): is (j, w) a positive of (i, v)?"""
    n, views, _ = z.shape
    anchors = [(i, v) for i in range(n) for v in range(views)]
    s = {(a, b): float(z[a] @ z[b]) / temperature for a in anchors for b in anchors}
    total = 0.0
    for a in anchors:
        others = [b for b in anchors if b != a]
        own = [s[a, b] for b in others if positives(*a, *b)]
        total += math.log(sum(math.exp(s[a, b]) for b in others)) - sum(own) / len(own)
    return total / len(anchors)


@pytest.mark.parametrize("views", [2, 3])
def test_losses_equal_a_double_loop(views):
    z, y = random_batch(views=views)
    same_image = lambda i, v, j, w: i == j  # noqa: E731
    same_class = lambda i, v, j, w: y[i] == y[j]  # noqa: E731
    supmin = lambda i, v, j, w: i == j or (y[i] == y[j] == 1)  # noqa: E731
    assert ntxent_loss(z, 0.2).item() == pytest.approx(double_loop(z, same_image, 0.2), abs=1e-12)
    assert supcon_loss(z, y, 0.2).item() == pytest.approx(
        double_loop(z, same_class, 0.2), abs=1e-12
    )
    assert supmin_loss(z, y, 1, 0.2).item() == pytest.approx(double_loop(z, supmin, 0.2), abs=1e-12)


def test_any_labels_of_any_number_of_classes():
    z, _ = random_batch()
    y = torch.tensor([2**40, -3, 7] * 4)
    assert supcon_loss(z, y, 0.2).item() == pytest.approx(
        double_loop(z, lambda i, v, j, w: y[i] == y[j], 0.2), abs=1e-12
    )
    supmin = lambda i, v, j, w: i == j or (y[i] == y[j] and y[i] != -3)  # noqa: E731
    assert supmin_loss(z, y, 7, 0.2, y == 2**40).item() == pytest.approx(
        double_loop(z, supmin, 0.2), abs=1e-12
    )


@pytest.mark.parametrize(
    "dtype, temperature, tolerance",
    [(torch.float64, 0.07, 1e-12), (torch.float32, 0.07, 1e-5), (torch.float32, 0.002, 1e-4)],
)
def test_the_kernel_equals_the_plain_form(dtype, temperature, tolerance, monkeypatch):
    """Value and gradient of all four losses; the last chunk of the 36 rows is a single row."""
    z, y = random_batch(n=18)
    z = z.to(dtype)
    for name, loss in every_loss(y, temperature=temperature).items():
        monkeypatch.setattr(common, "LARGE_BATCH", 2048)
        value, grad = value_and_grad(loss, z)
        monkeypatch.setattr(common, "LARGE_BATCH", 0)
        monkeypatch.setattr(contrast_kernel, "CHUNK", 7)
        chunked_value, chunked_grad = value_and_grad(loss, z)
        np.testing.assert_allclose(chunked_value, value, rtol=tolerance, err_msg=name)
        scale = np.abs(grad).max()
        np.testing.assert_allclose(chunked_grad, grad, rtol=0, atol=tolerance * scale, err_msg=name)


def test_near_collapse_float32_still_tells_where_to_go():
    """512 views of one class within 0.001 of each other: attraction and repulsion nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    z = 128**-0.5 + 1e-3 * torch.randn(256, 2, 128, generator=generator, dtype=torch.float64)
    z = F.normalize(z, dim=2).float()
    (value, grad), (exact, exact_grad) = (
        value_and_grad(lambda z: supcon_loss(z, torch.zeros(256)), x) for x in (z, z.double())
    )
    along_the_sphere = [
        g - (g * z.numpy()).sum(2, keepdims=True) * z.numpy() for g in (grad, exact_grad)
    ]
    assert np.linalg.norm(along_the_sphere[0] - along_the_sphere[1]) < 0.02 * np.linalg.norm(
        along_the_sphere[1]
    )
    assert abs(value - exact) < 2e-6


def test_the_temperature_gets_no_gradient_and_the_kernel_no_second_one(monkeypatch):
    z, y = random_batch()
    with pytest.raises(ValueError, match="temperature"):
        supcon_loss(z, y, torch.tensor(0.1, requires_grad=True))
    assert supcon_loss(z, y == 1) == supcon_loss(z, y)
    monkeypatch.setattr(common, "LARGE_BATCH", 0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(supcon_loss(z.requires_grad_(), y), z, create_graph=True)


@pytest.mark.parametrize("large_batch", [0, 2048])
def test_gradients_equal_finite_differences(monkeypatch, large_batch):
    monkeypatch.setattr(common, "LARGE_BATCH", large_batch)
    monkeypatch.setattr(contrast_kernel, "CHUNK", 5)
    z, y = random_batch(n=6, dim=3)
    for name, loss in every_loss(y, dim=3).items():
        assert torch.autograd.gradcheck(loss, z.requires_grad_()), name


def test_a_large_batch_needs_no_matrix_of_all_rows_by_all_rows(monkeypatch):
    monkeypatch.setattr(common, "LARGE_BATCH", 399)
    monkeypatch.setattr(contrast_kernel, "CHUNK", 16)
    z, y = random_batch(n=200)  # 400 rows of 8 dimensions
    for name, loss in every_loss(y).items():
        saved = []

        def save(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, LargestTensor() as largest:
            loss(z.requires_grad_()).backward()
        assert max(saved) == 400 * 8 and largest.numel == 400 * 16, name


def test_supcon_and_ntxent_equal_pytorch_metric_learning():
    z, y = random_batch(n=16)
    rows, labels = z.transpose(0, 1).flatten(0, 1), y.repeat(2)
    torch.testing.assert_close(supcon_loss(z, y, 0.1), SupConLoss(temperature=0.1)(rows, labels))
    torch.testing.assert_close(
        ntxent_loss(z, 0.1), NTXentLoss(temperature=0.1)(rows, torch.arange(16).repeat(2))
    )


def every_loss(y, dim=8, temperature=0.07):
    prototypes = antipodal_prototypes(dim, torch.Generator().manual_seed(3))
    return {
        "ntxent": lambda z: ntxent_loss(z, temperature),
        "supcon": lambda z: supcon_loss(z, y, temperature),
        "supmin": lambda z: supmin_loss(z, y, 1, temperature),
        "suppro": lambda z: suppro_loss(z, y, prototypes, temperature),
    }


def test_equal_embeddings_give_the_collapse_value():
    z, y = random_batch(n=64)
    z = z[:1, :1].expand(64, 2, 8)
    for name, loss in every_loss(y).items():
        if name != "suppro":  # its prototypes are not in the denominator
            assert loss(z).item() == pytest.approx(math.log(127), abs=1e-9)
    assert collapse_value(256) == pytest.approx(6.236, abs=1e-3)


def test_supmin_spans_from_published_to_supcon_and_knows_both_labels():
    z, y = random_batch()
    assert supmin_loss(z, y, 1, supervised_majority=y == 0).item() == pytest.approx(
        supcon_loss(z, y).item(), abs=1e-12
    )
    assert supmin_loss(z, y, 1).item() == pytest.approx(supmin_loss(z, 1 - y, 0).item(), abs=1e-12)
    assert supmin_loss(z, y, 1).item() != pytest.approx(supmin_loss(z, y, 0).item(), abs=1e-3)


def test_order_of_images_and_views_does_not_matter():
    z, y = random_batch()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    for name in every_loss(y):
        assert every_loss(y[order])[name](z[order].flip(1)).item() == pytest.approx(
            every_loss(y)[name](z).item(), abs=1e-12
        )


@pytest.mark.parametrize(
    "n, y", [(1, [0]), (1, [1]), (5, [0] * 5), (5, [1] * 5), (5, [0, 0, 1, 0, 0])]
)
def test_finite_without_minority_with_one_and_for_one_image(n, y):
    z, y = random_batch(n=n)[0], torch.tensor(y)
    for name, loss in every_loss(y).items():
        value, grad = value_and_grad(loss, z)
        assert np.isfinite(value) and np.isfinite(grad).all(), name


def test_autocast_and_half_embeddings_change_nothing():
    """The backward pass is called outside of autocast, as PyTorch asks for."""
    z, y = random_batch(n=32)
    for name, loss in every_loss(y).items():
        expected, expected_grad = value_and_grad(loss, z.float())
        x = z.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(x)
            assert loss(z.bfloat16()).dtype == torch.float32
        value.backward()
        np.testing.assert_array_equal(value.detach(), expected, err_msg=name)
        np.testing.assert_array_equal(x.grad, expected_grad, err_msg=name)


def test_prototypes_are_antipodal_get_no_gradient_and_stop_pulling_at_half_the_margin():
    p = antipodal_prototypes(128, torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(p[0], -p[1]) and p.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
    z, y = random_batch(dim=128)
    z.requires_grad_()
    suppro_loss(z, y, p).backward()
    assert p.grad is None and z.grad is not None
    for cosine, pulled in (
        (0.49, True),
        (0.51, False),
    ):  # view at this cosine to its own prototype; N = 1: no negatives
        view = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64).expand(
            1, 2, 2
        )
        value = suppro_loss(
            view, torch.tensor([0]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.1
        ).item()
        assert value == pytest.approx((1 - cosine) / 2 / 0.1 if pulled else 0, abs=1e-9)


def test_majority_draw_has_its_size_stays_in_the_majority_and_repeats():
    y = (torch.arange(100) < 7).long()
    drawn = draw_supervised_majority(y, 1, 0.5, torch.Generator().manual_seed(0))
    assert drawn.sum() == 46 and not drawn[y == 1].any()
    assert torch.equal(drawn, draw_supervised_majority(y, 1, 0.5, torch.Generator().manual_seed(0)))
    assert not torch.equal(
        drawn, draw_supervised_majority(y, 1, 0.5, torch.Generator().manual_seed(1))
    )
    with pytest.raises(ValueError, match="from 0 to 1"):
        draw_supervised_majority(y, 1, 1.5, torch.Generator())


def test_wrong_shapes_and_counts_are_refused():
    z, y = random_batch()
    with pytest.raises(ValueError, match="2 or more views"):
        ntxent_loss(z[:, :1])
    with pytest.raises(ValueError, match="need labels"):
        supcon_loss(z, y[:-1])
    with pytest.raises(ValueError, match="need labels"):
        supmin_loss(z, y, 1, supervised_majority=torch.tensor([True]))
    with pytest.raises(ValueError, match="positive count per class"):
        class_weights([0, 5])


def test_overfitting_one_batch_reaches_the_floor():
    """Separated classes leave log|P|: a view cannot tell its |P| positives apart."""
    points, y = make_blobs(16, n_features=8, centers=2, random_state=0)
    x, y = torch.from_numpy(points).float().repeat_interleave(2, 0), torch.from_numpy(y).long()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(200):
        loss = supcon_loss(F.normalize(network(x), dim=1).unflatten(0, (16, 2)), y, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 8 images of 2 views each, less the anchor.
    assert loss.item() == pytest.approx(math.log(15), abs=0.01)
