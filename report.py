"""Tables and figures from every run below a folder, with mean and standard deviation over seeds.

    python report.py runs                                     # report.md, results.csv, summary.csv and figures into runs/report
    python report.py runs/digits                              # one data set alone
    python report.py runs/evidence --claims --out results     # the paper's claims judged by these runs, too: README.md
    python report.py --check results                          # exit code 1 unless the tables there are what the logs beside them give

A run is a folder whose config.json names a method and a data set. Runs with other settings are never averaged:
what differs stands in the label. Needs no GPU and none of the images; give it again after more runs. runs.jsonl keeps the runs' logs
and results in one file, from which the tables can be made again: python report.py results/runs.jsonl
"""

import textwrap
from pathlib import Path

from reporting import claims
from reporting.collect import archive_text, load_runs, to_rows
from reporting.figures import draw_figures
from reporting.tables import (
    csv_text,
    excluded_runs,
    group_by_seed,
    headlines,
    markdown,
    results_table,
    summary_table,
    terminal_tables,
    unlinked_finetunings,
)
from utils.cli import ArgumentParser, UserError, command_line, run_main
from utils.files import atomic_write


def parse_args():
    parser = ArgumentParser("Tables and figures from every run below a folder.")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="?",
        help="folder with runs at any depth (the other scripts make runs/), or a report's runs.jsonl",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where tables and figures go (default: report/ in that folder; results to commit them)",
    )
    parser.add_argument(
        "--claims",
        action="store_true",
        help="judge the paper's claims by these runs, too: README.md, ablations.png, metrics.png",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="RESULTS",
        help="exit code 1 unless the tables below this folder are what the runs.jsonl beside them give",
    )
    args = parser.parse_args()
    if (args.runs is None) == (args.check is None) or args.check and (args.out or args.claims):
        raise UserError(
            "give the folder with the runs, or --check and the folder with the tables, and nothing else"
        )
    return args


def main():
    args = parse_args()
    if args.check:
        check_tables(args.check)
        return
    from_archive = args.runs.is_file()
    out = args.out or (args.runs.parent if from_archive else args.runs / "report")
    head, runs = load_runs(args.runs)
    judged = args.claims or from_archive and head["claims"]
    if (
        judged
        and (out / "README.md").exists()
        and not (out / "README.md").read_text(encoding="utf-8").startswith(claims.TITLE)
    ):
        raise UserError(f"{out / 'README.md'}: is not this script's; give --out another folder")
    rows = to_rows(runs, args.runs)
    groups = group_by_seed(rows)
    figures, missing = draw_figures(groups, args.runs, out, judged)
    notes = missing if from_archive else missing + unlinked_finetunings(args.runs)
    head = {"command": command_line(), "claims": judged, "figures": figures, "notes": notes}
    for name, text in {
        "runs.jsonl": archive_text(head, runs),
        **tables(head, rows, groups),
    }.items():
        with atomic_write(out / name) as part:
            part.write_text(text, encoding="utf-8")

    print(terminal_tables(groups))
    for line in [
        *notes,
        *excluded_runs(rows),
        *headlines(groups),
        f"written to {out}: " + ", ".join(["report.md", "results.csv", "summary.csv", *figures]),
    ]:
        print(
            textwrap.fill(line.replace(" %", "\0%"), 120, subsequent_indent="  ").replace("\0", " ")
        )  # a number keeps its unit
    print("next: " + next_step(rows, args.runs, out, figures))


def tables(head, rows, groups):
    """{file name: text} of all that is written but the figures; head: command, claims, figures, notes, as the first line of runs.jsonl has them."""
    made = {
        "results.csv": csv_text(results_table(rows)),
        "summary.csv": csv_text(summary_table(groups)),
        "report.md": markdown(
            groups, head["figures"], head["notes"] + excluded_runs(rows), head["command"]
        ),
    }
    if head["claims"]:
        made["README.md"] = claims.markdown(rows, head["figures"], head["command"])
    return made


def check_tables(folder):
    """Make the tables beside every runs.jsonl below a folder again, from it alone, and compare. Exit code 1 where one differs."""
    archives = sorted(folder.rglob("runs.jsonl"))
    if not archives:
        raise UserError(
            f"--check {folder}: holds no runs.jsonl; give a folder that report.py has written to"
        )
    differ = []
    for path in archives:
        head, runs = load_runs(path)
        rows = to_rows(runs, path)
        for name, text in tables(head, rows, group_by_seed(rows)).items():
            there = path.with_name(name)
            same = there.is_file() and there.read_text(encoding="utf-8") == text
            print(
                f"{there}: {'as the logs give it' if same else 'DIFFERS from what runs.jsonl gives'}"
            )
            differ += [] if same else [f"python report.py {path}"]
    for path in sorted(folder.rglob("report.md")):
        if not path.with_name("runs.jsonl").exists():
            print(f"{path}: not compared, there is no runs.jsonl beside it")
    if differ:
        raise SystemExit(
            f"report.py: {len(differ)} of the tables differ; made again by: {differ[-1]}"
        )


def next_step(rows, runs, out, figures):
    """What to type or look at now: the first thing that is missing, else the report."""
    for row in rows:
        if row["state"] == "not finished" and "command" in row:
            return f"{row['command']}    # goes on with {row['path']}"
    for row in rows:
        if row["state"] == "finished":
            measures = {
                "linear_probe.py": "probe_test_accuracy",
                "evaluate_metrics.py": "saa_minority",
            }
            missing = [script for script, key in measures.items() if key not in row]
            if missing and (row["kind"] == "contrastive" or missing == ["evaluate_metrics.py"]):
                return f"python {missing[0]} {runs / row['path']}    # then this report again"
    picture = next((name for name in figures if name.startswith("overview")), None)
    return f"open {out / 'report.md'}" + (f", and first {out / picture}" if picture else "")


if __name__ == "__main__":
    run_main(main)
