"""Images as users have them: a table of labels, DICOM files, few images of a class."""

import csv
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT, one_line
from pictures import counts, index, picture, plain_folder, well_formed
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1

from datasets.images import list_images, read_image
from datasets.source import SPLITS
from datasets.splits import draw_fold, draw_splits


def natural(name):
    return well_formed(Path("subsets", name, "natural.json"))


# --------------------------------------------------------------------------------------------------
# a table of labels
# --------------------------------------------------------------------------------------------------


def scans(root, n=40, columns=("path", "label"), **options):
    """Make images and a table; every fourth image is ill. Returns the rows of the table."""
    rows = []
    for i in range(n):
        name = f"ward {i % 3}/scan {i:02d}.png"
        picture(root / name, seed=i, size=(12, 10))
        values = name, "ill" if i % 4 == 0 else "well", f"p{i // 2}", SPLITS[max(0, i // 4 % 4 - 1)]
        rows.append(dict(zip(columns, values, strict=False)))
    write(root / "labels.csv", rows, **options)
    return rows


def write(path, rows, delimiter=",", encoding="utf-8", newline="\n"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)


WORDS = ("table", "--data-root", "data", "--labels", "data/labels.csv", "--ratios", "natural")


def test_a_table_gives_the_subset_that_folders_give(make, tmp_path):
    rows = scans(tmp_path / "data")
    make(*WORDS, "--name", "table")
    for row in rows:
        path = tmp_path / "folders" / row["label"] / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "data" / row["path"], path)
    make("folder", "--data-root", "folders", "--ratios", "natural", "--name", "folder")
    table, folder = natural("table"), natural("folder")
    assert table.classes == folder.classes == ["ill", "well"] and table.minority == 0
    assert counts(table) == counts(folder) == {"train": (7, 21), "val": (1, 3), "test": (2, 6)}
    labels = {line["source"]: line["class"] for line in index(Path("subsets/table"))}
    assert labels == {row["path"]: row["label"] for row in rows}
    make(*WORDS, "--name", "table", "--verify")


@pytest.mark.parametrize(
    "options",
    [dict(delimiter=";", encoding="utf-8-sig", newline="\r\n"), dict(delimiter="\t"), {}],
    ids=["German Excel", "tabs", "commas"],
)
def test_tables_as_programs_write_them(planned, tmp_path, options):
    columns = "Bild", "Befund"
    rows = scans(tmp_path / "data", columns=columns)
    for row in rows:
        row["Bild"] = row["Bild"].replace("/", "\\")
        row["Befund"] = {"ill": "Fraktur, alt", "well": "o. B."}[row["Befund"]]
    write(tmp_path / "data/labels.csv", rows, **options)
    words = *WORDS[1:5], "--path-column", "Bild", "--label-column", "Befund"
    source, _ = planned("table", *(tmp_path / w if "data" in w[:5] else w for w in words))
    assert source.classes == ["Fraktur, alt", "o. B."]
    assert np.bincount(source.labels).tolist() == [10, 30]


def test_patients_and_splits_of_a_table(make, refused, tmp_path):
    rows = scans(tmp_path / "data", 80, ("path", "label", "patient"))
    done = make(*WORDS)
    assert "by patient (40 patients)" in done.stdout
    split = {line["source"]: line["split"] for line in index(Path("subsets/data"))}
    patients = {row["patient"]: set() for row in rows}
    for row in rows:
        patients[row["patient"]].add(split[row["path"]])
    assert all(len(found) == 1 for found in patients.values())

    rows = scans(tmp_path / "data", 80, ("path", "label", "patient", "split"))
    for i, row in enumerate(rows):
        row["patient"] = f"p{i}"
        row["split"] = row["split"].replace("val", "Validation")
    write(tmp_path / "data/labels.csv", rows)
    refused(*WORDS, says=["made with other settings", "--name"])
    make(*WORDS, "--name", "given")
    split = {line["source"]: line["split"] for line in index(Path("subsets/given"))}
    assert split == {row["path"]: row["split"].replace("Validation", "val") for row in rows}
    refused(*WORDS, "--test-share", 0.3, says=["--test-share", "have splits", "leave it out"])
    refused(*WORDS, "--folds", 3, says=["--folds", "have splits", "leave it out"])
    rows[8]["patient"] = rows[0]["patient"]
    write(tmp_path / "data/labels.csv", rows)
    refused(*WORDS, says=["patient p0", "in train and in another split", "into one"])


def test_absolute_paths_and_columns_that_are_not_used(make, tmp_path):
    rows = scans(tmp_path / "data")
    table = tmp_path / "data/labels.csv"
    write(table, [{**row, "path": tmp_path / "data" / row["path"], "site": "s1"} for row in rows])
    note = "columns that are not used: site"
    assert f"{note}; --patient-column keeps a patient" in make(*WORDS).stdout
    assert {line["source"] for line in index(Path("subsets/data"))} == {r["path"] for r in rows}
    patients = [{**row, "patient": i, "site": "s1"} for i, row in enumerate(rows)]
    write(table, patients)
    assert f"{note}\n" in make(*WORDS, "--name", "patients").stdout


def test_labels_of_a_table_become_two_classes(make, planned, refused, tmp_path):
    rows = scans(tmp_path / "data")
    for i, row in enumerate(rows):
        row["label"] = str(i % 4)
    rows.append(rows[0])
    write(tmp_path / "data/labels.csv", rows)
    picture(tmp_path / "data/ward 0/unlisted.png")
    refused(*WORDS, says=["labels.csv", "4 classes (0, 1, 2, 3)", "--minority"])
    refused(*WORDS, "--minority", "7", says=["--minority 7", "no class '7'", "0, 1, 2, 3"])
    done = make(*WORDS, "--minority", "2", "--majority", "0,1")
    assert "left out: 10 images of other labels (10 3)\n" in done.stdout
    assert "left out: 1 images without a line in data/labels.csv\n" in done.stdout
    assert natural("data").classes == ["0+1", "2"] and natural("data").minority == 1


def test_mistakes_in_a_table(refused, tmp_path):
    table = tmp_path / "data/labels.csv"
    rows = scans(tmp_path / "data")
    good = table.read_text()
    picture(tmp_path / "scan.png")
    for text, says in (
        (good.replace("path", "file"), ["no column path, only file, label", "--path-column"]),
        (good.replace("scan 03", "x").replace("scan 05", "y"), ["2 of 40 files", "ward 0/x.png"]),
        (good.replace("ward 1/scan 01.png,well", "ward 1/scan 01.png,"), ["1 lines have no label"]),
        (good.replace(",well", ",ill"), ["1 classes (ill)", "two are needed"]),
        (good + "ward 0/scan 00.png,well\n", ["ward 0/scan 00.png", "label ill and well"]),
        (good + "ward 0/scan 00.png,well,old\n", ["line 42 has too many cells"]),
        (good + "../scan.png,ill\n", ["data/../scan.png is not below data", "--data-root"]),
        ("", ["no column path, only nothing"]),
    ):
        table.write_text(text)
        refused(*WORDS, says=["data/labels.csv", *says])
    write(table, [row | {"split": "tset"} for row in rows])
    refused(*WORDS, says=["split 'tset' of data/ward 0/scan 00.png", "train, val or test"])
    write(table, [row | {"split": "val"} for row in rows])
    refused(*WORDS, says=["no line has the split train"])
    table.write_bytes(good.encode("utf-16"))
    refused(*WORDS, says=["labels.csv", "UTF-8"])
    table.write_text(good)
    refused(*WORDS, "--patient-column", "id", says=["no column id, only path, label"])
    refused("table", says=["--labels", "data/labels.csv"])
    refused("table", "--labels", "x.csv", says=["x.csv: no such file", "data/labels.csv"])
    refused("table", "--data-root", "no", "--labels", "x.csv", says=["--data-root no"])
    refused("folder", "--labels", "x.csv", says=["--labels", "does not take it"])
    (tmp_path / "data/ward 1").rename(tmp_path / "data/ward 0/1")
    (tmp_path / "data/ward 2").rename(tmp_path / "data/ward 0/2")
    says = ["make_subsets.py table --data-root data --labels data/labels.csv"]
    refused("folder", says=says)
    refused("folder", "--data-root", "data/ward 0/1", says=["0 classes"])
    assert not Path("subsets").exists()


# --------------------------------------------------------------------------------------------------
# DICOM
# --------------------------------------------------------------------------------------------------


def dicom(path, pixels, bits=12, patient="", kind="MONOCHROME2", **elements):
    """Save a DICOM file; pixels [H, W], [H, W, 3] or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        "1.2.840.10008.5.1.4.1.1.7",
        "1.2",
    )
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.PatientID, file.Modality = patient, "CR"
    if pixels is not None:
        file.Rows, file.Columns = pixels.shape[:2]
        file.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        file.PhotometricInterpretation, file.PlanarConfiguration = kind, 0
        file.BitsAllocated = 8 * pixels.itemsize
        file.BitsStored, file.HighBit = min(bits, file.BitsAllocated), bits - 1
        file.PixelRepresentation = int(pixels.dtype.kind == "i")
        file.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


def ramp(low, high, dtype=np.uint16):
    return np.linspace(low, high, 12 * 16).round().astype(dtype).reshape(12, 16)


def test_grey_values_of_dicom(tmp_path):
    """Rescaled, cut to the first window or spread over the range, inverted for MONOCHROME1."""

    def read(pixels, **elements):
        return read_image(dicom(tmp_path / "a.dcm", pixels, **elements), grayscale=True)[..., 0]

    x = ramp(100, 3000)
    spread = np.rint(255 * (x - 100.0) / 2900)
    np.testing.assert_array_equal(read(x), spread)
    np.testing.assert_array_equal(read(x, kind="MONOCHROME1"), np.rint(255 * (3000.0 - x) / 2900))
    # CT: slope and intercept, then the window of DICOM PS3.3, C.11.2.1.2.1
    hu = x * 2.0 - 1024
    window = np.rint(255 * np.clip((hu - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1))
    ct = dict(RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    np.testing.assert_array_equal(read(x, **ct), window)
    ct |= dict(WindowCenter=[40, 900], WindowWidth=[400, 50])
    np.testing.assert_array_equal(read(x, **ct), window)
    np.testing.assert_array_equal(read(x, kind="MONOCHROME1", **ct), 255 - window)
    signed = ramp(-1000, 900, np.int16)
    np.testing.assert_array_equal(read(signed, bits=16), np.rint(255 * (signed + 1000.0) / 1900))
    assert (read(np.full((4, 4), 7, np.uint16)) == 0).all()
    # what --predict reads
    assert dicom(tmp_path / "IM1", x) in list_images(tmp_path)
    colours = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    path = dicom(tmp_path / "colours", colours, bits=8, kind="RGB")
    np.testing.assert_array_equal(read_image(path), colours)


def test_dicom_folders_keep_patients_and_files_without_a_suffix(make, tmp_path):
    for i in range(40):
        label, suffix = "ill" if i < 12 else "well", ("", ".dcm", ".DCM", ".113")[i % 4]
        path = tmp_path / "data" / label / f"IM{i:04d}{suffix}"
        dicom(path, ramp(i, 900 + i), patient=f"person {i // 2}")
    (tmp_path / "data/ill/README").write_text("no image")
    done = make("folder", "--ratios", "natural")
    assert "ignored 1 other files (1 no suffix), first ill/README\n" in done.stdout
    assert "by patient (20 patients)" in done.stdout
    subset = natural("data")
    # one channel without --grayscale
    assert subset.images.shape == (40, 16, 16, 1) and subset.recipe == "medical"
    splits = {}
    for line in index(Path("subsets/data")):
        number = int(Path(line["source"]).stem[2:])
        splits.setdefault(number // 2, set()).add(line["split"])
    assert all(len(found) == 1 for found in splits.values())
    # a regular expression replaces PatientID
    done = make("folder", "--ratios", "natural", "--patient", r"IM(\d+)", "--name", "other")
    assert "by patient (40 patients)" in done.stdout


def test_dicom_in_a_table(make, tmp_path):
    rows = []
    for i in range(40):
        dicom(tmp_path / f"data/{i}", ramp(i, 900), patient=f"p{i // 2}")
        rows.append({"path": str(i), "label": int(i < 12)})
    write(tmp_path / "data/labels.csv", rows)
    assert "by patient (20 patients)" in make(*WORDS).stdout
    write(tmp_path / "data/labels.csv", [row | {"patient": i} for i, row in enumerate(rows)])
    assert "by patient (40 patients)" in make(*WORDS, "--name", "column").stdout


@pytest.mark.parametrize(
    "ids, says", [("", "40 DICOM files have no PatientID"), ("x", "one PatientID")]
)
def test_patient_ids_that_tell_nothing_are_named(make, tmp_path, ids, says):
    for i in range(40):
        dicom(tmp_path / "data" / "ab"[i % 2] / f"{i}.dcm", ramp(i, 900), patient=ids)
    done = make("folder", "--ratios", "natural")
    assert says in done.stdout and "by patient" not in done.stdout


def test_dicom_mistakes_are_one_line(make, refused, tmp_path, monkeypatch):
    for i in range(24):
        dicom(tmp_path / "data" / "ab"[i % 2] / f"{i}.dcm", ramp(i, 900), patient=f"p{i}")
    bad = tmp_path / "data/a/bad.dcm"
    compressed = dicom(bad, ramp(0, 900))
    file = pydicom.dcmread(compressed)
    file.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    file.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    file["PixelData"].is_undefined_length = True
    file.save_as(tmp_path / "compressed.dcm")
    for says, save in (
        (["without pixels"], lambda: dicom(bad, None)),
        (["3 frames", "each frame"], lambda: dicom(bad, ramp(0, 9), NumberOfFrames=3)),
        (["JPEG Lossless"], lambda: shutil.copy(tmp_path / "compressed.dcm", bad)),
        (["not a DICOM file"], lambda: bad.write_bytes(b"text")),
        (["DICOM colours", "PNG"], lambda: dicom(bad, np.zeros((4, 4, 3), np.uint16), kind="RGB")),
    ):
        save()
        refused("folder", says=["a/bad.dcm", "--skip-bad", *says])
    make("folder", "--skip-bad", "--ratios", "natural")
    assert len(index(Path("subsets/data"))) == 24
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("folder", "--name", "x", says=["25 DICOM files", "pip install pydicom"])


# --------------------------------------------------------------------------------------------------
# few images of a class
# --------------------------------------------------------------------------------------------------


def test_each_split_gets_a_patient_of_each_class_where_possible():
    """Six rare patients of thirty-six, which shares of 20 and 10 % could leave out."""
    patients = np.repeat(np.arange(36), 5)
    labels = (patients >= 30).astype(int)
    for seed in range(20):
        split = draw_splits(labels, {"test": 20, "val": 10}, seed, patients)
        for name in SPLITS:
            assert set(labels[split == name]) == {0, 1}
        assert all(len(set(split[patients == p])) == 1 for p in range(36))
    # one patient has most images
    patients = np.repeat([0, 1, 2, 3, 4, 5], [90, 1, 1, 40, 40, 40])
    split = draw_splits(np.repeat([1, 0], [92, 120]), {"test": 20, "val": 10}, 0, patients)
    assert all(len(set(split[patients < 3]) & {name}) for name in SPLITS)


def test_shares_of_the_splits(planned, refused):
    _, rows = planned("digits", "--test-share", "0.3", "--val-share", "0.2", "--ratios", "natural")
    total = np.array([901, 896])
    for split, share in (("test", 0.3), ("val", 0.2)):
        assert np.abs(rows["natural"][split] - share * total).max() <= 1
    for share in ("0", "1", "20", "x"):
        refused("digits", "--val-share", share, says=["--val-share"])
    refused("digits", "--val-share", "20", says=["share between 0 and 1, such as 0.2"])
    refused("inat21-mammals", "--val-share", "0.2", says=["--val-share", "does not take it"])


def test_folds_test_every_image_once(make, refused, tmp_path):
    root = plain_folder(tmp_path / "data", {"common": 40, "rare": 8}, size=(8, 8))
    words = "folder", "--ratios", "natural", "--patient", r" 0*(\d+)"
    refused(*words, "--folds", 9, says=["--folds 9", "8 patients", "--folds 8 or less"])
    done = make(*words, "--folds", 4)
    assert re.findall("next: python pretrain.py (.*?) ", done.stdout) == [
        "subsets/data-fold4/natural.json"
    ]
    tested = []
    for fold in range(1, 5):
        subset = natural(f"data-fold{fold}")
        assert subset.name == f"data-fold{fold}"
        assert all(min(n) > 0 for n in counts(subset).values())
        lines = index(Path(f"subsets/data-fold{fold}"))
        tested += [line["source"] for line in lines if line["split"] == "test"]
        assert json.loads(subset.path.read_text())["settings"]["fold"] == fold
    assert len(tested) == 48 == len(set(tested)) and len(list(root.rglob("*.jpg"))) == 48
    assert make(*words, "--folds", 4, "--verify").stdout.count("verified") == 4
    one_line(make(*words, "--folds", 3, code=2), "folds 4 there, 3 now")


def test_a_fold_divides_no_patient_and_keeps_both_classes():
    rng = np.random.default_rng(0)
    patients = np.sort(rng.integers(0, 60, 400))
    labels = (patients < 12).astype(int)
    tested = np.zeros(400, int)
    for fold in range(1, 6):
        split = draw_fold(labels, 5, fold, 10, seed=3, groups=patients)
        assert all(len(set(split[patients == p])) == 1 for p in set(patients))
        assert all(set(labels[split == name]) == {0, 1} for name in SPLITS)
        tested += split == "test"
    assert (tested == 1).all()


def test_few_images_and_odd_images_are_named(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"common": 200, "rare": 60}, size=(16, 16))
    Image.new("RGB", (40, 3)).save(root / "rare" / "long.png")
    done = make("folder")
    unsure = "common (val 20), rare (val 6, test 13); --folds 5 tests on every image"
    assert f"no verdict with fewer than 25 images: {unsure}\n" in done.stdout
    assert "images with a side below 8 pixels: 1, first rare/long.png\n" in done.stdout
    # whatever the brightness of the others
    assert "images without a pixel above 15 of 255: 1 of 261; scale" in done.stdout


def test_names_of_classes_and_of_the_data_set(planned, refused, make, tmp_path):
    refused("folder", "scans", says=["scans: give", "--data-root scans"])
    from test_sources import TREE, fashion, inat_folder

    fashion(tmp_path / "data")
    words = "fashionmnist", "--data-root", tmp_path / "data", "--minority", "pullover,shirt"
    source, _ = planned(*words)
    same, _ = planned(*words[:-1], "2,6")
    assert source.classes == ["pullover + shirt", "rest"] and (source.labels == same.labels).all()
    refused(*words[:-1], "pulover", says=["no class 'pulover'; did you mean pullover?"])
    inat_folder(tmp_path / "stand-in", TREE)
    words = "--data-root", "stand-in", "--name", "mammals-standin", "--ratios", "natural"
    assert "mammals-standin: 70 images" in make("inat21-mammals", *words).stdout
    assert natural("mammals-standin").name == "mammals-standin"


def test_the_commands_of_the_docs(make, tmp_path):
    """Every command for a user's own images in docs/data.md runs on images as described there."""
    rows = []
    for i in range(60):
        label, name = "benign" if i % 3 else "malignant", f"patient{i // 2:03d}_{i}"
        dicom(tmp_path / "dicom" / label / name, ramp(i, 900 + i), patient=f"p{i // 2}")
        picture(tmp_path / "scans" / label / f"{name}.png", seed=i)
        rows.append({"path": f"{label}/{name}.png", "label": label, "patient": f"p{i // 2}"})
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", "")
    assert text.split("```csv\n")[1].startswith(",".join(rows[0]))
    write(tmp_path / "labels.csv", rows)
    renamed = [{"Datei": row["path"], "Befund": row["label"]} for row in rows]
    write(tmp_path / "export.csv", renamed, delimiter=";")
    commands = re.findall(r"^python make_subsets.py ((?:folder|table) .*)", text, re.MULTILINE)
    assert len(commands) == 6
    for i, command in enumerate(commands):
        make(*shlex.split(command), "--out", f"out{i}")
