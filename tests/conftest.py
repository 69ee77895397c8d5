"""Fixtures: reference numbers, real images, and scripts called as a user calls them."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from utils.cli import SIGNALS

ROOT = Path(__file__).parents[1]
# Reference numbers and real images, where they are at hand.
SHARED = Path(os.environ.get("KIT_SHARED", ROOT.parent / "shared"))
# Networks this small gain nothing from a second thread.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def oracle(name):
    """Return reference numbers: the full file if it is at hand, else the excerpt in tests/."""
    path = SHARED / "oracle" / name
    path = path if path.exists() else ROOT / "tests" / "oracle" / name
    return (
        json.loads(path.read_text())
        if path.suffix == ".json"
        else np.load(path, allow_pickle=False)
    )


def real_data(name):
    """Path of a real data set; skips the test where it is absent."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"real images {name} are not at hand (set KIT_SHARED)")
    return path


def run_script(script, *args, cwd, code=0):
    """Run a script in a new process and assert its exit code. Returns the finished process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, (
        f"{script} {args}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def call(script, *args):
    """Run a script's main() in this process."""
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, args)]
    try:
        script.main()
    finally:
        sys.argv = argv


def one_line(done, *words):
    """A user's mistake: one line on stderr that holds the words, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and "\r" not in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


def value_and_grad(loss, x):
    x = torch.as_tensor(x).clone().requires_grad_()
    value = loss(x)
    value.backward()
    return value.detach().numpy(), x.grad.numpy()


def equals_reference(loss, z, expected, expected_grad):
    """Within the tolerances that come with the reference numbers, in float64 and in float32."""
    value, grad = value_and_grad(loss, z)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-8, atol=1e-9)
    value, grad = value_and_grad(loss, z.astype(np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        grad, expected_grad, rtol=0, atol=1e-5 * max(1, np.abs(expected_grad).max())
    )


def fixture_f5():
    """Five images, two views, on the circle (degrees); the golden values below belong to it."""
    angles = (
        torch.tensor([[0, 10], [20, 40], [200, 220], [90, 100], [130, 150]], dtype=torch.float64)
        * math.pi
        / 180
    )
    return torch.stack([angles.cos(), angles.sin()], dim=2), torch.tensor(
        [0, 0, 0, 1, 1]
    )  # [5, 2, 2], [5]


def random_batch(n=12, views=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, views, dim, generator=generator, dtype=torch.float64), dim=2)
    return z, (torch.arange(n) % 4 == 0).long()  # a quarter of class 1


class LargestTensor(TorchDispatchMode):
    """Within it: the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


def log_of(run):
    """The epochs of a log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][1:]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_s")}
        for line in lines
    ]


def equal(a, b):
    """Equality to the last bit of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the digits subsets, in which the tests of one file run one after the other."""
    import make_subsets

    folder, before = tmp_path_factory.mktemp("kit"), Path.cwd()
    os.chdir(folder)
    call(make_subsets, "digits", "--workers", 1)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def weights_go_with_their_test(request):
    """Delete what a test has trained: checkpoints of the suite would fill a disk."""
    if "workplace" not in request.fixturenames:
        yield
        return
    folder = request.getfixturevalue("workplace")
    before = set(folder.rglob("*.pt"))
    yield
    for path in set(folder.rglob("*.pt")) - before:
        path.unlink()


@pytest.fixture
def handlers():
    """cli() takes the signals of the whole process: give them back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Done:
    """What run_script returns, for a call in this process (importing torch anew takes seconds)."""


@pytest.fixture
def make(tmp_path, monkeypatch, capsys, handlers):
    """Return a function that calls make_subsets.py in a temporary folder, with one worker."""
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        import make_subsets
        from common import run_main

        workers = () if "--workers" in words else ("--workers", 1)
        monkeypatch.setattr(sys, "argv", ["make_subsets.py", *map(str, (*words, *workers))])
        done = Done()
        done.returncode = 0
        try:
            run_main(make_subsets.main)
        except SystemExit as stop:
            done.returncode = stop.code
        done.stdout, done.stderr = capsys.readouterr()
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def planned(monkeypatch):
    """Return a function that loads and draws ratios, but decodes nothing."""

    def call(*words):
        import make_subsets

        monkeypatch.setattr(sys, "argv", ["make_subsets.py", *map(str, words)])
        args = make_subsets.parse_args()
        source = make_subsets.DATASETS[args.dataset].load(args)
        _, rows = make_subsets.draw_all_ratios(source, source.labels, source.split, args)
        return source, {
            ratio: {split: tuple(np.bincount(source.labels[r])) for split, r in drawn.items()}
            for ratio, drawn in rows.items()
        }

    return call


@pytest.fixture
def refused(make):
    """Return a function that calls make_subsets.py with a mistake: exit code 2, one line."""

    def call(*words, says):
        done = make(*words, code=2)
        one_line(done, *says)

    return call
