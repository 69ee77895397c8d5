"""Reading batches of packed images from a file, relative to one thread that transposes them."""

import mmap
import os
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.timing import compare_throughput, time_in_rounds
from datasets.loader import ImageReader

SIZES = (224, 320)  # pixels of a stored image
READERS = (1, 2, 3, 4)
N_BYTES = 2**30  # of a file


def measure_reading(args, device):
    """Measure images per second with 1 to 4 threads, from the page cache and from the disk.

    The reference gathers a batch in one thread and puts the channels first, as the kit did.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="reading-") as folder:
        for side in args.sizes or SIZES:
            path = Path(folder) / f"{side}.npy"
            write_images(path, args.batch_size * 2 if args.smoke else N_BYTES // side**2 // 3, side)
            images, generator = np.load(path, mmap_mode="r"), np.random.default_rng(0)
            batches = [
                generator.choice(len(images), args.batch_size, replace=False)
                for _ in range(args.steps)
            ]
            for state in ("warm", "cold"):
                prepare = partial(forget_pages, images) if state == "cold" else lambda: None
                steps = {"reference": partial(gather_in_one_thread, images, batches, prepare)}
                for readers in READERS:
                    arguments = readers, images, batches, prepare
                    steps[f"{readers} threads"] = partial(read_ahead, *arguments)
                seconds = time_in_rounds(steps, args.rounds)
                results[f"{side} px, {state}"] = {
                    name: compare_throughput(times, seconds["reference"], sum(map(len, batches)))
                    for name, times in seconds.items()
                }
            path.unlink()
    return {key: getattr(args, key) for key in ("batch_size", "steps")}, results


def write_images(path, n, side):
    """Write noise, uint8 [n, side, side, 3], and have it on the disk."""
    shape, block = (n, side, side, 3), min(n, 256)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    noise = np.random.default_rng(0).integers(0, 256, (block, *shape[1:]), dtype=np.uint8)
    for start in range(0, n, block):
        images[start : start + block] = noise[: n - start]
    images.flush()


def forget_pages(images):
    """Drop a mapped file from this process, then from the page cache (Linux)."""
    # The page cache keeps pages that a process has mapped.
    images._mmap.madvise(mmap.MADV_DONTNEED)
    with open(images.filename, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gather_in_one_thread(images, batches, prepare):
    prepare()
    for positions in batches:
        torch.from_numpy(images[positions]).permute(0, 3, 1, 2).contiguous()


def read_ahead(readers, images, batches, prepare):
    """Read with the kit's threads into memory of the host."""
    prepare()
    reader = ImageReader(images, np.arange(len(images)), torch.device("cpu"))
    with patch("datasets.loader.READERS", readers):
        for _ in reader(batches):
            pass
