"""What the README and run_all.sh promise to type is what the scripts take."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call

import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report
from datasets import catalog, sources

SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (
        make_subsets,
        pretrain,
        linear_probe,
        evaluate_metrics,
        finetune,
        report,
    )
}


def parse(command, monkeypatch):
    """Let a script parse a command line without doing what it says."""
    script, *words = shlex.split(command, comments=True)[1:]
    monkeypatch.setattr(
        Path, "exists", lambda path: True
    )  # a run folder or a subset file, by its name
    for module in (linear_probe, finetune):
        monkeypatch.setattr(module, "list_prediction_images", lambda folder, csv_path: [])
    monkeypatch.setattr(Path, "is_dir", lambda path: not path.suffix)
    monkeypatch.setattr(sys, "argv", [script, *words])
    return SCRIPTS[script].parse_args()


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    heads = "".join(module.__doc__ for module in SCRIPTS.values())
    text, heads = (
        re.sub(r"torchrun (?:--[a-z-]+ \S+ )+", "python ", words) for words in (text, heads)
    )
    return re.findall(r"^\s*(python \w+\.py .*?)(?:\s{2,}.*)?$", text + heads, re.MULTILINE)


def test_the_readme_and_the_scripts_show_commands():
    shown = {command.split()[1] for command in readme_commands()}
    assert shown == SCRIPTS.keys() and len(readme_commands()) > 15


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_shown_is_understood(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen(script, capsys):
    with pytest.raises(SystemExit) as end:
        call(SCRIPTS[script], "--help")
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 120


def flags_of(script, capsys):
    with pytest.raises(SystemExit):
        call(SCRIPTS[script], "--help")
    return set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script, capsys):
    """Its value is looked at somewhere other than where it is declared."""
    sources_of = {
        "make_subsets.py": ["datasets/sources.py"],
        "pretrain.py": ["baselines/__init__.py"],
    }.get(script, []) + [script]
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in sources_of)
    for flag in flags_of(script, capsys):
        name = flag[2:].replace("-", "_")
        assert (
            re.search(rf"\bargs\.{name}\b|(?<!add_argument\(\")\"{name}\"", text) or name == "smoke"
        ), f"{script} never reads {flag}"


def test_the_readme_names_no_flag_that_is_not_there(capsys):
    text = re.sub(
        r"#SBATCH .*|`sbatch [^`]*`", "", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    known = set().union(*(flags_of(script, capsys) for script in SCRIPTS)) | {
        "--list",
        "--dry-run",
        "--help",
    }
    known |= {
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--signal",
        "--rounds",
        "--rows",
        "--steps",
    }  # torchrun, SLURM, benchmarks
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known


def test_the_readme_has_no_gaps():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:SCALE\d?|LOSSES|TODO|TBD|XXX)\b", text)


def test_the_table_of_data_sets_is_the_catalogue():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Data")[1].split("\n\n")[2]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert list(rows) == list(sources.DATASETS) and set(catalog.DATASETS) < set(rows)
    for name, entry in catalog.DATASETS.items():
        numbers = ", ".join(
            f"{few} / {many}" for few, many in entry.counts.values()
        )  # label 0 is the minority of all that have counts
        assert numbers in rows[name], name


def run_all(*words, **variables):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )


def test_the_grid_lists_what_is_found_and_names_what_is_missing(tmp_path, monkeypatch):
    root = tmp_path / "a data root"
    for part in ("train", "val"):
        for name in (
            "00002_Animalia_Chordata_Mammalia_Artiodactyla_Bovidae_Bison_bison",
            "00008_Animalia_Chordata_Mammalia_Carnivora_Ailuridae_A_f",
        ):
            (root / part / name).mkdir(parents=True)
    (root / "breastmnist.npz").touch()
    done = run_all("--list", DATA_ROOT=str(root), SEEDS="0 1")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(set(lines)) == 2 * (11 + 6) * (
        1 + 3
    )  # seeds, methods, ratios
    assert {"crt", "tau_norm", "lws"} == set(re.findall(r"--retrain (\w+)", done.stdout))
    assert all(
        f"not found: {name}" in done.stderr
        for name in ("pneumoniamnist", "inat21-plants", "inat21-insects")
    )
    assert "mammals" not in done.stderr
    for line in lines:
        for command in line.split(" && "):
            parse(command, monkeypatch)
    narrow = run_all(
        "--list",
        DATA_ROOT=str(root),
        SEEDS="3",
        METHODS="tsc:variant=code:k=6",
        BASELINES="focal:no-augment",
        RATIOS="90-10",
        FLAGS="--epochs 10",
        PRETRAIN_FLAGS="--warmup-epochs 1",
        FINETUNE_FLAGS="--head mlp",
    ).stdout.splitlines()
    for line in narrow:
        for command in line.split(" && "):
            parse(command, monkeypatch)
    out = "runs/inat21-mammals/90-10"
    assert len(narrow) == 4 and narrow[2:] == [
        f"python pretrain.py subsets/inat21-mammals/90-10.json --method tsc --seed 3 --out {out}/tsc-variant-code-k-6/seed3 --epochs 10 "
        f"--warmup-epochs 1 --variant=code --k=6 && python linear_probe.py {out}/tsc-variant-code-k-6/seed3 && python evaluate_metrics.py {out}/tsc-variant-code-k-6/seed3",
        f"python finetune.py subsets/inat21-mammals/90-10.json --loss focal --seed 3 --out {out}/focal-no-augment/seed3 --epochs 10 "
        f"--head mlp --no-augment && python evaluate_metrics.py {out}/focal-no-augment/seed3",
    ]
    assert (
        "inat21-mammals: 102 runs, 102 to do"
        in run_all("--dry-run", DATA_ROOT=str(root), SEEDS="0 1").stdout
    )


def test_without_data_the_grid_says_so(tmp_path):
    for words in ([], ["--list"], ["--dry-run"]):
        done = run_all(*words, DATA_ROOT=str(tmp_path))
        assert done.returncode == 2 and "no data set under" in done.stderr and "demo" in done.stderr
    done = run_all("dmo")
    assert done.returncode == 2 and "dmo is none of demo, test" in done.stderr
