"""A student that is trained with the rounding of few bits: its linear layers compute with rounded weights.

Gradients pass the rounding as if it were not there (straight through, Bengio et al. 2013), to weights in float32.
The grids are those of the libraries that diffusers loads quantised networks with, so what is written can be packed by
them without any further loss:

    int8  a row of a weight has one scale, max|w| / 127                       quanto, bitsandbytes
    int4  16 even levels from min to max of each group of a row's numbers     quanto
    nf4   blocks of 64 numbers, max|w| times one of 16 quantiles of a normal  bitsandbytes (Dettmers et al. 2023)
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Quantization = Literal["int8", "int4", "nf4"]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK, LARGEST_GROUP, GROUP_STEP = 64, 128, 32


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with its weight as :func:`rounded`; its parameters are those of the plain layer."""

    quantization: Quantization

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        # The difference is 0 and has the gradient.
        on_grid = rounded(weight.detach(), self.quantization) + (weight - weight.detach())
        return functional.linear(input, on_grid, self.bias)


def quantize_aware(network: nn.Module, how: Quantization) -> None:
    """Let the linear layers of a diffusers network compute with rounded weights, in place; names stay.

    Layers that the class keeps in float32 are left out, as diffusers leaves them out.
    """
    kept = {*(getattr(network, "_keep_in_fp32_modules", None) or ())}
    for name, layer in network.named_modules():
        if type(layer) is nn.Linear and kept.isdisjoint(name.split(".")):
            layer.__class__, layer.quantization = QuantizedLinear, how


@torch.no_grad()
def baked(network: nn.Module) -> nn.Module:
    """The network with plain linear layers whose weights are the rounded ones; changed in place."""
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            layer.weight.copy_(rounded(layer.weight, layer.quantization))
            del layer.quantization
            layer.__class__ = nn.Linear
    return network


def rounded(weight: Tensor, how: Quantization) -> Tensor:
    """The nearest weight (rows, columns) on the grid; one on the grid stays as it is."""
    match how:
        case "int8":
            scale = _positive(weight.abs().amax(1, keepdim=True) / 127)
            return (weight / scale).round() * scale
        case "int4":
            parts = weight.reshape(-1, _group(weight.shape[1]))
            low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
            scale = _positive((high - low) / 15)
            return (((parts - low) / scale).round() * scale + low).reshape(weight.shape)
        case "nf4":
            flat = functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
            scale = _positive(flat.abs().amax(1, keepdim=True))
            levels = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
            nearest = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2)
            return (levels[nearest] * scale).flatten()[: weight.numel()].reshape(weight.shape)


def _positive(scale: Tensor) -> Tensor:
    """Scales of parts that are not all alike; 1 where they are."""
    return torch.where(scale > 0, scale, 1.0)


def _group(columns: int) -> int:
    """How many numbers of a row share their levels: the row, or of more than 128 a part that divides it."""
    sizes = range(LARGEST_GROUP, 0, -GROUP_STEP)
    return columns if columns <= LARGEST_GROUP else next((size for size in sizes if columns % size == 0), columns)
