"""The command line: the names that flags take, --help, and mistyped flags."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call

import evaluate_metrics
import finetune
import pretrain
from utils.cli import ArgumentParser, UserError, print_next, run_main


def test_the_names_that_flags_take_are_those_there_are(capsys):
    assert list(pretrain.OPTIONS) == list(pretrain.METHODS)
    chosen = {
        name: options["variant"]
        for name, options in pretrain.OPTIONS.items()
        if "variant" in options
    }
    assert chosen == {name: variants[0] for name, variants in pretrain.VARIANTS.items()}
    with pytest.raises(SystemExit):
        call(finetune, "--help")
    assert f"--loss {{{','.join(finetune.LOSSES)}}}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--batch_size", "8"], "did you mean --batch-size?"),
        (["--root=/data"], "did you mean --data-root?"),
        (["--method", "SupMin"], "did you mean supmin?"),
        (["--pretrained"], "run with --help to see all flags"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(words, hint):
    parser = ArgumentParser("Train.", example="python pretrain.py subset.json")
    add = parser.add_argument_group("data").add_argument
    add("--data-root", help="folder of the images")
    add("--batch-size", type=int, default=256, help="images")
    add("--method", choices=["supcon", "supmin"], help="loss")
    with pytest.raises(UserError) as error:
        parser.parse_args(words)
    assert str(error.value).endswith(hint)


def test_help_shows_defaults_and_ends_with_an_example(capsys):
    parser = ArgumentParser("Train.", example="python pretrain.py subset.json")
    add = parser.add_argument_group("data").add_argument
    add("runs", nargs="+", metavar="run", help="run folders")
    add("--seed", type=int, default=0, help="of the weights")
    add("--grayscale", action="store_true", help="one channel")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    usage, *_, example = (printed := capsys.readouterr().out).splitlines()
    assert usage.endswith("run ... [options]") and "weights (default: 0)" in printed
    assert "channel\n" in printed and example == "example: python pretrain.py subset.json"


def test_the_next_command_can_be_typed(capsys):
    runs = [Path("my runs/a"), Path("b"), Path("c"), Path("d")]
    print_next("evaluate_metrics.py", *runs, smoke=True)
    typed = "next: python evaluate_metrics.py 'my runs/a' b c d --smoke\n"
    assert capsys.readouterr().out == typed


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**57), lambda: np.empty(2**57)])
@pytest.mark.parametrize(
    "parser, flags",
    [
        (pretrain.parse_args, "--chunk or --batch-size or --size"),
        (evaluate_metrics.parse_args, "--batch-size"),
    ],
)
def test_too_little_memory_is_one_line(allocate, parser, flags, monkeypatch, capsys, handlers):
    """The line names the flags that the script has."""

    def main():
        parser()
        allocate()

    monkeypatch.setattr("sys.argv", ["script.py", "folder"])

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(f"out of memory; use a smaller {flags}\n")
