"""Each benchmark runs, and the tables of docs/speed.md hold the figures of results/benchmark."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, call

import benchmarks.__main__ as benchmark
import pretrain
from benchmarks.timing import compare_throughput, compare_times, print_table

PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
FOLDER = ROOT / "results" / "benchmark"
RECORDS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.json"))
KIT_LOSSES = ("ntxent", "supcon", "supmin", "suppro")


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_every_benchmark_runs_and_writes_its_figures(name, tmp_path):
    call(benchmark, name, "--smoke", "--device", "cpu", "--rounds", 1, "--out", tmp_path)
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written[name] and written["smoke"]
    assert {"commit", "device"} <= written["provenance"].keys()
    assert written["provenance"]["command"].startswith(f"python -m benchmarks {name}")


def test_the_script_for_a_gpu_runs_each_step_once(tmp_path, monkeypatch):
    # A stand-in for Python: it writes its words, counts two GPUs, and one benchmark fails.
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" != -c ] || exec echo 2\n'
        'echo "$@" >> "$FOLDER/words"; case "$*" in *losses*) exit 3; esac'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "FOLDER": str(tmp_path)}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "tests", "speed", "precision", "two_gpus"]
    run = partial(subprocess.run, command, env=environment, capture_output=True, text=True)
    first = run()
    assert first.returncode == 1 and "losses: exit code 3" in first.stderr
    words = (tmp_path / "words").read_text()
    assert "pytest" in words and all(f"--sizes {size} " in words for size in (28, 64, 224))
    assert (tmp_path / "pipeline-off-224.done").exists()
    for command_line in re.findall("-m benchmarks (.*)", words):
        monkeypatch.setattr("sys.argv", ["benchmarks", *command_line.split()])
        benchmark.parse_args()
    trained = [pretrain.parse_args(line.split()) for line in re.findall("pretrain.py (.*)", words)]
    assert len(trained) == 13 and {args.amp for args in trained} == {"auto", "bf16", "off", "fp32"}
    (tmp_path / "words").unlink()
    assert run().returncode == 1
    assert re.findall(r"benchmarks (\w+)", (tmp_path / "words").read_text()) == ["losses"]


def test_the_script_for_a_gpu_trains_and_probes_without_one(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "FOLDER": str(tmp_path), "SMOKE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "precision", "two_gpus"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "runs" / "0-supmin-bf16" / "probe.json").exists()
    refused = subprocess.run([*command, "sped"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown part 'sped'" in refused.stderr


def test_ratios_are_taken_within_a_round():
    times = compare_times([1.0, 4.0, 9.0], [2.0, 4.0, 3.0])
    assert times == {"ratio": 1.0, "lowest": 0.5, "highest": 3.0, "seconds": 4.0}
    speed = compare_throughput([1.0, 4.0, 9.0], [2.0, 4.0, 3.0], images=8)
    assert speed["ratio"] == 1 and speed["per second"] == 2 and speed["seconds"] == 4


def test_results_are_printed_as_one_table(capsys):
    print_table({"28": {"a": {"ratio": 1.23456, "views": 2}, "b": {"ratio": 0.5}}})
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == ["| 28, a | 1.235 | 2 |", "| 28, b | 0.5 |  |"]


def load(name):
    """Return the results of a benchmark and its whole record."""
    record = json.loads((FOLDER / f"{name}.json").read_text())
    return record[Path(name).name], record


def table(first_header):
    """Return the rows of a table of the page, each a list of cells without backticks."""
    text = PAGE.split(f"| {first_header} |")[1].split("\n\n")[0]
    lines = [f"| {first_header} |" + text.splitlines()[0], *text.splitlines()[2:]]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def ratio(row):
    return f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"


def test_the_table_of_methods_holds_the_measured_figures():
    assert table("`--method`")[1:] == [
        [name, str(row["views"]), ratio(row)] for name, row in load("methods")[0].items()
    ]


def test_the_table_of_networks_holds_the_measured_figures():
    measured, _ = load("networks")
    header, *rows = table("network")
    assert header[1:] == [f"{size} px" for size in measured]
    for label, *cells in rows:
        name = label.removeprefix("--arch ").replace(" --", ", ")
        assert cells == [ratio(by_name[name]) for by_name in measured.values()]
    assert len(rows) == len(measured["28"])


def test_the_tables_of_losses_hold_the_measured_figures():
    measured, _ = load("losses")
    header, *rows = table("time, peak memory")
    assert header[1:] == [f"{int(n):,} rows" for n in measured]
    for label, *cells in rows:
        name = {"masked form": "masked"}.get(label, label.removesuffix("_loss"))
        expected = [by_name[name] for by_name in measured.values()]
        assert cells == [f"{row['ratio']:.2f}, {row['megabytes']:,.0f} MB" for row in expected]
    share = max(measured["16384"][name]["percent_of_step"] for name in KIT_LOSSES)
    assert f"With 16,384 rows the slowest of the four takes {share:.3f} %" in PAGE


def test_the_table_of_the_pipeline_holds_the_measured_figures():
    measured = load("pipeline")[0] | load("224px/pipeline")[0]
    header, *rows = table("side of a view in pixels")
    assert header[1:] == list(measured)
    for cells, key in zip(rows, ("step", "compiled", "published", "fast", "views"), strict=True):
        assert cells[1:] == [ratio(row[key]) for row in measured.values()]


def test_the_table_of_the_profile_holds_the_measured_figures():
    header, *rows = table("share of the time, percent")
    records = [load("profile"), load("resnet18/profile")]
    for (measured, record), cells in zip(records, rows, strict=True):
        assert cells[0] == f"{record['arch']}, batches of {record['batch_size']}"
        assert header[1:] == list(measured["share"])
        assert cells[1:] == [f"{row['percent']:.1f}" for row in measured["share"].values()]

    header, *rows = table("time, as it is = 1")
    assert header[1:] == [record["arch"] for _, record in records]
    times = [measured["time"] for measured, _ in records]
    names = [name for name in times[0] if name != "as it is"]
    assert rows == [[name, *(ratio(time[name]) for time in times)] for name in names]


def test_the_table_of_reading_holds_the_measured_figures():
    measured, _ = load("reading")
    header, *rows = table("reader")
    assert header[1:] == list(measured)
    readers = next(iter(measured.values()))
    for cells, reader in zip(rows, readers, strict=True):
        expected = [by_reader[reader] for by_reader in measured.values()]
        assert cells[1:] == [f"{row['ratio']:.1f}, {row['per second']:,.0f}" for row in expected]


def test_the_tables_of_packing_hold_the_measured_figures():
    measured, _ = load("subsets")
    assert f"{measured['images']:,} JPEGs" in PAGE
    runs = [measured["one worker"], measured["all workers"]]
    expected = [[f"{run['seconds']:.0f}", f"{run['peak_mib']:.0f}"] for run in runs]
    assert [cells[1:] for cells in table("command")[1:]] == expected
    assert f"On one core packing takes {ratio(measured['one core'])} times" in PAGE


def test_the_tables_of_metrics_hold_the_measured_figures():
    measured, _ = load("metrics")
    speed = measured.pop("speed")
    assert table("metric")[1:] == [
        [name, f"{row['seconds']:.1f}", f"{row['megabytes']:.0f}"] for name, row in measured.items()
    ]
    assert [cells[1] for cells in table("metrics")[1:]] == [
        f"{row['ratio']:.1f}" for row in speed.values()
    ]


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_names_the_command_and_the_commit_of_every_record(name):
    provenance = load(name)[1]["provenance"]
    section = next(part for part in PAGE.split("\n## ") if f"benchmark/{name}.json)" in part)
    commands = " ".join(section.replace("\\\n", " ").split())
    words = re.split("benchmarks? |benchmark.py ", provenance["command"], maxsplit=1)[1]
    assert f"benchmarks {words}" in commands
    assert re.search(rf"[Cc]ommit\s+{provenance['commit']}[ ,;]", section)


def test_the_page_shows_commands_that_are_understood(monkeypatch):
    commands = re.findall(r"python -m benchmarks (.*)", PAGE.replace("\\\n", " "))
    assert len(commands) >= len(benchmark.BENCHMARKS)
    for command in commands:
        monkeypatch.setattr("sys.argv", ["benchmarks", *command.split()])
        assert benchmark.parse_args().benchmark == command.split()[0]
