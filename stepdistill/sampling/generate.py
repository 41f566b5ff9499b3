"""Latents and images from a traced pipeline under any stock scheduler, each sample on its own random numbers."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.diffusion.stock_schedulers import noise_scale, stepped_timesteps
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.decode import at_once
from stepdistill.pipeline.set_up import ready_scheduler
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.rules.steps import Step, StepRule, classifier_free
from stepdistill.sampling.stepping import AffineSteps, Steps, StockSteps, coefficients


def sample_generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of sample ``index``; it depends on (seed, index, stream) alone.

    torch keeps 32 bits of a seed, so the streams are offsets and indices are added to them: two samples of
    one stream never share random numbers.
    """
    offset = int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((offset + index) % 2**32)


def noise(shape: Sequence[int], seed: int, indices: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (len(indices), *shape), float32 on the CPU; row i depends on (seed, indices[i], stream)."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, int(i), stream)) for i in indices])


def _dice(seed: int, indices: Sequence[int], stream: int) -> list[torch.Generator]:
    return [sample_generator(seed, index, stream) for index in indices]


@dataclass(frozen=True)
class Options:
    """What a generation may state beside its steps, guidance and seed.

    Args:
        indices: the samples' numbers (N,); None: from 0 up.
        batch: samples at once; None: as :func:`at_once`.
        initial: noise (N, *latent_shape) to start from instead of the seed's.
        onto: clean latents (N, *latent_shape) that the noise is put onto, the grid's first ``start`` steps being left
            out (SDEdit, Meng et al. 2022; the image-to-image pipelines); None: from pure noise.
        start: see ``onto``.
        rule: makes a guidance rule of :mod:`stepdistill.sampling.rules` for each batch, instead of ``guidance``.
    """

    indices: Sequence[int] | None = None
    batch: int | None = None
    initial: Tensor | None = None
    onto: Tensor | None = None
    start: int = 0
    rule: Callable[[], StepRule] | None = None


@torch.no_grad()
def generate(
    trace: Trace,
    scheduler: Any,
    conditioning: Conditioning,
    labels_index: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    **options: Any,
) -> Tensor:
    """Latents (N, *latent_shape), float32; sample i depends on (seed, indices[i]) and its condition alone.

    The scheduler is set up and stepped with the arguments that the pipeline itself would give it. Where its steps are
    sums of sample and output (:func:`.stepping.coefficients`), they are made together with guidance, equal to the
    scheduler's within float32's rounding.

    Args:
        trace: the pipeline.
        scheduler: a stock scheduler of the denoiser's prediction type; it is copied, not changed.
        conditioning: conditions.
        labels_index: entries of ``conditioning``, (N,).
        steps: of the scheduler.
        guidance: w, 1 is off.
        seed: of noise.
        options: see :class:`Options`.

    Raises:
        InputError: the scheduler's prediction type is another, or it cannot make a grid of so many steps.
    """
    denoiser, chosen = trace.denoiser, Options(**options)
    kind = from_scheduler(scheduler)[1]
    if kind != denoiser.kind:
        raise InputError(
            f"scheduler: expected prediction type {denoiser.kind} (the pipeline's), found {kind} in "
            f"{type(scheduler).__name__}"
        )
    device = next(denoiser.network.parameters()).device
    way = Way.of(trace, scheduler, steps, chosen.start, device)
    indices = range(len(labels_index)) if chosen.indices is None else chosen.indices
    parts, batch = [], chosen.batch or at_once(trace.latent_shape)
    for first in range(0, len(labels_index), batch):
        part = slice(first, first + batch)
        rows, numbers = labels_index[part], indices[part]
        x = noise(trace.latent_shape, seed, numbers) if chosen.initial is None else chosen.initial[part]
        x = x.to(device, torch.float32)
        made, times = way.steps([sample_generator(seed, i, stream=1) for i in numbers]), way.times[:, None]
        times = times.expand(-1, len(x))
        if chosen.onto is None:
            x = x * way.initial_scale
        else:
            x_t = denoiser.schedule.add_noise(chosen.onto[part].to(x), x, times[way.first])
            x = x_t / made.seen(torch.ones_like(x), way.first)
        cond, null = conditioning.batch(rows)
        guide = chosen.rule() if chosen.rule else classifier_free(guidance)
        for number in range(way.first, len(times) - 1):
            dice = functools.partial(_dice, seed, numbers, 2 + number)
            here = times[number], times[number + 1]
            step = Step(number, made.seen(x, number), *here, cond, null, conditioning, rows, dice, seed)
            x = made.step(guide(denoiser, step), x, number)
        parts.append(x)
    return torch.cat(parts)


@dataclass(frozen=True)
class Way:
    """The grid of a scheduler, and how a batch goes down it.

    Args:
        times: of every step and, last, the clean end's 0: (steps + 1,) on the device.
        first: the number of the first step that is made.
        initial_scale: of the noise that a run starts from.
        steps: makes a batch's steps from its samples' generators.
    """

    times: Tensor
    first: int
    initial_scale: float
    steps: Callable[[list[torch.Generator]], Steps]

    @classmethod
    def of(cls, trace: Trace, scheduler: Any, steps: int, start: int, device: torch.device) -> "Way":
        """That of a stock scheduler in so many steps, the first ``start`` left out."""
        ready, options = ready_scheduler(trace, scheduler, steps, torch.device("cpu"))
        # Schedulers of second order go through each step in two.
        first = start * getattr(ready, "order", 1)
        times = trace.denoiser.schedule.time(stepped_timesteps(ready))
        times = torch.cat([times, times.new_zeros(1)]).to(device)
        scale = noise_scale(ready)
        _begin(ready, first)
        if (table := coefficients(ready, options, first)) is not None:
            affine = AffineSteps(table.to(device), bool((table[first:, 0] != 1).any()))
            return cls(times, first, scale, lambda _: affine)
        ready, options = ready_scheduler(trace, scheduler, steps, device)
        _begin(ready, first)
        return cls(times, first, scale, functools.partial(StockSteps, ready, options))


def _begin(scheduler: Any, first: int) -> None:
    """Tell a scheduler that keeps count which step comes first."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
