"""Runs every Triton kernel in Triton's interpreter and prints, as JSON, how far each case is from its reference.

A program of its own because TRITON_INTERPRET is read when triton is first imported, for the whole process.
Errors are relative to max(1, |expected|).
"""

import itertools
import json
import math

import torch
from torch import Tensor

from stepdistill.kernels import (
    Rule,
    Update,
    add_noise_reference,
    dmd_gradient_reference,
    guide_reference,
    pseudo_huber_reference,
    sid_loss_reference,
)
from stepdistill.kernels.dispatch import per_row
from stepdistill.kernels.guide import operands
from stepdistill.kernels.guide_triton import guide_triton
from stepdistill.kernels.training_triton import (
    add_noise_triton,
    dmd_gradient_triton,
    pseudo_huber_backward_triton,
    pseudo_huber_triton,
    sid_loss_backward_triton,
    sid_loss_triton,
)

SHAPES = [(1, 1), (2, 3, 5), (2, 1025), (1, 2, 3, 7, 53), (1, 70001), (0, 4)]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES = {
    "plain": Rule(),
    "interval": Rule(interval=(0.3, 0.7)),
    "rescale": Rule(rescale=0.7),
    "parallel": Rule(parallel=0.2),
    "max_norm": Rule(max_norm=4.0),
    "momentum": Rule(momentum=-0.5),
    "all": Rule(rescale=0.5, interval=(0.3, 1.0), parallel=0.0, max_norm=30.0, momentum=0.3),
}
UPDATES = ("none", "affine", "cfg++")


def error(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if not expected.numel():
        return 0.0
    worst = ((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max().item()
    assert math.isfinite(worst), "not a number"
    return worst


def by_kernel(cond, uncond, w, rule, t, running, update) -> Tensor:
    return guide_triton(cond, uncond, *operands(cond, w, rule, t, running, update))


def make_update(name: str, x: Tensor) -> Update | None:
    if name == "none":
        return None
    a, b, c = torch.randn(3, len(x), dtype=torch.float64)
    return Update(x, a, b if name != "affine" else -0.7, c if "++" in name else None)


def guide_case(name: str, cond: Tensor, uncond: Tensor, x_t: Tensor, w: float | Tensor, rule: str, update: str) -> dict:
    t = torch.rand(len(cond), dtype=torch.float64)
    states = [torch.randn(cond.shape), None]
    states[1] = states[0].clone()
    arguments = (cond, uncond, w, RULES[rule], t)
    step = make_update(update, x_t)
    expected = guide_reference(*arguments, states[0], step)
    found = by_kernel(*arguments, states[1], step)
    worst = max(error(found, expected), error(states[1], states[0]))
    return {"kernel": "guide", "case": name, "type": str(expected.dtype).removeprefix("torch."), "error": worst}


def guide_rows() -> list[dict]:
    cases = []
    for shape in SHAPES:  # every shape, plain and with sums over a sample
        cond, uncond = torch.randn(2 * shape[0], *shape[1:]).chunk(2)
        for rule in ("plain", "all" if cond[:1].numel() > 1 else "parallel"):
            cases.append((f"{shape} {rule}", cond, uncond, torch.randn(shape), 3.0, rule, "affine"))
    for rule, update in itertools.product(RULES, UPDATES):  # every option
        cond, uncond, x_t = torch.randn(3, 2, 3, 19, 23)
        cases.append((f"{rule}, {update}", cond, uncond, x_t, 1 + 7 * torch.rand(2), rule, update))
    for output, sample in itertools.product(TYPES.values(), TYPES.values()):  # every pair of types
        cond, uncond = torch.randn(2, 2, 70).to(output)
        for rule, update in (("plain", "affine"), ("all", "cfg++")):
            x_t = torch.randn(2, 70).to(sample)
            cases.append((f"{output} {sample} {rule}", cond, uncond, x_t, torch.rand(2).double(), rule, update))
    for name, (cond, uncond, x_t) in strided().items():
        cases.append((name, cond, uncond, x_t, 2.0, "momentum", "cfg++"))
    return [guide_case(*case) for case in cases]


def strided() -> dict[str, list[Tensor]]:
    """Three tensors of one shape in each of the layouts that networks leave."""
    last = [value.to(memory_format=torch.channels_last) for value in torch.randn(3, 2, 3, 4, 5)]
    return {
        "channels-last": last,
        "mixed": [last[0], torch.randn(2, 3, 4, 5), last[2].transpose(2, 3).reshape(2, 3, 4, 5)],
        "first half of the channels": [value.chunk(2, dim=1)[0] for value in torch.randn(3, 2, 6, 4, 5)],
        "packed": [value.transpose(1, 2) for value in torch.randn(3, 2, 5, 6)],
        "batch inside": [value.transpose(0, 1) for value in torch.randn(3, 4, 2, 5)],
        "expanded": [value.expand(2, 3, 5) for value in torch.randn(3, 1, 3, 5)],
        "expanded inside": [value.expand(2, 3, 5) for value in torch.randn(3, 2, 1, 5)],
    }


def training_rows() -> list[dict]:
    """Every other kernel on every shape, type and layout."""
    sets = [(str(shape), list(torch.randn(3, *shape))) for shape in SHAPES[1:] if shape[0]]
    sets += [(name, list(torch.randn(3, 2, 3, 70).to(dtype))) for name, dtype in TYPES.items()]
    sets += [*strided().items()]
    return [row for name, samples in sets for row in training_cases(name, *samples)]


def training_cases(name: str, x: Tensor, real: Tensor, fake: Tensor) -> list[dict]:
    alpha, sigma = torch.rand(2, len(x), dtype=torch.float64)
    pairs = {
        "add_noise": (
            add_noise_triton(x, real, per_row(alpha, x), per_row(sigma, x)),
            add_noise_reference(x, real, alpha, sigma),
        ),
        "dmd_gradient": (dmd_gradient_triton(x, real, fake, 0.0), dmd_gradient_reference(x, real, fake)),
        "dmd_gradient clamped": (dmd_gradient_triton(x, real, fake, 1.5), dmd_gradient_reference(x, real, fake, 1.5)),
    }
    leaves = [value.clone().requires_grad_() for value in (x, real, fake)]
    loss, weight = sid_loss_triton(x, real, fake, 1.2, 0.5)
    expected = sid_loss_reference(*leaves, 1.2, 0.5)
    pairs["sid_loss"] = (loss, expected)
    found = sid_loss_backward_triton(x, real, fake, weight, torch.tensor(x.numel() / 2), 1.2)
    wanted = torch.autograd.grad(expected, leaves, torch.tensor(x.numel() / 2))
    pairs |= {f"sid_loss gradient {i}": pair for i, pair in enumerate(zip(found, wanted, strict=True))}
    (leaf,) = leaves[:1]
    expected = pseudo_huber_reference(leaf, 0.03)
    pairs["pseudo_huber"] = (pseudo_huber_triton(x, 0.03), expected)
    wanted = torch.autograd.grad(expected, leaf, torch.tensor(x.numel() / 2))
    pairs["pseudo_huber gradient"] = (pseudo_huber_backward_triton(x, torch.tensor(x.numel() / 2), 0.03), *wanted)
    return [
        {"kernel": kernel, "case": name, "type": str(pair[1].dtype).removeprefix("torch."), "error": error(*pair)}
        for kernel, pair in pairs.items()
    ]


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # and fills what torch.empty gives with NaN
    print(json.dumps(guide_rows() + training_rows()))


if __name__ == "__main__":
    main()
