"""Draw the README's moving picture: teacher, stock solvers and a student, all on one clock of network passes.

    make compare ARGUMENTS='--methods dmd2_1step'
    python scripts/first_picture.py runs/comparison/dmd2_1step-seed0

Every row starts from the same noise (seed 0) and asks for the same ten classes; nothing is chosen or trained.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gallery import best_solver
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill import assets
from stepdistill.eval.bench.sources import read_source
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.generate import generate
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.rules.steps import StepRule, classifier_free
from stepdistill.sampling.sample import inspect
from stepdistill.sampling.solvers import stock_solvers

PASSES = (0, 1, 2, 20, 40, 56, 68, 76, 84, 92, 100)
"""The clock's values, a frame each."""
MILLISECONDS = {0: 1200, 1: 2200, 2: 2200, 100: 4000}
OTHERWISE = 300
TEACHER_STEPS, ZOOM, LABEL, GREYS = 50, 2, 190, 16


@dataclass(frozen=True)
class Row:
    """Pictures of one sampler: ``frames[k]`` is what there is after k of its ``steps``, each of ``cost`` passes."""

    title: str
    frames: list[Image.Image]
    cost: int

    def at(self, passes: int) -> tuple[Image.Image, str]:
        """The picture after so many passes, and the words beside it."""
        steps = min(passes // self.cost, len(self.frames) - 1)
        done = "done after" if steps == len(self.frames) - 1 else "after"
        used = steps * self.cost
        return self.frames[steps], f"{done} {used} pass{'es' if used != 1 else ''}"


def drawn(title: str, traced: Trace, scheduler: Any, steps: int, w: float) -> Row:
    """One picture a class, and what they were before each step."""
    conditions = encode(traced, entries(traced, "classes"))
    seen: list[Tensor] = []

    def recording() -> StepRule:
        rule = classifier_free(w)

        def watched(denoiser: Any, step: Any) -> Tensor:
            seen.append(step.x_t.clone())
            return rule(denoiser, step)

        return watched

    rows = torch.arange(len(conditions))
    settings: dict[str, Any] = {"steps": steps, "guidance": w, "seed": 0}
    seen.append(generate(traced, scheduler, conditions, rows, **settings, rule=recording))
    frames = [image_grid(decode(traced, x), len(rows)) for x in seen]
    return Row(title, frames, 2 if w != 1 else 1)


def frame(rows: list[Row], passes: int) -> Image.Image:
    """All rows after so many passes."""
    width, height = (ZOOM * side for side in rows[0].frames[0].size)
    canvas = Image.new("L", (LABEL + width, len(rows) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        picture, words = row.at(passes)
        canvas.paste(picture.convert("L").resize((width, height), Image.Resampling.NEAREST), (LABEL, number * height))
        pen.text((6, number * height + 12), row.title, fill=0, font=ImageFont.load_default(15))
        pen.text((6, number * height + 36), words, fill=110, font=ImageFont.load_default(13))
    palette = Image.new("P", (1, 1))
    palette.putpalette([round(255 * level / (GREYS - 1)) for level in range(GREYS) for _ in "rgb"])
    return canvas.convert("RGB").quantize(
        palette=palette, dither=Image.Dither.NONE
    )  # all frames share it: half the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="the run folder or export of a student of one step")
    parser.add_argument("--out", type=Path, default=assets.root() / "assets" / "pictures" / "passes.gif")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    facts = read_source(arguments.student).facts
    teacher, student, w = inspect(facts.teacher), inspect(arguments.student), facts.guidance
    rows = []
    for steps in (1, 2):
        name, _, scale = best_solver(assets.find("benchmarks/comparison.json"), steps)
        solver = stock_solvers(teacher.pipeline.scheduler)[name]
        plural = "s" if steps > 1 else ""
        rows.append(drawn(f"stock solver, {steps} step{plural}", teacher, solver, steps, scale))
        rows.append(drawn(f"student, {steps} step{plural}", student, student.pipeline.scheduler, steps, 1.0))
    rows.append(drawn(f"teacher, {TEACHER_STEPS} steps", teacher, teacher.pipeline.scheduler, TEACHER_STEPS, w))
    first, *others = [frame(rows, passes) for passes in PASSES]
    durations = [MILLISECONDS.get(passes, OTHERWISE) for passes in PASSES]
    first.save(arguments.out, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main()
