"""What is computed again in the backward pass gives the same gradients, and takes no memory before."""

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.tiny import tiny_dit, tiny_sd
from stepdistill.recipe import Train
from stepdistill.recipe.memory import LiveBytes
from stepdistill.training.recompute import elementwise_recomputed, forward_passes


def call_dit() -> tuple[nn.Module, Callable[[], Tensor]]:
    network, x = tiny_dit().transformer, torch.randn(4, 4, 8, 8)
    arguments = {"timestep": torch.arange(4), "class_labels": torch.arange(4)}
    return network, lambda: network(x, **arguments).sample


def call_unet() -> tuple[nn.Module, Callable[[], Tensor]]:
    network, x = tiny_sd().unet, torch.randn(4, 4, 8, 8)
    text = torch.randn(4, 5, network.config.cross_attention_dim)
    return network, lambda: network(x, torch.arange(4), text).sample


def gradients(parameters: list[Tensor], output: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "most"), [(call_dit, 0.87), (call_unet, 0.8)])
def test_a_network_keeps_less_for_the_same_gradients(make, most, precision):
    torch.manual_seed(0)
    network, call = make()
    parameters = [p.requires_grad_() for p in network.parameters()]
    found, kept = [], []
    for how in (False, "elementwise"):
        train = Train(steps=1, batch_size=1, lr=1.0, precision=precision, gradient_checkpointing=how)
        with LiveBytes([*parameters, *network.buffers()]) as live, forward_passes(train, "cpu"):
            output = call()
            kept.append(live.now)
        found.append(gradients(parameters, output))
    assert len(found[0]) > 10 and all(map(torch.equal, *found))
    assert kept[1] < most * kept[0]


def test_no_copy_of_a_weight_in_half_precision_is_kept():
    layers = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 64, 3))
    x = torch.randn(1, 64, requires_grad=True)
    weights = [layers[0].weight, layers[2].weight]
    found = []
    for way in (nullcontext(), elementwise_recomputed()):
        with LiveBytes(layers.parameters()) as live, way, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            output = layers(x)
        found.append((live.now, gradients(weights, output)))
    assert found[0][0] - found[1][0] >= 2 * sum(weight.numel() for weight in weights)
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_a_cast_there_and_back_does_not_count():
    """An adapter's way under autocast: GELU in half precision, float32, half precision."""
    x, w = torch.randn(8, 64).bfloat16().requires_grad_(), torch.randn(64, 8).bfloat16().requires_grad_()
    found = []
    for way in (nullcontext(), elementwise_recomputed()):
        with LiveBytes([x, w]) as live, way:
            output = functional.gelu(x).float().bfloat16() @ w
        found.append((live.now, gradients([x, w], output)))
    assert found[0][0] - found[1][0] == x.nbytes
    assert all(map(torch.equal, found[0][1], found[1][1]))


def silu_through_half(x: Tensor, w: Tensor) -> Tensor:
    """The cast back to float32 does not undo the rounding of the cast before it."""
    return functional.silu(x).bfloat16().float().flatten(1) @ w


def product_with_a_constant(x: Tensor, w: Tensor) -> Tensor:
    """Autograd keeps no factor of this product, so the product itself has to be kept."""
    return (x * torch.full_like(x, 3.0)).flatten(1) @ w


def product_of_broadcast(x: Tensor, w: Tensor) -> Tensor:
    return (x * x.mean(1, keepdim=True)).flatten(1) @ w


def moved_views(x: Tensor, w: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh").transpose(1, 2).reshape(len(x), -1) @ w


def complex_product(x: Tensor, w: Tensor) -> Tensor:
    """A rotary embedding: the product is viewed as real numbers."""
    turned = torch.view_as_complex(x.reshape(len(x), -1, 2))
    return torch.view_as_real(turned * turned).flatten(1) @ w


def changed_in_place(x: Tensor, w: Tensor) -> Tensor:
    hidden = functional.silu(x)
    first = hidden.flatten(1) @ w
    return first + hidden.add(1).mul_(x).flatten(1) @ w


def outputs_kept(x: Tensor, w: Tensor) -> Tensor:
    return (x.exp().flatten(1) @ w).softmax(1).sigmoid()


CASES = [
    silu_through_half,
    product_with_a_constant,
    product_of_broadcast,
    moved_views,
    complex_product,
    changed_in_place,
    outputs_kept,
]


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_their_gradients_are_the_same(case):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 6, generator=generator).requires_grad_()
    w = torch.randn(24, 5, generator=generator).requires_grad_()
    found = []
    for way in (nullcontext(), elementwise_recomputed()):
        with way:
            slopes = torch.autograd.grad(case(x, w).square().sum(), [x, w], create_graph=True)
            penalty = sum(slope.square().sum() for slope in slopes)
        found.append([*slopes, *torch.autograd.grad(penalty, [x, w])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_is_not_used_goes_at_once(case):
    """What holds itself would stay until Python looks for cycles, which a GPU's memory does not wait for."""
    x, w = torch.randn(3, 4, 6, requires_grad=True), torch.randn(24, 5, requires_grad=True)
    gc.disable()
    try:
        with LiveBytes([x, w]) as live, elementwise_recomputed():
            output = case(x, w)
            assert live.now >= output.nbytes
            del output
        assert live.now == 0
    finally:
        gc.enable()


def test_what_was_changed_since_is_an_error():
    x, layer = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 5)
    with elementwise_recomputed():
        hidden = x + 1
        loss = functional.silu(hidden).sum()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match=r"a tensor \(3, 4\) that gradients need was changed in place"):
        loss.backward()
    with elementwise_recomputed(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"a tensor \(5, 4\) that gradients need was changed in place"):
        loss.backward()
