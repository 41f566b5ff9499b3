"""The memory of an update: what its graphs keep, and all that is alive in it; scripts/bench_step.py prints both."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepdistill.recipe.memory import LiveBytes
from stepdistill.training.recompute import Again, pack, unpack


def kept_mib(loss: Callable[[], Tensor], elementwise: bool) -> float:
    """The most MiB that the graphs of ``loss`` keep at any moment, of what it makes.

    Args:
        elementwise: they keep what train.gradient_checkpointing: elementwise lets them.
    """
    counter = LiveBytes(all_tensors())

    def keep(tensor: Tensor) -> Any:
        kept = pack(tensor) if elementwise else tensor.detach()
        if not isinstance(kept, Again):
            counter.add(tensor)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, unpack if elementwise else lambda tensor: tensor):
        loss()
    return round(counter.peak / 2**20, 2)


def peak_mib(loss: Callable[[], Tensor], device: torch.device, compiled: bool) -> float | None:
    """The most MiB that are alive of what ``loss`` and its backward pass make; None where that cannot be told."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    if compiled:  # what counts tensors keeps compiled code from running
        return None
    with LiveBytes(all_tensors()) as live:
        loss().backward()
    return round(live.peak / 2**20, 2)


def all_tensors() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, Tensor)]
