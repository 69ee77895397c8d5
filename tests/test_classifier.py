"""Trained classifiers without their subset: --predict, --export, thresholds, mistakes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

import finetune
import linear_probe
from baselines.classification import load_classifier
from common import load_subset
from datasets.images import list_images
from datasets.predict import ImageClassifier, predict_folder
from utils.cli import UserError
from utils.scores import choose_threshold, read_predictions

SUBSET = "subsets/digits/95-5.json"
HEAD = "--train head --head mlp --epochs 1 --batch-size 64".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(workplace):
    """A supervised run, probed, with a re-trained head; and photos: its test images as files."""
    words = "--loss auc_margin --arch resnet8 --size 10 --epochs 1 --batch-size 64 --lr 1e-3"
    call(finetune, SUBSET, *words.split(), "--out", "run")
    call(finetune, "run", *HEAD)
    call(finetune, "run", "--retrain", "lws", "--epochs", 1)
    call(linear_probe, "run", "--rows", "own")
    call(linear_probe, SUBSET, "--rows", "own", "--out", "run/pixels")
    subset = load_subset(SUBSET)
    Path("photos").mkdir()
    for i, row in enumerate(subset.splits["test"][:20]):
        Image.fromarray(subset.images[row, :, :, 0]).save(f"photos/{i:02d}.png")
    return Path("run").resolve()


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
    """The run in another place, from where no subset can be reached, and the photos."""
    shutil.copytree(run, tmp_path / "moved/run")
    shutil.copytree(run.parent / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return Path("moved/run")


@pytest.fixture(scope="module")
def program_file(run):
    """The probe of the run as a torch.export program."""
    call(linear_probe, run, "--export", run.parent / "model.pt2")
    return run.parent / "model.pt2"


def read_json(path):
    return json.loads(Path(path).read_text())


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "script, folder, predictions, description",
    [
        (finetune, "", "predictions.csv", "classifier.json"),
        (finetune, "finetune", "finetune/predictions.csv", "finetune/classifier.json"),
        (finetune, "lws", "lws/predictions.csv", "lws/classifier.json"),
        (linear_probe, "", "probe_predictions.csv", "probe_classifier.json"),
        (linear_probe, "pixels", "pixels/predictions.csv", "pixels/probe_classifier.json"),
    ],
)
def test_a_moved_classifier_predicts_without_its_subset(
    moved, script, folder, predictions, description
):
    call(script, moved / folder, "--predict", "photos", "--csv", "out.csv")
    table, rows = read_predictions(moved / predictions), read_csv("out.csv")
    settings = read_json(moved / description)
    assert list(rows[0]) == ["file", "p_5-9", "predicted", "threshold"]
    p = np.array([float(row["p_5-9"]) for row in rows])
    np.testing.assert_allclose(p, table["p_minority"][table["split"] == "test"][:20], atol=1e-5)
    assert {float(row["threshold"]) for row in rows} == {settings["threshold"]}
    expected = ["5-9" if value >= settings["threshold"] else "0-4" for value in p]
    assert [row["predicted"] for row in rows] == expected


def test_the_snippet_of_the_documentation_needs_no_kit(moved, program_file):
    """It runs in another process, which can import no module of the kit."""
    shutil.copy(program_file, "model.pt2")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Path("new").mkdir()
    Image.fromarray(pixels).save("new/photo.jpg")
    shutil.copy("new/photo.jpg", "photo.jpg")
    call(linear_probe, moved, "--predict", "new", "--csv", "out.csv")
    text = (ROOT / "docs/protocols.md").read_text()
    snippet = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ".pt2" in b)
    done = subprocess.run([sys.executable, "-I", "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    p, label = done.stdout.split()
    row = read_csv("out.csv")[0]
    assert float(p) == pytest.approx(float(row["p_5-9"]), abs=1e-6) and label == row["predicted"]


def test_an_exported_program_takes_batches_and_holds_its_settings(run, program_file):
    extra = {"metadata.json": ""}
    program = torch.export.load(program_file, extra_files=extra).module()
    settings = json.loads(extra["metadata.json"])
    assert settings["classes"] == ["0-4", "5-9"] and settings["size"] == 10
    classifier = load_classifier(run / "probe_classifier.json")
    assert settings["threshold"] == classifier.settings["threshold"]
    for n in (1, 5):
        images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)
        sizes = torch.tensor([[8, 8], [20, 8], [8, 15], [300, 310], [8, 9]])[:n]
        expected = classifier(images, sizes).detach()
        torch.testing.assert_close(program(images, sizes), expected, atol=1e-6, rtol=0)


def test_names_that_a_spreadsheet_would_run_are_guarded(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16, 2))
    settings = dict(classes=["+sick", "=well"], minority=0, threshold=0.5, size=4, stored_size=4)
    settings |= dict(channels=3, mean=[0.5] * 3, std=[0.5] * 3)
    for name in ("=1+1.png", "-2.png", "@x.png", "plain.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    classifier, table = ImageClassifier(network, settings), tmp_path / "out.csv"
    predict_folder(classifier, tmp_path, list_images(tmp_path), table, CPU)
    rows = read_csv(table)
    assert list(rows[0]) == ["file", "p_+sick", "predicted", "threshold"]
    assert [row["file"] for row in rows] == ["'-2.png", "'=1+1.png", "'@x.png", "plain.png"]
    assert {row["predicted"] for row in rows} <= {"'+sick", "'=well"}


@pytest.mark.parametrize("damage", ["no encoder", "other encoder", "no description", "no weights"])
def test_an_incomplete_folder_is_one_line(moved, damage):
    folder = moved / "finetune"
    if damage == "no encoder":
        folder, message = folder.rename("alone"), "encoder.pt: no such file; keep alone in its run"
    elif damage == "other encoder":
        state = torch.load(moved / "encoder.pt", weights_only=True)
        torch.save({key: value + 1 for key, value in state.items()}, moved / "encoder.pt")
        message = "classifier.json: belongs to another encoder; move it back, or train it again"
    elif damage == "no description":
        (folder / "classifier.json").unlink()
        message = "classifier.json: no such file; run the training command again"
    else:
        (folder / "classifier.pt").unlink()
        message = "digits/95-5.json: no such file"
    with pytest.raises(UserError, match=message) as error:
        call(finetune, folder, "--predict", "photos", "--csv", "out.csv")
    assert "\n" not in str(error.value) and not Path("out.csv").exists()


def test_another_rule_moves_the_threshold_and_trains_nothing_again(run, monkeypatch, capsys):
    """Last in this file: it writes into the run of the other tests."""
    monkeypatch.chdir(run.parent)
    commands = {
        "finetune/finetune.json": [finetune, "run", *HEAD],
        "probe.json": [linear_probe, "run", "--rows", "own"],
    }
    tables = dict(zip(commands, ("finetune/predictions.csv", "probe_predictions.csv"), strict=True))
    for name, (script, *words) in commands.items():
        before, log = read_json(run / name), (run / "finetune/log.jsonl").read_bytes()
        call(script, *words, "--threshold-for", "sensitivity=0.95", "--prevalence", 0.01)
        line = f"replaces run/{name}, which was made with other threshold_rule, prevalence\n"
        assert line in capsys.readouterr().out
        after, table = read_json(run / name), read_predictions(run / tables[name])
        is_val = table["split"] == "val"
        p, truth = table["p_minority"][is_val], table["label"][is_val] == 1
        assert after["threshold"] == choose_threshold(p, truth, "sensitivity=0.95")
        assert after["threshold_rule"] == "sensitivity=0.95"
        assert after["val"]["sensitivity_at_threshold"] >= 0.95
        assert before["test"].items() - after["test"].items() <= {
            (score, before["test"][score]) for score in before["test"] if "threshold" in score
        }
        assert after["test"]["prevalence"] == 0.01 and 0 < after["test"]["ppv_at_threshold"] < 1
        assert (run / "finetune/log.jsonl").read_bytes() == log
    assert read_json(run / "probe_classifier.json")["threshold"] == after["threshold"]
