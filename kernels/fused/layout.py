"""Layout: tensors of any stride as one flat row per sample, in memory order, as the kernels read them."""

import torch
from torch import Tensor


def empty_result(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that lies as ``like`` (B, ...) does, channels-last too; its samples one after another."""
    out = torch.empty_like(like, dtype=dtype)
    if len(out) > 1 and out.stride(0) != out[0].numel():
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return out


def rows(out: Tensor, *tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """The tensors with their elements inside a sample in the order of ``out``, and the distance of their samples.

    One that lies like that is taken as it lies (a half of a doubled batch, the first half of the channels); any other
    is copied.

    Raises:
        ValueError: the shapes differ (a kernel would read out of bounds).
    """
    placed, inner = list(tensors), out.stride()[1:]
    for position, value in enumerate(tensors):
        if value is not None and value.shape != out.shape:
            raise ValueError(f"expected tensors of one shape, found {tuple(out.shape)} and {tuple(value.shape)}")
        if value is not None and value.stride()[1:] != inner:
            placed[position] = torch.empty_like(out, dtype=value.dtype).copy_(value)
    return placed, [0 if value is None else value.stride(0) for value in placed]
