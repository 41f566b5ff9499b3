"""The shipped recipes and methods as tables, at once: without torch, and without the schema that checks recipes."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from stepdistill import assets
from stepdistill.files import read_json, read_text

METHODS_FILE = "methods.json"
"""In assets/: name, family, summary, images and keys of every method; written by scripts/recipe_reference.py."""
_GPU = re.compile(r"\ban? (\d+) GB GPU")


@dataclass(frozen=True)
class ShippedRecipe:
    """What a table shows of a recipe.

    Args:
        name: what ``train`` takes.
        summary: its first comment.
        path: its file.
        base: the family of its teacher, such as sdxl.
        teacher: ``teacher.pipeline``.
        method: its name.
        student: lora or full.
        steps: of the student.
        images: whether it trains on images.
        gpu: memory in GB that its comment names; None: a CPU will do.
    """

    name: str
    summary: str
    path: str
    base: str
    teacher: str
    method: str
    student: str
    steps: int
    images: bool
    gpu: int | None


def shipped_recipes(
    base: str | None = None,
    method: str | None = None,
    gpu: float | None = None,
    images: bool | None = None,
    steps: int | None = None,
) -> list[ShippedRecipe]:
    """The recipes that fit, those of well-known models first.

    Args:
        base: in the name of the recipe or of its teacher.
        method: its name.
        gpu: memory in GB that there is.
        images: whether there are any.
        steps: of the student.
    """
    every = map(_read, assets.recipes())
    fitting = [
        one
        for one in every
        if (base is None or base.lower() in f"{one.base} {one.name} {one.teacher}".lower())
        and method in (None, one.method)
        and (gpu is None or (one.gpu or 0) <= gpu)
        and images in (None, one.images)
        and steps in (None, one.steps)
    ]
    return sorted(fitting, key=lambda one: (one.gpu is None, one.name != "quickstart", one.base == "fashion", one.name))


def _read(name: str) -> ShippedRecipe:
    path = assets.recipe(name)
    text = read_text(path)
    # libyaml's loader where there is one: there are many recipes.
    tree = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text).get_single_data()
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    memory = _GPU.search(comment)
    teacher, student = str(tree["teacher"]["pipeline"]), tree.get("student", {})
    return ShippedRecipe(
        name=name,
        summary=text.partition("\n")[0].lstrip("# ").strip() if text.startswith("#") else "",
        path=str(path),
        base=teacher.partition("-")[0] if teacher in assets.teachers() else name.partition("_")[0],
        teacher=teacher,
        method=str(tree["method"]["name"]),
        student=str(student.get("train", "full")),
        steps=int(student.get("steps", 0)),
        images=bool(tree.get("data", {}).get("images")),
        gpu=int(memory[1]) if memory else None,
    )


def shipped_methods(
    family: str | None = None,
    images: bool | None = None,
    base: str | None = None,
    gpu: float | None = None,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """The methods that fit: name, family, summary, images, critic and keys of each, and the steps of its recipes.

    Args:
        family: a part of its name.
        images: True: those that can train on images; False: those that need none by default.
        base: those with a recipe of such a base, as for :func:`shipped_recipes`.
        gpu: those with a recipe for a GPU of so much memory in GB.
        steps: those with a recipe of so many steps.
    """
    every = read_json(assets.find(METHODS_FILE))["methods"]
    suited = ("no", "yes", "can") if images is None else ("yes", "can") if images else ("no", "can")
    fitting = [one for one in every if (family or "").lower() in one["family"].lower() and one["images"] in suited]
    steps_of: dict[str, set[int]] = {}
    for row in shipped_recipes(base, None, gpu, None, steps):
        steps_of.setdefault(row.method, set()).add(row.steps)
    if (base, gpu, steps) != (None, None, None):
        fitting = [one for one in fitting if one["name"] in steps_of]
    return [one | {"steps": sorted(steps_of.get(one["name"], ()))} for one in fitting]


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header in columns; the last column is wrapped to the terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max(24, shutil.get_terminal_size().columns - indent)
    lines = []
    for row in (header, *rows):
        first, *rest = textwrap.wrap(row[-1], room) or [""]
        cells = [f"{cell:{width}}" for cell, width in zip(row[:-1], widths, strict=False)]
        lines += ["  ".join([*cells, first]).rstrip(), *(" " * indent + line for line in rest)]
    return "\n".join(lines)
