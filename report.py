"""Make tables and figures from every run below a folder, with mean and deviation over seeds.

    python report.py runs                                  # tables and figures into runs/report
    python report.py runs --html                           # and report.html: all in one file
    python report.py runs/evidence --claims --out results  # judge the paper's claims, too
    python report.py --check results                       # compare the tables with their logs
    python report.py --compare RUN_A RUN_B                 # paired by test image and by seed

A run is a folder whose config.json names a method and a data set. Runs with other settings are
never averaged: their label names what differs. runs.jsonl keeps the logs and results of all runs.
The tables can be made from it again: python report.py results/runs.jsonl
"""

from pathlib import Path

from reporting.claims_figures import plan_claim_figures
from reporting.claims_markdown import TITLE, claims_pages
from reporting.collect import archive_text, load_runs, make_rows
from reporting.compare import compare_runs
from reporting.figures import plan_figures, save_figures
from reporting.html_report import write_html
from reporting.tables import (
    csv_text,
    excluded_runs,
    group_by_seed,
    report_markdown,
    results_table,
    summary_table,
    terminal_tables,
    unlinked_finetunings,
)
from utils.cli import ArgumentParser, UserError, command_line, print_next, run_main
from utils.files import atomic_write


def parse_args():
    parser = ArgumentParser(
        "Tables and figures from every run below a folder.",
        example="python report.py runs --html",
    )
    add = parser.add_argument_group("data").add_argument
    add("runs", type=Path, nargs="?", help="folder with runs at any depth, or a runs.jsonl")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, help="folder for tables and figures (default: RUNS/report)")
    add("--claims", action="store_true", help="judge the paper's claims by these runs, too")
    add("--html", action="store_true", help="write report.html, too: all in one file")
    check_help = "compare the tables below RESULTS with the runs.jsonl beside them, exit code 1"
    add("--check", type=Path, metavar="RESULTS", help=f"{check_help} where they differ")
    compare_help = "compare two runs, or two folders with seeds, by their predictions.csv"
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help=compare_help)
    args = parser.parse_args()
    if sum(map(bool, (args.runs, args.check, args.compare))) != 1 or args.check and args.out:
        raise UserError("give a folder of runs, or --check RESULTS, or --compare A B alone")
    if (args.claims or args.html) and not args.runs:
        raise UserError("--claims and --html need a folder of runs; leave out the other flags")
    return args


def main():
    args = parse_args()
    if args.check:
        check_tables(args.check)
    elif args.compare:
        compare(args)
    else:
        report_runs(args)


def report_runs(args):
    """Write the tables and figures of all runs, and what the flags ask for; print the tables."""
    head, runs = load_runs(args.runs)
    is_archive = args.runs.is_file()
    is_judged = args.claims or is_archive and head["claims"]
    out = args.out or (args.runs.parent if is_archive else args.runs / "report")
    rows = make_rows(runs)
    groups = group_by_seed(rows)
    plans = plan_figures(groups, args.runs)
    if is_judged:
        check_readme(out / "README.md")
        plans |= plan_claim_figures(rows)
    figures, notes = save_figures(plans, out)
    if is_archive:
        # An archive holds no embeddings: figures with embeddings stay as they are.
        figures += [name for name in head["figures"] if name not in plans and (out / name).exists()]
    else:
        notes += unlinked_finetunings(args.runs)
    figures.sort(key=lambda name: not name.startswith("overview"))
    head = {"command": command_line(), "claims": is_judged, "figures": figures, "notes": notes}
    texts = make_tables(head, rows, groups)
    write_texts(out, {"runs.jsonl": archive_text(head, runs), **texts})

    print(terminal_tables(groups), *notes, *excluded_runs(rows), sep="\n")
    if args.html:
        write_html(out, args.runs, runs, rows, groups, plans, head)
        texts["report.html"] = None
    print(f"wrote to {out}: {', '.join([*texts, *figures])}")
    if is_judged:
        print_next("report.py", "--check", out)
    elif args.html:
        print(f"next: open {out / 'report.html'} in a browser")
    else:
        print_next("report.py", args.runs, "--html", *(["--out", out] if args.out else []))


def compare(args):
    """Print the comparison of two runs; write comparison.md and comparison.csv with --out."""
    text, table = compare_runs(*args.compare)
    print(text, end="")
    if args.out:
        write_texts(args.out, {"comparison.md": text, "comparison.csv": csv_text(table)})
        print(f"wrote to {args.out}: comparison.md, comparison.csv")


def write_texts(folder, texts):
    for name, text in texts.items():
        with atomic_write(folder / name) as tmp:
            tmp.write_text(text, encoding="utf-8")


def check_readme(path):
    """Raise UserError for a README.md that report.py has not made."""
    if path.exists() and not path.read_text("utf-8").startswith(TITLE):
        raise UserError(f"{path}: was not made by report.py; choose another folder with --out")


def make_tables(head, rows, groups):
    """Return {file name: text}. `head` is the first line of runs.jsonl."""
    notes, figures = head["notes"] + excluded_runs(rows), head["figures"]
    texts = {
        "results.csv": csv_text(results_table(rows)),
        "summary.csv": csv_text(summary_table(groups)),
        "report.md": report_markdown(groups, figures, notes, head["command"]),
    }
    if head["claims"]:
        texts |= claims_pages(rows, figures, head["command"])
    return texts


def check_tables(folder):
    """Make the tables below `folder` again from each runs.jsonl; exit code 1 where one differs."""
    archives = sorted(folder.rglob("runs.jsonl"))
    if not archives:
        raise UserError(
            f"--check {folder}: holds no runs.jsonl; give a folder that report.py wrote"
        )
    different = []
    for archive in archives:
        head, runs = load_runs(archive)
        rows = make_rows(runs)
        for name, text in make_tables(head, rows, group_by_seed(rows)).items():
            path = archive.with_name(name)
            is_same = path.is_file() and path.read_text("utf-8") == text
            print(f"{path}: {'equals its logs' if is_same else 'DIFFERS from its logs'}")
            if not is_same:
                different.append(archive)
    for path in sorted(folder.rglob("report.md")):
        if not path.with_name("runs.jsonl").exists():
            print(f"{path}: not compared, it has no runs.jsonl")
    if different:
        hint = f"run python report.py {different[0]}"
        raise SystemExit(f"report.py: {len(different)} tables differ from their logs; {hint}")


if __name__ == "__main__":
    run_main(main)
