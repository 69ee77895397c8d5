"""report.py --html: one file that opens from disk, shows its pictures, and escapes every name."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve
from test_report import call, make_run

import report
from reporting import charts, html_report
from reporting.collect import collect
from reporting.html_images import MAX_THUMBNAILS
from utils.scores import write_predictions

HOSTILE = '"><script>alert(1)</script>&'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make_full_run(root, n=40, method="supmin", seed=0, names=("a", "b"), **options):
    """Write a run with everything the page shows; half of its n test images are minority."""
    rng = np.random.default_rng(seed)
    data = root / "subset"
    data.mkdir(parents=True, exist_ok=True)
    labels = np.arange(n) % 2
    np.save(data / "images.npy", rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
    lines = ["row,split,label,class,width,height,source"]
    lines += [
        f'{i},test,{c},x,40,20,"{HOSTILE.replace(chr(34), "")}{i}.png"'
        for i, c in enumerate(labels)
    ]
    (data / "index.csv").write_text("\n".join(lines) + "\n")
    counts = {"train": {"0": 90, "1": 9}, "test": {"0": n // 2, "1": n // 2}}
    record = {"counts": counts, "splits": {"test": list(range(n))}, "seed": 0}
    (data / "99-1.json").write_text(json.dumps(record))
    Image.new("RGB", (300, 200), "red").save(data / "99-1.png")
    options = {"probe": 0.7, "saa": [10, 20], "cac": [60, 70], "classes": list(names), **options}
    folder = f"runs/{method}/seed{seed}"
    path = make_run(
        root, method, seed, folder=folder, subset="../../../subset/99-1.json", **options
    )
    xy = rng.normal(size=(n, 2)).astype(np.float32)
    arrays = {"xy": xy, "labels": labels, "minority": 1, "map": "PCA", "limit": 4.0}
    np.savez(path / "embedding.npz", **arrays, images=np.arange(n))
    p = np.clip(0.3 * labels + rng.uniform(0, 0.7, n), 0, 1)
    files = [f"{i}.png" for i in range(n)]
    rows, p = {"test": np.arange(n)}, {"test": np.stack([1 - p, p], 1)}
    write_predictions(path / "predictions.csv", files, labels, rows, p, 1, names)
    Image.new("RGB", (400, 100), "blue").save(path / "hard_examples.png")
    return path


def page_of(monkeypatch, runs, has_figures=False):
    """Return the page of report.py --html; figures of the report are slow to draw."""
    if not has_figures:
        monkeypatch.setattr(report, "plan_figures", lambda groups, source: {})
    call(monkeypatch, runs, "--html")
    return (runs / "report/report.html").read_text(encoding="utf-8")


def test_one_file_shows_everything_of_a_run(tmp_path, monkeypatch, capsys):
    path = make_full_run(tmp_path)
    page = page_of(monkeypatch, path)
    for title in ("Loss", "ROC", "Precision and recall", "Reliability", "Hard examples"):
        assert f"<h3>{title}</h3>" in page
    # The counts of the minority stand first; scores are in percent.
    assert re.search(r"<td>train</td><td>9</td><td>90</td>", page)
    assert "<td>AUROC</td><td>72.0 %</td><td>not kept</td>" in page
    assert page.count("<circle") == 40 and page.count("data-i=") == 40
    assert f"linear_probe.py {path} --predict FOLDER" in page
    assert "python pretrain.py subsets/digits/99-1.json" in page
    assert len(re.findall(r'<img[^>]*src="data:image', page)) == 3
    printed = capsys.readouterr().out.splitlines()
    assert "report.html" in printed[-2]
    assert printed[-1] == f"next: open {path / 'report/report.html'} in a browser"


def test_scores_stand_with_their_interval_and_threshold(tmp_path, monkeypatch):
    kept = {
        "test": {"auroc": 0.81, "brier": 0.2, "sensitivity_at_threshold": 0.7},
        "val": {"auroc": 0.9, "brier": 0.1, "sensitivity_at_threshold": 0.75},
        "test_interval": {"auroc": [0.71, 0.9], "sensitivity_at_threshold": [0.5, 0.85]},
        "threshold": 0.25,
        "threshold_rule": "youden",
    }
    path = make_full_run(tmp_path, probe_options=kept)
    page = page_of(monkeypatch, path)
    assert "<td>AUROC</td><td>81.0 %</td><td>71.0 % to 90.0 %</td><td>90.0 %</td>" in page
    assert "<td>50.0 % to 85.0 %</td><td>75.0 %</td>" in page
    assert "<td>0.200</td><td>not kept</td><td>0.100</td>" in page
    assert "Threshold 0.250, chosen on validation (youden)." in page


def test_a_fine_tuned_contrastive_run_has_its_charts(tmp_path, monkeypatch):
    path = make_full_run(tmp_path, probe=None, finetune=0.7)
    (path / "finetune").mkdir()
    (path / "predictions.csv").rename(path / "finetune/predictions.csv")
    page = page_of(monkeypatch, path)
    assert "<h3>ROC</h3>" in page and "need predictions.csv" not in page


def test_names_of_classes_and_files_are_escaped(tmp_path, monkeypatch):
    path = make_full_run(tmp_path, names=(HOSTILE, "it's <b>"))
    page = page_of(monkeypatch, path)
    assert "<script>alert" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;0.png" in page
    assert page.count("<script>") == 1


def test_nothing_is_loaded_from_outside(tmp_path, monkeypatch):
    make_full_run(tmp_path)
    make_full_run(tmp_path, method="supcon")
    for runs in (tmp_path / "runs", tmp_path / "runs/supmin/seed0"):
        page = page_of(monkeypatch, runs, has_figures=runs.name == "runs")
        # base64 may hold any letters
        assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", page))
        links = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert links and all(link.startswith(("data:image/", "#")) for link in links)
        assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_many_images_of_noise_stay_below_5_mb(tmp_path, monkeypatch):
    path = make_full_run(tmp_path, n=3000)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise[:800, :1000]).save(path / "hard_examples.png")
    page = page_of(monkeypatch, path)
    assert page.count("data-i=") == MAX_THUMBNAILS and page.count("<circle") == 3000
    assert len(page.encode()) < 5_000_000


def test_without_the_images_the_page_says_so(tmp_path, monkeypatch):
    path = make_full_run(tmp_path)
    (tmp_path / "subset/images.npy").unlink()
    page = page_of(monkeypatch, path)
    assert "No thumbnails: images.npy of the subset is not there" in page
    assert page.count("<circle") == 40 and "data-i=" not in page
    subset = tmp_path / "subset/99-1.json"
    record = json.loads(subset.read_text())
    np.save(tmp_path / "subset/images.npy", np.zeros((40, 32, 32, 1), np.uint8))
    subset.write_text(json.dumps({**record, "splits": {"test": list(range(39, -1, -1))}}))
    assert "No thumbnails: the subset has changed since the run" in page_of(monkeypatch, path)
    shutil.rmtree(tmp_path / "subset")
    (path / "predictions.csv").unlink()
    page = page_of(monkeypatch, path)
    assert "The subset is not beside the runs" in page and "<h3>ROC</h3>" not in page
    assert "need predictions.csv: not kept" in page


def test_a_grid_has_tables_figures_and_a_section_per_group(tmp_path, monkeypatch):
    for method in ("supcon", "supmin"):
        for seed in (0, 1):
            make_full_run(tmp_path, method=method, seed=seed)
    page = page_of(monkeypatch, tmp_path / "runs", has_figures=True)
    assert "<h1>4 runs</h1>" in page and page.count("<details>") == 3
    assert "<td>Supervised Minority</td><td>linear probe</td><td>2</td>" in page
    assert "<h3>Balanced accuracy</h3>" in page and "<h3>Overview of digits</h3>" in page
    monkeypatch.setattr(html_report, "CHART_BUDGET", 0)
    page = page_of(monkeypatch, tmp_path / "runs")
    folder = tmp_path / "runs/supcon/seed0"
    assert f"curves are left out here: python report.py {folder} --html" in page
    assert "<h3>ROC</h3>" not in page


def test_an_archive_makes_a_page_without_what_it_does_not_hold(tmp_path, monkeypatch):
    make_full_run(tmp_path)
    call(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
    call(monkeypatch, tmp_path / "out/runs.jsonl", "--html")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "need predictions.csv: not kept" in page and "<h3>Loss</h3>" in page


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"probe": None, "saa": None, "cac": None}, "python linear_probe.py {path}"),
        ({"saa": None, "cac": None}, "python evaluate_metrics.py {path}"),
        ({}, "python linear_probe.py {path} --predict FOLDER --csv predictions.csv"),
        (
            {"encoder": False},
            "python pretrain.py subsets/digits/99-1.json --method supmin --seed 0",
        ),
    ],
)
def test_the_page_names_the_next_command(tmp_path, options, command):
    path = make_full_run(tmp_path, **options)
    (row,) = collect(path)
    assert html_report.next_command(row, path) == command.format(path=path)


def test_smoke_runs_carry_a_warning(tmp_path, monkeypatch):
    path = make_full_run(tmp_path, smoke=True)
    assert "made with --smoke: the numbers mean nothing" in page_of(monkeypatch, path)


def test_curves_equal_scikit_learn():
    rng = np.random.default_rng(0)
    is_minority = rng.random(300) < 0.2
    p = np.round(np.clip(0.4 * is_minority + rng.uniform(0, 0.6, 300), 0, 1), 2)
    observed = charts.observed_draw(p, is_minority)
    x, y, _ = roc_curve(is_minority, p, drop_intermediate=False)
    assert np.allclose(np.c_[charts.roc_points(observed, 0)], np.c_[x, y])
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(is_minority, p))
    precision, recall, _ = precision_recall_curve(is_minority, p)
    drawn = charts.precision_on_grid(observed)[0]
    for place in (0.25, 0.5, 1.0):
        # the highest threshold that reaches this recall
        expected = precision[np.flatnonzero(recall >= place - 1e-12)[-1]]
        assert drawn[round(100 * place)] == pytest.approx(expected)


def test_reliability_intervals_equal_scipy():
    low, high = charts.wilson_interval(np.array([0.0, 0.3, 1.0]), np.array([10, 10, 10]))
    for k, bounds in zip((0, 3, 10), zip(low, high, strict=True), strict=True):
        expected = binomtest(k, 10).proportion_ci(method="wilson")
        assert bounds == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium runs this test")
@pytest.mark.parametrize(("theme", "dark"), [("dark", 0), ("light", 1)])
def test_chromium_loads_every_picture(tmp_path, monkeypatch, theme, dark):
    path = make_full_run(tmp_path, names=(HOSTILE, "b"))
    page = page_of(monkeypatch, path)
    count = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        images: [...document.images].map((image) => image.naturalWidth),
        charts: [...document.querySelectorAll("figure svg")].map((svg) => svg.clientWidth),
        wide: document.documentElement.scrollWidth }) })</script>"""
    (tmp_path / "page.html").write_text(page + count, encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--window-size=1400,2400", f"--blink-settings=preferredColorScheme={dark}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert len(found["images"]) == 3 and min(found["images"]) > 0
    assert len(found["charts"]) == 4 and min(found["charts"]) > 200
    # no scroll bar below the page
    assert found["wide"] <= 1400
    command[command.index("--dump-dom")] = f"--screenshot={shot}"
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2400, 1400) and pixels.std() > 5
    assert (np.median(pixels) < 60) == (theme == "dark")
