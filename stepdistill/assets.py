"""Finds the data that ships with the package: recipes/ and assets/, in a checkout and in an installed wheel.

In a checkout (also when installed in editable mode) they are top-level folders beside the package; a wheel holds
them under stepdistill/_data.
"""

import re
from difflib import get_close_matches
from pathlib import Path

from stepdistill.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder that holds recipes/ and assets/."""
    bundled = _PACKAGE / "_data"
    return bundled if bundled.is_dir() else _PACKAGE.parent


def find(relative: str | Path) -> Path:
    """An asset by its path below assets/, such as ``teachers/fashion-dit``.

    Raises:
        InputError: there is none.
    """
    path = root() / "assets" / relative
    if not path.exists():
        raise InputError(f"asset '{relative}': expected at {path}, found nothing there")
    return path


def teachers() -> list[str]:
    """Names of the embedded teachers."""
    return sorted(path.parent.name for path in (root() / "assets" / "teachers").glob("*/model_index.json"))


def prompts(name: str) -> Path:
    """A shipped list of prompts by its name."""
    return find(f"prompts/{name}.txt")


def prompt_lists() -> list[str]:
    """Names of the shipped lists of prompts."""
    return sorted(path.stem for path in (root() / "assets" / "prompts").glob("*.txt"))


def recipe(name: str) -> Path:
    """A shipped recipe by its name, ``quickstart``, ``quickstart.yaml`` or ``recipes/quickstart.yaml``.

    Raises:
        InputError: there is none; the message names those that are meant, the likeliest first.
    """
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    path = root() / "recipes" / f"{stem}.yaml"
    if stem not in recipes():
        first, *others = meant(stem) or [""]
        hint = f"; did you mean '{first}'?" if first else ""
        hint += f" Also: {', '.join(others)}." if others else ""
        raise InputError(
            f"{name}: expected a recipe file or the name of a shipped recipe (stepdistill recipes), found neither{hint}"
        )
    return path


def meant(name: str) -> list[str]:
    """Shipped recipes that a name may stand for, the likeliest first: "sdxl" is sdxl_dmd2_lora before its relatives."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    holding = [one for one in recipes() if words and all(word in one for word in words)]
    if holding:
        # DMD2 is the method to begin with, a LoRA fits more machines, and a short name is the plain variant.
        return sorted(
            holding, key=lambda one: (not one.startswith(words[0]), "dmd2" not in one, "lora" not in one, len(one))
        )
    return get_close_matches(name, recipes(), n=3, cutoff=0.6)


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in (root() / "recipes").glob("*.yaml"))
