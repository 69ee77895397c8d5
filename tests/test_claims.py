"""Claims: verdicts on synthetic runs with known answers; report.py --check and runs.jsonl."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT, one_line, run_script
from scipy.stats import ttest_rel
from test_report import call, make_run, no_figures  # noqa: F401 (a fixture)

from reporting import claims
from reporting.collect import collect
from reporting.tables import group_by_seed
from utils.cli import UserError

NOISE = (-0.01, 0.0, 0.012)  # of three seeds


def add(runs, method, ratio, accuracy, noise=NOISE, folder="", **options):
    """Add seeds of a method around a balanced accuracy."""
    dataset = options.get("dataset", "digits")
    result = "finetune" if method in claims.SUPERVISED else "probe"
    for seed, shift in enumerate(noise):
        path = f"{dataset}/{ratio}/{method}{folder}/seed{seed}"
        scores = {result: accuracy + shift * (1 + 0.2 * seed), "cac": [60.0, 60.0]}
        make_run(runs, method, seed, ratio, folder=path, **{**scores, **options})


@pytest.fixture
def runs(tmp_path):
    """The paper's story."""
    folder = tmp_path / "runs"
    for ratio, supcon in (("99-1", 0.55), ("95-5", 0.70), ("50-50", 0.95)):
        cac = [75.0, 75.0] if ratio == "50-50" else [52.0, 52.0]
        add(folder, "supcon", ratio, supcon, cac=cac, noise=(0.01, -0.01, 0))
        for method, accuracy in (("supmin", 0.85), ("suppro", 0.84)):
            accuracy = 0.95 if ratio == "50-50" else accuracy
            add(folder, method, ratio, accuracy, cac=[70.0, 70.0])
    return folder


def cases(folder, letter):
    (claim,) = (claim for claim in claims.CLAIMS if claim.letter == letter)
    return list(claim.judge(claims.Runs(collect(folder))))


def test_the_papers_story_is_recognised(runs):
    found = {letter: claims.verdict(cases(runs, letter)) for letter in "abcdefhijklm"}
    expected = {"a": "holds", "b": "holds in part", "c": "holds", "e": "holds", "h": "holds"}
    assert found == dict.fromkeys("abcdefhijklm", "not run") | expected
    # At 99-1 all have the same SAA and SAD; SupCon's CAC is lower.
    assert [case.holds for case in cases(runs, "b")[:3]] == [None, True, None]


def test_the_opposite_is_recognised_and_noise_is_undecided(tmp_path):
    for ratio in ("99-1", "50-50"):
        add(tmp_path, "supcon", ratio, 0.9, noise=(0.02, -0.03, 0))
        add(tmp_path, "supmin", ratio, 0.7)
        add(tmp_path, "suppro", ratio, 0.9, noise=(-0.03, 0.02, 0.01))
    for letter in "ac":
        assert claims.verdict(cases(tmp_path, letter)) == "does not hold here"
    assert [case.holds for case in cases(tmp_path, "c")] == [False, None]
    assert [case.holds for case in cases(tmp_path, "h")] == [False, True]
    assert claims.verdict([claims.Case("", None, "")]) == "not decided"


def test_two_seeds_decide_nothing(tmp_path):
    for method, accuracy in (("supcon", 0.5), ("supmin", 0.9), ("suppro", 0.4)):
        add(tmp_path, method, "99-1", accuracy, noise=(0.0, 0.01))
    assert {claims.verdict(cases(tmp_path, letter)) for letter in "abc"} == {"not decided"}


def test_smoke_runs_and_other_protocols_are_not_judged(runs):
    before = len(claims.Runs(collect(runs)).rows)
    add(runs, "kcl", "99-1", 0.9, smoke=True)
    for options in ({"protocol": "reference"}, {"standardize": False}, {"class_weights": "none"}):
        add(runs, "tsc", "99-1", 0.9, folder=f"-{options}", probe_options=options)
    assert len(claims.Runs(collect(runs)).rows) == before


def test_ablations_differ_from_their_base_in_one_setting(runs):
    for margin, accuracy in ((0.0, 0.6), (2.0, 0.95)):
        add(runs, "suppro", "99-1", accuracy, folder=f"-margin-{margin}", margin=margin)
    # Two changes make no ablation.
    add(runs, "suppro", "99-1", 0.99, folder="-two", margin=0.5, temperature=0.5)
    assert [(case.where, case.holds) for case in cases(runs, "i")] == [
        ("digits 99-1: margin 1 against 0", True),
        ("digits 99-1: margin 1 against 2", False),
    ]
    add(runs, "supmin", "99-1", 0.7, folder="-share", majority_supervision=0.5)
    assert [(case.where, case.holds) for case in cases(runs, "j")] == [
        ("digits 99-1: 0 against 0.5", True),
        ("digits 99-1: 0 against 1 (SupCon)", True),
    ]
    options = {"minority_per_batch": 4, "noise": (0.02, -0.01, 0.01)}
    add(runs, "supcon", "99-1", 0.85, folder="-filled", **options)
    assert [case.holds for case in cases(runs, "m")] == [True, True, True]
    for size, epochs, accuracy in ((64, 8, 0.8), (512, 60, 0.52)):
        add(runs, "supcon", "95-5", accuracy, folder=f"-{size}", batch_size=size, epochs=epochs)
    (case,) = cases(runs, "f")
    assert case.holds and case.evidence.startswith("batch 64: 80.") and "512: 52." in case.evidence
    # These runs have another number of steps.
    add(runs, "supcon", "95-5", 0.1, folder="-more", batch_size=1024, epochs=60)
    assert cases(runs, "f")[0].evidence == case.evidence
    figure = claims.plan_claim_figures(group_by_seed(collect(runs)))["ablations.png"]()
    assert [ax.get_title() for ax in figure.axes] == [
        "batch size, equal steps",
        "margin of the prototypes",
        "supervised share of the majority",
        "minority images per batch, at least",
    ]
    assert [len(ax.get_legend().get_texts()) for ax in figure.axes] == [1, 1, 1, 1]


def test_other_methods_lengths_and_kinds_of_images(runs):
    add(runs, "kcl", "99-1", 0.80)
    add(runs, "ldam_drw", "99-1", 0.95)
    assert [case.holds for case in cases(runs, "c") if "KCL" in case.where] == [True, True]
    assert [case.holds for case in cases(runs, "k")] == [False, False]
    for dataset in ("fashionmnist", "breastmnist"):
        add(runs, "supmin", "95-5", 0.9, dataset=dataset)
        add(runs, "suppro", "95-5", 0.8, dataset=dataset)
    assert [(case.where, case.holds) for case in cases(runs, "d")] == [
        ("breastmnist 95-5, medical: Supervised Prototypes ahead", False),
        ("fashionmnist 95-5, natural: Supervised Minority ahead", True),
    ]
    for method, accuracy in (("supcon", 0.5), ("supmin", 0.8)):
        add(runs, method, "99-1", accuracy, folder="-long", epochs=100, warmup_epochs=20)
    assert [(case.where, case.holds) for case in cases(runs, "c") if "epochs" in case.where] == [
        ("digits 99-1, 100 epochs: Supervised Minority over SupCon", True)
    ]
    assert sum("100 epochs" in case.where for case in cases(runs, "b")) == 6
    options = {"lr": 0.0, "warmup_epochs": 5, "noise": (0, 0.01, -0.01)}
    add(runs, "ntxent", "99-1", 0.56, folder="-untrained", **options)
    # One epoch does not settle batch norm: these count where there are no others.
    add(runs, "supcon", "99-1", 0.5, folder="-one-epoch", **{**options, "epochs": 1})
    assert [case.holds for case in cases(runs, "a") if "untrained" in case.where] == [True]
    assert [case.holds for case in cases(runs, "c") if "untrained" in case.where] == [True] * 3


def test_early_numbers(runs):
    for path in runs.glob("digits/99-1/*/seed*/log.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        accuracy = {"supcon": 50, "supmin": 80, "suppro": 70}[path.parts[-3]]
        gap = 0.0 if accuracy == 50 else 0.9
        early = {"val_knn": accuracy, "val_cac": [100 - accuracy] * 2}
        lines[1] |= {"epoch": 7, "collapse_gap": gap, **early}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {case.where: case.holds for case in cases(runs, "l")} == {
        "digits 99-1: a loss within 0.1 nats of its collapse value identifies the low runs": True,
        "choice by the highest validation kNN accuracy": None,
        "choice by the highest validation CAC": False,
    }


def test_the_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 5), rng.normal(0, 1, 5)
    assert claims.Difference(list(a - b)).p == pytest.approx(ttest_rel(a, b).pvalue)
    signs = [
        ([5.0, 5.1, 4.9], 1),
        ([-5.0, -5.1, -4.9], -1),
        ([5.0, -5.0, 1.0], 0),
        ([5.0], 0),
        ([2.0, 2.0], 0),
        ([2.0, 2.0, 2.0], 1),
    ]
    for values, sign in signs:
        assert claims.Difference(values).sign == sign
    assert str(claims.Difference([1.0, 2.0, 4.0])) == "+2.3 ± 1.5 points (n 3, p 0.118)"


def test_check_finds_tables_that_differ_from_their_logs(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    call(monkeypatch, runs, "--claims", "--out", out)
    tables = {"README.md", "report.md", "results.csv", "summary.csv"}
    assert tables | {"runs.jsonl", "accuracy.png"} <= {path.name for path in out.iterdir()}
    assert "| c | Supervised Minority and" in (out / "README.md").read_text(encoding="utf-8")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python report.py --check {out}"
    call(monkeypatch, "--check", tmp_path)
    for name in tables:
        before = (out / name).read_text(encoding="utf-8")
        (out / name).write_text(re.sub(r"5(?=\.\d)", "6", before, count=1), encoding="utf-8")
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
    assert "results/methods/report.md: not compared, it has no runs.jsonl" in printed


def test_the_numbers_of_the_written_page_are_in_the_tables():
    """Every number with one decimal and every deviation of results/differences.md."""
    readme, report_md, written = (
        (ROOT / "results" / page).read_text(encoding="utf-8")
        for page in ("README.md", "report.md", "differences.md")
    )
    known = set(re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", readme + report_md))
    known |= {number.split(" ±")[0] for number in known} | {"0.1", "0.5", "0.125", "0.6"}
    # The tables of claim b have one decimal more.
    known |= {f"{float(number):.1f}" for number in known if "±" not in number}
    for number in re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", written):
        assert number in known, f"{number} is in no table of results/"
