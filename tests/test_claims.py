"""claims.py: verdicts on made-up runs whose answers are known beforehand; report.py --check and runs.jsonl."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT, one_line, run_script
from scipy.stats import ttest_rel
from test_report import call, make_run

from reporting import claims, collect
from utils.cli import UserError

NOISE = (-0.01, 0.0, 0.012)  # of three seeds


def add(runs, method, ratio, accuracy, cac=(60.0, 60.0), noise=NOISE, folder="", **more):
    """Three seeds of a method around a balanced accuracy."""
    for seed, shift in enumerate(noise):
        make_run(
            runs,
            method,
            seed,
            ratio,
            folder=f"{more.get('dataset', 'digits')}/{ratio}/{method}{folder}/seed{seed}",
            **{
                "finetune" if method in claims.SUPERVISED else "probe": accuracy
                + shift * (1 + 0.2 * seed)
            },
            cac=list(cac),
            **more,
        )


@pytest.fixture
def runs(tmp_path):
    """The paper's story, as it would have to look."""
    folder = tmp_path / "runs"
    for ratio, supcon in (("99-1", 0.55), ("95-5", 0.70), ("50-50", 0.95)):
        add(
            folder,
            "supcon",
            ratio,
            supcon,
            cac=(52.0, 52.0) if supcon < 0.9 else (75.0, 75.0),
            noise=(0.01, -0.01, 0),
        )
        add(folder, "supmin", ratio, 0.95 if ratio == "50-50" else 0.85, cac=(70.0, 70.0))
        add(folder, "suppro", ratio, 0.95 if ratio == "50-50" else 0.84, cac=(70.0, 70.0))
    return folder


def cases(folder, letter):
    (claim,) = (claim for claim in claims.CLAIMS if claim.letter == letter)
    return claim.cases(claims.Runs(collect.collect(folder)))


def test_the_papers_story_is_recognised(runs):
    found = {letter: claims.verdict(cases(runs, letter)) for letter in "abcdefhijklm"}
    assert found == {
        "a": "holds",
        "b": "holds in part",
        "c": "holds",
        "d": "not run",
        "e": "holds",
        "f": "not run",
        "h": "holds",
        "i": "not run",
        "j": "not run",
        "k": "not run",
        "l": "not run",
        "m": "not run",
    }
    assert [case.holds for case in cases(runs, "b")[:3]] == [
        None,
        True,
        None,
    ]  # at 99-1 all have the same SAA and SAD; CAC is lower


def test_the_opposite_is_recognised_and_noise_is_undecided(tmp_path):
    for ratio in ("99-1", "50-50"):
        add(tmp_path, "supcon", ratio, 0.9, noise=(0.02, -0.03, 0))
        add(tmp_path, "supmin", ratio, 0.7)
        add(tmp_path, "suppro", ratio, 0.9, noise=(-0.03, 0.02, 0.01))
    assert (
        claims.verdict(cases(tmp_path, "a"))
        == claims.verdict(cases(tmp_path, "c"))
        == "does not hold here"
    )
    assert [case.holds for case in cases(tmp_path, "c")] == [False, None]
    assert [case.holds for case in cases(tmp_path, "h")] == [False, True]
    assert claims.verdict([claims.Case("", None, "")]) == "not decided"
    (tmp_path / "one").mkdir()
    for method, accuracy in (("supcon", 0.5), ("supmin", 0.9), ("suppro", 0.4)):
        add(
            tmp_path / "one", method, "99-1", accuracy, noise=(0.0, 0.01)
        )  # two seeds decide nothing
    assert {claims.verdict(cases(tmp_path / "one", letter)) for letter in "abc"} == {"not decided"}


def test_ablations_are_found_beside_their_base_and_by_one_change_alone(runs):
    for margin, accuracy in ((0.0, 0.6), (2.0, 0.95)):
        add(runs, "suppro", "99-1", accuracy, folder=f"-margin-{margin}", margin=margin)
    add(
        runs, "suppro", "99-1", 0.99, folder="-two", margin=0.5, temperature=0.5
    )  # two changes: no ablation
    assert [(case.where, case.holds) for case in cases(runs, "i")] == [
        ("digits 99-1: margin 1 against 0", True),
        ("digits 99-1: margin 1 against 2", False),
    ]
    add(runs, "supmin", "99-1", 0.7, folder="-share", majority_supervision=0.5)
    assert [(case.where[-20:], case.holds) for case in cases(runs, "j")] == [
        (" 99-1: 0 against 0.5", True),
        ("0 against 1 (SupCon)", True),
    ]
    add(
        runs,
        "supcon",
        "99-1",
        0.85,
        folder="-filled",
        minority_per_batch=4,
        noise=(0.02, -0.01, 0.01),
    )
    assert [case.holds for case in cases(runs, "m")] == [True, True, True]
    for size, epochs, accuracy in ((64, 8, 0.8), (512, 60, 0.52)):
        add(runs, "supcon", "95-5", accuracy, folder=f"-{size}", batch_size=size, epochs=epochs)
    (case,) = cases(runs, "f")
    assert case.holds and case.evidence.startswith("batch 64: 80.") and "512: 52." in case.evidence
    add(
        runs, "supcon", "95-5", 0.1, folder="-more", batch_size=1024, epochs=60
    )  # not as many steps
    assert cases(runs, "f")[0].evidence == case.evidence
    figure = claims.figures(collect.collect(runs))["ablations.png"]()
    assert [ax.get_title() for ax in figure.axes] == [
        "batch size, equal steps",
        "margin of the prototypes",
        "supervised share of the majority",
        "minority images per batch, at least",
    ]
    assert [len(ax.get_legend().get_texts()) for ax in figure.axes] == [1, 1, 1, 1]


def test_other_methods_data_sets_and_early_numbers(runs):
    add(runs, "kcl", "99-1", 0.80)
    add(runs, "ldam_drw", "99-1", 0.95)
    assert [case.holds for case in cases(runs, "c") if "KCL" in case.where] == [True, True]
    assert [case.holds for case in cases(runs, "k")] == [False, False]
    for dataset, ahead in (("fashionmnist", "supmin"), ("breastmnist", "supmin")):
        for method in ("supmin", "suppro"):
            add(runs, method, "95-5", 0.9 if method == ahead else 0.8, dataset=dataset)
    for method, accuracy in (("supcon", 0.5), ("supmin", 0.8)):
        add(runs, method, "99-1", accuracy, folder="-long", epochs=100, warmup_epochs=20)
    assert [(case.where, case.holds) for case in cases(runs, "c") if "epochs" in case.where] == [
        ("digits 99-1, 100 epochs: Supervised Minority over SupCon", True)
    ]
    assert sum("100 epochs" in case.where for case in cases(runs, "b")) == 6
    add(runs, "supcon", "99-1", 0.56, folder="-untrained", lr=0.0, epochs=1, noise=(0, 0.01, -0.01))
    assert [case.holds for case in cases(runs, "a") if "untrained" in case.where] == [True]
    assert [case.holds for case in cases(runs, "c") if "untrained" in case.where] == [True] * 3
    assert [(case.where.split(":")[0], case.holds) for case in cases(runs, "d")] == [
        ("fashionmnist 95-5, natural", True),
        ("breastmnist 95-5, medical", False),
    ]
    for path in sorted(
        runs.glob("digits/99-1/*/seed*/log.jsonl")
    ):  # the early look foretells the end
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        known = {"supcon": 50, "supmin": 80, "suppro": 70}.get(path.parts[-3])
        lines[1] |= {
            "epoch": 7,
            "collapse_gap": 0.0 if known == 50 else 0.9,
            **({"val_knn": known, "val_cac": [100 - known] * 2} if known else {}),
        }
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {case.where: case.holds for case in cases(runs, "l")}
    assert found == {
        "digits 99-1: the loss within 0.1 nats of its collapse value foretells the lower runs": True,
        "choice by the highest kNN accuracy of validation": None,
        "choice by the highest CAC of validation": False,
    }


def test_the_difference_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 5), rng.normal(0, 1, 5)
    assert claims.Difference(list(a - b)).p == pytest.approx(ttest_rel(a, b).pvalue)
    assert [
        claims.Difference(values).sign
        for values in (
            [5.0, 5.1, 4.9],
            [-5.0, -5.1, -4.9],
            [5.0, -5.0, 1.0],
            [5.0],
            [2.0, 2.0],
            [2.0, 2.0, 2.0],
        )
    ] == [1, -1, 0, 0, 0, 1]
    assert str(claims.Difference([1.0, 2.0, 4.0])) == "+2.3 ± 1.5 points (n 3, p 0.118)"


def test_check_finds_what_the_logs_do_not_give(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    call(monkeypatch, runs, "--claims", "--out", out)
    assert {
        "README.md",
        "runs.jsonl",
        "report.md",
        "results.csv",
        "summary.csv",
        "metrics.png",
        "accuracy.png",
    } <= {path.name for path in out.iterdir()}
    text = (out / "README.md").read_text(encoding="utf-8")
    assert (
        "| c | Supervised Minority and Supervised Prototypes repair it" in text
        and "**not run**" in text
        and "linear probe" in text
    )
    call(monkeypatch, "--check", tmp_path)
    for name in ("README.md", "report.md", "results.csv", "summary.csv"):
        before = (out / name).read_text(encoding="utf-8")
        (out / name).write_text(re.sub(r"5(?=\.\d)", "6", before, count=1), encoding="utf-8")
        assert (out / name).read_text(encoding="utf-8") != before
        with pytest.raises(
            SystemExit,
            match=r"1 of the tables differ; made again by: python report.py \S+runs.jsonl$",
        ):
            call(monkeypatch, "--check", out)
        assert f"{name}: DIFFERS" in capsys.readouterr().out
        (out / name).write_text(before, encoding="utf-8")
    logs = (out / "runs.jsonl").read_text(encoding="utf-8")
    (out / "runs.jsonl").write_text(logs.replace('"seed": 2', '"seed": 3', 1), encoding="utf-8")
    with pytest.raises(SystemExit, match="differ"):
        call(monkeypatch, "--check", out)
    (out / "runs.jsonl").write_text(logs, encoding="utf-8")
    (out / "accuracy.png").unlink()
    call(monkeypatch, out / "runs.jsonl")  # from the logs alone, claims as before
    call(monkeypatch, "--check", out)
    assert (out / "accuracy.png").exists() and "README.md: as the logs" in capsys.readouterr().out
    (out / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match="README.md: is not this script's"):
        call(monkeypatch, runs, "--claims", "--out", out)


def test_damaged_archives_and_mistakes(runs, tmp_path, monkeypatch):
    call(monkeypatch, runs)
    path = runs / "report" / "runs.jsonl"
    lines = path.read_text().splitlines()
    head, run = json.loads(lines[0]), json.loads(lines[1])
    for damage in (
        "",
        "x",
        lines[1],
        "[]",
        json.dumps({**head, "claims": 1}),
        lines[0] + "\n" + json.dumps({**run, "log": [1]}),
        lines[0] + "\n3",
        lines[0] + "\n" + json.dumps({**run, "probe": []}),
        lines[0] + "\n" + json.dumps({**run, "train_counts": 7}),
        "[" * 200000,
        json.dumps({**head, "figures": [1]}),
    ):
        path.write_text(damage)
        with pytest.raises(UserError, match="runs.jsonl: not the runs of a report"):
            collect.collect(path)
    one_line(run_script("report.py", cwd=tmp_path, code=2), "give the folder with the runs")
    one_line(
        run_script("report.py", "runs", "--check", "runs", cwd=tmp_path, code=2), "and nothing else"
    )
    one_line(
        run_script("report.py", "--check", "nowhere", cwd=tmp_path, code=2),
        "--check nowhere: holds no runs.jsonl",
    )


def test_the_committed_tables_are_what_their_logs_give(monkeypatch, capsys):
    call(monkeypatch, "--check", ROOT / "results")
    assert "results/README.md: as the logs give it" in capsys.readouterr().out


def test_the_numbers_of_the_written_page_are_in_the_tables():
    """Every number with one decimal and every deviation of results/differences.md."""
    readme, report_md, written = (
        (ROOT / "results" / page).read_text(encoding="utf-8")
        for page in ("README.md", "report.md", "differences.md")
    )
    known = {
        number.strip("-+")
        for number in re.findall(r"[-+]?\d+\.\d+(?: ± \d+\.\d+)?", readme + report_md)
    }
    known |= {number.split(" ±")[0] for number in known} | {"0.1", "0.5", "0.125", "0.6"}
    for number in re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", written):
        assert number in known, f"{number} is in no table of results/"
