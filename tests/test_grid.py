"""run_all.sh and results/evidence.sh with stand-ins for the scripts, nvidia-smi and SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, one_line
from test_readme import parse

# Every stand-in makes its run folder.
RUN = """import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "encoder.pt").touch()
"""
# The file `busy` marks a GPU as taken: a second run on it fails. Seed 2 fails always.
PRETRAIN = """
def end(number, frame):
    time.sleep(0.2)
    (out / "ended").touch()
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
busy = pathlib.Path("busy " + os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
busy.touch(exist_ok=False)
(out / busy.name).touch()
print("epoch 1 of 1, threads", os.environ.get("OMP_NUM_THREADS"))
deadline = time.time() + float(os.environ.get("SECONDS_OF_A_RUN", 0.2))
while time.time() < deadline:
    time.sleep(0.01)
busy.unlink()
sys.exit(out.name == "seed2")
"""
TWO_GPUS = """printf 'GPU 0: Test (UUID: GPU-a)\\n  MIG 1g Device 0: (UUID: MIG-b)\\n'
printf 'GPU 1: Test (UUID: GPU-c)\\n'"""
FOLDER = "runs/breastmnist/natural/supcon"


@pytest.fixture
def kit(tmp_path):
    """A copy of the shell scripts with stand-ins for what they call; one data set in data/."""
    kit = tmp_path / "a kit"
    for file in ("run_all.sh", "utils/launch.sh", "results/evidence.sh", "reporting/estimate.py"):
        (kit / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, kit / file)
    shutil.copytree(ROOT / "datasets", kit / "datasets")
    for folder in ("bin", "data"):
        (kit / folder).mkdir()
    (kit / "data/breastmnist.npz").touch()
    (kit / "requirements.txt").write_text("numpy")
    (kit / "pretrain.py").write_text(RUN + PRETRAIN)
    for name in ("linear_probe", "evaluate_metrics"):
        (kit / f"{name}.py").write_text(RUN + f"(out / {name!r}).touch()\n")
    (kit / "make_subsets.py").touch()
    (kit / "report.py").write_text("import sys; print('the tables', *sys.argv[1:])\n")
    write_command(kit, "nvidia-smi", TWO_GPUS)
    no_pip = 'case "$*" in "-m pip "*) exit ;; esac'
    write_command(kit, "spaced python", f'{no_pip}; exec {sys.executable} "$@"')
    return kit


def write_command(kit, name, text):
    (kit / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (kit / "bin" / name).chmod(0o755)


def environment(kit, **variables):
    hidden = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "JOBS")
    return {
        **{name: value for name, value in os.environ.items() if name not in hidden},
        "PATH": f"{kit / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(kit / "bin/spaced python"),
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


def finished_seeds(kit, folder=FOLDER):
    return sorted(path.parent.name[4:] for path in kit.glob(f"{folder}/*/evaluate_metrics"))


def test_every_gpu_has_one_run_at_a_time_and_a_failure_stops_no_other(kit):
    done = run_all(kit)
    assert done.returncode == 1 and "training on: 0 1\n" in done.stdout
    gpus = {path.name for path in kit.glob(f"{FOLDER}/*/busy*")}
    assert gpus == {"busy 0", "busy 1"} and not list(kit.glob("busy*"))
    assert finished_seeds(kit) == ["0", "1", "3", "4"]
    assert re.findall(r"failed: .* pretrain.*?/seed(\d) ", done.stderr) == ["2"]
    assert "same command" in done.stderr and done.stdout.endswith("the tables runs\n")
    threads = max(1, os.cpu_count() // 2)
    for seed in range(5):
        assert f"\n{FOLDER}/seed{seed}: epoch 1 of 1, threads {threads}\n" in done.stdout


@pytest.mark.parametrize("xargs", ["GNU", "macOS"])
def test_one_gpu_takes_the_runs_in_turn(kit, xargs):
    """The xargs of macOS has no slots: the first of two GPUs then takes all runs."""
    if xargs == "macOS":
        refusal = 'case "$*" in *--process-slot-var*) exit 1 ;; esac'
        write_command(kit, "xargs", f'{refusal}; exec {shutil.which("xargs")} "$@"')
    gpus = {"GNU": "1", "macOS": "1,0"}[xargs]
    done = run_all(kit, CUDA_VISIBLE_DEVICES=gpus, SEEDS="1 2 3")
    assert done.returncode == 1 and re.findall(r"failed: .*?/seed(\d) ", done.stderr) == ["2"]
    assert finished_seeds(kit) == ["1", "3"]
    assert {path.name for path in kit.glob(f"{FOLDER}/*/busy*")} == {"busy 1"}
    if xargs == "GNU":
        assert f"\n{FOLDER}/seed1: epoch 1 of 1, threads None\n" in done.stdout


@pytest.mark.parametrize("gpu", ["1", ""])
def test_a_gpu_trains_the_next_run_beside_the_probe(kit, gpu):
    """The probe of seed 0 waits for the next training to begin, and that of seed 1 fails."""
    probe = """
busy = pathlib.Path("busy " + os.environ["CUDA_VISIBLE_DEVICES"])
deadline = time.time() + (20 if os.environ["CUDA_VISIBLE_DEVICES"] else 1)
while out.name == "seed0" and not busy.exists() and time.time() < deadline:
    time.sleep(0.01)
if busy.exists():
    (out / "beside").touch()
print("the probe")
sys.exit(out.name == "seed1")
"""
    (kit / "linear_probe.py").write_text(RUN + probe)
    variables = {"JOBS": "1", "SEEDS": "0 1 3", "SECONDS_OF_A_RUN": "0.5"}
    done = run_all(kit, CUDA_VISIBLE_DEVICES=gpu, **variables)
    assert done.returncode == 1 and "same command" in done.stderr
    assert re.findall(r"failed: .*linear_probe.*?/seed(\d) ", done.stderr) == ["1"]
    assert finished_seeds(kit) == ["0", "3"]
    assert (kit / FOLDER / "seed0/beside").exists() == bool(gpu)
    assert (f"\n{FOLDER}/seed0: the probe\n" in done.stdout) == bool(gpu)


def test_a_killed_runner_is_reported(kit):
    (kit / "pretrain.py").write_text(
        RUN + "os.kill(os.getppid(), signal.SIGKILL) if out.name == 'seed1' else None\n"
    )
    done = run_all(kit, SEEDS="0 1 3", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 1 and "same command" in done.stderr


@pytest.mark.parametrize(
    "variables, names",
    [
        ({"CUDA_VISIBLE_DEVICES": "3,MIG-b"}, {"busy 3", "busy MIG-b"}),
        ({"CUDA_VISIBLE_DEVICES": "", "JOBS": "1"}, {"busy "}),
    ],
)
def test_gpus_are_named_or_hidden_and_paths_may_have_spaces(kit, variables, names):
    done = run_all(kit, SEEDS="0 1 3", RUNS="my runs", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = FOLDER.replace("runs", "my runs")
    assert finished_seeds(kit, folder) == ["0", "1", "3"]
    assert {path.name for path in kit.glob(f"{folder}/*/busy*")} == names


@pytest.mark.parametrize(
    "number, gpus",
    [
        (signal.SIGTERM, "0,1"),
        (signal.SIGUSR1, "0,1"),
        (signal.SIGUSR1, "0"),
        (signal.SIGINT, "0"),
        (signal.SIGHUP, "0"),
    ],
)
def test_a_signal_reaches_the_runs_and_starts_no_more(kit, number, gpus):
    def accept_signals():
        """A suite in the background ignores some signals; bash cannot trap those."""
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_DFL)

    process = subprocess.Popen(
        ["bash", str(kit / "run_all.sh")],
        preexec_fn=accept_signals,
        env=environment(kit, CUDA_VISIBLE_DEVICES=gpus, SECONDS_OF_A_RUN="30"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    n = len(gpus.split(","))
    while len(list(kit.glob(f"{FOLDER}/*/busy*"))) < n:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"stopped by {number.name}" in err
    assert "the tables" not in out and not finished_seeds(kit)
    assert len(list(kit.glob(f"{FOLDER}/*/ended"))) == len(list(kit.glob(f"{FOLDER}/*"))) == n
    assert not [folder for folder in working_folders() if folder.startswith(str(kit))]


def working_folders():
    """Yield the working folder of every process (Linux)."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            yield os.readlink(link)
        except OSError:
            continue


def make_subset(kit, subset, majority, minority):
    path = kit / f"subsets/{subset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"counts": {"train": {"0": majority, "1": minority}}}))


def test_hours_follow_from_measured_speed_and_epochs(kit):
    make_subset(kit, "breastmnist/natural", 3000, 600)
    unknown = run_all(kit, "--dry-run", SEEDS="5 6 7 8 9", FLAGS="--epochs 20").stdout
    line = "breastmnist: 5 runs, 5 to do: 360,000 training images, speed not measured yet\n"
    assert unknown.count(line) == 2 and not re.search(r"\d hours", unknown)
    # (1/50 + 1/200) / 2 = 1/80 s per image
    log = kit / FOLDER / "seed0/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"images_per_s": 50.0}\n{"images_per_s": 200.0}\n')
    (log.parent / "encoder.pt").touch()
    lines = run_all(kit, "dry-run").stdout.splitlines()
    assert lines[6:] == [
        "100 epochs of pre-training",
        "breastmnist: 5 runs, 4 to do: 1,440,000 training images, 5.0 hours",
        "all: 4 runs to do, 5.0 GPU hours, 2.5 hours with 2 at a time",
        "",
        "350 epochs of pre-training",
        "breastmnist: 5 runs, 4 to do: 5,040,000 training images, 17.5 hours",
        "all: 4 runs to do, 17.5 GPU hours, 8.8 hours with 2 at a time",
    ]
    assert all("--epochs 100" in line for line in lines[:5])
    cpu = run_all(kit, "dry-run", EPOCHS="20", CUDA_VISIBLE_DEVICES="-1", JOBS="4").stdout
    assert "all: 4 runs to do, 1.0 CPU hours, 0.2 hours with 4 at a time\n" in cpu


def test_evidence_runs_what_a_claim_needs_and_judges_it(kit):
    (kit / "data/breastmnist.npz").unlink()
    make_subset(kit, "seed0/fashionmnist/99-1", 5346, 54)
    (kit / "results/runs.jsonl").write_text(
        '{"config": {"dataset": "fashionmnist"}, "log": [{"images_per_s": 500.0}]}\n'
    )
    variables = {"SEEDS": "0", "CUDA_VISIBLE_DEVICES": "-1", "JOBS": "1", "SECONDS_OF_A_RUN": "0"}
    done = run_all(kit, "evidence", "m", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the tables runs/evidence --claims\n")
    # 5,400 images, 25 epochs
    assert "fashionmnist: 9 runs, 9 to do: 1,215,000 training images, 0.7 hours" in done.stdout
    assert "pneumoniamnist.npz; the runs on pneumoniamnist are left out" in done.stderr
    runs = kit / "runs/evidence/fashionmnist/99-1"
    assert {path.parent.name for path in runs.glob("*/seed0")} == {
        *("untrained", "ntxent", "supcon", "supmin", "suppro", "supcon-relu", "supmin-relu"),
        *("supcon-minority-per-batch-4", "supmin-minority-per-batch-4"),
    }
    assert "--method supcon --minority-per-batch=4 && " in done.stdout
    assert "--method ntxent --lr=0 && " in done.stdout
    assert (runs / "supcon/seed0/evaluate_metrics").exists()
    again = run_all(kit, "evidence", "m", **variables)
    assert "fashionmnist: 9 runs, 0 to do\n" in again.stdout


@pytest.mark.parametrize("words", [["g"], ["f", "x"], ["A"], ["gpu", "a"]])
def test_evidence_refuses_letters_without_runs(kit, words):
    wrong = run_all(kit, "evidence", *words)
    assert wrong.returncode == 2
    one_line(wrong, "unknown claim", "a to r")


def list_evidence(folder, command):
    """Return the command lines of results/evidence.sh; folder: holds empty subsets, if any."""
    script = (ROOT / "results/evidence.sh").read_text().split("LETTERS=")[0]
    lines = [line for line in script.splitlines() if not line.startswith("source ")]
    body = "\n".join([*lines, "PYTHON=python LETTERS=a-r RUNS=runs", command])
    done = subprocess.run(
        ["bash", "-c", body], cwd=folder, capture_output=True, text=True, check=True
    )
    return [command.strip() for command in re.findall(r"python (\w+\.py [^&;\n]*)", done.stdout)]


def make_empty_subsets(folder):
    for dataset in ("fashionmnist", "fashionmnist-b", "inat21-mammals", "inat21-mammals-64"):
        for ratio in ("99-1", "95-5", "50-50"):
            make_subset(folder, f"seed0/{dataset}/{ratio}", 90, 10)
    for dataset in ("breastmnist", "breastmnist-64", "breastmnist-224", "pneumoniamnist"):
        make_subset(folder, f"seed0/{dataset}/natural", 90, 10)
    for subset in ("chestxray/natural", "chestxray-224/natural", "pneumoniamnist/50-50"):
        make_subset(folder, f"seed0/{subset}", 90, 10)


@pytest.mark.parametrize("command", ["evidence", "gpu_evidence"])
def test_evidence_lists_commands_that_parse(command, tmp_path, monkeypatch):
    make_empty_subsets(tmp_path)
    commands = list_evidence(tmp_path, command)
    runs = re.findall(r"(?:pretrain|finetune).py subsets/.* --out (\S+)", "\n".join(commands))
    assert len(runs) == len(set(runs)) > 50 - 20 * (command == "gpu_evidence")
    for line in commands:
        parse(line, monkeypatch)


def test_evidence_trains_auc_margin_from_scratch_and_from_each_encoder(tmp_path):
    make_empty_subsets(tmp_path)
    found = [line for line in list_evidence(tmp_path, "evidence") if "--loss auc_margin" in line]
    assert len(found) == 6 and sum("--init" not in line for line in found) == 1
    folder = "runs/fashionmnist/99-1"
    for method in ("ce", "ntxent", "supcon", "supmin", "suppro"):
        out, init = f"--out {folder}/auc_margin-init-{method}/seed0 ", f"{folder}/{method}/seed0"
        assert [out in line for line in found if line.endswith(f"--init {init}")] == [True]


def training_settings(command):
    """Return what a command trains: script, subset and flags (the last value of each counts)."""
    script, subset = command.removeprefix("python ").split()[:2]
    flags = dict(re.findall(r"--([\w-]+)[ =]?([^\s-]\S*)?", command))
    for name in ("out", "save-every", "watch-every"):
        flags.pop(name, None)
    return script, subset, flags


def test_evidence_lists_the_committed_runs_of_resnet8(tmp_path):
    """The runs of another network are older; git log keeps their commands."""
    lines = (ROOT / "results/runs.jsonl").read_text().splitlines()[1:]
    commands = [json.loads(line)["log"][0]["command"] for line in lines]
    committed = [command for command in commands if "--arch resnet8" in command]
    for subset in re.findall(r"subsets/(\S+)\.json", "\n".join(committed)):
        make_subset(tmp_path, subset, 90, 10)
    listed = [
        training_settings(command)
        for command in list_evidence(tmp_path, "evidence")
        if " subsets/" in command
    ]
    assert len(committed) >= 15
    assert not [command for command in committed if training_settings(command) not in listed]


def test_the_grid_lists_what_is_found_and_names_what_is_missing(tmp_path, monkeypatch):
    root = tmp_path / "a data root"
    for order in ("Artiodactyla_Bovidae_Bison_bison", "Carnivora_Ailuridae_A_f"):
        for split in ("train", "val"):
            (root / split / f"00002_Animalia_Chordata_Mammalia_{order}").mkdir(parents=True)
    (root / "breastmnist.npz").touch()

    def list_runs(**variables):
        return subprocess.run(
            ["bash", str(ROOT / "run_all.sh"), "--list"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "DATA_ROOT": str(root), "PYTHON": sys.executable, **variables},
        )

    done = list_runs(SEEDS="0 1")
    lines = done.stdout.splitlines()
    # seeds, methods, ratios
    assert len(lines) == len(set(lines)) == 2 * (11 + 6) * (1 + 3)
    assert {"crt", "tau_norm", "lws"} == set(re.findall(r"--retrain (\w+)", done.stdout))
    for name in ("pneumoniamnist", "inat21-plants", "inat21-insects"):
        assert f"not found: {name}" in done.stderr
    assert "mammals" not in done.stderr
    narrow = list_runs(
        SEEDS="3",
        METHODS="tsc:variant=code:k=6",
        BASELINES="focal:no-augment",
        RATIOS="90-10",
        FLAGS="--epochs 10",
        PRETRAIN_FLAGS="--warmup-epochs 1",
        FINETUNE_FLAGS="--head mlp",
    ).stdout.splitlines()
    out = "runs/inat21-mammals/90-10"
    tsc, focal = f"{out}/tsc-variant-code-k-6/seed3", f"{out}/focal-no-augment/seed3"
    assert [line.replace(sys.executable, "python") for line in narrow[2:]] == [
        f"python pretrain.py subsets/inat21-mammals/90-10.json --out {tsc} --seed 3 --epochs 100 "
        "--epochs 10 --warmup-epochs 1 --method tsc --variant=code --k=6 "
        f"&& python linear_probe.py {tsc} && python evaluate_metrics.py {tsc}",
        f"python finetune.py subsets/inat21-mammals/90-10.json --out {focal} --seed 3 --epochs 10 "
        f"--head mlp --loss focal --no-augment && python evaluate_metrics.py {focal}",
    ]
    for line in lines + narrow:
        for command in line.split(" && "):
            parse(command.removeprefix(f"{sys.executable} "), monkeypatch)


def test_mistakes_end_in_one_line(kit):
    (kit / "data/breastmnist.npz").unlink()
    for words in ([], ["list"], ["dry-run"]):
        done = run_all(kit, *words)
        assert done.returncode == 2 and "no data set below" in done.stderr
    for words, variables, message in (
        (["dmo"], {}, "run_all.sh: unknown command dmo; bash run_all.sh --help lists the commands"),
        (["demo"], {"JOBS": "0"}, "run_all.sh: JOBS=0 is not a number from 1 up"),
        (["demo"], {"PYTHON": "false"}, "false is not Python 3.10 to 3.13"),
    ):
        done = run_all(kit, *words, **variables)
        assert done.returncode == 2
        one_line(done, message)


def test_help_is_the_head_of_the_file(kit):
    done = run_all(kit, "--help")
    assert done.returncode == 0 and "bash run_all.sh demo" in done.stdout
    assert "#" not in done.stdout and "set -e" not in done.stdout


def test_only_installed_packages_satisfy_the_requirements(kit):
    """A wheel that pip could install, from a folder that the user has configured, is not enough."""
    with zipfile.ZipFile(kit / "absent_package-1.0-py3-none-any.whl", "w") as wheel:
        folder = "absent_package-1.0.dist-info"
        wheel.writestr(
            f"{folder}/METADATA", "Metadata-Version: 2.1\nName: absent-package\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    (kit / "requirements.txt").write_text("-r more.txt\nnumpy>=1\n")
    check = "source utils/launch.sh; has_requirements requirements.txt; echo $?"
    for name, code in (("numpy<99", "0"), ("absent-package", "1"), ("numpy<1", "1")):
        (kit / "more.txt").write_text(name)
        env = environment(kit, PIP_FIND_LINKS=str(kit), PYTHON=sys.executable)
        done = subprocess.run(
            ["bash", "-c", check], cwd=kit, env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == code, name


def test_the_lines_for_slurm_do_their_part_of_the_grid(kit):
    """Stand-ins for srun and scontrol: SLURM's warning requeues the job, a failure does not."""
    script, submit = re.search(
        r"```bash\n(#!/bin/bash\n.*?)```.*?`(sbatch [^`]*)`",
        (ROOT / "docs/running.md").read_text(encoding="utf-8"),
        re.DOTALL,
    ).groups()
    assert len(script.splitlines()) == 7
    (kit / "grid.sbatch").write_text(script)
    (kit / ".venv/bin").mkdir(parents=True)
    (kit / ".venv/bin/activate").write_text("")
    write_command(kit, "sbatch", 'echo "$@"')
    write_command(kit, "srun", '"$@"')
    write_command(kit, "scontrol", 'echo "$@" > requeued')
    env = environment(kit)
    assert (
        subprocess.run(submit, shell=True, cwd=kit, env=env, capture_output=True, text=True).stdout
        == "--array=1-5 grid.sbatch\n"
    )
    for task, code, again in ((2, 0, False), (3, 1, False), (4, 138, True)):
        if again:
            text = RUN + PRETRAIN.replace(
                "deadline =",
                "os.kill(os.getppid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR1)\n"
                "deadline =",
            )
            (kit / "pretrain.py").write_text(text)
        subprocess.run(
            ["bash", "grid.sbatch"],
            cwd=kit,
            env={**env, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77"},
            timeout=60,
        )
        run = kit / f"runs/breastmnist/natural/supcon/seed{task - 1}"
        assert (run / "evaluate_metrics").exists() == (code == 0) and (run / "ended").exists() == (
            kit / "requeued"
        ).exists() == again
    assert (
        len(list(kit.glob("runs/*/*/*/*"))) == 3
        and (kit / "requeued").read_text() == "requeue 77\n"
    )
