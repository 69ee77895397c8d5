"""The names that flags take."""

import pytest
from conftest import call

import finetune
import pretrain


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
