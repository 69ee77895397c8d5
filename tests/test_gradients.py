"""The gradient lab against autograd; docs/gradients.md against the numbers of results/gradients."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call

from benchmarks import gradients as lab

PAGE = (ROOT / "docs" / "gradients.md").read_text(encoding="utf-8")
RECORD = ROOT / "results" / "gradients" / "gradients.json"


def clusters(angle, images=(13, 3)):
    """Return z [N, 2, D] with every class at one point, `angle` apart, labels, and the points."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, lab.DIM, generator=generator, dtype=torch.float64)
    p = F.normalize(p, dim=0)
    q = F.normalize(q - (q @ p) * p, dim=0)
    angle = torch.tensor(angle, dtype=torch.float64)
    points = torch.stack([p, angle.cos() * p + angle.sin() * q])
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(images))
    return points[labels][:, None].expand(-1, 2, -1), labels, points


def two_cluster_gradients(points, rows, temperature, prototypes=None):
    """Return |G| [2] of the rows of each class, where every class is one point. Closed form.

    points [2, D], unit vectors; they may be equal. rows: number of rows of each class, views
    included. prototypes [2, D]: of Supervised Prototypes with margin 1; None: of the other three
    losses, which have the same gradient there.
    """
    x = torch.exp((points[0] @ points[1] - 1) / temperature)
    norms = []
    for c in (0, 1):
        own, other = rows[c], rows[1 - c]
        weight = other * x / (own - 1 + other * x) + other * x / (other - 1 + own * x)
        pull = weight * points[1 - c]
        if prototypes is not None and points[c] @ prototypes[c] <= 0.5:
            pull = pull - prototypes[c] / lab.VIEWS
        norms.append((pull - (pull @ points[c]) * points[c]).norm() / temperature)
    return torch.stack(norms)


@pytest.mark.parametrize("angle", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("method", lab.LOSSES)
def test_equal_embeddings_and_two_clusters_have_the_closed_form(method, angle):
    z, labels, points = clusters(angle)
    found = lab.row_gradients(method, z, labels, 0.07).norm(dim=1)
    prototypes = lab.PROTOTYPES if method == "suppro" else None
    expected = two_cluster_gradients(points, (26, 6), 0.07, prototypes)
    torch.testing.assert_close(found, expected[labels.repeat(2)], rtol=0, atol=1e-6)
    if angle == 0:
        assert (expected < 1e-9).all() if method != "suppro" else (expected > 1).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, torch.inf])
@pytest.mark.parametrize("method", lab.LOSSES)
def test_the_pairs_add_up_to_the_gradient(method, spread):
    z, labels = lab.draw_embeddings(20, 3, spread)
    weights, prototype_weight = lab.pair_weights(method, z, labels, 0.1)
    rows = lab.to_rows(z)
    total = weights @ rows - prototype_weight[:, None] * lab.PROTOTYPES[labels.repeat(2)]
    total = total - (total * rows).sum(1, keepdim=True) * rows
    expected = lab.row_gradients(method, z, labels, 0.1)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-9)
    shares = lab.majority_shares(method, z, labels, 0.1)
    assert ((shares > 0) & (shares <= 1 + 1e-12)).all()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("spread", [0.003, 0.03, 0.3])
def test_no_gradient_of_supcon_exceeds_its_bound(spread, temperature):
    for images, minority in ((8, 1), (64, 1), (64, 32)):
        z, labels = lab.draw_embeddings(images, minority, spread)
        # classes apart from each other come closest to the bound
        shifted = F.normalize(z + spread * labels[:, None, None] * lab.PROTOTYPES[0], dim=2)
        for batch in (z, shifted):
            norms = lab.row_gradients("supcon", batch, labels, temperature).norm(dim=1)
            diameter = float(torch.pdist(lab.to_rows(batch)).max())
            for c, others in ((0, minority), (1, images - minority)):
                bound = lab.supcon_bound(2 * others, 2 * images, diameter, temperature)
                assert (norms[(labels == c).repeat(2)] <= bound).all()


def test_the_lab_writes_its_numbers_and_its_figure(tmp_path):
    call(lab, "--smoke", "--out", tmp_path)
    record = json.loads((tmp_path / "gradients.json").read_text())
    assert record["collapsed"]["minority"]["1"]["supcon"]["majority"] > 0
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_the_page_hold_the_measured_numbers():
    record = json.loads(RECORD.read_text())
    tables = re.findall(r"<!-- (\w+) (\w+): ([\w ]+) -->\n\n(.*?)\n\n", PAGE, re.DOTALL)
    assert {name for _, name, _, _ in tables} == {"minority", "images", "temperature", "relu"}
    for state, sweep, methods, text in tables:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
        values = record[state][sweep]
        assert [row[0].split()[0] for row in rows[2:]] == list(values)
        for row, by_method in zip(rows[2:], values.values(), strict=True):
            expected = [
                f"{by_method[method][name]:.2g}"
                for method in methods.split()
                for name in ("majority", "minority")
            ]
            assert row[1:] == expected


def test_the_lengths_that_the_page_calls_constant_are():
    record, lengths = json.loads(RECORD.read_text())["collapsed"], {}
    for by_method in (case for sweep in ("minority", "images") for case in record[sweep].values()):
        for method in lab.LOSSES:
            for name, value in by_method[method].items():
                lengths.setdefault(f"{method} {name}", set()).add(f"{value:.2g}")
    assert lengths["supmin majority"] == lengths["ntxent majority"] == {"0.28", "0.29"}
    assert lengths["suppro majority"] == lengths["suppro minority"] == {"7.1"}
    assert lengths["supmin minority"] == lengths["supcon minority"]


def test_the_table_of_shares_holds_the_measured_numbers():
    record = json.loads(RECORD.read_text())
    rows = re.search(r"<!-- shares -->\n\n.*\n.*\n((?:\|.*\n)+)", PAGE)[1].strip().split("\n")
    for row, method in zip(rows, lab.LOSSES, strict=True):
        expected = [
            f"{100 * record[state]['minority']['3'][method][f'majority_pairs_of_{rows}']:.0f}"
            for state in lab.STATES
            for rows in ("majority", "minority")
        ]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == expected
