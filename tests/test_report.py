"""report.py on generated runs with known means, deviations and labels."""

import csv
import json
import math
import statistics
import sys

import numpy as np
import pytest
from conftest import one_line, run_script

import report
from reporting import figures, tables
from reporting.collect import METRICS, NOT_APPLICABLE, NOT_RUN, archive_text, collect, load_runs
from utils.cli import UserError

FINETUNED = "ce weighted_ce focal ldam_drw logit_adjusted crt tau_norm lws".split()


def make_run(runs, method="supcon", seed=0, ratio="99-1", dataset="digits", folder=None, **options):
    """Write one run folder. `options` are results (below) or entries of config.json.

    probe, balanced_train and finetune are balanced accuracies; saa and cac are [class 0, class 1];
    probe_options are entries of probe.json.
    """
    results = {"loss": 6.0, "probe_options": {}, "encoder": True, "embedding": False}
    results |= dict.fromkeys("probe balanced_train finetune saa cac".split()) | {"gap": ...}
    results = {name: options.pop(name, default) for name, default in results.items()}
    path = runs / (folder or f"{dataset}/{ratio}/{method}/seed{seed}")
    path.mkdir(parents=True)
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
        "minority": 1,
        "classes": ["a", "b"],
        "subset": "../no.json",
        "rows_sha256": ratio,
        **({} if method in FINETUNED else {"projection_dim": 128}),
        **options,
    }
    write(path / "config.json", config)
    write_log(path, config, results)
    write_results(path, config, results)
    return path


def write_log(path, config, results):
    dataset, ratio, method, seed = (config[k] for k in ("dataset", "ratio", "method", "seed"))
    command = f"python pretrain.py subsets/{dataset}/{ratio}.json --method {method} --seed {seed}"
    last = {"epoch": 1, "loss": results["loss"]}
    if method not in FINETUNED:
        gap = math.log(511) - results["loss"] if results["gap"] is ... else results["gap"]
        last |= {"collapse_gap": gap, "subclasses": [1, 99]}
    lines = [
        {"command": command, "commit": "abc1234", "device": "a device", "torch": "2.11"},
        {"epoch": 0, "loss": 9.0, "collapse_gap": -2.8},
        last,
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_results(path, config, results):
    if results["encoder"]:
        (path / "encoder.pt").touch()
    if results["probe"] is not None:
        balanced = results["balanced_train"]
        probe = {
            "protocol": "cached",
            "test": scores(results["probe"]),
            "val": scores(0.5),
            "smoke": False,
            "epochs": 100,
            "test_balanced_train": None if balanced is None else scores(balanced),
            "provenance": {"command": f"python linear_probe.py runs/{path.name}"},
            **results["probe_options"],
        }
        write(path / "probe.json", probe)
    if results["finetune"] is not None:
        test = {"test": scores(results["finetune"]), "val": scores(0.5)}
        loss = {"loss": "weighted_ce", "train": "all", "augment": True}
        write(path / "finetune.json", {**loss, **test})
    if results["saa"] is not None or results["cac"] is not None:
        values = {key: results.get(key) or [1.0, 2.0] for key in METRICS}
        space = "encoder" if config["method"] in FINETUNED else "projection"
        settings = {"space": space, "neighborhood": 0.05, "smoke": False, "n": [90, 10]}
        write(path / "metrics.json", {**values, **settings})
    if results["embedding"]:
        xy = np.random.default_rng(config["seed"]).normal(size=(40, 2))
        arrays = {"xy": xy, "labels": np.arange(40) % 2, "minority": config["minority"]}
        np.savez(path / "embedding.npz", **arrays, limit=np.inf)


def write(path, data):
    path.write_text(json.dumps(data))


def scores(value):
    others = {"accuracy": value + 0.01, "auroc": value + 0.02, "f1": value - 0.01}
    return {"balanced_accuracy": value, **others}


def groups_of(runs):
    """{name: Group}; the tests of one ratio need no longer key."""
    return {group.name: group for group in tables.group_by_seed(collect(runs))}


def markdown(runs):
    rows = collect(runs)
    return tables.report_markdown(tables.group_by_seed(rows), [], [], "report.py runs")


def assert_archive_holds(runs):
    """The rows of a runs.jsonl are those of the folders."""
    head = {"command": "", "claims": False, "figures": [], "notes": []}
    archive = runs / "runs.jsonl"
    archive.write_text(archive_text(head, load_runs(runs)[1]))
    assert collect(archive) == collect(runs)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    report.main()


@pytest.fixture
def no_figures(monkeypatch):
    """Skip the drawing where a test is about tables."""
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, dpi: path.touch())


def test_mean_and_deviation_by_hand(tmp_path):
    for seed, (probe, saa) in enumerate([(0.70, [10, 1]), (0.72, [20, 3]), (0.77, [60, 5])]):
        make_run(tmp_path, "supmin", seed, probe=probe, saa=saa, loss=5.0 + seed)
    group = groups_of(tmp_path)["supmin"]
    mean, std, values = group.cells["balanced_accuracy"]
    assert group.n == 3 and values == pytest.approx([70, 72, 77])
    assert mean == pytest.approx(73) and std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    # The minority is class 1.
    assert group.cells["saa_minority"][:2] == pytest.approx((3, 2))
    assert group.cells["saa_majority"].mean == pytest.approx(30)
    assert group.cells["final_loss"][:2] == pytest.approx((6, 1))
    assert group.cells["below_collapse"].mean == pytest.approx(math.log(511) - 6)
    text = f"73.0 ± {statistics.stdev([70, 72, 77]):.1f}"
    assert tables.cell_text(group.cells["balanced_accuracy"], 3, 1) == text


def test_intervals_over_test_images_stand_beside_the_spread_over_seeds(tmp_path):
    for seed, low in enumerate((0.5, 0.6)):
        interval = {"auroc": [low, 0.8], "balanced_accuracy": [0.4, 0.7], "accuracy": [0, 1]}
        make_run(tmp_path, seed=seed, probe=0.6, probe_options={"test_interval": interval})
    # A run that is older than the key has no interval, and takes none away.
    make_run(tmp_path, "supmin", probe=0.6)
    text = markdown(tmp_path)
    header, _, supcon, supmin = text[text.index("| method |") :].splitlines()[:4]
    titles, cells, others = (line.split(" | ") for line in (header, supcon, supmin))
    at = titles.index("AUROC, interval over test images (%)")
    assert cells[at] == "55.0 to 80.0" and others[at] == "-"
    assert "accuracy, interval over test images (%)" not in titles
    (row, *_) = tables.summary_table(tables.group_by_seed(collect(tmp_path)))
    assert row["auroc_interval_low_percent"] == pytest.approx(55)
    assert "± is the spread over seeds" in text and "95 % bootstrap interval" in text
    assert_archive_holds(tmp_path)


def test_class_0_can_be_the_minority(tmp_path):
    make_run(tmp_path, saa=[7, 9], minority=0)
    cells = groups_of(tmp_path)["supcon"].cells
    assert cells["saa_minority"].mean == 7 and cells["saa_majority"].mean == 9


def test_one_seed_has_no_deviation_and_missing_seeds_are_counted(tmp_path):
    make_run(tmp_path, probe=0.6)
    cell = groups_of(tmp_path)["supcon"].cells["balanced_accuracy"]
    assert tables.cell_text(cell, 1, 1) == "60.0"
    make_run(tmp_path, seed=1)
    assert "| supcon | linear probe | 2 | 61.0 (n 1) |" in markdown(tmp_path)


def test_not_run_differs_from_not_applicable(tmp_path):
    make_run(tmp_path, "supcon", probe=0.6)
    make_run(tmp_path, "supmin", probe=0.6, balanced_train=0.8)
    make_run(tmp_path, "ntxent")
    make_run(tmp_path, "ce", finetune=0.7)
    cells = {name: group.cells for name, group in groups_of(tmp_path).items()}
    assert cells["supcon"]["saa_minority"] == NOT_RUN
    # null in probe.json: there is no 50-50 subset beside the run's own
    assert cells["supcon"]["balanced_train_accuracy"] == NOT_APPLICABLE
    assert cells["supmin"]["balanced_train_accuracy"].mean == pytest.approx(81)
    assert cells["ntxent"]["accuracy"] == NOT_RUN
    ce = cells["ce from scratch"]
    assert ce["balanced_accuracy"].mean == pytest.approx(70) and ce["cac_minority"] == NOT_RUN
    assert ce["below_collapse"] == NOT_APPLICABLE
    text = markdown(tmp_path)
    assert "| ce | from scratch | 1 | 71.0 | 70.0 |" in text
    assert "| ntxent | linear probe | 1 | not run | not run |" in text


def test_labels_name_the_settings_that_are_not_usual(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "suppro", seed, margin=1.0)
    make_run(tmp_path, "suppro", 0, folder="a", margin=0.5)
    make_run(tmp_path, "supmin", 0, majority_supervision=0.0)
    make_run(tmp_path, "supmin", 1, folder="b", majority_supervision=0.0)
    make_run(tmp_path, "supmin", 0, folder="c", majority_supervision=0.0, smoke=True, epochs=2)
    make_run(tmp_path, "supmin", 0, folder="d", majority_supervision=0.0, minority_per_batch=4)
    # The only runs of SupCon differ from the other contrastive runs.
    make_run(tmp_path, "supcon", 0, folder="e", batch_size=64)
    # Supervised runs are of another kind: 90 is usual among them.
    make_run(tmp_path, "ce", 0, folder="f", epochs=90)
    labels = {row["path"]: row["label"] for row in collect(tmp_path)}
    assert labels == {
        "digits/99-1/suppro/seed0": "suppro",
        "digits/99-1/suppro/seed1": "suppro",
        "a": "suppro (margin 0.5)",
        "digits/99-1/supmin/seed0": "supmin",
        "b": "supmin",
        "c": "supmin (epochs 2, smoke)",
        "d": "supmin (minority per batch 4)",
        "e": "supcon (batch size 64)",
        "f": "ce",
    }


def test_of_two_equally_frequent_values_both_are_named(tmp_path):
    make_run(tmp_path, "sbcl", folder="a", variant="code", recluster_every=5)
    make_run(tmp_path, "sbcl", folder="b", variant="paper", recluster_every=5)
    make_run(tmp_path, "paco", folder="c", alpha=None, randaugment=False)
    make_run(tmp_path, "paco", folder="d", alpha=0.05, randaugment=True)
    labels = {row["path"]: row["label"] for row in collect(tmp_path)}
    # An option that one run leaves off is never usual.
    paco = {"c": "paco", "d": "paco (alpha 0.05, randaugment)"}
    assert labels == {"a": "sbcl (code)", "b": "sbcl (paper)", **paco}


def test_a_setting_tried_at_one_ratio_is_not_usual_however_often(tmp_path):
    for ratio in ("99-1", "50-50"):
        make_run(tmp_path, "supcon", 0, ratio, warmup_epochs=10)
    for seed in range(4):
        make_run(tmp_path, "supcon", seed, folder=f"short{seed}", warmup_epochs=2)
    groups = tables.group_by_seed(collect(tmp_path))
    changed = "supcon (warmup epochs 2)"
    assert [(g.ratio, g.label, g.n) for g in groups] == [
        ("99-1", "supcon", 1),
        ("99-1", changed, 4),
        ("50-50", "supcon", 1),
    ]


def test_untrained_networks_have_one_label_and_raw_pixels_another(tmp_path):
    make_run(tmp_path, "supcon", 0, probe=0.7, cac=[50, 60], lr=0.1)
    make_run(tmp_path, "ntxent", 0, folder="a", probe=0.5, lr=0.0, warmup_epochs=10)
    make_run(tmp_path, "suppro", 1, folder="b", probe=0.6, lr=0.0, warmup_epochs=2, margin=1.0)
    make_run(tmp_path, "supmin", 1, folder="c", probe=0.6, lr=0.0)
    make_run(tmp_path, "supcon", 0, folder="d", probe=0.8, lr=0.0, epochs=1)
    path = make_run(tmp_path, "pixels", 0, folder="e", probe=0.55, encoder=False)
    config = json.loads((path / "config.json").read_text())
    for key in ("arch", "epochs", "batch_size", "projection_dim"):
        del config[key]
    write(path / "config.json", config)
    (path / "log.jsonl").unlink()
    found = groups_of(tmp_path)
    means = {name: (g.n, g.cells["balanced_accuracy"].mean) for name, g in found.items()}
    assert means == {
        "raw pixels": (1, pytest.approx(55)),
        "untrained": (2, pytest.approx(55)),
        "untrained (epochs 1)": (1, pytest.approx(80)),
        "supcon": (1, pytest.approx(70)),
    }
    assert tables.excluded_runs(collect(tmp_path))[0].startswith("c: repeats b")
    # Their loss is that of a method, which does not matter.
    assert found["untrained"].cells["final_loss"] == NOT_APPLICABLE
    assert found["raw pixels"].cells["saa_minority"] == NOT_APPLICABLE
    points = figures.cac_points(found.values())
    assert [group.name for group, *_ in points] == ["supcon"]
    text = markdown(tmp_path)
    assert "* untrained: arch resnet18, batch size 256, feature map 1," in text
    assert f"python linear_probe.py runs/{path.name}" in text
    assert_archive_holds(tmp_path)


def test_stem_recipe_relu_and_init_are_labels_where_they_differ(tmp_path):
    new = {"stem": "cifar", "feature_map": 4, "recipe": "natural"}
    for seed in (0, 1):
        make_run(tmp_path, "supmin", seed, **new)
        init = {"init": f"runs/ntxent/seed{seed}", "init_sha256": f"weights {seed}"}
        make_run(tmp_path, "supmin", seed, folder=f"init/{seed}", **new, **init)
        make_run(tmp_path, "supmin", seed, folder=f"relu/{seed}", **new, relu=True)
    make_run(tmp_path, "supmin", 0, folder="recipe", **{**new, "recipe": "medical"})
    # The log of a run from before there was --stem.
    write(tmp_path / "99-1.json", {"counts": {}, "recipe": "medical"})
    make_run(tmp_path, "supmin", 0, folder="old", subset="../99-1.json")
    assert {name: group.n for name, group in groups_of(tmp_path).items()} == {
        "supmin": 2,
        "supmin (init runs/ntxent/seed<k>)": 2,
        "supmin (relu)": 2,
        "supmin (recipe medical)": 1,
        "supmin (feature map 1, recipe medical, stem imagenet)": 1,
    }
    (line,) = (line for line in markdown(tmp_path).splitlines() if line.startswith("* supmin: "))
    assert "feature map 4, recipe natural, stem cifar" in line


def test_rows_that_are_drawn_with_the_seed_of_the_run_are_averaged(tmp_path):
    for seed in (0, 1):
        subset = {"counts": {"train": {"0": 99, "1": 1}}, "seed": seed}
        (tmp_path / f"subset{seed}").mkdir()
        write(tmp_path / f"subset{seed}/99-1.json", subset)
        place = {"subset": f"../subset{seed}/99-1.json", "rows_sha256": f"draw {seed}"}
        make_run(tmp_path, "supmin", seed, folder=f"run{seed}", **place)
    assert {name: group.n for name, group in groups_of(tmp_path).items()} == {"supmin": 2}
    assert "rows drawn per seed" in markdown(tmp_path)
    assert_archive_holds(tmp_path)
    # Not if the seed of one subset is another.
    write(tmp_path / "subset1/99-1.json", {**subset, "seed": 5})
    assert {group.n for group in groups_of(tmp_path).values()} == {1}


def test_each_set_of_training_rows_has_its_columns(tmp_path):
    options = {"test_one_percent": scores(0.6), "test_subsampled": scores(0.5)}
    make_run(tmp_path, "supmin", probe=0.8, balanced_train=0.9, probe_options=options)
    make_run(tmp_path, "supcon", probe=0.7)
    make_run(tmp_path, "supmin", ratio="50-50", probe=0.95)
    lines = [line for line in markdown(tmp_path).splitlines() if line.startswith("| ")]
    names = ("50-50 rows (%)", "subsampled rows (%)", "one-percent rows (%)")
    columns = [f"{score}, {name}" for name in names for score in ("balanced accuracy", "AUROC")]
    header = ["accuracy (%)", "balanced accuracy (%)", "AUROC (%)", *columns, "SAA minority (%)"]
    assert " | ".join(header) in lines[0]
    measured = [f"{value}.0" for value in (81, 80, 82, 90, 92, 50, 52, 60, 62)]
    assert " | ".join(measured) in lines[3]
    # This run has no 50-50 subset; the other rows can still be probed.
    assert "71.0 | 70.0 | 72.0 | - | - | not run" in lines[2]
    # The table of 50-50 has the columns of own rows alone.
    assert "AUROC (%) | SAA minority (%)" in lines[4]


def test_with_and_without_augmentation_are_two_rows(tmp_path):
    for augment, value in ((True, 0.7), (False, 0.6)):
        for seed in (0, 1):
            options = {"finetune": value, "augment": augment, "fraction": 1.0}
            make_run(tmp_path, "weighted_ce", seed, folder=f"{augment}{seed}", **options)
    make_run(tmp_path, "ldam_drw", finetune=0.8, augment=True, head="cosine")
    found = groups_of(tmp_path).values()
    means = {g.name: (g.n, round(g.cells["balanced_accuracy"].mean)) for g in found}
    assert means == {
        "weighted_ce from scratch": (2, 70),
        "weighted_ce (no augment) from scratch": (2, 60),
        "ldam_drw from scratch": (1, 80),
    }


def make_retrained(runs, method, encoder, seed, value, **config):
    folder = f"{encoder}/seed{seed}/{method}{len(config)}"
    config = {"epochs": {"crt": 10, "lws": 5}[method], "encoder_lr": 0.1, **config}
    config |= {"encoder_method": encoder, "encoder_seed": seed, "balanced_batches": True}
    make_run(runs, method, seed, folder=folder, encoder=False, finetune=value, **config)


def test_retrained_classifiers_are_named_by_their_encoder(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "ce", seed, folder=f"ce/seed{seed}", finetune=0.55)
        make_retrained(tmp_path, "crt", "ce", seed, 0.7 + seed / 10)
        make_retrained(tmp_path, "crt", "supcon", seed, 0.6)
    make_retrained(tmp_path, "crt", "supcon", 0, 0.2, encoder_lr=0.5, encoder_margin=1.0)
    make_retrained(tmp_path, "lws", "supcon", 0, 0.65)
    make_retrained(tmp_path, "lws", "ce", 1, None)
    found = groups_of(tmp_path)
    retrained = [group for group in found.values() if group.scored_by == "re-trained"]
    assert {g.name: (g.n, g.cells["balanced_accuracy"].mean) for g in retrained} == {
        "crt": (2, pytest.approx(75)),
        "crt (encoder supcon)": (2, pytest.approx(60)),
        "lws (encoder supcon)": (1, pytest.approx(65)),
        "crt (encoder supcon, encoder lr 0.5, encoder margin 1)": (1, pytest.approx(20)),
    }
    names = ("final_loss", "saa_minority", "below_collapse", "balanced_train_accuracy")
    assert {found["crt"].cells[name] for name in names} == {NOT_APPLICABLE}
    rows = collect(tmp_path)
    assert tables.excluded_runs(rows)[0] == "not finished (1): ce/seed1/lws0"
    # They have no encoder of their own.
    assert [g.name for g in tables.encoder_groups(found.values())] == ["ce from scratch"]


def test_the_collapse_gap_is_read_from_the_log(tmp_path):
    make_run(tmp_path, "tsc", gap=None, variant="ttc")
    make_run(tmp_path, "kcl", gap=0.25)
    found = groups_of(tmp_path)
    assert found["tsc"].cells["below_collapse"] == NOT_APPLICABLE
    assert found["kcl"].cells["below_collapse"].mean == 0.25


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"epochs": 31},
        {"arch": "resnet50"},
        {"rows_sha256": "redrawn"},
        {"margin": 0.0},
    ],
)
def test_runs_with_other_settings_are_never_averaged(tmp_path, other):
    make_run(tmp_path, "suppro", 0, folder="a", probe=0.6, margin=1.0)
    make_run(tmp_path, "suppro", 1, folder="b", probe=0.9, **{"margin": 1.0, **other})
    means = [g.cells["balanced_accuracy"].mean for g in groups_of(tmp_path).values()]
    assert sorted(means) == pytest.approx([60, 90])


def test_other_ways_of_measuring_are_never_averaged(tmp_path):
    make_run(tmp_path, seed=0, probe=0.6, finetune=0.8, saa=[1, 1])
    reference = {"protocol": "reference"}
    make_run(tmp_path, seed=1, probe=0.7, probe_options=reference)
    path = make_run(tmp_path, seed=2, probe=0.9, saa=[1, 1])
    metrics = json.loads((path / "metrics.json").read_text())
    write(path / "metrics.json", {**metrics, "neighborhood": 5})
    found = {g.scored_by: g for g in groups_of(tmp_path).values()}
    assert {way: g.cells["balanced_accuracy"].mean for way, g in found.items()} == pytest.approx(
        {
            "linear probe": 60,
            "fine-tuned, weighted_ce, all": 80,
            "linear probe, reference protocol, 100 epochs": 70,
            "linear probe, CAC neighborhood 5": 90,
        }
    )
    # metrics.json is about the encoder before fine-tuning.
    cells = found["fine-tuned, weighted_ce, all"].cells
    assert cells["saa_minority"] == NOT_APPLICABLE
    tuned = {"loss": "ce", "train": "head", "augment": True, "head": "mlp"}
    write(path / "finetune.json", {**tuned, "test": scores(0.5)})
    found = {g.scored_by for g in groups_of(tmp_path).values()}
    assert "fine-tuned, ce, head, head mlp, CAC neighborhood 5" in found
    # What --smoke measured on a real run does not count, and is named.
    write(path / "finetune.json", {**tuned, "test": scores(0.5), "smoke": True})
    found = {g.scored_by for g in groups_of(tmp_path).values()}
    assert not any("head mlp" in name for name in found)
    assert tables.excluded_runs(collect(tmp_path))[0].endswith(
        "left out (1): digits/99-1/supcon/seed2"
    )


def test_every_probe_of_a_run_has_a_row(tmp_path):
    default = {"class_weights": "balanced", "standardize": True}
    sgd = {"protocol": "reference", "optimizer": "sgd", "epochs": 50, "standardize": False}
    names = {
        "linear probe": default,
        "linear probe, unweighted": {"class_weights": "none"},
        "linear probe, not standardised": {"standardize": False},
        "linear probe, centroid protocol": {"protocol": "centroid", "standardize": False},
        "linear probe, reference protocol, 50 epochs, sgd": sgd,
    }
    for seed, options in enumerate(names.values()):
        path = make_run(tmp_path, seed=seed, probe=0.5 + seed / 10, probe_options=options)
    # linear_probe.py has moved these aside: one of the same encoder, one of another.
    probe = json.loads((path / "probe.json").read_text())
    write(path / "probe_cached.json", {**probe, **default, "protocol": "cached"})
    centroid = {**probe, "protocol": "centroid", "encoder_sha256": "another"}
    write(path / "probe_centroid.json", centroid)
    found = {g.scored_by: g for g in groups_of(tmp_path).values()}
    assert {name: g.cells["balanced_accuracy"].values for name, g in found.items()} == {
        name: pytest.approx([50, 90] if name == "linear probe" else [50 + 10 * seed])
        for seed, name in enumerate(names)
    }
    rows = {row["seed"]: row for row in collect(tmp_path)}
    assert "probe_test_auroc" not in rows[3] and rows[3]["probe_centroid_protocol_test_auroc"]
    # Figures show one probe of an encoder.
    groups = tables.group_by_seed(rows.values())
    assert [g.scored_by for g in tables.first_probes(groups)] == ["linear probe"]
    assert_archive_holds(tmp_path)


def test_unfinished_repeated_and_smoke_runs_are_listed(tmp_path, capsys, monkeypatch, no_figures):
    make_run(tmp_path, seed=0, probe=0.6)
    make_run(tmp_path, seed=0, folder="copy", probe=0.6)
    make_run(tmp_path, seed=1, encoder=False)
    make_run(tmp_path, "supmin", smoke=True, probe=0.6)
    states = {row["path"]: row["state"] for row in collect(tmp_path) if row["method"] == "supcon"}
    assert states == {
        "copy": "finished",
        "digits/99-1/supcon/seed0": "repeats copy",
        "digits/99-1/supcon/seed1": "not finished",
    }
    assert groups_of(tmp_path)["supcon"].n == 1
    call(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    for note in (
        "not finished (1): digits/99-1/supcon/seed1",
        "digits/99-1/supcon/seed0: repeats copy",
        "made with --smoke, left out (1): digits/99-1/supmin/seed0",
    ):
        assert note in printed
        assert f"* {note}" in (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "| supmin" not in printed
    assert printed.splitlines()[-1] == f"next: python report.py {tmp_path} --html"


def test_unfinished_runs_alone_make_a_report(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, encoder=False)
    call(monkeypatch, tmp_path)
    assert "not finished (1)" in capsys.readouterr().out
    assert not list((tmp_path / "report").glob("*.png"))


def test_a_finetuning_with_its_own_folder_is_named(tmp_path):
    make_run(tmp_path, probe=0.6)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write(folder / "config.json", {"loss": "ce"})
    write(folder / "finetune.json", {})
    assert tables.unlinked_finetunings(tmp_path) == [
        "fine-tuned with --out, not in the tables: elsewhere"
    ]


def test_tables_have_a_fixed_order_whatever_the_folders_are_called(tmp_path):
    runs = [
        ("digits", "99-1", "other"),
        ("digits", "95-5", "supmin"),
        ("digits", "50-50", "supcon"),
        ("digits", "50-50", "focal"),
        ("digits", "natural", "suppro"),
        ("inat21-plants", "99-1", "ntxent"),
        ("zebra", "50-50", "ce"),
    ]
    summaries = []
    for name, order in (("a", range(7)), ("b", (6, 4, 3, 2, 5, 1, 0))):
        for place, i in enumerate(order):
            dataset, ratio, method = runs[i]
            options = {"folder": f"{place}/run", "probe": i / 7, "saa": [i, 2 * i]}
            make_run(tmp_path / name, method, dataset=dataset, ratio=ratio, **options)
        rows = collect(tmp_path / name)
        assert [(row["dataset"], row["ratio"], row["method"]) for row in rows] == runs
        summaries.append(tables.summary_table(tables.group_by_seed(rows)))
    assert summaries[0] == summaries[1]


def test_csv_files_hold_every_seed_and_every_summary(tmp_path, monkeypatch, no_figures):
    for seed in range(2):
        options = {"probe": 0.6 + seed / 10, "saa": [10, 20], "balanced_train": 0.9, "lr": 0.05}
        make_run(tmp_path, "supmin", seed, **options)
    make_run(tmp_path, "focal", 0, finetune=0.7)
    out = tmp_path / "evidence"
    call(monkeypatch, tmp_path, "--out", out)
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("supmin", "0"),
        ("supmin", "1"),
        ("focal", "0"),
    ]
    assert rows[0]["path"] == "digits/99-1/supmin/seed0" and rows[0]["device"] == "a device"
    assert rows[0]["commit"] == "abc1234" and "--seed 0" in rows[0]["command"]
    numbers = {
        "lr": 0.05,
        "probe_test_auroc": 0.62,
        "probe_test_balanced_train_accuracy": 0.91,
        "saa_minority": 20,
        "saa_majority": 10,
        "test_images": 100,
    }
    assert {key: float(rows[0][key]) for key in numbers} == pytest.approx(numbers)
    assert rows[2]["probe_test_accuracy"] == ""
    assert float(rows[2]["finetune_test_accuracy"]) == pytest.approx(0.71)
    with open(out / "summary.csv", newline="", encoding="utf-8") as file:
        summary = {row["label"]: row for row in csv.DictReader(file)}
    assert summary["supmin"]["n"] == "2" and summary["supmin"]["seeds"] == "0 1"
    name = "balanced_accuracy_percent"
    assert float(summary["supmin"][f"{name}_mean"]) == pytest.approx(65)
    assert float(summary["supmin"][f"{name}_std"]) == pytest.approx(math.sqrt(50))
    assert summary["focal"]["saa_minority_mean"] == "not run"
    assert summary["focal"]["scored_by"] == "from scratch"


def test_provenance_stands_below_each_table(tmp_path):
    for method, options in (("supcon", {}), ("suppro", {"margin": 0.5})):
        for seed in range(2):
            make_run(tmp_path, method, seed, probe=0.6, saa=[1, 1], **options)
    lines = markdown(tmp_path).splitlines()
    assert "* test images 100, rare ones 10; device a device; torch 2.11; commit abc1234" in lines
    (settings,) = (line for line in lines if line.startswith("* contrastive: "))
    assert "arch resnet18, batch size 256, epochs 30" in settings
    assert "* suppro: margin 0.5" in lines
    for method in ("supcon", "suppro"):
        command = f"python pretrain.py subsets/digits/99-1.json --method {method} --seed"
        assert f"{command} 0" in lines and f"{command} 1" not in lines
    assert lines.count("python linear_probe.py RUN") == 1


def test_the_terminal_table_is_aligned_markdown(tmp_path):
    make_run(tmp_path, "supmin", 0, probe=0.97, saa=[99, 100])
    make_run(tmp_path, "supmin", 1, probe=0.97, saa=[99, 90])
    make_run(tmp_path, "supcon", 0, minority_per_batch=4)
    title, _, *rows, _ = tables.terminal_tables(tables.group_by_seed(collect(tmp_path))).split("\n")
    assert title == "digits, 99-1 (%, loss in nats)"
    assert len({len(row) for row in rows}) == 1 and all(row[0] == row[-1] == "|" for row in rows)
    assert "97.0 ± 0.0" in rows[-1] and "not run" in rows[-2]


def test_the_natural_ratio_is_placed_by_its_counts(tmp_path):
    path = make_run(tmp_path, ratio="natural", probe=0.6, minority=0, subset="../subset.json")
    (row,) = collect(tmp_path)
    assert row["minority_percent"] is None and row["test_images"] is None
    assert "digits natural" in tables.excluded_runs([row])[0]
    counts = {"train": {"0": 30, "1": 90}, "test": {"0": 5, "1": 15}}
    write(path.parent / "subset.json", {"counts": counts})
    (row,) = collect(tmp_path)
    assert row["minority_percent"] == 25 and row["test_images"] == 20


@pytest.mark.parametrize("name", ["config.json", "probe.json", "embedding.npz"])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, name):
    make_run(tmp_path, seed=0, probe=0.6, saa=[1, 1])
    path = make_run(tmp_path, "supmin", saa=[1, 1]) / name
    path.write_text("{")
    with pytest.raises(UserError, match="delete it") as error:
        call(monkeypatch, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_results_of_another_encoder_are_refused(tmp_path):
    path = make_run(tmp_path, probe=0.6, saa=[1, 1])
    for name, digest in (("probe.json", "a"), ("metrics.json", "b")):
        write(path / name, {**json.loads((path / name).read_text()), "encoder_sha256": digest})
    with pytest.raises(UserError, match="metrics.json and probe.json belong to different encoders"):
        collect(tmp_path)


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "nothing")
    write(tmp_path / "config.json", {"something": "else"})
    with pytest.raises(UserError, match="holds no run"):
        collect(tmp_path)


def test_as_a_user_calls_it(tmp_path):
    make_run(tmp_path / "runs", probe=0.6)
    one_line(run_script("report.py", "nowhere", cwd=tmp_path, code=2), "nowhere: no such folder")
    done = run_script("report.py", "runs", "--out", "results", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "next: python report.py runs --html --out results"
    assert (tmp_path / "results/report.md").exists() and not (tmp_path / "runs/report").exists()
