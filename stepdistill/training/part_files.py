"""A checkpoint file that all ranks write together, each its shards of the tensors: torch.distributed.checkpoint.

It is a folder of safetensors files, one from each process, whose headers say where a part belongs: nothing is gathered,
and only JSON describes it. Any number of processes reads it, whole tensors or the parts that each has of them.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepdistill.errors import InputError

T = TypeVar("T")
WRITER, READER = (getattr(dcp, f"HuggingFaceStorage{kind}", None) for kind in ("Writer", "Reader"))
SUPPORTED = WRITER is not None and "save_distributed" in inspect.signature(WRITER).parameters
"""Whether this torch has it: 2.9 does."""


def writable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of these tensors is sharded by FSDP, whose shards torch can write."""
    return SUPPORTED and any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write this process's parts into ``folder``, as all processes do together; copies are written once.

    Returns:
        The files of this process.

    Raises:
        Exception: what went wrong in any of the processes, in all of them.
    """
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        dcp.save(detached, storage_writer=WRITER(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:  # no Exception: nothing of ours would catch it
        raise next(iter(error.failures.values()))[0] from None
    return list(folder.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*"))


def read(folder: Path, target_of: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Every tensor of a folder that :func:`write` wrote, without the other processes.

    Args:
        target_of: the tensor to fill, by name. Of one that FSDP shards only this rank's shard is read, any other whole.

    Raises:
        InputError: it cannot be read.
    """
    if not SUPPORTED:
        raise InputError(f"{folder}: written by several processes, expected torch 2.9 or newer to read it")
    try:
        reader = READER(str(folder))
        tensors = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            target, dtype = target_of(name), stored.properties.dtype
            parted = isinstance(target, DTensor) and target.shape == stored.size
            tensors[name] = torch.empty_like(target, dtype=dtype) if parted else torch.empty(stored.size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, dcp.CheckpointException) as error:
        raise InputError(f"{folder}: cannot be read as parts of safetensors: {error}") from None
    return tensors


def together(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns in each process; what it raises in any is raised in all."""
    try:
        outcome = (work(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes: list[tuple] = [()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]
