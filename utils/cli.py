"""The command line: argparse with one clear line for a user's mistake. Needs no torch."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

# SIGUSR1 is SLURM's usual warning before it ends a job.
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and the fix; exit code 2."""


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS has arrived."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class ArgumentParser(argparse.ArgumentParser):
    """argparse with UserErrors; --smoke replaces defaults but never what was typed."""

    def __init__(self, description, smoke=None):
        def formatter(prog):
            return argparse.HelpFormatter(prog, max_help_position=30, width=118)

        super().__init__(
            description=description,
            usage="%(prog)s",
            allow_abbrev=False,
            formatter_class=formatter,
        )
        self.smoke = smoke or {}

    def add_argument(self, *flags, help, **options):
        if not flags[0].startswith("-"):
            several = " ..." if options.get("nargs") in ("+", "*") else ""
            self.usage += f" {options.get('metavar', flags[0])}{several}"
        return super().add_argument(*flags, help=help_text(help, options), **options)

    def add_argument_group(self, title):
        group = super().add_argument_group(title)
        add_argument = group.add_argument

        def add(*flags, help, **options):
            return add_argument(*flags, help=help_text(help, options), **options)

        group.add_argument = add
        return group

    def error(self, message):
        raise UserError(f"{message}; run with --help to see all flags")

    def parse_args(self, args=None):
        self.usage += " [options]"
        parsed = super().parse_args(args)
        if getattr(parsed, "smoke", False):
            self.set_defaults(**self.smoke)
            parsed = super().parse_args(args)
        return parsed


def help_text(text, options):
    if options.get("default") in (None, argparse.SUPPRESS):
        return text
    return f"{text} (default: {options['default']})"


def number_from(low, kind=int):
    """Return an argparse type: a finite number of `kind` that is at least `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} up")
        return value

    number.__name__ = kind.__name__
    return number


def interrupt(number, frame):
    raise Interrupted(number)


def run_main(main):
    """Call a script's main(); report a mistake, a signal or a failed write as one line.

    Exit code: 2 for a user's mistake, 128 + n for signal n, 1 for a full disk or GPU memory.
    """
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        main()
        return
    except UserError as error:
        status, message = 2, str(error)
    except Interrupted as stop:
        status = 128 + stop.number
        message = f"stopped by {stop}; run the same command again to continue"
    except OSError as error:
        if error.filename is None:
            raise
        misplaced = PermissionError, FileNotFoundError, FileExistsError
        status = 2 if isinstance(error, misplaced + (NotADirectoryError, IsADirectoryError)) else 1
        message = f"{error.filename}: {error.strerror}; choose another place, or free some space"
    except RuntimeError as error:
        # torch.OutOfMemoryError, without importing torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        status, message = 1, "out of GPU memory; use --chunk, or a smaller --batch-size"
    # All ranks of a machine meet the same mistake; the first one reports it.
    if status == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def command_line(exclude=()):
    """Return the command as typed, without the words in `exclude`."""
    words = [word for word in sys.argv[1:] if word not in map(str, exclude)]
    return shlex.join(["python", Path(sys.argv[0]).name, *words])
