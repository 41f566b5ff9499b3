"""Few-step samplers: how the student runs in n steps, and the stock diffusers scheduler each one is exported as.

The time grid is always read off the stock scheduler itself, so training and the exported pipeline agree by
construction; the step formulas here are differentiable and are checked against the scheduler at export.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import FlowSchedule, Prediction, Schedule
from stepdistill.diffusion.schedule_base import per_sample
from stepdistill.diffusion.stock_schedulers import (
    as_network_input,
    cut_flow_scheduler,
    edm_scheduler,
    flow_settings,
    stepped_timesteps,
    vp_scheduler,
)
from stepdistill.errors import InputError

Noise = Callable[[], Tensor]
"""Draws fresh standard normal noise, shaped like the sample."""


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
            steps alone. Some pipelines of flow matching pass sigmas of their own.
        start: the stock timestep of the first step, an index of a VP table; None: the noise end. The sample that a run
            starts from is noise N(0, I) all the same.

    Raises:
        InputError: no stock scheduler runs this sampler on this schedule, or from this start.
    """

    name: str
    stochastic: bool

    def __init__(
        self,
        schedule: Schedule,
        source: Any,
        steps: int,
        set_up: Callable[[Any, int], dict[str, Any]] | None = None,
        start: int | None = None,
    ):
        if schedule.name == "angle" and schedule.data_std != 1:
            raise InputError(
                f"teacher.pipeline: expected a scheduler of VP, flow or EDM, found {type(source).__name__} on a path "
                "of its own, for which diffusers has no scheduler of a few steps; such a pipeline can be inspected, "
                "and one that it was made from may be the teacher"
            )
        self.schedule, self.source, self.steps, self.start = schedule, source, steps, start
        self.set_up = set_up or (lambda _scheduler, steps: {"num_inference_steps": steps})
        if start is not None:
            check_start(schedule, start, steps)
        # Of the size that the export's scheduler is made for, see at_size().
        self._made_for = schedule
        self.scheduler = self.stock(steps)
        self._times: dict[int, list[float]] = {}

    @abstractmethod
    def stock(self, steps: int) -> Any:
        """The stock scheduler that runs this sampler in a plain pipeline call of ``steps`` steps."""

    @abstractmethod
    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        """x at ``step.r`` from the student's prediction at ``step.t``; the clean sample when ``r`` is None."""

    def grid(self, steps: int | None = None) -> list[Step]:
        """The (t, r) pairs of a run in ``steps`` steps (default: the trained number), of a scheduler made for them."""
        steps = steps or self.steps
        if steps not in self._times:  # several calls per training step
            scheduler = self.stock(steps)
            scheduler.set_timesteps(**self.set_up(scheduler, steps))
            times = self.schedule.time(stepped_timesteps(scheduler).double())
            if isinstance(self.schedule, FlowSchedule) and self.schedule.cut:
                times = scheduler.sigmas[:-1].double()
            self._times[steps] = times.tolist()
        times = self._times[steps]
        return [Step(t, r) for t, r in zip(times, [*times[1:], None], strict=True)]

    def at_size(self, schedule: Schedule, set_up: Callable[[Any, int], dict[str, Any]]) -> "Sampler":
        """The same stock schedulers, set up by a pipeline that makes samples of another size.

        Args:
            schedule: that of this size; its shift may be another.
            set_up: see :class:`Sampler`.
        """
        other = copy.copy(self)
        other.schedule, other.set_up, other._times = schedule, set_up, {}
        return other

    def seen(self, sample: Tensor) -> Tensor:
        """x_t of a stock run's first sample: EDM's is scaled before the network sees it, others are not."""
        scheduler = self.stock(self.steps)
        if self.schedule.name != "edm" and not hasattr(scheduler, "scale_model_input"):
            return sample
        scheduler.set_timesteps(**self.set_up(scheduler, self.steps), device=sample.device)
        return as_network_input(scheduler, sample, scheduler.timesteps[0])

    @property
    def rounding(self) -> float:
        """How far float32 alone may take a stock run from :meth:`sample`: those of EDM carry x_0 + 80 eps."""
        return 2**-21 * self.schedule.levels.sigma_max if self.schedule.name == "edm" else 0.0

    def sample(
        self,
        predict: Callable[..., Prediction],
        noise: Tensor,
        draw: Noise | None = None,
        steps: int | None = None,
        ends: bool = False,
    ) -> Tensor:
        """Run the sampler from pure ``noise`` (B, ...).

        Args:
            predict: (x_t, t), with ``ends`` (x_t, t, r): the student with its condition, at t (B,) and the step's end r
                (B,), 0 for the clean end.
            draw: fresh noise for stochastic samplers; None: global random numbers.
            steps: None: the trained number.
        """
        draw = draw or (lambda: torch.randn_like(noise))
        x = noise
        for step in self.grid(steps):
            times = (step.t, step.r or 0.0) if ends else (step.t,)
            prediction = predict(x, *(torch.full((len(x),), time, device=x.device) for time in times))
            x = self.advance(prediction, step, draw)
        return x

    def _flow(self, kind: type, steps: int) -> Any:
        """A flow scheduler whose grid ends at the shifted 1/n, as those do that are handed sigmas 1 .. 1/n."""
        settings = flow_settings(self.source, self.schedule)
        scheduler = kind(**settings)
        # Of a single step, 1, there is nothing to stretch.
        if steps == 1 or {"sigmas", "timesteps"} & self.set_up(scheduler, steps).keys():
            return scheduler
        last = self._made_for.between(torch.zeros(()), torch.ones(()), torch.tensor(1 / steps))
        return kind(**settings, shift_terminal=last.item())

    def _at(self, time: float, like: Prediction) -> Tensor:
        return torch.full_like(like.t, time)


class Renoise(Sampler):
    """Predict x_0, then noise it afresh to the next time (multistep consistency sampling; LCM, DMD2)."""

    name = "renoise"
    stochastic = True

    def stock(self, steps: int) -> Any:
        from diffusers import FlowMatchLCMScheduler, LCMScheduler, SCMScheduler

        if self.schedule.name == "flow":
            if self.schedule.inverted:
                raise InputError(
                    f"sampler {self.name}: expected ddim, FlowMatchLCMScheduler inverts no sigmas; {OF_DDIM}"
                )
            if self.schedule.cut:
                raise InputError(
                    f"sampler {self.name}: expected ddim, the pipeline cuts off timesteps to integers, which "
                    f"FlowMatchLCMScheduler does not take; {OF_DDIM}"
                )
            return self._flow(FlowMatchLCMScheduler, steps)
        if self.schedule.name == "angle":
            return SCMScheduler.from_config(self.source.config)
        _not_edm(self.schedule, self.name)
        # From the whole table any number of steps is evenly spaced: 999, 749, 499, 249 for 4.
        length = len(self.schedule.alphas_cumprod) if self.start is None else self.start + 1
        extra = {"original_inference_steps": length}
        return vp_scheduler(LCMScheduler, self.source, self.schedule, self.start, **extra)

    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        if step.r is None:
            return prediction.x0
        return self.schedule.add_noise(prediction.x0, noise(), self._at(step.r, prediction))


class DDIM(Sampler):
    """Deterministic first-order step: x_r = alpha_r x_0 + sigma_r eps (DDIM on VP, Euler on flow and EDM)."""

    name = "ddim"
    stochastic = False

    def stock(self, steps: int) -> Any:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        if self.schedule.name == "flow":
            if self.schedule.cut:
                return cut_flow_scheduler(self.schedule)
            return self._flow(FlowMatchEulerDiscreteScheduler, steps)
        if self.schedule.name == "edm":
            return edm_scheduler(self.source, self.schedule, steps)
        _not_angle(self.schedule, self.name)
        trailing = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        return vp_scheduler(DDIMScheduler, self.source, self.schedule, self.start, **trailing)

    def grid(self, steps: int | None = None) -> list[Step]:
        grid = super().grid(steps)
        if self.scheduler.config.get("final_sigmas_type") == "sigma_min":  # its last step ends where it begins
            return [*grid[:-1], Step(grid[-1].t, grid[-1].t)]
        if self.schedule.name != "vp_discrete":
            return grid
        # DDIMScheduler steps to t - N // n, which differs from its own next timestep when n does not divide N; the
        # last step then ends at table entry 0 or below it, and only below it is clean.
        last = len(self.schedule.alphas_cumprod) - 1
        length = (last if self.start is None else self.start) + 1
        ends = [(round(step.t * last) - length // len(grid)) / last for step in grid]
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

    def stock(self, steps: int) -> Any:
        from diffusers import TCDScheduler

        if self.schedule.name == "flow":
            raise InputError("sampler tcd: the stock TCDScheduler has no flow-matching form; use renoise or ddim")
        _not_edm(self.schedule, self.name)
        _not_angle(self.schedule, self.name)
        # A shorter table has no even part of 50 entries that holds its last one.
        original = 50 if self.start is None else self.start + 1
        extra = {"original_inference_steps": original}
        return vp_scheduler(TCDScheduler, self.source, self.schedule, self.start, **extra)

    def advance(self, prediction: Prediction, step: Step, noise: Noise) -> Tensor:
        # The stock scheduler ends at table entry 0, not at clean data, and does not add noise there.
        r = self._at(0.0 if step.r is None else step.r, prediction)
        s = self.schedule.time((self.schedule.timestep(r) * (1 - self.gamma) + 1e-6).floor())
        x_s = self.schedule.add_noise(prediction.x0, prediction.eps, s)
        return x_s if step.r is None else renoise_up(self.schedule, x_s, s, r, noise())


def forward_kernel(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """k and b (B,) of the forward process from s up to t >= s, x_t = k x_s + b z: k = alpha_t/alpha_s and
    b^2 = sigma_t^2 - (k sigma_s)^2."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.coefficients(s), schedule.coefficients(t)
    ratio = alpha_t / alpha_s
    return ratio, (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()


def renoise_up(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t (B, ...) of the forward process from x_s, see :func:`forward_kernel`."""
    ratio, rest = forward_kernel(schedule, s, t)
    return per_sample(ratio, x_s) * x_s + per_sample(rest, x_s) * noise


def solver_grid(schedule: Schedule, steps: int) -> Tensor:
    """Ascending times (steps + 1,) from the clean end 0: VP timesteps 0, 19, 39, ..., 999 for 50 steps.

    On flow they are shifted as its sampling grids are.
    """
    fractions = torch.arange(steps + 1, dtype=torch.float64) / steps
    if schedule.name != "vp_discrete":
        return schedule.between(torch.zeros(()), torch.ones(()), fractions)
    count = len(schedule.alphas_cumprod)
    return schedule.time((fractions * count - 1).round().clamp_min(0))


def dpm_solver_step(current: Prediction, previous: Prediction | None, r: Tensor | None) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, eq. 4.2 multistep), first order without a ``previous``.

    Args:
        current: prediction at x_t, t.
        previous: the prediction one step earlier, or None.
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


def check_start(schedule: Schedule, start: int, steps: int) -> None:
    """Refuse a start (a stock timestep) that the schedule does not have, or that leaves too few for ``steps`` steps.

    Raises:
        InputError: it is one.
    """
    if schedule.name != "vp_discrete":
        reason = "whose stock schedulers start at the noise end"
        raise InputError(f"student.start: expected null for a {schedule.name} schedule, {reason}; found {start}")
    last = len(schedule.alphas_cumprod) - 1
    if not steps - 1 <= start <= last:
        raise InputError(f"student.start: expected a timestep from {steps - 1} to {last}, found {start}")


OF_DDIM = (
    "methods of sampler ddim are sfd, ode-regression, pcm and pd, and dmd2, sid and others take method.sampler: ddim"
)


def _not_edm(schedule: Schedule, sampler: str) -> None:
    if schedule.name == "edm":
        raise InputError(
            f"sampler {sampler}: expected ddim for an EDM schedule, no stock scheduler noises afresh there; {OF_DDIM}"
        )


def _not_angle(schedule: Schedule, sampler: str) -> None:
    if schedule.name == "angle":
        raise InputError(
            f"sampler {sampler}: expected renoise under TrigFlow's scheduler, which noises afresh; that is the "
            "sampler of dmd2, lcm and most other methods"
        )


SAMPLERS: dict[str, type[Sampler]] = {sampler.name: sampler for sampler in (Renoise, DDIM, TCD)}
