"""The linear probe: protocols against scikit-learn, training rows, sources, files, mistakes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, equal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import NearestCentroid

import common
import linear_probe
import pretrain
from baselines import probe_task
from common import embed, load_run, load_subset
from datasets.pack import read_index
from datasets.probe_rows import draw_one_percent
from reporting.collect import collect
from utils.cli import UserError
from utils.encoders import Pixels
from utils.runs import load_tensors

SUBSET = "subsets/digits/99-1.json"
CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny SupMin run."""
    words = ["--smoke", "--arch", "resnet8", "--size", 12, "--watch-every", 0]
    call(pretrain, SUBSET, *words, "--out", "run")
    return Path("run")


@pytest.fixture(scope="module")
def features(run):
    """{split: (features, labels)} of the run, and the path of an .npz file that holds them."""
    _, subset, encoder = load_run(run)
    data = {
        split: (embed(encoder, subset, rows, CPU), subset.labels[rows])
        for split, rows in subset.splits.items()
    }
    arrays = {split: x.numpy() for split, (x, _) in data.items()}
    arrays |= {f"{split}_labels": y.astype(np.uint8) for split, (_, y) in data.items()}
    np.savez("features.npz", **arrays)
    return data, Path("features.npz")


def read(path):
    return json.loads(Path(path).read_text())


def read_predictions(folder):
    with open(Path(folder, "predictions.csv"), encoding="utf-8") as file:
        return list(csv.DictReader(file))


# protocols ----------------------------------------------------------------------------------------


def test_probe_equals_scikit_learn_on_torchvision_features(workplace):
    run = Path("torchvision")
    words = ["--smoke", "--arch", "resnet18", "--stem", "imagenet", "--size", 24]
    call(pretrain, SUBSET, *words, "--epochs", 1, "--watch-every", 0, "--out", run)
    before = (run / "encoder.pt").read_bytes()
    call(linear_probe, run, "--smoke")
    probe = read(run / "probe.json")
    assert (run / "encoder.pt").read_bytes() == before
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(run / "encoder.pt", weights_only=True), strict=False)
    network.fc = torch.nn.Identity()
    subset = load_subset(SUBSET).limit_for_smoke()
    balanced = load_subset("subsets/digits/50-50.json").limit_for_smoke()
    images = torch.from_numpy(subset.images[:].copy()).permute(0, 3, 1, 2)
    x = common.center_view(images, torch.from_numpy(subset.sizes), 24)
    x, y = common.normalize(x, subset.mean, subset.std), subset.labels

    @torch.no_grad()
    def encode(rows):
        return network.eval()(x[rows]).double().numpy()

    test = subset.splits["test"]
    for ending, train in (
        ("", subset.splits["train"]),
        ("_balanced_train", balanced.splits["train"]),
    ):
        mean, std = encode(train).mean(0), encode(train).std(0, ddof=1) + 1e-12
        strength = probe["chosen" + ending]["C"]
        fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-6)
        fitted.fit((encode(train) - mean) / std, y[train])
        predicted = fitted.predict((encode(test) - mean) / std)
        scores = probe["test" + ending]
        expected = balanced_accuracy_score(y[test], predicted)
        assert scores["balanced_accuracy"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("flags", [[], ["--class-weights", "none"], ["--standardize", "no"]])
@pytest.mark.parametrize("n, dim, minority", [(400, 40, 8), (60, 100, 20)])
def test_logistic_regression_is_exact_on_raw_features(
    tmp_path, monkeypatch, n, dim, minority, flags
):
    """Features are correlated and far from standardised; one is a copy, one is constant."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    y = (np.arange(n) < minority).astype(int)
    x = draw.normal(size=(n, dim // 2)) @ draw.normal(size=(dim // 2, dim)) + y[:, None]
    x = 5 + 3 * x + 0.1 * draw.normal(size=(n, dim))
    x[:, 1], x[:, 2] = x[:, 0], 0
    arrays = {f"{split}{end}": a for split in SPLITS for end, a in (("", x), ("_labels", y))}
    np.savez("x.npz", **arrays)
    x = x.astype(np.float32).astype(np.float64)
    if "no" not in flags:
        x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0, ddof=1), 1)
    weight = None if "none" in flags else "balanced"
    for strength in linear_probe.STRENGTHS[::2]:
        monkeypatch.setattr(linear_probe, "STRENGTHS", [strength])
        call(linear_probe, "--embeddings", "x.npz", "--out", f"{strength}", *flags)
        exact = LogisticRegression(
            C=strength, class_weight=weight, solver="newton-cholesky", tol=1e-10, max_iter=1000
        )
        p = [float(row["p_minority"]) for row in read_predictions(f"{strength}")[:n]]
        np.testing.assert_allclose(p, exact.fit(x, y).predict_proba(x)[:, 1], atol=1e-3)
        assert read(f"{strength}/probe.json")["chosen"]["C"] == strength


def test_centroid_protocol_is_the_nearest_class_mean(features):
    data, path = features
    call(linear_probe, "--embeddings", path, "--protocol", "centroid", "--out", "centroid")
    probe, (x, y) = read("centroid/probe.json"), data["test"]
    nearest = NearestCentroid().fit(data["train"][0].double().numpy(), data["train"][1])
    expected = balanced_accuracy_score(y, nearest.predict(x.double().numpy()))
    assert probe["test"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-9)
    assert probe["class_weights"] is None and probe["standardize"] is False
    assert probe["chosen"].keys() == {"val_auroc"}


def test_reference_protocol_trains_and_keeps_the_other_probe(run):
    call(linear_probe, run)
    before = load_tensors(run / "probe.pt")
    call(linear_probe, run, "--protocol", "reference", "--epochs", 3)
    probe = read(run / "probe.json")
    assert probe["protocol"] == "reference" and 1 <= probe["chosen"]["epoch"] <= 3
    assert probe["optimizer"] == "adam" and probe["standardize"] is False
    assert not equal(before, load_tensors(run / "probe.pt"))
    assert read(run / "probe_cached.json")["protocol"] == "cached"


def test_reference_protocol_follows_its_flags(run, monkeypatch):
    """The weights of equal classes do nothing; optimizer and standardised features do."""
    monkeypatch.setattr(linear_probe, "LR", 0.1)
    words = [run, "--protocol", "reference", "--epochs", 1, "--rows", "subsampled", "--out"]
    variants = {
        "adam": [],
        "unweighted": ["--class-weights", "none"],
        "sgd": ["--optimizer", "sgd"],
        "standardized": ["--standardize", "yes"],
    }
    weights = {}
    for name, flags in variants.items():
        call(linear_probe, *words, f"ref/{name}", *flags)
        weights[name] = load_tensors(f"ref/{name}/probe.pt")["weight"]
    torch.testing.assert_close(weights["adam"], weights["unweighted"], rtol=1e-4, atol=1e-6)
    assert (weights["adam"] - weights["sgd"]).abs().max() > 0.01
    assert (weights["adam"] - weights["standardized"]).abs().max() > 0.01
    assert read("ref/unweighted/probe.json")["class_weights"] == "none"
    assert read("ref/sgd/probe.json")["optimizer"] == "sgd"


def test_a_probe_that_changes_the_encoder_is_an_error(run, monkeypatch):
    fit = linear_probe.fit_probe

    def change_batch_norm(task, *args):
        task.encoder.bn1.running_mean += 1e-6
        return fit(task, *args)

    monkeypatch.setattr(linear_probe, "fit_probe", change_batch_norm)
    with pytest.raises(RuntimeError, match="frozen encoder"):
        call(linear_probe, run, "--out", "changed")
    assert not Path("changed/probe.json").exists()


# training rows ------------------------------------------------------------------------------------


def test_rows_are_recorded_and_every_image_is_extracted_once(run, monkeypatch):
    extracted = []

    def record(encoder, subset, rows, *args, **options):
        extracted.append(rows)
        return embed(encoder, subset, rows, *args, **options)

    monkeypatch.setattr(probe_task, "embed", record)
    call(linear_probe, run, "--rows", *linear_probe.ROW_SETS, "--out", "rows")
    assert len(np.unique(np.concatenate(extracted))) == sum(map(len, extracted))
    probe = read("rows/probe.json")
    counts = {name: record["counts"] for name, record in probe["rows"].items()}
    assert counts["own"] == [620, 6] and counts["subsampled"] == [6, 6]
    assert counts["balanced"] == [313, 313] and counts["one-percent"] == [10, 10]
    for ending in linear_probe.KEY_ENDINGS.values():
        assert 0 <= probe["test" + ending]["auroc"] <= 1
        assert "val_auroc" in probe["chosen" + ending] and probe["val" + ending]


def test_one_percent_rows_are_training_images_of_the_data_set(run):
    """They depend on neither the ratio nor the run; a run with six rare images gets ten."""
    records, tasks = [], []
    for ratio in ("99-1", "50-50"):
        subset = load_subset(f"subsets/digits/{ratio}.json")
        args = parsed("run", "--rows", "one-percent")
        tasks.append(probe_task.make_task(run, run, subset, torch.nn.Identity(), args))
        records.append(tasks[-1].row_sets["one-percent"])
    np.testing.assert_array_equal(*records)
    _, split, _, _ = read_index(Path("subsets/digits/index.csv"))
    assert (split[records[0]] == "train").all() and len(set(records[0])) == 20
    for splits in (task.splits for task in tasks):
        assert not set(records[0]) & {*splits["val"], *splits["test"]}


def parsed(*words):
    """The arguments of linear_probe.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["linear_probe.py", *words])
        return linear_probe.parse_args()


def test_one_percent_rows_of_large_and_of_tiny_data_sets(capsys):
    labels = (np.arange(40_000) % 4 == 0).astype(int)
    rows = draw_one_percent(np.arange(40_000), labels, seed=0)
    assert np.bincount(labels[rows]).tolist() == [200, 200]
    assert not np.array_equal(rows, draw_one_percent(np.arange(40_000), labels, seed=1))
    assert capsys.readouterr().out == ""
    rows = draw_one_percent(np.arange(12), labels, seed=0)
    assert np.bincount(labels[rows]).tolist() == [3, 3]
    assert "3 per class, not 10" in capsys.readouterr().out


def test_balanced_subset_made_later_is_probed(run, capsys):
    words = [run, "--out", "later"]
    balanced = Path("subsets/digits/50-50.json")
    balanced.rename("50-50.json")
    try:
        call(linear_probe, *words)
        assert read("later/probe.json")["test_balanced_train"] is None
        assert "no probe on balanced rows: 50-50.json is missing" in capsys.readouterr().out
        with pytest.raises(UserError, match="--rows balanced: .*add own"):
            call(linear_probe, run, "--rows", "balanced", "--out", "none")
    finally:
        Path("50-50.json").rename(balanced)
    call(linear_probe, *words)
    assert read("later/probe.json")["test_balanced_train"]["accuracy"] > 0.5


# sources ------------------------------------------------------------------------------------------


def test_embeddings_get_the_probe_of_the_run_they_come_from(run, features):
    call(linear_probe, run, "--rows", "own", "--out", "of the run")
    call(linear_probe, "--embeddings", features[1])
    expected, found = read("of the run/probe.json"), read("features_probe/probe.json")
    assert expected.keys() <= found.keys() and found["embeddings_sha256"]
    for key in ("test", "val", "chosen", "rows"):
        if key != "rows":
            assert found[key] == pytest.approx(expected[key], abs=1e-6)
    assert found["rows"]["own"]["counts"] == expected["rows"]["own"]["counts"]
    rows = zip(read_predictions("of the run"), read_predictions("features_probe"), strict=True)
    for ours, theirs in rows:
        assert ours["label"] == theirs["label"] and ours["split"] == theirs["split"]
        assert float(ours["p_minority"]) == pytest.approx(float(theirs["p_minority"]), abs=1e-3)


def test_raw_pixels_are_a_floor_without_a_network(workplace, capsys):
    call(linear_probe, SUBSET)
    folder = Path("runs/digits/99-1/pixels")
    probe, config = read(folder / "probe.json"), read(folder / "config.json")
    assert config["method"] == "pixels" and config["size"] == 32
    assert probe["test"]["balanced_accuracy"] == pytest.approx(0.72, abs=0.01)
    assert probe["test_balanced_train"]["balanced_accuracy"] == pytest.approx(0.88, abs=0.01)
    row = next(row for row in collect("runs") if row["method"] == "raw pixels")
    assert row["probe_test_auroc"] == probe["test"]["auroc"]
    subset = load_subset(SUBSET)
    image = common.normalize(torch.rand(2, 1, 5, 5), subset.mean, subset.std)
    assert torch.equal(Pixels(1, 5)(image), image[:, 0].flatten(1))
    call(linear_probe, SUBSET)
    assert "finished already" in capsys.readouterr().out


def test_raw_pixels_never_replace_a_run(run):
    with pytest.raises(UserError, match="run: holds another run"):
        call(linear_probe, SUBSET, "--out", run)
    assert read(run / "config.json")["method"] == "supmin"


# files --------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_scores(run):
    call(linear_probe, run, "--out", "predicted")
    probe, rows = read("predicted/probe.json"), read_predictions("predicted")
    subset = load_subset(SUBSET)
    _, _, _, files = read_index(Path("subsets/digits/index.csv"))
    for split in ("val", "test"):
        mine = [row for row in rows if row["split"] == split]
        assert [row["file"] for row in mine] == [files[i] for i in subset.splits[split]]
        labels = np.array([int(row["label"]) for row in mine])
        p = [float(row["p_minority"]) for row in mine]
        np.testing.assert_array_equal(labels, subset.labels[subset.splits[split]])
        auroc = roc_auc_score(labels == subset.minority, p)
        assert auroc == probe[split]["auroc"]


def test_predictions_of_a_supervised_network_stay(run):
    """finetune.py trains from scratch into a folder that the probe writes to, too."""
    Path("supervised").mkdir()
    for name in ("classifier.pt", "predictions.csv"):
        Path("supervised", name).write_text("of finetune.py")
    call(linear_probe, run, "--smoke", "--out", "supervised")
    assert Path("supervised/predictions.csv").read_text() == "of finetune.py"
    assert Path("supervised/probe_predictions.csv").exists()


def test_probe_json_never_describes_the_weights_of_another_probe(run, monkeypatch, capsys):
    """Another seed stopped between probe.pt and probe.json; the first seed is fitted anew."""
    words = [run, "--protocol", "reference", "--epochs", 1, "--rows", "subsampled"]
    words += ["--out", "probed", "--seed"]
    call(linear_probe, *words, 0)
    first = load_tensors("probed/probe.pt")
    monkeypatch.setattr(linear_probe, "write_json", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        call(linear_probe, *words, 1)
    monkeypatch.undo()
    call(linear_probe, *words, 0)
    assert equal(first, load_tensors("probed/probe.pt"))
    assert "finished already" not in capsys.readouterr().out


# mistakes -----------------------------------------------------------------------------------------


GOOD = {
    **{split: np.eye(6, 4) for split in SPLITS},
    **{f"{split}_labels": np.arange(6) % 2 for split in SPLITS},
}


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(test=np.eye(6, 5)), r"test is \[6, 5\], train is \[6, 4\]"),
        (dict(train=np.ones(6)), r"train is \[6\]"),
        (dict(val_labels=np.arange(5) % 2), r"val_labels is \[5\]; make it \[6\]"),
        (dict(test_labels=np.arange(6) % 3), r"test_labels holds \[0, 1, 2\]"),
        (dict(train_labels=np.zeros(6)), r"train_labels holds \[0.0\]"),
        (dict(val=np.full((6, 4), np.nan)), "val holds NaN"),
        (dict(val=None), "has no array val, only train, test, train_labels"),
        (dict(train_labels=np.array(list("abcdef"))), "train_labels is <U1, not numbers"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, change, words):
    arrays = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    np.savez(tmp_path / "z.npz", **arrays)
    with pytest.raises(UserError, match=words) as error:
        call(linear_probe, "--embeddings", tmp_path / "z.npz")
    assert "\n" not in str(error.value) and not (tmp_path / "z_probe").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either runs or --embeddings"),
        (["run", "--embeddings", "z.npz"], "give either runs or --embeddings"),
        (["--embeddings", "z.npz", "--protocol", "reference"], "--embeddings has no images"),
        (["--embeddings", "absent.npz"], "absent.npz: no such file"),
        (["a", "b", "--out", "c"], "--out, --predict and --export take one run"),
        (
            ["run", "--export", "model.onnx"],
            "--export model.onnx: give a file name that ends in .pt2",
        ),
        (["run", "--epochs", "5"], "--epochs: only --protocol reference reads it, not cached"),
        (
            ["run", "--protocol", "centroid", "--optimizer=sgd"],
            "--optimizer: only --protocol reference reads it, not centroid",
        ),
        (
            ["run", "--protocol", "centroid", "--class-weights", "none"],
            "--class-weights: --protocol centroid has no loss",
        ),
        (["run", "--threshold-for", "f1"], "--threshold-for: give youden, sensitivity=0.95 or"),
        (["run", "--prevalence", "1"], "--prevalence: 1 is not a share between 0 and 1"),
        (["run", "--prevalence", "2%"], "--prevalence: 2% is not a share .*, such as 0.2"),
        (["run", "--rows", "all"], "invalid choice: 'all'"),
        (["runs/nowhere"], "runs/nowhere/config.json"),
        (["run/config.json"], "run/config.json: is a file of a run; give its folder, run"),
    ],
)
def test_mistakes_are_named(run, words, message):
    with pytest.raises(UserError, match=message) as error:
        call(linear_probe, *words)
    assert "\n" not in str(error.value)
