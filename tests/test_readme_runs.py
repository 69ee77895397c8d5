"""Everything that the README types, run in its order, tiny (--smoke). Its two commands of run_all.sh, demo and test, take minutes and stay out."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call
from pictures import inat_folder, picture

import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report

SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (make_subsets, pretrain, linear_probe, evaluate_metrics, finetune, report)
}
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TYPED = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A user's folder, with their scans and a root of data sets in it."""
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    os.chdir(folder)
    for patient in range(60):
        for scan in range(2):
            picture(
                folder / ("rare" if patient < 20 else "common") / f"patient{patient}_{scan}.png",
                seed=9 * patient + scan,
            )
    for name in ("rare", "common"):
        (folder / "scans").mkdir(exist_ok=True)
        (folder / name).rename(folder / "scans" / name)
    picture(folder / "new_scans/today.png", seed=7)
    inat_folder(
        folder / "data",
        {
            f"Animalia_Chordata_Mammalia_{order}_F_G_s": (160, 20)
            for order in ("Artiodactyla", "Carnivora")
        },
    )
    yield folder
    os.chdir(before)


def test_every_line_in_its_order(bench, monkeypatch):
    lines = [line for line in TYPED if line.startswith("python ")]
    for line in lines:
        script, *words = shlex.split(line, comments=True)[1:]
        words = [str(bench / "data") if word == "/data" else word for word in words]
        smoke = (
            script not in ("make_subsets.py", "report.py")
            and "--smoke" not in words
            and not ("--predict" in words and script == "finetune.py")
        )
        call(
            SCRIPTS[script],
            *words,
            *["--smoke"] * smoke,
            *["--size", 32] * (script == "pretrain.py"),
        )
    assert len(lines) == 17 and len(Path("new_scans.csv").read_text().splitlines()) == 2
    for file in (
        "runs/report/report.md",
        "runs/digits/99-1/ce/seed0/crt/finetune.json",
        "runs/digits/99-1/supmin/seed0/lws/finetune.json",
        "subsets/inat21-mammals/95-5.json",
    ):
        assert Path(file).exists(), file


def test_the_lines_of_python(bench):
    [block] = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    names = {
        "torch": torch,
        "z": F.normalize(torch.randn(8, 2, 128), dim=2),
        "labels": torch.arange(8) % 2,
    }
    for line in block.splitlines():
        exec(line, names)
        assert "loss" not in names or names.pop("loss").isfinite()
    assert (
        'torchvision.models.resnet50().load_state_dict(torch.load("encoder.pt"), strict=False)'
        in TEXT
    )
    np.savez("z.npz", z=names["z"].transpose(0, 1), labels=names["labels"])
    call(evaluate_metrics, "--embeddings", "z.npz", "--neighborhood", 0.3)


def test_the_grid(bench):
    """One run of it, by the lines shown; in a copy, since it writes beside its scripts."""
    lines = [line for line in TYPED if line.startswith("DATA_ROOT=")]
    kit = bench / "a copy of the kit"
    kit.mkdir()
    for file in subprocess.run(
        ["git", "-C", ROOT, "ls-files", "*.py", "*.sh", "*.txt"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split():
        if "/" not in file:
            (kit / file).symlink_to(ROOT / file)
    small = {
        "METHODS": "supmin",
        "BASELINES": "",
        "RETRAIN": "",
        "SEEDS": "0",
        "RATIOS": "50-50",
        "PYTHON": sys.executable,
        "FLAGS": "--arch resnet18 --size 8 --epochs 1 --batch-size 16",
        "PRETRAIN_FLAGS": "--warmup-epochs 0",
    }
    for line in lines:
        done = subprocess.run(
            [
                "bash",
                "-c",
                line.replace("/data", shlex.quote(str(bench / "data"))).replace(
                    "run_all.sh", shlex.quote(f"{kit}/run_all.sh")
                ),
            ],
            env={**os.environ, **small},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 2 and "inat21-mammals" in (kit / "runs/report/report.md").read_text()
