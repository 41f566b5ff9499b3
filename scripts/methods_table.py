"""Write the table of docs/methods.md and README's count of methods, from their classes and their recipes fashion_*."""

import re
from pathlib import Path

from stepdistill import assets
from stepdistill.methods import FAMILIES, METHODS
from stepdistill.recipe import Recipe, load

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
HEAD = """\
| method | paper | learns from | trained or kept beside the student | steps of its recipe | sampler |
|---|---|---|---|---|---|
"""


def row(name: str, recipes: list[Recipe], partial: bool) -> str:
    """What a method is, as its comparison recipes set it up; ``partial``: the page says what it leaves out."""
    method, configs = METHODS[name], [recipe.method.config for recipe in recipes]
    needs = [method.data_needs(config) for config in configs]
    wanted = {"images": any(need.images for need in needs), "trajectories": any(need.paths for need in needs)}
    cells = [
        f"`{name}`",
        method.paper + (" \\*" if partial else ""),
        ", ".join(["conditions", *(kind for kind, does in wanted.items() if does)]),
        ", ".join(sorted({*method.extra_roles, *method.players} - {"student"})) or "–",
        ", ".join(map(str, sorted({recipe.student.steps for recipe in recipes}))),
        ", ".join(dict.fromkeys(method.sampler_of(config) for config in configs)),
    ]
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """docs/methods.md with its table anew."""
    text = PAGE.read_text(encoding="utf-8")
    shipped = [load(name) for name in assets.recipes() if name.startswith("fashion_")]
    table = HEAD
    for name in (name for names in FAMILIES.values() for name in names):
        recipes = [recipe for recipe in shipped if recipe.method.name == name]
        assert recipes, f"{name} has no recipe fashion_*.yaml"
        table += row(name, recipes, f"- `{name}`:" in text)
    return re.sub(r"\| method \| paper.*?\n(?=\n)", lambda _: table, text, count=1, flags=re.DOTALL)


def readme() -> str:
    """The README with the number of methods and their families anew."""
    text, names = README.read_text(encoding="utf-8"), ", ".join(family.lower() for family in FAMILIES)
    count = f"{len(METHODS)} methods in {len(FAMILIES)} families\n({names})\nare listed"
    return re.sub(r"\S+ methods in \w+ families\s\([^)]*\)\sare listed", count, text, count=1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
