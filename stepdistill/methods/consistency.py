"""Consistency distillation: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024).

every step:
    n ~ U{1..N};  t = grid[n], r = grid[n-1];  x_t = alpha x_0 + sigma eps          (x_0 real)
    x_r = one DDIM step of the guided teacher from x_t to r
    LCM:  f(x, t)    = c_skip(t) x + c_out(t) x_0(x, t)
    TCD:  f(x, t, s) = alpha_s x_0(x, t) + sigma_s eps(x, t),   s ~ U{grid[0..n-1]}
    minimise Huber( f_student(x_t, t) - f_target(x_r, r) );   target <- moving average of the student

With ``w_min`` and ``w_max`` the guidance of every row is w ~ U[w_min, w_max], an input of student and target, as in
LCM's full training; the export keeps the recipe's own w. Its convention: LCM's w is this w minus 1.
"""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.samplers import solver_grid
from stepdistill.diffusion.schedule import Prediction, Schedule, per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import DataNeeds, DistillMethod, RealConfig
from stepdistill.methods.parts.losses import pseudo_huber
from stepdistill.roles.added import GuidanceEmbedded


class SolverConfig(RealConfig):
    """Keys of ``method`` that the whole family shares."""

    solver_steps: int = Field(50, ge=2, description="N: length of the teacher's DDIM grid")
    huber: float = Field(1e-3, gt=0, description="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    w_min: float | None = Field(
        None, ge=0, description="lowest guidance scale w that the student takes as an input; null: w is fixed"
    )
    w_max: float | None = Field(None, ge=0, description="highest guidance scale w that the student takes as an input")

    @model_validator(mode="after")
    def _range_of_w(self) -> "SolverConfig":
        both = self.w_min is not None and self.w_max is not None
        if (self.w_min is not None or self.w_max is not None) and not (both and self.w_min < self.w_max):
            raise ValueError(f"expected w_min below w_max or neither of them, got {self.w_min} and {self.w_max}")
        return self


class ConsistencyConfig(SolverConfig):
    """Keys of ``method`` for LCM, TCD and PCM."""

    target_ema: float = Field(0.95, ge=0, lt=1, description="decay of the target network")


def boundary(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of f(x_t, t) = c_skip x_t + c_out x_0 with f = x at t = 0: LCM's, in timesteps.

    On EDM in sigma beyond its smallest, as Song et al. 2023, app. C, for a network that means x_0; x_t is scaled there.
    """
    if schedule.name == "edm":
        levels: Any = getattr(schedule, "levels", schedule)
        variance = schedule.data_std**2
        beyond = levels.sigma(t) - levels.sigma_min
        root = (beyond**2 + variance).sqrt()
        return variance / root**2 / schedule.alpha(t), beyond / root
    scaled = 10 * schedule.timestep(t)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


class LCM(DistillMethod):
    """Latent consistency distillation: every point of a teacher trajectory maps to its clean end."""

    Config = ConsistencyConfig
    config: ConsistencyConfig
    name = "lcm"
    family = "Consistency"
    paper = "LCM, Luo et al. 2023"
    summary = "LCM: consistency distillation, re-noising sampler"
    sampler_name = "renoise"
    extra_roles = ("target",)
    first_index = 1

    @classmethod
    def data_needs(cls, config: SolverConfig) -> DataNeeds:
        return config.real_needs()

    @classmethod
    def adapt(cls, config: SolverConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        if config.w_min is None or config.w_max is None:
            return network
        if not config.w_min <= scale <= config.w_max:
            problem = f"expected from method.w_min ({config.w_min}) to method.w_max ({config.w_max}), found {scale}"
            # What the recipe says of a network with such an input is handed to the network.
            embedded = "; a teacher that takes guidance as an input needs method.w_min: null" if scale == 1 else ""
            raise InputError(f"teacher.guidance.scale: {problem}{embedded}")
        return GuidanceEmbedded(network, scale)

    def prepare(self, batch: Batch) -> None:
        if self.config.w_min is not None and batch.null is None:
            raise InputError("method.w_min: expected null for a pipeline without guidance")

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        student, target = self.roles.student, self.roles.target
        return {"consistency": self.consistency(student, target, *self.draw(batch), batch)}

    def consistency(self, fast: Denoiser, slow: Denoiser, t: Tensor, r: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """Huber between where ``fast`` jumps from x_t and where ``slow`` jumps from the teacher's x_r; times (B,)."""
        x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        scale, cond = self.guidance(batch, fast)
        x_r = self.solver_step(self.teacher(x_t, t, batch, scale), r)
        with torch.no_grad():
            target = self.target(slow, x_r, r, s, cond)
        return pseudo_huber(self.jump(fast(x_t, t, cond), s) - target, self.config.huber)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(t, r, s), (B,) each: where the student stands, the solver's next time, and where both are sent."""
        grid = self.solver_grid(batch)
        n = self.first_index + batch.integers("n", len(grid) - self.first_index)
        return grid[n], grid[n - 1], grid[(batch.uniform("s") * n).long()]

    def solver_grid(self, batch: Batch) -> Tensor:
        """The teacher's times (N + 1,), ascending from the clean end."""
        return self.table("solver grid", lambda: solver_grid(self.schedule, self.config.solver_steps), batch.device)

    def guidance(self, batch: Batch, mine: Denoiser | None = None) -> tuple[float | Tensor, Conditions]:
        """The teacher's w for the loss of ``mine`` (the student), and the conditions of networks with w as an input."""
        low, high = self.config.w_min, self.config.w_max
        if low is None or high is None:
            return self.roles.scale, batch.cond
        w = batch.uniform("w", low, high)
        return w, batch.cond | {"guidance_scale": w}

    def solver_step(self, teacher: Prediction, r: Tensor) -> Tensor:
        """The teacher's DDIM step to ``r``."""
        return self.schedule.add_noise(teacher.x0, teacher.eps, r)

    def target(self, slow: Denoiser, x_r: Tensor, r: Tensor, s: Tensor, cond: Conditions) -> Tensor:
        """Where ``slow`` jumps from one solver step further on."""
        return self.jump(slow(x_r, r, cond), s)

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t): the predicted clean end, exact at t = 0."""
        c_skip, c_out = boundary(self.schedule, prediction.t)
        x_t, x0 = prediction.x_t, prediction.x0
        return per_sample(c_skip, x0) * x_t + per_sample(c_out, x0) * x0

    def after_update(self, player: str) -> None:
        self.average(self.roles.target, self.config.target_ema)


class TCD(LCM):
    """Trajectory consistency distillation: every point maps to every earlier time of its trajectory."""

    name = "tcd"
    family = "Consistency"
    paper = "TCD, Zheng et al. 2024"
    summary = "TCD: trajectory consistency distillation, strategic stochastic sampling"
    sampler_name = "tcd"
    # A jump from grid[0] has nowhere to go, and some predictions have no eps at sigma = 0.
    first_index = 2

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t, s) = alpha_s x_0 + sigma_s eps."""
        return self.schedule.add_noise(prediction.x0, prediction.eps, s)
