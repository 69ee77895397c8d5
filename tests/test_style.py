"""The repository is formatted, free of lint, quiet in pipes, and names what it imports."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
OPTIONAL = {"pydicom", "safetensors"}
PACKAGES = {"baselines", "benchmarks", "datasets", "reporting", "utils"}


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_passes(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_progress_bars_appear_only_on_a_terminal():
    """tqdm's disable=None hides a bar in a file or a pipe."""
    bars = [
        (path.name, call.lineno, {keyword.arg for keyword in call.keywords})
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "tqdm"
    ]
    # None stands for **options
    assert bars and not [bar for bar in bars if not bar[2] & {"disable", None}]


def imported_packages(path):
    """Return the names of the third-party packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    local = {file.stem for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))}
    return {
        name for name in names - PACKAGES - OPTIONAL - local if name not in sys.stdlib_module_names
    }


def required_packages(path):
    """Return the package names in a requirements file."""
    return set(re.findall(r"^(\w[\w-]*)", path.read_text(), re.MULTILINE))


def test_imported_packages_are_required():
    kit = required_packages(ROOT / "requirements.txt")
    tests = required_packages(ROOT / "tests/requirements.txt")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        names = {DISTRIBUTIONS.get(name, name) for name in imported_packages(path)}
        required = kit | tests if path.parent.name == "tests" else kit
        missing = {name.replace("_", "-") for name in names} - required
        assert not missing, f"{path.relative_to(ROOT)} imports packages without a requirement"


def test_every_required_package_is_pinned():
    pinned = required_packages(ROOT / "constraints.txt")
    for file in ("requirements.txt", "tests/requirements.txt"):
        assert required_packages(ROOT / file) <= pinned
