"""Tensors of which a process may have a part alone: torch's DTensors (FSDP2) and DeepSpeed's parameters (ZeRO-3)."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional


def is_shard(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor alone."""
    return isinstance(tensor, DTensor) or _zero_parameter(tensor) is not None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is shared out only together with the other processes."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    parameter = _zero_parameter(tensor)
    if parameter is None:
        return tensor
    parts = tensor.new_empty(torch.distributed.get_world_size() * parameter.ds_tensor.numel())
    torch.distributed.all_gather_into_tensor(parts, part(tensor).contiguous())
    return parts[: parameter.ds_numel].view(parameter.ds_shape)


def part_like(tensor: Tensor, shard: Tensor) -> Tensor:
    """Of a whole tensor the part that this process has of ``shard``.

    The tensor itself beside what is no shard, and where it is a part already.
    """
    if isinstance(tensor, DTensor):
        return tensor
    if isinstance(shard, DTensor):
        return distribute_tensor(tensor.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
    parameter = _zero_parameter(shard)
    if parameter is None:
        return tensor
    size = parameter.ds_tensor.numel()
    padded = functional.pad(tensor.flatten(), (0, torch.distributed.get_world_size() * size - tensor.numel()))
    return padded[torch.distributed.get_rank() * size :][:size].to(shard.device)


def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, without graph; the tensor itself where that is all of it.

    Of a parameter that DeepSpeed has shared out it is in another tensor, flat and padded.
    """
    return (tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor).detach()


def copy_of_part(tensor: Tensor) -> Tensor:
    """A copy of :func:`part` that is known for what it is a part of."""
    copied = part(tensor).clone()
    if hasattr(tensor, "ds_tensor"):
        copied.stands_for = tensor
    return copied


def shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    parameter = _zero_parameter(tensor)
    return tensor.shape if parameter is None else parameter.ds_shape


def _zero_parameter(tensor: Tensor) -> Tensor | None:
    """The parameter shared out by DeepSpeed that ``tensor`` is, or a part of which it is a copy."""
    return tensor if hasattr(tensor, "ds_tensor") else getattr(tensor, "stands_for", None)
