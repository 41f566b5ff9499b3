"""Noise schedules and conversions between predictions: x_t = alpha(t) x_0 + sigma(t) eps.

Time ``t`` is a float tensor (B,) in [0, 1]: 1 is the noise end, 0 the data end, on every schedule. All
coefficients are computed in float64 and cast to the sample's dtype, because x_0 near the noise end is a
difference of nearly equal numbers. Nothing else in the library knows these formulas.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.diffusion.devices import DeviceTable
from stepdistill.errors import InputError
from stepdistill.kernels import add_noise

Kind = Literal["epsilon", "v", "edm", "flow", "inverted flow", "sample"]
"""What a network emits: eps; v = sd alpha eps - sigma x_0 / sd with the schedule's data deviation sd, 1 unless it is
EDM's; -v, as EDM's preconditioning has it; flow velocity u = eps - x_0; -u, of inverted sigmas; or x_0 itself."""

KINDS: tuple[Kind, ...] = ("epsilon", "v", "edm", "flow", "inverted flow", "sample")


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A (B,) coefficient shaped to multiply ``like`` (B, ...), in its dtype."""
    return coefficient.to(like).reshape(-1, *[1] * (like.ndim - 1))


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t/(1 + (shift - 1) t), which keeps 0 and 1 to the bit; 1/shift undoes it (Esser et al. 2024, eq. 23)."""
    return shift * t / (shift * t + (1 - t))


class Schedule(ABC):
    """alpha(t), sigma(t) and everything that follows from them."""

    name: str
    data_std = 1.0

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t``, float64, shaped like ``t``."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """``t`` in the unit of the stock schedulers of this family (0..999 for VP), float64."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of :meth:`timestep`."""

    @abstractmethod
    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/d(natural time): the angle on VP, t on flow, sigma on EDM."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest times the family's networks were trained at: table entries on VP, ``t`` itself elsewhere."""
        return t

    def between(self, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
        """The time at ``share`` (0 .. 1) of the way from ``low`` to ``high``, spaced as the family's grids are.

        The arguments broadcast; float64. Flow's grids are even before their shift, all others in t.
        """
        return self.snap(torch.lerp(low.double(), high.double(), share.double()))

    def alpha(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]

    def _shaped(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return per_sample(alpha, like), per_sample(sigma, like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps; shapes (B, ...), t (B,)."""
        return add_noise(x0, eps, *self.coefficients(t))

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """x_0 from what a network of this ``kind`` emitted at ``(x_t, t)``."""
        alpha, sigma = self._shaped(t, x_t)
        match kind:
            case "epsilon":
                return (x_t - sigma * prediction) / alpha
            case "v" | "edm":
                sd, v = self.data_std, -prediction if kind == "edm" else prediction
                return (sd**2 * alpha * x_t - sd * sigma * v) / (sd**2 * alpha**2 + sigma**2)
            case "flow" | "inverted flow":
                u = prediction if kind == "flow" else -prediction
                return (x_t - sigma * u) / (alpha + sigma)
            case "sample":
                return prediction
        raise ValueError(f"unknown prediction kind {kind!r}, expected one of {KINDS}")

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """eps from what a network of this ``kind`` emitted at ``(x_t, t)``."""
        alpha, sigma = self._shaped(t, x_t)
        match kind:
            case "epsilon":
                return prediction
            case "v" | "edm":
                sd, v = self.data_std, -prediction if kind == "edm" else prediction
                return (sigma * x_t + sd * alpha * v) / (sd**2 * alpha**2 + sigma**2)
            case "flow" | "inverted flow":
                u = prediction if kind == "flow" else -prediction
                return (x_t + alpha * u) / (alpha + sigma)
            case "sample":
                return (x_t - alpha * prediction) / sigma
        raise ValueError(f"unknown prediction kind {kind!r}, expected one of {KINDS}")

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """The inverse of :meth:`to_x0`: what a network of this ``kind`` would emit to mean ``x0``."""
        alpha, sigma = self._shaped(t, x_t)
        if kind == "sample":
            return x0
        eps = (x_t - alpha * x0) / sigma
        v = self.data_std * alpha * eps - sigma * x0 / self.data_std
        return {"epsilon": eps, "v": v, "edm": -v, "flow": eps - x0, "inverted flow": x0 - eps}[kind]

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = -(x_t - alpha D)/sigma^2 for the posterior mean D = ``x0`` (Tweedie)."""
        alpha, sigma = self._shaped(t, x_t)
        return (alpha * x0 - x_t) / sigma**2


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
    """

    name = "flow"

    def __init__(
        self,
        shift: float = 1.0,
        train_timesteps: int = 1000,
        dynamic: bool = False,
        left_out: float = 1.0,
        inverted: bool = False,
    ):
        self.shift, self.train_timesteps = shift, train_timesteps
        self.dynamic, self.left_out, self.inverted = dynamic, left_out, inverted

    def between(self, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
        low, high = (shifted(t.double(), 1 / self.shift) for t in (low, high))
        return shifted(torch.lerp(low, high, share.double()), self.shift)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def timestep(self, t: Tensor) -> Tensor:
        fraction = shifted(t.double(), 1 / self.left_out)
        return (1 - fraction if self.inverted else fraction) * self.train_timesteps

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
    if declared == "flow_prediction" or config.get("use_flow_sigmas") or _is_flow(scheduler):
        if declared not in (None, "flow_prediction"):
            raise InputError(
                f"schedule: {type(scheduler).__name__} has flow sigmas and prediction_type {declared}; a flow "
                "network's is flow_prediction (scheduler/scheduler_config.json)"
            )
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic and mu is not None:
            shift = float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
        steps = config.get("num_train_timesteps", 1000)
        left_out = shift if _leaves_out(scheduler, shift, steps) else 1.0
        inverted = bool(config.get("invert_sigmas"))
        return FlowSchedule(shift, steps, dynamic, left_out, inverted), "inverted flow" if inverted else "flow"
    edm = _tells_log_sigma(scheduler)
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


def _tells_log_sigma(scheduler: Any) -> bool:
    """Whether timesteps are log(sigma)/4, as EDM tells its networks the noise."""
    sigmas, timesteps = _tables(scheduler)
    if not 0 < len(timesteps) <= len(sigmas) or sigmas[0] <= 0:
        return False
    return bool((timesteps[0] - sigmas[0].log() / 4).abs() < 1e-4)


def _leaves_out(scheduler: Any, shift: float, steps: int) -> bool:
    """Whether the shift is in the sigmas of the grid that was set, and not in its timesteps."""
    sigmas, timesteps = _tables(scheduler)
    sigmas, timesteps = sigmas[: len(timesteps)], timesteps / steps
    if len(sigmas) < len(timesteps) or not len(sigmas) or torch.allclose(sigmas, timesteps, atol=1e-3):
        return False
    return torch.allclose(sigmas, shifted(timesteps, shift), atol=1e-4)


def _tables(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The sigmas and timesteps of a scheduler, empty where they are not set (PNDM's at first)."""
    tables = (getattr(scheduler, name, None) for name in ("sigmas", "timesteps"))
    sigmas, timesteps = (torch.as_tensor(() if one is None else one).double().cpu() for one in tables)
    return sigmas, timesteps


def _is_flow(scheduler: Any) -> bool:
    return "shift" in scheduler.config and not hasattr(scheduler, "betas")
