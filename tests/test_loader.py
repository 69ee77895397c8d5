"""Packed images are read ahead by several threads, whatever the order and size of the batches."""

import numpy as np
import pytest
import torch

from datasets.loader import ImageReader


def numbered_images(n):
    """uint8 [n, 4, 4, 3]: every pixel of image i is i."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 4, 4, 3)).copy()


@pytest.mark.parametrize("shard", [slice(None), slice(1, None, 3)])
def test_batches_hold_their_images(shard, tmp_path):
    np.save(tmp_path / "images.npy", numbered_images(200))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    rows = np.arange(50, 150)
    batches = [np.array([90, 3, 41, 7]), np.arange(60), np.array([5]), np.arange(99, -1, -1)]
    reader = ImageReader(images, rows, torch.device("cpu"))
    for expected, (positions, read) in zip(batches, reader(batches, shard), strict=True):
        assert positions is expected and read.shape[1:] == (3, 4, 4)
        assert (read == torch.from_numpy(rows[positions[shard]])[:, None, None, None]).all()


def test_a_failed_read_is_reported():
    reader = ImageReader(numbered_images(10), np.arange(20), torch.device("cpu"))
    with pytest.raises(IndexError):
        list(reader([np.array([3]), np.array([15])]))


def test_no_batches_are_read():
    assert list(ImageReader(numbered_images(3), np.arange(3), torch.device("cpu"))([])) == []
