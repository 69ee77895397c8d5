"""The linear probe against scikit-learn, its two protocols, and what its files promise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, equal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import common
import linear_probe
import pretrain
from common import load_subset

SUBSET = "subsets/digits/99-1.json"


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny SupMin run."""
    call(pretrain, SUBSET, "--smoke", "--arch", "resnet8", "--watch-every", 0)
    return Path("runs/digits/99-1/supmin/seed0")


def read(path):
    return json.loads(Path(path).read_text())


def test_probe_equals_scikit_learn_on_torchvision_features(workplace):
    run = Path("torchvision")
    call(pretrain, SUBSET, "--smoke", "--arch", "resnet18", "--watch-every", 0, "--out", run)
    before = (run / "encoder.pt").read_bytes()
    call(linear_probe, run)
    probe = read(run / "probe.json")
    assert (run / "encoder.pt").read_bytes() == before
    subset = load_subset("subsets/digits/99-1.json")
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(run / "encoder.pt", weights_only=True), strict=False)
    network.fc = torch.nn.Identity()
    images = torch.from_numpy(subset.images[:].copy()).permute(0, 3, 1, 2)
    x = common.center_view(images, torch.from_numpy(subset.sizes), subset.size)
    with torch.no_grad():
        x = network.eval()(common.normalize(x, subset.mean, subset.std)).double().numpy()
    balanced = load_subset("subsets/digits/50-50.json")
    test, y = subset.splits["test"], subset.labels
    for ending, train in (
        ("", subset.splits["train"]),
        ("_balanced_train", balanced.splits["train"]),
    ):
        mean, std = x[train].mean(0), x[train].std(0, ddof=1) + 1e-12
        fitted = LogisticRegression(
            C=probe["chosen" + ending]["C"], class_weight="balanced", max_iter=5000, tol=1e-6
        )
        fitted.fit((x[train] - mean) / std, y[train])
        expected = balanced_accuracy_score(y[test], fitted.predict((x[test] - mean) / std))
        scores = probe["test" + ending]
        assert scores["balanced_accuracy"] == pytest.approx(expected, abs=0.01)
        assert set(scores) == {"accuracy", "balanced_accuracy", "auroc", "f1"}


@pytest.mark.parametrize("n, dim, minority", [(400, 40, 8), (60, 100, 20)])
def test_logistic_regression_is_exact_on_raw_features(n, dim, minority):
    """Features are correlated and far from standardised; one is a copy, one is constant."""
    draw = np.random.default_rng(0)
    y = (np.arange(n) < minority).astype(int)
    x = draw.normal(size=(n, dim // 2)) @ draw.normal(size=(dim // 2, dim)) + y[:, None]
    x = 5 + 3 * x + 0.1 * draw.normal(size=(n, dim))
    x[:, 1], x[:, 2] = x[:, 0], 0
    standard = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0, ddof=1), 1)
    for strength in linear_probe.STRENGTHS:
        x32 = torch.from_numpy(x).float()
        probe, chosen = linear_probe.best_logistic_regression(x32, y, x32, y, 1, [strength])
        exact = LogisticRegression(
            C=strength, class_weight="balanced", solver="newton-cholesky", tol=1e-10
        )
        expected = exact.fit(standard, y).predict_proba(standard)
        with torch.no_grad():
            p = probe(x32).double().softmax(1).numpy()
        assert chosen["C"] == strength
        np.testing.assert_allclose(p, expected, atol=1e-3)


def test_a_probe_that_changes_the_encoder_is_an_error(run, monkeypatch):
    fit = linear_probe.fit_logistic_regression

    def change_batch_norm(encoder, *args):
        encoder.bn1.running_mean += 1e-6
        return fit(encoder, *args)

    monkeypatch.setattr(linear_probe, "fit_logistic_regression", change_batch_norm)
    with pytest.raises(RuntimeError, match="frozen encoder"):
        call(linear_probe, run, "--out", "changed")
    assert not Path("changed/probe.json").exists()


def test_reference_protocol_keeps_the_other_probe_and_trains(run):
    call(linear_probe, run)
    before = common.load_tensors(run / "probe.pt")
    call(linear_probe, run, "--protocol", "reference", "--epochs", 3)
    probe = read(run / "probe.json")
    assert probe["protocol"] == "reference" and 1 <= probe["chosen"]["epoch"] <= 3
    assert not equal(before, common.load_tensors(run / "probe.pt"))
    assert read(run / "probe_cached.json")["protocol"] == "cached"


def test_balanced_subset_made_later_is_probed(run):
    call(linear_probe, run)
    balanced = Path("subsets/digits/50-50.json")
    balanced.rename("50-50.json")
    try:
        call(linear_probe, run)
        assert read(run / "probe.json")["test_balanced_train"] is None
    finally:
        Path("50-50.json").rename(balanced)
    call(linear_probe, run)
    assert read(run / "probe.json")["test_balanced_train"]["accuracy"] > 0.5


def test_probe_json_never_describes_the_weights_of_another_probe(run, monkeypatch, capsys):
    """Another seed stopped between probe.pt and probe.json; the first seed is fitted anew."""
    words = [run, "--protocol", "reference", "--epochs", 1, "--out", "probed", "--seed"]
    call(linear_probe, *words, 0)
    first = common.load_tensors("probed/probe.pt")
    monkeypatch.setattr(linear_probe, "write_json", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        call(linear_probe, *words, 1)
    monkeypatch.undo()
    call(linear_probe, *words, 0)
    assert equal(first, common.load_tensors("probed/probe.pt"))
    assert "finished already" not in capsys.readouterr().out
