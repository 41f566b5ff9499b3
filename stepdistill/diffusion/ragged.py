"""Conditions whose rows have shapes of their own and no mask: the rows go through the network one by one.

Such a condition is kept as flat rows (B, n), padded with zeros, and the shape of each row is a condition beside it.
What the network is given is cut out of them: nothing of the padding.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.diffusion.experts import Part, gathered, taken
from stepdistill.diffusion.nested import flatten, tensors_in, unflatten

ABSENT = -1
"""What the shape of a row holds that its call is not given."""


class Rows(list):
    """The rows of an argument that are no tensor together; None for a row whose call has no such argument."""


@dataclass(frozen=True)
class Field:
    """What is known of one such argument.

    Args:
        axes: of a row; of a shared one, of the whole argument.
        dtype: of it.
        shared: it has no rows: a call has one, whatever the number of its images (the places of its tokens).
    """

    axes: int
    dtype: torch.dtype
    shared: bool = False


@dataclass(frozen=True)
class Ragged:
    """How a network is called whose conditions have shapes of their own.

    Args:
        fields: by name; the tensors of a list are "argument number".
        lists: arguments that are lists (or tuples: their type) of such.
    """

    fields: Mapping[str, Field]
    lists: Mapping[str, type] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the conditions: flat rows, and their shapes."""
        return *self.fields, *map(shape_of, self.fields)

    def packed_call(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The arguments of a network's call with the flat rows and shapes for its own; as they are, if they are so.

        Args:
            arguments: of a call, dicts as dotted names.
            count: rows of the call.
        """
        if shape_of(next(iter(self.fields))) in arguments:
            return dict(arguments)
        apart = {f"{name} {i}": one for name in self.lists for i, one in enumerate(arguments.get(name) or ())}
        own = {**arguments, **apart}
        own_names = {*self.fields, *self.lists}
        own_names |= {name for name in self._dicts if arguments.get(name) == {}}
        call = {name: value for name, value in arguments.items() if name not in own_names}
        samples = next(value for value in tensors_in(list(arguments.values())))
        for name, known in self.fields.items():
            rows = _rows(own.get(name), known, count)
            shapes = [[ABSENT] * known.axes if row is None else list(row.shape) for row in rows]
            empty = torch.zeros(1, dtype=known.dtype, device=samples.device)
            flat = [empty if row is None or not row.numel() else row.flatten() for row in rows]
            call[name] = pad_sequence(flat, batch_first=True)
            call[shape_of(name)] = torch.tensor(shapes, device=samples.device).reshape(count, known.axes)
        return call

    def network_call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`packed_call`, of one row."""
        call = dict(arguments)
        for name, known in self.fields.items():
            flat, (shape, *_) = call.pop(name), call.pop(shape_of(name)).tolist()
            if ABSENT not in shape:
                flat = flat[:, : torch.Size(shape).numel()]
                call[name] = flat[0].reshape(shape) if known.shared else flat.reshape(len(flat), *shape)
        for name, kind in self.lists.items():
            parts = [call.pop(one) for one in self.fields if one.rpartition(" ")[0] == name and one in call]
            call |= {name: kind(parts)} if parts else {}
        empty = (name for name in self._dicts if not any(one.startswith(f"{name}.") for one in call))
        return call | {name: {} for name in empty}

    @property
    def _dicts(self) -> set[str]:
        """The dicts that such arguments are entries of, by dotted names."""
        return {name.rpartition(".")[0] for name in self.fields if "." in name}

    def rows(self, conditions: Mapping[str, Tensor]) -> list[Part]:
        """The rows of a batch, one in each part."""
        shapes = conditions[shape_of(next(iter(self.fields)))]
        each = torch.arange(len(shapes), device=shapes.device).split(1)
        return [("", row) for row in each] if len(each) > 1 else [("", None)]

    def around(self, network: nn.Module, whole: Collection[str]) -> Callable[..., Any]:
        """The network as one that takes the flat rows, and returns the list of its output tensors.

        Args:
            whole: the arguments without rows.
        """

        def call(**arguments: Any) -> list[Tensor]:
            flat, made = flatten(arguments), []
            split = self.rows(flat)
            for _, rows in split:
                own = {n: value if n in whole else _of_rows(value, rows, len(split)) for n, value in flat.items()}
                made.append(tensors_in(network(**unflatten(self.network_call(own)))))
            return [gathered(outputs, split) for outputs in zip(*made, strict=True)]

        return call


def shape_of(name: str) -> str:
    """The name of the condition that holds the shape of each row of another."""
    return f"{name} shape"


def found(calls: Sequence[Mapping[str, Any]]) -> Ragged | None:
    """How a network is called of whose calls, the arguments of each, some have :class:`Rows`; None: none has."""
    fields: dict[str, Field] = {}
    lists: dict[str, type] = {}
    for arguments in calls:
        for name, value in arguments.items():
            whole = [(name, value)]
            if isinstance(value, list | tuple) and value and all(isinstance(one, Rows) for one in value):
                lists[name] = type(value)
                whole = [(f"{name} {i}", one) for i, one in enumerate(value)]
            for one, rows in whole:
                if isinstance(rows, Rows):
                    row = next(row for row in rows if row is not None)
                    fields.setdefault(one, Field(row.ndim, row.dtype, isinstance(rows, Shared)))
    return Ragged(fields, lists) if fields else None


class Shared(Rows):
    """The values of an argument without rows, one for each row of its call."""


def _rows(value: Any, known: Field, count: int) -> Sequence[Tensor | None]:
    if value is None:
        return [None] * count
    if isinstance(value, Rows):
        return value
    return [value] * count if known.shared else list(value)


def _of_rows(value: Any, rows: Tensor | None, count: int) -> Any:
    """The rows of a batch's argument, where it has ``count``."""
    if rows is None or not isinstance(value, Tensor | list) or not getattr(value, "ndim", 1) or len(value) != count:
        return value
    return taken(value, rows) if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]
