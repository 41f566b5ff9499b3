"""What `stepdistill plan` says of every recipe for a real model, without any download: the table of docs/rehearsal.md.

    python scripts/rehearsal_table.py                    # the page, grid to samples; networks on the meta device
    python scripts/rehearsal_table.py sdxl_dmd2_lora     # one recipe's audit, and changes to it: train.lr=5e-5 ...
    python scripts/rehearsal_table.py --memory           # the column of memory again, minutes for each recipe

Schedulers, networks and latents are those of tests/published.py. Memory is in docs/rehearsal_memory.json.
"""

import argparse
import json
import runpy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image

from stepdistill import assets
from stepdistill.data.images import conditions
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.schedule import FlowSchedule, from_scheduler
from stepdistill.methods.base import DistillMethod
from stepdistill.planning import audit, plan
from stepdistill.recipe import Recipe, load
from stepdistill.training.make_method import make_method, make_sampler

ROOT = Path(__file__).parents[1]
MODELS = runpy.run_path(str(ROOT / "tests" / "published.py"))["MODELS"]
NAMES = {facts.hub: name for name, facts in MODELS.items()}
PAGE, MEMORY = ROOT / "docs" / "rehearsal.md", ROOT / "docs" / "rehearsal_memory.json"
MARKS = {"ok": "", "warning": " (!)", "error": " (**cannot work**)"}
HEAD = """# Audit of every recipe for a real model

`stepdistill plan RECIPE` audits a run before a weight is loaded, and `stepdistill train` prints the same table before
its first step ([what it shows](plan.md#the-audit)). This is what it says of the shipped recipes of real models, made by
`python scripts/rehearsal_table.py` from the published configs of schedulers and networks. (!) is a warning: outside
of what published runs do. Nothing here has been trained.

Grid: timesteps of the student's steps. Amplification: how far x_0 moves with the network's output, at the first and the
last of them. Noise: what rounding in the run's precision puts into x_0 at worst; .05 is the limit. Speed: rms change of
the weights by one update, relative to weights of a fresh network, and how many times the published run's; of student
and critic (or heads). Samples: student updates times batch, and the share of the published run's. GiB: on the device
while prompts are encoded / while the teacher makes trajectories, where it does / in training / in the host's memory at
the export. A recipe is "not counted" where `python scripts/rehearsal_table.py --memory RECIPE` was not run.

Left out: the warning of recipes with `data.conditions: everyday`, whose 400 prompts are seen far more than 50 times
each in most of them; name a list of your own.
"""


def real_recipes() -> list[str]:
    """The shipped recipes whose teacher is on the hub."""
    return [name for name in assets.recipes() if "\n  pipeline: " in _text(name) and "/" in _pipeline(name)]


def read(name: str, overrides: list[str], folder: Path) -> Recipe:
    """The recipe; where it wants images of the user's own, one stands in for them."""
    if "data/images" in _text(name):
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / "images" / "one.png")
        (folder / "images" / "one.txt").write_text("one")
        overrides = [f"data.images={folder / 'images'}", *overrides]
    return load(name, overrides)


def method_of(recipe: Recipe) -> tuple[DistillMethod, Denoiser]:
    """The recipe's method and its teacher on networks of the published shapes, on the meta device."""
    facts = MODELS[NAMES[recipe.teacher.pipeline]]
    scheduler = getattr(diffusers, facts.scheduler)(**facts.scheduler_config)
    schedule, kind = from_scheduler(scheduler, facts.mu)
    if recipe.student.shift is not None:
        schedule = FlowSchedule(recipe.student.shift, schedule.train_timesteps, inverted=schedule.inverted)

    def grid(_scheduler: Any, steps: int) -> dict[str, Any]:
        if not facts.sigmas:
            return {"num_inference_steps": steps}
        given = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
        return given if facts.mu is None else given | {"mu": facts.mu}

    with torch.device("meta"):
        network = getattr(diffusers, facts.network).from_config(facts.network_config)
    teacher = Denoiser(network, CallSpec("sample", "timestep"), schedule, kind)
    traced: Any = SimpleNamespace(
        pipeline=SimpleNamespace(scheduler=scheduler), component=facts.component, denoiser=teacher
    )
    sampler = make_sampler(recipe, traced, grid)
    sampler.grid()  # off the meta device
    with torch.device("meta"):
        scale = recipe.teacher.guidance.scale
        return make_method(recipe, traced, sampler, scale, torch.device("meta")), teacher


def checks_of(recipe: Recipe) -> dict[str, audit.Check]:
    """The audit by the names of its lines; that of the user's own images has no number of conditions."""
    method, teacher = method_of(recipe)
    entries = 1000 if recipe.data.conditions == "classes" else len(conditions(recipe.data, log=False)[0])
    checks = {check.name: check for check in audit.audit(recipe, method, teacher.kind, entries)}
    if recipe.data.conditions == "captions":
        del checks["conditions"]
    return checks


def row(name: str, checks: dict[str, audit.Check], memory: dict[str, float] | None) -> str:
    """The recipe's line of the page."""
    grid, rounding, samples = checks["grid"], checks["rounding"], checks["samples"]
    steps = [f"{step:.0f}" for step in grid.numbers["timesteps"]]
    cells = [f"`{name}`", ", ".join(steps if len(steps) < 9 else [*steps[:2], "...", steps[-1]]) + MARKS[grid.verdict]]
    factors = ", ".join(f"{factor:.2g}" for factor in rounding.numbers["amplification"])
    spread = MARKS[checks["updates by position"].verdict]
    cells += [factors + spread, f"{rounding.numbers['noise']:.1g}{MARKS[rounding.verdict]}"]
    speeds = [check for check in checks.values() if check.name.endswith(" speed")]
    cells.append("; ".join(map(_speed, speeds)))
    ratio = samples.numbers.get("ratio")
    share = "" if ratio is None else f" ({ratio:.0%})" if ratio > 0.1 else f" (1/{1 / ratio:.0f})"
    cells.append(samples.value.partition(" in ")[0] + share + MARKS[samples.verdict])
    gib = memory and [
        f"{memory[key]:.0f}" for key in ("encoding", "trajectories", "training", "export") if key in memory
    ]
    cells += [" / ".join(gib) if gib else "not counted"]
    cells.append(checks["published run"].value if "published run" in checks else "none")
    return f"| {' | '.join(cells)} |"


def page(folder: Path, memory: dict[str, Any]) -> str:
    """docs/rehearsal.md."""
    lines = ["| recipe | grid | amplification | noise | speed | samples | GiB | published run |", "|---" * 8 + "|"]
    for name in real_recipes():
        lines.append(row(name, checks_of(read(name, [], folder)), memory.get(name)))
    return HEAD + "\n" + "\n".join(lines) + "\n"


def memory_of(name: str, folder: Path) -> dict[str, float]:
    """GiB by phase of the recipe at its real size."""
    write = runpy.run_path(str(ROOT / "scripts" / "plan_sizes.py"))["write_published"]
    recipe = read(name, [], folder)
    place = folder / recipe.teacher.pipeline.replace("/", "+")
    if not place.exists():
        write(place, NAMES[recipe.teacher.pipeline])
    tree = recipe.model_dump(mode="json")
    tree["teacher"] |= {"pipeline": str(place), "revision": None}
    found = audit.memory_checks(plan.plan(tree), None)
    return {check.name.removeprefix("memory: ").split()[0]: check.numbers["gib"] for check in found}


def _speed(check: audit.Check) -> str:
    if "relative" not in check.numbers:
        return f"rate {check.numbers['lr']:g}"
    ratio = f", x{check.numbers['ratio']:.2g}" if "ratio" in check.numbers else ""
    return f"{check.numbers['relative']:.1e}{ratio}{MARKS[check.verdict]}"


def _text(name: str) -> str:
    return assets.recipe(name).read_text(encoding="utf-8")


def _pipeline(name: str) -> str:
    return _text(name).partition("\n  pipeline: ")[2].partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="RECIPE|KEY=VALUE")
    parser.add_argument("--memory", action="store_true", help="count memory, of the recipes named or of all")
    options = parser.parse_intermixed_args()
    names, overrides = ([one for one in options.what if ("=" in one) is changes] for changes in (False, True))
    memory = json.loads(MEMORY.read_text()) if MEMORY.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.memory:
            for name in names or real_recipes():
                memory[name] = memory_of(name, folder)
                print(name, memory[name], flush=True)
                MEMORY.write_text(json.dumps(memory, indent=1, sort_keys=True) + "\n")
        elif names:
            for name in names:
                print(audit.as_text(list(checks_of(read(name, overrides, folder)).values())))
        else:
            PAGE.write_text(page(folder, memory))


if __name__ == "__main__":
    main()
