"""One-line messages for a wrong value: what was expected, what was found, and the closest valid name."""

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepdistill.errors import found, suggest
from stepdistill.recipe.yaml_lines import Keys

_NOUNS = {int: "integer", float: "number"}


def describe(error: Any, model: type[BaseModel], tree: Any, owner: str = "") -> tuple[Keys, str]:
    """The key and the problem of one pydantic error.

    Args:
        error: an item of ``ValidationError.errors()``.
        model: what was validated.
        tree: the input.
        owner: whose keys they are, such as " of method tcd".
    """
    keys, value = _place(error["loc"], tree)
    if error["type"] == "extra_forbidden":
        section = _section(model, keys[:-1])
        return keys, f"unknown key{owner}; {_meant(str(keys[-1]), section, model)}"
    if error["type"] == "missing":
        keys = (*keys, error["loc"][-1])
        field = _field(model, keys)
        return keys, f"missing; expected {expected(field)}" + (f" ({field.description})" if field.description else "")
    if error["type"] in ("value_error", "assertion_error"):
        return keys, f"{error['msg'].removeprefix('Value error, ')}, found {found(value)}"
    if error["type"] == "string_pattern_mismatch":
        return keys, f"expected text that matches {error['ctx']['pattern']}, found {found(value)}"
    field = _field(model, keys)
    if field is None:
        return keys, f"{error['msg']}, found {found(value)}"
    phrase = _item(field) if isinstance(keys[-1], int) else expected(field)
    return keys, f"expected {phrase}, found {found(value)}"


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: "a positive number", "an integer from 1 to 16", "one of 'full', 'lora'"."""
    return _phrase(field.annotation, field.metadata)


def _item(field: FieldInfo) -> str:
    """What each item of a list field is."""
    return expected(field).partition(", each ")[2] or expected(field)


def section_words(model: type[BaseModel]) -> str:
    """A section in words."""
    return f"a section with the keys {', '.join(model.model_fields)}"


def _place(loc: Keys, tree: Any) -> tuple[Keys, Any]:
    """The part of ``loc`` that exists in the tree (pydantic adds names of union branches), and what is there."""
    keys: Keys = ()
    for key in loc:
        inside = isinstance(tree, dict) and key in tree
        inside |= isinstance(tree, list) and isinstance(key, int) and key < len(tree)
        if inside:
            keys, tree = (*keys, key), tree[key]
    return keys, tree


def _section(model: type[BaseModel], keys: Keys) -> type[BaseModel]:
    for key in keys:
        if not isinstance(key, int):
            model = next(iter(_models(model.model_fields[key].annotation)), model)
    return model


def _field(model: type[BaseModel], keys: Keys) -> FieldInfo | None:
    field = None
    for key in keys:
        if isinstance(key, int):
            continue
        if key not in model.model_fields:
            break
        field = model.model_fields[key]
        model = next(iter(_models(field.annotation)), model)
    return field


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _meant(key: str, section: type[BaseModel], model: type[BaseModel]) -> str:
    """The nearest key of the section, else the same key elsewhere in the recipe, else what the section takes."""
    if close := suggest(key, section.model_fields):
        return close.removeprefix("; ")
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if key in inner.model_fields:
                return f"did you mean '{name}.{key}'?"
    return f"expected one of {', '.join(section.model_fields)}"


def _phrase(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _phrase(inner[0], inner[1:])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_phrase(kind, metadata) for kind in inner)
    if origin is list:
        return f"a list{_length(metadata)}, each {_phrase(inner[0])}"
    if origin is dict:
        return "names with values"
    if annotation in _NOUNS:
        return _number(_NOUNS[annotation], metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return section_words(annotation)
    if annotation is str and any(isinstance(limit, bounds.MinLen) for limit in metadata):
        return "text that is not empty"
    words = {str: "text", bool: "true or false", types.NoneType: "null"}
    return words.get(annotation, str(annotation))


def _number(noun: str, metadata: Iterable[Any]) -> str:
    limits = {type(limit): limit for limit in metadata}
    article = "an" if noun == "integer" else "a"
    low, above = limits.get(bounds.Ge), limits.get(bounds.Gt)
    high, below = limits.get(bounds.Le), limits.get(bounds.Lt)
    if above and above.gt == 0 and not (high or below):
        return f"a positive {noun}"
    words = [f"from {low.ge}"] if low else [f"above {above.gt}"] if above else []
    words += [f"to {high.le}"] if high else [f"to below {below.lt}"] if below else ["up"] if low else []
    return " ".join([article, noun, *words])


def _length(metadata: Iterable[Any]) -> str:
    limits = {type(limit): limit for limit in metadata}
    least, most = limits.get(bounds.MinLen), limits.get(bounds.MaxLen)
    if least and most:
        return f" of {least.min_length}"
    return f" of at least {least.min_length}" if least else ""
