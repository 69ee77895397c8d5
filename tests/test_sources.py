"""The loaders: every data set in the layout in which it is downloaded, and its users' mistakes."""

import csv
import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
from conftest import ROOT, one_line, real_data
from pictures import contents, counts, inat_folder, index, picture, plain_folder, well_formed
from PIL import Image, ImageFile
from torchvision.datasets import INaturalist

from datasets import DATASETS, INAT21_FOLDERS
from datasets.ratios import ratio_counts
from datasets.source import SPLITS
from datasets.splits import DRAWN, draw_splits


def write_table(path, rows):
    """Write a CSV of dicts."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def natural(name):
    return well_formed(Path("subsets", name, "natural.json"))


# --------------------------------------------------------------------------------------------------
# FracAtlas
# --------------------------------------------------------------------------------------------------


def fracatlas(root, fractured=12, others=40, **columns):
    """Make FracAtlas with fewer and smaller pictures; columns: functions of the image's number."""
    rows = []
    for i in range(fractured + others):
        name, is_broken = f"IMG{i:07d}.jpg", i < fractured
        folder = root / "FracAtlas" / "images" / ("Fractured" if is_broken else "Non_fractured")
        picture(folder / name, seed=i, size=(18, 22))
        row = {"image_id": name, "hand": 1, "multiscan": i % 2, "fractured": int(is_broken)}
        rows.append({**row, **{column: value(i) for column, value in columns.items()}})
    write_table(root / "FracAtlas" / "dataset.csv", rows)
    return root / "FracAtlas"


def test_fracatlas_is_split_kept_grey_and_read_as_far_as_possible(make, tmp_path, monkeypatch):
    atlas = fracatlas(tmp_path / "data")
    truncated = atlas / "images" / "Fractured" / "IMG0000003.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-50])
    done = make("fracatlas")
    subset, name = natural("fracatlas"), "images/Fractured/IMG0000003.jpg"
    assert counts(subset) == {"train": (8, 28), "val": (1, 4), "test": (3, 8)}
    assert subset.classes == ["Fractured", "Non_fractured"] and subset.minority == 0
    assert (subset.size, subset.recipe) == (224, "medical")
    assert subset.images.shape == (52, 22, 22, 1)
    assert f"truncated, read as far as possible (1):\n  {name}\n" in done.stdout
    assert re.search(r"published +501 / 2356", done.stdout)
    assert "not the published" in done.stdout
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    line = next(line for line in index(Path("subsets/fracatlas")) if line["source"] == name)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        grey = Image.open(truncated).convert("L").resize((22, 22), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(subset.images[int(line["row"]), ..., 0], np.asarray(grey))
    # a ratio added later has the list, too
    assert make("fracatlas", "--ratios", "80-20").stdout.count(name) == 1
    make("fracatlas", "--verify")
    # the folder itself
    make("fracatlas", "--data-root", atlas, "--out", "other", "--ratios", "natural")
    one, two = contents(Path("subsets/fracatlas")), contents(Path("other/fracatlas"))
    assert one["images.npy"] == two["images.npy"] and one["index.csv"] == two["index.csv"]


def test_the_published_counts_of_fracatlas_follow_from_the_split():
    labels = np.array([0] * 717 + [1] * 3366)
    split = draw_splits(labels, DRAWN, seed=0)
    found = {name: tuple(np.bincount(labels[split == name])) for name in SPLITS}
    assert found == DATASETS["fracatlas"].counts


def test_fracatlas_keeps_copies_and_known_patients_in_one_split(planned, tmp_path):
    atlas = fracatlas(tmp_path / "copies")
    for i in range(14, 26):
        folder = atlas / "images/Non_fractured"
        shutil.copy(folder / "IMG0000013.jpg", folder / f"IMG{i:07d}.jpg")
    source, _ = planned("fracatlas", "--data-root", tmp_path / "copies", "--ratios", "natural")
    split = {Path(name).stem: s for name, s in zip(source.names, source.split, strict=True)}
    assert len({split[f"IMG{i:07d}"] for i in range(13, 26)}) == 1
    fracatlas(tmp_path / "known", 40, patient_id=lambda i: f"p{i // 2}")
    source, _ = planned("fracatlas", "--data-root", tmp_path / "known", "--ratios", "natural")
    split = {Path(name).stem: s for name, s in zip(source.names, source.split, strict=True)}
    assert all(split[f"IMG{i:07d}"] == split[f"IMG{i + 1:07d}"] for i in range(0, 80, 2))
    assert len(set(split.values())) == 3


def test_fracatlas_mistakes(refused, tmp_path):
    refused("fracatlas", says=["data/dataset.csv", "figshare", "--data-root"])
    table = fracatlas(tmp_path / "data", 4, 4) / "dataset.csv"
    good = table.read_text()
    for text, says in (
        (good.replace("fractured", "broken"), ["no column fractured", "image_id, hand"]),
        ("", ["no column image_id", "nothing"]),
        (good + "IMG0000002.jpg,1,0,1\n", ["image_id IMG0000002.jpg", "two lines"]),
        (good.replace("IMG0000002.jpg,1,0,1", "IMG0000002.jpg,1,0,0"), ["fractured = 1"]),
        ("\n".join(good.splitlines()[:-1]), ["IMG0000007.jpg", "fractured = 0"]),
    ):
        table.write_text(text)
        refused("fracatlas", says=["FracAtlas", *says])
    table.write_bytes(b"image_id,fractured\n\xff\xfe,1\n")
    refused("fracatlas", says=["dataset.csv", "UTF-8"])
    assert not Path("subsets").exists()


# --------------------------------------------------------------------------------------------------
# infarction
# --------------------------------------------------------------------------------------------------


def participants(n=60, side=10, channels=3):
    """Make {eid: float32 [C, H, W] on the 255 levels of uint8}, and labels: every tenth is 1."""
    rng, shape = np.random.default_rng(0), (channels, side, side + 2)
    scans = {
        str(1000000 + 17 * i): (rng.integers(0, 256, shape) / 255).astype(np.float32)
        for i in range(n)
    }
    return scans, {eid: int(i % 10 == 0) for i, eid in enumerate(scans)}


def biobank(root, scans, labels, kind):
    root.mkdir(parents=True)
    if kind == "pt":
        # some keys are numbers
        keys = [int(eid) if i % 2 else eid for i, eid in enumerate(scans)]
        tensors = map(torch.from_numpy, scans.values())
        torch.save(dict(zip(keys, tensors, strict=True)), root / "heart scans.pt")
    for eid, scan in scans.items():
        if kind == "npy":
            np.save(root / f"{eid}.npy", scan)
        if kind == "png":
            levels = np.rint(scan * 255).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(levels).save(root / f"{eid}.png")
    rows = [{"eid": eid, "label": label} for eid, label in labels.items()]
    write_table(root / "labels.csv", rows)
    return root


def test_cardiac_slices_in_any_form_give_the_same_subset(make, tmp_path):
    scans, labels = participants()
    written = {}
    for kind in ("pt", "npy", "png"):
        biobank(tmp_path / kind / "infarction", scans, labels, kind)
        words = "infarction", "--data-root", kind, "--name", kind, "--seed", 3
        make(*words, "--ratios", "natural")
        written[kind] = contents(Path("subsets", kind))
    for name in ("images.npy", "index.csv"):
        assert written["pt"][name] == written["npy"][name] == written["png"][name]
    subset, lines = natural("pt"), index(Path("subsets/pt"))
    # int(0.05 * 60) each for val and test
    assert [len(subset.splits[split]) for split in SPLITS] == [54, 3, 3]
    assert (subset.classes[1], subset.minority) == ("infarction", 1)
    assert (subset.size, subset.recipe) == (128, "cardiac")
    assert {line["source"]: int(line["label"]) for line in lines} == labels
    assert (subset.sizes == (10, 12)).all()
    [row] = [int(line["row"]) for line in lines if line["source"] == "1000017"]
    levels = np.rint(scans["1000017"] * 255).astype(np.uint8).transpose(1, 2, 0)
    expected = Image.fromarray(levels).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(subset.images[row], np.asarray(expected))
    # the folder itself; a table beside it is not read
    (tmp_path / "npy" / "notes.csv").write_text("a,b\n")
    words = "infarction", "--name", "npy", "--seed", 3, "--ratios", "natural", "--data-root"
    for root in ("npy", tmp_path / "npy" / "infarction"):
        assert "is there already" in make(*words, root).stdout


def test_participants_are_split_as_the_protocol_counts(planned, tmp_path):
    for n in (40, 59, 137):
        scans, labels = participants(n, side=4)
        labels = {eid: i % 2 for i, eid in enumerate(labels)}
        biobank(tmp_path / str(n), scans, labels, "pt")
        words = "infarction", "--data-root", tmp_path / str(n), "--ratios", "natural"
        source, rows = planned(*words)
        held_out = int(0.05 * n)
        expected = [n - 2 * held_out, held_out, held_out]
        assert [int((source.split == split).sum()) for split in SPLITS] == expected
        # stratified
        assert rows["natural"]["val"] == rows["natural"]["test"]


def test_cardiac_mistakes_in_the_images(make, refused, tmp_path):
    scans, labels = participants()
    root = biobank(tmp_path / "data" / "infarction", scans, labels, "pt")
    file = root / "heart scans.pt"
    tensors = {eid: torch.from_numpy(scan) for eid, scan in scans.items()}
    for value in (
        [torch.zeros(3, 4, 4)],
        {"1000000": np.zeros(3)},
        {**tensors, "1000017": torch.zeros(4, 4)},
        {**tensors, "1000017": torch.zeros(3, 4, 4, dtype=torch.bfloat16)},
        {**tensors, "1000017": "text"},
    ):
        torch.save(value, file)
        refused("infarction", says=["heart scans.pt", "not a dict of tensors", "torch.save"])
    file.write_bytes(b"text")
    refused("infarction", says=["heart scans.pt", "not a dict of tensors"])
    torch.save({eid: torch.zeros(2, 4, 4) for eid in tensors}, file)
    refused("infarction", says=["no image [3, H, W] or [1, H, W]"])
    for scan in (
        torch.full((3, 10, 12), float("nan")),
        torch.full((3, 10, 12), 1.5),
        torch.zeros(3, 10, 12, dtype=torch.int32),
        torch.zeros(1, 10, 12),
        # takes 4 bytes and declares 3 GiB
        torch.zeros(1, 1, 1).expand(3, 2**14, 2**14),
    ):
        torch.save({**tensors, "1000017": scan}, file)
        one_line(make("infarction", "--name", "x", code=2), "1000017", "--skip-bad")
    make("infarction", "--name", "x", "--skip-bad", "--ratios", "natural")
    assert len(index(Path("subsets/x"))) == 59
    np.save(root / "1000000.npy", scans["1000000"])
    refused("infarction", says=["found 2 files .npy .pt", "leave one .pt"])


def test_cardiac_mistakes_in_the_table(make, refused, tmp_path):
    refused("infarction", says=["data", "found 0 CSV files", "eid,label"])
    root = biobank(tmp_path / "data" / "infarction", *participants(), "npy")
    table = root / "labels.csv"
    good = table.read_text()
    for text, says in (
        (good.replace("eid", "id"), ["no column eid", "id, label"]),
        (good.replace("1000017,0", "1000017,2"), ["label of 1000017", "'2'", "0 or 1"]),
        (good.replace("1000017,0", "1000017,"), ["label of 1000017", "''"]),
        (good.replace("1000017", "1000000"), ["eid 1000000", "two lines"]),
        (good.replace("1000017", "1"), ["no image of '1'"]),
        ("eid,label\n1000000,1\n", ["1 participants", "40"]),
    ):
        table.write_text(text)
        refused("infarction", says=says)
    table.write_text("\n".join(good.splitlines()[:-1]))
    done = make("infarction", "--ratios", "natural")
    assert "left out: 1 images without a label" in done.stdout
    (root / "more.csv").write_text(good)
    refused("infarction", says=["found 2 CSV files"])


# --------------------------------------------------------------------------------------------------
# arrays: MedMNIST, any .npz, Fashion-MNIST
# --------------------------------------------------------------------------------------------------


def medmnist_like(path, classes=4, shape=(28, 28), findings=0, sizes=(48, 12, 16)):
    """Write an .npz of MedMNIST's layout; returns its arrays."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in zip(SPLITS, sizes, strict=True):
        labels = np.arange(n).astype(np.uint8)[:, None] % classes
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, findings)) if findings else labels
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("name", ["breastmnist", "pneumoniamnist"])
def test_medmnist_counts_and_pixels(make, name):
    path = real_data(f"{name}.npz")
    words = name, "--data-root", path.parent, "--size", 28, "--ratios", "natural", "99-1"
    make(*words)
    subset, expected = natural(name), DATASETS[name].counts
    assert counts(subset) == expected
    classes = {"breastmnist": ["malignant", "normal, benign"]}
    assert subset.classes == classes.get(name, ["normal", "pneumonia"])
    assert (subset.minority, subset.size, subset.recipe) == (0, 28, "medical")
    data = np.load(path)
    for split in SPLITS:
        rows, labels = subset.splits[split], data[f"{split}_labels"][:, 0]
        np.testing.assert_array_equal(subset.images[rows, ..., 0], data[f"{split}_images"])
        np.testing.assert_array_equal(subset.labels[rows], labels)
    rare = counts(well_formed(Path("subsets", name, "99-1.json")))
    assert rare["train"] == tuple(ratio_counts(expected["train"], [0.01, 0.99]))
    assert rare["test"] == expected["test"]
    done = make(*words, "--verify")
    assert "published" in done.stdout and "not the published" not in done.stdout
    if name == "breastmnist":
        leak = "breastmnist.npz/train/115 = breastmnist.npz/test/76"
        assert f"equal pictures in two splits or in both classes (1):\n  {leak}\n" in done.stdout


def test_medmnist_mistakes(refused, tmp_path, monkeypatch):
    refused("breastmnist", says=["breastmnist_224.npz", "--download", "medmnist.com"])
    refused("breastmnist", "--size", 32, says=["--size 32", "28, 64, 128, 224"])
    file = tmp_path / "data" / "breastmnist.npz"
    medmnist_like(file, classes=2)
    refused("breastmnist", says=["breastmnist_224.npz", "--size 28 is there"])
    good = file.read_bytes()
    for data in (good[: len(good) // 2], b"not an archive", b""):
        file.write_bytes(data)
        refused("breastmnist", "--size", 28, says=["breastmnist.npz", "damaged"])

    def offline(self):
        Path(self.root, "breastmnist_224.npz").write_bytes(b"half")
        raise RuntimeError("Automatic download failed!\nmany lines")

    monkeypatch.setattr(medmnist.BreastMNIST, "download", offline)
    words = "breastmnist", "--download", "--data-root", "new"
    refused(*words, says=["--download", "breastmnist_224.npz", "medmnist.com"])
    # half a download is removed
    assert not list(Path("new").iterdir()) and not Path("subsets").exists()


def test_a_download_is_moved_to_its_place_and_replaces_no_file(make, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        medmnist_like(Path(self.root, "breastmnist.npz"), classes=2)

    monkeypatch.setattr(medmnist.BreastMNIST, "download", download)
    for _ in range(2):
        make("breastmnist", "--size", 28, "--download", "--ratios", "50-50")
    assert len(calls) == 1 and [path.name for path in Path("data").iterdir()] == ["breastmnist.npz"]


def test_two_groups_of_the_classes_of_any_npz(make, tmp_path):
    arrays = medmnist_like(tmp_path / "data" / "octmnist.npz")
    words = "npz", "--data-root", "data/octmnist.npz", "--minority", "3", "--majority", "0,1"
    done = make(*words)
    subset = natural("octmnist")
    assert counts(subset) == {"train": (12, 24), "val": (3, 6), "test": (4, 8)}
    # MedMNIST's names for the file octmnist
    rest = "choroidal neovascularization + diabetic macular edema"
    assert subset.classes == ["normal", rest] and subset.minority == 0
    assert "left out: 19 images of neither class" in done.stdout
    assert (subset.size, subset.recipe) == (28, "medical")
    for line in index(Path("subsets/octmnist")):
        split, i = line["source"].split("/")[1:]
        pixels = arrays[f"{split}_images"][int(i)]
        np.testing.assert_array_equal(subset.images[int(line["row"]), ..., 0], pixels)
        assert int(line["label"]) == (arrays[f"{split}_labels"][int(i), 0] != 3)
    make(*words, "--verify")
    # against all others
    words = "npz", "--data-root", "data/octmnist.npz", "--minority", "2", "--name", "rest"
    make(*words, "--ratios", "natural")
    assert counts(natural("rest"))["train"] == (12, 36)


def test_colour_images_of_two_classes_need_no_flags(make, tmp_path):
    file = tmp_path / "data" / "colours.npz"
    arrays = medmnist_like(file, classes=2, shape=(12, 10, 3), sizes=(20, 8, 9))
    make("npz", "--data-root", file, "--ratios", "natural")
    subset = natural("colours")
    assert (subset.classes, subset.recipe, subset.size) == (["0", "1"], "natural", 12)
    assert subset.images.shape == (37, 12, 12, 3)
    pixels = Image.fromarray(arrays["train_images"][3]).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(subset.images[3], np.asarray(pixels))


def test_an_image_may_have_several_findings(make, planned, tmp_path):
    file = tmp_path / "data" / "chestmnist.npz"
    arrays = medmnist_like(file, findings=14, shape=(4, 4), sizes=(60, 40, 40))
    labels = np.concatenate([arrays[f"{split}_labels"] for split in SPLITS])
    words = "npz", "--data-root", file, "--ratios", "natural", "--minority", "3"
    source, _ = planned(*words, "--majority", "0,6")
    rare, other = labels[:, 3] == 1, (labels[:, 0] == 1) | (labels[:, 6] == 1)
    assert source.classes == ["infiltration", "atelectasis + pneumonia"]
    expected = [(rare & ~other).sum(), (other & ~rare).sum()]
    assert [(source.labels == c).sum() for c in (0, 1)] == expected
    neither, both = (~rare & ~other).sum(), (rare & other).sum()
    assert source.notes == [f"left out: {neither} images of neither class, {both} of both"]
    source, _ = planned(*words, "--name", "any")
    assert (source.labels == 0).sum() == rare.sum() and len(source.labels) == len(labels)


def test_npz_mistakes(refused, tmp_path):
    refused("npz", "--data-root", "x.npz", says=["x.npz", "no such file", "train_images"])
    file = tmp_path / "data" / "some.npz"
    arrays = medmnist_like(file)
    refused("npz", says=["--data-root data", "needs one", "some.npz"])
    words = ["npz", "--data-root", "data/some.npz"]
    refused(*words, says=["name the rare one with --minority", "0, 1, 2, 3"])
    refused(*words, "--majority", "1", says=["name the rare one with --minority"])
    refused(*words, "--minority", "7", says=["--minority 7", "no class '7'", "0, 1, 2, 3"])
    refused(*words, "--minority", "1", "--majority", "x", says=["--majority x", "no class 'x'"])
    refused(*words, "--minority", "1,2", "--majority", "2,3", says=["must differ"])
    refused(*words, "--minority", "1", "--majority", "", says=["--majority", "no class"])
    for name, array in (
        ("train_images", arrays["train_images"].astype(np.float32)),
        ("train_images", arrays["train_images"][..., None, None]),
        ("val_images", arrays["val_images"][:, :9]),
        ("val_images", np.asfortranarray(arrays["val_images"])),
        ("test_labels", arrays["test_labels"][:-1]),
        ("test_labels", np.array([{}], dtype=object)),
    ):
        np.savez(file, **{**arrays, name: array})
        refused(*words, "--minority", "1", says=["some.npz", "damaged, or not of MedMNIST's"])
    np.savez(file, **{name: arrays[name] for name in arrays if "test" not in name})
    refused(*words, "--minority", "1", says=["some.npz", "test_images"])


def fashion(root, sizes=(300, 60)):
    """Make the four files of Fashion-MNIST, smaller; returns images and labels of train, t10k."""
    root.mkdir()
    rng, made = np.random.default_rng(5), []
    for file, n in zip(("train", "t10k"), sizes, strict=True):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim])
            head += b"".join(size.to_bytes(4, "big") for size in array.shape)
            (root / f"{file}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
        made.append((images, labels))
    return made


def test_fashion_mnist(make, planned, tmp_path):
    train, test = fashion(tmp_path / "data")
    make("fashionmnist", "--ratios", "natural")
    subset = natural("fashionmnist")
    # 10 % of each class of train become val
    assert counts(subset) == {"train": (27, 81), "val": (3, 9), "test": (6, 18)}
    assert subset.classes == ["shirt", "T-shirt + pullover + coat"]
    assert (subset.minority, subset.size, subset.recipe) == (0, 28, "medical")
    for line in index(Path("subsets/fashionmnist")):
        file, i = line["source"].split("/")
        images, labels = test if file == "t10k" else train
        np.testing.assert_array_equal(subset.images[int(line["row"]), ..., 0], images[int(i)])
        assert int(line["label"]) == (labels[int(i)] != 6)
        assert (line["split"] == "test") == (file == "t10k")
    source, _ = planned("fashionmnist", "--data-root", "data", "--minority", "9", "--majority", "7")
    assert source.classes == ["ankle boot", "sneaker"]


def test_fashion_mnist_mistakes(refused, tmp_path):
    fashion(tmp_path / "data")
    refused("fashionmnist", "--minority", "10", says=["no class '10'", "9 ankle boot"])
    file = tmp_path / "data" / "train-labels-idx1-ubyte.gz"
    good = file.read_bytes()
    raw = gzip.decompress(good)
    wrong_type = gzip.compress(b"\0\0\x08\x03" + raw[4:])
    for data in (good[:-20], gzip.compress(raw[:-1]), wrong_type, b""):
        file.write_bytes(data)
        refused("fashionmnist", says=["train-labels-idx1-ubyte.gz: damaged"])
    file.unlink()
    refused("fashionmnist", says=["train-labels-idx1-ubyte.gz", "dataset-fashion-mnist"])


# --------------------------------------------------------------------------------------------------
# iNaturalist
# --------------------------------------------------------------------------------------------------

TREE = {
    "Animalia_Chordata_Mammalia_Artiodactyla_Bovidae_Bos_taurus": (21, 3),
    "Animalia_Chordata_Mammalia_Carnivora_Felidae_Felis_catus": (25, 4),
    "Animalia_Chordata_Mammalia_Carnivora_Ursidae_Ursus_arctos": (15, 2),
    "Plantae_Tracheophyta_Liliopsida_Poales_Poaceae_Bosia_tauri": (3, 3),
}


def test_inat21_mini_mammals_counts(planned):
    source, rows = planned("inat21-mammals", "--data-root", real_data("inat21_mini"))
    # 95 % of 3000 and 6500; val and test balanced
    assert rows["natural"] == {"train": (2850, 6175), "val": (150, 150), "test": (300, 300)}
    for split, expected in (("val", [150, 325]), ("test", [300, 650])):
        assert np.bincount(source.labels[source.split == split]).tolist() == expected
    train = [rows[ratio]["train"] for ratio in ("99-1", "95-5", "50-50")]
    assert train == [(28, 2821), (142, 2707), (1425, 1425)]


def test_some_of_inat21_mini_is_packed(make, tmp_path):
    root = real_data("inat21_mini")
    for split, n in (("train", 8), ("val", 2)):
        for folder in sorted((root / split).iterdir()):
            (tmp_path / "data" / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:n]:
                os.symlink(image, tmp_path / "data" / image.relative_to(root))
    make("inat21-mammals", "--ratios", "natural")
    subset = natural("inat21-mammals")
    n = [6 * 8, 13 * 8]
    assert counts(subset)["train"] == tuple(c - c // 20 for c in n)
    assert counts(subset)["val"] == (2, 2) and counts(subset)["test"] == (12, 12)
    assert subset.classes == ["Artiodactyla", "Carnivora"] and subset.minority == 0
    assert (subset.size, subset.recipe) == (224, "natural")
    assert (subset.sizes == 64).all() and subset.images.shape[1:] == (64, 64, 3)
    line = index(Path("subsets/inat21-mammals"))[17]
    pixels = np.asarray(Image.open(root / line["source"]).convert("RGB"))
    np.testing.assert_array_equal(subset.images[17], pixels)


def test_inat21_taxa(planned, refused, tmp_path):
    root = inat_folder(tmp_path / "data" / "inat21", TREE)
    # data/inat21 is found from data
    words = "--ratios", "natural", "--data-root"
    source, rows = planned("inat21-mammals", *words, tmp_path / "data")
    assert rows["natural"] == {"train": (20, 38), "val": (1, 1), "test": (3, 3)}
    taxa = "--minority", "felidae/FELIS", "--majority", "Bovidae_Bos"
    source, rows = planned("inat21", *taxa, *words, root)
    # the first one named is the minority, though not the rarer one
    assert source.classes == ["Felis", "Bos"] and source.minority == 0
    assert rows["natural"]["train"] == (24, 20)
    taxa = "inat21", "--data-root", root, "--majority", "Carnivora", "--minority"
    refused(*taxa, "Artiodactila", says=["--minority Artiodactila", "Artiodactyla"])
    # only whole names and consecutive levels match
    refused(*taxa, "Bo", says=["--minority Bo", "Bos"])
    refused(*taxa, "Mammalia/Bovidae", says=["no such taxon"])
    refused(*taxa, "Felidae", says=["overlap", "Felis_catus"])
    refused("inat21", "--minority", "Bos", says=["--majority", "taxon"])
    refused("inat21-plants", says=["--minority", "Quercus"])
    refused("inat21-mammals", "--minority", "Bos", says=["--minority", "does not take"])
    missing = "inat21-mammals", "--data-root", "nowhere"
    refused(*missing, says=["nowhere", "train/ and val/", "github.com/visipedia"])
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    refused("inat21-mammals", "--data-root", "empty", says=["no such taxon", "NNNNN_Kingdom"])
    for image in (root / "val" / f"00000_{list(TREE)[0]}").iterdir():
        image.unlink()
    refused("inat21-mammals", "--name", "x", says=["no image of Artiodactyla in test"])


@pytest.mark.parametrize("train, val", INAT21_FOLDERS[1:])
def test_inat21_under_the_other_names_of_its_folders(planned, tmp_path, train, val):
    inat_folder(tmp_path / "a", TREE)
    inat_folder(tmp_path / "b", TREE)
    for split, name in (("train", train), ("val", val)):
        (tmp_path / "b" / split).rename(tmp_path / "b" / name)
    one, rows = planned("inat21-mammals", "--data-root", tmp_path / "a")
    two, others = planned("inat21-mammals", "--data-root", tmp_path / "b")
    assert rows == others and (one.split == two.split).all()
    assert [two.names[i].split("/")[0] for i in (0, -1)] == [train, val]
    if train == "2021_train":
        # torchvision reads the same folders
        assert len(INaturalist(str(tmp_path / "b"), version="2021_train")) == 64


# --------------------------------------------------------------------------------------------------
# folders
# --------------------------------------------------------------------------------------------------


def test_chestxray224_counts_and_its_patients(planned):
    words = "--data-root", real_data("chestxray224"), "--patient", r"(person\d+|IM-\d+)"
    source, rows = planned("folder", *words)
    assert rows["natural"] == {"train": (1066, 3065), "val": (61, 210), "test": (214, 600)}
    assert source.classes == ["normal", "pneumonia"] and rows["99-1"]["train"] == (10, 1055)


def test_a_folder_of_any_pictures_keeps_geometry_and_names(make, tmp_path):
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
    # lies on its side
    exif[0x0112] = 6
    picture(root / "b c" / "turned.jpg", seed=1, size=(40, 10), exif=exif)
    (root / "b c" / ".hidden.jpg").write_bytes(b"no image")
    (root / ".cache").mkdir()
    done = make("folder", "--data-root", root, "--ratios", "natural")
    assert "10 % for val" in done.stdout and "grey" not in done.stdout
    subset, lines = natural("Röntgen bilder"), {}
    for line in index(Path("subsets/Röntgen bilder")):
        lines[line["source"]] = line
    assert len(lines) == 57 and "b c/deep/er/alpha.webp" in lines
    assert subset.classes == ["b c", "grün"] and subset.minority == 0
    assert {s: sum(counts(subset)[s]) for s in SPLITS} == {"train": 39, "val": 6, "test": 12}
    # the longest side of all images
    assert subset.images.shape[1:] == (40, 40, 3)
    for name in ("grey.png", "turned.jpg"):
        assert (lines[f"b c/{name}"]["width"], lines[f"b c/{name}"]["height"]) == ("10", "40")
    upright = Image.open(root / "b c" / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    expected = np.asarray(upright.resize((40, 40), Image.Resampling.BICUBIC))
    row = int(lines["b c/turned.jpg"]["row"])
    np.testing.assert_array_equal(subset.images[row], expected)


@pytest.mark.parametrize("name", ["valid", "Validation", "val"])
def test_splits_given_as_folders_and_drawn_by_patient(make, planned, refused, tmp_path, name):
    root = tmp_path / "clinic"
    for split, n in (("train", 40), ("test", 8)):
        for i in range(n):
            label = "ill" if i % 4 == 0 else "well"
            picture(root / split / label / f"p{split[:2]}{i // 2}_scan{i}.png", seed=i, mode="L")
    patient = "--patient", "^(p[a-z]+[0-9]+)_"
    words = "folder", "--data-root", root, "--ratios", "natural"
    done = make(*words, *patient)
    assert "drawn from train: 10 % for val, by patient (20 patients)" in done.stdout
    assert "every image is grey; --grayscale" in done.stdout
    splits = {}
    for line in index(Path("subsets/clinic")):
        splits.setdefault(line["source"].split("/")[-1].split("_")[0], set()).add(line["split"])
    assert all(len(found) == 1 for found in splits.values())
    found = counts(natural("clinic"))
    assert found["test"] == (2, 6) and sum(found["val"]) in (4, 6)
    source, _ = planned(*words, "--grayscale", "--minority", "well")
    assert source.minority == 1 and source.channels == 1
    refused(*words, "--patient", "scan1(x)", says=["--patient", "finds no patient in"])
    refused(*words, "--patient", "(", says=["--patient (", "not a regular expression"])
    refused(*words, "--minority", "il", says=["--minority il", "choose from ill, well"])
    picture(root / name / "ill" / "pva0_scan0.png")
    picture(root / name / "well" / "pva1_scan0.png")
    source, rows = planned(*words, *patient)
    assert rows["natural"] == {"train": (10, 30), "val": (1, 1), "test": (2, 6)}
    shutil.copy(root / "train" / "ill" / "ptr0_scan0.png", root / "test" / "ill" / "ptr0_x.png")
    refused(*words, *patient, says=["patient ptr0", "in train"])


def test_two_groups_of_several_class_folders(planned, refused, tmp_path):
    trees = {"Eiche": 12, "Buche": 10, "Fichte": 16, "Ahorn, rot": 9}
    root = plain_folder(tmp_path / "Bäume", trees, size=(4, 4))
    words = "folder", "--data-root", root, "--ratios", "natural"
    source, _ = planned(*words, "--minority", "Eiche", "--majority", "Buche,Fichte,Buche")
    assert source.classes == ["Buche+Fichte", "Eiche"] and source.minority == 1
    assert np.bincount(source.labels).tolist() == [26, 12]
    folders = {name.split("/")[0] for name in np.array(source.names)[source.labels == 0]}
    assert folders == {"Buche", "Fichte"}
    # a comma in a name
    source, _ = planned(*words, "--minority", "Ahorn, rot")
    assert source.classes == ["Ahorn, rot", "rest"] and source.minority == 0
    assert (source.labels == 1).sum() == 38
    refused(*words, says=["4 classes (Ahorn, rot, Buche, Eiche, Fichte)", "--minority A"])
    refused(*words, "--minority", "Eiche,Bucha", says=["--minority Eiche,Bucha", "'Bucha'"])
    words = *words, "--minority", "Eiche"
    refused(*words, "--majority", "Buche,Eiche", says=["must differ"])
    refused(*words, "--majority", "", says=["--majority", "no class ''"])


def test_folder_mistakes(refused, tmp_path):
    refused("folder", says=["--data-root data", "no such folder", "<class>/"])
    (tmp_path / "data").mkdir()
    refused("folder", says=["data", "0 classes (none)", "two are needed"])
    plain_folder(tmp_path / "data", {"a": 2, "b": 2, "c": 1}, size=(4, 4))
    refused("folder", says=["3 classes (a, b, c)", "--minority A", "--majority B,C"])
    shutil.rmtree("data/c")
    shutil.rmtree("data/b")
    refused("folder", says=["1 classes (a)", "two are needed"])
    for name in ("test", "Test"):
        plain_folder(tmp_path / "data", {name: 1}, size=(4, 4))
        refused("folder", says=[name, "named like a split", "rename"])
        shutil.rmtree(f"data/{name}")
    plain_folder(tmp_path / "data" / "train", {"a": 3, "b": 3}, size=(4, 4))
    refused("folder", says=["train", "there is also a"])
    shutil.rmtree("data/a")
    plain_folder(tmp_path / "data" / "val", {"a": 3}, size=(4, 4))
    refused("folder", says=["no image of b in val", "add images"])
    (tmp_path / "data" / "valid").mkdir()
    refused("folder", says=["train, val", "there is also valid"])
    shutil.rmtree("data")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "scan.raw").touch()
    refused("folder", says=["no images", "ignored 2 other files (2 .raw), first a/scan.raw"])
    assert not Path("subsets").exists()


# --------------------------------------------------------------------------------------------------
# all data sets
# --------------------------------------------------------------------------------------------------


def test_all_builds_what_is_found_and_names_the_rest(make, refused, tmp_path):
    root = inat_folder(tmp_path / "data", TREE)
    fracatlas(tmp_path / "data", 30)
    biobank(tmp_path / "data" / "infarction", *participants(), "npy")
    medmnist_like(root / "breastmnist.npz", classes=2)
    medmnist_like(root / "pneumoniamnist_64.npz", classes=2, shape=(64, 64))
    (root / "FracAtlas/images/Fractured/IMG0000000.jpg").write_bytes(b"broken")
    words = "all", "--ratios", "natural"
    done = make(*words, code=2)
    assert "IMG0000000.jpg: cannot identify image file" in done.stderr
    assert "failed: fracatlas; fix the errors above" in done.stderr.splitlines()[-1]
    assert "not found: inat21-plants (github.com/visipedia" in done.stdout
    assert "not found: inat21-mammals" not in done.stdout
    sizes = dict(breastmnist=28, pneumoniamnist=64, infarction=128) | {"inat21-mammals": 224}
    assert {name: natural(name).size for name in sizes} == sizes
    assert not Path("subsets/fracatlas/natural.json").exists()
    done = make(*words, "--skip-bad")
    assert done.stdout.count("is there already") == 4 and natural("fracatlas").size == 224
    (root / "infarction" / "1000000.npy").unlink()
    (root / "infarction" / "1000000.npy").symlink_to("nowhere")
    # one that cannot be read does not stop the others
    done = make("all", "--verify", "--skip-bad", code=2)
    assert done.stdout.count("verified subsets/") == 4
    assert done.stderr.splitlines()[-1].startswith("make_subsets.py: failed: infarction")


def test_all_needs_a_data_set(make, refused):
    assert make("all", code=2).stderr.endswith("put one there as listed above\n")
    refused("all", "--name", "x", says=["--name", "does not take"])


def test_the_list_of_data_sets_needs_no_package(tmp_path):
    inat_folder(tmp_path, dict(list(TREE.items())[:2]))
    command = [sys.executable, "-S", "-m", "datasets", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"inat21-mammals\t-\t{tmp_path}\n"
    assert done.stderr.count("not found: ") == 6
