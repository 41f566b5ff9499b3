"""Frozen weights that take less of a device: kept in 8-bit floats, or in the host's memory until their layer runs.

The weight of a layer becomes a :class:`StoredWeight`, which looks like the one it stands for and is restored inside
each operation that reads it, forward and backward alike; autograd keeps what is stored. diffusers' layerwise casting
and group offloading are for inference: they change a layer's weights around its forward pass, so that the backward pass
of a convolution finds the wrong ones, and that of a linear layer keeps the restored ones alive.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

FLOAT8 = torch.float8_e4m3fn
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class Frozen:
    """How the weights of the teacher's network are kept.

    Args:
        quantize: linear layers in 4 or 8 bits, by another package.
        storage: "fp8": layers in 8-bit floats; None: as they are.
        offload: "group": layers in the host's memory; None: on the device.
    """

    quantize: Literal["nf4", "int8"] | None = None
    storage: Literal["fp8"] | None = None
    offload: Literal["group"] | None = None

    def __bool__(self) -> bool:
        return self.storage is not None or self.offload is not None


def stored_layers(network: nn.Module, frozen: Frozen) -> Iterator[tuple[nn.Module, bool]]:
    """The layers of a diffusers network whose weights are stored, and whether in 8 bits.

    Those that diffusers' layerwise casting leaves out, such as norms, stay in their precision.
    """
    kept: tuple[str, ...] = DEFAULT_SKIP_MODULES_PATTERN
    for own in ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules"):
        kept += tuple(getattr(network, own, None) or ())
    for name, layer in network.named_modules():
        if not isinstance(layer, LAYERS) or ".lora_" in name:
            continue
        # A layer with an adapter on it is inside of what peft puts in its place.
        own_name = name.removesuffix(".base_layer")
        eight = frozen.storage == "fp8" and not any(re.search(pattern, own_name) for pattern in kept)
        if eight or frozen.offload is not None:
            yield layer, eight


def store(network: nn.Module, frozen: Frozen, device: torch.device) -> None:
    """Put the weights of a frozen network's layers where ``frozen`` says; what is computed with them is on ``device``.

    Args:
        network: of diffusers, in the host's memory.
    """
    shelf = Shelf(device, frozen.offload is not None)
    for layer, eight in stored_layers(network, frozen):
        weight = layer.weight.detach()
        scale = scale_of(weight) if eight else 1.0
        number = shelf.put((weight * scale).to(FLOAT8) if eight else weight)
        layer.weight = nn.Parameter(StoredWeight(shelf, number, scale, weight.dtype, device), requires_grad=False)


def scale_of(weight: Tensor) -> float:
    """The power of two that brings the largest value just below the largest of 8-bit floats.

    Most weights of a network are so small that without it 8-bit floats would have one or two bits left for them.
    """
    largest = float(weight.abs().max())
    return 2.0 ** math.floor(math.log2(torch.finfo(FLOAT8).max / largest)) if 0 < largest < math.inf else 1.0


class Shelf:
    """The stored weights of a network in the order of its layers.

    From the host's memory to a CUDA device each is copied on a stream of its own, and the next one while it is used.

    Args:
        device: where operations are.
        away: whether the weights rest in the host's memory.
    """

    def __init__(self, device: torch.device, away: bool):
        self.device, self.home = device, torch.device("cpu") if away else device
        self.stream = torch.cuda.Stream(device) if away and device.type == "cuda" else None
        self.weights: list[Tensor] = []
        self.coming: dict[int, Tensor] = {}
        self.last = 0

    def put(self, weight: Tensor) -> int:
        """Take a weight; returns its number."""
        weight = weight.to(self.home)
        self.weights.append(weight.pin_memory() if self.stream is not None else weight)
        return len(self.weights) - 1

    def take(self, number: int, device: torch.device) -> Tensor:
        """The weight on ``device``."""
        if self.stream is None or device != self.device:
            return self.weights[number].to(device)
        if number not in self.coming:
            self._send(number)
        weight, compute = self.coming[number], torch.cuda.current_stream(device)
        compute.wait_stream(self.stream)
        weight.record_stream(compute)
        following = number + (1 if number >= self.last else -1)  # a backward pass comes from behind
        self.last = number
        self.coming.clear()
        if 0 <= following < len(self.weights):
            self._send(following)
        return weight

    def _send(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            self.coming[number] = self.weights[number].to(self.device, non_blocking=True)


class StoredWeight(Tensor):
    """A weight on a shelf, which every operation gets whole.

    Args:
        shelf: that holds it.
        number: its place there.
        scale: that it is stored with.
        dtype: that it has for those who look.
        device: likewise.
        turned: whether it is transposed.
    """

    @staticmethod
    def __new__(
        cls, shelf: Shelf, number: int, scale: float, dtype: torch.dtype, device: torch.device, turned: bool = False
    ) -> "StoredWeight":
        shape = shelf.weights[number].shape
        self = Tensor._make_wrapper_subclass(cls, shape[::-1] if turned else shape, dtype=dtype, device=device)
        self.shelf, self.number, self.scale, self.turned = shelf, number, scale, turned
        return self

    def __init__(self, *_: Any, **__: Any):
        """All is done in ``__new__``."""

    def __repr__(self, **_: Any) -> str:
        return f"StoredWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy is a plain weight."""
        memo[id(self)] = nn.Parameter(self.restored().clone(), requires_grad=False)
        return memo[id(self)]

    def restored(self) -> Tensor:
        """The plain weight."""
        weight = self.shelf.take(self.number, self.device).to(self.dtype)
        weight = weight if self.scale == 1 else weight / self.scale
        return weight.t() if self.turned else weight

    def _like(self, **changes: Any) -> "StoredWeight":
        facts = {"dtype": self.dtype, "device": self.device, "turned": self.turned} | changes
        return StoredWeight(self.shelf, self.number, self.scale, **facts)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Views and casts, which autograd may keep, are stored weights again; all else gets plain ones."""
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._like()
        if func is aten.t.default:
            return args[0]._like(turned=not args[0].turned)
        if func is aten._to_copy.default:
            return args[0]._like(**{key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None})
        return func(*tree_map_only(cls, cls.restored, args), **tree_map_only(cls, cls.restored, kwargs))
