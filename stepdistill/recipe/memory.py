"""Live tensor memory, counted as operations allocate and references free; and the recipe options that save memory."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepdistill.recipe.schema import Recipe

GIB = 2**30
RESERVE = 1.0
"""GiB that CUDA's context, workspaces and fragmentation take beside the tensors."""


class LiveBytes(TorchDispatchMode):
    """Inside, ``peak`` is the most bytes that tensors made inside held at any moment; each storage counts once.

    Args:
        known: tensors that were there before; views of them are not new.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {id(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` while it is alive."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def savings(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """What would take less memory, as (key, value, effect): first what leaves the numbers alone, then what does not."""
    train = recipe.train
    if not train.gradient_checkpointing and not train.compile:
        yield "train.gradient_checkpointing", "elementwise", "the same numbers, a few percent slower"
    if train.gradient_checkpointing is not True:
        yield "train.gradient_checkpointing", True, "the same numbers, about a third slower"
    if train.accumulation < train.batch_size:
        yield "train.accumulation", train.batch_size, "micro-batches of 1: the same numbers, slower"
    if train.precision == "fp32":
        yield "train.precision", "bf16", "forward passes in half precision, faster"
    if recipe.teacher.precision == "fp32":
        yield "teacher.precision", "bf16", "frozen weights in half precision"
    if train.optimizer == "adamw":
        yield "train.optimizer", "adamw8bit", "Adam's moments in 8 bits, needs bitsandbytes"
    if recipe.student.train == "full":
        yield "student.train", "lora", "adapters on one backbone instead of copies; another learning rate suits them"
    plain = not (train.compile or train.channels_last or recipe.distributed.shard or recipe.teacher.quantize)
    if plain and recipe.teacher.offload is None:
        yield "teacher.offload", "group", "the same numbers: frozen weights in the host's memory, slower"
    if plain and recipe.teacher.storage is None:
        yield "teacher.storage", "fp8", "frozen layers in 8-bit floats, a little coarser"
    if recipe.teacher.quantize is None and recipe.teacher.storage is None and recipe.teacher.offload is None:
        yield "teacher.quantize", "nf4", "frozen linear layers in 4 bits, a little coarser; needs bitsandbytes"
