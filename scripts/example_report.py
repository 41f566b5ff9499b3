"""Write assets/reports/fashion, the example of a report, from rows that were measured before; nothing is run.

python scripts/example_report.py            rows of assets/benchmarks/comparison.json
python scripts/example_report.py --stored   the rows that it has: after a change of the page
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from stepdistill import assets
from stepdistill.data.fashion_mnist import CLASS_NAMES
from stepdistill.eval.pictures import gap_of
from stepdistill.eval.report import Report, read_report
from stepdistill.eval.verdict import verdict

FOLDER = assets.root() / "assets"
STORED = FOLDER / "reports" / "fashion"
GUIDED = "fashion-dit w=1.5"
FEW = 8
"""Steps; students that keep the teacher's own many steps are left out."""
ROWS = {"Teacher, 50 steps": 218, "Student, 4 steps": 124, "Teacher, 4 steps": 30}
"""Where the rows of pictures begin, in pixels from the top, in the order of a report."""
SIDE, ROW_GAP = 64, 4
SHOWN = 4
"""Columns, which are classes: the first, as in every report."""


def example(comparison: Path) -> Report:
    """The rows of a comparison.json as one report: a student at its steps, with a verdict where it was trained for."""
    trained = [row["training"] for row in json.loads(comparison.read_text())["rows"] if row["role"] == "student"]
    report = read_report(comparison)
    students = [row for row in report.rows if row.role == "student"]
    teacher = next(row for row in report.rows if row.name == GUIDED)
    kept = []
    for row, training in zip(students, trained, strict=True):
        if training["seed"] != 0 or row.steps > FEW:
            continue
        # Errors in the file were drawn across classes, and are twice what they should be.
        known = {name: value for name, value in row.diagnostics.items() if name != "fd_classifier_error"}
        row = replace(row, name=row.name.partition("@")[0], diagnostics=known)
        solvers = [other for other in report.rows if other.role == "solver" and other.nfe == row.nfe]
        if row.steps == training["steps"] and (found := verdict(row, teacher, solvers)):
            report.verdict.append(found)
        kept.append(row)
    report.rows = [row for row in report.rows if row.role != "student"] + kept
    report.verdict.sort(key=lambda entry: entry.ratio)
    report.remarks = [
        "Students are rows of assets/benchmarks/comparison.json, trained with seed 0; seconds "
        "were taken on shared CPU cores and vary by a factor of about two."
    ]
    return report


def beside(strips: Image.Image) -> list[tuple[str, Image.Image]]:
    """The first pictures of a report, cut out of scripts/publish_results.py's picture of rows: a class a picture."""
    shown = []
    for column in range(SHOWN):
        left = column * (SIDE + ROW_GAP)
        cut = [strips.crop((left, top, left + SIDE, top + SIDE)) for top in ROWS.values()]
        picture = Image.new("RGB", (len(cut) * SIDE + (len(cut) - 1) * gap_of(SIDE), SIDE), "white")
        for number, one in enumerate(cut):
            picture.paste(one, (number * (SIDE + gap_of(SIDE)), 0))
        shown.append(("\n".join([CLASS_NAMES[column], *ROWS]), picture))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--stored", action="store_true", help="keep the rows, draw the page again")
    arguments = parser.parse_args()
    report = read_report(STORED) if arguments.stored else example(FOLDER / "benchmarks" / "comparison.json")
    strips = Image.open(FOLDER / "pictures" / "four_steps.png")
    report.first = beside(strips)
    report.pictures = [("teacher in 4 steps, student in 4 steps, teacher in 50 steps", strips)]
    print(report.write(arguments.out))


if __name__ == "__main__":
    main()
