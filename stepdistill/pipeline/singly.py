"""Calls that take one prompt each, watched one after the other and stacked, as if one call had been for all of them.

What has a row for each image in a call of its own (two or three, where guidance makes one batch of its passes) gets
those of all calls, ordered as a call for several would have them: all first passes, then all second ones. What is the
same in all calls stays as it is. Prompts of different lengths are padded with zeros to the longest, and the network's
mask of them is found by trying, as a call for one prompt states none. Whether the network is right on such a batch is
what tracing's self-test shows.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.diffusion.ragged import Rows, Shared, found
from stepdistill.pipeline.call import TraceError, by_itself
from stepdistill.pipeline.compare import gives, same
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.places import passes, scaled_sample
from stepdistill.pipeline.recording import Call, Recording, Step, several_as_one

MASKS = (torch.bool, torch.int64, torch.float32)
"""What a mask of prompts may be made of."""


def observe_each(pipeline: Any, entries: Sequence[str], arguments: Mapping[str, Any], **options: Any) -> Recording:
    """The recordings of a call for each entry, stacked; ``options`` as for :func:`observe`.

    Raises:
        TraceError: a call fails, or the calls have nothing in common.
    """
    each = [observe(pipeline, by_itself(entry), arguments, seed=seed, **options) for seed, entry in enumerate(entries)]
    networks, steps = modules(pipeline), [*zip(*(one.steps for one in each), strict=True)]
    if any(len({tuple(call.component for call in part.calls) for part in parts}) > 1 for parts in steps):
        raise TraceError("call", "one prompt takes other calls of the pipeline's networks than another")
    stacks: dict[tuple[str, int], _Stack] = {}
    return replace(
        each[0], count=len(each), steps=[_stacked_step(parts, networks, stacks) for parts in steps], calls=[]
    )


def _stacked_step(
    parts: Sequence[Step], networks: Mapping[str, nn.Module], stacks: dict[tuple[str, int], "_Stack"]
) -> Step:
    """The steps of several calls as one, each replayed with its own scheduler and random numbers."""
    calls: list[Call] = []
    for own in zip(*(part.calls for part in parts), strict=True):
        rows = passes(own[0], scaled_sample(parts[0])[:1])
        if not rows:
            calls.append(own[0])  # an encoder's, which is only counted
            continue
        number = sum(call.component == own[0].component for call in calls)
        stack = stacks.setdefault((own[0].component, number), _Stack(networks[own[0].component], rows))
        calls.append(stack(own))

    def of_each(stacked: Tensor) -> Sequence[Tensor]:
        return stacked.unflatten(0, (-1, len(parts))).unbind(1)

    others = [_stacked_step(each, {}, {}) for each in zip(*(part.others for part in parts), strict=True)]
    return several_as_one(parts, _interleaved, of_each, calls=calls, others=others)


class _Stack:
    """Stacks the calls of one network at one place of a step.

    An argument of as many rows as passes that is the same in all calls may be a row for each image or no row at all:
    all are taken for rows, and where the network does not give on the stack what it gave in the calls, those are not
    that it cannot be right with.

    Args:
        network: whose calls they are.
        passes: the rows of one call.
    """

    def __init__(self, network: nn.Module, passes: int):
        self.network, self.passes = network, passes
        self.fixed: frozenset[str] | None = None
        self.stack = self._arguments

    def __call__(self, calls: Sequence[Call]) -> Call:
        outputs = [
            _stacked("output", each, self.passes) for each in zip(*(call.outputs for call in calls), strict=True)
        ]
        if self.fixed is None:
            self.fixed = self._found_fixed(calls, outputs)
        output = _stacked("output", [call.output for call in calls], self.passes)
        return Call(calls[0].component, self.stack(calls, self.fixed), output, outputs)

    def _found_fixed(self, calls: Sequence[Call], outputs: Sequence[Tensor]) -> frozenset[str]:
        """The arguments that are the same for any number of images although they look like rows."""
        first, *others = (call.arguments for call in calls)
        rows = (name for name, value in first.items() if isinstance(value, Tensor | list))
        alike = [name for name in rows if all(same(first[name], other.get(name)) for other in others)]
        usual = {name for name in alike if (_shape(first[name]) or (self.passes,))[0] != self.passes}
        further = ((), *((name,) for name in alike), tuple(alike))
        every = dict.fromkeys(frozenset({*base, *more}) for base in (usual, ()) for more in further)
        refusal: TraceError | None = None
        for stack, fixed in itertools.product((self._arguments, self._own_shapes), every):
            try:
                arguments = stack(calls, fixed)
            except TraceError as error:
                refusal = refusal or error
                continue
            if self._gives(arguments, outputs, fixed):
                self.stack = stack
                return fixed
        if refusal is not None:
            raise refusal
        return frozenset(usual)

    def _gives(self, arguments: Mapping[str, Any], outputs: Sequence[Tensor], whole: Collection[str] = ()) -> bool:
        network: Any = self.network
        if (ragged := found([arguments])) is not None:
            arguments, network = ragged.packed_call(arguments, len(outputs[0])), ragged.around(network, whole)
        return gives(network, arguments, outputs)

    def _own_shapes(self, calls: Sequence[Call], fixed: Collection[str]) -> dict[str, Any]:
        """The arguments where what has another shape in each call is no tensor of all, but :class:`Rows`."""
        arguments: dict[str, Any] = {}
        for name in {name: None for call in calls for name in call.arguments}:
            values = [call.arguments.get(name) for call in calls]
            if name in fixed:
                arguments[name] = values[0]
            elif (rows := _rows(values, self.passes)) is not None:
                arguments[name] = rows
            else:
                arguments[name] = _stacked(name, values, self.passes)
        return arguments

    def _arguments(self, calls: Sequence[Call], fixed: Collection[str]) -> dict[str, Any]:
        first, arguments, padded = calls[0], {}, {}
        for name, value in first.arguments.items():
            values = [call.arguments.get(name) for call in calls]
            if lengths := _lengths(values, self.passes):
                padded[name] = lengths
                values = [_padded(value, max(lengths)) for value in values]
            arguments[name] = value if name in fixed else _stacked(name, values, self.passes)
        for name, lengths in padded.items():
            own = (self.passes, lengths[0])
            if not any(isinstance(v, Tensor) and v.shape == own for n, v in first.arguments.items() if n != name):
                return arguments | self._found_mask(calls, padded, lengths)
        return arguments

    def _found_mask(self, calls: Sequence[Call], padded: Collection[str], lengths: list[int]) -> dict[str, Tensor]:
        """The argument, left out so far, with which padded prompts give what they give unpadded; empty if none."""
        shortest = calls[lengths.index(min(lengths))]
        longer = {name: _padded(shortest.arguments[name], max(lengths)) for name in padded}
        device = next(iter(longer.values())).device
        for name in (name for name, value in shortest.arguments.items() if value is None):
            for dtype in MASKS:
                ones = [torch.ones(self.passes, length, dtype=dtype, device=device) for length in lengths]
                masks = [_padded(mask, max(lengths)) for mask in ones]
                own = masks[lengths.index(min(lengths))]
                if self._gives({**shortest.arguments, **longer, name: own}, shortest.outputs):
                    return {name: _interleaved(masks)}
        return {}


def _rows(values: Sequence[Any], passes: int) -> Any:
    """The rows of calls whose tensors have other shapes, or that lack one; a list of such; None: they are not so.

    What has no rows, as many as passes, is shared by those of its call.
    """
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, Tensor) for value in given):
        if len(given) == len(values) and (len({*map(_shape, values)}) == 1 and len(values[0]) == passes):
            return None
        shared = not all(value.ndim and len(value) == passes for value in given)
        if shared and len(given) == len(values) and all(same(value, given[0]) for value in given):
            return None
        kind = Shared if shared else Rows
        return kind(value if value is None or shared else value[number] for number in range(passes) for value in values)
    if len({_lengths_of_list(value) for value in values}) == 1 and _lengths_of_list(values[0]):
        columns = [_rows(column, passes) for column in zip(*values, strict=True)]
        return None if None in columns else type(values[0])(columns)
    return None


def _lengths_of_list(value: Any) -> tuple[type, int] | None:
    """The type and length of a list or tuple of tensors; None: it is none."""
    tensors = isinstance(value, list | tuple) and all(isinstance(one, Tensor) for one in value)
    return (type(value), len(value)) if tensors and value else None


def _stacked(name: str, values: Sequence[Any], passes: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim and len(first) % passes == 0 and len({*map(_shape, values)}) == 1:
        rows = _interleaved([value.unflatten(0, (passes, -1)) for value in values])  # perhaps several for each image
        return rows.flatten(0, 1)
    shapes = _shapes(first)  # first: as many tensors as passes, each with their rows, are no entry for each
    if shapes and all(shape and shape[0] == passes for shape in shapes) and {*map(_shapes, values)} == {shapes}:
        return [*map(_interleaved, zip(*values, strict=True))]
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == passes for value in values):
        return [value[number] for number in range(passes) for value in values]
    if all(same(value, first) for value in values):
        return first
    if shapes and {*map(_shapes, values)} == {shapes}:
        return [_stacked(name, column, passes) for column in zip(*values, strict=True)]
    raise TraceError("constants", f"'{name}' differs between two prompts and has no batch dimension")


def _interleaved(values: Sequence[Tensor]) -> Tensor:
    """Rows (k, ...) of n calls as (k n, ...), the first ones of all calls first; 0-dim ones as they are."""
    return torch.stack(list(values), 1).flatten(0, 1) if values[0].ndim else values[0]


def _lengths(values: Sequence[Any], passes: int) -> list[int]:
    """How many tokens each call's rows have, empty where they do not differ in just that."""
    if not all(isinstance(value, Tensor) and value.ndim > 1 and len(value) == passes for value in values):
        return []
    lengths = [value.shape[1] for value in values]
    return lengths if len({*lengths}) > 1 and len({value.shape[2:] for value in values}) == 1 else []


def _padded(value: Tensor, length: int) -> Tensor:
    return functional.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]))


def _shapes(value: Any) -> tuple[Any, ...]:
    return tuple(map(_shape, value)) if isinstance(value, list | tuple) else ()


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
