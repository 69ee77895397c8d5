"""Each benchmark runs and writes its figures."""

import json

import pytest
from conftest import call

import benchmarks.__main__ as benchmark


@pytest.mark.parametrize("what", benchmark.BENCHMARKS)
def test_every_benchmark_runs_and_writes_its_figures(what, tmp_path):
    call(benchmark, what, "--smoke", "--device", "cpu", "--rounds", 1, "--out", tmp_path)
    written = json.loads((tmp_path / f"{what}.json").read_text())
    assert written[what] and written["smoke"]
    assert {"command", "commit", "device"} <= written["provenance"].keys()
