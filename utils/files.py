"""Files that appear whole or not at all, locks, JSON and checksums."""

import errno
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from utils.cli import UserError


@contextmanager
def naming(path):
    """A block in which an OSError that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`, moved to `path` when the block succeeds: no half-written files, even if the machine dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        with naming(path):
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


HELD = []  # open lock files; the system lets go of them when the process ends


def lock_folder(folder, what=""):
    """Make `folder` and keep it for this process until it ends, however it ends. UserError while another process holds it.

    what: not all of it, but what is written there under this name.
    """
    import fcntl

    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        file = open(Path(folder) / f".lock{what}", "a")
    except OSError as error:
        if error.errno in (
            errno.EACCES,
            errno.EROFS,
        ):  # who may not write there cannot disturb: what is finished can be read
            return
        raise
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{folder}: cannot be locked ({error.strerror}); choose a folder on another disk with --out"
            ) from None
        raise UserError(
            f"{folder}: another process is at work in it; wait until it has ended, or choose another folder with --out"
        ) from None
    HELD.append(file)


def write_json(path, data):
    with atomic_write(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path, way_out):
    """The JSON object in `path`. UserError with `way_out` when it is missing or not JSON."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {way_out}") from None
    except (ValueError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: not a JSON file; {way_out}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not the JSON object expected; {way_out}")
    return data


def read_log(folder):
    """log.jsonl as dicts; a last line torn by a kill is left out."""
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
