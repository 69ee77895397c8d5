"""The data sets as they are downloaded: FracAtlas, cardiac MRI, iNaturalist, any .npz, several class folders; leaks, --verify, all."""

import csv
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line, real_data
from pictures import contents, counts, inat_folder, index, picture, plain_folder, well_formed
from PIL import Image

from datasets import DATASETS, INAT21_FOLDERS
from datasets.source import SPLITS, draw_splits


def table(path, rows):
    """A CSV of dicts."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def record(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# FracAtlas ----------------------------------------------------------------------------------------------------------------


def fracatlas(root, fractured=12, others=40, **more):
    """FracAtlas as it unpacks, with fewer and smaller pictures; more: further columns of dataset.csv, functions of the number."""
    rows = []
    for i in range(fractured + others):
        name, broken = f"IMG{i:07d}.jpg", i < fractured
        picture(
            root / "FracAtlas" / "images" / ("Fractured" if broken else "Non_fractured") / name,
            seed=i,
            size=(37, 45),
        )
        rows.append(
            {
                "image_id": name,
                "hand": 1,
                "multiscan": i % 2,
                "fractured": int(broken),
                **{key: f(i) for key, f in more.items()},
            }
        )
    table(root / "FracAtlas" / "dataset.csv", rows)
    return root / "FracAtlas"


def test_fracatlas_is_split_kept_grey_and_read_as_far_as_it_goes(make, tmp_path):
    atlas = fracatlas(tmp_path / "data")
    cut = atlas / "images" / "Fractured" / "IMG0000003.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    done = make("fracatlas")
    subset = well_formed(Path("subsets/fracatlas/natural.json"))
    assert counts(subset) == {"train": (8, 28), "val": (1, 4), "test": (3, 8)}
    assert (subset.classes, subset.minority, subset.size, subset.recipe) == (
        ["Fractured", "Non_fractured"],
        0,
        224,
        "medical",
    )
    assert subset.images.shape == (52, 45, 45, 1)
    name = "images/Fractured/IMG0000003.jpg"
    assert (
        record("subsets/fracatlas/natural.json")["truncated"]
        == [name]
        == record("subsets/fracatlas/50-50.json")["truncated"]
    )
    assert (
        f"as far as they go (1):\n  {name}" in done.stdout
        and "expected          501 / 2356" in done.stdout
    )
    line = next(line for line in index(Path("subsets/fracatlas")) if line["source"] == name)
    from PIL import ImageFile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        whole = Image.open(cut).convert("L").resize((45, 45), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(subset.images[int(line["row"]), ..., 0], np.asarray(whole))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert (
        make("fracatlas", "--ratios", "80-20").stdout.count(name) == 1
    )  # a ratio added later has the list, too
    assert record("subsets/fracatlas/80-20.json")["truncated"] == [name]
    make("fracatlas", "--verify")
    make(
        "fracatlas", "--data-root", atlas, "--out", "other", "--ratios", "natural"
    )  # the folder itself
    one, two = contents(Path("subsets/fracatlas")), contents(Path("other/fracatlas"))
    assert one["images.npy"] == two["images.npy"] and one["index.csv"] == two["index.csv"]


def test_fracatlas_published_counts_follow_from_the_split():
    labels = np.array([0] * 717 + [1] * 3366)
    split = draw_splits(labels, {"test": 20, "val": 10}, seed=0)
    assert {part: tuple(np.bincount(labels[split == part])) for part in SPLITS} == DATASETS[
        "fracatlas"
    ].counts


def test_fracatlas_keeps_copies_and_known_patients_in_one_split(make, tmp_path):
    atlas = fracatlas(tmp_path / "data")
    for i in range(14, 26):  # twelve copies of one file
        shutil.copy(
            atlas / "images/Non_fractured/IMG0000013.jpg",
            atlas / f"images/Non_fractured/IMG{i:07d}.jpg",
        )
    done = make("fracatlas", "--ratios", "natural")
    split = {Path(line["source"]).stem: line["split"] for line in index(Path("subsets/fracatlas"))}
    assert (
        len({split[f"IMG{i:07d}"] for i in range(13, 26)}) == 1
        and "equal pictures" not in done.stdout
    )
    fracatlas(tmp_path / "named", 40)
    make("fracatlas", "--data-root", "named", "--name", "named", "--ratios", "natural")
    shutil.rmtree("named")
    fracatlas(tmp_path / "named", 40, patient_id=lambda i: f"p{i // 2}")
    one_line(
        make("fracatlas", "--data-root", "named", "--name", "named", code=2),
        "made with other settings",
        "source",
    )
    make("fracatlas", "--data-root", "named", "--name", "known", "--ratios", "natural")
    split = {Path(line["source"]).stem: line["split"] for line in index(Path("subsets/known"))}
    assert (
        all(split[f"IMG{i:07d}"] == split[f"IMG{i + 1:07d}"] for i in range(0, 80, 2))
        and len(set(split.values())) == 3
    )


def test_fracatlas_mistakes(refused, tmp_path):
    refused("fracatlas", says=["data", "FracAtlas", "figshare"])
    atlas = fracatlas(tmp_path / "data", 4, 4)
    file, good = atlas / "dataset.csv", (atlas / "dataset.csv").read_text()
    for text, says in (
        (good.replace("fractured", "broken"), ["no column fractured", "image_id, hand"]),
        ("", ["no column image_id", "nothing"]),
        (good.splitlines()[0] + "\n", ["no line below"]),
        (good.replace("IMG0000005.jpg", "../../x.jpg"), ["line 7", "../../x.jpg"]),
        (
            good.replace("IMG0000002.jpg,1,0,1", "IMG0000002.jpg,1,0,2"),
            ["line 4", "'2'", "neither 0 nor 1"],
        ),
        (
            good.replace("IMG0000002.jpg,1,0,1", "IMG0000002.jpg,1,0,0"),
            ["line 4", "lies in Fractured"],
        ),
        (good + "IMG0000002.jpg,1,0,1\n", ["line 10", "a second time"]),
        ("\n".join(good.splitlines()[:-1]), ["IMG0000007.jpg", "not in dataset.csv"]),
    ):
        file.write_text(text)
        refused("fracatlas", says=["FracAtlas", *says])
    file.write_text(good)
    shutil.copy(
        atlas / "images/Fractured/IMG0000001.jpg", atlas / "images/Non_fractured/IMG0000001.jpg"
    )
    refused("fracatlas", says=["Non_fractured/IMG0000001.jpg", "a second file of this name"])
    file.write_bytes(b"image_id,fractured\n\xff\xfe,1\n")
    refused("fracatlas", says=["dataset.csv", "UTF-8"])
    assert not Path("subsets").exists()


# infarction ---------------------------------------------------------------------------------------------------------------


def participants(n=60, side=20, channels=3):
    """{eid: float32 [C, H, W] in [0, 1]}, on the 255 levels of uint8; and labels of which every tenth is 1."""
    rng = np.random.default_rng(0)
    scans = {
        str(1000000 + 17 * i): (rng.integers(0, 256, (channels, side, side + 4)) / 255).astype(
            np.float32
        )
        for i in range(n)
    }
    return scans, {eid: int(i % 10 == 0) for i, eid in enumerate(scans)}


def biobank(root, scans, labels, kind):
    root.mkdir(parents=True)
    if kind == "pt":
        torch.save(
            {
                (int(eid) if i % 2 else eid): torch.from_numpy(scan)
                for i, (eid, scan) in enumerate(scans.items())
            },
            root / "heart scans.pt",
        )
    for eid, scan in scans.items():
        if kind == "npy":
            np.save(root / f"{eid}.npy", scan)
        if kind == "png":
            Image.fromarray(np.rint(scan * 255).astype(np.uint8).transpose(1, 2, 0)).save(
                root / f"{eid}.png"
            )
    table(root / "labels.csv", [{"eid": eid, "label": label} for eid, label in labels.items()])
    return root


@pytest.mark.parametrize("kind", ["pt", "npy", "png"])
def test_cardiac_slices_from_any_form_give_the_same_subset(make, tmp_path, kind):
    scans, labels = participants()
    root = biobank(tmp_path / "data" / "infarction", scans, labels, kind)
    make("infarction", "--seed", 3, "--ratios", "natural", "60-40")
    subset = well_formed(Path("subsets/infarction/natural.json"))
    assert [len(subset.splits[part]) for part in SPLITS] == [54, 3, 3]  # int(0.05 * 60) each
    assert (subset.classes[1], subset.minority, subset.size, subset.recipe) == (
        "infarction",
        1,
        128,
        "cardiac",
    )
    lines = index(Path("subsets/infarction"))
    assert {line["source"]: int(line["label"]) for line in lines} == labels and (
        subset.sizes == (20, 24)
    ).all()
    one = {line["source"]: subset.images[int(line["row"])] for line in lines}["1000017"]
    levels = np.rint(scans["1000017"] * 255).astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(
        one, np.asarray(Image.fromarray(levels).resize((24, 24), Image.Resampling.BICUBIC))
    )
    split = {line["source"]: line["split"] for line in lines}
    if kind == "pt":
        make("infarction", "--seed", 3, "--verify")
        make(
            "infarction", "--data-root", root, "--out", "again", "--seed", 3, "--ratios", "natural"
        )
    else:
        biobank(tmp_path / "tensors", scans, labels, "pt")
        make(
            "infarction",
            "--data-root",
            "tensors",
            "--out",
            "again",
            "--seed",
            3,
            "--ratios",
            "natural",
        )
        assert {line["source"]: line["split"] for line in index(Path("again/infarction"))} == split
        assert (
            contents(Path("again/infarction"))["images.npy"]
            == contents(Path("subsets/infarction"))["images.npy"]
        )


def test_cardiac_split_by_participant_as_the_protocol_counts(planned, tmp_path):
    for n in (40, 59, 137):  # protocol.json: int(0.05 * n)
        scans, labels = participants(n, side=4)
        biobank(tmp_path / str(n), scans, {eid: int(i % 2) for i, eid in enumerate(labels)}, "pt")
        source, rows = planned(
            "infarction", "--data-root", tmp_path / str(n), "--ratios", "natural"
        )
        assert [int((source.split == part).sum()) for part in SPLITS] == [
            n - 2 * int(0.05 * n),
            int(0.05 * n),
            int(0.05 * n),
        ]
        assert rows["natural"]["val"] == rows["natural"]["test"]  # stratified


def test_cardiac_mistakes(make, refused, tmp_path):
    refused("infarction", says=["data", "no CSV (eid,label)"])
    scans, labels = participants()
    root = biobank(tmp_path / "data" / "infarction", scans, labels, "pt")
    scan_file = root / "heart scans.pt"
    good, tensors = (
        scan_file.read_bytes(),
        {eid: torch.from_numpy(scan) for eid, scan in scans.items()},
    )

    class Anything:
        def __reduce__(self):
            return (Path("executed").touch, ())

    for what in ({"1000000": Anything()}, {"1000000": np.zeros(3)}):
        torch.save(what, scan_file)
        refused("infarction", says=["heart scans.pt", "not a file of tensors", "no other object"])
    assert not Path("executed").exists()  # no pickle is executed
    for data in (good[: len(good) // 2], b"", b"text"):
        scan_file.write_bytes(data)
        refused("infarction", says=["heart scans.pt", "not a file of tensors"])
    for what in (
        [torch.zeros(3, 4, 4)],
        {**tensors, "1000017": torch.zeros(4, 4)},
        {**tensors, "1000017": torch.zeros(3, 4, 4, dtype=torch.bfloat16)},
        {**tensors, "1000017": "text"},
    ):
        torch.save(what, scan_file)
        refused("infarction", says=["heart scans.pt", "no tensor [C, H, W]"])
    torch.save({**tensors, "1000000": torch.zeros(2, 4, 4)}, scan_file)
    refused("infarction", says=["2 (participant 1000000), 3 (participant 1000017)", "three slices"])
    torch.save({**tensors, 1000017: tensors["1000017"]}, scan_file)
    refused("infarction", says=["participant 1000017 a second time"])
    for strange in (
        torch.full((3, 20, 24), float("nan")),
        torch.full((3, 20, 24), 1.5),
        torch.zeros(3, 20, 24, dtype=torch.int32),
        torch.zeros(1, 1, 1).expand(3, 2**15, 2**15),
    ):  # this one takes 4 bytes and declares 12 GiB
        torch.save({**tensors, "1000017": strange}, scan_file)
        one_line(make("infarction", "--name", "x", code=2), "1000017", "--skip-bad")
    make("infarction", "--name", "x", "--skip-bad", "--ratios", "natural")
    assert len(index(Path("subsets/x"))) == 59
    scan_file.write_bytes(good)
    sheet = (root / "labels.csv").read_text()
    for text, says in (
        (sheet.replace("eid", "id"), ["no column eid", "id, label"]),
        (sheet.replace("1000017,0", "1000017,2"), ["line 3", "'2'"]),
        (sheet.replace("1000017,0", "1000017,"), ["line 3", "''"]),
        (sheet.replace("1000017", "1000000"), ["line 3", "a second time"]),
        (sheet.replace("1000017", "1"), ["participant '1' has no image"]),
    ):
        (root / "labels.csv").write_text(text)
        refused("infarction", says=["labels.csv", *says])
    (root / "labels.csv").write_text("\n".join(sheet.splitlines()[:-1]))
    assert (
        "left out: 1 images without a line in labels.csv"
        in make("infarction", "--name", "fewer", "--ratios", "natural").stdout
    )
    (root / "more.csv").write_text(sheet)
    refused("infarction", says=["labels.csv and more.csv"])
    (root / "more.csv").unlink()
    np.save(root / "1000000.npy", scans["1000000"])
    refused("infarction", says=["holds 2 files .npy .pt", "leave one .pt"])
    scan_file.unlink()
    np.save(root / "1000000.npy", np.array([{}], dtype=object))
    (root / "labels.csv").write_text("eid,label\n1000000,1\n")
    refused("infarction", says=["labels.csv", "1 participants", "40 at least"])


# any .npz, two of its classes -------------------------------------------------------------------------------------------


def medmnist_like(path, classes=4, shape=(28, 28), findings=0, sizes=(48, 12, 16)):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in zip(SPLITS, sizes):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (
            rng.integers(0, 2, (n, findings))
            if findings
            else np.arange(n).astype(np.uint8)[:, None] % classes
        )
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    return arrays


def test_two_groups_of_the_classes_of_any_npz(make, tmp_path):
    arrays = medmnist_like(tmp_path / "data" / "octmnist.npz")
    done = make("npz", "--data-root", "data/octmnist.npz", "--minority", "3", "--majority", "0,1")
    subset = well_formed(Path("subsets/octmnist/natural.json"))
    assert (
        counts(subset) == {"train": (12, 24), "val": (3, 6), "test": (4, 8)}
        and subset.minority == 0
    )
    assert subset.classes == [
        "normal",
        "choroidal neovascularization + diabetic macular edema",
    ]  # MedMNIST's names for octmnist
    assert "left out: 19 images of neither class" in done.stdout and (
        subset.size,
        subset.recipe,
    ) == (28, "medical")
    for line in index(Path("subsets/octmnist")):
        part, i = line["source"].split("/")[1:]
        np.testing.assert_array_equal(
            subset.images[int(line["row"]), ..., 0], arrays[f"{part}_images"][int(i)]
        )
        assert int(line["label"]) == (arrays[f"{part}_labels"][int(i), 0] != 3)
    make(
        "npz",
        "--data-root",
        "data/octmnist.npz",
        "--minority",
        "3",
        "--majority",
        "0,1",
        "--verify",
    )
    make(
        "npz", "--data-root", "data/octmnist.npz", "--minority", "2", "--name", "rest"
    )  # against all others
    assert counts(well_formed(Path("subsets/rest/natural.json")))["train"] == (12, 36)
    colour = medmnist_like(
        tmp_path / "data" / "colours.npz", classes=2, shape=(12, 10, 3), sizes=(20, 8, 9)
    )
    make(
        "npz", "--data-root", "data/colours.npz", "--ratios", "natural"
    )  # two classes: none has to be named
    subset = well_formed(Path("subsets/colours/natural.json"))
    assert (subset.classes, subset.recipe, subset.size) == (
        ["0", "1"],
        "natural",
        12,
    ) and subset.images.shape == (37, 12, 12, 3)
    np.testing.assert_array_equal(
        subset.images[3],
        np.asarray(
            Image.fromarray(colour["train_images"][3]).resize((12, 12), Image.Resampling.BICUBIC)
        ),
    )


def fashion(root, sizes=(300, 60)):
    """Fashion-MNIST's four files, smaller; returns images and labels of both parts."""
    root.mkdir()
    rng, parts = np.random.default_rng(5), []
    for part, n in zip(("train", "t10k"), sizes):
        images, labels = (
            rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
            (np.arange(n) % 10).astype(np.uint8),
        )
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(
                size.to_bytes(4, "big") for size in array.shape
            )
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
        parts.append((images, labels))
    return parts


def test_fashion_mnist(make, refused, tmp_path):
    parts = fashion(tmp_path / "data")
    make("fashionmnist", "--data-root", "data")
    subset = well_formed(Path("subsets/fashionmnist/natural.json"))
    assert counts(subset) == {
        "train": (27, 81),
        "val": (3, 9),
        "test": (6, 18),
    }  # 10 % of train, of each class
    assert (subset.classes, subset.minority, subset.size) == (
        ["shirt", "T-shirt + pullover + coat"],
        0,
        28,
    )
    for line in index(Path("subsets/fashionmnist")):
        part, i = line["source"].split("/")
        images, labels = parts[part == "t10k"]
        np.testing.assert_array_equal(subset.images[int(line["row"]), ..., 0], images[int(i)])
        assert int(line["label"]) == (labels[int(i)] != 6) and (line["split"] == "test") == (
            part == "t10k"
        )
    make("fashionmnist", "--data-root", "data", "--verify")
    make(
        "fashionmnist",
        "--data-root",
        "data",
        "--minority",
        "9",
        "--majority",
        "7",
        "--name",
        "shoes",
        "--ratios",
        "natural",
    )
    assert well_formed(Path("subsets/shoes/natural.json")).classes == ["ankle boot", "sneaker"]
    refused(
        "fashionmnist",
        "--data-root",
        "data",
        "--minority",
        "10",
        "--name",
        "x",
        says=["no class 10", "9 ankle boot"],
    )
    file = tmp_path / "data" / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for damage in (
        whole[:-20],
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\x08\x03" + gzip.decompress(whole)[4:]),
        b"",
    ):
        file.write_bytes(damage)
        refused(
            "fashionmnist",
            "--data-root",
            "data",
            "--name",
            "x",
            says=["train-labels-idx1-ubyte.gz: damaged"],
        )
    file.unlink()
    refused(
        "fashionmnist",
        "--data-root",
        "data",
        "--name",
        "x",
        says=["train-labels-idx1-ubyte.gz: no such file", "dataset-fashion-mnist"],
    )


def test_findings_of_which_an_image_may_have_several(make, tmp_path):
    arrays = medmnist_like(tmp_path / "data" / "chestmnist.npz", findings=14, sizes=(60, 40, 40))
    labels = np.concatenate([arrays[f"{part}_labels"] for part in SPLITS])
    done = make(
        "npz",
        "--data-root",
        "data/chestmnist.npz",
        "--minority",
        "3",
        "--majority",
        "0,6",
        "--ratios",
        "natural",
    )
    few, many = labels[:, 3] == 1, (labels[:, 0] == 1) | (labels[:, 6] == 1)
    subset = well_formed(Path("subsets/chestmnist/natural.json"))
    assert subset.classes == ["infiltration", "atelectasis + pneumonia"]
    assert [int((subset.labels == c).sum()) for c in (0, 1)] == [
        int((few & ~many).sum()),
        int((many & ~few).sum()),
    ]
    assert (
        f"left out: {(~few & ~many).sum()} images of neither class, {(few & many).sum()} of both"
        in done.stdout
    )
    make(
        "npz",
        "--data-root",
        "data/chestmnist.npz",
        "--minority",
        "3",
        "--name",
        "any",
        "--ratios",
        "natural",
    )
    assert (well_formed(Path("subsets/any/natural.json")).labels == 0).sum() == few.sum()


def test_npz_mistakes(make, refused, tmp_path):
    refused(
        "npz", "--data-root", "nowhere.npz", says=["nowhere.npz", "no such file", "train_images"]
    )
    file = tmp_path / "data" / "some.npz"
    arrays = medmnist_like(file)
    refused("npz", says=["--data-root data", "the file itself", "some.npz"])
    words = ["npz", "--data-root", "data/some.npz"]
    refused(*words, says=["--minority", "rare one", "0, 1, 2, 3"])
    refused(*words, "--majority", "1", says=["--minority", "rare one"])
    refused(*words, "--minority", "7", says=["--minority 7", "no class 7", "0, 1, 2, 3"])
    refused(*words, "--minority", "1", "--majority", "x", says=["--majority x", "no class x"])
    refused(*words, "--minority", "1,2", "--majority", "2,3", says=["both name class 2"])
    refused(*words, "--minority", "1", "--majority", "", says=["--majority", "no class"])
    good = file.read_bytes()
    strange = {
        "train_images": [
            arrays["train_images"][0],
            arrays["train_images"].astype(np.int32),
            np.zeros((48, 8, 8, 8), np.uint8),
            np.asfortranarray(arrays["train_images"]),
            np.array([{}] * 48),
        ],
        "val_images": [arrays["val_images"][..., :20]],
        "train_labels": [
            np.eye(48, 3, dtype=np.int8) * 2 - 1,
            arrays["train_labels"][:5],
            arrays["train_labels"] / 2,
            np.array([["a"]] * 48),
            np.array([[{}]] * 48),
        ],
    }
    for name, values in strange.items():
        for value in values:
            np.savez(file, **{**arrays, name: value})
            refused(*words, "--minority", "1", says=["some.npz", "not of MedMNIST's layout", name])
    np.savez(file, **{key: value for key, value in arrays.items() if key != "val_labels"})
    refused(*words, "--minority", "1", says=["some.npz", "val_labels"])
    with zipfile.ZipFile(file, "w") as archive:  # declares 2 TB
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w") as out:
                shape = (2**31, 28, 28) if key == "train_images" else value.shape
                np.lib.format.write_array_header_1_0(
                    out, {"descr": value.dtype.str, "fortran_order": False, "shape": shape}
                )
                out.write(value.tobytes())
    refused(*words, "--minority", "1", says=["some.npz", "not as many as declared"])
    assert not Path("subsets").exists()
    at = good.index(b"train_images.npy") + 3000  # damaged inside, the list of contents is whole
    file.write_bytes(good[:at] + bytes(40) + good[at + 40 :])
    refused(*words, "--minority", "1", says=["some.npz", "damaged"])


# class folders ------------------------------------------------------------------------------------------------------------


def test_two_groups_of_several_class_folders(make, refused, tmp_path):
    root = plain_folder(
        tmp_path / "Bäume",
        {"Eiche": 12, "Ahorn, rot": 14, "Buche": 10, "Fichte": 16},
        suffix=".png",
    )
    done = make(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Eiche",
        "--majority",
        "Buche,Fichte",
        "--ratios",
        "natural",
    )
    subset = well_formed(Path("subsets/Bäume/natural.json"))
    assert (
        subset.classes == ["Buche+Fichte", "Eiche"]
        and subset.minority == 1
        and "left out: 1 class folder" in done.stdout
    )
    assert [int((subset.labels == c).sum()) for c in (0, 1)] == [26, 12]
    assert {
        line["source"].split("/")[0]
        for line in index(Path("subsets/Bäume"))
        if line["label"] == "0"
    } == {"Buche", "Fichte"}
    make(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Ahorn, rot",
        "--name",
        "rest",
        "--ratios",
        "natural",
    )  # a comma in a name
    subset = well_formed(Path("subsets/rest/natural.json"))
    assert (
        subset.classes == ["Ahorn, rot", "rest"]
        and subset.minority == 0
        and (subset.labels == 1).sum() == 38
    )
    refused(
        "folder",
        "--data-root",
        root,
        says=["4 (Ahorn, rot, Buche, Eiche, Fichte)", "--minority A", "--majority B,C"],
    )
    refused(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Eiche,Bucha",
        says=["--minority Eiche,Bucha", "Bucha", "Buche"],
    )
    refused(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Eiche",
        "--majority",
        "Buche,Eiche",
        says=["must differ"],
    )
    refused(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Eiche",
        "--majority",
        "",
        says=["--majority", "no such class folder"],
    )
    make(
        "folder",
        "--data-root",
        root,
        "--minority",
        "Eiche",
        "--majority",
        "Buche,Buche",
        "--ratios",
        "natural",
        "--name",
        "twice",
    )
    assert len(index(Path("subsets/twice"))) == 22
    for name in ("Eiche", "Buche"):
        plain_folder(tmp_path / "given" / "train", {name: 8})
        plain_folder(tmp_path / "given" / "test", {name: 4, "Fichte": 3})
    make(
        "folder",
        "--data-root",
        "given",
        "--minority",
        "Eiche",
        "--majority",
        "Buche",
        "--ratios",
        "natural",
    )
    assert counts(well_formed(Path("subsets/given/natural.json")))["test"] == (4, 4)


def test_16_bit_images_are_scaled_and_32_bit_ones_refused(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 12, "b": 12}, suffix=".png", mode="L")
    ramp = (np.arange(24 * 16).reshape(16, 24) * 170).astype(np.uint16)
    Image.fromarray(ramp).save(root / "a" / "deep.png")
    Image.fromarray(ramp).save(root / "b" / "deep.tiff")
    make("folder", "--grayscale", "--ratios", "natural")
    subset = well_formed(Path("subsets/data/natural.json"))
    expected = Image.fromarray((ramp >> 8).astype(np.uint8)).resize(
        (24, 24), Image.Resampling.BICUBIC
    )
    rows = [int(line["row"]) for line in index(Path("subsets/data")) if "deep" in line["source"]]
    assert len(rows) == 2 and all(
        (subset.images[row, ..., 0] == np.asarray(expected)).all() for row in rows
    )
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        Image.fromarray(ramp.astype(dtype)).save(root / "a" / "wide.tiff")
        done = make("folder", "--grayscale", "--ratios", "natural", "--name", "wide", code=2)
        one_line(done, "a/wide.tiff", f"mode {mode}", "--skip-bad")


# iNaturalist --------------------------------------------------------------------------------------------------------------

TREE = {
    "Animalia_Chordata_Mammalia_Artiodactyla_Bovidae_Bos_taurus": (21, 3),
    "Animalia_Chordata_Mammalia_Carnivora_Felidae_Felis_catus": (25, 4),
}


@pytest.mark.parametrize("train, val", INAT21_FOLDERS[1:])
def test_inat21_by_the_other_names_of_its_parts(make, tmp_path, train, val):
    inat_folder(tmp_path / "data", TREE)
    make("inat21-mammals", "--ratios", "natural", "--out", "plain")
    for part, name in (("train", train), ("val", val)):
        (tmp_path / "data" / part).rename(tmp_path / "data" / name)
    make("inat21-mammals", "--ratios", "natural")
    one, two = contents(Path("plain/inat21-mammals")), contents(Path("subsets/inat21-mammals"))
    assert (
        one["images.npy"] == two["images.npy"]
        and record("subsets/inat21-mammals/natural.json")["splits"]
        == json.loads(one["natural.json"])["splits"]
    )
    assert [line["source"].split("/")[0] for line in index(Path("subsets/inat21-mammals"))][
        ::46
    ] == [train, val]
    if train == "2021_train":
        from torchvision.datasets import INaturalist

        assert (
            len(INaturalist(str(tmp_path / "data"), version="2021_train")) == 46
        )  # torchvision reads the same tree


# leaks, --verify, all -----------------------------------------------------------------------------------------------------


def test_the_leak_of_breastmnist_is_named_and_kept(make):
    path = real_data("breastmnist.npz")
    done = make(
        "breastmnist", "--data-root", path.parent, "--size", 28, "--ratios", "natural", "95-5"
    )
    leak = ["breastmnist.npz/train/115", "breastmnist.npz/test/76"]
    assert (
        f"WARNING: equal pictures in two splits or in both classes (1):\n  {' = '.join(leak)}\n"
        in done.stdout
    )
    assert (
        record("subsets/breastmnist/natural.json")["leaks"]
        == record("subsets/breastmnist/95-5.json")["leaks"]
        == [leak]
    )
    assert (
        counts(well_formed(Path("subsets/breastmnist/natural.json")))
        == DATASETS["breastmnist"].counts
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")  # a bar that does not count
        make(
            "breastmnist",
            "--data-root",
            path.parent,
            "--size",
            28,
            "--ratios",
            "natural",
            "--out",
            "quiet",
        )
    assert record("quiet/breastmnist/natural.json")["leaks"] == [leak]
    done = make("breastmnist", "--data-root", path.parent, "--size", 28, "--verify")
    assert (
        " = ".join(leak) in done.stdout
        and "expected           147 / 399         21 / 57        42 / 114   as it is" in done.stdout
    )
    assert "780 images decoded again, 95-5, natural drawn again" in done.stdout


def test_leaks_are_equal_pictures_across_splits_or_classes_only(make, tmp_path):
    root = plain_folder(tmp_path / "data" / "train", {"a": 10, "bb": 10}, suffix=".png")
    plain_folder(tmp_path / "data" / "test", {"a": 3, "bb": 3}, suffix=".png", size=(20, 20))
    shutil.copy(
        root / "a" / "a 000.png", root / "a" / "copy.png"
    )  # no leak: same class; val is drawn by chance
    shutil.copy(root / "a" / "a 001.png", root / "bb" / "both classes.png")
    shutil.copy(root / "bb" / "bb 002.png", root.parent / "test" / "bb" / "two splits.png")
    Image.open(root / "bb" / "bb 003.png").resize((48, 32), Image.Resampling.NEAREST).save(
        root / "a" / "larger.png"
    )  # other true size
    Image.open(root / "bb" / "bb 004.png").save(
        root.parent / "test" / "a" / "as bmp.bmp"
    )  # other file, equal picture
    make("folder", "--seed", 1, "--ratios", "natural")
    leaks = {
        frozenset(Path(name).name for name in same)
        for same in record("subsets/data/natural.json")["leaks"]
    }
    split = {Path(line["source"]).name: line["split"] for line in index(Path("subsets/data"))}
    expected = {
        frozenset(pair)
        for pair in (
            ("a 001.png", "both classes.png"),
            ("bb 002.png", "two splits.png"),
            ("bb 004.png", "as bmp.bmp"),
        )
    }
    assert split["a 000.png"] == split["copy.png"] and leaks == expected
    assert len(index(Path("subsets/data"))) == 31  # nothing is dropped


def test_verify_finds_what_was_changed_in_the_subset_or_in_its_source(make, refused, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 60})
    refused("folder", "--verify", says=["subsets/data", "no finished subset", "without --verify"])
    (root / "a" / "a 007.jpg").write_bytes(b"broken")
    make("folder", "--skip-bad", "--ratios", "natural", "60-40")
    for workers in (1, 2):
        assert (
            "99 images decoded again"
            in make("folder", "--skip-bad", "--verify", "--workers", workers).stdout
        )
    image, size = root / "b" / "b 050.jpg", (root / "b" / "b 050.jpg").stat().st_size
    good = image.read_bytes()
    image.write_bytes(
        (root / "b" / "b 051.jpg").read_bytes()[:size].ljust(size, b"\0")
    )  # another picture in as many bytes
    refused(
        "folder", "--skip-bad", "--verify", says=["images.npy", "1 of 99 images", "b/b 050.jpg"]
    )
    image.write_bytes(good)
    file = Path("subsets/data/60-40.json")
    whole, changed = file.read_text(), record(file)
    changed["splits"]["train"][0] = changed["splits"]["val"][0]
    file.write_text(json.dumps(changed))
    refused(
        "folder",
        "--skip-bad",
        "--verify",
        says=["60-40.json", "not what its images and its seed give: splits"],
    )
    for key, value in (
        ("mean", [0.1, 0.2, 0.3]),
        ("size", 99),
        ("classes", ["x", "y"]),
        ("leaks", [["q", "z"]]),
        ("minority", 1),
    ):
        file.write_text(json.dumps({**json.loads(whole), key: value}))
        refused("folder", "--skip-bad", "--verify", says=["60-40.json", f"its seed give: {key}"])
    file.write_text(whole)
    refused(
        "folder",
        "--skip-bad",
        "--verify",
        "--ratios",
        "natural",
        "70-30",
        says=["no finished 70-30"],
    )
    data = bytearray(Path("subsets/data/images.npy").read_bytes())
    data[-1] ^= 1
    Path("subsets/data/images.npy").write_bytes(data)
    refused("folder", "--skip-bad", "--verify", says=["images.npy", "checksum"])
    (root / "b" / "new.jpg").write_bytes(good)
    refused("folder", "--skip-bad", "--verify", says=["100 images", "101 images", "there"])


def test_all_builds_what_is_there_and_names_the_rest(make, refused, tmp_path):
    refused("all", says=["--data-root data", "none of the data sets lies there"])
    root = inat_folder(tmp_path / "data", TREE)
    fracatlas(tmp_path / "data", 30)
    biobank(tmp_path / "data" / "infarction", *participants(), "npy")
    medmnist_like(root / "breastmnist.npz", classes=2)
    medmnist_like(root / "pneumoniamnist_64.npz", classes=2, shape=(64, 64))
    (root / "FracAtlas/images/Fractured/IMG0000000.jpg").write_bytes(b"broken")
    done = make("all", "--ratios", "natural", "60-40", code=2)
    assert "IMG0000000.jpg: not an image" in done.stderr and done.stderr.splitlines()[-1].endswith(
        "failed: fracatlas; mend what is said of it above and give the same command again"
    )
    made = {
        path.name: load(path)
        for path in Path("subsets").iterdir()
        if (path / "natural.json").exists()
    }
    assert made == {
        "breastmnist": 28,
        "pneumoniamnist": 64,
        "infarction": 128,
        "inat21-mammals": 224,
    }
    assert (
        "not found: inat21-plants (github.com/visipedia" in done.stdout
        and "not found: inat21-mammals" not in done.stdout
    )
    done = make("all", "--ratios", "natural", "60-40", "--skip-bad")
    assert done.stdout.count("is there already") == 4 and load(Path("subsets/fracatlas")) == 224
    assert make("all", "--verify", "--skip-bad").stdout.count("verified subsets/") == 5
    refused("all", "--name", "x", says=["--name", "does not take"])
    (root / "infarction" / "1000000.npy").unlink()
    (root / "infarction" / "1000000.npy").symlink_to("nowhere")
    done = make(
        "all", "--verify", "--skip-bad", code=2
    )  # one that cannot be read does not stop the others
    assert done.stdout.count("verified subsets/") == 4 and done.stderr.splitlines()[-1].startswith(
        "make_subsets.py: failed: infarction"
    )


def test_what_an_earlier_version_left_is_refused_or_done_again(make, refused, tmp_path):
    plain_folder(tmp_path / "data", {"a": 40, "b": 40})
    (tmp_path / "data" / "a" / "bad.jpg").write_bytes(b"")
    make("folder", "--ratios", "natural", code=2)
    (tmp_path / "data" / "a" / "bad.jpg").unlink()
    journal = Path("subsets/data/.part-journal.jsonl")
    head, *lines = [json.loads(line) for line in journal.read_text().splitlines()]
    del head["rows"]
    journal.write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                head,
                *([start, crc, [row[:3] for row in rows]] for start, crc, rows in lines),
            )
        )
    )
    assert "going on" not in make("folder", "--ratios", "natural").stdout
    Path("subsets/data/.part-60-40.json").write_text('{"torn')  # by a kill
    file = Path("subsets/data/natural.json")
    good = record(file)
    assert "is there already" in make("folder", "--ratios", "natural").stdout
    file.write_text(
        json.dumps({key: value for key, value in good.items() if key not in ("truncated", "leaks")})
    )
    refused("folder", "--ratios", "natural", says=["subsets/data", "earlier version"])
    refused("folder", "--verify", says=["subsets/data", "earlier version"])


def test_the_place_of_the_data_does_not_matter(make, tmp_path):
    biobank(tmp_path / "data" / "infarction", *participants(), "npy")
    make("infarction", "--ratios", "natural")
    assert (
        "is there already"
        in make("infarction", "--data-root", tmp_path / "data", "--ratios", "natural").stdout
    )
    (tmp_path / "data" / "notes.csv").write_text("a,b\n")  # beside infarction/: not its table
    assert "is there already" in make("infarction", "--ratios", "natural").stdout


def test_12_bits_in_16_are_too_dark_to_pass_unnoticed(make, tmp_path):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((9, 9), 4095 - i, np.uint16)).save(
                tmp_path / "data" / label / f"{i}.png"
            )
    assert (
        "WARNING: no pixel is brighter than 15 of 255"
        in make("folder", "--grayscale", "--ratios", "natural").stdout
    )


def load(folder):
    return well_formed(folder / "natural.json").size


def test_the_catalogue_needs_no_package(tmp_path):
    import subprocess
    import sys

    inat_folder(tmp_path, TREE)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "datasets", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and done.stdout == f"inat21-mammals\t-\t{tmp_path}\n"
        and done.stderr.count("not found: ") == 6
    )
