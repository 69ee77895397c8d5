"""README.md and docs/ show commands that parse, flags and links that exist, and true tables."""

import csv
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call

import benchmarks.__main__ as benchmarks_main
import evaluate_metrics
import finetune
import linear_probe
import make_subsets
import pretrain
import report
from datasets import DATASETS

SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (make_subsets, pretrain, linear_probe, evaluate_metrics, finetune, report)
}
PARSERS = {**SCRIPTS, "-m benchmarks": benchmarks_main}
FLAGS_OF_OTHER_PROGRAMS = {"--list", "--dry-run", "--help", "--nnodes", "--nproc-per-node"} | {
    "--rdzv-backend",
    "--rdzv-endpoint",
}
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def find_commands(text):
    """List the command lines of our scripts in a page or docstring, typed or as inline code."""
    text = re.sub(r"torchrun (?:--[a-z0-9-]+ \S+ +)+", "python ", text.replace("\\\n", " "))
    script = "(?:" + "|".join(map(re.escape, PARSERS)) + ")"
    typed = re.findall(rf"^\s*python ({script} .*?)(?:\s{{2,}}.*)?$", text, re.MULTILINE)
    return typed + re.findall(rf"`(?:python )?({script} [^`\n]+)`", text)


def parse(command, monkeypatch):
    """Parse a command line as its script does, as if every run folder and subset existed."""
    script = next(name for name in PARSERS if command.startswith(name))
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "config.json")
    monkeypatch.setattr(Path, "is_dir", lambda path: not path.suffix)
    for module in (linear_probe, finetune):
        monkeypatch.setattr(module, "list_prediction_images", lambda *_: [], raising=False)
    words = shlex.split(command.removeprefix(script), comments=True)
    monkeypatch.setattr(sys, "argv", [script, *words])
    return PARSERS[script].parse_args()


COMMANDS = sorted(
    {
        command
        for text in (*PAGES.values(), *(module.__doc__ for module in PARSERS.values()))
        for command in find_commands(text)
    }
)


def test_commands_are_found_in_every_form():
    page = "`report.py runs --claims` python no.py\ntorchrun --nnodes 2 \\\n pretrain.py a  # b\n"
    assert find_commands(page) == ["pretrain.py a", "report.py runs --claims"]
    assert {name for name in SCRIPTS if any(c.startswith(name) for c in COMMANDS)} == set(SCRIPTS)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_every_shown_command_parses(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen(script, capsys):
    with pytest.raises(SystemExit) as end:
        call(SCRIPTS[script], "--help")
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(lines) <= 50 and max(map(len, lines)) <= 120
    groups = [line[:-1] for line in lines if re.fullmatch(r"\w[\w ,]*:", line)]
    expected = ["data", "classes, splits and ratios", "method", "training", "machine", "output"]
    assert groups == [name for name in expected if name in groups]
    assert lines[-1].startswith(f"example: python {script} ")


def flags_of(module, capsys, pattern=r"^  (--[a-z-]+)"):
    with pytest.raises(SystemExit):
        call(module, "--help")
    return set(re.findall(pattern, capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script, capsys):
    """The value of a flag is used somewhere other than where it is declared."""
    folders = ("datasets", "baselines")
    files = [ROOT / script, *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    for flag in flags_of(SCRIPTS[script], capsys) - {"--smoke"}:
        name = flag[2:].replace("-", "_")
        read = rf"\bargs\.{name}\b|(?<!add_argument\(\")\"{name}\""
        assert re.search(read, text), f"{script} never reads {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_named_exists(page, capsys):
    flags = (flags_of(module, capsys, "--[a-z-]+") for module in PARSERS.values())
    known = FLAGS_OF_OTHER_PROGRAMS.union(*flags)
    text = re.sub(r"#SBATCH .*|`sbatch [^`]*`|`--signal=\S+`", "", PAGES[page])
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        heads = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8") if anchor else "", re.M)
        anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in anchors, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_fit_100_columns(page):
    assert max(map(len, PAGES[page].splitlines())) <= 100


def test_the_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 1200


def table_rows(page, header):
    """Return {first cell: other cells} of the table whose header line starts with `header`."""
    table = PAGES[page].split(f"\n{header}")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_table_of_data_sets_is_the_catalogue():
    rows = table_rows("docs/data.md", "| name | classes |")
    assert list(rows) == list(DATASETS)
    for name, entry in DATASETS.items():
        counts = [f"{minority} / {majority}" for minority, majority in entry.counts.values()]
        assert not counts or rows[name][1:] == counts, name


def test_the_tables_of_methods_name_every_method():
    header = "| `--method` |"
    first = table_rows("docs/methods.md", f"{header} paper |")
    second = table_rows("docs/methods.md", f"{header} learned besides |")
    assert first.keys() == second.keys() == pretrain.METHODS.keys()
    for method, row in second.items():
        assert int(row[-1]) == pretrain.METHODS[method].views, method


def test_the_table_of_results_is_that_of_the_logs():
    with open(ROOT / "results/summary.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scored_by"] == "linear probe"]
    summary = {(row["dataset"], row["label"]): row for row in rows if row["ratio"] == "99-1"}
    names = {
        "untrained network": "untrained",
        "SupCon": "supcon",
        "NT-Xent": "ntxent",
        "Supervised Prototypes": "suppro",
        "Supervised Minority": "supmin",
    }
    rows = table_rows("README.md", "| method | Fashion")
    assert list(rows) == list(names)
    columns = (
        ("fashionmnist", "5", ""),
        ("fashionmnist", "5", "balanced_train_"),
        ("inat21-mammals", "3", "balanced_train_"),
    )
    for method, (saa, *accuracies) in rows.items():
        row = summary["fashionmnist", names[method]]
        means = [float(row[f"saa_{name}_mean"]) for name in ("minority", "majority")]
        assert saa == f"{sum(means) / 2:.1f}", method
        for (dataset, n, prefix), cell in zip(columns, accuracies, strict=True):
            row = summary[dataset, names[method]]
            assert row["n"] == n
            accuracy = f"{prefix}balanced_accuracy_percent"
            mean, std = (float(row[f"{accuracy}_{name}"]) for name in ("mean", "std"))
            auroc = float(row[f"{prefix}auroc_percent_mean"])
            assert cell == f"{mean:.1f} ± {std:.1f} ({auroc:.1f})", method
