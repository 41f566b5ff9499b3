"""The operations of training: how they are registered, their gradients, and torch.compile."""

import pytest
import torch

from stepdistill.kernels import (
    add_noise,
    add_noise_reference,
    dmd_gradient,
    pseudo_huber,
    pseudo_huber_reference,
    sid_loss_reference,
    surrogate,
)
from stepdistill.kernels.huber import pseudo_huber_op
from stepdistill.kernels.matching import _Surrogate, dmd_gradient_op, sid_loss_op
from stepdistill.kernels.noise import add_noise_op

ARGUMENTS = {
    "add_noise": lambda x, y, z, row: (x, y, row, row),
    "dmd_gradient": lambda x, y, z, row: (x, y, z, 0.1),
    "sid_loss": lambda x, y, z, row: (x, y, z, 1.2, 0.1),
    "sid_loss_backward": lambda x, y, z, row: (x, y, z, row, row.sum(), 1.2),
    "pseudo_huber": lambda x, y, z, row: (x, 0.1),
    "pseudo_huber_backward": lambda x, y, z, row: (x, row.sum(), 0.1),
}
WITH_GRAPH = ("add_noise", "sid_loss", "pseudo_huber")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_operations_are_registered_as_torch_wants_them(name):
    samples = [value.requires_grad_(name in WITH_GRAPH) for value in torch.randn(3, 2, 3, 4, 5)]
    last = samples[2].detach().to(memory_format=torch.channels_last).requires_grad_(name in WITH_GRAPH)
    arguments = ARGUMENTS[name](*samples[:2], last, torch.rand(2))
    torch.library.opcheck(getattr(torch.ops.stepdistill, name).default, arguments)


def test_the_operations_differentiate_like_their_references():
    x, y, z = (value.requires_grad_() for value in torch.randn(3, 2, 3, 4))
    alpha, sigma = torch.rand(2, 2)
    pairs = (
        (add_noise_op(x, y, alpha, sigma).square().sum(), add_noise_reference(x, y, alpha, sigma).square().sum()),
        (sid_loss_op(x, y, z, 1.2, 0.1)[0] ** 2, sid_loss_reference(x, y, z, 1.2, 0.1) ** 2),
        (pseudo_huber_op(x, 0.1) ** 2, pseudo_huber_reference(x, 0.1) ** 2),
        (_Surrogate.apply(x, y.detach()) ** 2, surrogate(x, y.detach()) ** 2),
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(loss, (x, y, z), allow_unused=True) for loss in (found, expected)]
        for one, other in zip(*slopes, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_compiled_graphs_take_the_operations_whole():
    x, y, z = torch.randn(3, 2, 3, 4)
    row = torch.rand(2)

    def step(x, y, z):
        noisy = add_noise_op(x, y, row, 1 - row)
        return sid_loss_op(noisy, y, z, 1.0, 0.1)[0] + pseudo_huber_op(
            noisy + dmd_gradient_op(x.detach(), y, z, 0.1), 0.1
        )

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y, z)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_on_the_cpu_the_numbers_are_those_of_the_plain_expressions():
    x, y, z = torch.randn(3, 2, 3, 4)
    alpha, sigma = torch.rand(2, 2, dtype=torch.float64)
    shaped = [value.float().reshape(2, 1, 1) for value in (alpha, sigma)]
    assert torch.equal(add_noise(x, y, alpha, sigma), shaped[0] * x + shaped[1] * y)
    assert torch.equal(dmd_gradient(x, y, z), (z - y) / (x - y).abs().mean((1, 2), keepdim=True))
    assert torch.equal(pseudo_huber(x, 0.1), ((x.square() + 0.1**2).sqrt() - 0.1).mean())


def test_the_clamp_bounds_the_weight():
    x, fake = torch.ones(2, 4), torch.full((2, 4), 3.0)
    real = torch.stack([torch.full((4,), 1.5), torch.ones(4)])
    assert torch.equal(dmd_gradient(x, real, fake, 0.25), torch.tensor([[3.0] * 4, [8.0] * 4]))
