"""The start of a script: answers to flags come before torch is loaded, which takes seconds."""

import os
import signal
import subprocess
import sys

import pytest

import finetune
import pretrain
from conftest import ROOT, call

SCRIPTS = {"make_subsets.py": "nosuch", "pretrain.py": "x.json --method supcon --alpha 1", "linear_probe.py": "run --predict .",
           "finetune.py": "run --gamma 1", "evaluate_metrics.py": "run --picture 3d", "report.py": "nosuch"}           # each with a mistake


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words, code", [("--help", 0), ("a mistake", 2)])
def test_flags_are_answered_without_torch(script, words, code, tmp_path):
    words = SCRIPTS[script] if code else words
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / script, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == code and "argparse" in loaded and not loaded & {"torch", "torchvision", "matplotlib", "sklearn", "PIL"}
    assert len(told) == (1 if code else 0), told


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_torch_is_loaded_ends_it_without_a_word(name, tmp_path):
    (tmp_path / "torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\nraise SystemExit('not stopped')\n")
    done = subprocess.run([sys.executable, ROOT / "pretrain.py", "x.json"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == -getattr(signal, name) and done.stdout == done.stderr == ""


def test_the_names_that_flags_take_are_those_there_are(capsys):
    assert list(pretrain.OPTIONS) == list(pretrain.METHODS)
    chosen = {name: options["variant"] for name, options in pretrain.OPTIONS.items() if "variant" in options}
    assert chosen == {name: variants[0] for name, variants in pretrain.VARIANTS.items()}
    with pytest.raises(SystemExit):
        call(finetune, "--help")
    assert f"--loss {{{','.join(finetune.LOSSES)}}}" in capsys.readouterr().out
