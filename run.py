"""The command line and its files: one clear line for a user's mistake, files that appear whole or not at all. Needs no torch."""

import argparse
import errno
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that its user can mend: one line that names the file or flag and the way out; exit code 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, one line like any other mistake; --smoke replaces defaults, never what was typed."""

    def __init__(self, description, smoke=None):
        super().__init__(description=description, usage="%(prog)s", allow_abbrev=False,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))
        self.smoke = smoke or {}

    def add_argument(self, *flags, help, **options):
        if not flags[0].startswith("-"):
            self.usage += " " + options.get("metavar", flags[0]) + (" ..." if options.get("nargs") in ("+", "*") else "")
        if options.get("default") not in (None, argparse.SUPPRESS):
            help += f" (default: {options['default']})"
        return super().add_argument(*flags, help=help, **options)

    def error(self, message):
        raise UserError(f"{message}; --help lists what there is")

    def parse_args(self, args=None):
        self.usage += " [options]"
        parsed = super().parse_args(args)
        if getattr(parsed, "smoke", False):
            self.set_defaults(**self.smoke)
            parsed = super().parse_args(args)
        return parsed


def at_least(low, kind=int):
    """An argparse type: a number of `kind` that is not below `low`."""
    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        return value
    number.__name__ = kind.__name__
    return number


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]          # USR1: SLURM before it pre-empts


class Stopped(KeyboardInterrupt):
    """One of SIGNALS has arrived. `within`: what a checkpoint needs to go on in the middle of an epoch, None where that is not known."""

    def __init__(self, number, within=None):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.within = number, within


class Stop:
    """A block in which a signal to stop is only noted, in `number`, so that a loop can finish its step. Another after 2 s stops it at once,
    and so does the end of the block."""

    def __init__(self, within=None):
        """within: where the last one stopped, for the loop to go on."""
        self.number, self.within = None, within

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number, frame):
        if self.number and time.monotonic() - self.at > 2:       # sooner, it is the same one: to a process and to its group
            raise Stopped(number)
        if not self.number:
            self.number, self.at = number, time.monotonic()

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and error is None:
            raise Stopped(self.number)


def stop_now(number, frame):
    raise Stopped(number)


def cli(main):
    """Call a script's main(). A UserError or a path that cannot be written ends as one line and exit code 2, a signal as 128 + its number.

    Afterwards, as while torch is loaded between two calls, a signal ends the process at once and without a word.
    """
    for number in SIGNALS:
        signal.signal(number, stop_now)
    try:
        main()
    except UserError as error:
        status, message = 2, str(error)
    except Stopped as stopped:
        status, message = 128 + stopped.number, f"{stopped}; the same command goes on from what is finished"
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":            # torch's; not imported here
            raise
        status, message = 1, "out of GPU memory; use a smaller --batch-size"
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            status, message = 2, f"{error.filename}: {error.strerror}; choose a place you may write to with --out"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            status, message = 1, f"{error.filename or 'output'}: {error.strerror}; free some space and give the same command again"
        else:
            raise
    else:
        return
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    if status == 1 or os.environ.get("LOCAL_RANK", "0") == "0":   # torchrun's processes meet the same: the first of a machine tells
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def naming(path):
    """A block in which an OSError that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def whole(path):
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


HELD = []                                                         # open lock files; the system lets go of them when the process ends


def hold(folder, what=""):
    """Make `folder` and keep it for this process until it ends, however it ends. UserError while another process holds it.

    what: not all of it, but what is written there under this name.
    """
    import fcntl
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        file = open(Path(folder) / f".lock{what}", "a")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):            # who may not write there cannot disturb: what is finished can be read
            return
        raise
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder}: cannot be locked ({error.strerror}); choose a folder on another disk with --out") from None
        raise UserError(f"{folder}: another process is at work in it; wait until it has ended, or choose another folder with --out") from None
    HELD.append(file)


def write_json(path, data):
    with whole(path) as part:
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


def command_line(others=()):
    """The command as typed, without the words in `others`."""
    return shlex.join(["python", Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if word not in map(str, others))])
