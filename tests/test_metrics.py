"""The metrics against reference numbers, double loops and closed forms; the script."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, LargestTensor, one_line, oracle, real_data, run_script

import evaluate_metrics
from common import ContrastiveModel, embed, load_subset
from datasets.image_audit import find_equal_pictures, find_near_twins
from datasets.pack import read_index
from evaluate_metrics import (
    class_alignment_consistency,
    class_alignment_distance,
    entropy_uniformity,
    gaussian_potential,
    image_alignment,
    sample_alignment_accuracy,
    sample_alignment_distance,
)
from utils.cli import UserError
from utils.files import read_table, sha256, write_json
from utils.runs import make_generator, save_tensors
from utils.scores import write_predictions

METRICS = (
    sample_alignment_distance,
    sample_alignment_accuracy,
    class_alignment_distance,
    class_alignment_consistency,
    gaussian_potential,
    entropy_uniformity,
)
NAMES = ("sad", "saa", "cad", "cac", "gpu", "peu")
ORACLE = oracle("metrics.npz")


def cloud(views=2, n=60, dim=8, seed=0, scale=1.0):
    """Embeddings of two classes in mixed order, a fifth of class 1; views of an image are near."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(1, n, dim, generator=g) + 0.7 * torch.randn(views, n, dim, generator=g)
    return (scale * z).double(), (torch.randperm(n, generator=g) < n // 5).long()


def reference(case):
    f = {key.split("/")[1]: ORACLE[key] for key in ORACLE.files if key.startswith(f"{case}/")}
    z = f["embeddings"].reshape(int(f["n_views"]), int(f["n_samples"]), -1)
    return z, f["labels"], f, lambda name: np.array([f[f"{name}_0"].mean(), f[f"{name}_1"].mean()])


@pytest.mark.parametrize("case", ORACLE["cases"])
def test_metrics_equal_the_reference(case):
    z, labels, f, pair = reference(case)
    rows, k = len(z) * np.bincount(labels), int(f["k"])
    np.testing.assert_allclose(
        sample_alignment_distance(z, labels), pair("sad"), rtol=0, atol=1e-10
    )
    np.testing.assert_allclose(gaussian_potential(z, labels), pair("gpu"), rtol=0, atol=1e-10)
    cad = class_alignment_distance(z, labels).numpy()
    np.testing.assert_allclose(
        cad * (rows - 1) / rows, pair("cad"), rtol=0, atol=1e-10
    )  # the docstring's conversions
    np.testing.assert_allclose(pair("cad") * rows / (rows - 1), cad, rtol=0, atol=1e-10)
    assert not f["ties"]
    np.testing.assert_allclose(sample_alignment_accuracy(z, labels), pair("saa"), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        class_alignment_consistency(z, labels), pair("cac_noself"), rtol=0, atol=1e-9
    )
    fewer = class_alignment_consistency(z, labels, k - 1).numpy()
    np.testing.assert_allclose((100 + (k - 1) * fewer) / k, pair("cac_self"), rtol=0, atol=1e-9)
    np.testing.assert_allclose((k * pair("cac_self") - 100) / (k - 1), fewer, rtol=0, atol=1e-9)
    as_float32 = torch.from_numpy(z).float()
    for metric in METRICS[:5]:
        np.testing.assert_allclose(metric(as_float32, labels), metric(z, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ORACLE["cases"])
def test_entropy_uniformity_has_the_mean_of_the_reference(case):
    z, labels, f, _ = reference(case)
    repeats = 40
    peu = entropy_uniformity(z, labels, repeats, make_generator(1)).numpy()
    for c in (0, 1):
        assert (
            abs(peu[c] - f[f"peu_{c}_mean"])
            < 4 * f[f"peu_{c}_std"] * math.sqrt(1 / 1000 + 1 / repeats) + 0.01
        )


@pytest.mark.parametrize("views, seed", [(2, 1), (4, 2)])
def test_metrics_equal_double_loops(views, seed):
    z, labels = cloud(views, n=20, dim=5, seed=seed)
    rows = [(z[v, i].numpy(), i, int(labels[i])) for v in range(views) for i in range(20)]
    distance = [[float(np.sqrt(((a - b) ** 2).sum())) for b, _, _ in rows] for a, _, _ in rows]
    k = int(0.1 * len(rows))
    expected = {name: ([], []) for name in ("sad", "saa", "cad", "cac", "gpu")}
    for i in range(20):
        expected["sad"][labels[i]].append(
            np.mean([np.linalg.norm(z[0, i] - z[v, i]) for v in range(1, views)])
        )
    for a, (_, image, label) in enumerate(rows):
        others = sorted((b for b in range(len(rows)) if b != a), key=lambda b: distance[a][b])
        mates = [distance[a][b] for b in others if rows[b][2] == label]
        expected["saa"][label].append(100 * (rows[others[0]][1] == image))
        expected["cad"][label].append(np.mean(mates))
        expected["cac"][label].append(100 * np.mean([rows[b][2] == label for b in others[:k]]))
        expected["gpu"][label].append(np.mean([math.exp(-2 * d * d) for d in mates]))
    expected = {name: [np.mean(of_class) for of_class in pair] for name, pair in expected.items()}
    np.testing.assert_allclose(sample_alignment_distance(z, labels), expected["sad"], rtol=1e-12)
    np.testing.assert_allclose(sample_alignment_accuracy(z, labels), expected["saa"], rtol=1e-12)
    np.testing.assert_allclose(class_alignment_distance(z, labels), expected["cad"], rtol=1e-12)
    np.testing.assert_allclose(
        class_alignment_consistency(z, labels, 0.1), expected["cac"], rtol=1e-12
    )
    np.testing.assert_allclose(
        class_alignment_consistency(z, labels, k), expected["cac"], rtol=1e-12
    )
    np.testing.assert_allclose(gaussian_potential(z, labels), expected["gpu"], rtol=1e-10)


def test_rows_worked_by_hand():
    line = torch.tensor([0.0, 1.0, 3.0]).reshape(1, 3, 1)  # three images on a line, one view
    labels = [0, 0, 1]
    assert class_alignment_consistency(line, labels, 1).tolist() == [100, 0]
    assert class_alignment_consistency(line, labels, 2).tolist() == [50, 0]
    z = torch.tensor([[0.0, 3.0], [1.0, 7.0]])[
        ..., None
    ]  # two images, views at 0 and 1, at 3 and 7
    labels = [0, 1]
    assert sample_alignment_distance(z, labels).tolist() == [1, 4]
    assert sample_alignment_accuracy(z, labels).tolist() == [
        100,
        50,
    ]  # 3 is nearer to 1 than to its own 7
    np.testing.assert_allclose(class_alignment_distance(z, labels), [1, 4], rtol=1e-12)
    np.testing.assert_allclose(
        gaussian_potential(z, labels), [math.exp(-2), math.exp(-32)], rtol=1e-10
    )
    assert class_alignment_consistency(z, labels, 1).tolist() == [100, 50]


@pytest.mark.parametrize(
    "z, labels", [cloud(), cloud(3, n=40), (torch.ones(2, 9, 2), [0, 1, 1] * 3)]
)
def test_images_average_to_the_metrics_of_their_class(z, labels):
    labels = torch.as_tensor(labels)
    for neighborhood in (0.1, 5):
        saa, cac = image_alignment(z, labels, neighborhood)
        for values, metric in (
            (saa, sample_alignment_accuracy(z, labels)),
            (cac, class_alignment_consistency(z, labels, neighborhood)),
        ):
            means = [values[labels == c].mean() for c in (0, 1)]
            np.testing.assert_allclose(means, metric, rtol=1e-12)
    assert image_alignment(z[:1], labels, 5)[0] is None


def test_entropy_of_two_occupied_points():
    """Class 0 in one place: 0. Class 1, 8 rows, half in each of two far places: 1 bit of 3."""
    z = torch.zeros(2, 8, 2)
    z[:, :4, 0], z[:, 4:6, 0], z[:, 6:, 0] = 1, 2, -5  # length does not count
    np.testing.assert_allclose(entropy_uniformity(z, [0] * 4 + [1] * 4), [0, 100 / 3], atol=1e-12)


@pytest.mark.parametrize("point", [torch.ones(16) / 4, torch.linspace(-1, 1, 16), torch.zeros(16)])
def test_a_collapse_has_the_documented_values(point):
    z, labels = point.expand(2, 50, 16), torch.tensor([0] * 45 + [1] * 5)
    np.testing.assert_allclose(sample_alignment_distance(z, labels), [0, 0])
    np.testing.assert_allclose(sample_alignment_accuracy(z, labels), [100 / 99, 100 / 99])  # chance
    np.testing.assert_allclose(class_alignment_distance(z, labels), [0, 0], atol=1e-7)
    np.testing.assert_allclose(
        class_alignment_consistency(z, labels), [100 * 89 / 99, 100 * 9 / 99]
    )  # the classes' shares
    np.testing.assert_allclose(gaussian_potential(z, labels), [1, 1])
    np.testing.assert_allclose(entropy_uniformity(z, labels), [0, 0], atol=1e-12)


def test_a_tight_cluster_far_from_the_origin_is_resolved():
    """Dot products of the raw rows would lose the neighbours in rounding."""
    z, labels = cloud()
    far = z * 1e-6 + torch.full((8,), 100.0, dtype=torch.float64)
    np.testing.assert_allclose(
        sample_alignment_accuracy(far, labels), sample_alignment_accuracy(z, labels)
    )
    np.testing.assert_allclose(
        class_alignment_consistency(far, labels), class_alignment_consistency(z, labels)
    )
    np.testing.assert_allclose(
        class_alignment_distance(far, labels), 1e-6 * class_alignment_distance(z, labels), rtol=1e-6
    )


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_do_not_change_results_and_bound_memory(metric, monkeypatch):
    z, labels = cloud(n=60, dim=4)  # 120 rows
    expected = metric(z, labels)
    for at_once in (1, 3 * 120 + 1, 5000):
        monkeypatch.setattr(evaluate_metrics, "CHUNK_DISTANCES", at_once)
        with LargestTensor() as largest:
            np.testing.assert_allclose(metric(z, labels), expected, rtol=1e-12)
        assert largest.numel <= max(at_once, 1024 * 4)  # less than the 14 400 pairs
    # 1024 * 4: what PEU draws at a time, whatever the chunk


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_pure(metric):
    z, labels = cloud(seed=3)
    before, leaf = z.clone(), z.clone().requires_grad_()
    first = metric(z, labels)
    for other in METRICS:
        other(z, labels)
    assert torch.equal(metric(z, labels), first) and torch.equal(
        z, before
    )  # the reference's depend on who came before
    assert (
        first.dtype == torch.float64
        and first.shape == (2,)
        and not metric(leaf, labels).requires_grad
    )
    assert torch.equal(metric(z.numpy(), labels.numpy()), first)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(metric(z[:, order], labels[order]), first, rtol=1e-12)
    np.testing.assert_allclose(metric(z, 1 - labels), first.flip(0), rtol=1e-12)


@pytest.mark.parametrize(
    "metric, z, labels, words",
    [
        (sample_alignment_distance, torch.ones(1, 40, 2), [0, 1] * 20, "two"),
        (sample_alignment_accuracy, torch.ones(1, 40, 2), [0, 1] * 20, "two"),
        (class_alignment_distance, torch.ones(1, 3, 2), [0, 0, 1], "class 1 has a single row"),
        (gaussian_potential, torch.ones(1, 3, 2), [0, 1, 1], "class 0 has a single row"),
        (entropy_uniformity, torch.ones(1, 3, 2), [0, 0, 1], "class 1 has a single row"),
        (class_alignment_consistency, torch.ones(2, 9, 2), [0, 1, 1] * 3, "0 of 17"),
        (
            lambda z, y: class_alignment_consistency(z, y, 18),
            torch.ones(2, 9, 2),
            [0, 1, 1] * 3,
            "18 of 17",
        ),
        (
            lambda z, y: class_alignment_consistency(z, y, 5.0),
            torch.ones(2, 9, 2),
            [0, 1, 1] * 3,
            "no share between 0 and 1",
        ),
        *[
            (metric, *case)
            for metric in METRICS
            for case in [
                (torch.ones(2, 40, 2), [1] * 40, "of class 1"),
                (torch.ones(2, 40, 2), [1, 2] * 20, "0 to C-1"),
                (torch.ones(2, 40, 2), [0, 1], r"labels \[40\]"),
                (torch.ones(40, 2), [0, 1] * 20, "views, images"),
                (torch.full((2, 40, 2), torch.nan), [0, 1] * 20, "NaN"),
            ]
        ],
    ],
)
def test_input_that_does_not_fit_is_an_error_and_not_nan(metric, z, labels, words):
    with pytest.raises(ValueError, match=words):
        metric(z, labels)


def test_a_class_of_one_image_is_enough_with_two_views():
    z, labels = cloud()[0], torch.tensor([1] + [0] * 59)
    for metric in METRICS:
        assert metric(z, labels).isfinite().all()


# the script ---------------------------------------------------------------------------------------


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate_metrics.py", *map(str, args)])
    evaluate_metrics.main()


def read(path):
    return json.loads(path.read_text())


NAMES_OF_IMAGES = [f"=cmd{i}.png" for i in range(36)]


def make_subset(folder):
    """Write a subset of 36 random images of 16 px; class "few" has label 0, "many" label 1."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.integers(0, 256, (36, 16, 16, 1), dtype=np.uint8))
    labels = [0, 1, 1] * 12
    with open(folder / "index.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "split", "label", "class", "width", "height", "source"])
        table.writerows(
            [i, "", label, ["few", "many"][label], 16, 16, NAMES_OF_IMAGES[i]]
            for i, label in enumerate(labels)
        )
    splits = {"train": list(range(6)), "val": list(range(6, 12)), "test": list(range(12, 36))}
    counts = {
        split: {str(c): sum(labels[row] == c for row in rows) for c in (0, 1)}
        for split, rows in splits.items()
    }
    write_json(
        folder / "99-1.json",
        dict(
            name="noise",
            ratio="99-1",
            classes=["few", "many"],
            minority=0,
            counts=counts,
            splits=splits,
            size=16,
            recipe="medical",
            mean=[0.5],
            std=[0.3],
            images_sha256=sha256(folder / "images.npy"),
            index_sha256=sha256(folder / "index.csv"),
        ),
    )
    return load_subset(folder / "99-1.json")


@pytest.fixture
def run(tmp_path):
    """A finished pre-training run with random weights."""
    subset = make_subset(tmp_path / "subsets" / "noise")
    folder = tmp_path / "runs" / "noise" / "99-1" / "supmin" / "seed0"
    torch.manual_seed(0)
    model = ContrastiveModel("resnet8", 8)
    save_tensors(folder / "checkpoint.pt", {"model": model.state_dict()})
    save_tensors(folder / "encoder.pt", model.encoder.state_dict())
    write_json(
        folder / "config.json",
        dict(
            method="supmin",
            dataset="noise",
            ratio="99-1",
            arch="resnet8",
            projection_dim=8,
            size=16,
            seed=0,
            batch_size=16,
            subset="../../../../../subsets/noise/99-1.json",
            sha256=subset.sha256,
            rows_sha256=subset.rows_sha256,
        ),
    )
    return folder


def test_a_run_gets_metrics_and_a_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "runs/noise/99-1/supmin/seed0", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "few (minority)" in printed and "next: python report.py runs --html" in printed
    found = read(run / "metrics.json")
    expected = dict(space="projection", split="test", views=2, n=[8, 16], minority=0)
    assert {key: found[key] for key in expected} == expected

    subset = load_subset(tmp_path / "subsets" / "noise" / "99-1.json")
    model = ContrastiveModel("resnet8", 8)
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    labels = torch.from_numpy(subset.labels[12:])
    data = subset, subset.splits["test"], torch.device("cpu")
    projection, features = (
        embed(network, *data, views=2, generator=make_generator(0))
        for network in (model, model.encoder)
    )
    for values, z in ((found, projection), (found["encoder"], F.normalize(features, dim=2))):
        for name, metric in zip(NAMES, METRICS, strict=True):
            np.testing.assert_allclose(values[name], metric(z, labels), rtol=1e-4, atol=1e-6)

    picture = np.load(run / "embedding.npz", allow_pickle=False)
    assert picture["xy"].dtype == np.float32 and picture["xy"].shape == (24, 2)
    assert np.isfinite(picture["xy"]).all() and picture["labels"].tolist() == labels.tolist()
    assert picture["minority"] == 0 and picture["map"] == "PCA"
    assert (run / "embedding.png").read_bytes().startswith(b"\x89PNG")

    call(monkeypatch, run, "--device", "cpu")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="neighborhood.*--out"):
        call(monkeypatch, run, "--neighborhood", 5)
    assert read(run / "metrics.json") == found
    words = ["--neighborhood", 5, "--out", "five", "--picture", "none", "--device", "cpu"]
    call(monkeypatch, run, *words)
    expected = class_alignment_consistency(projection, labels, 5)
    np.testing.assert_allclose(read(Path("five/metrics.json"))["cac"], expected, atol=1e-6)
    assert not Path("five/embedding.png").exists() and read(run / "metrics.json") == found


def test_every_image_is_audited(run, monkeypatch, capsys):
    def audit():
        call(monkeypatch, run, "--picture", "none", "--device", "cpu")
        header, rows = read_table(run / "neighbours.csv")
        assert header == ["file", "label", "saa", "cac", "p"]
        return [dict(zip(header, row, strict=True)) for row in rows]

    images = audit()
    assert [image["file"] for image in images] == NAMES_OF_IMAGES[12:]
    assert "\n'=cmd12.png,0," in (run / "neighbours.csv").read_text()
    found = read(run / "metrics.json")
    for c in (0, 1):
        group = [image for image in images if image["label"] == str(c)]
        assert np.mean([float(image["saa"]) for image in group]) == pytest.approx(
            found["saa"][c] / 100
        )
        assert np.mean([float(image["cac"]) for image in group]) == pytest.approx(found["cac"][c])
    assert {image["p"] for image in images} == {""}

    p = np.linspace(0, 1, 23)
    rows = {"val": [12], "test": range(13, 36)}
    both = {"val": np.array([[0.5, 0.5]]), "test": np.stack([1 - p, p], 1)}
    path = run / "probe_predictions.csv"
    write_predictions(path, NAMES_OF_IMAGES, [0] * 36, rows, both, 1, ["a", "b"])
    assert [image["p"] for image in audit()] == ["", *map(str, p.tolist())]
    assert "finished already" not in capsys.readouterr().out
    for name in ("neighbours.csv", "hard_examples.png"):
        (run / name).unlink()
        audit()
        assert "finished already" not in capsys.readouterr().out and (run / name).exists()
    audit()
    assert "finished already" in capsys.readouterr().out


def test_near_twins_are_the_nearest_pairs_of_two_classes():
    features = np.array([[0.0], [10], [20], [0.1], [0.2], [10.5], [29]])
    is_rare = np.arange(7) < 3
    assert find_near_twins(features, is_rare, 2) == [0, 3, 1, 5]
    assert find_near_twins(features, is_rare, 9) == [0, 3, 1, 5, 2, 6]


def test_equal_pictures_with_different_labels_are_found_across_splits(tmp_path):
    subset = make_subset(tmp_path / "subset")
    assert find_equal_pictures(subset, subset.labels, NAMES_OF_IMAGES) == []
    # labels 0, 1 and 0; row 0 is of train, and "other" in no split of this ratio
    leaks = [["other", *(NAMES_OF_IMAGES[row] for row in (0, 14, 21))], ["other"]]
    write_json(subset.path, {**read(subset.path), "leaks": leaks})
    assert find_equal_pictures(subset, subset.labels, NAMES_OF_IMAGES) == [0, 14]


def test_the_twin_of_breastmnist_is_found(make, tmp_path):
    make("breastmnist", "--data-root", real_data("breastmnist.npz").parent, "--size", 28)
    subset = load_subset(tmp_path / "subsets/breastmnist/natural.json")
    *_, names = read_index(tmp_path / "subsets/breastmnist/index.csv")
    pair = find_equal_pictures(subset, subset.labels, names)
    assert [names[row].partition("/")[2] for row in pair] == ["train/115", "test/76"]
    assert subset.labels[pair].tolist() == [0, 1]


def test_a_supervised_run_is_measured_at_the_encoder(run, monkeypatch):
    config = read(run / "config.json")
    del config["projection_dim"]
    write_json(run / "config.json", config)
    (run / "checkpoint.pt").unlink()
    call(monkeypatch, run, "--smoke", "--device", "cpu")
    found = read(run / "metrics.json")
    assert found["space"] == "encoder" and found["encoder"]["cac"] == found["cac"]
    assert found["smoke"]


def test_a_run_that_is_not_finished_is_refused(run, monkeypatch):
    torch.manual_seed(1)
    save_tensors(run / "checkpoint.pt", {"model": ContrastiveModel("resnet8", 8).state_dict()})
    with pytest.raises(UserError, match="encoder.pt differ; finish"):
        call(monkeypatch, run)
    (run / "encoder.pt").unlink()
    with pytest.raises(UserError, match="encoder.pt: no such file"):
        call(monkeypatch, run)
    assert not (run / "metrics.json").exists()


def test_embeddings_of_any_model(tmp_path, monkeypatch):
    z, labels = cloud(n=30)
    np.savez(tmp_path / "mine.npz", z=z, labels=labels.numpy().astype(np.uint8))
    call(monkeypatch, "--embeddings", tmp_path / "mine.npz", "--picture", "pca", "--device", "cpu")
    found = read(tmp_path / "mine_metrics" / "metrics.json")
    for name, metric in zip(NAMES, METRICS, strict=True):
        np.testing.assert_allclose(found[name], metric(z, labels), rtol=1e-9)
    assert found["minority"] == 1 and found["views"] == 2
    files = {"metrics.json", "embedding.png", "embedding.npz", "neighbours.csv"}
    assert {path.name for path in (tmp_path / "mine_metrics").glob("[!.]*")} == files
    _, rows = read_table(tmp_path / "mine_metrics" / "neighbours.csv")
    assert [row[0] for row in rows] == list(map(str, range(30)))


def test_collapsed_embeddings_of_one_view(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "one.npz", tmp_path / "collapsed"
    np.savez(path, z=np.ones((30, 3), np.float32), labels=cloud(n=30)[1])
    call(monkeypatch, "--embeddings", path, "--out", out, "--neighborhood", 3)
    found = read(out / "metrics.json")
    assert found["sad"] is None and found["saa"] is None and found["gpu"] == pytest.approx([1, 1])
    printed = capsys.readouterr().out
    assert "one view" in printed and "all embeddings are equal" in printed
    assert "its rows are 1.73 to 1.73 long, not of unit length" in printed
    assert not np.load(out / "embedding.npz")["xy"].any()


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(x=np.ones((40, 2)), y=[0, 1] * 20), "has no array z, only x, y; "),
        (dict(z=np.ones((40, 2))), "has no array labels, only z; "),
        (dict(z=np.ones((2, 40, 2, 1)), labels=[0, 1] * 20), r"\[2, 40, 2, 1\]"),
        (dict(z=np.ones((40, 2)), labels=[0, 1]), r"labels \[40\]"),
        (dict(z=np.full((40, 2), np.nan), labels=[0, 1] * 20), "NaN"),
        (dict(z=np.ones((40, 2)), labels=[1] * 40), "of class 1"),
        (dict(z=np.ones((40, 2)), labels=[1, 2] * 20), "0 to C-1"),
        (dict(z=np.ones((40, 2)), labels=["a", "b"] * 20), "labels is <U1, not numbers"),
        (dict(z=np.array([{}] * 40), labels=[0, 1] * 20), "allow_pickle=False"),
        (dict(z=np.ones((6, 2)), labels=[0, 1] * 3), "--neighborhood 0.05"),
        (dict(z=np.ones((40, 2)), labels=[1] + [0] * 39), "class 1 has a single row"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(arrays, words, tmp_path, monkeypatch):
    np.savez(tmp_path / "z.npz", **arrays)
    with pytest.raises(UserError, match=words) as error:
        call(monkeypatch, "--embeddings", tmp_path / "z.npz")
    assert "\n" not in str(error.value) and not (tmp_path / "z_metrics" / "metrics.json").exists()


def test_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "z.npz").write_text("no archive")
    (tmp_path / "light.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport evaluate_metrics\n"
        "evaluate_metrics.run_main(evaluate_metrics.main)"
    )
    one_line(
        run_script(tmp_path / "light.py", "--embeddings", "z.npz", cwd=tmp_path, code=2),
        "z.npz",
        "not an .npz file",
    )
    np.save(tmp_path / "z.npy", np.ones((4, 2)))
    for args, words in (
        (["--embeddings", "z.npy"], "z.npy: not an .npz file .numpy.savez writes one."),
        (["--embeddings", "absent.npz"], "no such file"),
        ([], "--embeddings"),
        (["runs", "--embeddings", "z.npz"], "either run folders or"),
        (["absent"], "config.json"),
    ):
        with pytest.raises(UserError, match=words), pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            call(patch, *args)
