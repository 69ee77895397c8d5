"""The checksum of a large file is computed once, and again when the file changes."""

import os

import pytest

from utils import files


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    path.write_bytes(b"1234")
    return path


def test_an_unchanged_file_is_read_once(images, monkeypatch):
    monkeypatch.setattr(files, "TICK_NS", -1)
    first = files.cached_sha256(images)
    assert first == files.sha256(images)
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("read again"))
    assert files.cached_sha256(images) == first


def test_a_changed_file_is_noticed_even_with_its_old_size_and_time(images, monkeypatch):
    monkeypatch.setattr(files, "TICK_NS", -1)
    first, status = files.cached_sha256(images), os.stat(images)
    while os.stat(images).st_ctime_ns == status.st_ctime_ns:
        images.write_bytes(b"1235")
    os.utime(images, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.cached_sha256(images) == files.sha256(images) != first


def test_a_file_that_has_just_changed_is_not_trusted(images):
    files.cached_sha256(images)
    assert not images.with_name(".images.npy.sha256").exists()
