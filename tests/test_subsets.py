"""make_subsets.py: counts of the reference, the digits from end to end, packing, verifying."""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, one_line
from pictures import contents, counts, index, picture, plain_folder, well_formed
from PIL import Image
from sklearn.datasets import load_digits

import make_subsets
from common import load_subset
from datasets import pack
from datasets.ratios import ratio_counts
from datasets.source import SPLITS
from datasets.splits import DRAWN, draw_splits

# protocol.json, data.inat21: class sizes, ratios, counts
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


def record(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# rows and ratios
# --------------------------------------------------------------------------------------------------


def test_ratio_counts_equal_the_worked_examples_of_the_reference():
    examples = COUNT_EXAMPLES
    path = SHARED / "oracle" / "protocol.json"
    if path.exists():
        found = record(path)["data"]["inat21"]["count_examples"]
        assert len(found) == len(examples)
        examples = [(e["class_sizes"], e["ratios"], e["counts"]) for e in found]
    for sizes, ratios, kept in examples:
        assert ratio_counts(sizes, ratios) == kept


def test_drawn_splits_divide_no_group_and_keep_the_classes_in_proportion():
    groups = np.random.default_rng(0).integers(0, 300, 2000)
    labels = (groups % 10 == 0).astype(int)
    split = draw_splits(labels, DRAWN, seed=0, groups=groups.astype(str))
    assert all(len(set(split[groups == g])) == 1 for g in set(groups))
    largest = np.bincount(groups).max()
    for name, percent in DRAWN.items():
        for c in (0, 1):
            share = percent / 100 * (labels == c).sum()
            assert abs(((split == name) & (labels == c)).sum() - share) < largest
    assert (draw_splits(labels, DRAWN, seed=1) != draw_splits(labels, DRAWN, seed=2)).any()


def test_digits_give_the_printout_at_the_end_of_the_script(make):
    done = make("digits")
    text = (ROOT / "make_subsets.py").read_text(encoding="utf-8")
    expected = text.split("`python make_subsets.py digits`:\n#\n")[1]
    assert done.stdout == "".join(line[2:] + "\n" for line in expected.splitlines())
    folder = Path("subsets/digits")
    files = {f"{ratio}.{kind}" for ratio in make_subsets.RATIOS for kind in ("json", "png")}
    assert contents(folder).keys() == {"images.npy", "index.csv"} | files
    subsets = {ratio: well_formed(folder / f"{ratio}.json") for ratio in make_subsets.RATIOS}

    one = subsets["99-1"]
    assert (one.name, one.size, one.recipe, one.minority) == ("digits", 32, "medical", 1)
    assert one.classes == ["0-4", "5-9"] and one.images.shape == (1797, 8, 8, 1)
    scans = load_digits()
    np.testing.assert_array_equal(one.images[..., 0], np.round(scans.images * 255 / 16))
    np.testing.assert_array_equal(one.labels, scans.target >= 5)
    natural = counts(subsets["natural"])
    assert sum(sum(natural[split]) for split in SPLITS) == 1797
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        for c in (0, 1):
            assert abs(natural[split][c] - share * (one.labels == c).sum()) <= 1
    m = min(natural["train"])
    for ratio, shares in (("99-1", (0.99, 0.01)), ("95-5", (0.95, 0.05)), ("50-50", (0.5, 0.5))):
        assert counts(subsets[ratio])["train"] == tuple(ratio_counts([m, m], shares))
    for c, nested in ((1, make_subsets.RATIOS), (0, ("50-50", "95-5", "99-1", "natural"))):
        rows = [{r for r in subsets[q].splits["train"] if one.labels[r] == c} for q in nested]
        assert all(smaller < larger for smaller, larger in zip(rows, rows[1:], strict=False))
    for split in ("val", "test"):
        assert all((s.splits[split] == one.splits[split]).all() for s in subsets.values())


def test_the_same_command_gives_the_same_bytes_and_another_seed_other_rows(make):
    make("digits", "--ratios", "99-1")
    first = contents(Path("subsets/digits"))
    assert "is there already" in make("digits", "--ratios", "99-1").stdout
    assert contents(Path("subsets/digits")) == first
    shutil.rmtree("subsets")
    make("digits", "--ratios", "99-1")
    assert contents(Path("subsets/digits")) == first
    make("digits", "--ratios", "99-1", "--seed", 1, "--name", "other")
    one, other = load_subset("subsets/digits/99-1.json"), load_subset("subsets/other/99-1.json")
    assert other.name == "other" and one.sha256 == other.sha256
    assert all(set(one.splits[split]) != set(other.splits[split]) for split in SPLITS)


def test_ratios_added_later_equal_those_made_at_once(make, monkeypatch):
    make("digits", "--out", "a", "--ratios", "99-1,99.5-0.5", "natural")
    make("digits", "--out", "b", "--ratios", "natural")
    monkeypatch.setattr(make_subsets, "pack_images", None)
    make("digits", "--out", "b", "--ratios", "99.0-1.0", "99.5-.5")
    a, b = contents(Path("a/digits")), contents(Path("b/digits"))
    ratios = {"99-1", "99.5-0.5", "natural"}
    assert a.keys() == b.keys() and {Path(name).stem for name in a} == ratios | {"images", "index"}
    for name in a:
        if name.endswith(".json"):
            one, two = json.loads(a[name]), json.loads(b[name])
            del one["command"], two["command"]
            assert one == two, name
        else:
            assert a[name] == b[name], name


def test_a_finished_folder_is_never_mixed_with_other_settings(make, refused):
    make("digits", "--ratios", "95-5")
    before = contents(Path("subsets/digits"))
    refused("digits", "--seed", 3, says=["subsets/digits", "seed 0 there, 3 now", "--name"])
    refused("digits", "--size", 16, says=["subsets/digits", "size 32 there, 16 now", "delete"])
    assert contents(Path("subsets/digits")) == before
    data = bytearray(before["images.npy"])
    data[-1] ^= 1
    Path("subsets/digits/images.npy").write_bytes(data)
    refused("digits", says=["subsets/digits/images.npy", "checksum"])
    refused("digits", "--verify", says=["subsets/digits/images.npy", "checksum"])
    Path("subsets/digits/images.npy").unlink()
    refused("digits", says=["subsets/digits/images.npy", "missing"])


def test_flags_that_make_no_sense(refused):
    refused("digit", says=["invalid choice: 'digit'", "digits"])
    refused("digits", "--ratios", "99.9-0.1", says=["--ratios 99.9-0.1", "5-9", "larger share"])
    for ratio in ("90-9", "1-99", "x", "nan-1", "99"):
        refused("digits", "--ratios", ratio, says=[f"--ratios {ratio}", "99-1"])
    for flag, value in (("--seed", -1), ("--size", 0), ("--store-size", 0), ("--workers", 0)):
        refused("digits", flag, value, says=[flag, str(value)])
    for flag in ("--download", "--grayscale", "--skip-bad"):
        refused("digits", flag, says=[flag, "does not take"])
    for flag in ("--patient", "--minority", "--majority"):
        refused("digits", flag, "x", says=[flag, "does not take"])
    refused("digits", "--name", "a/b", says=["--name a/b"])
    Path("file").write_text("in the way")
    refused("digits", "--out", "file", says=["file"])
    assert Path("file").read_text() == "in the way" and not Path("subsets").exists()


def test_what_limits_the_results_is_said(make, tmp_path):
    """Few images of the rare class, small images, ignored files, ratios that are left out."""
    root = plain_folder(tmp_path / "data", {"common": 60, "rare": 12}, size=(16, 16))
    for name in ("scan.txt", "scan2.TXT", "notes"):
        (root / "rare" / name).write_bytes(b"")
    done = make("folder")
    assert "data: 72 images of common / rare (rare), stored as 16 x 16 x 3\n" in done.stdout
    assert "ignored 3 other files (2 .txt, 1 no suffix), first rare/notes" in done.stdout
    assert "left out 99-1, 95-5: no training image of rare would remain\n" in done.stdout
    assert "enlarged from 16 to 224 pixels for the network; --size 16 takes 196" in done.stdout
    rare = "rare (natural train 8, 50-50 train 4, val 1, test 3)"
    few = f"few images of common (50-50 train 4, val 6), {rare}"
    assert f"WARNING: {few}" in done.stdout
    # 7 validation images are too few for the collapse monitor.
    command = "next: python pretrain.py subsets/data/natural.json --method supmin --batch-size 32"
    assert f"{command} --watch-every 0\n" in done.stdout
    assert "without a GPU, add: --arch resnet8 --size 32\n" in done.stdout


def test_images_that_use_12_of_16_bits_are_noticed(make, tmp_path):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(np.full((9, 9), 4095 - i, np.uint16))
            image.save(tmp_path / "data" / label / f"{i}.png")
    done = make("folder", "--grayscale", "--ratios", "natural")
    assert "WARNING: images without a pixel above 15 of 255: 24 of 24; scale" in done.stdout


# --------------------------------------------------------------------------------------------------
# packing
# --------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_left_out_only_when_asked(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 60}, size=(8, 8))
    good = contents(root / "a")
    damaged = {"a 003.jpg": good["a 003.jpg"][:-30], "a 005.jpg": b"", "a 039.jpg": b"text"}
    for name, data in damaged.items():
        (root / "a" / name).write_bytes(data)
    # a decompression bomb: 65536 x 65536 pixels
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\0\0\0\0"
    (root / "b" / "bomb.png").write_bytes(bomb + zlib.crc32(bomb[12:]).to_bytes(4, "big"))
    words = "folder", "--ratios", "natural", "--name"
    done = make(*words, "x", code=2)
    one_line(done, "a/a 003.jpg", "truncated", "4 images", "--skip-bad")
    for name in ("a/a 003.jpg: image file", "a/a 005.jpg: ", "a/a 039.jpg: cannot", "bomb.png: "):
        assert name in done.stdout
    assert not list(Path("subsets/x").glob("[!.]*"))
    done = make(*words, "x", "--skip-bad")
    assert "unreadable images, left out (4):" in done.stdout
    # with --skip-bad, unreadable images count as done
    assert "continuing: 96 of 101" in done.stdout and not list(Path("subsets/x").glob(".part-*"))
    subset = well_formed(Path("subsets/x/natural.json"))
    assert subset.images.shape[0] == 97 and subset.images.reshape(97, -1).any(1).all()
    assert [int(line["row"]) for line in index(Path("subsets/x"))] == list(range(97))
    assert "is there already" in make(*words, "x", "--skip-bad").stdout
    one_line(make(*words, "x", code=2), "skipped 4 there, 0 now")
    assert "verified" in make("folder", "--name", "x", "--skip-bad", "--verify").stdout

    (root / "b" / "bomb.png").unlink()
    make(*words, "y", code=2)
    for name, data in good.items():
        (root / "a" / name).write_bytes(data)
    make(*words, "y")
    assert well_formed(Path("subsets/y/natural.json")).images.shape[0] == 100


def test_any_number_of_workers_gives_the_same_bytes(make, tmp_path):
    plain_folder(tmp_path / "data", {"a": 40, "b": 60}, size=(31, 17))
    for n in (1, 3):
        make("folder", "--out", n, "--store-size", 20, "--ratios", "50-50", "--workers", n)
    one, three = contents(Path("1/data")), contents(Path("3/data"))
    assert one.keys() == three.keys()
    assert all(one[name] == three[name] for name in one if not name.endswith(".json"))


def test_a_stopped_packing_continues_at_its_row_counter(make, tmp_path, monkeypatch):
    plain_folder(tmp_path / "data", {"a": 50, "b": 80}, size=(40, 30))
    words = "folder", "--ratios", "50-50", "--workers", 1
    pack_block, packed = pack.pack_block, []

    def pack_until_killed(job):
        if len(packed) == 2:
            raise SystemExit(137)
        packed.append(job[2])
        return pack_block(job)

    monkeypatch.setattr(pack, "pack_block", pack_until_killed)
    make(*words, code=137)
    counter = Path("subsets/data/.part-rows.jsonl")
    assert packed == [0, 32] and len(counter.read_text().splitlines()) == 1 + 64
    # a kill may tear the last line
    with open(counter, "a") as file:
        file.write("[40, 30, nu")
    packed[:] = [None] * 3
    assert "continuing: 64 of 130 images" in make(*words).stdout
    assert packed[3:] == [64, 96, 128]
    resumed = contents(Path("subsets/data"))
    shutil.rmtree("subsets")
    assert "continuing" not in make(*words).stdout
    assert contents(Path("subsets/data")) == resumed


def test_a_row_counter_never_outlives_its_images(make, tmp_path, monkeypatch):
    plain_folder(tmp_path / "data", {"a": 40, "b": 40}, size=(8, 8))
    words = "folder", "--ratios", "50-50"
    # killed between the packed images and the records
    monkeypatch.setattr(make_subsets, "write_json", lambda *_: sys.exit(137))
    make(*words, code=137)
    assert Path("subsets/data/.part-rows.jsonl").exists()
    create_array = pack.create_array

    def create_and_die(*args):
        create_array(*args)
        sys.exit(137)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "create_array", create_and_die)
        make(*words, code=137)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "continuing" not in make(*words).stdout
    assert load_subset("subsets/data/50-50.json").images.reshape(80, -1).any(1).all()


def test_a_stopped_packing_of_other_images_starts_over(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 40}, size=(8, 8))
    (root / "a" / "a 039.jpg").write_bytes(b"")
    words = "folder", "--ratios", "50-50"
    make(*words, code=2)
    # the same images: the block with the unreadable one is decoded again
    assert "continuing: 32 of 80" in make(*words, code=2).stdout
    (root / "a" / "a 039.jpg").unlink()
    assert "continuing" not in make(*words).stdout
    make(*words, "--out", "fresh")
    one, two = Path("subsets/data/images.npy"), Path("fresh/data/images.npy")
    assert one.read_bytes() == two.read_bytes()
    assert not list(Path("subsets/data").glob(".part-*"))


# --------------------------------------------------------------------------------------------------
# leaks, --verify
# --------------------------------------------------------------------------------------------------


def test_leaks_are_equal_pictures_across_splits_or_classes_only(make, tmp_path):
    root = plain_folder(tmp_path / "data" / "train", {"a": 10, "bb": 10}, suffix=".png")
    plain_folder(tmp_path / "data" / "test", {"a": 3, "bb": 3}, suffix=".png", size=(20, 20))
    test = root.parent / "test"
    # no leak: same class; val is drawn by chance
    shutil.copy(root / "a" / "a 000.png", root / "a" / "copy.png")
    shutil.copy(root / "a" / "a 001.png", root / "bb" / "both classes.png")
    shutil.copy(root / "bb" / "bb 002.png", test / "bb" / "two splits.png")
    # no leak: another true size
    larger = Image.open(root / "bb" / "bb 003.png").resize((48, 32), Image.Resampling.NEAREST)
    larger.save(root / "a" / "larger.png")
    # another file with an equal picture
    Image.open(root / "bb" / "bb 004.png").save(test / "a" / "as bmp.bmp")
    make("folder", "--seed", 1, "--ratios", "natural")
    leaks = record("subsets/data/natural.json")["leaks"]
    split = {Path(line["source"]).name: line["split"] for line in index(Path("subsets/data"))}
    assert split["a 000.png"] == split["copy.png"]
    assert {frozenset(Path(name).name for name in names) for names in leaks} == {
        frozenset(["a 001.png", "both classes.png"]),
        frozenset(["bb 002.png", "two splits.png"]),
        frozenset(["bb 004.png", "as bmp.bmp"]),
    }
    # nothing is dropped
    assert len(index(Path("subsets/data"))) == 31


def test_verify_compares_records_with_images_source_and_seed(make, refused, tmp_path, monkeypatch):
    root = plain_folder(tmp_path / "data", {"a": 40, "b": 60}, size=(8, 8))
    refused("folder", "--verify", says=["subsets/data", "no finished subset", "without --verify"])
    make("folder", "--ratios", "natural", "60-40")
    monkeypatch.setattr(pack, "decode", None)
    for workers in (1, 2):
        done = make("folder", "--verify", "--workers", workers)
        assert "verified subsets/data: checksums, counts, leaks and rows of 60-40, natural" in (
            done.stdout
        )
    file = Path("subsets/data/60-40.json")
    good = record(file)
    changed = record(file)
    changed["splits"]["train"][0] = changed["splits"]["val"][0]
    wrong = dict(mean=[0.1, 0.2, 0.3], leaks=[["q", "z"]], minority=1, splits=changed["splits"])
    for key, value in wrong.items():
        file.write_text(json.dumps({**good, key: value}))
        refused("folder", "--verify", says=["60-40.json", f"{key} differ"])
    file.write_text(json.dumps(good))
    refused("folder", "--verify", "--ratios", "natural", "70-30", says=["no finished 70-30"])
    (root / "b" / "new.jpg").write_bytes((root / "b" / "b 001.jpg").read_bytes())
    refused("folder", "--verify", says=["100 images", "101 images", "there"])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_images_are_scaled_and_32_bit_ones_refused(make, tmp_path, suffix):
    root = plain_folder(tmp_path / "data", {"a": 8, "b": 8}, suffix=".png", mode="L")
    ramp = (np.arange(24 * 16).reshape(16, 24) * 170).astype(np.uint16)
    Image.fromarray(ramp).save(root / "a" / f"deep{suffix}")
    make("folder", "--grayscale", "--ratios", "natural")
    subset = well_formed(Path("subsets/data/natural.json"))
    [row] = [int(line["row"]) for line in index(Path("subsets/data")) if "deep" in line["source"]]
    scaled = Image.fromarray((ramp >> 8).astype(np.uint8))
    expected = np.asarray(scaled.resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(subset.images[row, ..., 0], expected)
    picture(root / "a" / "wide.tiff", mode="F")
    done = make("folder", "--grayscale", "--ratios", "natural", "--name", "wide", code=2)
    one_line(done, "a/wide.tiff", "mode F", "--skip-bad")
