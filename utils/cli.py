"""The command line: argparse with one clear line for a user's mistake. Needs no torch."""

import argparse
import difflib
import math
import os
import re
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


class HelpFormatter(argparse.HelpFormatter):
    """Show defaults; keep a flag and its help on one line where they fit."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=118)

    def _get_help_string(self, action):
        has_default = action.nargs != 0 and action.default is not None
        return f"{action.help} (default: %(default)s)" if has_default else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse with UserErrors; --smoke replaces defaults but never what was typed.

    Flags lie in groups with these titles, in this order: data, method, training, machine,
    output. Each script gives an example, the last line of its --help.
    """

    flags = ()  # of the parser in use

    def __init__(self, description, smoke=None, example=None):
        super().__init__(
            description=description,
            epilog=example and f"example: {example}",
            allow_abbrev=False,
            add_help=False,
            formatter_class=HelpFormatter,
        )
        self.smoke = smoke or {}
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def error(self, message):
        nearest = self.find_nearest(message)
        hint = f"did you mean {nearest}?" if nearest else "run with --help to see all flags"
        raise UserError(f"{message}; {hint}")

    def find_nearest(self, message):
        """Return the known flag or choice nearest to the mistyped one, or None."""
        if flag := re.match(r"unrecognized arguments: --?([^\s=]+)", message):
            typed, prefix = flag[1].replace("_", "-"), "--"
            known = [name.lstrip("-") for name in self._option_string_actions]
        elif choice := re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message):
            typed, prefix, known = choice[1], "", re.findall(r"[\w-]+", choice[2])
        else:
            return None
        nearest = difflib.get_close_matches(typed.lower(), known, n=1)
        return prefix + nearest[0] if nearest else None

    def parse_args(self, args=None):
        ArgumentParser.flags = self._option_string_actions
        positional = [action for action in self._actions if not action.option_strings]
        names = [
            f"{action.metavar or action.dest}{' ...' * (action.nargs in ('+', '*'))}"
            for action in positional
            if action.help is not argparse.SUPPRESS
        ]
        self.usage = " ".join(["%(prog)s", *names, "[options]"])
        parsed = super().parse_args(args)
        if getattr(parsed, "smoke", False):
            self.set_defaults(**self.smoke)
            parsed = super().parse_args(args)
        return parsed


def number_from(low, kind=int, high=math.inf):
    """Return an argparse type: a finite number of `kind` from `low` to `high`."""
    limits = f"from {low} up" if high == math.inf else f"from {low} to {high}"

    def number(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not a number {limits}")
        return value

    number.__name__ = kind.__name__
    return number


def share(text):
    """Parse a share, an argparse type: a number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1, such as 0.2")
    return value


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
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError, without importing torch
        is_gpu = type(error).__name__ == "OutOfMemoryError"
        # torch has no exception of its own for the memory of the CPU
        if not (is_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        status, message = 1, f"out of {'GPU ' * is_gpu}memory; use a smaller {name_memory_flags()}"
    # All ranks of a machine meet the same mistake; the first one reports it.
    if status == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def name_memory_flags():
    """Return the flags of this script that save memory; --chunk does not change the result."""
    flags = ("--chunk", "--batch-size", "--size")
    return " or ".join(flag for flag in flags if flag in ArgumentParser.flags) or "input"


def command_line(exclude=()):
    """Return the command as typed, without the words in `exclude`."""
    words = [word for word in sys.argv[1:] if word not in map(str, exclude)]
    return shlex.join(["python", Path(sys.argv[0]).name, *words])


def print_next(script, *words, smoke=False):
    """Print the command that follows, ready to be typed; smoke runs are followed by smoke runs."""
    words = [*map(str, words), *["--smoke"] * smoke]
    print(f"next: python {script} {shlex.join(words)}")
