"""Write assets/reports/fashion, the example of a report, from rows that were measured before; nothing is run.

python scripts/example_report.py
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from stepdistill import assets
from stepdistill.eval.report import Report, read_report
from stepdistill.eval.verdict import verdict

FOLDER = assets.root() / "assets"
GUIDED = "fashion-dit w=1.5"
FEW = 8
"""Steps; students that keep the teacher's own many steps are left out."""


def example(comparison: Path, picture: Path | None = None) -> Report:
    """The rows of a comparison.json as one report: every student at its steps, with a verdict where it was trained for.

    Args:
        picture: shown as the pictures of the same seeds.
    """
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
    if picture is not None:
        report.pictures = [("teacher in 4 steps, student in 4 steps, teacher in 50 steps", Image.open(picture))]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "reports" / "fashion")
    out = parser.parse_args().out
    print(example(FOLDER / "benchmarks" / "comparison.json", FOLDER / "pictures" / "four_steps.png").write(out))


if __name__ == "__main__":
    main()
