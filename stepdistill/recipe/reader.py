"""Reads a recipe: file, overrides, validation against the schema, and the rules across sections.

Every mistake is one line with the file and line (or the override), the key, what was expected and found.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stepdistill import assets
from stepdistill.errors import InputError, found, suggest
from stepdistill.files import read_text
from stepdistill.recipe import yaml_lines
from stepdistill.recipe.checks import missing, problems
from stepdistill.recipe.find_method import find_method
from stepdistill.recipe.messages import describe, section_words
from stepdistill.recipe.schema import Method, Recipe
from stepdistill.recipe.yaml_lines import Keys


def load(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), safe: bool = False) -> Recipe:
    """Read, override, resolve and check a recipe.

    Args:
        source: a recipe file, the name of a shipped recipe, or the recipe as nested dicts.
        overrides: ``dotted.key=value``, the value read as YAML; later ones win.
        safe: refuse a recipe that names Python code, before any of it is run.

    Raises:
        InputError: one line with the file and line (or the override), the key, what was expected and found.
    """
    draft = _Draft(source)
    for override in overrides:
        draft.override(override)
    recipe = draft.validate(Recipe, draft.tree)
    for keys, problem in missing(recipe):
        raise draft.error(keys, problem)
    draft.check(("method", "name"), lambda: find_method(recipe.method.name, safe))
    settings, owner = recipe.method.model_extra, f" of method {recipe.method.name}"
    config = draft.validate(recipe.method.implementation.Config, settings, ("method",), owner)
    recipe.method = Method(name=recipe.method.name, **config.model_dump(mode="json"))
    for keys, problem in problems(recipe, config):
        raise draft.error(keys, problem)
    if recipe.output is None:
        recipe.output = f"runs/{draft.stem or recipe.method.name.rpartition(':')[2]}"
    return recipe


class _Draft:
    """A recipe before it is checked: the tree, and where each key in it was given."""

    def __init__(self, source: str | Path | dict[str, Any] | Recipe):
        self.places: dict[Keys, str] = {}
        self.stem = ""
        if isinstance(source, Recipe):
            source = source.model_dump(mode="json")
        if isinstance(source, dict):
            self.name, self.tree = "recipe", _copy(source)
            return
        path = _existing(source)
        self.name, self.stem = str(path), path.stem
        self.tree, lines = yaml_lines.read(read_text(path), self.name)
        self.places = {keys: f"{path}:{line}" for keys, line in lines.items()}
        if not isinstance(self.tree, dict):
            kind = "an empty file" if self.tree is None else found(self.tree)
            raise InputError(f"{path}:1: expected {section_words(Recipe)}, found {kind}")

    def override(self, text: str) -> None:
        dotted, equals, value = text.partition("=")
        here = f"override {found(text)}"
        if not equals or not all(re.fullmatch(r"\w+", key) for key in dotted.split(".")):
            raise InputError(f"{here}: expected dotted.key=value, such as train.steps=20")
        keys: Keys = tuple(dotted.split("."))
        tree = self.tree
        for depth, key in enumerate(keys[:-1]):
            if tree.get(key) is None:
                tree[key] = {}
                self.places[keys[: depth + 1]] = here
            tree = tree[key]
            if not isinstance(tree, dict):
                parent = ".".join(keys[: depth + 1])
                raise InputError(f"{here}: expected a section at {parent}, found {found(tree)}")
        try:
            tree[keys[-1]] = yaml_lines.read(value, here)[0]
        except InputError as error:
            raise InputError(re.sub(r":\d+: ", ": ", str(error), count=1)) from None
        self.places = {known: place for known, place in self.places.items() if known[: len(keys)] != keys}
        self.places[keys] = here

    def error(self, keys: Keys, problem: str) -> InputError:
        """``problem`` at the nearest place that the user wrote."""
        place = next((self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places), self.name)
        dotted = ".".join(map(str, keys))
        return InputError(" ".join(f"{place}: {dotted}: {problem}".split()))

    def check(self, keys: Keys, function: Any) -> None:
        """Run ``function``; an InputError of it is one about ``keys``."""
        try:
            function()
        except InputError as error:
            raise self.error(keys, str(error)) from None

    def validate(self, model: type[BaseModel], tree: dict[str, Any], prefix: Keys = (), owner: str = "") -> Any:
        """``tree`` as a ``model``; ``prefix`` is where it stands in the recipe, ``owner`` whose keys they are."""
        try:
            # As JSON, strictness is that of a file: a list is a fine tuple, but "20" is not 20 and true is not 1.
            return model.model_validate_json(json.dumps(tree, default=str), strict=True)
        except ValidationError as error:
            problems = [(*describe(one, model, tree, owner), one["type"]) for one in error.errors(include_url=False)]
        # A misspelt key shows as unknown and as missing: the first says what to do.
        keys, problem, _ = min(problems, key=lambda problem: problem[2] != "extra_forbidden")
        raise self.error(prefix + keys, problem)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise InputError(f"{path}: expected a recipe file, found a folder{hint}")
    if path.exists():
        return path
    try:
        return assets.recipe(str(source))
    except InputError as error:
        beside = suggest(str(path), [str(other) for other in path.parent.glob("*.yaml")])
        if beside:  # a file of one's own is nearer than a shipped one
            raise InputError(f"{str(error).partition('; did you mean')[0]}{beside}") from None
        raise


def _copy(tree: Any) -> Any:
    """The tree with its own dicts and lists, so that overrides do not reach the caller's."""
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list | tuple) else tree
