"""Packing of photographs by make_subsets.py: time relative to Pillow alone, and memory."""

import re
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.synthetic import IMAGES_PER_CATEGORY, packing_command, synthetic_photographs
from benchmarks.timing import compare_times, time_in_rounds
from datasets.pack import BLOCK, pack_block
from utils.cli import UserError
from utils.files import sha256

IMAGES = 15120
STORED_SIDE = 320  # pixels
TIMED_IMAGES = 1000  # of those, for the comparison on one core
POLL_SECONDS = 0.2


def measure_subsets(args, device):
    """Measure packing on one core against a Pillow loop, then make_subsets.py with its workers.

    Raises UserError if the packed bytes depend on the number of workers.
    """
    with tempfile.TemporaryDirectory(prefix="subsets-") as folder:
        root, images = Path(folder), 140 if args.smoke else IMAGES
        files = synthetic_photographs(root, images // sum(IMAGES_PER_CATEGORY.values()))
        sample = files[:: max(1, images // TIMED_IMAGES)]
        seconds = time_in_rounds(
            {
                "pillow": partial(decode_with_pillow, sample),
                "packing": partial(pack_in_blocks, sample, root / "one-core.npy"),
            },
            args.rounds,
        )
        results = {
            "images": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "one core": compare_times(seconds["packing"], seconds["pillow"]),
            "one worker": run_packing(root, root / "one", "--workers", "1"),
            "all workers": run_packing(root, root / "all"),
        }
        if packed_checksums(root / "one") != packed_checksums(root / "all"):
            raise UserError("the packed bytes depend on the number of workers")
    return {}, results


def decode_with_pillow(files):
    """Open, convert and resize every file, and store nothing."""
    for file in files:
        image = Image.open(file).convert("RGB")
        np.asarray(image.resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BICUBIC))


def pack_in_blocks(files, path):
    """Pack the files into `path` as a worker of make_subsets.py does."""
    shape = (len(files), STORED_SIDE, STORED_SIDE, 3)
    offset = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).offset
    for start in range(0, len(files), BLOCK):
        block = files[start : start + BLOCK]
        pack_block((path, offset, start, block, STORED_SIDE, 3, False))


def run_packing(root, out, *flags):
    """Run make_subsets.py and return its seconds and its peak memory in MiB."""
    start = time.time()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(packing_command(root, out, *flags), **quiet)
    peak = watch_memory(process)
    if process.returncode:
        raise UserError(f"make_subsets.py ended with exit code {process.returncode}")
    return {"seconds": time.time() - start, "peak_mib": peak}


def watch_memory(process):
    """Return the peak memory in MiB of a process and its children until it ends (Linux).

    The proportional set size counts pages that processes share once.
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(read_proportional_mib, [process.pid, *child_ids(process.pid)])))
        time.sleep(POLL_SECONDS)
    return peak


def child_ids(pid):
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return []
    return [int(child) for text in lists for child in text.split()]


def read_proportional_mib(pid):
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return 0
    size = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
    return int(size[1]) / 1024 if size else 0


def packed_checksums(out):
    return [sha256(out / "inat21-mammals" / name) for name in ("images.npy", "index.csv")]
