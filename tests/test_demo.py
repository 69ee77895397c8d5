"""The demo: its commands parse, and its table says what the runs show."""

import re
import subprocess

from conftest import ROOT
from test_readme import parse

from reporting import demo


def run_rows(ratio, method, loss=2.0, gap=2.8, saa=20.0, accuracy=0.9):
    """Return the rows of two seeds."""
    row = dict(ratio=ratio, method=method, state="finished", final_loss=loss)
    row |= dict(last_collapse_gap=gap, saa_minority=saa, saa_majority=2 * saa)
    return 2 * [row | dict(probe_test_balanced_accuracy=accuracy)]


def print_demo(monkeypatch, capsys, untrained_accuracy):
    rows = run_rows("95-5", "untrained", accuracy=untrained_accuracy) + run_rows("95-5", "ntxent")
    rows += run_rows("95-5", "supcon", loss=4.844, gap=0.001, saa=0.5, accuracy=0.7)
    rows += run_rows("95-5", "suppro", gap=None)
    rows += run_rows("50-50", "supcon", accuracy=0.98) + run_rows("50-50", "ntxent")
    monkeypatch.setattr(demo, "collect", lambda folder: rows)
    monkeypatch.setattr("sys.argv", ["demo", "runs/demo"])
    demo.main()
    return capsys.readouterr().out


def test_the_table_shows_the_collapse_and_ranks_nothing(monkeypatch, capsys):
    printed = print_demo(monkeypatch, capsys, untrained_accuracy=0.84)
    cells = [re.split(r" *\| *", line)[1:-1] for line in printed.splitlines() if "|" in line]
    lines = {name: others for name, *others in cells[2:]}
    assert list(lines) == ["untrained", "NT-Xent", "SupCon", "Supervised Prototypes"]
    assert lines["SupCon"] == ["2 of 2", "4.844 to 4.844", "0.5 to 1.0"]
    assert lines["NT-Xent"] == ["0 of 2", "2.000 to 2.000", "20.0 to 40.0"]
    assert lines["Supervised Prototypes"][0] == "-" and lines["untrained"][:2] == ["-", "-"]
    assert "control is passed" in printed and "98.0 %, 90.0 %" in printed


def test_runs_that_show_nothing_are_not_read(monkeypatch, capsys):
    printed = print_demo(monkeypatch, capsys, untrained_accuracy=0.86)
    assert "The control is FAILED: do not read the table" in printed


def test_the_commands_of_the_demo_parse(monkeypatch):
    script = (ROOT / "run_all.sh").read_text()
    function = re.search(r"^demo\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)[0]
    done = subprocess.run(
        ["bash", "-c", f"PYTHON=python; {function}; demo"], capture_output=True, text=True
    )
    commands = done.stdout.splitlines()
    assert len(commands) == len(set(commands)) == 18
    floors = [command for command in commands if "/untrained/" in command]
    assert len(floors) == 2 and all(c.endswith("--method ntxent --lr 0") for c in floors)
    for command in commands:
        parse(command.removeprefix("python "), monkeypatch)
