"""Write docs/gallery_emoji.md and its pictures: a text-to-image teacher, a stock solver, and its student, side by side.

    python scripts/gallery_prompts.py assets/students/emoji --measured assets/benchmarks/emoji_dmd2.json

Picture i of every row is of prompt i of docs/examples/emoji.txt and starts from noise that depends on (seed, i) alone.
The solver is the one with the lowest FD of those that were measured at the student's passes. Nothing is trained.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from gallery import Entry
from PIL import Image

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import TEACHER_STEPS, Sampler, draw
from stepdistill.eval.bench.sources import Source, read_source
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.sample import inspect
from stepdistill.sampling.solvers import stock_solvers

METRIC, STEPS = "fd_enet", (4, 2, 1)
HEAD = """# Gallery of prompts

Written by `scripts/gallery_prompts.py`. In all rows the pictures in one place are of one prompt and start from the same
noise (seed {seed}); prompts were chosen, pictures were not. What the rows are worth in numbers is in
[the comparison](comparison.md#the-shipped-recipes-on-more-samples).

Prompts, line by line; the teacher was trained on pictures of the first two lines', and on none of the third's, whose
things it knows in other styles:

{prompts}
"""


def best_solver(report: Path, nfe: int) -> tuple[str, int, float]:
    """(name, steps, w) of the stock solver with the lowest FD at so many passes."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["role"] == "solver" and row["nfe"] == nfe]
    best = min(rows, key=lambda row: row["metrics"][METRIC])
    return best["name"].partition(" w=")[0], best["steps"], best["guidance"]


def planned(student: Source, report: Path, prompts: list[str], prompts_file: str, seed: int) -> list[Entry]:
    """The rows: teacher, solver, the student at its own steps and at fewer.

    Raises:
        InputError: the source is no student, or cannot be loaded.
    """
    if student.facts is None:
        raise InputError(f"{student.pipeline}: expected a student, found no stepdistill.json")
    teacher, w, trained = (student.facts.teacher, student.facts.guidance, student.facts.steps)
    traced, distilled, wanted = inspect(teacher), inspect(student.pipeline), tuple(prompts)
    name, steps, scale = best_solver(report, trained)
    solver = stock_solvers(traced.pipeline.scheduler)[name]

    def command(path: str, steps: int, more: str = "") -> str:
        settings = f"--steps {steps}{more} --seed {seed} --prompts {prompts_file} --count {len(prompts)}"
        return f"stepdistill sample {path} {settings}"

    found = [
        Entry(
            Sampler(f"The teacher, guidance {w:g}", "", traced, "", wanted, TEACHER_STEPS, w),
            "teacher",
            command(teacher, TEACHER_STEPS, f" --guidance {w:g}"),
        ),
        Entry(Sampler(f"The teacher under {name}", "", traced, "", wanted, steps, scale, solver), "solver"),
    ]
    for number in sorted({trained, *STEPS}, reverse=True):
        title = f"The student{'' if number == trained else f', trained for {trained} steps'}"
        shown = Sampler(title, "", distilled, "", wanted, number, 1.0)
        found.append(Entry(shown, f"student-{number}", command(student.pipeline, number)))
    return found


def picture(sampler: Sampler, seed: int, columns: int) -> Image.Image:
    count = len(sampler.entries)
    return image_grid(draw(sampler, range(count), 0, seed=seed, batch=count), columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a run or an export")
    parser.add_argument("--measured", type=Path, required=True, help="the report with the solvers' rows")
    parser.add_argument("--prompts", default="docs/examples/emoji.txt", help="a file with a prompt a line")
    parser.add_argument("--docs", type=Path, default=assets.root() / "docs", help="folder of the page")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = Path(arguments.prompts).read_text(encoding="utf-8").split("\n")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    found = planned(read_source(arguments.student), arguments.measured, prompts, arguments.prompts, arguments.seed)
    folder = arguments.docs / "pictures" / "gallery_emoji"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in found:  # lossless too, and a quarter smaller than PNG
        file = folder / f"{entry.file}.webp"
        picture(entry.sampler, arguments.seed, arguments.columns).save(file, lossless=True, quality=100, method=6)
    lines = [prompts[i : i + arguments.columns] for i in range(0, len(prompts), arguments.columns)]
    page = [HEAD.format(seed=arguments.seed, prompts="\n".join(f"- {' · '.join(line)}" for line in lines))]
    place = re.compile(r"\(pictures/gallery/([\w-]+)\.png\)")
    page += [place.sub(r"(pictures/gallery_emoji/\1.webp)", entry.markdown(2)) for entry in found]
    (arguments.docs / "gallery_emoji.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
