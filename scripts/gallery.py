"""Write docs/gallery.md and its pictures: a teacher, its best stock solver at 4 passes, and its students, side by side.

    make compare ARGUMENTS='--methods diff-instruct dmd dmd2'
    python scripts/gallery.py runs/comparison/{diff_instruct,dmd,dmd2}-seed0

Picture i of every row is of class i modulo the number of classes and starts from noise that depends on (seed, i) alone.
The solver is the one with the lowest FD in assets/benchmarks/comparison.json. Nothing is trained.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import TEACHER_STEPS, Sampler, draw
from stepdistill.eval.bench.sources import Source, read_source
from stepdistill.pipeline.conditioning import class_names, entries
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import counted
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import inspect
from stepdistill.sampling.solvers import stock_solvers

PASSES = 4
ROWS, ZOOM = 2, 2
METRIC = "fd_classifier"
HEAD = """# Gallery

Written by `scripts/gallery.py`. In all rows the pictures in one place are of one class and start from the same
noise (seed {seed}), and none was chosen. Students whose scheduler adds noise between its steps (LCM, TCD) part from the
teacher's pictures. What the rows are worth in numbers is in [the comparison](comparison.md).

Classes, from left to right: {classes}.
"""
TRAINED = """## Students

Each at the number of steps that it was trained for, without guidance. What trains them, and draws this page:

```bash
make compare ARGUMENTS='--methods {methods}'
python scripts/gallery.py {runs}
```
"""


@dataclass(frozen=True)
class Entry:
    """A row of the gallery: what is drawn, its file's name, and the command that draws it again ("": this script)."""

    sampler: Sampler
    file: str
    command: str = ""

    def markdown(self, level: int) -> str:
        sampler = self.sampler
        steps = counted(sampler.steps, "step")
        title = f"{sampler.name}: {steps}, NFE {sampler.nfe}"
        lines = [f"{'#' * level} {title}", "", f"![{title}](pictures/gallery/{self.file}.png)", ""]
        return "\n".join([*lines, *(["```bash", self.command, "```", ""] if self.command else [])])


def best_solver(comparison: Path, nfe: int = PASSES) -> tuple[str, int, float]:
    """(name, steps, w) of the stock solver with the lowest FD at so many passes."""
    rows = json.loads(comparison.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["role"] == "solver" and row["nfe"] == nfe]
    best = min(rows, key=lambda row: row["metrics"][METRIC])
    return best["name"].partition(" w=")[0], best["steps"], best["guidance"]


def planned(students: list[Source], seed: int) -> list[Entry]:
    """The rows: teacher, solver, students in the order given.

    Raises:
        InputError: a source is no student, has another teacher than the first, or cannot be loaded.
    """
    for one in students:
        if one.facts is None:
            raise InputError(f"{one.pipeline}: expected a run or an export of a student, found no stepdistill.json")
        if (one.facts.teacher, one.facts.guidance) != (
            students[0].facts.teacher,
            students[0].facts.guidance,
        ):
            raise InputError(f"{one.pipeline}: has another teacher or guidance than {students[0].pipeline}")
    teacher, w = students[0].facts.teacher, students[0].facts.guidance
    traced = inspect(teacher)
    wanted, shown = tuple(entries(traced, "classes")), Path(teacher).name
    name, steps, scale = best_solver(assets.find("benchmarks/comparison.json"))
    solver = stock_solvers(traced.pipeline.scheduler)[name]

    def sampler(title: str, model: Trace, steps: int, guidance: float = 1.0, scheduler: object = None) -> Sampler:
        return Sampler(title, "", model, "", wanted, steps, guidance, scheduler)

    def command(pipeline: str, steps: int, more: str, file: str) -> str:
        count = ROWS * len(wanted)
        return f"stepdistill sample {pipeline} --steps {steps}{more} --seed {seed} --count {count} --out {file}.png"

    found = [
        Entry(
            sampler(f"The teacher, guidance {w:g}", traced, TEACHER_STEPS, w),
            "teacher",
            command(shown, TEACHER_STEPS, f" --guidance {w:g}", "teacher"),
        ),
        Entry(sampler(f"The teacher under {name}, its best stock solver", traced, steps, scale, solver), "solver"),
    ]
    for one in students:
        run, trained = folder_of(one), one.facts.steps
        file = run.removesuffix("-seed0")
        redo = command(f"runs/comparison/{run}", trained, "", file)
        found.append(Entry(sampler(file, inspect(one.pipeline), trained), file, redo))
    return found


def folder_of(student: Source) -> str:
    """The name of the run folder of an export."""
    return (student.run or Path(student.pipeline).resolve().parent).name


def picture(entry: Entry, seed: int) -> Image.Image:
    """The entry's pictures, a class a column, enlarged without blur."""
    classes = len(entry.sampler.entries)
    count = ROWS * classes
    grid = image_grid(draw(entry.sampler, range(count), 0, seed=seed, batch=count), classes)
    return grid.resize((grid.width * ZOOM, grid.height * ZOOM), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", help="run folders of make compare with seed 0, or their exports")
    parser.add_argument("--docs", type=Path, default=assets.root() / "docs", help="folder of the page")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seed, students = arguments.seed, [read_source(path) for path in arguments.students]
    found, folder = planned(students, seed), arguments.docs / "pictures" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for entry in found:
        picture(entry, seed).save(folder / f"{entry.file}.png", optimize=True)
    classes = ", ".join(class_names(found[0].sampler.trace))
    names = " ".join(folder_of(one).removesuffix("-seed0") for one in students)
    page = [HEAD.format(seed=seed, classes=classes), *(entry.markdown(2) for entry in found[:2])]
    runs = " ".join(f"runs/comparison/{folder_of(one)}" for one in students)
    page += [TRAINED.format(methods=names, runs=runs), *(entry.markdown(3) for entry in found[2:])]
    (arguments.docs / "gallery.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.glob("*.png"))
    print(f"{arguments.docs / 'gallery.md'}: {len(found)} pictures, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
