"""Files that appear whole or not at all, folder locks, JSON and checksums. Needs no torch."""

import csv
import hashlib
import json
import os
import re
import time
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import filelock

from utils.cli import UserError

TICK_NS = 10**9
# Locks of this process by path; the system releases them when the process ends.
_open_locks = {}


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; move it to `path` when the block succeeds.

    An OSError without a file name, such as that of a full disk, gets the name of `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder, name=""):
    """Create `folder` and lock it until this process ends.

    `name` selects a separate lock inside the folder. A folder that cannot be written is not
    locked: a finished run in it can still be read. Raises UserError if another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder).resolve() / f".lock{name}"
    lock = _open_locks.get(path) or filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another process works in it; wait for it, or choose another with --out"
        ) from None
    except PermissionError:
        return
    except (NotImplementedError, OSError) as error:
        raise UserError(
            f"{folder}: cannot be locked ({error}); choose a folder on another disk with --out"
        ) from None
    _open_locks[path] = lock


def write_json(path, data):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path, hint):
    """Return the JSON object in `path`.

    Raises UserError with `hint`, the fix, if the file is missing or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except (ValueError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: not a JSON file; {hint}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: does not hold a JSON object; {hint}")
    return data


# What makes a spreadsheet run a cell. Leading quotes count, so that reading is the exact inverse.
FORMULA = r"(?='*[=+\-@\t\r])"


def write_table(path, header, rows):
    """Write a CSV table; a text that a spreadsheet would run as a formula gets a leading quote."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        for row in chain([header], rows):
            table.writerow([guard_cell(cell) for cell in row])


def guard_cell(value):
    return re.sub("^" + FORMULA, "'", value) if isinstance(value, str) else value


def read_table(path):
    """Return (header, rows) of a CSV table as texts, without the quotes of write_table."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = ([re.sub("^'" + FORMULA, "", c) for c in row] for row in csv.reader(file))
    return header, rows


def read_log(folder):
    """Return log.jsonl as a list of dicts, without a last line that a kill cut short."""
    lines = []
    for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cached_sha256(path):
    """Return the sha256 of a large file from a hidden file beside it, while the file is the same.

    The same: equal in size and in times of change (nanoseconds).
    """
    status, cache = os.stat(path), path.with_name(f".{path.name}.sha256")
    key = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if cache.exists() and cache.read_text(encoding="utf-8").startswith(f"{key} "):
        return cache.read_text(encoding="utf-8").split()[-1]
    digest = sha256(path)
    # A file that has just changed may change again within one tick of the clock.
    if time.time_ns() - status.st_ctime_ns > TICK_NS:
        # Processes that read one subset write at the same time: each has a temporary file of its
        # own. A folder that cannot be written has no cache.
        temporary = cache.with_name(f".part-{os.getpid()}-{cache.name}")
        with suppress(OSError):
            temporary.write_text(f"{key} {digest}", encoding="utf-8")
            os.replace(temporary, cache)
    return digest


@contextmanager
def name_errors(path):
    """Give an OSError without a file name, such as that of a full disk, this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def find_runs_folder(run):
    """Return the folder named runs above a run, or else the folder that holds the run."""
    return next((path for path in run.parents if path.name == "runs"), run.parent)
