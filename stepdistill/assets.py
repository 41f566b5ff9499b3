"""Finds the data that ships with the package: recipes/ and assets/, in a checkout and in an installed wheel.

In a checkout (also when installed in editable mode) they are top-level folders beside the package; a wheel holds
them under stepdistill/_data.
"""

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
        InputError: there is none; the message lists those that exist.
    """
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    path = root() / "recipes" / f"{stem}.yaml"
    if stem not in recipes():
        raise InputError(f"{name}: expected a recipe file or one of {', '.join(recipes())}, found no such file")
    return path


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in (root() / "recipes").glob("*.yaml"))
