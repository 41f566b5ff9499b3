"""Arguments of a network that are dicts and lists inside dicts, as one level of dotted names and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict arguments as one level with dotted names; empty dicts stay values.

    A list of tensors inside a dict (an image embedding for each IP-Adapter) is one, named by numbers.
    """
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if prefix and isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`, in new dicts and lists (networks pop from those they are given)."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = dict(value) if isinstance(value, Mapping) else [*value] if type(value) is list else value
    return {name: _with_lists(value) for name, value in nested.items()}


def _with_lists(value: Any) -> Any:
    """``value`` with lists for the dicts in it that have numbers as names."""
    if not isinstance(value, dict):
        return value
    inner = {name: _with_lists(item) for name, item in value.items()}
    return [inner[str(number)] for number in range(len(inner))] if "0" in inner else inner


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors inside nested lists, tuples and mappings, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def first_tensor(output: Any) -> Any:
    """The first entry of a network's return value: a tensor itself, a tuple's or a model output's first.

    A list that holds a tensor per image is stacked.
    """
    if not isinstance(output, Tensor | list):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return torch.stack(output) if is_list_of_rows(output) else output


def is_list_of_rows(value: Any) -> bool:
    """Whether ``value`` is a list of tensors of one shape."""
    return isinstance(value, list) and all(isinstance(row, Tensor) for row in value) and len({*map(_shape, value)}) == 1


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with another first entry; the inverse of :func:`first_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, list):
        return list(tensor.unbind())
    if isinstance(output, Mapping):
        name, first = next(iter(output.items()))
        return type(output)(**{**output, name: with_first_tensor(first, tensor)})
    return type(output)((with_first_tensor(output[0], tensor), *output[1:]))


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
