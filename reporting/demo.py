"""Print what the runs of the demo show on any processor: the collapse, by loss and by SAA.

    python -m reporting.demo runs/demo

Accuracies are left out of the table: from one processor to another they differ by more than the
methods do. Two of them check that the runs can show anything at all.
"""

import sys
from pathlib import Path

from reporting.collect import collect
from reporting.styles import METHOD_STYLES
from reporting.tables import markdown_table

RATIO = "95-5"
COLLAPSED = 0.01  # nats between the final loss and its collapse value
CONTROL = 5.0  # points of balanced accuracy by which NT-Xent must beat an untrained network


def value_range(rows, keys, digits):
    """Return "lowest to highest" of some columns over the seeds."""
    values = [row[key] for row in rows for key in keys]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def mean_accuracy(rows):
    """Return the mean balanced accuracy over the seeds, by the probe on 50-50 rows, in percent."""
    own = "probe_test_balanced_accuracy"
    balanced = [row.get("probe_test_balanced_train_balanced_accuracy", row[own]) for row in rows]
    return 100 * sum(balanced) / len(rows)


def describe_method(method, rows):
    """Return the cells of a table row: method, collapsed runs, loss, SAA of both classes."""
    saa = value_range(rows, ("saa_minority", "saa_majority"), 1)
    if method == "untrained":
        return [METHOD_STYLES[method].name, "-", "-", saa]
    gaps = [row.get("last_collapse_gap") for row in rows]
    # a prototype moves the collapse value
    collapsed = "-" if None in gaps else f"{sum(gap < COLLAPSED for gap in gaps)} of {len(gaps)}"
    loss = value_range(rows, ["final_loss"], 3)
    return [METHOD_STYLES[method].name, collapsed, loss, saa]


def main():
    runs = {}
    for row in collect(Path(sys.argv[1])):
        if row["state"] == "finished" and row["method"] in METHOD_STYLES:
            runs.setdefault((row["ratio"], row["method"]), []).append(row)
    table = [describe_method(m, runs[RATIO, m]) for m in METHOD_STYLES if (RATIO, m) in runs]
    header = ["method", "collapsed runs", "loss", "SAA (%)"]
    print("\nDigits, 5 % minority; lowest to highest over seeds and classes, test split\n")
    print(*markdown_table(header, table, pad=True), sep="\n")

    mean = {key: mean_accuracy(rows) for key, rows in runs.items()}
    untrained, ntxent = mean[RATIO, "untrained"], mean[RATIO, "ntxent"]
    balanced_supcon, balanced_ntxent = mean["50-50", "supcon"], mean["50-50", "ntxent"]
    passed = ntxent >= untrained + CONTROL and balanced_supcon >= balanced_ntxent
    print(f"\nThe control is {'passed' if passed else 'FAILED: do not read the table'}.")
    print(f"  NT-Xent above an untrained network: {ntxent:.1f} %, {untrained:.1f} %")
    print(f"  at 50-50, SupCon not below NT-Xent: {balanced_supcon:.1f} %, {balanced_ntxent:.1f} %")


if __name__ == "__main__":
    main()
