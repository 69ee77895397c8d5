"""Real images through every script, from file to table; tiny networks: this tests no numbers."""

import json
from pathlib import Path

import pytest
from conftest import call, real_data

import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report


@pytest.mark.parametrize("name, size", [("pneumoniamnist", 28), ("breastmnist", 224)])
def test_from_file_to_table(tmp_path, monkeypatch, name, size):
    root = real_data(f"{name}.npz" if size == 28 else f"{name}_{size}.npz").parent
    monkeypatch.chdir(tmp_path)
    call(make_subsets, name, "--data-root", root, "--size", size, "--ratios", "natural")
    words = "--method", "suppro", "--arch", "resnet8", "--smoke", "--size", min(size, 32)
    call(pretrain, f"subsets/{name}/natural.json", *words)
    run = Path("runs", name, "natural", "suppro", "seed0")
    call(linear_probe, run, "--smoke")
    call(evaluate_metrics, run, "--smoke", "--picture", "pca")
    call(finetune, run, "--smoke")
    call(report, "runs")
    for file in ("probe.json", "finetune.json"):
        assert 0 <= json.loads((run / file).read_text())["test"]["balanced_accuracy"] <= 1
    classes = json.loads((run / "config.json").read_text())["classes"]
    assert json.loads((run / "metrics.json").read_text())["classes"] == classes
    table = Path("runs/report/report.md").read_text()
    assert name in table and "suppro" in table and "smoke" in table
