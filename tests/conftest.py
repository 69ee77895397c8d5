"""Where tests find reference numbers and real images, and how they call a script as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("KIT_SHARED", ROOT.parent / "shared"))          # reference numbers and images, where they are at hand
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"                           # networks this small gain nothing from a second thread
torch.set_num_threads(1)


def oracle(name):
    """Reference numbers: the full file where it is at hand, else the excerpt kept with the tests."""
    path = SHARED / "oracle" / name
    path = path if path.exists() else ROOT / "tests" / "oracle" / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path, allow_pickle=False)


def real_data(name):
    """Path of a real data set; skips the test where it is absent."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"real images {name} are not at hand (set KIT_SHARED)")
    return path


def run_script(script, *args, cwd, code=0):
    """Run a script in a fresh process, as a user would; asserts its exit code. Returns the finished process."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{script} {args}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
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
