"""When two recorded values count as equal, and whether a network returns what it has returned before."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.nested import tensors_in, unflatten


def tolerance(dtype: torch.dtype) -> float:
    """The relative deviation that counts as equal in this dtype: 1e-5, more where the dtype is coarser."""
    return max(1e-5, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-5


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite for other shapes and for NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    expected = expected.double()
    worst = (actual.to(expected) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float("inf") if worst.isnan() else float(worst)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal shapes, and values within :func:`tolerance`."""
    return deviation(actual, expected) <= tolerance(actual.dtype)


def same(a: Any, b: Any) -> bool:
    """Close tensors, identical objects, equal values of one type, or lists of such."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return close(a, b)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (type(a) is type(b) and bool(a == b))


def rows_equal(value: Tensor) -> bool:
    """Whether every row of ``value`` (B, ...) is the first one."""
    return close(value, value[:1].expand_as(value))


def single_value(value: Any) -> tuple[Tensor, Tensor | None] | None:
    """(the one number that an argument holds, 0-dim; where it does); None when it holds several or is not a number.

    Where: None for everywhere, or ones and zeros (1, ...) where all rows (B, ...) hold it at the ones and 0 elsewhere.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return None
    tensor = torch.as_tensor(value)
    if not tensor.numel() or tensor.dtype == torch.bool:
        return None
    mask = tensor != 0
    number = tensor[mask][0] if mask.any() else tensor.new_zeros(())
    if (tensor == number).all():
        return number, None
    if tensor.ndim < 2 or not torch.equal(mask, mask[:1].expand_as(mask)) or not (tensor == number * mask).all():
        return None
    return number, mask[:1].to(tensor.dtype)


def one_number(values: Iterable[Any]) -> tuple[list[Tensor], Tensor | None] | None:
    """(the number that each of an argument's values holds, where all do); None: one holds several, or elsewhere.

    Where: as of :func:`single_value`.
    """
    found = [*map(single_value, values)]
    if None in found:
        return None
    masks = [mask for number, mask in found if number] or [None]  # at 0 none can be seen
    return ([number for number, _ in found], masks[0]) if all(same(mask, masks[0]) for mask in masks) else None


def same_in(arguments: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether all of a call's arguments are the same in another."""
    return all(same(value, others.get(name)) for name, value in arguments.items())


def gives(network: Any, arguments: Mapping[str, Any], outputs: Sequence[Tensor]) -> bool:
    """Whether a network takes arguments by their dotted names, and returns ``outputs`` before whatever else it does."""
    try:
        made = tensors_in(network(**unflatten(arguments)))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return False
    return len(made) >= len(outputs) and all(map(close, made, outputs))
