"""Pack images: decode each once, on all cores, into one array; scan what is packed.

images.npy holds uint8 [M, S, S, C], index.csv one line per image. While they are made, they are
called .part-images.npy and .part-index.csv, and .part-rows.jsonl counts the images that are done.
"""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.images import decode, image_size, squeeze
from utils.cli import SIGNALS, UserError
from utils.files import atomic_write, name_errors

BLOCK = 32  # images per job of a worker
DARK = 16  # grey level; the brightest pixel of 12 bits in a file of 16 bits lies below it


class Packed:
    """Packed images and their index: labels int [M], split str [M], true sizes [M, 2], names."""

    def __init__(self, images_path, index_path, skipped, truncated):
        """skipped: number of images left out; truncated: names of truncated files."""
        self.images_path, self.index_path = images_path, index_path
        self.skipped, self.truncated = skipped, truncated
        self.shape = np.load(images_path, mmap_mode="r").shape
        self.labels, self.split, self.sizes, self.names = read_index(index_path)


def read_index(path):
    """Read index.csv: labels int [M], split str [M], height and width int [M, 2], names."""
    with open(path, newline="", encoding="utf-8") as file:
        index = list(csv.DictReader(file))
    return (
        np.array([int(row["label"]) for row in index]),
        np.array([row["split"] for row in index]),
        np.array([(int(row["height"]), int(row["width"])) for row in index]),
        [row["source"] for row in index],
    )


def open_packed(folder, record):
    """Open the packed images of a finished folder; record: content of one of its <ratio>.json."""
    skipped, truncated = record["settings"]["skipped"], record["truncated"]
    return Packed(folder / "images.npy", folder / "index.csv", skipped, truncated)


def pack_images(source, folder, store_size, workers, skip_bad):
    """Pack all images of a Source into a locked folder, under temporary names.

    A stopped call is continued by its row counter. Unreadable images are listed; they raise
    UserError, or are left out if `skip_bad`.
    """
    images_path, index_path = folder / ".part-images.npy", folder / ".part-index.csv"
    with name_errors(folder):
        side = choose_stored_side(source, store_size)
        rows = decode_images(source, images_path, side, workers, skip_bad)
        kept = [i for i, row in enumerate(rows) if not row[2]]
        if len(kept) < len(rows):
            images_path = drop_unreadable(images_path, rows, source.names, skip_bad)
        with open(index_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["row", "split", "label", "class", "width", "height", "source"])
            for row, i in enumerate(kept):
                label, size = int(source.labels[i]), rows[i][:2]
                name = source.classes[label]
                writer.writerow([row, source.split[i], label, name, *size, source.names[i]])
    truncated = [source.names[i] for i in kept if rows[i][3]]
    return Packed(images_path, index_path, len(rows) - len(kept), truncated)


def choose_stored_side(source, limit):
    """Choose the side of the stored squares: the longest side of all images, `limit` at most."""
    longest = source.side or 1
    for image in () if source.side else tqdm(source.images, "sizes", leave=False, disable=None):
        try:
            longest = max(longest, *image_size(image))
        except Exception:  # an unreadable image is reported by name when it is decoded
            continue
        if limit and longest >= limit:
            break
    return min(longest, limit or longest)


def decode_images(source, path, side, workers, skip_bad):
    """Decode all images of a Source into an .npy file, uint8 [M, side, side, C].

    Returns a row per image: [width, height, why it is unreadable or None, whether truncated].
    """
    counter = path.with_name(".part-rows.jsonl")
    n, shape = len(source.images), (len(source.images), side, side, source.channels)
    header = {"source": source.digest, "shape": list(shape)}
    rows = read_rows(counter, header, skip_bad) if path.exists() else []
    if rows:
        print(f"continuing: {len(rows)} of {n} images are packed")
    else:
        # no counter may outlive the images that it counts
        counter.unlink(missing_ok=True)
        create_array(path, shape)
    with atomic_write(counter) as tmp:
        tmp.write_text("".join(f"{json.dumps(line)}\n" for line in [header, *rows]))
    starts, offset = range(len(rows), n, BLOCK), np.load(path, mmap_mode="r").offset
    jobs = (
        (path, offset, i, source.images[i : i + BLOCK], side, source.channels, source.truncated)
        for i in starts
    )
    bar = tqdm(total=n, initial=len(rows), desc="pack", unit="image", leave=False, disable=None)
    with open(counter, "a") as lines, open(path, "rb") as images, bar:
        for block_rows in parallel_map(pack_block, jobs, len(starts), workers):
            # images reach the disk before they count
            os.fsync(images.fileno())
            lines.write("".join(f"{json.dumps(row)}\n" for row in block_rows))
            lines.flush()
            rows += block_rows
            bar.update(len(block_rows))
    return rows


def create_array(path, shape):
    """Create an .npy file of zeros, which take no space on the disk."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + math.prod(shape))


def read_rows(path, header, skip_bad):
    """Read the rows of whole blocks that an earlier call packed; [] if it packed other images.

    Without `skip_bad` they end before the first unreadable image, which may be readable by now.
    """
    rows = []
    try:
        first, *lines = path.read_text().splitlines()
        for row in map(json.loads, lines if json.loads(first) == header else ()):
            if row[2] and not skip_bad:
                break
            rows.append(row)
    except (FileNotFoundError, ValueError):  # none, or a last line that a kill has torn
        pass
    return rows[: len(rows) // BLOCK * BLOCK]


def pack_block(job):
    """Decode some images into their place of an .npy file; returns the rows of decode_block."""
    path, offset, start, *images = job
    block, rows = decode_block(*images)
    # written, not mapped: with a mapped file, a full disk ends the process without an error
    with open(path, "r+b") as file:
        file.seek(offset + start * block[0].nbytes)
        file.write(block)
    return rows


def decode_block(images, side, channels, truncated):
    """Decode some images: (uint8 [n, side, side, channels], a row for each as decode_images)."""
    block, rows = np.zeros((len(images), side, side, channels), dtype=np.uint8), []
    for i, image in enumerate(images):
        try:
            pixels, is_truncated = decode(image, channels, truncated)
            block[i] = squeeze(pixels, side)
            rows.append([pixels.shape[1], pixels.shape[0], None, is_truncated])
        except MemoryError:
            raise
        except Exception as error:  # Pillow reports a broken image in many ways
            text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            rows.append([0, 0, text, False])
    return block, rows


def drop_unreadable(path, rows, names, skip_bad):
    """List the unreadable images, then raise UserError, or copy the others to a new file."""
    bad = [f"{name}: {row[2]}" for name, row in zip(names, rows, strict=True) if row[2]]
    print(f"unreadable images{', left out' if skip_bad else ''} ({len(bad)}):", *bad, sep="\n  ")
    readable = np.array([not row[2] for row in rows])
    if not skip_bad or not readable.any():
        raise UserError(
            f"{bad[0]}; repair or remove the {len(bad)} images listed above"
            + ("" if skip_bad else ", or leave them out with --skip-bad")
        )
    kept, images = path.with_name(".part-kept.npy"), np.load(path, mmap_mode="r")
    create_array(kept, (int(readable.sum()), *images.shape[1:]))
    with open(kept, "r+b") as file:
        file.seek(images.offset)
        for start in range(0, len(readable), BLOCK):
            file.write(images[start : start + BLOCK][readable[start : start + BLOCK]])
    return kept


def parallel_map(function, jobs, n, workers):
    """Yield function(job) of n jobs, in their order, from `workers` processes."""
    if workers < 2 or n < 2:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, n), initializer=start_worker)
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: the system killed a worker, most likely for want of memory; "
            "run the same command with fewer to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Leave signals to the parent process, and end when it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def count_workers(source, workers):
    """Count the processes to use; one for arrays, which would have to be sent to the others."""
    if not isinstance(source.images[:1][0], Path):
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")
    return workers or (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def scan_images(packed, workers):
    """Read the packed images once, for every ratio: (sums, leaks, lines to print).

    sums: of pixels and of their squares, float [M, 2, C], exact integers. leaks: lists of names
    of equal pictures in two splits or in both classes.
    """
    n, sums, is_grey, n_dark, same = len(packed.labels), [], True, 0, {}
    jobs = ((packed.images_path, start) for start in range(0, n, BLOCK))
    blocks = parallel_map(scan_block, jobs, math.ceil(n / BLOCK), workers)
    for block in tqdm(blocks, "scan", math.ceil(n / BLOCK), leave=False, disable=None):
        for row, digest in enumerate(block[3], len(sums)):
            # equal pictures have equal true sizes, too
            same.setdefault((digest, *packed.sizes[row]), []).append(row)
        sums.extend(block[0])
        is_grey, n_dark = is_grey and block[1], n_dark + block[2]
    leaks = [
        [packed.names[row] for row in rows]
        for rows in same.values()
        if len(set(zip(packed.labels[rows], packed.split[rows], strict=True))) > 1
    ]
    notes = ["every image is grey; --grayscale would store one channel"] if is_grey else []
    if n_dark:
        notes += [
            f"WARNING: images without a pixel above {DARK - 1} of 255: {n_dark} of {n}; "
            "scale 16-bit files to their full range"
        ]
    return np.array(sums), leaks, notes


def scan_block(job):
    """Scan some packed images: sums [n, 2, C], whether all are grey, how many dark, sha256s."""
    path, start = job
    block, levels = np.load(path, mmap_mode="r")[start : start + BLOCK], np.arange(256.0)
    channels = range(block.shape[3])
    histograms = np.array(
        [[np.bincount(image[..., c].ravel(), minlength=256) for c in channels] for image in block]
    )
    sums = np.stack([histograms @ levels, histograms @ levels**2], axis=1)
    is_grey = block.shape[3] == 3 and bool((block == block[..., :1]).all())
    n_dark = int((block.max(axis=(1, 2, 3)) < DARK).sum())
    return sums, is_grey, n_dark, [hashlib.sha256(image).digest() for image in block]


def mean_std(sums, pixels):
    """Compute mean and std per channel, in [0, 1], from sums [n, 2, C] of images of `pixels`.

    The std of a constant channel is 1/255, never 0.
    """
    mean, square = sums.sum(0) / (len(sums) * pixels)
    std = np.sqrt(np.maximum(square - mean**2, 1)) / 255
    return [round(float(m), 6) for m in mean / 255], [round(float(s), 6) for s in std]
