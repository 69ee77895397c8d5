"""After SIGKILL at random moments the same command finishes, bit-identical to one never killed.

The long form kills more commands, each KIT_KILLS times:
KIT_KILLS=5 python -m pytest -n 0 -s tests/test_kills.py
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
from conftest import ROOT, equal, log_of

import common

KILLS = int(os.environ.get("KIT_KILLS", 0))
SUBSET, TINY = (
    "subsets/digits/95-5.json",
    ("--smoke", "--size", "8", "--epochs", "3", "--save-every", "1"),
)
COMMANDS = {  # every one writes below `out`, from what the workplace has
    "make_subsets": ("make_subsets", "digits", "--workers", "1", "--name", "out", "--out", "."),
    "supmin, bf16": (
        "pretrain",
        SUBSET,
        "--arch",
        "resnet8",
        "--method",
        "supmin",
        *TINY,
        "--size",
        "24",
        "--amp",
        "bf16",
        "--out",
        "out",
    ),
    "linear_probe": (
        "linear_probe",
        "run",
        "--protocol",
        "reference",
        "--epochs",
        "3",
        "--out",
        "out",
    ),
    "finetune": ("finetune", "run", *TINY, "--out", "out"),
}
LONG = {
    "make_subsets, two workers": (
        "make_subsets",
        "digits",
        "--workers",
        "2",
        "--name",
        "out",
        "--out",
        ".",
    ),
    **{
        method: (
            "pretrain",
            SUBSET,
            "--arch",
            "resnet8",
            "--arch",
            "resnet8",
            "--method",
            *method.split(),
            *TINY,
            "--out",
            "out",
        )
        for method in (
            "ntxent",
            "supcon",
            "supmin --majority-supervision 0.5",
            "suppro",
            "kcl --queue 64",
            "tsc --variant code",
            "sbcl --recluster-every 1",
            "bcl --variant batchnorm",
        )
    },
    "paco": (
        "pretrain",
        SUBSET,
        "--arch",
        "resnet8",
        "--arch",
        "resnet8",
        "--method",
        "paco",
        *TINY,
        "--queue",
        "64",
        "--out",
        "out",
    ),
    "ldam_drw": ("finetune", SUBSET, "--loss", "ldam_drw", *TINY, "--out", "out"),
    "crt": ("finetune", "run", "--retrain", "crt", *TINY, "--out", "out"),
}


def work(folder, script, *words):
    """In a process of its own, as the command line does."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = [f"{script}.py", *words]
    import torch

    torch.set_num_threads(1)
    common.run_main(__import__(script).main)


@pytest.fixture(scope="module")
def start():
    """start(folder, command) -> its process, forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(ROOT)
    context.set_forkserver_preload(
        [
            "make_subsets",
            "pretrain",
            "linear_probe",
            "finetune",
            "sklearn.linear_model",
            "matplotlib.figure",
        ]
    )

    def start(folder, command):
        process = context.Process(target=work, args=(folder, *command))
        process.start()
        return process

    yield start
    del os.environ["PYTHONPATH"]
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory, start):
    """What every command finds: subsets of the digits and a finished run."""
    folder = tmp_path_factory.mktemp("kills")
    for command in (
        ("make_subsets", "digits", "--workers", "1"),
        ("pretrain", SUBSET, "--arch", "resnet8", *TINY, "--out", "run"),
    ):
        process = start(folder, command)
        process.join()
        assert process.exitcode == 0
    (folder / "run/checkpoint.pt").unlink()
    return folder


def left_by(folder):
    """Return what a finished command has left, without clock times and checkpoints."""
    found = {}
    for path in sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".lock", "checkpoint"))
    ):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = common.load_tensors(path)
        elif path.suffix == ".json":
            found[name] = {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key != "provenance"
            }
        else:
            found[name] = log_of(path.parent) if path.name == "log.jsonl" else path.read_bytes()
    return found


@pytest.mark.parametrize("name", [*COMMANDS, *(LONG if KILLS else ())])
def test_a_killed_command_ends_bit_identical(place, start, name):
    command, whole, out = {**COMMANDS, **LONG}[name], place / "whole", place / "out"
    began = time.monotonic()
    process = start(place, command)
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began
    out.rename(whole)

    draw, kills = random.Random(name), 0
    for _ in range(10 * (KILLS or 2)):
        process = start(place, command)
        process.join(draw.uniform(0, duration))
        process.kill()  # no effect if it has ended
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            # It continued an earlier attempt and was quicker than planned: try again.
            shutil.rmtree(out)
        assert process.exitcode in (0, -signal.SIGKILL)
        if kills == (KILLS or 2):
            break
    process = start(place, command)
    process.join()
    assert process.exitcode == 0 and kills == (KILLS or 2)
    assert equal(left_by(whole), left_by(out)) and len(left_by(out)) > 1, (
        left_by(whole).keys(),
        left_by(out).keys(),
    )
    print(f"\n{name}: killed {kills} times within {duration:.1f} s")
    for folder in (whole, out):
        shutil.rmtree(folder)
