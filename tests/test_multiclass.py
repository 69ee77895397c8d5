"""More than two classes: losses against double loops, simplex, subsets, the chain of scripts."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call
from pictures import picture
from PIL import Image
from sklearn.datasets import load_digits
from test_report import call as call_report
from test_report import make_run

import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report
from baselines import bcl_loss, draw_k_positives, kcl_loss, paco_loss, sbcl_loss, tsc_loss
from baselines.shared import class_prior
from common import (
    antipodal_prototypes,
    class_weights,
    draw_supervised_majority,
    load_subset,
    ntxent_loss,
    simplex_prototypes,
    supcon_loss,
    supmin_loss,
    suppro_loss,
)
from datasets.ratios import choose_tail, long_tail_counts
from datasets.splits import draw_splits
from evaluate_metrics import compute_metrics
from reporting import figures, multiclass
from reporting.claims_runs import find_regimes
from reporting.collect import collect
from reporting.tables import group_by_seed, report_markdown
from utils.cli import UserError
from utils.files import read_log, read_table
from utils.scores import (
    classification_scores,
    read_predictions,
    score_splits,
    write_predictions,
)

SUBSET = "subsets/digits-3classes/lt4.json"
SMALL = "--smoke --arch resnet8 --size 8 --watch-every 1".split()
T = 0.2
RATIOS = ("lt10", "lt1", "natural")
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 1, 0])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(labels=LABELS, views=2, dim=6, seed=0):
    z = torch.randn(len(labels), views, dim, generator=rng(seed), dtype=torch.float64)
    return F.normalize(z, dim=2), labels


def loop_loss(z, positives, extra=lambda i, v: ()):
    """Equation (1) by double loops. positives(i, v, j, w): is view w of image j one of view v of i?

    extra(i, v): vectors that are positives but stand in no denominator.
    """
    views = [(i, v) for i in range(z.shape[0]) for v in range(z.shape[1])]
    losses = []
    for i, v in views:
        others = [(j, w) for j, w in views if (j, w) != (i, v)]
        s = {(j, w): float(z[i, v] @ z[j, w]) / T for j, w in others}
        log_sum = math.log(sum(math.exp(value) for value in s.values()))
        pulled = [s[j, w] for j, w in others if positives(i, v, j, w)]
        pulled += [float(z[i, v] @ p) / T for p in extra(i, v)]
        losses.append(log_sum - sum(pulled) / len(pulled))
    return sum(losses) / len(losses)


def test_supcon_and_ntxent_equal_double_loops_with_three_classes():
    z, y = batch()
    same_class = loop_loss(z, lambda i, v, j, w: y[i] == y[j])
    assert supcon_loss(z, y, T).item() == pytest.approx(same_class, rel=1e-12)
    same_image = loop_loss(z, lambda i, v, j, w: i == j)
    assert ntxent_loss(z, T).item() == pytest.approx(same_image, rel=1e-12)


@pytest.mark.parametrize("tail", [{1, 2}, [2, 1], (2,), torch.tensor([1, 2])], ids=str)
def test_supmin_supervises_a_set_of_tail_classes(tail):
    z, y = batch()
    members = {int(c) for c in tail}

    def positives(i, v, j, w):
        return i == j or (int(y[i]) in members and y[i] == y[j])

    expected = loop_loss(z, positives)
    assert supmin_loss(z, y, tail, T).item() == pytest.approx(expected, rel=1e-12)


def test_supmin_of_one_class_in_a_set_equals_its_label_and_of_all_classes_supcon():
    z, y = batch()
    assert torch.equal(supmin_loss(z, y, {2}, T), supmin_loss(z, y, 2, T))
    assert torch.equal(supmin_loss(z, y, {0, 1, 2}, T), supcon_loss(z, y, T))


def test_the_supervised_majority_is_drawn_outside_the_tail():
    drawn = draw_supervised_majority(LABELS, {1, 2}, 1.0, rng())
    assert torch.equal(drawn, LABELS == 0)
    assert draw_supervised_majority(LABELS, {2}, 0.5, rng()).sum() == 4


@pytest.mark.parametrize("margin", [0.1, 1.0, [0.0, 0.5, 1.5]], ids=str)
def test_suppro_attracts_up_to_the_margin_over_the_best_other_prototype(margin):
    z, y = batch()
    prototypes = simplex_prototypes(3, 6, rng(1)).double()
    margins = margin if isinstance(margin, list) else [margin] * 3

    def extra(i, v):
        cosines = [float(z[i, v] @ p) for p in prototypes]
        best_other = max(cosine for c, cosine in enumerate(cosines) if c != y[i])
        return [prototypes[y[i]]] if cosines[y[i]] <= best_other + margins[y[i]] else []

    expected = loop_loss(z, lambda i, v, j, w: i == j, extra)
    assert suppro_loss(z, y, prototypes, T, margin).item() == pytest.approx(expected, rel=1e-9)
    attracted = sum(len(extra(i, v)) for i in range(len(z)) for v in (0, 1))
    assert 0 < attracted < 20 or margin == 1.0


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 8), (3, 2), (4, 3), (10, 9), (10, 128)])
def test_prototypes_are_the_corners_of_a_simplex(classes, dim):
    p = simplex_prototypes(classes, dim, rng(3)).double()
    expected = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64)
    torch.testing.assert_close(p @ p.T, expected.fill_diagonal_(1), rtol=0, atol=2e-6)
    torch.testing.assert_close(p.sum(0), torch.zeros(dim).double(), rtol=0, atol=2e-6)


def test_two_prototypes_are_a_random_unit_vector_and_its_opposite():
    p = F.normalize(torch.randn(128, generator=rng(5)), dim=0)
    assert torch.equal(antipodal_prototypes(128, rng(5)), torch.stack([p, -p]))
    assert torch.equal(simplex_prototypes(2, 128, rng(5)), torch.stack([p, -p]))


def test_a_simplex_needs_room():
    with pytest.raises(ValueError, match="4 prototypes need .* 3 dimensions"):
        simplex_prototypes(4, 2, rng())


def test_class_weights_are_inverse_frequencies():
    torch.testing.assert_close(class_weights([1, 2, 4]), torch.tensor([4.0, 2, 1]) / 7)
    with pytest.raises(ValueError, match="positive count per class"):
        class_weights([3, 0, 5])


def test_kcl_and_tsc_equal_double_loops_with_three_classes():
    z, y = batch()
    n, drawn = len(z), draw_k_positives(LABELS, 2, 2, rng())
    is_drawn = lambda i, v, j, w: bool(drawn[v * n + i, w * n + j])  # noqa: E731
    expected = loop_loss(z, is_drawn)
    assert kcl_loss(z, y, drawn, T).item() == pytest.approx(expected, rel=1e-12)

    targets, losses = simplex_prototypes(3, 6, rng(1)).double(), []
    views = [(i, v) for i in range(n) for v in (0, 1)]
    for i, v in views:
        others = [(j, w) for j, w in views if (j, w) != (i, v)]
        columns = [z[j, w] for j, w in others] + list(targets)
        log_sum = math.log(sum(math.exp(float(z[i, v] @ column) / T) for column in columns))
        positives = [z[j, w] for j, w in others if is_drawn(i, v, j, w)] + [targets[y[i]]]
        losses.append(log_sum - sum(float(z[i, v] @ p) / T for p in positives) / len(positives))
    expected = sum(losses) / len(losses)
    assert tsc_loss(z, y, targets, drawn, T).item() == pytest.approx(expected, rel=1e-9)


def test_bcl_averages_each_of_three_classes_in_the_denominator():
    z, y = batch()
    centres = F.normalize(torch.randn(3, 6, generator=rng(2), dtype=torch.float64), dim=1)
    rows = [(z[i, v], int(y[i])) for v in (0, 1) for i in range(len(z))]
    losses = []
    for a, (anchor, label) in enumerate(rows):
        members = {c: [centres[c]] for c in range(3)}
        for b, (row, c) in enumerate(rows):
            if b != a:
                members[c].append(row)
        s = {c: [float(anchor @ m) / T for m in members[c]] for c in members}
        denominator = sum(sum(map(math.exp, s[c])) / len(s[c]) for c in s)
        losses.append(math.log(denominator) - sum(s[label]) / len(s[label]))
    expected = sum(losses) / len(losses)
    assert bcl_loss(z, y, centres, T).item() == pytest.approx(expected, rel=1e-12)


def test_paco_equals_double_loops_with_three_classes():
    z, y = batch()
    logits = torch.randn(len(z), 1, 3, generator=rng(4), dtype=torch.float64)
    queue = F.normalize(torch.randn(5, 6, generator=rng(6), dtype=torch.float64), dim=1)
    queue_labels, prior = torch.tensor([0, 1, 2, -1, 2]), torch.tensor([0.5, 0.3, 0.2])
    alpha, losses = [0.1, 0.2, 0.3], []
    for i in range(len(z)):
        rows = [(z[j, v], int(y[j])) for v in (0, 1) for j in range(len(z)) if (j, v) != (i, 0)]
        rows += list(zip(queue, queue_labels.tolist(), strict=True))
        s = [(float(z[i, 0] @ row) / T, label) for row, label in rows]
        o = [float(logits[i, 0, c]) + math.log(prior[c]) for c in range(3)]
        log_z = math.log(sum(map(math.exp, o)) + sum(math.exp(value) for value, _ in s))
        own = [value - log_z for value, label in s if label == y[i]]
        a = alpha[y[i]]
        losses.append(-(o[y[i]] - log_z + a * sum(own)) / (1 + a * len(own)))
    value = paco_loss(z, y, logits, prior, queue, queue_labels, T, alpha)
    assert value.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_sbcl_without_subclasses_is_supcon_and_its_coarse_term_follows_the_class():
    z, y = batch()
    temperatures = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    images = torch.arange(len(z))
    # Each image a sub-class of its own: the fine term is NT-Xent, the coarse one SupCon by class.
    value = sbcl_loss(z, y, images, T, temperatures, beta=1.0)
    coarse = []
    rows = [(i, v) for i in range(len(z)) for v in (0, 1)]
    for i, v in rows:
        t = float(temperatures[y[i]])
        s = {(j, w): float(z[i, v] @ z[j, w]) / t for j, w in rows if (j, w) != (i, v)}
        pulled = [s[j, w] for j, w in s if y[j] == y[i]]
        coarse.append(math.log(sum(map(math.exp, s.values()))) - sum(pulled) / len(pulled))
    expected = ntxent_loss(z, T).item() + sum(coarse) / len(coarse)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", ["ntxent", "supcon", "supmin", "suppro", "kcl", "bcl", "queue"])
def test_embeddings_that_are_not_of_unit_length_are_an_error(loss):
    z, y = batch()
    p = simplex_prototypes(3, 6, rng()).double()
    drawn = draw_k_positives(y, 2, 2, rng())
    first = torch.ones(len(z), 2, dtype=torch.bool)
    losses = {
        "ntxent": lambda z: ntxent_loss(z, T),
        "supcon": lambda z: supcon_loss(z, y, T),
        "supmin": lambda z: supmin_loss(z, y, 2, T),
        "suppro": lambda z: suppro_loss(z, y, p, T),
        "kcl": lambda z: kcl_loss(z, y, drawn, T),
        "bcl": lambda z: bcl_loss(z, y, p, T),
        "queue": lambda z: kcl_loss(z, y, first, T, p[:1]),
    }
    assert losses[loss](z).isfinite()
    assert losses[loss](z.bfloat16()).isfinite()
    for wrong in (2 * z, z * torch.linspace(0.5, 1, len(z))[:, None, None]):
        with pytest.raises(ValueError, match="need unit length"):
            losses[loss](wrong)


def test_a_row_of_zeros_is_what_normalisation_leaves_of_a_dead_network():
    z, y = batch()
    z[0] = 0
    assert supcon_loss(z, y, T).isfinite()


def test_the_class_prior_has_an_entry_per_class():
    class Subset:
        def train_counts(self):
            return [5, 3, 2]

    torch.testing.assert_close(class_prior(Subset()), torch.tensor([0.5, 0.3, 0.2]))


# subsets ------------------------------------------------------------------------------------------


def test_a_long_tail_falls_exponentially():
    assert long_tail_counts([5000] * 10, 100) == [
        5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50
    ]  # fmt: skip
    assert long_tail_counts([5400] * 3, 100) == [5400, 540, 54]
    assert long_tail_counts([600, 630], 50) == [600, 12]
    assert long_tail_counts([7, 7, 7], 1) == [7, 7, 7]


def test_a_small_class_limits_the_long_tail_and_loses_no_image():
    for last in range(1, 200):
        kept = long_tail_counts([10**6, 10**6, last], 100)
        assert kept[2] == last and kept == sorted(kept, reverse=True)


def test_the_tail_is_below_half_of_the_mean_size_and_never_empty():
    assert choose_tail([5400, 540, 54], None) == (2, [1, 2])
    assert choose_tail([54, 5400, 540], None) == (0, [0, 2])
    assert choose_tail([10, 10, 10], None) == (2, [2])
    assert choose_tail([100, 80, 60], [0]) == (2, [0])


def test_splits_are_drawn_within_each_class():
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    split = draw_splits(labels, {"test": 20, "val": 10}, seed=0)
    for c, n in enumerate([700, 200, 100]):
        drawn = [int((split[labels == c] == name).sum()) for name in ("train", "val", "test")]
        assert drawn == [7 * n // 10, n // 10, n // 5]


def test_a_subset_of_several_classes_records_them_and_its_tail(make):
    done = make("digits", "--classes", "7,1,4,0", "--imbalance", 10, "--ratios", "lt1,natural")
    assert "lt10" in done.stdout and "7 / 1 / 4 / 0 (rare)" in done.stdout
    subsets = {name: load_subset(f"subsets/digits-4classes/{name}.json") for name in RATIOS}
    subset, balanced = subsets["lt10"], subsets["lt1"]
    assert subset.classes == ["7", "1", "4", "0"] and subset.minority == 3
    counts = subset.train_counts()
    assert counts == long_tail_counts([counts[0]] * 4, 10) and subset.tail == [2, 3]
    assert len(set(balanced.train_counts())) == 1 and balanced.tail == [3]
    shown = load_digits().images[load_digits().target == 4][0]
    row = np.flatnonzero(subset.labels == 2)[0]
    np.testing.assert_array_equal(subset.images[row, ..., 0], np.rint(shown * 255 / 16))
    assert set(subset.splits["train"]) <= set(subsets["natural"].splits["train"])
    make("digits", "--classes", "7,1,4,0", "--verify")


def test_two_classes_may_have_a_long_tail_too(make):
    make("digits", "--imbalance", 50)
    subset = load_subset("subsets/digits/lt50.json")
    assert subset.train_counts() == [630, 12] and subset.tail == [1]
    assert "tail" not in json.loads(subset.path.read_text())


def test_the_tail_may_be_named(make):
    make("digits", "--classes", "3,5,8", "--tail", "3,8", "--ratios", "natural")
    assert load_subset("subsets/digits-3classes/natural.json").tail == [0, 2]


def test_class_folders_are_ordered_as_named(make, tmp_path):
    for name, n in (("a", 30), ("b", 20), ("c", 40), ("d", 5)):
        for i in range(n):
            picture(tmp_path / f"photos/{name}/{i}.png", seed=i)
    make("folder", "--data-root", "photos", "--size", 16, "--classes", "c,a,b", "--imbalance", 4)
    subset = load_subset("subsets/photos-3classes/lt4.json")
    assert subset.classes == ["c", "a", "b"] and subset.train_counts() == [28, 14, 7]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--classes 3", "two or more classes"),
        ("--classes 3,5,x", "no class 'x'"),
        ("--classes 3,5,8 --tail 4", "not all"),
        ("--classes 3,5,8 --tail 3,5,8", "not all"),
        ("--tail 4", "add --classes"),
        ("--classes 3,5,8 --ratios 99-1", "use --imbalance or natural"),
        ("--classes 3,5,8 --imbalance 1000", "leaves no training image of 8"),
        ("--imbalance 0.5", "from 1 up"),
        ("--ratios lt0.5", "give percent"),
    ],
)
def test_a_mistake_in_the_classes_is_one_line(refused, words, says):
    refused("digits", *words.split(), says=[says])


# metrics ------------------------------------------------------------------------------------------


def test_metrics_of_three_classes_equal_double_loops():
    z, y = batch(seed=3)
    z = z.transpose(0, 1)  # [V, n, D]
    rows, labels, image = z.flatten(0, 1), y.repeat(2), torch.arange(len(y)).repeat(2)
    distance = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    per_class = {name: [] for name in ("saa", "cac", "cad", "gpu", "sad")}
    for c in range(3):
        members = [i for i in range(len(rows)) if labels[i] == c]
        nearest = {i: distance[i].argsort()[:4].tolist() for i in members}
        hits = [image[nearest[i][0]] == image[i] for i in members]
        per_class["saa"].append(100 * sum(map(float, hits)) / len(hits))
        same = [sum(int(labels[j]) == c for j in nearest[i]) / 4 for i in members]
        per_class["cac"].append(100 * sum(same) / len(same))
        pairs = [float(distance[i, j]) for i in members for j in members if i != j]
        per_class["cad"].append(sum(pairs) / len(pairs))
        per_class["gpu"].append(sum(math.exp(-2 * d * d) for d in pairs) / len(pairs))
        views = [float((z[0, i] - z[1, i]).norm()) for i in range(len(y)) if y[i] == c]
        per_class["sad"].append(sum(views) / len(views))
    found = compute_metrics(z, y, neighborhood=4)
    for name, expected in per_class.items():
        assert found[name] == pytest.approx(expected, rel=1e-9), name
    assert len(found["peu"]) == 3


def test_metrics_refuse_a_class_without_an_image():
    z, y = batch()
    with pytest.raises(ValueError, match="0 to C-1"):
        compute_metrics(z.transpose(0, 1), 2 * y, neighborhood=4)


# from the subset to the scores --------------------------------------------------------------------


def test_scores_of_three_classes_are_means_over_the_classes():
    y = np.array([0, 0, 0, 1, 1, 2])
    p = np.random.default_rng(0).dirichlet([1, 1, 1], len(y))
    scores = classification_scores(p, y, 2)
    predicted = p.argmax(1)
    recalls = [(predicted[y == c] == c).mean() for c in range(3)]
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert scores["accuracy"] == pytest.approx((predicted == y).mean())
    wins = [
        np.mean([[a > b for b in p[y != c, c]] for a in p[y == c, c]]) for c in range(3)
    ]  # no ties
    assert scores["auroc"] == pytest.approx(np.mean(wins))
    rare = score_splits({"val": p, "test": p}, {"val": y, "test": y}, [1, 2])
    is_rare = y > 0
    found = (p[:, 1:].sum(1) > 0.5)[is_rare].mean()
    assert rare["test"]["sensitivity"] == pytest.approx(found)
    assert "auroc" not in rare["test_interval"] and "sensitivity" in rare["test_interval"]


def test_the_centroid_probe_takes_the_nearest_of_three_means():
    x = torch.randn(60, 5, generator=rng(), dtype=torch.float64)
    y = np.arange(60) % 3
    x[:, 0] += 3 * torch.from_numpy(y)
    probe, _ = linear_probe.fit_centroids(x, y, x, y, 2, None)
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    nearest = torch.cdist(x, means).argmin(1)
    assert torch.equal(probe(x).argmax(1), nearest)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with a run on three classes of digits, and its subsets."""
    folder, before = tmp_path_factory.mktemp("three"), Path.cwd()
    os.chdir(folder)
    words = "--classes", "3,5,8", "--imbalance", 4, "--ratios", "lt1", "--workers", 1
    call(make_subsets, "digits", *words)
    call(pretrain, SUBSET, *SMALL)
    yield Path("runs/digits-3classes/lt4/supmin/seed0")
    os.chdir(before)


def read(path):
    return json.loads(Path(path).read_text())


def test_the_chain_of_scripts_takes_three_classes(three, capsys):
    config = read(three / "config.json")
    assert config["classes"] == ["3", "5", "8"] and config["tail"] == [2]
    call(linear_probe, three)
    probe = read(three / "probe.json")
    assert {"accuracy", "auroc", "average_precision"} <= probe["test"].keys()
    assert probe["test_balanced_train"]["balanced_accuracy"] > 0
    table = read_predictions(three / "predictions.csv")
    assert list(table)[3:] == ["p_minority", "p_3", "p_5", "p_8"]
    np.testing.assert_allclose(table["p_3"] + table["p_5"] + table["p_8"], 1)
    np.testing.assert_array_equal(table["p_minority"], table["p_8"])
    call(evaluate_metrics, three)
    metrics = read(three / "metrics.json")
    assert all(len(metrics[name]) == 3 for name in ("sad", "saa", "cad", "cac", "gpu", "peu"))
    call(finetune, three, "--smoke")
    call(report, "runs", "--out", "tables")
    assert "lt4" in capsys.readouterr().out + Path("tables/report.md").read_text()
    header, rows = read_table(Path("tables/results.csv"))
    row = dict(zip(header, rows[0], strict=True))
    assert float(row["cac_class1"]) == pytest.approx(metrics["cac"][1])
    assert float(row["cac_majority"]) == pytest.approx(np.mean(metrics["cac"][:2]))


@pytest.mark.parametrize("method", [name for name in pretrain.METHODS if name != "supmin"])
def test_every_method_trains_on_three_classes(three, method):
    call(pretrain, SUBSET, *SMALL, "--method", method)
    log = read_log(three.parents[1] / method / "seed0")
    assert all(np.isfinite(line["loss"]) for line in log if "epoch" in line)


@pytest.mark.parametrize("method", ["suppro", "tsc"])
def test_more_classes_than_corners_are_refused(three, monkeypatch, method):
    monkeypatch.setattr(pretrain, "PROJECTION_DIM", 1)
    with pytest.raises(UserError, match=f"--method {method}: takes up to 2 classes, not 3"):
        call(pretrain, SUBSET, *SMALL, "--method", method)


@pytest.mark.parametrize("loss", finetune.LOSSES)
def test_every_supervised_loss_trains_on_three_classes(three, loss):
    words = SUBSET, "--loss", loss, "--smoke", "--arch", "resnet8", "--size", 8
    if loss == "auc_margin":
        with pytest.raises(UserError, match="two classes"):
            call(finetune, *words)
        with pytest.raises(UserError, match="two classes"):
            call(finetune, three, "--loss", loss, "--smoke")
        return
    call(finetune, *words, "--balanced-batches")
    result = read(f"runs/digits-3classes/lt4/{loss}/seed0/finetune.json")
    assert 0 <= result["test"]["balanced_accuracy"] <= 1


@pytest.mark.parametrize("retrain", ["crt", "lws", "tau_norm"])
def test_a_classifier_is_trained_again_on_three_classes(three, retrain):
    if not Path("runs/digits-3classes/lt4/ce/seed0/classifier.pt").exists():
        call(finetune, SUBSET, "--loss", "ce", "--smoke", "--arch", "resnet8", "--size", 8)
    call(finetune, "runs/digits-3classes/lt4/ce/seed0", "--retrain", retrain, "--smoke")


def test_new_images_get_a_probability_of_each_class(three, tmp_path):
    images = load_digits().images[:3]
    for i, image in enumerate(images):
        Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(tmp_path / f"{i}.png")
    call(linear_probe, three, "--predict", tmp_path, "--csv", "out.csv")
    header, rows = read_table(Path("out.csv"))
    assert header == ["file", "p_3", "p_5", "p_8", "predicted", "threshold"] and len(rows) == 3
    # No threshold decides between three classes.
    assert all(row[4] in ("3", "5", "8") and row[5] == "" for row in rows)


def test_the_comparison_of_class_numbers_has_a_row_per_run(three, tmp_path, monkeypatch):
    call(linear_probe, three, "--rows", "own")
    call(evaluate_metrics, three)
    place = tmp_path / "runs/digits-3classes/lt4/supmin"
    place.mkdir(parents=True)
    shutil.copytree(three, place / "seed0")
    monkeypatch.setattr(sys, "argv", ["multiclass", str(tmp_path / "runs"), str(tmp_path)])
    multiclass.main()
    header, rows = read_table(tmp_path / "runs.csv")
    assert header == multiclass.COLUMNS and rows[0][:4] == ["digits", "3", "supmin", "0"]
    cac = read(three / "metrics.json")["cac"]
    assert float(rows[0][-1]) == pytest.approx(100 * (np.mean(cac) - 100 / 3) / (200 / 3), abs=0.01)
    assert (tmp_path / "multiclass.png").stat().st_size > 1000
    (place / "seed0/metrics.json").unlink()
    multiclass.main()
    assert read_table(tmp_path / "runs.csv")[1] == [[*rows[0][:-2], "nan", "nan"]]


def make_five(folder, method="supmin"):
    """Make a finished run of five classes, the last two in the tail; their mean CAC is 18 %."""
    classes = {"classes": list("abcde"), "minority": 4, "tail": [3, 4]}
    run = make_run(folder, method, ratio="lt10", probe=0.19, balanced_train=None, **classes)
    metrics = {"cac": [10, 10, 30, 30, 10], "saa": [1] * 5, "n": [10] * 5, "space": "projection"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def test_figures_and_tables_of_five_classes(tmp_path):
    make_five(tmp_path)
    groups = group_by_seed(collect(tmp_path))
    (axes,) = figures.cac_accuracy_figure(groups).axes
    lines = {line.get_label(): np.ravel(line.get_data()) for line in axes.lines}
    assert lines["Supervised Minority"].tolist() == pytest.approx([18, 19])
    assert [*axes.get_xlim()] == [15, 101] and 20 in axes.lines[-1].get_xdata()  # chance
    (axes,) = figures.accuracy_figure(groups).axes
    assert axes.get_xlim()[0] == 15 and axes.lines[-1].get_xdata()[0] == 20
    assert "the rarest class" in report_markdown(groups, [], [], "report.py runs")
    # The claims are about two classes.
    assert find_regimes(collect(tmp_path)) == []
    two = tmp_path / "two"
    make_run(two, "supmin", probe=0.6, cac=[60, 70], saa=[1, 1])
    groups = group_by_seed(collect(two))
    assert "the rarest class" not in report_markdown(groups, [], [], "report.py runs")
    assert figures.cac_accuracy_figure(groups).axes[0].get_xlim()[0] == 45


def test_a_comparison_and_a_page_of_five_classes_name_the_tail(tmp_path, monkeypatch, capsys):
    for method in ("supmin", "supcon"):
        rows = np.arange(50)
        names, p = [f"image{i}" for i in rows], np.full((50, 5), 0.2)
        place = make_five(tmp_path, method) / "predictions.csv"
        write_predictions(place, names, rows % 5, {"test": rows}, {"test": p}, [3, 4], "abcde")
    places = [tmp_path / "digits" / "lt10" / method for method in ("supmin", "supcon")]
    call_report(monkeypatch, "--compare", *places)
    assert "50 test images, 20 of them d + e, scored against the others" in capsys.readouterr().out
    call_report(monkeypatch, places[0], "--html", "--out", tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert "and the charts: d + e against the rest" in page


def test_a_variant_has_a_folder_of_its_own():
    subset = SimpleNamespace(name="digits", ratio="99-1")

    def folder(*flags):
        args = pretrain.parse_args(["subset.json", *flags])
        return str(pretrain.default_folder(args, subset))

    assert folder() == "runs/digits/99-1/supmin/seed0"
    assert folder("--method", "paco", "--epochs", "9") == "runs/digits/99-1/paco/seed0"
    assert folder("--minority-per-batch", "4").endswith("supmin-minority-per-batch4/seed0")
    assert folder("--method", "suppro", "--margin", "0.5").endswith("suppro-margin0.5/seed0")
    assert folder("--method", "tsc", "--variant", "paper").endswith("tsc-variant-paper/seed0")
    assert folder("--relu", "--temperature", "0.1").endswith("supmin-relu-temperature0.1/seed0")
