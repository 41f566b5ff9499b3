"""Students whose weights were rounded to few bits while they trained, beside the same student rounded afterwards.

    OMP_NUM_THREADS=1 python scripts/bench_quantized.py method.pairs=1500 train.steps=500 train.checkpoint_every=250

Trains the recipe once without rounding and once with each grid of student.quantize, all else the same, and measures
them under the demo protocol. Runs lie in --runs; a finished one is not trained again. Writes
assets/benchmarks/quantized.json and the table in docs/export.md; ``--table-only`` repeats the table.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench_rules import how_made

from stepdistill import assets
from stepdistill.eval.bench.run import bench
from stepdistill.eval.names import metric_name, metric_text
from stepdistill.eval.report import Row, between_markers
from stepdistill.files import write_json
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.roles.quantized import Quantization, baked, quantize_aware
from stepdistill.run import train

BEGIN, END = "<!-- quantized: written by scripts/bench_quantized.py -->", "<!-- end of quantized -->"
SHOWN = ("fd_classifier", "fd_enet", "precision", "recall", "accuracy")
EXACT = "exact"
BITS = {EXACT: 32, "int8": 8, "int4": 4, "nf4": 4}


@dataclass(frozen=True)
class Task:
    """Whose student is rounded: a recipe with overrides, and the folder of the runs."""

    recipe: str
    overrides: Sequence[str]
    runs: Path


def trained(task: Task, how: str) -> Path:
    """The export of the recipe's student on this grid."""
    run = task.runs / how
    if not (run / "export").is_dir():
        grid = [] if how == EXACT else [f"student.quantize={how}"]
        train(task.recipe, [*task.overrides, *grid, f"output={run}", "report.samples=0", "train.tracker=none"])
    return run / "export"


def afterwards(exact: Path, how: Quantization, runs: Path) -> Path:
    """The exact student's export with its weights rounded."""
    folder = runs / f"{how}-afterwards"
    shutil.copytree(exact, folder, dirs_exist_ok=True)
    pipeline = load_pipeline(exact)
    component = trace(pipeline).component
    network = getattr(pipeline, component)
    quantize_aware(network, how)
    baked(network).save_pretrained(folder / component)
    return folder


def measured(task: Task, samples: int) -> list[dict[str, Any]]:
    """The rows: the teacher, the exact student, and two of each grid."""
    exact = trained(task, EXACT)
    students = {(EXACT, "-"): exact}
    for how in get_args(Quantization):
        students[how, "afterwards"] = afterwards(exact, how, task.runs)
        students[how, "in training"] = trained(task, how)
    steps = ExportFacts.read(exact).steps
    rows = []
    for (how, when), folder in students.items():
        report = bench([folder], [steps], samples, protocol="fashion-v1", solvers=False)
        if not rows:
            rows.append(_facts("teacher", "-", next(row for row in report.rows if row.role == "teacher")))
        rows.append(_facts(how, when, next(row for row in report.rows if row.role == "student")))
        print(rows[-1], flush=True)
    return rows


def _facts(how: str, when: str, row: Row) -> dict[str, Any]:
    return {"weights": how, "rounded": when, "steps": row.steps, "metrics": row.metrics, "diagnostics": row.diagnostics}


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| weights | bits | rounded | steps | {' | '.join(metric_name(one, content['samples']) for one in SHOWN)} |",
        "|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    for row in content["rows"]:
        values = [metric_text(metric, row["metrics"][metric]) for metric in SHOWN]
        bits = str(BITS.get(row["weights"], BITS[EXACT]))
        lines.append(f"| {' | '.join([row['weights'], bits, row['rounded'], str(row['steps']), *values])} |")
    error = max(row["diagnostics"]["fd_classifier_error"] for row in content["rows"])
    lines.append(f"\nOther samples would move FD-classifier by up to {error:.2f} (one standard error).")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", default="fashion_ode_regression", help="whose student is rounded")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantized"), help="folder of the runs")
    parser.add_argument("--samples", type=int, default=2000, help="images per row")
    parser.add_argument("--table-only", action="store_true", help="write the table from the stored rows")
    arguments = parser.parse_args()
    out = assets.root() / "assets" / "benchmarks" / "quantized.json"
    if not arguments.table_only:
        settings = {"recipe": arguments.recipe, "samples": arguments.samples, "seed": 0}
        rows = measured(Task(arguments.recipe, arguments.overrides, arguments.runs), arguments.samples)
        write_json(
            out, {"schema": 1, "protocol": "fashion-v1", **settings, **how_made("bench_quantized"), "rows": rows}
        )
    content = json.loads(out.read_text(encoding="utf-8"))
    between_markers(assets.root() / "docs" / "export.md", BEGIN, END, table(content))


if __name__ == "__main__":
    main()
