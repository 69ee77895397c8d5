"""Nothing let in: whatever bytes a file holds, a reader returns what it promises or one clear line. Long form: KIT_FUZZ=100000 (examples)."""

import copy
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import plain_folder
from PIL import Image

import common
import evaluate_metrics
import finetune
import linear_probe
import pretrain
from common import RECIPES, load_subset
from datasets.npz import npz_source
from datasets.pack import decode_block
from datasets.source import SPLITS, parse_binary, read_table
from evaluate_metrics import load_embeddings
from utils.cli import UserError

settings.register_profile(
    "kit",
    max_examples=int(os.environ.get("KIT_FUZZ", 100)),
    deadline=None,
    derandomize="KIT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("kit")

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([-1, 10**30, "99-1", "../x", ""]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, here=()):
    """Every place in a JSON value, as a path of keys."""
    yield here
    for key in (
        list(value)[:6]
        if isinstance(value, dict)
        else range(min(len(value), 3))
        if isinstance(value, list)
        else ()
    ):
        yield from places(value[key], (*here, key))


def changed(data, value):
    """JSON with anything at one of its places, or one of its keys left out."""
    out = copy.deepcopy(value)
    *above, last = data.draw(st.sampled_from([place for place in places(value) if place]))
    inner = out
    for key in above:
        inner = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(ANY_JSON)
    return out


@given(data=st.data())
def test_a_subset_file_with_anything_in_it(workplace, data):
    record = json.loads(Path("subsets/digits/95-5.json").read_text())
    record = {
        key: value for key, value in record.items() if key not in ("command", "settings", "seed")
    }
    path = Path("subsets/digits/fuzzed.json")
    path.write_text(json.dumps(changed(data, record)))
    try:
        subset = load_subset(path, verify=data.draw(st.booleans()))
    except UserError as error:
        assert str(path) in str(error) or "subsets/digits" in str(error)
        return
    finally:
        path.unlink()
    rows = np.concatenate([subset.splits[part] for part in SPLITS])
    assert (
        len(set(rows)) == len(rows)
        and rows.min() >= 0
        and rows.max() < len(subset.images) == len(subset.labels) == len(subset.sizes)
    )
    assert (
        all(isinstance(text, str) for text in (subset.name, subset.ratio, *subset.classes))
        and len(subset.classes) == 2
    )
    assert (
        len(subset.mean) == len(subset.std) == subset.images.shape[3]
        and np.isfinite(subset.mean).all()
        and min(subset.std) > 0
    )
    assert subset.minority in (0, 1) and 1 <= subset.size <= 4096 and subset.recipe in RECIPES


def damaged(data, whole):
    """`whole` with a piece cut off, overwritten, doubled or left out."""
    at, n = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    put = data.draw(st.binary(max_size=40))
    kind = data.draw(
        st.sampled_from(["cut", "overwritten", "inserted", "left out", "nothing of it"])
    )
    return {
        "cut": whole[:at],
        "overwritten": whole[:at] + put + whole[at + len(put) :],
        "inserted": whole[:at] + put + whole[at:],
        "left out": whole[:at] + whole[at + n :],
        "nothing of it": put,
    }[kind]


@given(data=st.data())
def test_a_checkpoint_with_anything_in_it(tmp_path, data):
    state, file = (
        {"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 3, "config": {"a": [1, "b"]}},
        io.BytesIO(),
    )
    torch.save(state, file)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        loaded = common.load_tensors(path, keys=state)
        common.load_strict(torch.nn.Linear(3, 2), loaded["model"], path)
    except UserError as error:
        assert str(path) in str(error)


@given(data=st.data())
def test_an_image_with_anything_in_it(tmp_path, data):
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".tiff", ".gif", ".bmp", ".webp", ".npy"]))
    pixels, file = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3), io.BytesIO()
    np.save(file, pixels.transpose(2, 0, 1)) if suffix == ".npy" else Image.fromarray(pixels).save(
        file, Image.registered_extensions()[suffix]
    )
    path = tmp_path / f"image{suffix}"
    path.write_bytes(damaged(data, file.getvalue()))
    block, [[width, height, why, cut]] = decode_block(
        [path], 16, data.draw(st.sampled_from([1, 3])), data.draw(st.booleans())
    )
    assert (
        block.shape[:3] == (1, 16, 16)
        and (why is None) == (min(width, height) > 0)
        and (why is None or not block.any() and "\n" not in why)
    )


@given(data=st.data())
def test_an_npz_with_anything_in_it(tmp_path, data):
    arrays = {f"{part}_images": np.zeros((4, 6, 6), np.uint8) for part in SPLITS} | {
        f"{part}_labels": np.arange(4).astype(np.uint8)[:, None] % 2 for part in SPLITS
    }
    file, path = io.BytesIO(), tmp_path / "some.npz"
    data.draw(st.sampled_from([np.savez, np.savez_compressed]))(file, **arrays)
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        source = npz_source(
            SimpleNamespace(minority=None, majority=None, size=None, store_size=None), path
        )
        images = source.images[0 : len(source.images)]
    except UserError as error:
        assert str(path) in str(error)
        return
    assert len(images) == len(source.labels) and all(
        image.dtype == np.uint8 and image.ndim == 3 for image in images
    )


@given(data=st.data())
def test_a_table_with_anything_in_it(tmp_path, data):
    path = tmp_path / "labels.csv"
    path.write_bytes(damaged(data, 'eid,label\n1,0\n2,1\n"3",0\n4,1\n'.encode()))
    try:
        table = read_table(path, ["eid", "label"])
        labels = [parse_binary(path, line, "label", row) for line, row in table.items()]
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert labels and set(labels) <= {0, 1}


@given(data=st.data())
def test_embeddings_with_anything_in_them(tmp_path, data):
    file, path = io.BytesIO(), tmp_path / "z.npz"
    np.savez(file, z=np.eye(6, 4, dtype=np.float32)[None].repeat(2, 0), labels=np.arange(6) % 2)
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        embeddings = load_embeddings(path, smoke=False)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    z, _ = embeddings.spaces["embeddings"]
    assert z.shape[1] == len(embeddings.labels) and z.isfinite().all()


@pytest.fixture(scope="module")
def run(workplace):
    """A finished run, with everything that is measured on it."""
    folder = Path("runs/digits/95-5/supmin/seed0")
    call(pretrain, "subsets/digits/95-5.json", "--smoke", "--size", 8)
    for script in (linear_probe, evaluate_metrics, finetune):
        call(script, folder, "--smoke")
    return folder


@settings(max_examples=max(60, int(os.environ.get("KIT_FUZZ", 0))))
@given(data=st.data())
def test_a_run_folder_with_anything_in_it(run, data):
    """Whatever its settings hold, a run is opened, or refused by the name of a file."""
    name = data.draw(
        st.sampled_from(
            [
                "config.json",
            ]
        )
    )
    path = run / name
    whole = path.read_text()
    path.write_text(json.dumps(changed(data, json.loads(whole))))
    opened_or_refused(run, name, whole)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("config.json", ("subset",), 5),
        ("config.json", ("size",), None),
    ],
)
def test_what_was_found_in_run_folders(run, name, place, value):
    whole = (run / name).read_text()
    inner = content = json.loads(whole)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (run / name).write_text(json.dumps(content))
    opened_or_refused(run, name, whole)


def opened_or_refused(run, name, whole):
    """Then the file is `whole` again."""
    try:
        readers = {
            "config.json": lambda: common.load_run(run),
        }
        try:
            readers[name]()
        except UserError as error:
            assert any(place in str(error) for place in ("runs", "subsets", "--"))
            assert "\n" not in str(error)
    finally:
        (run / name).write_text(whole)


WITHIN = {
    "step": 1,
    "skipped": 0,
    "losses": torch.zeros(2),
    "generator": torch.Generator().get_state(),
    "seconds": 1.0,
}
TORN = {
    "epoch": lambda state: state.update(epoch="3"),
    "epoch below 0": lambda state: state.update(epoch=-1),
    "within": lambda state: state.update(within={"step": 1}),
    "within of another kind": lambda state: state.update(within=[1]),
    "step": lambda state: state.update(within={**WITHIN, "step": 7}),
    "losses": lambda state: state.update(epoch=0, within={**WITHIN, "losses": torch.zeros(3)}),
    "generator": lambda state: state.update(
        within={**WITHIN, "generator": torch.full_like(WITHIN["generator"], 9)}
    ),
    "shape": lambda state: state["model"].update({"head.0.bias": torch.zeros(3)}),
    "no key": lambda state: state["model"].pop("head.0.bias"),
    "one key more": lambda state: state["model"].update(more=torch.zeros(3)),
    "dtype": lambda state: state["model"].update(
        {"head.0.bias": state["model"]["head.0.bias"].to(torch.complex64)}
    ),
    "no tensor": lambda state: state["model"].update({"head.0.bias": [0.0]}),
    "not a state": lambda state: state.update(optimizer=[1]),
    "settings": lambda state: state["config"].update(lr=1.0),
}


def test_a_checkpoint_that_does_not_fit_is_refused(run):
    path = run / "checkpoint.pt"
    good = path.read_bytes()
    try:
        for name, tear in TORN.items():
            state = torch.load(path, weights_only=True)
            tear(state)
            torch.save(state, path)
            with pytest.raises(UserError, match="checkpoint.pt: .*; delete it"):
                call(pretrain, "subsets/digits/95-5.json", "--smoke", "--size", 8)
            path.write_bytes(good)
    finally:
        path.write_bytes(good)


PARTICIPANTS = "eid,label\n" + "".join(f"{eid},{eid % 2}\n" for eid in range(100))


class Pickled:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_no_pickle_is_executed(tmp_path, monkeypatch, refused, make):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Pickled()] * 4, dtype=object)
    torch.save({1: Pickled()}, "some.pt")
    with pytest.raises(UserError, match="some.pt"):
        common.load_tensors("some.pt")
    np.savez(
        "some.npz",
        **{f"{part}_{kind}": objects for part in SPLITS for kind in ("images", "labels")},
        z=objects,
        labels=objects,
    )
    refused("npz", "--data-root", "some.npz", says=["some.npz", "object"])
    with pytest.raises(UserError, match="some.npz"):
        load_embeddings(Path("some.npz"), smoke=False)
    Path("infarction").mkdir()
    Path("infarction/table.csv").write_text(PARTICIPANTS)
    Path("some.pt").rename("infarction/some.pt")
    refused("infarction", "--data-root", "infarction", says=["some.pt"])
    Path("infarction/some.pt").unlink()
    for eid in range(100):
        np.save(f"infarction/{eid}.npy", objects)
    refused("infarction", "--data-root", "infarction", says=["channels", "none that can be read"])
    assert not Path("executed").exists()


def declared(path, shape):
    """An .npy file that declares a shape and holds 99 bytes."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        file.write(99 * b"x")


@pytest.mark.parametrize("shape", [(3, 10**6, 10**6), (3, 2**40, 2**40), (2**62, 2, 2)])
def test_a_huge_declared_shape_costs_no_memory(tmp_path, monkeypatch, refused, shape):
    monkeypatch.chdir(tmp_path)
    Path("infarction").mkdir()
    Path("infarction/table.csv").write_text(PARTICIPANTS)
    for eid in range(100):
        declared(f"infarction/{eid}.npy", shape)
    refused("infarction", "--data-root", "infarction", says=["channels", "none that can be read"])
    declared("z.npy", shape)
    np.save("labels.npy", np.arange(4) % 2)
    with zipfile.ZipFile("z.npz", "w") as archive:
        archive.write("z.npy")
        archive.write("labels.npy")
    with pytest.raises(UserError, match="z.npz: "):
        load_embeddings(Path("z.npz"), smoke=False)


def test_links_that_go_in_circles(make, tmp_path):
    root = plain_folder(tmp_path / "data", {"a": 30, "b": 30}, size=(8, 8))
    (root / "a/up").symlink_to("..")
    (root / "b/self.png").symlink_to("self.png")
    assert "b/self.png" in make("folder", "--data-root", root, code=2).stderr
    assert "left out" in make("folder", "--data-root", root, "--skip-bad").stdout
