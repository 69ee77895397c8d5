"""Type every block of README.md and docs/ in order, tiny (--smoke).

`run_all.sh demo` and `run_all.sh test` take minutes; tests/test_grid.py covers them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, call
from pictures import inat_folder, picture

import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report
from utils.encoders import build_encoder

SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (make_subsets, pretrain, linear_probe, evaluate_metrics, finetune, report)
}
UNTRAINED = ("make_subsets.py", "report.py")  # they have no --smoke


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def typed_lines(page, start):
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """A user's folder with scans and a root of data sets in it; the current directory meanwhile."""
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    os.chdir(folder)
    labels = ["path,label"]
    for patient in range(60):
        name = "rare" if patient < 20 else "common"
        for scan in range(2):
            path = f"{name}/patient{patient}_{scan}.png"
            picture(folder / "scans" / path, seed=9 * patient + scan)
            labels.append(f"{path},{'malignant' if name == 'rare' else 'benign'}")
    shutil.copytree(folder / "scans", folder / "dicom")
    (folder / "labels.csv").write_text("\n".join(labels))
    (folder / "export.csv").write_text("\n".join(["Datei,Befund", *labels[1:]]))
    picture(folder / "new_scans/today.png", seed=7)
    orders = ("Artiodactyla", "Carnivora")
    taxa = {f"Animalia_Chordata_Mammalia_{order}_F_G_s": (160, 20) for order in orders}
    inat_folder(folder / "data", taxa)
    yield folder
    os.chdir(before)


def type_line(line, folder):
    script, *words = shlex.split(line, comments=True)[1:]
    words = [str(folder / "data") if word == "/data" else word for word in words]
    if script not in UNTRAINED and "--smoke" not in words:
        words.append("--smoke")
    from_scratch = script == "finetune.py" and words[0].endswith(".json")
    if script == "pretrain.py" or from_scratch:
        words += ["--arch", "resnet8", "--size", "16"]
    call(SCRIPTS[script], *words)


def test_the_lines_of_the_readme_in_their_order(user_folder):
    lines = typed_lines("README.md", "python ")
    assert len(lines) == 5
    for line in lines:
        type_line(line, user_folder)
    assert len(Path("new_scans.csv").read_text().splitlines()) == 2
    for file in (
        "runs/report/report.html",
        "runs/scans/natural/supmin/seed0/metrics.json",
    ):
        assert Path(file).exists(), file


@pytest.mark.parametrize("page", ["running", "data", "networks", "methods", "protocols"])
def test_the_lines_of_the_docs_in_their_order(page, user_folder):
    """After those of the README, whose subsets and runs they use."""
    for line in typed_lines(f"docs/{page}.md", "python "):
        type_line(line, user_folder)
    expected = {
        "data": "subsets/inat21-mammals/95-5.json",
        "networks": "runs/init/seed0/encoder.pt",
        "methods": "runs/digits/99-1/supmin/seed0/lws/finetune.json",
        "protocols": "runs/digits/99-1/pixels/probe.json",
        "running": "runs/digits/99-1/ntxent/seed0/encoder.pt",
    }
    assert Path(expected[page]).exists()


def test_the_lines_of_python(user_folder):
    [block] = blocks("README.md", "python")
    z, labels = F.normalize(torch.randn(8, 2, 128), dim=2), torch.arange(8) % 2
    names = {"torch": torch, "z": z, "labels": labels}
    for line in block.splitlines():
        exec(line, names)
        assert "loss" not in names or names.pop("loss").isfinite()
    np.savez("z.npz", z=z.transpose(0, 1), labels=labels)
    call(evaluate_metrics, "--embeddings", "z.npz", "--neighborhood", 0.3)


def test_torchvision_and_the_kit_load_encoders_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = blocks("docs/networks.md", "python")
    networks = [("resnet18", "imagenet"), ("resnet18", "cifar"), ("resnet8", "cifar")]
    for block, network in zip(shown, networks, strict=True):
        encoder = build_encoder(*network)
        torch.save(encoder.state_dict(), "encoder.pt")
        names = {"torch": torch, "torchvision": torchvision}
        exec(block, names)
        loaded = names.get("resnet") or names["encoder"]
        assert all(loaded.state_dict()[key].equal(x) for key, x in encoder.state_dict().items())


def test_features_of_another_model_are_probed(user_folder, monkeypatch):
    """With a small stand-in for the vision transformer, which would be downloaded."""
    pooling = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    monkeypatch.setattr(torch.hub, "load", lambda *_: pooling)
    block = blocks("docs/protocols.md", "python")[0]
    assert "size=224" in block
    exec(block.replace("size=224", "size=8"), {})
    call(linear_probe, "--embeddings", "z.npz")
    assert Path("z_probe/probe.json").exists()


def test_the_grid(user_folder):
    """The first line as shown; of the second the runs that it lists, in this process."""
    small = {
        "RUNS": "grid_runs",
        "METHODS": "supmin",
        "BASELINES": "",
        "RETRAIN": "",
        "SEEDS": "0",
        "RATIOS": "50-50",
        "PYTHON": sys.executable,
        "FLAGS": "--arch resnet8 --size 8 --batch-size 16",
        "PRETRAIN_FLAGS": "--warmup-epochs 0 --epochs 1",
    }
    dry_run, whole = typed_lines("README.md", "DATA_ROOT=")
    assert whole.endswith("bash run_all.sh")
    outputs = {}
    for line in (dry_run, f"{whole} list"):
        line = line.replace("/data", shlex.quote(str(user_folder / "data")))
        line = line.replace("run_all.sh", shlex.quote(str(ROOT / "run_all.sh")))
        done = subprocess.run(
            ["bash", "-c", line],
            env={**os.environ, **small},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs[line] = done.stdout
    estimate, listed = outputs.values()
    assert "inat21-mammals: 1 runs, 1 to do" in estimate
    call(make_subsets, "all", "--data-root", user_folder / "data", "--ratios", "50-50")
    for command in listed.strip().split(" && "):
        _, script, *words = shlex.split(command)
        call(SCRIPTS[script], *words)
    assert Path("grid_runs/inat21-mammals/50-50/supmin/seed0/metrics.json").exists()
