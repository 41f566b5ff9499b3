"""Sort the arguments of a network's recorded calls: what is constant, what has rows for each image, what masks those.

As in :mod:`stepdistill.pipeline.explain`, ``off`` is a run of three images without guidance and ``on`` one of two with
it: what follows those numbers has rows for each image, along its first axis as a rule. Where another axis follows, or
the first by a multiple, that is where the rows are (:class:`stepdistill.diffusion.row_layout.RowLayout`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import CallSpec
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import close, rows_equal, same
from stepdistill.pipeline.recording import Call, Runs


@dataclass(frozen=True)
class _Given:
    """The values of each argument at the first calls of both runs, and how many rows for images those may have."""

    values: dict[str, list[Any]]
    sizes: list[set[int]]

    def follows_batch(self, name: str, kind: type) -> bool:
        """Whether the argument has a row for each image at every call."""
        given = self.values[name]
        if not all(isinstance(value, kind) for value in given) or (kind is Tensor and not all(v.ndim for v in given)):
            return False
        return all(len(value) in size for value, size in zip(given, self.sizes, strict=True))


def sort_arguments(runs: Runs, spec: CallSpec, hint: str = "") -> tuple[CallSpec, list[str]]:
    """(the spec with its constants, lists, layouts and masks; the names of the conditions).

    Args:
        hint: what is known to change what is beside the sample from step to step, for the message.
    """
    off, on = runs
    first_off = off.steps[0].calls[0].arguments
    for other in (call.arguments for call in on.steps[0].calls):
        apart = first_off.keys() ^ other.keys()  # an argument that is None may as well be left out
        if changed := sorted(name for name in apart if name in first_off or other[name] is not None):
            raise TraceError("constants", f"guidance changes which arguments are passed: {changed}")
    fed = {name for helper in spec.helpers for name in helper.feeds}
    time = (spec.timestep, *spec.times, *spec.times_apart)
    rest = [name for name in first_off if name not in (spec.sample, *time) and name not in fed]
    _check_steady(runs, spec, rest, hint)
    ragged = () if spec.ragged is None else spec.ragged.names
    rest = [name for name in rest if name not in ragged]
    calls = [*off.steps[0].calls, *on.steps[0].calls]
    rows = [spec.window.rows(call.arguments[spec.sample]) for call in calls]
    spec = replace(spec, apart={n: type(first_off[n]) for n in rest if _is_list_of_batches(n, calls, rows)})
    arguments = [spec.taken_apart(call.arguments) for call in calls]
    rest = [name for name in arguments[0] if name in rest or name.rpartition(".")[0] in spec.apart]
    guided = len(off.steps[0].calls)
    sizes = [{off.count}] * guided + [{on.count, 2 * on.count, own} for own in rows[guided:]]
    given = _Given({name: [one[name] for one in arguments] for name in rest}, sizes)
    layouts = {}
    for name in (name for name in rest if not given.follows_batch(name, Tensor)):
        if (layout := _layout(name, given.values[name], rows, on.count)) is not None:
            layouts[name] = layout
            given.values[name] = [layout.rows(value) for value in given.values[name]]
    lists, masks = _padded(given, spec)
    conditions = [*masks, *(mask for mask, _ in masks.values()), *spec.beside, *ragged]
    constants, expanded = {}, set()
    for name in (name for name in rest if name not in conditions):
        value, *others = given.values[name]
        if given.follows_batch(name, Tensor):
            same_rows = all(map(rows_equal, given.values[name]))
            if name not in layouts and same_rows and not same(value[0], others[0][0]):
                # Nothing but the guidance scale differs between the runs and not between their rows.
                constants[name] = others[0][:1]
                expanded.add(name)
            else:
                conditions.append(name)
        elif all(same(value, other) for other in others):
            constants[name] = value
        elif given.follows_batch(name, list) and all(same(row, value[0]) for one in given.values[name] for row in one):
            constants[name] = value[:1]
            expanded.add(name)
        else:
            raise TraceError("constants", f"'{name}' differs between two runs and has no batch dimension")
    found = {"constants": constants, "expanded": frozenset(expanded), "lists": lists, "masks": masks}
    return replace(spec, **found, layouts={**spec.layouts, **layouts}), conditions


def _check_steady(runs: Runs, spec: CallSpec, names: Sequence[str], hint: str) -> None:
    """Raises TraceError for an argument, or what is beside the sample in its own, that changes from step to step."""
    for name, recording in itertools.product(names, runs):
        for step in recording.steps:
            for call, first in zip(step.calls, recording.steps[0].calls, strict=True):
                if not same(call.arguments.get(name), first.arguments[name]):
                    raise TraceError("constants", f"'{name}' changes from step to step and is not the timestep")
    for recording in runs if spec.beside else ():
        first, *later = [spec.conditions(step.calls[0].arguments, spec.beside) for step in recording.steps]
        if not all(same(first[name], other[name]) for other in later for name in spec.beside):
            raise TraceError(
                "constants", f"what is beside the sample in '{spec.sample}' changes from step to step{hint}"
            )


def _is_list_of_batches(name: str, calls: Sequence[Call], rows: Sequence[int]) -> bool:
    """Whether an argument is a list of as many tensors at every call, each with a row for each image."""
    values = [call.arguments[name] for call in calls]
    if not all(isinstance(value, list | tuple) and value for value in values) or len({*map(len, values)}) > 1:
        return False
    return all(
        isinstance(tensor, Tensor) and tensor.ndim and len(tensor) == count
        for value, count in zip(values, rows, strict=True)
        for tensor in value
    )


def _layout(name: str, values: Sequence[Any], rows: Sequence[int], count: int) -> RowLayout | None:
    """Where a tensor has its rows, if another axis than the first follows the batch, or the first by a multiple.

    Args:
        values: at each call, the first of three images without guidance.
        rows: of the sample at each call.
        count: how many images the other calls are for, the first ones of those three.

    Raises:
        TraceError: images have several rows each, and the runs do not show in which order.
    """
    if not all(isinstance(value, Tensor) and value.ndim for value in values) or len({v.ndim for v in values}) > 1:
        return None
    for axis in range(values[0].ndim):
        each = values[0].shape[axis] // rows[0]
        follows = all(value.shape[axis] == each * own for value, own in zip(values, rows, strict=True))
        others = {(*value.shape[:axis], *value.shape[axis + 1 :]) for value in values}
        if not each or not follows or len(others) > 1:
            continue
        if each == 1:
            return RowLayout(axis)
        for layout in (RowLayout(axis, each), RowLayout(axis, each, outer=True)):
            known, *guided = map(layout.rows, values)
            if any(close(part, known[:count]) for value in guided for part in value.split(count)):
                return layout
        raise TraceError(
            "constants", f"'{name}' has {each} rows for each image, and two runs do not show whose they are"
        )
    return None


def _padded(given: _Given, spec: CallSpec) -> tuple[frozenset[str], dict[str, tuple[str, torch.dtype]]]:
    """(the arguments that are lists of rows, the masks of those whose rows have lengths of their own)."""
    lists, masks = set(spec.lists), {}
    # A mask grows too; what it is the mask of has more dimensions.
    for name in sorted(given.values, key=lambda name: -getattr(given.values[name][0], "ndim", 0)):
        values = given.values[name]
        if given.follows_batch(name, Tensor) and len({value.shape[1:] for value in values}) > 1:
            if name not in {mask for mask, _ in masks.values()}:
                masks[name] = _mask_of(name, given.values)
        elif given.follows_batch(name, list) and all(isinstance(row, Tensor) and row.ndim for row in values[0]):
            lists.add(name)
            masks[name] = (f"{name} mask", torch.bool)
    return frozenset(lists), {name: masks[name] for name in given.values if name in masks}


def _mask_of(name: str, values: dict[str, list[Any]]) -> tuple[str, torch.dtype]:
    """The argument that says which of the padded rows of ``name`` count (None where all do), and its dtype."""
    shapes = [value.shape[:2] for value in values[name]]
    for other, others in values.items():
        given = [value for value in others if value is not None]
        fits = (v is None or (isinstance(v, Tensor) and v.shape == s) for v, s in zip(others, shapes, strict=True))
        if other != name and given and all(fits):
            return other, given[0].dtype
    seen = dict.fromkeys(str(list(value.shape[1:])) for value in values[name])
    raise TraceError(
        "conditioning",
        f"the rows of '{name}' change shape with the prompt, {' and '.join(seen)}, and no "
        "argument is a mask of them; pad them to one length",
    )
