"""report.py --compare: images paired by name, runs by seed; what cannot be paired is refused."""

import csv

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_report import call, make_run

from utils.cli import UserError


def make_predictions(run, gap, seed=0, n=80, rare=20, label=1, prefix="image", split="test"):
    """Write predictions.csv: rare images of class `label` are `gap` above the others on average.

    The order of the files is random, the truth of a file is not.
    """
    rng = np.random.default_rng(seed)
    is_rare = np.arange(n) < rare
    p = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=n) - gap * is_rare))
    rows = [(f"{prefix}{i}", split, label if is_rare[i] else 1 - label, p[i]) for i in range(n)]
    with open(run / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("file", "split", "label", "p_minority"), ("other", "val", 0, 0.5)])
        table.writerows(rows[i] for i in rng.permutation(n))
    return is_rare, p


def test_images_and_seeds_are_paired(tmp_path, monkeypatch, capsys):
    aurocs = {"supmin": [], "supcon": []}
    for seed in range(3):
        for method, gap in (("supmin", 1.5 + 0.1 * seed), ("supcon", 0.5)):
            run = make_run(tmp_path, method, seed, probe=0.6)
            # Each file has its own order of images.
            truth, p = make_predictions(run, gap, seed=seed + 7 * (method == "supcon"))
            aurocs[method].append(100 * roc_auc_score(truth, p))
    # B has a seed that A lacks.
    make_run(tmp_path, "supcon", 3, probe=0.6)
    folders = [tmp_path / "digits" / "99-1" / method for method in ("supmin", "supcon")]
    call(monkeypatch, "--compare", *folders, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "3 pairs of runs; 80 test images, 20 of them b" in printed
    assert (tmp_path / "out" / "comparison.md").read_text() in printed
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    auroc = {key: float(value) for key, value in rows["auroc"].items() if key != "score"}
    differences = np.subtract(aurocs["supmin"], aurocs["supcon"])
    assert auroc["a"] == pytest.approx(np.mean(aurocs["supmin"]))
    assert auroc["difference"] == pytest.approx(differences.mean())
    assert auroc["std"] == pytest.approx(np.std(differences, ddof=1)) and auroc["pairs"] == 3
    assert 0 < auroc["low"] < auroc["difference"] < auroc["high"]
    # No threshold was kept: the scores that need one are left out.
    assert "sensitivity" in rows and "sensitivity_at_threshold" not in rows


def test_two_single_runs_of_other_seeds_and_their_thresholds(tmp_path, monkeypatch, capsys):
    a, b = (
        make_run(tmp_path, "supmin", seed, probe=0.6, probe_options={"threshold": 0.7})
        for seed in (0, 1)
    )
    for run in (a, b):
        make_predictions(run, 1.0)
    make_run(a, "crt", folder="crt")  # a run inside a run is not compared
    call(monkeypatch, "--compare", a, b)
    printed = capsys.readouterr().out
    assert "1 pair of runs" in printed and "sensitivity at the chosen threshold" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| AUROC"))
    assert "+0.0 to +0.0" in line and line.endswith("| -                             |")


def test_the_fine_tuning_of_a_run_is_compared(tmp_path, monkeypatch, capsys):
    """That of a contrastive run has its finetune.json in the run, that of another its own."""
    a = make_run(tmp_path, "supmin", probe=0.6, probe_options={"threshold": 0.7})
    b = make_run(tmp_path, "ce", finetune=0.6)
    (a / "finetune").mkdir()
    (b / "finetune").mkdir()
    (a / "finetune.json").write_text('{"threshold": 0.2, "test": {}}')
    (b / "finetune/finetune.json").write_text('{"threshold": 0.9}')
    with pytest.raises(UserError, match=f"predictions.csv: is missing; .* finetune.py {a}$"):
        call(monkeypatch, "--compare", a / "finetune", b / "finetune")
    for folder in (a, a / "finetune", b / "finetune"):
        make_predictions(folder, 1.0)
    call(monkeypatch, "--compare", a / "finetune", b / "finetune", "--out", tmp_path / "out")
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    # The thresholds alone differ.
    assert float(rows["auroc"]["difference"]) == 0
    assert float(rows["sensitivity_at_threshold"]["difference"]) > 20


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    a = make_run(tmp_path, "supmin", 0, probe=0.6)
    b = make_run(tmp_path, "supcon", 0, probe=0.6)

    def refusal(*folders):
        with pytest.raises(UserError) as error:
            call(monkeypatch, "--compare", *(folders or (a, b)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"predictions.csv: is missing; make it with python linear_probe.py {a}" in refusal()
    make_predictions(a, 1.0)
    make_predictions(b, 1.0, prefix="photo")
    assert "has other test images than" in refusal()
    make_predictions(b, 1.0, rare=21)
    assert "has other test images than" in refusal()
    swapped = make_run(tmp_path, "supcon", 0, folder="swapped", probe=0.6, minority=0)
    make_predictions(swapped, 1.0, label=0)
    assert "its minority is 'a', that of" in refusal(a, swapped)
    make_run(tmp_path, "supmin", 1, probe=0.6, temperature=0.5)
    assert "runs of several settings" in refusal(tmp_path / "digits/99-1/supmin", b)
    other = tmp_path / "other"
    for seed in (5, 6):
        make_run(other, "supcon", seed, probe=0.6)
    assert "share no seed" in refusal(a, other)
    (a / "encoder.pt").unlink()
    assert "holds no finished run" in refusal()
