"""Damaged and foreign files: a reader returns what it promises, or raises one clear line.

Long form: KIT_FUZZ=100000 examples.
"""

import io
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
import pretrain
from datasets.npz import npz_source
from datasets.pack import decode_block
from datasets.source import SPLITS
from datasets.table import read_lookup
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
            SimpleNamespace(minority=None, majority=None, classes=None, size=None, store_size=None),
            path,
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
        table = read_lookup(path, ["eid", "label"])
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert all({"eid", "label"} <= row.keys() for row in table.values())


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


TINY = ["subsets/digits/95-5.json", "--smoke", "--arch", "resnet8", "--size", 8]


@pytest.fixture(scope="module")
def run(workplace):
    """A finished tiny run."""
    call(pretrain, *TINY)
    return Path("runs/digits/95-5/supmin/seed0")


DAMAGE = {
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
        for damage in DAMAGE.values():
            state = torch.load(path, weights_only=True)
            damage(state)
            torch.save(state, path)
            with pytest.raises(UserError, match="checkpoint.pt: .*; delete it"):
                call(pretrain, *TINY)
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
    refused("npz", "--data-root", "some.npz", says=["some.npz", "damaged"])
    with pytest.raises(UserError, match="some.npz"):
        load_embeddings(Path("some.npz"), smoke=False)
    Path("infarction").mkdir()
    Path("infarction/table.csv").write_text(PARTICIPANTS)
    Path("some.pt").rename("infarction/some.pt")
    refused("infarction", "--data-root", "infarction", says=["some.pt"])
    Path("infarction/some.pt").unlink()
    for eid in range(100):
        np.save(f"infarction/{eid}.npy", objects)
    refused("infarction", "--data-root", "infarction", says=["no image [3, H, W]"])
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
    refused("infarction", "--data-root", "infarction", says=["no image [3, H, W]"])
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
