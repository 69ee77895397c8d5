"""run_all.sh with stand-ins for the scripts, nvidia-smi and SLURM: who runs where and when, what a failure and a signal leave."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

RUN = """import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "encoder.pt").touch()
"""
PRETRAIN = (
    RUN
    + """
def end(number, frame):
    time.sleep(0.3)                                          # as long as the step takes
    (out / "saved").touch()
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
busy = pathlib.Path("busy " + os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
busy.touch(exist_ok=False)                                   # fails where another run is on this GPU
(out / busy.name).touch()
print("epoch 1 of 1, threads", os.environ.get("OMP_NUM_THREADS"))
deadline = time.time() + float(os.environ.get("SECONDS_OF_A_RUN", 0.2))
while time.time() < deadline:
    time.sleep(0.01)
busy.unlink()
sys.exit(out.name == "seed2")
"""
)


@pytest.fixture
def kit(tmp_path):
    """A folder with run_all.sh and stand-ins for what it calls; DATA_ROOT holds one data set. PATH begins with its bin/."""
    kit = tmp_path / "a kit"
    (kit / "bin").mkdir(parents=True)
    (kit / "data").mkdir()
    (kit / "data" / "breastmnist.npz").touch()
    shutil.copy(ROOT / "run_all.sh", kit)
    (kit / "datasets").mkdir()
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "datasets" / name, kit / "datasets")
    (kit / "requirements.txt").touch()
    (kit / "pretrain.py").write_text(PRETRAIN)
    for name in ("linear_probe", "evaluate_metrics"):
        (kit / f"{name}.py").write_text(RUN + f"(out / {name!r}).touch()\n")
    (kit / "make_subsets.py").touch()
    (kit / "report.py").write_text("print('the tables')\n")
    command(
        kit,
        "nvidia-smi",
        "printf 'GPU 0: Test (UUID: GPU-a)\\n  MIG 1g Device 0: (UUID: MIG-b)\\nGPU 1: Test (UUID: GPU-c)\\n'",
    )
    return kit


def command(kit, name, text):
    (kit / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (kit / "bin" / name).chmod(0o755)


def environment(kit, **variables):
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "JOBS")
    }
    return {
        **clean,
        "PATH": f"{kit / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "DATA_ROOT": str(kit / "data"),
        "METHODS": "supcon",
        "BASELINES": "",
        "RETRAIN": "",
        "SEEDS": "0 1 2 3 4",
        **variables,
    }


def run_all(kit, *words, **variables):
    return subprocess.run(
        ["bash", str(kit / "run_all.sh"), *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=kit.parent,
        env=environment(kit, **variables),
    )


def places(kit):
    """Which GPU every run was on, by its seed."""
    return [
        next((kit / f"runs/breastmnist/natural/supcon/seed{seed}").glob("busy*")).name[5:]
        for seed in range(5)
    ]


def test_every_gpu_has_one_run_at_a_time_and_a_failure_is_listed(kit):
    done = run_all(kit)
    assert done.returncode == 1 and "5 to run, one at a time on: 0 1" in done.stdout
    assert set(places(kit)) == {"0", "1"} and not list(
        kit.glob("busy*")
    )  # busy: two on one GPU, or a run that broke off
    assert re.findall(r"pretrain.*?/seed(\d) &&", done.stderr.split("these again:")[1]) == ["2"]
    probed = [
        (kit / f"runs/breastmnist/natural/supcon/seed{seed}/evaluate_metrics").exists()
        for seed in range(5)
    ]
    assert probed == [True, True, False, True, True] and done.stdout.rstrip().endswith("the tables")
    assert done.stdout.count("FAILED") == 1 and done.stdout.count("epoch 1 of 1") == 5
    assert f"threads {max(1, os.cpu_count() // 2)}" in done.stdout


def test_what_was_not_done_is_never_passed_over(kit):
    """A worker is killed, and the folder of temporary files swept, in the middle of the list: whatever has not ended well is named."""
    (kit / "tmp").mkdir()
    (kit / "pretrain.py").write_text(
        "import pathlib, shutil\n"
        + RUN
        + f"shutil.rmtree({str(kit / 'tmp')!r}) if out.name == 'seed1' else None\n"
    )
    done = run_all(kit, SEEDS="0 1 3", CUDA_VISIBLE_DEVICES="0", TMPDIR=str(kit / "tmp"))
    assert done.returncode == 1 and "/seed3 &&" in done.stderr.split("these again:")[1]
    (kit / "tmp").mkdir()
    (kit / "pretrain.py").write_text(
        RUN + "os.kill(os.getppid(), signal.SIGKILL) if out.name == 'seed1' else None\n"
    )
    done = run_all(
        kit, SEEDS="0 1 3", CUDA_VISIBLE_DEVICES="0", TMPDIR=str(kit / "tmp"), RUNS="others"
    )
    assert done.returncode == 1 and re.findall(
        r"pretrain.*?/seed(\d) &&", done.stderr.split("these again:")[1]
    ) == ["1", "3"]


@pytest.mark.parametrize(
    "variables, ids",
    [
        ({"CUDA_VISIBLE_DEVICES": "3,MIG-b"}, {"3", "MIG-b"}),
        ({"CUDA_VISIBLE_DEVICES": "", "JOBS": "1"}, {""}),
    ],
)
def test_the_gpus_may_be_named_and_a_machine_may_have_none(kit, variables, ids):
    """CUDA_VISIBLE_DEVICES="" is what hides all of them; the runs then follow each other."""
    command(kit, "spaced python", f'exec {sys.executable} "$@"')
    done = run_all(
        kit, SEEDS="0 1 3", PYTHON=str(kit / "bin" / "spaced python"), RUNS="my runs", **variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [kit / f"my runs/breastmnist/natural/supcon/seed{seed}" for seed in (0, 1, 3)]
    assert {next(run.glob("busy*")).name[5:] for run in runs} == ids and all(
        (run / "evaluate_metrics").exists() for run in runs
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("gpus", ["0,1", "0"])
def test_a_signal_lets_what_runs_save_and_starts_no_more(kit, number, gpus):
    process = subprocess.Popen(
        ["bash", str(kit / "run_all.sh")],
        env=environment(kit, CUDA_VISIBLE_DEVICES=gpus, SECONDS_OF_A_RUN="30"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    n = len(gpus.split(","))
    while len(list(kit.glob("runs/*/*/*/*/busy*"))) < n:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (
        process.returncode == 128 + number
        and f"stopped by {number.name}" in err
        and "the tables" not in out
    )
    assert (
        len(list(kit.glob("runs/*/*/*/*/saved"))) == len(list(kit.glob("runs/*/*/*/*"))) == n
    )  # waited for, and no other begun
    assert not list(kit.glob("runs/*/*/*/*/evaluate_metrics"))


def test_hours_are_those_of_the_measured_speed(kit):
    (kit / "subsets/breastmnist").mkdir(parents=True)
    (kit / "subsets/breastmnist/natural.json").write_text(
        '{"counts": {"train": {"0": 30000, "1": 6000}}}'
    )
    assert (
        "5 to do: 3,600,000 training images, speed not measured yet\n"
        in run_all(kit, "--dry-run", SEEDS="5 6 7 8 9", FLAGS="--epochs 20").stdout
    )
    log = kit / "runs/breastmnist/natural/supcon/seed0/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(
        '{"images_per_s": 50.0}\n{"images_per_s": 200.0}\n'
    )  # (1/50 + 1/200) / 2 = 1/80 s per image
    (log.parent / "encoder.pt").touch()
    done = run_all(kit, "--dry-run", FLAGS="--epochs 20").stdout.splitlines()
    assert (
        done[-2]
        == "breastmnist: 5 runs, 4 to do: 2,880,000 training images, about 10.0 h at the mean of measured epochs"
    )
    assert done[-1] == "all: 4 to do: about 10.0 GPU hours, 5.0 h by the clock on: 0 1"
    assert (
        "10.0 hours, 2.5 h by the clock on: cpu cpu cpu cpu"
        in run_all(
            kit, "--dry-run", FLAGS="--epochs 20", CUDA_VISIBLE_DEVICES="-1", JOBS="4"
        ).stdout
    )


def test_evidence_runs_what_a_claim_needs_and_judges_it(kit):
    (kit / "data" / "breastmnist.npz").unlink()
    for name, counts in (("digits/99-1", (620, 6)), ("digits/95-5", (595, 31))):
        (kit / f"subsets/evidence/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (kit / f"subsets/evidence/{name}.json").write_text(
            json.dumps({"counts": {"train": {"0": counts[0], "1": counts[1]}}})
        )
    (kit / "results").mkdir()
    (kit / "results/runs.jsonl").write_text(
        '{"config": {"dataset": "digits"}, "log": [{"images_per_s": 100.0}]}\n'
    )
    (kit / "report.py").write_text("import sys; print('judged', *sys.argv[1:])\n")
    done = run_all(kit, "evidence", "m", SEEDS="0", CUDA_VISIBLE_DEVICES="-1", JOBS="1")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("judged runs/evidence --claims")
    assert (
        "digits: 6 runs, 6 to do: 60,096 training images, about 0.2 h" in done.stdout
    )  # 626 images, 16 epochs
    assert "pneumoniamnist.npz (medmnist.com); its runs are left out" in done.stderr
    runs = {
        path.relative_to(kit / "runs/evidence").as_posix()
        for path in kit.glob("runs/evidence/*/*/*/seed0")
    }
    assert runs == {
        f"digits/99-1/{name}/seed0"
        for name in (
            "ntxent",
            "supcon",
            "supcon-minority-per-batch-4",
            "supmin",
            "supmin-minority-per-batch-4",
            "suppro",
        )
    }
    assert (
        "--method supcon --seed 0 --out runs/evidence/digits/99-1/supcon-minority-per-batch-4/seed0 "
        in done.stdout
        and "--minority-per-batch=4" in done.stdout
    )
    assert (kit / "runs/evidence/digits/99-1/supcon/seed0/evaluate_metrics").exists()
    assert (
        "0 to do: nothing left"
        in run_all(kit, "evidence", "m", SEEDS="0", CUDA_VISIBLE_DEVICES="-1").stdout
    )
    wrong = run_all(kit, "evidence", "g")
    assert (
        wrong.returncode == 2
        and len(wrong.stderr.splitlines()) == 1
        and "letters of claims" in wrong.stderr
    )


def test_jobs_is_a_number(kit):
    done = run_all(kit, JOBS="0")
    assert done.returncode == 2 and done.stderr == "run_all.sh: JOBS=0 is not a number from 1 up\n"


def test_the_lines_for_slurm_do_their_part_of_the_grid(kit):
    """As docs/running.md shows them, with stand-ins for srun and scontrol. A warning makes the job queue again, a failure does not."""
    script, submit = re.search(
        r"```bash\n(#!/bin/bash\n.*?)```.*?`(sbatch [^`]*)`",
        (ROOT / "docs/running.md").read_text(encoding="utf-8"),
        re.DOTALL,
    ).groups()
    assert len(script.splitlines()) == 7
    (kit / "grid.sbatch").write_text(script)
    (kit / ".venv/bin").mkdir(parents=True)
    (kit / ".venv/bin/activate").write_text("")
    command(kit, "sbatch", 'echo "$@"')
    command(kit, "srun", '"$@"')
    command(kit, "scontrol", 'echo "$@" > requeued')
    env = environment(kit)
    assert (
        subprocess.run(submit, shell=True, cwd=kit, env=env, capture_output=True, text=True).stdout
        == "--array=1-5 grid.sbatch\n"
    )
    for task, code, again in ((2, 0, False), (3, 1, False), (4, 138, True)):
        if again:
            text = PRETRAIN.replace(
                "deadline =",
                "os.kill(os.getppid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR1)\ndeadline =",
            )
            (kit / "pretrain.py").write_text(text)
        subprocess.run(
            ["bash", "grid.sbatch"],
            cwd=kit,
            env={**env, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77"},
            timeout=20,
        )
        run = kit / f"runs/breastmnist/natural/supcon/seed{task - 1}"
        assert (run / "evaluate_metrics").exists() == (code == 0) and (run / "saved").exists() == (
            kit / "requeued"
        ).exists() == again
    assert (
        len(list(kit.glob("runs/*/*/*/*"))) == 3
        and (kit / "requeued").read_text() == "requeue 77\n"
    )
