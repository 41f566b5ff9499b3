"""Write assets/reports/fashion, the example of a report: one student of one step, at 1 and 2 steps, and its teacher.

stepdistill train recipes/fashion_diff_instruct.yaml           ten minutes on two CPU cores
python scripts/example_report.py runs/fashion_diff_instruct    its report, and what was measured for it
python scripts/example_report.py --stored                      the stored numbers and pictures, on the page of today
"""

import argparse
from pathlib import Path

import stepdistill
from stepdistill import assets
from stepdistill.eval.pictures import read_pictures
from stepdistill.eval.report import SECTIONS, Report, read_report

STORED = assets.root() / "assets" / "reports" / "fashion"
STEPS = (1, 2)


def stored() -> Report:
    """The example as it is stored."""
    report = read_report(STORED)
    pictures = read_pictures(STORED / "pictures")
    for section in SECTIONS:
        setattr(report, section, pictures.get(section, []))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="its folder; without one, what is stored is written again")
    parser.add_argument("--stored", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=STORED)
    arguments = parser.parse_args()
    if (arguments.run is None) is not arguments.stored:
        parser.error("expected a run's folder, or --stored")
    if arguments.stored:
        stored().write(arguments.out)
    else:
        stepdistill.bench([arguments.run], STEPS, out=arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
