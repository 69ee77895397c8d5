"""Every image decoded once, by all cores, into one array; resumable."""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.images import decode, image_size, squeeze
from utils.cli import SIGNALS, UserError
from utils.files import atomic_write

CHUNK = 32  # images per job of a worker and per line of the journal


def choose_stored_side(source):
    """Side of the stored squares: --store-size, or the longest side of all images if that is smaller (from the headers)."""
    limit, longest = source.store_size, source.side or 0
    for image in (
        () if source.side else tqdm(source.images, desc="sizes", unit="image", leave=False, delay=1)
    ):
        try:
            longest = max(longest, *image_size(image))
        except Exception:  # an unreadable image is reported by name when it is decoded
            continue
        if limit and longest >= limit:
            break
    return max(min(longest, limit or longest), 1)


def decode_block(images, side, channels, truncated):
    """Some images as they are stored: uint8 [n, side, side, channels], and [width, height, why unreadable, truncated] of each."""
    block, rows = np.zeros((len(images), side, side, channels), dtype=np.uint8), []
    for i, image in enumerate(images):
        try:
            pixels, cut = decode(image, channels, truncated)
            block[i] = squeeze(pixels, side)
            rows.append([pixels.shape[1], pixels.shape[0], None, cut])
        except MemoryError:
            raise
        except Exception as error:  # Pillow reports a broken image in many ways
            rows.append([0, 0, error_text(error), False])
    return block, rows


def pack_block(job):
    """Decode some images into their place of the .npy file. Returns (start, crc32 of the block, rows of decode_block)."""
    path, offset, start, *what = job
    block, rows = decode_block(*what)
    with open(
        path, "r+b"
    ) as file:  # not through a memory map: a full disk must be an error, not a SIGBUS
        file.seek(offset + start * block[0].nbytes)
        file.write(block)
    return start, zlib.crc32(block), rows


def error_text(error):
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow can identify"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def start_worker():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent's business
    parent = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os._exit(1)), daemon=True
    ).start()  # nor outlive a killed parent


def parallel_map(function, jobs, n, workers):
    """function of every one of n jobs, in their order, by several processes."""
    pool = (
        ProcessPoolExecutor(min(workers, n), initializer=start_worker)
        if workers > 1 and n > 1
        else None
    )
    try:
        yield from (pool.map if pool else map)(function, jobs)
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: the system killed a worker, most likely for want of memory; "
            "the same command with fewer goes on from here"
        ) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def pack_images(source, folder, side, workers):
    """Decode all images into folder/.part-images.npy. Returns its path and [width, height, why unreadable, truncated] of every image.

    A journal beside it holds what is finished, with a checksum, so that the same command goes on after a kill.
    """
    path, journal = folder / ".part-images.npy", folder / ".part-journal.jsonl"
    n, shape = len(source.images), (len(source.images), side, side, source.channels)
    head = {
        "source": source.digest,
        "shape": list(shape),
        "rows": "width height unreadable truncated",
    }
    done = read_journal(journal, path, head)
    if not done:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        with atomic_write(journal) as part:
            part.write_text(json.dumps(head) + "\n")
    offset = np.lib.format.open_memmap(path, mode="r").offset
    starts = [start for start in range(0, n, CHUNK) if start not in done]
    jobs = (
        (
            path,
            offset,
            start,
            source.images[start : start + CHUNK],
            side,
            source.channels,
            source.truncated,
        )
        for start in starts
    )
    packed = sum(map(len, done.values()))
    if done:
        print(f"going on: {packed} of {n} images are packed already")
    with (
        open(journal, "a") as log,
        tqdm(total=n, initial=packed, desc="pack", unit="image", leave=False, delay=0.5) as bar,
    ):
        for start, crc, rows in parallel_map(pack_block, jobs, len(starts), workers):
            log.write(json.dumps([start, crc, rows]) + "\n")
            log.flush()
            done[start] = rows
            bar.update(len(rows))
    return path, [row for start in sorted(done) for row in done[start]]


def read_journal(journal, path, head):
    """{start: rows} of the chunks of an earlier, stopped call that are really in the file. Empty when it was for something else."""
    if not (journal.exists() and path.exists()):
        return {}
    lines = []
    for line in journal.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # torn by the kill
            continue
    if not lines or lines[0] != head:
        return {}
    try:
        images = np.load(path, mmap_mode="r")
    except ValueError:
        return {}
    if list(images.shape) != head["shape"]:
        return {}
    done = {}
    for start, crc, rows in tqdm(lines[1:], desc="check", unit="chunk", leave=False, delay=1):
        unreadable = any(why for _, _, why, _ in rows)  # perhaps mended by now
        if not unreadable and zlib.crc32(read_block(path, start)) == crc:
            done[start] = rows
    return done


def drop_unreadable(path, packed, names, skip_bad):
    """Report the unreadable images and stop, or leave them out. Returns the path of the images kept and which they are, int [M]."""
    bad = [(name, row[2]) for name, row in zip(names, packed) if row[2]]
    readable = np.array([not row[2] for row in packed])
    if not bad:
        return path, np.flatnonzero(readable)
    shown = [f"  {name}: {why}" for name, why in (bad if skip_bad else bad[:20])]
    print(
        f"{len(bad)} unreadable image{'s' * (len(bad) > 1)}{', left out' if skip_bad else ''}:",
        *shown,
        sep="\n",
    )
    if not skip_bad or not readable.any():
        raise UserError(
            f"{bad[0][0]}: {bad[0][1]}"
            + (f" (and {len(bad) - 1} more unreadable images)" if len(bad) > 1 else "")
            + "; mend or remove what is listed"
            + ("" if skip_bad else ", or leave it out with --skip-bad")
        )
    kept = path.with_name(".part-kept.npy")
    shape = np.load(path, mmap_mode="r").shape[1:]
    out = np.lib.format.open_memmap(
        kept, mode="w+", dtype=np.uint8, shape=(int(readable.sum()), *shape)
    )
    with open(kept, "r+b") as file:
        file.seek(out.offset)
        for start in range(0, len(readable), CHUNK):
            file.write(read_block(path, start)[readable[start : start + CHUNK]])
    return kept, np.flatnonzero(readable)


def read_block(path, start):
    """The packed images from row `start` on, CHUNK at most; read and not mapped, since the pages of a map count as memory that is used."""
    images = np.load(path, mmap_mode="r")
    n, size = min(CHUNK, len(images) - start), math.prod(images.shape[1:])
    return np.fromfile(
        path, dtype=np.uint8, count=n * size, offset=images.offset + start * size
    ).reshape(n, *images.shape[1:])


def write_index(path, source, packed, good):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "split", "label", "class", "width", "height", "source"])
        for row, i in enumerate(good):
            label = int(source.labels[i])
            writer.writerow(
                [
                    row,
                    source.split[i],
                    label,
                    source.classes[label],
                    packed[i][0],
                    packed[i][1],
                    source.names[i],
                ]
            )


def read_index(path):
    """labels int [M], split str [M], sizes int [M, 2] (height, width), names list [M]."""
    with open(path, newline="", encoding="utf-8") as file:
        index = list(csv.DictReader(file))
    return (
        np.array([int(row["label"]) for row in index]),
        np.array([row["split"] for row in index]),
        np.array([(int(row["height"]), int(row["width"])) for row in index]),
        [row["source"] for row in index],
    )


def scan_images(path, index, workers):
    """One pass over the packed images, for every ratio and for the warning of leaks.

    Returns sums of pixels and of their squares [M, 2, C], exact integers in float64; whether all images have equal channels; the
    brightest pixel; and the leaks: rows of equal pictures (and equal true sizes) in two splits or in both classes, a list of lists.
    """
    labels, split, sizes, _ = index
    n, sums, grey, brightest, same = len(labels), [], True, 0, {}
    jobs = ((path, start) for start in range(0, n, CHUNK))
    with tqdm(total=n, desc="survey", unit="image", leave=False, delay=1) as bar:
        for block_sums, block_grey, block_brightest, digests in parallel_map(
            scan_block, jobs, -(-n // CHUNK), workers
        ):
            for row, digest in enumerate(digests, CHUNK * len(sums)):
                same.setdefault((digest, *sizes[row]), []).append(row)
            sums.append(block_sums)
            grey, brightest = grey and block_grey, max(brightest, block_brightest)
            bar.update(len(digests))
    return (
        np.concatenate(sums),
        grey,
        brightest,
        [rows for rows in same.values() if len(set(zip(labels[rows], split[rows]))) > 1],
    )


def scan_block(job):
    """Of the images from one row on: sums of pixels and of their squares [n, 2, C], whether all are grey, the brightest pixel, sha256 of each."""
    block, level = read_block(*job), np.arange(256.0)
    histograms = np.array(
        [
            [np.bincount(image[..., c].ravel(), minlength=256) for c in range(block.shape[3])]
            for image in block
        ]
    )  # [n, C, 256]
    sums = np.stack([histograms @ level, histograms @ level**2], axis=1)
    grey = (
        block.shape[3] == 3
        and bool((histograms == histograms[:, :1]).all())
        and bool((block == block[..., :1]).all())
    )
    return sums, grey, int(block.max()), [hashlib.sha256(image).digest() for image in block]


def mean_std(sums, pixels):
    """Per channel, in [0, 1]; sums [n, 2, C] of n images of `pixels` pixels. An all-equal channel gets std 1/255, never 0."""
    first, second = sums.sum(0) / (len(sums) * pixels)  # [C] each
    std = np.sqrt(np.maximum(second - first**2, 1)) / 255
    return [round(float(m), 6) for m in first / 255], [round(float(s), 6) for s in std]


def select_images(images, positions):
    """Some of the images of a Source, ascending and, where nothing was left out, in one slice."""
    if positions[-1] - positions[0] == len(positions) - 1:
        return images[positions[0] : positions[-1] + 1]
    return [image for i in positions for image in images[i : i + 1]]


def count_workers(source, args):
    """How many processes: one where images are not decoded from files, for arrays would have to be sent to the others."""
    if not isinstance(source.images[:1][0], Path):
        return 1
    return args.workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def check_block(job):
    """Decode some images again. Returns, for each, whether it is what the .npy file holds from row `start` on, and whether it is truncated."""
    path, start, *what = job
    block, rows = decode_block(*what)
    same = (read_block(path, start) == block).all(axis=(1, 2, 3))
    return [(bool(equal) and not why, cut) for equal, (_, _, why, cut) in zip(same, rows)]
