"""report.py --check, runs.jsonl, and wrong flags."""

import re

import pytest
from conftest import ROOT, one_line, run_script
from test_report import call, make_run, no_figures  # noqa: F401 (a fixture)

from reporting.collect import collect
from utils.cli import UserError


@pytest.fixture
def runs(tmp_path):
    """Two methods at two ratios, three seeds each."""
    folder = tmp_path / "runs"
    for ratio, supcon in (("99-1", 0.55), ("50-50", 0.95)):
        for seed, shift in enumerate((-0.01, 0.0, 0.012)):
            for method, accuracy in (("supcon", supcon), ("supmin", 0.85)):
                make_run(folder, method, seed, ratio, probe=accuracy + shift, cac=[60.0, 50.0])
    return folder


def test_check_finds_tables_that_differ_from_their_logs(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    call(monkeypatch, runs, "--claims", "--out", out)
    tables = {"README.md", "cases.md", "report.md", "results.csv", "summary.csv"}
    assert tables | {"runs.jsonl", "accuracy.png"} <= {path.name for path in out.iterdir()}
    assert "**c.** Supervised Minority and" in (out / "README.md").read_text(encoding="utf-8")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python report.py --check {out}"
    call(monkeypatch, "--check", tmp_path)
    for name in tables:
        before = (out / name).read_text(encoding="utf-8")
        (out / name).write_text(re.sub("5", "6", before, count=1), encoding="utf-8")
        with pytest.raises(SystemExit, match=r"1 tables differ.*run python report.py \S+jsonl$"):
            call(monkeypatch, "--check", out)
        assert f"{name}: DIFFERS" in capsys.readouterr().out
        (out / name).write_text(before, encoding="utf-8")
    logs = (out / "runs.jsonl").read_text(encoding="utf-8")
    (out / "runs.jsonl").write_text(logs.replace('"seed": 2', '"seed": 3', 1), encoding="utf-8")
    with pytest.raises(SystemExit, match="differ"):
        call(monkeypatch, "--check", out)


@pytest.mark.usefixtures("no_figures")
def test_tables_from_the_archive_alone(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    call(monkeypatch, runs, "--claims", "--out", out)
    (out / "accuracy.png").unlink()
    (out / "overview_digits.png").write_text("drawn from the embeddings")
    call(monkeypatch, out / "runs.jsonl")
    call(monkeypatch, "--check", out)
    assert (out / "accuracy.png").exists() and "README.md: equals" in capsys.readouterr().out
    assert (out / "overview_digits.png").read_text() == "drawn from the embeddings"
    assert "overview_digits.png" in (out / "report.md").read_text(encoding="utf-8")
    (out / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match="README.md: was not made by report.py"):
        call(monkeypatch, runs, "--claims", "--out", out)


def test_other_files_and_wrong_flags(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    for text in ("", "x", "[]", '{"path": "a"}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="runs.jsonl: not a runs.jsonl"):
            collect(path)
    for words, message in (
        ((), "give a folder of runs"),
        (("runs", "--check", "runs"), "--check RESULTS, or --compare A B alone"),
        (("--check", "runs", "--out", "x"), "alone"),
        (("--check", "runs", "--claims"), "--claims and --html need a folder of runs"),
        (("--check", tmp_path / "nowhere"), "nowhere: holds no runs.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, *words)
    one_line(run_script("report.py", cwd=tmp_path, code=2), "give a folder of runs")


def test_the_committed_tables_equal_their_logs(monkeypatch, capsys):
    call(monkeypatch, "--check", ROOT / "results")
    printed = capsys.readouterr().out
    assert "results/README.md: equals its logs" in printed
