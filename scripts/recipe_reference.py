"""Write docs/recipe.md: every key of a recipe and of each method's own settings, from the schema itself.

python scripts/recipe_reference.py            # --check: only say whether the page is up to date
"""

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepdistill.methods import METHODS
from stepdistill.recipe import Recipe
from stepdistill.recipe_errors import expected, found

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    written, wanted = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "", page()
    if parser.parse_args().check:
        if written != wanted:
            print(f"{PAGE} is out of date: run python scripts/recipe_reference.py", file=sys.stderr)
        return int(written != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
