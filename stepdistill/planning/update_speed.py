"""How far one update of Adam moves a network's weights: what a learning rate means for a whole matrix and for a LoRA.

Adam moves every parameter by about its rate, whatever the gradient's size. A whole matrix W moves by just that. A LoRA
moves W by (alpha / rank) d(B A), with B = 0 at first and A of peft's initial size, U(-1, 1) / sqrt(fan_in): the rms of
its first update is closed, (alpha / rank) lr sqrt(rank / (3 fan_in)), and it changes little while B is small.

    W of 1280 x 1280 at rate 5e-5:   whole: 5e-5;   rank 64, alpha 64: 6.5e-6;   rank 64, alpha 8: 8.2e-7
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Speed:
    """The change of a network's weights by one update.

    Args:
        change: rms over the weights of the layers that move, in units of the weights.
        relative: the same relative to the rms of those weights; None where their values are not there.
    """

    change: float
    relative: float | None


def rms_change(lr: float, fan_in: int, rank: int | None = None, alpha: float | None = None) -> float:
    """Rms change of the elements of a matrix by one update of Adam at rate ``lr``.

    Args:
        fan_in: inputs of the layer; those of a convolution times the elements of its kernel.
        rank: of its adapter; None: the whole matrix moves.
        alpha: None: the rank.
    """
    if rank is None:
        return lr
    return (rank if alpha is None else alpha) / rank * lr * math.sqrt(rank / (3 * fan_in))


def speed(network: nn.Module, lr: float, adapter: str | None = None) -> Speed:
    """The change of a role's network by one update at rate ``lr``.

    Args:
        network: with its adapters, if it has any; without data ``relative`` is None.
        adapter: the one that moves, its rank and alpha are the network's own; None: all matrices and kernels move.

    Raises:
        ValueError: no layer of it moves.
    """
    layers = list(moving(network, adapter))
    count = sum(weight.numel() for weight, _, _ in layers)
    if not count:
        raise ValueError(f"{type(network).__name__} has no layer that {adapter or 'an update'} moves")
    change = math.sqrt(sum(weight.numel() * (lr * factor) ** 2 for weight, _, factor in layers) / count)
    weights = [weight for weight, _, _ in layers]
    if any(weight.is_meta or isinstance(weight, FakeTensor) or not weight.is_floating_point() for weight in weights):
        return Speed(change, None)
    size = math.sqrt(sum(float(_plain(weight).square().sum()) for weight in weights) / count)
    return Speed(change, change / size if size else None)


def _plain(weight: Tensor) -> Tensor:
    """A weight in float32; torchao's own tensors know no more than what layers do with them."""
    packed = type(weight).__module__.startswith("torchao.")
    return (weight.detach().dequantize() if packed else weight.detach()).float()


def moving(network: nn.Module, adapter: str | None) -> Iterator[tuple[Tensor, int, float]]:
    """(weight, inputs of one output, rms change at rate 1) of each layer that moves; arguments as for :func:`speed`."""
    for layer in network.modules():
        if adapter is None:
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight is not None:
                yield layer.weight, layer.weight[0].numel(), 1.0
        elif isinstance(layer, BaseTunerLayer) and adapter in layer.scaling:
            rank, base = layer.r[adapter], layer.get_base_layer()
            fan_in = layer.lora_A[adapter].weight[0].numel()
            yield base.weight, fan_in, rms_change(1.0, fan_in, rank, layer.scaling[adapter] * rank)
