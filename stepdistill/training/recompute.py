"""Forward passes of a player: their precision, and which activations are stored or recomputed for backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stepdistill.recipe import Train

Node = Any
"""An operation in autograd's graph, ``tensor.grad_fn``."""

# What these read is kept by autograd for themselves, so that their output needs no memory of its own.
_OPERATIONS: dict[str, Callable[[Node], Tensor]] = {
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "torch::autograd::AccumulateGrad": lambda node: node.variable,
}


@dataclass(frozen=True)
class Kept:
    """A tensor that a graph keeps, and the count of in-place changes that it had gone through."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Again:
    """Kept in the place of a tensor: the operation that makes it, and what happened to its output, casts or a view.

    ``version`` is that of the weight where nothing but a cast makes it.
    """

    node: Node
    casts: list[torch.dtype]
    shape: torch.Size
    transposed: bool
    version: int | None


@contextmanager
def forward_passes(train: Train, device_type: str) -> Iterator[None]:
    """Inside, losses run in the precision and with the recomputation that ``train`` states."""
    # A cache of cast weights would give a pass with gradients the copies that a rollout made without (older torch:
    # no weight gets any), and keep a copy of every weight that FSDP gathers only while it is needed.
    half = torch.autocast(device_type, torch.bfloat16, enabled=train.precision == "bf16", cache_enabled=False)
    with half, elementwise_recomputed() if train.gradient_checkpointing == "elementwise" else nullcontext():
        yield


@contextmanager
def elementwise_recomputed() -> Iterator[None]:
    """Inside, graphs keep no activation function's output, no product of two activations and no cast of a weight.

    A linear layer behind a GELU needs the GELU's output for its gradient, and the GELU needs its input, which is as
    large; one can be had from the other by one element-wise operation. Gradients are the same to the last bit.
    """
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def pack(tensor: Tensor) -> Kept | Again:
    """What a graph keeps for ``tensor``."""
    node, casts, transposed = tensor.grad_fn, [], False
    while node is not None:
        match node.name():
            case "ViewBackward0" | "UnsafeViewBackward0" if not transposed:
                pass
            case "ToCopyBackward0":  # an adapter in float32 gets its input from half precision, and casts it back
                casts.insert(0, node._input_metadata[0].dtype)
            case "TBackward0" if tensor.ndim == 2 and node is tensor.grad_fn:
                transposed = True
            case _:
                break
        node = node.next_functions[0][0]
    if node is not None and _is_cheap(node, bool(casts)):
        weight = getattr(node, "variable", None)
        version = None if weight is None else weight._version
        return Again(node, casts, tensor.shape, transposed, version)
    # What is kept of an output must not hold its graph: a cycle that only the garbage collector would find.
    return Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)


def _is_cheap(node: Node, cast: bool) -> bool:
    match node.name():
        case "MulBackward0":
            # A factor is kept for the other one's gradient.
            return all(source is not None for source, _ in node.next_functions)
        case "torch::autograd::AccumulateGrad":
            return cast
        case name:
            return name in _OPERATIONS


def unpack(packed: Kept | Again) -> Tensor:
    """The tensor that was packed, bit for bit.

    Raises:
        RuntimeError: it has been changed in place since.
    """
    source = packed.tensor if isinstance(packed, Kept) else getattr(packed.node, "variable", None)
    if source is not None and source._version != packed.version:
        shape = tuple(source.shape)
        raise RuntimeError(f"a tensor {shape} that gradients need was changed in place after the forward pass")
    if isinstance(packed, Kept):
        return packed.tensor
    with torch.no_grad():
        value = _OPERATIONS[packed.node.name()](packed.node)
        for dtype in packed.casts:
            value = value.to(dtype)
        return value.t() if packed.transposed else value.view(packed.shape)
