"""Scores of every test image: neighbours.csv, and a sheet of the hard ones."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

from datasets.contact_sheet import COLUMNS, draw_sheet
from datasets.pack import read_index
from datasets.subset import MAKE_IT
from utils.files import read_json, sha256, write_table
from utils.scores import read_predictions

LETTERS = 18  # that fit below a thumbnail


def read_test_probabilities(run):
    """Return {test image: probability of the minority} of a run, and the checksum of its table.

    The dictionary is empty, and the checksum None, before the run has predictions.
    """
    names = "predictions.csv", "probe_predictions.csv", "finetune/predictions.csv"
    path = next((run / name for name in names if (run / name).exists()), None)
    if path is None:
        return {}, None
    table = read_predictions(path)
    file, p = (table[name][table["split"] == "test"].tolist() for name in ("file", "p_minority"))
    return dict(zip(file, p, strict=True)), sha256(path)


def write_image_audit(out, embeddings, saa, cac):
    """Write neighbours.csv and, for a run, hard_examples.png.

    embeddings: Embeddings of evaluate_metrics.py; saa [n] or None, cac [n]: tensors, in percent.
    """
    columns = {
        "file": embeddings.files,
        "label": embeddings.labels.tolist(),
        "saa": [""] * len(cac) if saa is None else (saa / 100).tolist(),
        "cac": cac.tolist(),
        "p": [embeddings.probabilities.get(file, "") for file in embeddings.files],
    }
    write_table(out / "neighbours.csv", list(columns), zip(*columns.values(), strict=True))
    if embeddings.subset:
        _, features = embeddings.spaces["encoder"]
        path, title = out / "hard_examples.png", f"{embeddings.title}: hard test images"
        draw_hard_examples(path, title, embeddings.subset, columns, features.numpy())


def draw_hard_examples(path, title, subset, columns, features):
    """Write a PNG file with lines of hard test images; the captions say why they are hard.

    columns: those of neighbours.csv, one entry per test image; features float [n, D]: unit vectors
    of the encoder.
    """
    rows, classes = subset.splits["test"], subset.classes
    rare = " + ".join(classes[c] for c in subset.tail)
    labels, split, _, names = read_index(subset.path.with_name("index.csv"))
    is_rare = np.isin(labels[rows], subset.tail)
    p = np.array([np.nan if value == "" else value for value in columns["p"]], dtype=float)
    cac = np.array(columns["cac"])
    # without predictions every p is NaN and no image counts as wrong
    is_missed, is_false, is_alone = is_rare & (p < 0.5), ~is_rare & (p > 0.5), is_rare & (cac == 0)

    def tile(row, note):
        return row, f"{shorten(names[row], at_start=True)}\n{shorten(note)}"

    def lowest(order, is_shown, note):
        """Return the tiles of the images with the lowest `order`, with the value below them."""
        chosen = np.flatnonzero(is_shown)
        chosen = chosen[np.argsort(order[chosen], kind="stable")][:COLUMNS]
        return [tile(rows[i], note.format(p=p[i], cac=cac[i])) for i in chosen]

    twins = [rows[i] for i in find_near_twins(features, is_rare, COLUMNS // 2)]
    equal = find_equal_pictures(subset, labels, names)
    lines = [
        (
            f"{rare}, called something else at 0.5: {is_missed.sum()} of {is_rare.sum()}",
            lowest(p, is_missed, "p {p:.2f}"),
        ),
        (
            f"something else, called {rare} at 0.5: {is_false.sum()} of {(~is_rare).sum()}",
            lowest(-p, is_false, "p {p:.2f}"),
        ),
        (
            f"{rare}, lowest CAC; no neighbour of its class: {is_alone.sum()} of {is_rare.sum()}",
            lowest(cac, is_rare, "CAC {cac:.0f} %"),
        ),
        (
            "different labels, test images next to each other in the encoder",
            [tile(row, classes[labels[row]]) for row in twins],
        ),
        (
            f"different labels, equal pixels, in any split; pairs: {len(equal) // 2}",
            [tile(row, f"{split[row]}: {classes[labels[row]]}") for row in equal[:COLUMNS]],
        ),
    ]
    if np.isnan(p).all():
        title += "; for those called wrong, run linear_probe.py, then this again"
    draw_sheet(path, title, lines, subset.images, subset.sizes)


def shorten(text, at_start=False):
    """Return a text that fits below a thumbnail, without its end or its start."""
    if len(text) <= LETTERS:
        return text
    return f"…{text[1 - LETTERS :]}" if at_start else f"{text[: LETTERS - 1]}…"


def find_near_twins(features, is_rare, pairs):
    """Return the nearest pairs of a rare and another image, [i, j, i, j, ...].

    features [n, D]; is_rare bool [n]. No image stands in two pairs.
    """
    rare, others = np.flatnonzero(is_rare), np.flatnonzero(~is_rare)
    search = NearestNeighbors(n_neighbors=min(pairs, len(others))).fit(features[others])
    distance, neighbor = search.kneighbors(features[rare])
    found = []
    for place in np.argsort(distance, axis=None, kind="stable"):
        i, j = rare[place // distance.shape[1]], others[neighbor.flat[place]]
        if i not in found and j not in found:
            found += [i, j]
    return found[: 2 * pairs]


def find_equal_pictures(subset, labels, names):
    """Return rows of the subset with equal pixels and different labels, [i, j, i, j, ...].

    make_subsets.py has recorded the names of equal pictures.
    """
    row_of, found = {names[row]: row for rows in subset.splits.values() for row in rows}, []
    for leak in read_json(subset.path, MAKE_IT).get("leaks", []):
        rows = [row_of[name] for name in leak if name in row_of]
        found += [row for i in rows[1:] if labels[i] != labels[rows[0]] for row in (rows[0], i)]
    return found
