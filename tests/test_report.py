"""report.py on a generated tree of runs whose means, deviations and labels are known beforehand."""

import csv
import json
import math
import statistics
import sys

import numpy as np
import pytest
from conftest import one_line, run_script

import pretrain
import report
from reporting import collect, figures, tables
from utils.cli import UserError

SIX = ("sad", "saa", "cad", "cac", "gpu", "peu")


def make_run(
    runs,
    method="supcon",
    seed=0,
    ratio="99-1",
    dataset="digits",
    folder=None,
    probe=None,
    saa=None,
    cac=None,
    finetune=None,
    loss=6.0,
    gap=...,
    balanced_train=None,
    protocol="cached",
    embedding=False,
    encoder=True,
    minority=1,
    **config,
):
    """Write one run folder; probe and finetune are balanced accuracies (the other scores follow), saa and cac [class 0, class 1]."""
    path = runs / (folder or f"{dataset}/{ratio}/{method}/seed{seed}")
    path.mkdir(parents=True)
    supervised = method in (
        "ce",
        "weighted_ce",
        "focal",
        "ldam_drw",
        "logit_adjusted",
        "crt",
        "tau_norm",
        "lws",
    )
    config = {
        "method": method,
        "dataset": dataset,
        "ratio": ratio,
        "arch": "resnet18",
        "size": 32,
        "epochs": 30,
        "batch_size": 256,
        "seed": seed,
        "smoke": False,
        "minority": minority,
        "classes": ["a", "b"],
        "subset": "../no.json",
        "rows_sha256": ratio,
        **({} if supervised else {"projection_dim": 128}),
        **config,
    }
    write(path / "config.json", config)
    lines = [
        {
            "command": f"python pretrain.py subsets/{dataset}/{ratio}.json --method {method} --seed {seed}",
            "commit": "abc1234",
            "device": "a device",
            "torch": "2.11",
        },
        {"epoch": 0, "loss": 9.0, "collapse_gap": -2.8},
        {
            "epoch": 1,
            "loss": loss,
            **(
                {}
                if supervised
                else {
                    "collapse_gap": math.log(511) - loss if gap is ... else gap,
                    "subclasses": [1, 99],
                }
            ),
        },
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if encoder:
        (path / "encoder.pt").touch()
    if probe is not None:
        write(
            path / "probe.json",
            {
                "protocol": protocol,
                "test": classification_scores(probe),
                "val": classification_scores(0.5),
                "smoke": False,
                "epochs": 100,
                "test_balanced_train": None
                if balanced_train is None
                else classification_scores(balanced_train),
            },
        )
    if finetune is not None:
        write(
            path / "finetune.json",
            {
                "loss": "weighted_ce",
                "train": "all",
                "augment": True,
                "test": classification_scores(finetune),
                "val": classification_scores(0.5),
            },
        )
    if saa is not None or cac is not None:
        values = {key: [1.0, 2.0] for key in SIX} | {
            "saa": saa or [1.0, 2.0],
            "cac": cac or [1.0, 2.0],
        }
        write(
            path / "metrics.json",
            {
                **values,
                "space": "encoder" if supervised else "projection",
                "neighborhood": 0.05,
                "smoke": False,
            },
        )
    if embedding:
        labels = np.arange(40) % 2
        np.savez(
            path / "embedding.npz",
            xy=np.random.default_rng(seed).normal(size=(40, 2)),
            labels=labels,
            minority=minority,
            limit=np.inf,
        )
    return path


def write(path, data):
    path.write_text(json.dumps(data))


def classification_scores(value):
    return {
        "accuracy": value + 0.01,
        "balanced_accuracy": value,
        "auroc": value + 0.02,
        "f1": value - 0.01,
    }


def groups_of(runs):
    return {
        (g["dataset"], g["ratio"], g["name"]): g
        for g in tables.group_by_seed(collect.collect(runs))
    }


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    report.main()


def test_mean_and_deviation_by_hand(tmp_path):
    for seed, (probe, saa) in enumerate([(0.70, [10, 1]), (0.72, [20, 3]), (0.77, [60, 5])]):
        make_run(tmp_path, "supmin", seed, probe=probe, saa=saa, loss=5.0 + seed)
    g = groups_of(tmp_path)["digits", "99-1", "supmin"]
    assert g["n"] == 3
    mean, std, values = g["cells"]["balanced_accuracy"]
    assert (
        mean == pytest.approx(73)
        and std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
        and values == pytest.approx([70, 72, 77])
    )
    assert g["cells"]["saa_minority"][:2] == pytest.approx((3, 2)) and g["cells"]["saa_majority"][
        0
    ] == pytest.approx(30)  # minority is class 1
    assert g["cells"]["final_loss"][:2] == pytest.approx((6, 1))
    assert g["cells"]["below_collapse"][0] == pytest.approx(math.log(511) - 6)
    assert (
        tables.cell_text(g["cells"]["balanced_accuracy"], 3, 1)
        == f"73.0 ± {statistics.stdev([70, 72, 77]):.1f}"
    )


def test_minority_is_class_zero_when_the_run_says_so(tmp_path):
    make_run(tmp_path, saa=[7, 9], minority=0)
    cells = groups_of(tmp_path)["digits", "99-1", "supcon"]["cells"]
    assert cells["saa_minority"][0] == 7 and cells["saa_majority"][0] == 9


def test_one_seed_has_no_deviation_and_fewer_seeds_are_said(tmp_path):
    make_run(tmp_path, probe=0.6)
    assert (
        tables.cell_text(
            groups_of(tmp_path)["digits", "99-1", "supcon"]["cells"]["balanced_accuracy"], 1, 1
        )
        == "60.0 ± -"
    )
    make_run(tmp_path, seed=1)
    assert (
        tables.cell_text(
            groups_of(tmp_path)["digits", "99-1", "supcon"]["cells"]["balanced_accuracy"], 2, 1
        )
        == "60.0 ± - (n 1)"
    )


def test_not_run_is_not_the_same_as_not_applicable(tmp_path):
    make_run(tmp_path, "supcon", probe=0.6)
    make_run(tmp_path, "supmin", probe=0.6, balanced_train=0.8)
    make_run(tmp_path, "ntxent")
    make_run(tmp_path, "ce", finetune=0.7)
    found = groups_of(tmp_path)
    assert found["digits", "99-1", "supcon"]["cells"]["saa_minority"] == collect.NOT_RUN
    assert (
        found["digits", "99-1", "supcon"]["cells"]["balanced_train_accuracy"]
        == collect.NOT_APPLICABLE
    )  # null: no 50-50 subset beside it
    assert found["digits", "99-1", "supmin"]["cells"]["balanced_train_accuracy"][
        0
    ] == pytest.approx(81)
    assert found["digits", "99-1", "ntxent"]["cells"]["accuracy"] == collect.NOT_RUN
    ce = found["digits", "99-1", "ce from scratch"]["cells"]
    assert (
        ce["balanced_accuracy"][0] == pytest.approx(70)
        and ce["below_collapse"] == collect.NOT_APPLICABLE
        and ce["cac_minority"] == collect.NOT_RUN
    )
    text = tables.markdown(list(found.values()), [], [], "report.py runs")
    assert (
        "| ce | from scratch | 1 | 71.0 ± - | 70.0 ± - |" in text
        and "| ntxent | linear probe | 1 | not run | not run |" in text
    )


def test_labels_name_options_and_unusual_settings_only(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "suppro", seed, margin=1.0)
    make_run(tmp_path, "suppro", 0, folder="a", margin=0.5)
    make_run(tmp_path, "supmin", 0, majority_supervision=0.0)
    make_run(tmp_path, "supmin", 0, folder="b", majority_supervision=0.5)
    make_run(tmp_path, "supmin", 0, folder="c", majority_supervision=0.0, smoke=True, epochs=2)
    make_run(
        tmp_path, "supcon", 0, batch_size=64
    )  # its only runs, yet unlike the other contrastive ones
    make_run(tmp_path, "ce", 0, epochs=90)  # another kind: 90 is its usual
    labels = {row["path"]: row["label"] for row in collect.collect(tmp_path)}
    assert labels == {
        "digits/99-1/suppro/seed0": "suppro",
        "digits/99-1/suppro/seed1": "suppro",
        "a": "suppro (margin 0.5)",
        "digits/99-1/supmin/seed0": "supmin",
        "b": "supmin (majority supervision 0.5)",
        "c": "supmin (smoke, epochs 2)",
        "digits/99-1/supcon/seed0": "supcon (batch size 64)",
        "digits/99-1/ce/seed0": "ce",
    }


def test_what_was_tried_at_one_ratio_is_not_the_usual_however_often_it_was(tmp_path):
    for ratio in ("99-1", "50-50"):
        make_run(tmp_path, "supcon", 0, ratio, probe=0.6, warmup_epochs=10)
    for seed in range(4):
        make_run(tmp_path, "supcon", seed, folder=f"short{seed}", probe=0.7, warmup_epochs=2)
    assert [(g["ratio"], g["label"], g["n"]) for g in groups_of(tmp_path).values()] == [
        ("99-1", "supcon", 1),
        ("99-1", "supcon (warmup epochs 2)", 4),
        ("50-50", "supcon", 1),
    ]
    assert [
        (g["ratio"], g["label"])
        for g in figures.line_plot_groups(list(groups_of(tmp_path).values()))
    ] == [("99-1", "supcon"), ("50-50", "supcon")]
    make_run(tmp_path, "supcon", 0, "50-50", folder="short", probe=0.7, warmup_epochs=2)
    assert (
        len(figures.line_plot_groups(list(groups_of(tmp_path).values()))) == 4
    )  # two ratios make a line


def test_labels_of_later_methods_name_what_is_not_the_default(tmp_path):
    for i, (method, options, label) in enumerate(
        [
            ("kcl", {"k": 3, "queue": 0}, "kcl"),
            ("kcl", {"k": 6, "queue": 1024}, "kcl (k 6, queue 1024)"),
            ("tsc", {"variant": "ttc", "k": 3, "queue": 0}, "tsc"),
            ("tsc", {"variant": "code", "k": 6, "queue": 0}, "tsc (code, k 6)"),
            ("sbcl", {"variant": "code", "recluster_every": 10}, "sbcl"),
            ("sbcl", {"variant": "paper", "recluster_every": 5}, "sbcl (paper, recluster every 5)"),
            ("bcl", {"variant": "layernorm", "randaugment": False}, "bcl"),
            ("bcl", {"variant": "layernorm", "randaugment": True}, "bcl (randaugment)"),
            (
                "paco",
                {"variant": "paco", "alpha": None, "queue": 1024, "randaugment": False},
                "paco",
            ),
            (
                "paco",
                {"variant": "gpaco", "alpha": 0.02, "queue": 0, "randaugment": False},
                "paco (gpaco, queue 0, alpha 0.02)",
            ),
        ]
    ):
        make_run(tmp_path, method, folder=f"{i}", **options)
        assert {row["path"]: row["label"] for row in collect.collect(tmp_path)}[str(i)] == label


def test_the_report_knows_the_defaults_of_every_method():
    for name, options in pretrain.OPTIONS.items():
        assert options == {
            key: {**collect.DEFAULTS, **collect.OWN_DEFAULTS.get(name, {})}[key] for key in options
        }


def test_weighted_cross_entropy_with_and_without_augmentation_are_two_rows(tmp_path):
    for augment, value in ((True, 0.7), (False, 0.6)):
        for seed in (0, 1):
            make_run(
                tmp_path,
                "weighted_ce",
                seed,
                folder=f"{augment}{seed}",
                finetune=value,
                augment=augment,
                head="linear",
                fraction=1.0,
            )
    make_run(tmp_path, "ldam_drw", finetune=0.8, augment=True, head="cosine", fraction=1.0)
    make_run(
        tmp_path,
        "logit_adjusted",
        finetune=0.9,
        augment=True,
        head="linear",
        fraction=0.1,
        head_lr=0.01,
    )
    found = groups_of(tmp_path)
    assert {
        name: (g["n"], round(g["cells"]["balanced_accuracy"][0]))
        for (_, _, name), g in found.items()
    } == {
        "weighted_ce from scratch": (2, 70),
        "weighted_ce (no augment) from scratch": (2, 60),
        "ldam_drw from scratch": (1, 80),
        "logit_adjusted (head lr 0.01, fraction 0.1) from scratch": (1, 90),
    }
    text = tables.markdown(list(found.values()), [], [], "report.py runs")
    assert (
        text.count("## digits, 99-1") == 1
        and "| weighted_ce (no augment) | from scratch | 2 |" in text
    )


def test_retrained_classifiers_are_rows_named_by_their_encoder(tmp_path, monkeypatch, capsys):
    def retrained(method, encoder, seed, value, **config):
        make_run(
            tmp_path,
            method,
            seed,
            folder=f"{encoder}/seed{seed}/{method}{len(config)}",
            encoder=False,
            finetune=value,
            epochs=dict(crt=10, lws=5)[method],
            encoder_method=encoder,
            encoder_seed=seed,
            encoder_sha256=f"{encoder}{seed}",
            balanced_batches=True,
            **{"encoder_lr": 0.1, **config},
        )

    for seed in (0, 1):
        make_run(tmp_path, "ce", seed, folder=f"ce/seed{seed}", finetune=0.55)
        make_run(tmp_path, "supcon", seed, folder=f"supcon/seed{seed}", probe=0.6)
        retrained("crt", "ce", seed, 0.7 + seed / 10)
        retrained("crt", "supcon", seed, 0.6)
    retrained("crt", "supcon", 0, 0.2, encoder_lr=0.5, encoder_margin=1.0)
    retrained("lws", "supcon", 0, 0.65, classifier_lr=0.1)
    retrained("lws", "ce", 1, None)
    found = groups_of(tmp_path)
    rows = {
        name: (g["n"], g["cells"]["balanced_accuracy"][0])
        for (_, _, name), g in found.items()
        if g["scored_by"] == "re-trained"
    }
    assert rows == {
        "crt": (2, pytest.approx(75)),
        "crt (encoder supcon)": (2, pytest.approx(60)),
        "lws (encoder supcon)": (1, pytest.approx(65)),
        "crt (encoder supcon, encoder lr 0.5, encoder margin 1)": (1, pytest.approx(20)),
    }
    cells = found["digits", "99-1", "crt"]["cells"]
    assert (
        cells["final_loss"]
        == cells["saa_minority"]
        == cells["below_collapse"]
        == cells["balanced_train_accuracy"]
        == collect.NOT_APPLICABLE
    )
    assert {
        row["state"] for row in collect.collect(tmp_path) if row["path"] == "ce/seed1/lws0"
    } == {"not finished"}
    call(monkeypatch, tmp_path)
    assert "not finished (1): ce/seed1/lws0" in capsys.readouterr().out
    assert all(
        "crt" not in line for line in tables.headlines(list(found.values()))
    )  # they have no encoder of their own


def test_retrained_classifiers_alone_make_a_report(tmp_path, monkeypatch):
    make_run(
        tmp_path,
        "crt",
        encoder=False,
        finetune=0.7,
        encoder_method="ce",
        encoder_seed=0,
        balanced_batches=True,
    )
    call(monkeypatch, tmp_path)
    assert "| crt | re-trained | 1 |" in (tmp_path / "report/report.md").read_text(encoding="utf-8")


def test_collapse_gap_is_the_logs_and_null_does_not_apply(tmp_path):
    make_run(tmp_path, "tsc", gap=None, variant="ttc")
    make_run(tmp_path, "kcl", gap=0.25)
    found = groups_of(tmp_path)
    assert found["digits", "99-1", "tsc"]["cells"]["below_collapse"] == collect.NOT_APPLICABLE
    assert found["digits", "99-1", "kcl"]["cells"]["below_collapse"][0] == 0.25
    assert {row["last_subclasses"] for row in tables.results_table(collect.collect(tmp_path))} == {
        "[1, 99]"
    }


@pytest.mark.parametrize(
    "other",
    [
        {"arch": "resnet50"},
        {"epochs": 5},
        {"batch_size": 64},
        {"size": 64},
        {"smoke": True},
        {"lr": 0.1},
        {"sha256": "f" * 64},
        {"margin": 0.5},
        {"ratio": "95-5"},
        {"dataset": "other"},
    ],
)
def test_other_settings_are_never_averaged(tmp_path, other):
    make_run(tmp_path, "suppro", 0, folder="a", probe=0.6)
    make_run(tmp_path, "suppro", 1, folder="b", probe=0.9, **other)
    found = groups_of(tmp_path)
    assert len(found) == 2 and sorted(
        g["cells"]["balanced_accuracy"][0] for g in found.values()
    ) == pytest.approx([60, 90])


def test_other_ways_of_measuring_are_never_averaged(tmp_path):
    make_run(tmp_path, seed=0, probe=0.6, finetune=0.8, saa=[1, 1])
    make_run(tmp_path, seed=1, probe=0.7, protocol="reference")
    path = make_run(tmp_path, seed=2, probe=0.9, saa=[1, 1])
    metrics = json.loads((path / "metrics.json").read_text())
    write(path / "metrics.json", {**metrics, "neighborhood": 5})
    found = {g["scored_by"]: g for g in groups_of(tmp_path).values()}
    assert {way: g["cells"]["balanced_accuracy"][0] for way, g in found.items()} == pytest.approx(
        {
            "linear probe": 60,
            "fine-tuned, weighted_ce, all": 80,
            "linear probe, reference protocol, 100 epochs": 70,
            "linear probe, CAC neighborhood 5": 90,
        }
    )
    write(
        path / "finetune.json",
        {
            "loss": "ce",
            "train": "head",
            "augment": True,
            "head": "mlp",
            "head_lr": None,
            "balanced_batches": True,
            "fraction": 0.5,
            "bn_train": True,
            "test": classification_scores(0.5),
        },
    )
    assert (
        "fine-tuned, ce, head, head mlp, balanced batches, fraction 0.5, bn train, CAC neighborhood 5"
        in {g["scored_by"] for g in groups_of(tmp_path).values()}
    )
    assert (
        found["fine-tuned, weighted_ce, all"]["cells"]["saa_minority"] == collect.NOT_APPLICABLE
    )  # of the encoder before


def test_unfinished_and_repeated_runs_are_listed_and_not_counted(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, seed=0, probe=0.6)
    make_run(tmp_path, seed=0, folder="copy", probe=0.6)
    make_run(tmp_path, seed=1, encoder=False)
    rows = collect.collect(tmp_path)
    assert {row["path"]: row["state"] for row in rows} == {
        "copy": "finished",
        "digits/99-1/supcon/seed0": "repeats copy",
        "digits/99-1/supcon/seed1": "not finished",
    }
    assert groups_of(tmp_path)["digits", "99-1", "supcon"]["n"] == 1
    call(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert (
        "not finished (1): digits/99-1/supcon/seed1" in printed
        and "digits/99-1/supcon/seed0: repeats copy" in printed
    )
    assert "next: python pretrain.py subsets/digits/99-1.json --method supcon --seed 1" in printed
    assert "Left out" in (tmp_path / "report/report.md").read_text(encoding="utf-8")


def test_only_unfinished_runs(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, encoder=False)
    call(monkeypatch, tmp_path)
    assert "not finished (1)" in capsys.readouterr().out
    assert not list((tmp_path / "report").glob("*.png"))


def test_order_of_tables_and_of_files(tmp_path):
    for i, (dataset, ratio, method) in enumerate(
        [
            ("zebra", "50-50", "ce"),
            ("digits", "natural", "suppro"),
            ("digits", "50-50", "focal"),
            ("digits", "50-50", "supcon"),
            ("inat21-plants", "99-1", "ntxent"),
            ("digits", "95-5", "supmin"),
            ("digits", "99-1", "other"),
        ]
    ):
        make_run(tmp_path, method, dataset=dataset, ratio=ratio, folder=f"{'gcafbed'[i]}/run")
    assert [(row["dataset"], row["ratio"], row["method"]) for row in collect.collect(tmp_path)] == [
        ("digits", "99-1", "other"),
        ("digits", "95-5", "supmin"),
        ("digits", "50-50", "supcon"),
        ("digits", "50-50", "focal"),
        ("digits", "natural", "suppro"),
        ("inat21-plants", "99-1", "ntxent"),
        ("zebra", "50-50", "ce"),
    ]


def test_folder_names_do_not_matter(tmp_path):
    """The same runs under shuffled names give the same numbers."""
    rng = np.random.default_rng(0)
    runs = [
        (method, seed, rng.random() / 2 + 0.4, list(rng.random(2) * 50))
        for method in ("supcon", "supmin")
        for seed in range(4)
    ]
    for tree, order in (("a", range(8)), ("b", rng.permutation(8))):
        for place, i in enumerate(order):
            method, seed, probe, saa = runs[i]
            make_run(tmp_path / tree, method, seed, folder=f"{place}", probe=probe, saa=saa)
    summaries = [
        [
            {key: row[key] for key in row}
            for row in tables.summary_table(tables.group_by_seed(collect.collect(tmp_path / tree)))
        ]
        for tree in "ab"
    ]
    assert summaries[0] == summaries[1] and [row["n"] for row in summaries[0]] == [4, 4]


def test_csv_files_hold_every_seed_and_every_summary(tmp_path, monkeypatch):
    for seed in range(2):
        make_run(
            tmp_path,
            "supmin",
            seed,
            probe=0.6 + seed / 10,
            saa=[10, 20],
            balanced_train=0.9,
            lr=0.05,
        )
    make_run(tmp_path, "focal", 0, finetune=0.7)
    out = tmp_path / "evidence"
    call(monkeypatch, tmp_path, "--out", out)
    rows = read_csv(out / "results.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("supmin", "0"),
        ("supmin", "1"),
        ("focal", "0"),
    ]
    first = rows[0]
    assert (
        first["path"] == "digits/99-1/supmin/seed0"
        and first["commit"] == "abc1234"
        and first["device"] == "a device"
        and first["lr"] == "0.05"
    )
    assert (
        float(first["probe_test_auroc"]) == pytest.approx(0.62)
        and float(first["saa_minority"]) == 20
        and float(first["saa_majority"]) == 10
    )
    assert (
        float(first["probe_test_balanced_train_accuracy"]) == pytest.approx(0.91)
        and "--seed 0" in first["command"]
    )
    assert rows[2]["probe_test_accuracy"] == "" and float(
        rows[2]["finetune_test_accuracy"]
    ) == pytest.approx(0.71)
    summary = {row["label"]: row for row in read_csv(out / "summary.csv")}
    assert (
        float(summary["supmin"]["balanced_accuracy_percent_mean"]) == pytest.approx(65)
        and summary["supmin"]["n"] == "2"
    )
    assert float(summary["supmin"]["balanced_accuracy_percent_std"]) == pytest.approx(math.sqrt(50))
    assert (
        summary["focal"]["saa_minority_mean"] == "not run"
        and summary["focal"]["scored_by"] == "from scratch"
    )


def test_provenance_is_read_from_the_runs(tmp_path):
    for method in ("supcon", "supmin"):
        for seed in range(2):
            make_run(tmp_path, method, seed, probe=0.6)
    text = tables.markdown(list(groups_of(tmp_path).values()), [], [], "report.py runs")
    assert (
        "`python pretrain.py subsets/digits/99-1.json --method {supcon,supmin} --seed {0,1}`"
        in text
    )
    assert (
        "hardware: a device; torch 2.11; commit abc1234" in text
        and "arch resnet18, epochs 30, batch size 256, size 32" in text
    )


def test_commands_of_other_forms_stay_apart():
    assert tables.command_shapes(
        [
            "python a.py x --seed 0",
            "python a.py x --seed 1",
            "python a.py x",
            "python b.py x --seed 0",
        ]
    ) == ["python a.py x --seed {0,1}", "python a.py x", "python b.py x --seed 0"]
    assert tables.command_shapes(
        [f"python p.py runs/{m}/seed{s}" for m in "ab" for s in (0, 1)]
    ) == ["python p.py runs/{a,b}/{seed0,seed1}"]


def test_terminal_table_fits(tmp_path):
    for seed in range(2):
        make_run(
            tmp_path,
            "supmin",
            seed,
            probe=0.97,
            saa=[99, 100 - seed],
            cac=[100, 100 - seed],
            majority_supervision=0.25,
            finetune=0.9,
        )
    make_run(tmp_path, "supmin", 5, majority_supervision=0.25)
    text = tables.terminal_tables(list(groups_of(tmp_path).values()))
    assert max(map(len, text.splitlines())) <= 120
    assert "97.0 ± 0.0*" in text and "* fewer seeds" in text and "supmin (majority" in text


def test_headline_says_what_the_numbers_say(tmp_path):
    for method, saa, probe, loss in (("supcon", 1.0, 0.6, 6.2), ("supmin", 12.0, 0.8, 5.0)):
        make_run(tmp_path, method, saa=[saa, saa + 1], probe=probe, loss=loss)
        make_run(tmp_path, method, ratio="50-50", saa=[80, 80], probe=0.99)
    (line,) = tables.headlines(list(groups_of(tmp_path).values()))
    gap = math.log(511) - 6.2
    assert line == (
        "digits 99-1 (1 seed), SAA over both classes: supcon 1.5 %, supmin 12.5 %; CAC: supcon 1.5 %, supmin 1.5 %; balanced accuracy: supcon 60.0 %, supmin 80.0 %. "
        f"The final loss nearest to its collapse value is that of supcon, {gap:.3f} nats below it."
    )


def test_line_fit_against_scikit_learn():
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(1)
    x = rng.uniform(50, 90, 25)
    y = 0.7 * x + rng.normal(0, 5, 25)
    model = LinearRegression().fit(x[:, None], y)
    assert figures.line_fit(x, y) == pytest.approx(
        (model.coef_[0], model.intercept_, model.score(x[:, None], y))
    )
    assert figures.line_fit(x, y)[2] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def cac_titles(runs):
    groups = tables.group_by_seed(collect.collect(runs))
    style = {g["name"]: dict(color="k", marker="o", ls="-") for g in groups}
    return [ax.get_title() for ax in figures.cac_accuracy_figure(groups, style).axes]


def test_r_squared_in_the_title_or_why_not(tmp_path):
    points = [(60, 0.6), (70, 0.65), (80, 0.9), (85, 0.8)]
    for seed, (cac, probe) in enumerate(points[:2]):
        make_run(tmp_path, seed=seed, cac=[cac - 5, cac + 5], probe=probe)
    assert cac_titles(tmp_path) == ["digits, n = 2: no line, fewer than 3 runs"]
    for seed, (cac, probe) in enumerate(points[2:], 2):
        make_run(tmp_path, seed=seed, cac=[cac - 5, cac + 5], probe=probe)
    r2 = np.corrcoef(*np.array(points).T)[0, 1] ** 2
    assert cac_titles(tmp_path) == [f"digits, n = 4: R² = {r2:.2f}"]


def test_natural_ratio_is_placed_by_its_counts(tmp_path):
    path = make_run(tmp_path, ratio="natural", probe=0.6, minority=0, subset="../subset.json")
    (row,) = collect.collect(tmp_path)
    assert row["minority_percent"] is None and "digits natural" in tables.excluded_runs([row])[0]
    write(path.parent / "subset.json", {"counts": {"train": {"0": 30, "1": 90}}})
    assert collect.collect(tmp_path)[0]["minority_percent"] == 25


def test_figures_are_drawn_and_not_blank(tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread

    rng = np.random.default_rng(0)
    for ratio in ("99-1", "50-50"):
        for method in ("supcon", "supmin"):
            for seed in range(2):
                make_run(
                    tmp_path,
                    method,
                    seed,
                    ratio,
                    probe=rng.uniform(0.5, 0.9),
                    saa=list(rng.uniform(0, 50, 2)),
                    cac=list(rng.uniform(50, 90, 2)),
                    embedding=seed == 1,
                )
    make_run(tmp_path, "ce", 0, finetune=0.7)
    call(monkeypatch, tmp_path)
    printed, text = (
        capsys.readouterr().out,
        (tmp_path / "report/report.md").read_text(encoding="utf-8"),
    )
    for name in ("overview_digits", "accuracy", "saa_cac", "cac_accuracy", "embeddings_digits"):
        pixels = imread(tmp_path / "report" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05, name
        assert f"({name}.png)" in text and f"{name}.png" in printed
    assert not [path for path in (tmp_path / "report").iterdir() if path.name.startswith(".")]


def test_figures_without_data_are_named(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, probe=0.6)
    call(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {
        "overview_digits.png",
        "accuracy.png",
    }
    for name in ("saa_cac.png", "cac_accuracy.png", "embeddings_digits.png"):
        assert f"{name}: not drawn" in printed


def test_lines_hold_the_means_and_every_seed(tmp_path):
    for ratio, values in (("99-1", (0.5, 0.6)), ("50-50", (0.9, 0.7))):
        for seed, value in enumerate(values):
            make_run(tmp_path, "supmin", seed, ratio, probe=value)
    groups = tables.group_by_seed(collect.collect(tmp_path))
    (ax,) = figures.accuracy_figure(groups, {"supmin": dict(color="k", marker="o", ls="-")}).axes
    lines = [line.get_ydata() for line in ax.get_lines()]
    assert any(len(y) == 2 and np.allclose(y, [55, 80]) for y in lines)
    assert any(np.allclose(y, [50, 60]) for y in lines) and any(
        np.allclose(y, [90, 70]) for y in lines
    )
    assert ax.containers[0].lines[0].get_xdata() == pytest.approx([1, 50])


def test_embedding_is_the_lowest_seed_that_has_one(tmp_path):
    for seed in (0, 3, 10):
        make_run(tmp_path, seed=seed, embedding=seed > 0)
    (g,) = tables.group_by_seed(collect.collect(tmp_path))
    row, xy, rare, _ = figures.load_embedding(g, tmp_path)
    assert row["seed"] == 3 and xy.shape == (40, 2) and rare.sum() == 20


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("probe.json", "{"),
        ("probe.json", '{"test": {"accuracy": 1}}'),
        ("finetune.json", "[]"),
        ("metrics.json", '{"saa": [1]}'),
        ("config.json", '{"method": "supcon", "dataset": "digits"}'),
        ("embedding.npz", "no zip"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, monkeypatch, name, text):
    make_run(tmp_path, seed=0, probe=0.6, saa=[1, 1])
    path = make_run(tmp_path, seed=1) / name
    path.write_text(text)
    with pytest.raises(UserError, match="delete it") as error:
        call(monkeypatch, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_results_of_another_encoder_are_refused(tmp_path):
    path = make_run(tmp_path, probe=0.6, saa=[1, 1])
    for name, digest in (("probe.json", "a"), ("metrics.json", "b")):
        write(path / name, {**json.loads((path / name).read_text()), "encoder_sha256": digest})
    with pytest.raises(UserError, match="different encoders"):
        collect.collect(tmp_path)


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect.collect(tmp_path / "nothing")
    write(tmp_path / "config.json", {"something": "else"})
    with pytest.raises(UserError, match="holds no run"):
        collect.collect(tmp_path)


def test_as_a_user_calls_it(tmp_path):
    make_run(tmp_path / "runs", probe=0.6)
    one_line(run_script("report.py", "nowhere", cwd=tmp_path, code=2), "nowhere: no such folder")
    assert "report.md" in run_script("report.py", "runs", "--out", "results", cwd=tmp_path).stdout
    assert (tmp_path / "results/report.md").exists() and not (tmp_path / "runs/report").exists()
