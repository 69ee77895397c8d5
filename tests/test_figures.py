"""Figures: one look for each method, readable in grey and on both backgrounds."""

import numpy as np
import pytest
from matplotlib.image import imread
from sklearn.linear_model import LinearRegression
from test_report import call, make_run, no_figures  # noqa: F401 (a fixture)

import finetune
import pretrain
from reporting import figures, maps, tables
from reporting.collect import collect
from reporting.styles import METHOD_STYLES, leading_methods

PAPER, DARK = "#FFFFFF", "#15181D"


def luminance(colour):
    """Relative luminance of a hex colour (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_method_has_a_look_of_its_own():
    assert {*pretrain.METHODS, *finetune.LOSSES, *finetune.RETRAIN} <= METHOD_STYLES.keys()
    styles = METHOD_STYLES.values()
    assert len({style.name for style in styles}) == len(METHOD_STYLES)
    assert len({style.marker for style in styles}) == len(METHOD_STYLES)
    # What was not trained shares one grey.
    assert len({style.colour for style in styles}) == len(METHOD_STYLES) - 1


def test_colours_stand_out_on_both_backgrounds():
    for name, style in METHOD_STYLES.items():
        assert min(contrast(style.colour, back) for back in (PAPER, DARK)) >= 2.8, name


def test_line_fit_against_scikit_learn():
    rng = np.random.default_rng(1)
    x = rng.uniform(50, 90, 25)
    y = 0.7 * x + rng.normal(0, 5, 25)
    model = LinearRegression().fit(x[:, None], y)
    expected = model.coef_[0], model.intercept_, model.score(x[:, None], y)
    assert figures.fit_line(x, y) == pytest.approx(expected)
    assert figures.fit_line(x, y)[2] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_no_regression_line_through_fewer_than_10_runs(tmp_path):
    points = [(60 + 3 * i, 0.6 + 0.02 * i + 0.03 * (i % 3)) for i in range(10)]
    for seed, (cac, probe) in enumerate(points):
        make_run(tmp_path, seed=seed, cac=[cac - 5, cac + 5], probe=probe)
        if seed >= 8:
            groups = tables.group_by_seed(collect(tmp_path))
            (ax,) = figures.cac_accuracy_figure(groups).axes
            n = seed + 1
            r2 = np.corrcoef(*np.array(points).T)[0, 1] ** 2
            text = "no line, fewer than 10" if n < 10 else f"R² = {r2:.2f}"
            assert ax.get_title() == f"digits, n = {n} runs: {text}"
            # A dot per run, chance on both axes, and the line.
            assert len(ax.get_lines()) == n + 2 + (n >= 10)


def test_figures_are_drawn_and_not_blank(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for ratio, method, seed in [
        (ratio, method, seed)
        for ratio in ("99-1", "50-50")
        for method in ("supcon", "supmin")
        for seed in range(2)
    ]:
        saa, cac = list(rng.uniform(0, 50, 2)), list(rng.uniform(50, 90, 2))
        options = {"saa": saa, "cac": cac, "embedding": seed == 1, "probe": rng.uniform(0.5, 0.9)}
        make_run(tmp_path, method, seed, ratio, **options)
    make_run(tmp_path, "ce", 0, finetune=0.7)
    call(monkeypatch, tmp_path)
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for name in ("overview_digits", "accuracy", "saa_cac", "cac_accuracy", "embeddings_digits"):
        pixels = imread(tmp_path / "report" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05, name
        assert f"({name}.png)" in text and f"{name}.png" in printed
    assert not [path for path in (tmp_path / "report").iterdir() if path.name.startswith(".")]


def test_figures_without_data_are_named(tmp_path, monkeypatch, capsys, no_figures):  # noqa: F811
    make_run(tmp_path, probe=0.6)
    call(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"overview_digits.png", "accuracy.png"}
    for name in ("saa_cac.png", "cac_accuracy.png", "embeddings_digits.png"):
        assert f"{name}: not drawn" in printed


def grouped(runs):
    return tables.group_by_seed(collect(runs))


def test_lines_hold_the_means_and_every_seed(tmp_path):
    for ratio, values in (("99-1", (0.5, 0.6)), ("50-50", (0.9, 0.7))):
        for seed, value in enumerate(values):
            make_run(tmp_path, "supmin", seed, ratio, probe=value)
    make_run(tmp_path, "supmin", 0, minority_per_batch=4, folder="variant", probe=0.8)
    rows, panel = figures.accuracy_figure(grouped(tmp_path)).axes
    lines = [line.get_ydata() for line in panel.get_lines()]
    for expected in ([55, 80], [50, 60], [90, 70]):
        assert any(len(y) == 2 and np.allclose(y, expected) for y in lines)
    assert panel.containers[0].lines[0].get_xdata() == pytest.approx([1, 50])
    assert [text.get_text() for text in panel.texts] == ["Supervised Minority"]
    # A variant is a row with its name.
    names = [label.get_text() for label in rows.get_yticklabels()]
    assert names == [
        "Supervised Minority, n 2",
        "Supervised Minority (minority per batch 4), n 1",
    ]


def test_scores_have_a_chance_line_and_an_axis_that_starts_below_it(tmp_path):
    make_run(tmp_path, "supmin", 0, probe=0.97)
    make_run(tmp_path, "supcon", 0, probe=0.98)
    (ax,) = figures.accuracy_figure(grouped(tmp_path)).axes
    assert ax.get_xlim() == (45, 101)
    assert [50, 50] in [list(line.get_xdata()) for line in ax.get_lines()]
    assert "100 test images" not in ax.get_title()
    make_run(tmp_path, "ntxent", 0, probe=0.2, saa=[1, 1])
    (ax,) = figures.accuracy_figure(grouped(tmp_path)).axes
    assert ax.get_xlim()[0] == pytest.approx(18)
    assert ax.get_title() == "digits 99-1, 100 test images"


def test_a_few_methods_are_in_colour_and_what_was_not_trained_is_not(tmp_path):
    names = ("bcl", "paco", "suppro", "kcl", "supcon", "tsc", "ntxent")
    for method in names:
        make_run(tmp_path, method, probe=0.6)
    make_run(tmp_path, "supmin", folder="floor", lr=0.0, probe=0.6)
    assert leading_methods(grouped(tmp_path)) == ["supcon", "suppro", "ntxent", "kcl", "tsc"]


def test_names_at_line_ends_do_not_overprint():
    values = np.array([94.0, 80.0, 94.5, 93.9])
    moved = figures.move_apart(values, 3)
    assert np.diff(np.sort(moved)).min() >= 3 - 1e-9 and moved.mean() == pytest.approx(90.6)
    assert list(np.argsort(moved)) == list(np.argsort(values))


def test_the_overview_takes_the_ratio_with_most_methods(tmp_path):
    make_run(tmp_path, "supcon", ratio="99.9-0.1", probe=0.5)
    for method in ("supmin", "supcon"):
        make_run(tmp_path, method, probe=0.6, saa=[1, 1])
        make_run(tmp_path, method, ratio="50-50", probe=0.9)
    groups = figures.widest_ratio(grouped(tmp_path))
    assert [(g.ratio, g.label) for g in groups] == [("99-1", "supcon"), ("99-1", "supmin")]
    title = "digits 99-1: 1 % of the training images are minority, 100 test images"
    assert figures.overview_title(groups) == title


def test_pca_maps_share_one_scale(tmp_path):
    for seed, (method, limit) in enumerate((("supcon", 1.05), ("supmin", 1.3))):
        path = make_run(tmp_path, method, seed, embedding=True, probe=0.6)
        with np.load(path / "embedding.npz") as file:
            np.savez(path / "embedding.npz", **{**file, "limit": limit})
    panels = figures.overview_figure(grouped(tmp_path), tmp_path).axes[:2]
    assert [ax.get_xlim() for ax in panels] == [(-1.3, 1.3)] * 2


def test_the_embedding_is_that_of_the_lowest_seed_with_one(tmp_path):
    for seed in (0, 3, 10):
        make_run(tmp_path, seed=seed, embedding=seed > 0)
    (group,) = tables.group_by_seed(collect(tmp_path))
    row, xy, is_minority, _ = maps.load_embedding(group, tmp_path)
    assert row["seed"] == 3 and xy.shape == (40, 2) and is_minority.sum() == 20
