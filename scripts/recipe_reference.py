"""Write docs/recipe.md and assets/methods.json: every key of a recipe and of each method, from the schema itself.

python scripts/recipe_reference.py            # --check: only say whether the page is up to date
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepdistill.errors import found
from stepdistill.methods import METHODS, DistillMethod
from stepdistill.recipe import Recipe
from stepdistill.recipe.messages import expected
from stepdistill.recipe.shipped import METHODS_FILE

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
LIST = PAGE.parents[1] / "assets" / METHODS_FILE
HEAD = """# Recipe reference

Written by `python scripts/recipe_reference.py` from the schema that checks recipes. A recipe is one YAML file; keys are
overridden on the command line by their dotted names (`train.steps=20`), and `--dry-run` prints all of them as resolved.
An unknown key, a wrong type or an impossible value ends the command with the file, the line and what was expected.

## Sections
"""


def lines_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """A table row for each key; keys of nested sections by their dotted names."""
    rows = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += lines_of(inner, f"{prefix}{name}.")
            continue
        rows.append(row(f"{prefix}{name}", field))
    return rows


def row(key: str, field: FieldInfo) -> str:
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    default = "required" if field.is_required() else "none" if value == {} else found(value)
    cells = (f"`{key}`", default, expected(field), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(rows: list[str]) -> list[str]:
    return ["| key | default | value | |", "|---|---|---|---|", *rows] if rows else ["No settings of its own."]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    top = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            top.append(row(name, field))
            continue
        lines += [f"### {name}", "", f"{field.description[0].upper()}{field.description[1:]}.", ""]
        lines += [*table(lines_of(section, f"{name}.")), ""]
    lines += ["### Top level", "", *table(top), "", "## Settings of each method", ""]
    for name, method in METHODS.items():
        lines += [f"### method: {name}", "", f"{method.summary}.", "", *table(lines_of(method.Config, "method.")), ""]
    return "\n".join(lines).rstrip() + "\n"


def methods() -> str:
    """What ``stepdistill methods`` lists, as JSON with a line for each method."""
    rows = ",\n".join(json.dumps(listed(method)) for method in METHODS.values())
    return f'{{"methods": [\n{rows}\n]}}\n'


def listed(method: type[DistillMethod]) -> dict[str, Any]:
    """Name, family, summary, whether it trains on images (by default, as an option, no), its critic and its keys."""
    config = method.Config
    needed = method.data_needs(config()).images
    option = "gan_weight" in config.model_fields and method.data_needs(config(gan_weight=1e-3)).images
    return {
        "name": method.name,
        "family": method.family,
        "summary": method.summary,
        "images": "yes" if needed else "can" if option else "no",
        "critic": "critic" in method.extra_roles,
        "keys": {
            key: {"default": field.get_default(call_default_factory=True), "description": field.description}
            for key, field in config.model_fields.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    check, stale = parser.parse_args().check, False
    for file, wanted in ((PAGE, page()), (LIST, methods())):
        if not check:
            file.write_text(wanted, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != wanted:
            print(f"{file} is out of date: run python scripts/recipe_reference.py", file=sys.stderr)
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
