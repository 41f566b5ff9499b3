"""Sharded tensors: torch's DTensors (FSDP2), of which each rank holds one shard."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this process has only its shard of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a sharded one is gathered, which all processes must take part in."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, shard: Tensor) -> Tensor:
    """This process's shard of a full tensor, laid out as ``shard``; the tensor itself where either is not sharded."""
    if isinstance(tensor, DTensor) or not isinstance(shard, DTensor):
        return tensor
    return distribute_tensor(tensor.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
