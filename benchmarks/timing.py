"""Times in rounds, ratios, peak memory, and the table of results."""

import ctypes
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
WARMUP_IMAGES = 32


def time_step(step, *data, repeats=1):
    """Return the mean seconds of `repeats` calls of step(*data)."""
    start = read_clock()
    for _ in range(repeats):
        step(*data)
    return (read_clock() - start) / repeats


def read_clock():
    """Return the time in seconds after the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_rounds(variants, rounds, min_seconds=0.0):
    """Time every variant once per round, in turn, after one warm-up round that fills caches.

    variants: name -> function without arguments. A variant is repeated within a round until
    min_seconds have passed. Returns name -> seconds of one call, a list over the rounds.
    """
    warmup = {name: time_step(step) for name, step in variants.items()}
    repeats = {name: max(1, int(min_seconds / seconds)) for name, seconds in warmup.items()}
    seconds = {name: [] for name in variants}
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name, step in variants.items():
            seconds[name].append(time_step(step, repeats=repeats[name]))
    return seconds


def compare_times(seconds, reference):
    """Return statistics over rounds: time relative to the reference, and median seconds."""
    ratio = np.array(seconds) / np.array(reference)
    return {
        "ratio": float(np.median(ratio)),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
        "seconds": float(np.median(seconds)),
    }


def compare_throughput(seconds, reference, images):
    """Return statistics over rounds: throughput relative to the reference.

    images: number of images that both process in one round.
    """
    median = float(np.median(seconds))
    speed = {"seconds": median, "per second": images / median}
    return {**compare_times(reference, seconds), **speed}


def measure_peak_memory(step, *data):
    """Return the peak memory in bytes of step(*data), beyond what is in use before it.

    On the CPU this needs Linux and the GNU C library. Call it before anything else is timed:
    gaps that other work leaves in the heap count as used when they are filled.
    """
    device = data[0].device
    step(*(tensor[:WARMUP_IMAGES].detach() for tensor in data))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(*data)
        return torch.cuda.max_memory_allocated(device) - before
    set_largest_kept_block(2**16)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_memory("VmRSS")
    step(*data)
    peak = read_memory("VmHWM") - before
    set_largest_kept_block(2**25)
    return peak


def set_largest_kept_block(n_bytes):
    """Let malloc return freed blocks above this size to the system at once (at most 32 MiB).

    Freed tensors that malloc keeps would hide what a step needs. Without them it is slower.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, n_bytes)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * n_bytes)
    libc.malloc_trim(0)


def read_memory(field):
    """Return a field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def print_table(results):
    """Print nested results as one Markdown table, with a row for every dict that holds values."""
    rows = dict(table_rows(results))
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(format_cell(row.get(c, '')) for c in columns)} |")


def table_rows(results, path=()):
    values = {key: value for key, value in results.items() if not isinstance(value, dict)}
    if values:
        yield ", ".join(path), values
    for key, value in results.items():
        if isinstance(value, dict):
            yield from table_rows(value, (*path, str(key)))


def format_cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
