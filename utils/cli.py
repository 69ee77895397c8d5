"""The command line and its files: one clear line for a user's mistake, files that appear whole or not at all. Needs no torch."""

import argparse
import errno
import os
import shlex
import signal
import sys
import time
from pathlib import Path


class UserError(Exception):
    """A mistake that its user can mend: one line that names the file or flag and the way out; exit code 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, one line like any other mistake; --smoke replaces defaults, never what was typed."""

    def __init__(self, description, smoke=None):
        super().__init__(
            description=description,
            usage="%(prog)s",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=118
            ),
        )
        self.smoke = smoke or {}

    def add_argument(self, *flags, help, **options):
        if not flags[0].startswith("-"):
            self.usage += (
                " "
                + options.get("metavar", flags[0])
                + (" ..." if options.get("nargs") in ("+", "*") else "")
            )
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


def number_from(low, kind=int):
    """An argparse type: a number of `kind` that is not below `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        return value

    number.__name__ = kind.__name__
    return number


SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]  # USR1: SLURM before it pre-empts


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
        if (
            self.number and time.monotonic() - self.at > 2
        ):  # sooner, it is the same one: to a process and to its group
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


def run_main(main):
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
        status, message = (
            128 + stopped.number,
            f"{stopped}; the same command goes on from what is finished",
        )
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here
            raise
        status, message = 1, "out of GPU memory; use a smaller --batch-size"
    except OSError as error:
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOENT,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.EISDIR,
        ):
            status, message = (
                2,
                f"{error.filename}: {error.strerror}; choose a place you may write to with --out",
            )
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            status, message = (
                1,
                f"{error.filename or 'output'}: {error.strerror}; free some space and give the same command again",
            )
        else:
            raise
    else:
        return
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    if (
        status == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    ):  # torchrun's processes meet the same: the first of a machine tells
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def command_line(others=()):
    """The command as typed, without the words in `others`."""
    return shlex.join(
        [
            "python",
            Path(sys.argv[0]).name,
            *(word for word in sys.argv[1:] if word not in map(str, others)),
        ]
    )
