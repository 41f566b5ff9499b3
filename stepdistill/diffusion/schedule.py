"""Noise schedules and conversions between predictions: x_t = alpha(t) x_0 + sigma(t) eps.

Time ``t`` is a float tensor (B,) in [0, 1]: 1 is the noise end, 0 the data end, on every schedule. All
coefficients are computed in float64 and cast to the sample's dtype, because x_0 near the noise end is a
difference of nearly equal numbers. Nothing else in the library knows these formulas.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from stepdistill.diffusion.devices import DeviceTable
from stepdistill.diffusion.schedule_base import Kind, Schedule, per_sample
from stepdistill.diffusion.scheduler_tables import (
    has_log_sigma_timesteps,
    is_flow,
    is_sigma,
    leaves_out,
    shifted,
)
from stepdistill.errors import InputError

__all__ = ["KINDS", "EDMSchedule", "FlowSchedule", "Kind", "Prediction", "Schedule", "VPSchedule", "from_scheduler"]
__all__ += ["AngleSchedule", "ScaledEDMSchedule", "SigmaSchedule", "per_sample", "shifted"]

KINDS: tuple[Kind, ...] = get_args(Kind)


class VPSchedule(Schedule):
    """Variance preserving, discrete: alpha = sqrt(abar), sigma = sqrt(1 - abar), from a table of abar.

    Between two table entries abar is interpolated linearly, so on-grid times give the table's own values.
    """

    name = "vp_discrete"

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod.detach().double().cpu()
        self._table = DeviceTable(self.alphas_cumprod)

    def _index(self, t: Tensor) -> Tensor:
        index = t.double() * (len(self.alphas_cumprod) - 1)
        nearest = index.round()
        # float32 times miss an integer index by up to 1e-4; such a time means the index itself. The correction is a
        # constant, so that the index keeps its derivative in t.
        return index + torch.where((index - nearest).abs() < 1e-3, nearest - index, 0).detach()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = self._index(t)
        table = self._table.on(t.device)
        # Capped, so that abar has a slope at t = 1 too.
        below = index.floor().long().clamp(max=len(table) - 2)
        abar = torch.lerp(table[below], table[below + 1], index - below)
        return abar.sqrt(), (1 - abar).sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        return self._index(t)

    def snap(self, t: Tensor) -> Tensor:
        return self.time(self._index(t).round())

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.double() / (len(self.alphas_cumprod) - 1)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._shaped(t, x0)
        return alpha * eps - sigma * x0


class FlowSchedule(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t.

    Args:
        shift: s of sampling grids, t = s u/(1 + (s - 1) u) of even u (Esser et al. 2024, eq. 23); not of the path.
        dynamic: whether the pipeline computes the shift from the size of the sample, and ``shift`` is that of one.
        left_out: a shift that the network's timesteps lack: they are u where the path is at the shifted u (CogView4).
        inverted: whether timesteps rise from 0 at the noise end (Mochi).
        cut: whether the network receives integer timesteps, because its pipeline truncates them.
    """

    name = "flow"

    def __init__(
        self,
        shift: float = 1.0,
        train_timesteps: int = 1000,
        dynamic: bool = False,
        left_out: float = 1.0,
        inverted: bool = False,
        cut: bool = False,
    ):
        self.shift, self.train_timesteps = shift, train_timesteps
        self.dynamic, self.left_out, self.inverted, self.cut = dynamic, left_out, inverted, cut

    def between(self, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
        low, high = (shifted(t.double(), 1 / self.shift) for t in (low, high))
        return shifted(torch.lerp(low, high, share.double()), self.shift)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def timestep(self, t: Tensor) -> Tensor:
        fraction = shifted(t.double(), 1 / self.left_out)
        timestep = (1 - fraction if self.inverted else fraction) * self.train_timesteps
        # Rounding may leave it just below an integer. It keeps its derivative in t.
        return timestep + ((timestep + 1e-3).floor() - timestep).detach() if self.cut else timestep

    def time(self, timestep: Tensor) -> Tensor:
        fraction = timestep.double() / self.train_timesteps
        return shifted(1 - fraction if self.inverted else fraction, self.left_out)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0


class EDMSchedule(Schedule):
    """Variance exploding (Karras et al. 2022): alpha = 1, sigma on the rho-grid from sigma_min to sigma_max."""

    name = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (low + t.double() * (high - low)) ** self.rho
        return torch.ones_like(sigma), sigma

    def timestep(self, t: Tensor) -> Tensor:
        return self.sigma(t).log() / 4

    def time(self, timestep: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((timestep.double() * 4).exp() ** (1 / self.rho) - low) / (high - low)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps


class ScaledEDMSchedule(Schedule):
    """EDM as its network sees it (Karras et al. 2022, table 1): x_t is c_in (x_0 + sigma eps), of deviation 1.

    alpha = c_in = 1/sqrt(sigma^2 + sd^2) and sigma(t) = sigma c_in, so sd^2 alpha^2 + sigma(t)^2 = 1: the variance
    preserving path of x_0 / sd. Timesteps are log(sigma)/4.

    Args:
        levels: sigma over t.
        data_std: sd, the deviation of the data.
    """

    name = "edm"

    def __init__(self, levels: EDMSchedule, data_std: float):
        self.levels, self.data_std = levels, data_std

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.levels.sigma(t)
        c_in = (sigma**2 + self.data_std**2).rsqrt()
        return c_in, sigma * c_in

    def timestep(self, t: Tensor) -> Tensor:
        return self.levels.timestep(t)

    def time(self, timestep: Tensor) -> Tensor:
        return self.levels.time(timestep)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._shaped(t, x0)
        return self.data_std * alpha * eps - sigma * x0 / self.data_std


class SigmaSchedule(ScaledEDMSchedule):
    """EDM's under a scheduler of flow whose timesteps are sigma (Cosmos 2): it steps x_0 + sigma eps.

    Args:
        levels: sigma over t.
        train_timesteps: the timestep of sigma 1.
    """

    def __init__(self, levels: EDMSchedule, train_timesteps: int = 1000):
        super().__init__(levels, data_std=1.0)
        self.train_timesteps, self.rounding = train_timesteps, 2**-21 * levels.sigma_max

    def timestep(self, t: Tensor) -> Tensor:
        return self.levels.sigma(t) * self.train_timesteps

    def time(self, timestep: Tensor) -> Tensor:
        sigma = timestep.double() / self.train_timesteps
        return self.levels.time(sigma.log() / 4)


class AngleSchedule(Schedule):
    """TrigFlow (Lu and Song 2024): x_t = cos(a) x_0 + sin(a) sd eps for angles a from 0 to pi/2, the timesteps.

    Args:
        data_std: sd, the deviation of the data.
    """

    name = "angle"

    def __init__(self, data_std: float):
        self.data_std = data_std

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.timestep(t)
        return angle.cos(), angle.sin() * self.data_std

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * (math.pi / 2)

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.double() / (math.pi / 2)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._shaped(t, x0)
        return self.data_std * alpha * eps - sigma * x0 / self.data_std


@dataclass(frozen=True)
class Prediction:
    """One network output, read as x_0, eps, velocity or score on demand, in at least float32.

    Args:
        raw: the network's output, shaped like ``x_t`` (B, ...).
        x_t: the noisy input.
        t: its time (B,).
        kind: what ``raw`` is.
    """

    raw: Tensor
    x_t: Tensor
    t: Tensor
    schedule: Schedule
    kind: Kind

    @cached_property
    def _float(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.float32, torch.promote_types(self.raw.dtype, self.x_t.dtype))
        return self.raw.to(dtype), self.x_t.to(dtype)

    @cached_property
    def x0(self) -> Tensor:
        return self.schedule.to_x0(*self._float, self.t, self.kind)

    @cached_property
    def eps(self) -> Tensor:
        return self.schedule.to_eps(*self._float, self.t, self.kind)

    @cached_property
    def velocity(self) -> Tensor:
        return self.schedule.velocity(self.x0, self.eps, self.t)

    @cached_property
    def score(self) -> Tensor:
        return self.schedule.score(self.x0, self._float[1], self.t)


def from_scheduler(scheduler: Any, mu: float | None = None) -> tuple[Schedule, Kind]:
    """The schedule and prediction kind that a diffusers scheduler stands for.

    Args:
        mu: what the pipeline tells it of the sample's size, where its shift is dynamic.

    Raises:
        InputError: the scheduler is neither discrete VP, flow matching nor EDM, or its prediction type is
            unknown or unusable (epsilon at zero terminal SNR has no x_0).
    """
    config = scheduler.config
    kinds: dict[str, Kind] = {
        "epsilon": "epsilon",
        "v_prediction": "v",
        "sample": "sample",
        "flow_prediction": "flow",
    }
    declared = config.get("prediction_type")
    if declared == "flow_prediction" or config.get("use_flow_sigmas") or is_flow(scheduler):
        if declared not in (None, "flow_prediction"):
            raise InputError(
                f"schedule: {type(scheduler).__name__} has flow sigmas and prediction_type {declared}; a flow "
                "network's is flow_prediction (scheduler/scheduler_config.json)"
            )
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        if is_sigma(scheduler):
            levels = EDMSchedule(config["sigma_min"], config["sigma_max"])
            return SigmaSchedule(levels, config.get("num_train_timesteps", 1000)), "epsilon"
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic and mu is not None:
            shift = float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
        steps = config.get("num_train_timesteps", 1000)
        left_out = shift if leaves_out(scheduler, shift, steps) else 1.0
        inverted = bool(config.get("invert_sigmas"))
        return FlowSchedule(shift, steps, dynamic, left_out, inverted), "inverted flow" if inverted else "flow"
    if declared == "trigflow":
        return AngleSchedule(config["sigma_data"]), "v"
    edm = has_log_sigma_timesteps(scheduler)
    if not edm and not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"schedule: {type(scheduler).__name__} has no alphas_cumprod and is neither a flow-matching scheduler nor "
            "one of EDM"
        )
    if declared not in kinds:
        raise InputError(f"prediction type {declared!r} is not one of {', '.join(kinds)}")
    if edm:
        low, high = (config.get(name) for name in ("sigma_min", "sigma_max"))
        low, high = low or float(min(scheduler.sigmas[:-1])), high or float(max(scheduler.sigmas))
        levels = EDMSchedule(low, high, config.get("rho", 7.0))
        if "sigma_data" not in config:
            return ScaledEDMSchedule(levels, 1.0), kinds[declared]
        # Their "epsilon" is the raw output between EDM's skip and scale, their v its negative.
        kind: Kind = "edm" if declared == "epsilon" else kinds[declared]
        return ScaledEDMSchedule(levels, config["sigma_data"]), kind
    table = torch.as_tensor(scheduler.alphas_cumprod).clone()
    # The cosine table ends at 2e-9 and is none of them.
    zero_snr = config.get("rescale_betas_zero_snr") or float(table[-1]) < 1e-12
    if zero_snr:
        table[-1] = 0.0  # Euler's and others lift it a little; the schedulers of few steps do not
    schedule = VPSchedule(table)
    if kinds[declared] == "epsilon" and zero_snr:
        raise InputError("epsilon prediction at zero terminal SNR has no x_0; the teacher needs v prediction")
    return schedule, kinds[declared]
