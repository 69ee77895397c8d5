"""Nothing let in: whatever bytes a file holds, a reader returns what it promises or one clear line. Long form: KIT_FUZZ=100000 (examples)."""

import copy
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import sources
from common import RECIPES, SPLITS, UserError, load_subset
from evaluate_metrics import open_embeddings
from make_subsets import decode_block

settings.register_profile("kit", max_examples=int(os.environ.get("KIT_FUZZ", 150)), deadline=None, derandomize="KIT_FUZZ" not in os.environ,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("kit")

ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([-1, 10 ** 30, "99-1", "../x", ""]),
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


def places(value, here=()):
    """Every place in a JSON value, as a path of keys."""
    yield here
    for key in list(value)[:6] if isinstance(value, dict) else range(min(len(value), 3)) if isinstance(value, list) else ():
        yield from places(value[key], (*here, key))


@given(data=st.data())
def test_a_subset_file_with_anything_in_it(workplace, data):
    record = json.loads(Path("subsets/digits/95-5.json").read_text())
    *above, last = data.draw(st.sampled_from([place for place in places(record) if place and place[0] not in ("command", "settings", "seed")]))
    changed = inner = copy.deepcopy(record)
    for key in above:
        inner = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(ANY_JSON)
    path = Path("subsets/digits/fuzzed.json")
    path.write_text(json.dumps(changed))
    try:
        subset = load_subset(path, verify=data.draw(st.booleans()))
    except UserError as error:
        assert str(path) in str(error) or "subsets/digits" in str(error)
        return
    finally:
        path.unlink()
    rows = np.concatenate([subset.splits[part] for part in SPLITS])
    assert len(set(rows)) == len(rows) and rows.min() >= 0 and rows.max() < len(subset.images) == len(subset.labels) == len(subset.sizes)
    assert all(isinstance(text, str) for text in (subset.name, subset.ratio, *subset.classes)) and len(subset.classes) == 2
    assert len(subset.mean) == len(subset.std) == subset.images.shape[3] and np.isfinite(subset.mean).all() and min(subset.std) > 0
    assert subset.minority in (0, 1) and 1 <= subset.size <= 4096 and subset.recipe in RECIPES


def damaged(data, whole):
    """`whole` with a piece cut off, overwritten, doubled or left out."""
    at, n = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    put = data.draw(st.binary(max_size=40))
    kind = data.draw(st.sampled_from(["cut", "overwritten", "inserted", "left out", "nothing of it"]))
    return {"cut": whole[:at], "overwritten": whole[:at] + put + whole[at + len(put):], "inserted": whole[:at] + put + whole[at:],
            "left out": whole[:at] + whole[at + n:], "nothing of it": put}[kind]


@given(data=st.data())
def test_a_checkpoint_with_anything_in_it(tmp_path, data):
    state, file = {"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 3, "config": {"a": [1, "b"]}}, io.BytesIO()
    torch.save(state, file)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        loaded = common.load_tensors(path, keys=state)
        common.load_exactly(torch.nn.Linear(3, 2), loaded["model"], path)
    except UserError as error:
        assert str(path) in str(error)


@given(data=st.data())
def test_an_image_with_anything_in_it(tmp_path, data):
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".tiff", ".gif", ".bmp", ".webp", ".npy"]))
    pixels, file = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3), io.BytesIO()
    np.save(file, pixels.transpose(2, 0, 1)) if suffix == ".npy" else Image.fromarray(pixels).save(file, Image.registered_extensions()[suffix])
    path = tmp_path / f"image{suffix}"
    path.write_bytes(damaged(data, file.getvalue()))
    block, [[width, height, why, cut]] = decode_block([path], 16, data.draw(st.sampled_from([1, 3])), data.draw(st.booleans()))
    assert block.shape[:3] == (1, 16, 16) and (why is None) == (min(width, height) > 0) and (why is None or not block.any() and "\n" not in why)


@given(data=st.data())
def test_an_npz_with_anything_in_it(tmp_path, data):
    arrays = {f"{part}_images": np.zeros((4, 6, 6), np.uint8) for part in SPLITS} | {f"{part}_labels": np.arange(4).astype(np.uint8)[:, None] % 2 for part in SPLITS}
    file, path = io.BytesIO(), tmp_path / "some.npz"
    data.draw(st.sampled_from([np.savez, np.savez_compressed]))(file, **arrays)
    path.write_bytes(damaged(data, file.getvalue()))
    try:
        source = sources.npz_source(SimpleNamespace(minority=None, majority=None, size=None, store_size=None), path)
        images = source.images[0:len(source.images)]
    except UserError as error:
        assert str(path) in str(error)
        return
    assert len(images) == len(source.labels) and all(image.dtype == np.uint8 and image.ndim == 3 for image in images)


@given(data=st.data())
def test_a_table_with_anything_in_it(tmp_path, data):
    path = tmp_path / "labels.csv"
    path.write_bytes(damaged(data, "eid,label\n1,0\n2,1\n\"3\",0\n4,1\n".encode()))
    try:
        table = sources.read_table(path, ["eid", "label"])
        labels = [sources.zero_or_one(path, line, "label", row) for line, row in table.items()]
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert labels and set(labels) <= {0, 1}


@given(data=st.data())
def test_embeddings_with_anything_in_them(tmp_path, data):
    file, path = io.BytesIO(), tmp_path / "z.npz"
    np.savez(file, z=np.eye(6, 4, dtype=np.float32)[None].repeat(2, 0), labels=np.arange(6) % 2)
    path.write_bytes(damaged(data, file.getvalue()))
    args = SimpleNamespace(embeddings=path, smoke=False, out=None, neighborhood=1, seed=0, picture="pca")
    try:
        _, _, _, spaces = open_embeddings(args)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    labels, embeddings = spaces()
    assert all(z.shape[1] == len(labels) and z.isfinite().all() for z, _ in embeddings.values())
