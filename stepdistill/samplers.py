"""Few-step samplers: how the student runs in n steps, and the stock diffusers scheduler each one is exported as.

The time grid is always read off the stock scheduler itself, so training and the exported pipeline agree by
construction; the step formulas here are differentiable and are checked against the scheduler at export.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.schedule import Prediction, Schedule, per_sample

Noise = Callable[[], Tensor]
"""Draws fresh standard normal noise, shaped like the sample."""

_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")


class Step(NamedTuple):
    """One step of a grid: from time ``t`` to time ``r``; ``r`` is None for the clean end."""

    t: float
    r: float | None


class Sampler(ABC):
    """A few-step sampler over a schedule.

    Args:
        schedule: the teacher's schedule.
        source: the teacher's own diffusers scheduler; tables and prediction type are taken from its config.
        steps: the number of steps the student is trained for.
        set_up: (scheduler, steps) -> the arguments that the pipeline gives its ``set_timesteps``; None: the number of
            steps alone. Pipelines of flow matching pass sigmas of their own.
    """

    name: str
    stochastic: bool

    def __init__(
        self,
        schedule: Schedule,
        source: Any,
        steps: int,
        set_up: Callable[[Any, int], dict[str, Any]] | None = None,
    ):
        self.schedule = schedule
        self.steps = steps
        self.scheduler = self.stock(source.config)
        self.set_up = set_up or (lambda _scheduler, steps: {"num_inference_steps": steps})
        self._times: dict[int, list[float]] = {}

    @abstractmethod
    def stock(self, config: dict[str, Any]) -> Any:
        """The stock scheduler that runs this sampler in a plain pipeline call."""

    @abstractmethod
    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        """x at ``step.r`` from the student's prediction at ``step.t``; the clean sample when ``r`` is None."""

    def grid(self, steps: int | None = None) -> list[Step]:
        """The (t, r) pairs of a run in ``steps`` steps (default: the trained number)."""
        steps = steps or self.steps
        if steps not in self._times:  # it is asked for several times a training step
            # set_timesteps mutates; a copy keeps the exported scheduler as it was configured.
            scheduler = type(self.scheduler).from_config(self.scheduler.config)
            scheduler.set_timesteps(**self.set_up(scheduler, steps))
            self._times[steps] = self.schedule.time(scheduler.timesteps.double()).tolist()
        times = self._times[steps]
        return [Step(t, r) for t, r in zip(times, [*times[1:], None], strict=True)]

    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Prediction],
        noise: Tensor,
        draw: Noise | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Run the sampler from pure ``noise`` (B, ...): ``predict(x_t, t)`` is the student with its condition."""
        draw = draw or (lambda: torch.randn_like(noise))
        x = noise
        for step in self.grid(steps):
            x = self.advance(predict(x, torch.full((len(x),), step.t, device=x.device)), step, draw)
        return x

    def _at(self, time: float, like: Prediction) -> Tensor:
        return torch.full_like(like.t, time)


class Renoise(Sampler):
    """Predict x_0, then noise it afresh to the next time (multistep consistency sampling; LCM, DMD2)."""

    name = "renoise"
    stochastic = True

    def stock(self, config: dict[str, Any]) -> Any:
        if self.schedule.name == "flow":
            return FlowMatchLCMScheduler(
                num_train_timesteps=config.get("num_train_timesteps", 1000), shift=self.schedule.shift
            )
        # original_inference_steps = n makes the stock grid visit 999, 749, 499, 249 for n = 4.
        return LCMScheduler(**_vp(config, self.schedule), original_inference_steps=self.steps)

    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        if step.r is None:
            return prediction.x0
        return self.schedule.add_noise(prediction.x0, noise(), self._at(step.r, prediction))


class DDIM(Sampler):
    """Deterministic first-order step: x_r = alpha_r x_0 + sigma_r eps (DDIM on VP, Euler on flow)."""

    name = "ddim"
    stochastic = False

    def stock(self, config: dict[str, Any]) -> Any:
        if self.schedule.name == "flow":
            return FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=config.get("num_train_timesteps", 1000), shift=self.schedule.shift
            )
        return DDIMScheduler(**_vp(config, self.schedule), timestep_spacing="trailing", set_alpha_to_one=True)

    def grid(self, steps: int | None = None) -> list[Step]:
        grid = super().grid(steps)
        if self.schedule.name != "vp_discrete":
            return grid
        # DDIMScheduler steps to t - N // n, which differs from its own next timestep when n does not divide N; the
        # last step then ends at table entry 0 or below it, and only below it is clean.
        count = len(self.schedule.alphas_cumprod)
        ends = [(round(step.t * (count - 1)) - count // len(grid)) / (count - 1) for step in grid]
        return [Step(step.t, end if end >= 0 else None) for step, end in zip(grid, ends, strict=True)]

    def advance(self, prediction: Prediction, step: Step, noise: Noise | None = None) -> Tensor:
        if step.r is None:
            return prediction.x0
        return self.schedule.add_noise(prediction.x0, prediction.eps, self._at(step.r, prediction))


class TCD(Sampler):
    """Strategic stochastic sampling (TCD, Zheng et al. 2024): jump to s = (1 - gamma) r, then noise up to r.

    gamma is 0.3, the stock scheduler's default, unless a plain call of the pipeline passes another ``eta``.
    """

    name = "tcd"
    stochastic = True
    gamma = 0.3

    def stock(self, config: dict[str, Any]) -> Any:
        if self.schedule.name == "flow":
            raise InputError("sampler tcd: the stock TCDScheduler has no flow-matching form; use renoise or ddim")
        return TCDScheduler(**_vp(config, self.schedule), original_inference_steps=50)

    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        # The stock scheduler ends at table entry 0, not at clean data, and does not add noise there.
        r = self._at(0.0 if step.r is None else step.r, prediction)
        s = self.schedule.time((self.schedule.timestep(r) * (1 - self.gamma) + 1e-6).floor())
        x_s = self.schedule.add_noise(prediction.x0, prediction.eps, s)
        return x_s if step.r is None else renoise_up(self.schedule, x_s, s, r, noise())


def renoise_up(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The forward kernel from s up to t >= s: k x_s + sqrt(sigma_t^2 - (k sigma_s)^2) z with k = alpha_t/alpha_s."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.coefficients(s), schedule.coefficients(t)
    ratio = alpha_t / alpha_s
    rest = (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()
    return per_sample(ratio, x_s) * x_s + per_sample(rest, x_s) * noise


def solver_grid(schedule: Schedule, steps: int) -> Tensor:
    """Ascending times (steps + 1,) from the clean end 0: VP timesteps 0, 19, 39, ..., 999 for 50 steps."""
    fractions = torch.arange(steps + 1, dtype=torch.float64) / steps
    if schedule.name != "vp_discrete":
        return fractions
    count = len(schedule.alphas_cumprod)
    return schedule.time((fractions * count - 1).round().clamp_min(0))


def dpm_solver_step(current: Prediction, previous: Prediction | None, r: Tensor | None) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, eq. 4.2 multistep), first order without a ``previous``.

    Args:
        current: prediction at x_t, t. previous: the prediction one step earlier, or None.
        r: target times (B,), or None for the clean end, where the step returns x_0.
    """
    if r is None:
        return current.x0
    schedule, x_t = current.schedule, current.x_t
    alpha_r, sigma_r = schedule.coefficients(r)
    alpha_t, sigma_t = schedule.coefficients(current.t)
    h = (alpha_r / sigma_r).log() - (alpha_t / sigma_t).log()
    x0 = current.x0
    if previous is not None:
        alpha_p, sigma_p = schedule.coefficients(previous.t)
        h_previous = (alpha_t / sigma_t).log() - (alpha_p / sigma_p).log()
        x0 = x0 + per_sample(h / (2 * h_previous), x_t) * (x0 - previous.x0)
    return per_sample(sigma_r / sigma_t, x_t) * x_t - per_sample(alpha_r * torch.expm1(-h), x_t) * x0


def _vp(config: dict[str, Any], schedule: Schedule) -> dict[str, Any]:
    """The noise table and prediction type of ``config``, as arguments of another VP scheduler, and no clipping."""
    if schedule.name != "vp_discrete":
        raise InputError(f"no stock few-step scheduler runs a {schedule.name} schedule")
    kept = {name: config[name] for name in _BETAS if config.get(name) is not None}
    # Without effect on any of the grids here, but Stable Diffusion's pipelines rewrite a 0, with a warning.
    offset = config.get("steps_offset", 0)
    return kept | {"prediction_type": config["prediction_type"], "steps_offset": offset, "clip_sample": False}


SAMPLERS: dict[str, type[Sampler]] = {sampler.name: sampler for sampler in (Renoise, DDIM, TCD)}
