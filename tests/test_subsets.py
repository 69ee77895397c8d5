"""make_subsets.py: worked counts of the reference, real data sets, generated folders, kills, and every mistake's one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, one_line, real_data
from pictures import contents, counts, inat_folder, index, picture, plain_folder, well_formed
from PIL import Image

import make_subsets
from common import load_subset
from datasets.inat21 import split_counts
from datasets.source import SPLITS, draw_splits
from make_subsets import ratio_counts

# protocol.json, data.inat21: n, train, val; and class sizes, ratios, counts
SPLIT_EXAMPLES = [
    (7, 7, 0),
    (19, 19, 0),
    (20, 19, 1),
    (21, 20, 1),
    (99, 95, 4),
    (100, 95, 5),
    (101, 96, 5),
    (1000, 950, 50),
    (1999, 1900, 99),
    (12345, 11728, 617),
]
COUNT_EXAMPLES = [
    ([1000, 1000], [0.01, 0.99], [10, 990]),
    ([1000, 1000], [0.05, 0.95], [50, 950]),
    ([1000, 1000], [0.5, 0.5], [500, 500]),
    ([1234, 777], [0.01, 0.99], [7, 769]),
    ([1234, 777], [0.95, 0.05], [738, 38]),
    ([333, 4000], [0.05, 0.95], [16, 316]),
    ([333, 4000], [0.5, 0.5], [166, 166]),
    ([143, 157], [0.99, 0.01], [141, 1]),
    ([100, 130], [0.29, 0.71], [28, 71]),
]


def test_counts_equal_the_worked_examples_of_the_reference():
    splits, counts = SPLIT_EXAMPLES, COUNT_EXAMPLES
    if (SHARED / "oracle" / "protocol.json").exists():
        inat = json.loads((SHARED / "oracle" / "protocol.json").read_text())["data"]["inat21"]
        assert len(inat["count_examples"]) == len(counts)
        splits, counts = (
            inat["split_examples_n_train_val"],
            [(e["class_sizes"], e["ratios"], e["counts"]) for e in inat["count_examples"]],
        )
    for n, train, val in splits:
        assert split_counts(n) == (train, val)
    for sizes, ratios, kept in counts:
        assert ratio_counts(sizes, ratios) == kept


# ------------------------------------------------------------------------------------------------------------------
# digits, from end to end
# ------------------------------------------------------------------------------------------------------------------


def test_digits_prints_what_the_last_lines_promise(make, tmp_path):
    from sklearn.datasets import load_digits

    done = make("digits")
    expected = (
        (ROOT / "make_subsets.py")
        .read_text(encoding="utf-8")
        .split("`python make_subsets.py digits`:\n#\n")[1]
    )
    assert done.stdout == "".join(line[2:] + "\n" for line in expected.splitlines())
    folder = tmp_path / "subsets" / "digits"
    assert set(contents(folder)) == {"images.npy", "index.csv"} | {
        f"{r}.{k}" for r in make_subsets.RATIOS for k in ("json", "png")
    }
    subsets = {ratio: well_formed(folder / f"{ratio}.json") for ratio in make_subsets.RATIOS}

    s = subsets["99-1"]
    assert (s.name, s.size, s.recipe, s.classes, s.minority) == (
        "digits",
        32,
        "medical",
        ["0-4", "5-9"],
        1,
    )
    assert s.images.shape == (1797, 8, 8, 1)
    scans = load_digits()
    np.testing.assert_array_equal(s.images[..., 0], np.round(scans.images * 255 / 16))
    np.testing.assert_array_equal(s.labels, scans.target >= 5)
    assert sum(counts(subsets["natural"])[part][c] for part in SPLITS for c in (0, 1)) == 1797
    for part, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        for c in (0, 1):  # stratified
            assert abs(counts(subsets["natural"])[part][c] - share * (s.labels == c).sum()) <= 1
    m = min(counts(subsets["natural"])["train"])
    assert [counts(subsets[r])["train"] for r in make_subsets.RATIOS[:3]] == [
        tuple(ratio_counts([m, m], q)) for q in ((0.99, 0.01), (0.95, 0.05), (0.5, 0.5))
    ]
    for c, order in (
        (1, ("99-1", "95-5", "50-50", "natural")),
        (0, ("50-50", "95-5", "99-1", "natural")),
    ):  # nested
        sets = [{r for r in subsets[ratio].splits["train"] if s.labels[r] == c} for ratio in order]
        assert all(a < b for a, b in zip(sets, sets[1:]))
    for part in ("val", "test"):
        assert all((subsets[r].splits[part] == s.splits[part]).all() for r in subsets)


def test_same_command_gives_the_same_bytes_and_another_seed_other_rows(make, tmp_path):
    make("digits", "--ratios", "99-1")
    first = contents(tmp_path / "subsets" / "digits")
    again = make("digits", "--ratios", "99-1")
    assert "is there already" in again.stdout and contents(tmp_path / "subsets" / "digits") == first
    shutil.rmtree(tmp_path / "subsets")
    make("digits", "--ratios", "99-1")
    assert contents(tmp_path / "subsets" / "digits") == first
    make("digits", "--ratios", "99-1", "--seed", 1, "--name", "other")
    one, other = load_subset("subsets/digits/99-1.json"), load_subset("subsets/other/99-1.json")
    assert other.name == "other" and one.sha256 == other.sha256
    assert all(set(one.splits[part]) != set(other.splits[part]) for part in SPLITS)


def test_ratios_can_be_added_without_decoding_and_equal_those_made_at_once(make, monkeypatch):
    make("digits", "--out", "a", "--ratios", "99-1,99.5-0.5", "natural")
    make("digits", "--out", "b", "--ratios", "natural")
    monkeypatch.setattr(make_subsets, "pack_images", None)
    make("digits", "--out", "b", "--ratios", "99.0-1.0", "99.5-.5")
    a, b = contents(Path("a/digits")), contents(Path("b/digits"))
    assert (
        a.keys()
        == b.keys()
        == {
            "images.npy",
            "index.csv",
            "99-1.json",
            "99-1.png",
            "99.5-0.5.json",
            "99.5-0.5.png",
            "natural.json",
            "natural.png",
        }
    )
    for name in a:
        one, two = (json.loads(x[name]) if name.endswith(".json") else x[name] for x in (a, b))
        if name.endswith(".json"):
            del one["command"], two["command"]
        assert one == two, name


def test_a_finished_folder_is_never_mixed_or_trusted_blindly(make, refused):
    make("digits", "--ratios", "95-5")
    before = contents(Path("subsets/digits"))
    refused("digits", "--seed", 3, says=["subsets/digits", "seed 0 there, 3 now", "--name"])
    refused("digits", "--size", 16, says=["subsets/digits", "size 32 there, 16 now"])
    fake_breast(Path("mnist"))
    refused(
        "breastmnist",
        "--name",
        "digits",
        "--data-root",
        "mnist",
        "--size",
        28,
        says=["dataset digits there"],
    )
    assert contents(Path("subsets/digits")) == before
    data = bytearray(before["images.npy"])
    data[-1] ^= 1
    Path("subsets/digits/images.npy").write_bytes(data)
    refused("digits", says=["subsets/digits/images.npy", "checksum"])
    Path("subsets/digits/images.npy").unlink()
    refused("digits", says=["subsets/digits/images.npy", "checksum"])


# ------------------------------------------------------------------------------------------------------------------
# MedMNIST
# ------------------------------------------------------------------------------------------------------------------


def fake_breast(root, size=28):
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 12), ("val", 6), ("test", 6)):
        arrays |= {
            f"{part}_images": rng.integers(0, 256, (n, size, size), dtype=np.uint8),
            f"{part}_labels": (np.arange(n) % 3 > 0).astype(np.uint8)[:, None],
        }
    np.savez(root / ("breastmnist.npz" if size == 28 else f"breastmnist_{size}.npz"), **arrays)
    return root


@pytest.mark.parametrize(
    "name, size, file, natural, classes",
    [
        (
            "breastmnist",
            28,
            "breastmnist.npz",
            {"train": (147, 399), "val": (21, 57), "test": (42, 114)},
            ["malignant", "normal, benign"],
        ),
        (
            "breastmnist",
            224,
            "breastmnist_224.npz",
            {"train": (147, 399), "val": (21, 57), "test": (42, 114)},
            ["malignant", "normal, benign"],
        ),
        (
            "pneumoniamnist",
            28,
            "pneumoniamnist.npz",
            {"train": (1214, 3494), "val": (135, 389), "test": (234, 390)},
            ["normal", "pneumonia"],
        ),
    ],
)
def test_medmnist_counts_and_pixels(make, name, size, file, natural, classes):
    path = real_data(file)
    make(name, "--data-root", path.parent, "--size", size, "--ratios", "natural", "99-1")
    subset = well_formed(Path("subsets") / name / "natural.json")
    assert counts(subset) == natural
    assert (subset.classes, subset.minority, subset.size, subset.recipe) == (
        classes,
        0,
        size,
        "medical",
    )
    assert subset.images.shape[1:] == (size, size, 1)
    data = np.load(path)
    for part in SPLITS:
        np.testing.assert_array_equal(
            subset.images[subset.splits[part], ..., 0], data[f"{part}_images"]
        )
        np.testing.assert_array_equal(
            subset.labels[subset.splits[part]], data[f"{part}_labels"][:, 0]
        )
    few = well_formed(Path("subsets") / name / "99-1.json")
    assert (
        counts(few)["train"] == tuple(ratio_counts(natural["train"], [0.01, 0.99]))
        and counts(few)["test"] == natural["test"]
    )


def test_medmnist_mistakes(refused, tmp_path, monkeypatch):
    import medmnist

    refused("breastmnist", says=["breastmnist_224.npz", "--download", "medmnist.com"])
    refused("breastmnist", "--size", 32, says=["--size 32", "28, 64, 128, 224"])
    fake_breast(tmp_path / "data")
    refused("breastmnist", says=["breastmnist_224.npz", "use --size 28"])
    file = tmp_path / "data" / "breastmnist.npz"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not an archive", b""):
        file.write_bytes(damaged)
        refused("breastmnist", "--size", 28, says=["breastmnist.npz", "damaged"])
    np.savez(
        file,
        **{
            f"{part}_{kind}": np.array([{}], dtype=object)
            for part in SPLITS
            for kind in ("images", "labels")
        },
    )
    refused(
        "breastmnist", "--size", 28, says=["breastmnist.npz", "damaged"]
    )  # pickles are not opened
    fake_breast(tmp_path / "wrong", 64).joinpath("breastmnist_64.npz").rename(
        tmp_path / "wrong" / "breastmnist_224.npz"
    )
    refused("breastmnist", "--data-root", "wrong", says=["breastmnist_224.npz", "64 px, not 224"])

    def offline(self):
        Path(self.root, "breastmnist_224.npz").write_bytes(b"half")
        raise RuntimeError("Automatic download failed!\nmany lines")

    monkeypatch.setattr(medmnist.BreastMNIST, "download", offline)
    refused(
        "breastmnist",
        "--download",
        "--data-root",
        "new",
        says=["--download", "breastmnist_224.npz", "medmnist.com"],
    )
    assert not list(Path("new").iterdir())  # the half download is gone
    assert not Path("subsets").exists()


def test_medmnist_download_lands_whole_and_never_replaces_a_file(make, monkeypatch, tmp_path):
    import medmnist

    calls = []

    def download(self):
        calls.append(self.root)
        fake_breast(Path(self.root))

    monkeypatch.setattr(medmnist.BreastMNIST, "download", download)
    for _ in range(2):
        make("breastmnist", "--size", 28, "--download", "--ratios", "50-50")
    assert len(calls) == 1 and [p.name for p in Path("data").iterdir()] == ["breastmnist.npz"]


# ------------------------------------------------------------------------------------------------------------------
# iNaturalist
# ------------------------------------------------------------------------------------------------------------------


def test_inat21_mini_mammals_counts(planned):
    source, rows = planned("inat21-mammals", "--data-root", real_data("inat21_mini"))
    assert rows["natural"] == {
        "train": (2850, 6175),
        "val": (150, 150),
        "test": (300, 300),
    }  # 95 % of 3000 and 6500; balanced
    assert [
        ((source.split == part) & (source.labels == c)).sum()
        for part in ("val", "test")
        for c in (0, 1)
    ] == [150, 325, 300, 650]
    assert [rows[ratio]["train"] for ratio in ("99-1", "95-5", "50-50")] == [
        (28, 2821),
        (142, 2707),
        (1425, 1425),
    ]


def test_a_part_of_inat21_mini_is_packed(make, tmp_path):
    root = real_data("inat21_mini")
    for folder in [f for part in ("train", "val") for f in sorted((root / part).iterdir())]:
        for image in sorted(folder.iterdir())[: 20 if folder.parent.name == "train" else 4]:
            (tmp_path / "data" / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
            os.symlink(image, tmp_path / "data" / image.relative_to(root))
    make("inat21-mammals", "--ratios", "50-50", "natural")
    natural = well_formed(Path("subsets/inat21-mammals/natural.json"))
    assert counts(natural) == {"train": (114, 247), "val": (6, 6), "test": (24, 24)}
    assert (natural.classes, natural.minority, natural.size, natural.recipe) == (
        ["Artiodactyla", "Carnivora"],
        0,
        224,
        "natural",
    )
    assert (natural.sizes == 64).all() and natural.images.shape == (456, 64, 64, 3)
    line = index(Path("subsets/inat21-mammals"))[17]
    np.testing.assert_array_equal(
        natural.images[17], np.asarray(Image.open(root / line["source"]).convert("RGB"))
    )


TREE = {
    "Animalia_Chordata_Mammalia_Artiodactyla_Bovidae_Bos_taurus": (21, 3),
    "Animalia_Chordata_Mammalia_Carnivora_Felidae_Felis_catus": (25, 4),
    "Animalia_Chordata_Mammalia_Carnivora_Ursidae_Ursus_arctos": (15, 2),
    "Plantae_Tracheophyta_Liliopsida_Poales_Poaceae_Bosia_tauri": (3, 3),
}


def test_inat21_taxa(make, refused, tmp_path):
    root = inat_folder(tmp_path / "data" / "inat21", TREE)
    make("inat21-mammals", "--ratios", "natural")  # data/inat21 is found from data
    subset = well_formed(Path("subsets/inat21-mammals/natural.json"))
    assert counts(subset) == {"train": (20, 38), "val": (1, 1), "test": (3, 3)}
    make(
        "inat21",
        "--data-root",
        root,
        "--minority",
        "felidae/FELIS",
        "--majority",
        "Bovidae_Bos",
        "--ratios",
        "50-50",
        "natural",
    )
    subset = well_formed(Path("subsets/inat21/natural.json"))
    assert (
        subset.classes == ["Felis", "Bos"] and subset.minority == 0
    )  # the first named, though not the rarer
    assert counts(subset)["train"] == (24, 20)
    taxa = ["--data-root", root, "--majority", "Carnivora", "--minority"]
    refused("inat21", *taxa, "Artiodactila", says=["--minority Artiodactila", "Artiodactyla"])
    refused("inat21", *taxa, "Bo", says=["--minority Bo", "Bos"])  # whole level names only
    refused(
        "inat21", *taxa, "Mammalia/Bovidae", says=["matches no folder"]
    )  # consecutive levels only
    refused("inat21", *taxa, "Felidae", says=["overlap", "Felis_catus"])
    refused("inat21", "--minority", "Bos", says=["--majority"])
    refused("inat21-plants", says=["--minority", "Quercus"])
    refused("inat21-mammals", "--minority", "Bos", says=["--minority", "does not take"])
    refused(
        "inat21-mammals",
        "--data-root",
        "nowhere",
        says=["nowhere", "train/ and val/", "github.com/visipedia"],
    )
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    refused("inat21-mammals", "--data-root", "empty", says=["empty/train", "NNNNN_Kingdom"])
    for image in (root / "val" / f"00000_{list(TREE)[0]}").iterdir():
        image.unlink()
    refused("inat21-mammals", "--name", "x", says=["Artiodactyla", "no image in test"])


# ------------------------------------------------------------------------------------------------------------------
# folders
# ------------------------------------------------------------------------------------------------------------------


def test_chestxray224_counts_and_its_patients(planned):
    source, rows = planned(
        "folder", "--data-root", real_data("chestxray224"), "--patient", r"(person\d+|IM-\d+)"
    )
    assert rows["natural"] == {"train": (1066, 3065), "val": (61, 210), "test": (214, 600)}
    assert source.classes == ["normal", "pneumonia"] and rows["99-1"]["train"] == (10, 1055)


def test_folder_of_any_pictures_keeps_geometry_and_names(make, tmp_path):
    root = plain_folder(tmp_path / "Röntgen bilder", {"grün": 30, "b c": 20}, size=(30, 20))
    odd = {
        "grey.png": dict(mode="L", size=(10, 40)),
        "palette.GIF": dict(mode="P"),
        "deep/er/alpha.webp": dict(mode="RGBA"),
        "x.tiff": {},
        "cmyk.jpeg": dict(mode="CMYK"),
        "one.BMP": dict(mode="1"),
    }
    for name, options in odd.items():
        picture(root / "b c" / name, seed=9, **options)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(root / "b c" / "turned.jpg", seed=1, size=(40, 10), exif=exif)
    (root / "b c" / ".hidden.jpg").write_bytes(b"no image")
    (root / "b c" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    done = make("folder", "--data-root", root)
    assert "10 % for val" in done.stdout and "grey" not in done.stdout
    folder = tmp_path / "subsets" / "Röntgen bilder"
    subset = well_formed(folder / "natural.json")
    lines = {line["source"]: line for line in index(folder)}
    assert (
        len(lines) == 57
        and subset.classes == ["b c", "grün"]
        and subset.minority == 0
        and "b c/deep/er/alpha.webp" in lines
    )
    assert {part: sum(counts(subset)[part]) for part in SPLITS} == {
        "train": 39,
        "val": 6,
        "test": 12,
    }
    assert subset.images.shape[1:] == (40, 40, 3)  # never above the longest source
    assert (lines["b c/grey.png"]["width"], lines["b c/grey.png"]["height"]) == ("10", "40")
    turned = lines["b c/turned.jpg"]
    assert (turned["width"], turned["height"]) == ("10", "40")
    upright = (
        Image.open(root / "b c" / "turned.jpg")
        .transpose(Image.Transpose.ROTATE_270)
        .resize((40, 40), Image.Resampling.BICUBIC)
    )
    np.testing.assert_array_equal(subset.images[int(turned["row"])], np.asarray(upright))
    assert (
        not (folder / "99-1.json").exists() and "left out 99-1" in done.stdout
    )  # 1 % of 18 is no image


def test_folder_splits_given_drawn_and_by_patient(make, refused, tmp_path):
    root = tmp_path / "clinic"
    for part, n in (("train", 40), ("test", 8)):
        for i in range(n):
            label = i % 4 == 0
            picture(
                root / part / ("ill" if label else "well") / f"p{part[:2]}{i // 2}_scan{i}.png",
                seed=i,
                mode="L",
            )
    done = make(
        "folder", "--data-root", root, "--patient", "^(p[a-z]+[0-9]+)_", "--ratios", "natural"
    )
    assert "drawn from train: 10 % for val, by patient (20 patients)" in done.stdout
    assert "--grayscale would store one channel" in done.stdout
    by_patient = {}
    for line in index(tmp_path / "subsets" / "clinic"):
        by_patient.setdefault(line["source"].split("/")[-1].split("_")[0], set()).add(line["split"])
    assert all(len(splits) == 1 for splits in by_patient.values())
    subset = well_formed(tmp_path / "subsets" / "clinic" / "natural.json")
    assert counts(subset)["test"] == (2, 6) and sum(counts(subset)["val"]) in (4, 6)
    make(
        "folder",
        "--data-root",
        root,
        "--grayscale",
        "--name",
        "grey",
        "--minority",
        "well",
        "--ratios",
        "natural",
    )
    grey = well_formed(tmp_path / "subsets" / "grey" / "natural.json")
    assert grey.minority == 1 and grey.recipe == "medical" and grey.images.shape[3] == 1
    refused(
        "folder",
        "--data-root",
        root,
        "--patient",
        "scan1(x)",
        says=["--patient", "finds no patient in"],
    )
    refused(
        "folder",
        "--data-root",
        root,
        "--patient",
        "(",
        says=["--patient (", "not a regular expression"],
    )
    refused(
        "folder",
        "--data-root",
        root,
        "--minority",
        "il",
        says=["--minority il", "nearest names: ill"],
    )
    shutil.copy(root / "train" / "ill" / "ptr0_scan0.png", root / "test" / "ill" / "ptr0_scan9.png")
    refused(
        "folder",
        "--data-root",
        root,
        "--patient",
        "^(p[a-z]+[0-9]+)_",
        says=["patient ptr0", "in train"],
    )


def test_drawn_splits_keep_groups_whole_and_classes_in_proportion():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 300, 2000)
    labels = (groups % 10 == 0).astype(int)
    split = draw_splits(labels, {"test": 20, "val": 10}, seed=0, groups=groups.astype(str))
    assert all(len(set(split[groups == g])) == 1 for g in set(groups))
    largest = np.bincount(groups).max()
    for part, share in (("test", 0.2), ("val", 0.1)):
        for c in (0, 1):
            n = (labels == c).sum()
            assert abs(((split == part) & (labels == c)).sum() - share * n) < largest
    assert (
        draw_splits(labels, {"test": 20}, seed=1) != draw_splits(labels, {"test": 20}, seed=2)
    ).any()


def test_folder_mistakes(refused, tmp_path):
    refused("folder", says=["data", "no such folder", "<class>/"])
    (tmp_path / "data").mkdir()
    refused("folder", says=["data", "0 (none)", "two at least"])
    plain_folder(tmp_path / "data", {"a": 6, "b": 6, "c": 1})
    refused("folder", says=["3 (a, b, c)", "--minority A", "--majority B,C"])
    shutil.rmtree("data/c")
    shutil.rmtree("data/b")
    refused("folder", says=["1 (a)", "two at least"])
    for name in ("test", "Test"):
        plain_folder(tmp_path / "data", {name: 3})
        refused("folder", says=[name, "split", "rename"])
        shutil.rmtree(f"data/{name}")
    plain_folder(tmp_path / "data" / "train", {"a": 3, "b": 3})
    refused("folder", says=["train", "there is also a"])
    shutil.rmtree("data/a")
    plain_folder(tmp_path / "data" / "train", {"val": 3})
    refused("folder", says=["class folder named val"])
    shutil.rmtree("data/train/val")
    plain_folder(tmp_path / "data" / "val", {"a": 3})
    refused("folder", says=["class b has no image in val"])
    shutil.rmtree("data")
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "b").mkdir(parents=True)
    refused("folder", says=["no images below a and b"])
    assert not Path("subsets").exists()


def test_flags_that_make_no_sense(refused, tmp_path):
    refused("digit", says=["digit: no such data set", "digits"])
    refused("digits", "--ratios", "99.9-0.1", says=["--ratios 99.9-0.1", "5-9"])
    for ratio in ("90-9", "1-99", "x", "nan-1", "99"):
        refused("digits", "--ratios", ratio, says=[f"--ratios {ratio}", "99-1"])
    for flag, value in (("--seed", -1), ("--size", 0), ("--store-size", 0), ("--workers", 0)):
        refused("digits", flag, value, says=[flag, str(value)])
    for words in (
        ["--download"],
        ["--grayscale"],
        ["--skip-bad"],
        ["--patient", "x"],
        ["--minority", "x"],
        ["--majority", "x"],
    ):
        refused("digits", *words, says=[words[0], "does not take"])
    refused("digits", "--name", "a/b", says=["--name a/b"])
    (tmp_path / "file").write_text("in the way")
    refused("digits", "--out", "file", says=["file", "--out"])
    assert Path("file").read_text() == "in the way" and not Path("subsets").exists()


# ------------------------------------------------------------------------------------------------------------------
# packing: unreadable images, workers, kills
# ------------------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_left_out_only_when_asked(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 60})
    good = contents(root / "a")
    for name, data in {
        "a 003.jpg": good["a 003.jpg"][:-30],
        "a 005.jpg": b"",
        "a 039.jpg": b"text",
    }.items():
        (root / "a" / name).write_bytes(data)
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\0\0\0\0"  # 65536 x 65536 pixels: a decompression bomb
    (root / "b" / "bomb.png").write_bytes(huge + zlib.crc32(huge[12:]).to_bytes(4, "big"))
    done = make("folder", "--name", "x", code=2)
    one_line(done, "a/a 003.jpg", "truncated", "3 more", "--skip-bad")
    for name in (
        "a/a 003.jpg: image file is truncated",
        "a/a 005.jpg: ",
        "a/a 039.jpg: not an image",
        "b/bomb.png: ",
    ):
        assert name in done.stdout
    assert not list(Path("subsets/x").glob("[!.]*"))
    done = make("folder", "--name", "x", "--skip-bad")
    assert "4 unreadable images, left out:" in done.stdout and not list(
        Path("subsets/x").glob(".part-*")
    )
    subset = well_formed(Path("subsets/x/natural.json"))
    assert subset.images.shape[0] == 97 and subset.images.reshape(97, -1).any(1).all()  # no holes
    assert [int(line["row"]) for line in index(Path("subsets/x"))] == list(range(97))
    done = make("folder", "--name", "x", "--skip-bad")
    assert "is there already" in done.stdout
    one_line(make("folder", "--name", "x", code=2), "skipped 4 there, 0 now")

    (root / "b" / "bomb.png").unlink()
    make("folder", "--name", "y", code=2)
    for name, data in good.items():  # mended: the same command now finishes
        (root / "a" / name).write_bytes(data)
    make("folder", "--name", "y")
    assert well_formed(Path("subsets/y/natural.json")).images.shape[0] == 100


def test_any_number_of_workers_gives_the_same_bytes(make, tmp_path):
    plain_folder(tmp_path / "data", {"a": 40, "b": 60}, size=(31, 17))
    for n in (1, 2, 5):
        make("folder", "--out", str(n), "--store-size", 20, "--ratios", "50-50", "--workers", n)
    first = contents(Path("1/data"))
    for n in (2, 5):
        other = contents(Path(f"{n}/data"))
        assert other.keys() == first.keys()
        assert all(other[name] == first[name] for name in first if not name.endswith(".json"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_packing_goes_on_and_ends_byte_identical(make, tmp_path):
    plain_folder(tmp_path / "data", {"a": 96, "b": 224}, size=(400, 300))
    command = [
        sys.executable,
        str(ROOT / "make_subsets.py"),
        "folder",
        "--ratios",
        "50-50",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    journal = tmp_path / "subsets" / "data" / ".part-journal.jsonl"
    end = time.time() + 60
    while (
        time.time() < end
        and process.poll() is None
        and not (journal.exists() and len(journal.read_text().splitlines()) > 2)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.exists() and not list(journal.parent.glob("*.json"))  # it was stopped halfway
    words = ["folder", "--ratios", "50-50", "--workers", "2"]
    lines = journal.read_text().splitlines()
    with open(
        journal.parent / ".part-images.npy", "r+b"
    ) as file:  # as after a power cut: a journaled block that is not on disk
        file.seek(128 + json.loads(lines[1])[0] * 320 * 320 * 3)
        file.write(bytes(1000))
    done = make(*words)
    assert "going on: " in done.stdout
    resumed = contents(Path("subsets/data"))
    shutil.rmtree("subsets")
    assert "going on" not in make(*words).stdout
    assert contents(Path("subsets/data")) == resumed


def test_a_stopped_packing_of_other_settings_starts_over(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 40})
    (root / "a" / "a 000.jpg").write_bytes(b"")
    make("folder", "--ratios", "50-50", code=2)
    (root / "a" / "a 000.jpg").unlink()  # another list of images
    assert "going on" not in make("folder", "--ratios", "50-50").stdout
    make("folder", "--ratios", "50-50", "--out", "fresh")
    assert (
        contents(Path("subsets/data"))["images.npy"] == contents(Path("fresh/data"))["images.npy"]
    )
    assert not list(Path("subsets/data").glob(".part-*"))
