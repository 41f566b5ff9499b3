"""Steps of a batch along a stock scheduler's grid: by the scheduler, or by precomputed coefficients of its steps.

DDIM without noise, Euler and the like are sums a x + b output with two numbers for each step. They are read off the
scheduler once, and checked there, so that a step is one pass together with guidance and asks no scheduler.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stepdistill.diffusion.guidance import Pair
from stepdistill.diffusion.schedule import Prediction
from stepdistill.diffusion.stock_schedulers import as_network_input, stepped_timesteps
from stepdistill.pipeline.recording import stepped

TOLERANCE = 1e-5
"""How far a scheduler's step may be from the sum, as a share of its coefficients and of what it is given."""


class Steps(Protocol):
    """The steps of one batch."""

    def seen(self, x: Tensor, number: int) -> Tensor:
        """The sample x (B, ...) of step ``number`` as the network takes it: x_t."""

    def step(self, output: Prediction | Pair, x: Tensor, number: int) -> Tensor:
        """The next sample (B, ...)."""


class StockSteps:
    """The scheduler's own steps.

    Args:
        ready: a scheduler with its grid; it is copied.
        options: of its step().
        generators: of the batch's samples, for a scheduler that draws noise.
    """

    def __init__(self, ready: Any, options: Mapping[str, Any], generators: Sequence[torch.Generator]):
        self.scheduler = copy.deepcopy(ready)
        self.options = {**options, "return_dict": False}
        if takes_generator(ready):
            self.options["generator"] = list(generators)

    def seen(self, x: Tensor, number: int) -> Tensor:
        return as_network_input(self.scheduler, x, self.scheduler.timesteps[number])

    def step(self, output: Prediction | Pair, x: Tensor, number: int) -> Tensor:
        raw = output.raw.to(x.dtype)
        x, self.options = stepped(self.scheduler, raw, self.scheduler.timesteps[number], x, self.options)
        return x


class AffineSteps:
    """Steps a x + b output.

    Args:
        table: rows (scale, a, b) of :func:`coefficients`, on the batch's device.
        scaled: whether any scale is not 1.
    """

    def __init__(self, table: Tensor, scaled: bool):
        self.table, self.scaled = table, scaled

    def seen(self, x: Tensor, number: int) -> Tensor:
        return x * self.table[number, 0] if self.scaled else x

    def step(self, output: Prediction | Pair, x: Tensor, number: int) -> Tensor:
        _, a, b = self.table[number]
        return output.step(x, a, b) if isinstance(output, Pair) else a * x + b * output.raw.to(x)


def coefficients(ready: Any, options: Mapping[str, Any], first: int = 0) -> Tensor | None:
    """(scale, a, b) of every step, float32 (steps, 3): x_t = scale x, and the next sample is a x + b output.

    None where a step of the scheduler is no such sum: it draws noise, clips, or remembers earlier steps.

    Args:
        ready: a scheduler on the CPU with its grid; it is copied.
        options: of its step().
        first: the number of the first step that is made; the rows before it are 0.
    """
    scheduler, options = copy.deepcopy(ready), {**options, "return_dict": False}
    random = torch.Generator().manual_seed(0)
    if takes_generator(ready):
        options["generator"] = random
    # The first two read a and b; the third shows what does not come from them; the others are of any size.
    sizes = torch.logspace(-1, 3, 13)
    rows = [torch.zeros(3)] * first
    for timestep in stepped_timesteps(scheduler)[first:]:
        x, output = (
            torch.cat([unit, size * torch.randn(13, generator=random)]).reshape(1, -1, 1, 1)
            for unit, size in (
                (torch.tensor([1.0, 0.0, 0.0]), sizes),
                (torch.tensor([0.0, 1.0, 0.0]), sizes[torch.randperm(13, generator=random)]),
            )
        )
        seen = as_network_input(scheduler, x, timestep)
        moved, options = stepped(scheduler, output, timestep, x, options)
        scale, a, b = seen[0, 0, 0, 0], *moved[0, :2, 0, 0]
        slack = TOLERANCE * max(1.0, float(a.abs()), float(b.abs())) * (1 + x.abs() + output.abs())
        if not bool(((moved - a * x - b * output).abs() <= slack).all()) or not torch.allclose(seen, scale * x):
            return None
        rows.append(torch.stack([scale, a, b]).float())
    return torch.stack(rows)


def takes_generator(scheduler: Any) -> bool:
    """Whether the scheduler's step may draw noise."""
    return "generator" in inspect.signature(scheduler.step).parameters
