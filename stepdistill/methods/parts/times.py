"""Distributions of the time t in [0, 1] (1 = noise) at which methods look at a sample; all (size,) float64."""

import math

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.schedule import Schedule, shifted

# Training sees the whole range of noise, short of none at all, where an epsilon has no meaning.
T_FLOOR = 0.001


def uniform_times(
    batch: Batch, name: str, schedule: Schedule, low: float = T_FLOOR, high: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Uniform in [low, high), on the schedule's own times; with ``shift`` what is uniform is t before its shift.

    Args:
        shift: s of t = s u/(1 + (s - 1) u), for flow (Esser et al. 2024, eq. 23); FastGen's "shifted" times.
    """
    if shift == 1:
        return schedule.snap(batch.uniform(name, low, high))
    ends = shifted(torch.tensor([low, high], dtype=torch.float64), 1 / shift).tolist()
    return schedule.snap(shifted(batch.uniform(name, *ends), shift))


def normal_log_snr_times(batch: Batch, name: str, schedule: Schedule, mean: float, std: float) -> Tensor:
    """Times at which ln(sigma/alpha) ~ N(mean, std^2), cut to the schedule's range.

    EDM's log-normal (Karras et al. 2022, table 1: -1.2, 1.2) and, since sigma/alpha = t/(1 - t) there, the
    logit-normal of flow models (Esser et al. 2024), carried over to any schedule by its noise-to-signal ratio.
    """
    uniform = batch.uniform(name).clamp(1e-6, 1 - 1e-6)
    log_ratio = mean + std * math.sqrt(2) * torch.erfinv(2 * uniform - 1)
    return time_of_ratio(schedule, log_ratio.exp())


def time_of_ratio(schedule: Schedule, ratio: Tensor, floor: float = T_FLOOR) -> Tensor:
    """The times (B,) at which sigma/alpha equals ``ratio`` (B,), cut to [floor, 1]; interpolated in its logarithm."""
    times = torch.linspace(floor, 1, 2001, dtype=torch.float64, device=ratio.device)
    alpha, sigma = schedule.coefficients(times)
    knots = (sigma / alpha.clamp_min(1e-12)).log()
    target = ratio.double().log().clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, target).clamp(1, len(knots) - 1)
    low, high = knots[right - 1], knots[right]
    part = ((target - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return schedule.snap(times[right - 1] + part * (times[right] - times[right - 1]))
