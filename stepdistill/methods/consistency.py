"""Consistency distillation: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024).

every step:
    n ~ U{1..N};  t = grid[n], r = grid[n-1];  x_t = alpha x_0 + sigma eps          (x_0 real)
    x_r = one DDIM step of the guided teacher from x_t to r
    LCM:  f(x, t)    = c_skip(t) x + c_out(t) x_0(x, t)
    TCD:  f(x, t, s) = alpha_s x_0(x, t) + sigma_s eps(x, t),   s ~ U{grid[0..n-1]}
    minimise Huber( f_student(x_t, t) - f_target(x_r, r) );   target <- moving average of the student
"""

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig
from stepdistill.methods.losses import pseudo_huber
from stepdistill.schedule import EDMSchedule, Prediction, Schedule, per_sample


class ConsistencyConfig(MethodConfig):
    """Keys of ``method`` for LCM and TCD."""

    solver_steps: int = Field(50, ge=2, description="N: length of the teacher's DDIM grid")
    huber: float = Field(1e-3, gt=0, description="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    target_ema: float = Field(0.95, ge=0, lt=1, description="decay of the target network")


def solver_grid(schedule: Schedule, steps: int) -> Tensor:
    """Ascending times (steps + 1,) from the clean end 0: VP timesteps 0, 19, 39, ..., 999 for 50 steps."""
    fractions = torch.arange(steps + 1, dtype=torch.float64) / steps
    if schedule.name != "vp_discrete":
        return fractions
    count = len(schedule.alphas_cumprod)
    return schedule.time((fractions * count - 1).round().clamp_min(0))


def boundary(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) with f(x, 0) = x: LCM's in timesteps, Karras' in sigma on EDM (Song et al. 2023, app. C)."""
    if isinstance(schedule, EDMSchedule):
        variance, sigma = 0.25, schedule.sigma(t)
        beyond = sigma - schedule.sigma_min
        return variance / (beyond**2 + variance), beyond * (variance / (sigma**2 + variance)).sqrt()
    scaled = 10 * schedule.timestep(t)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


class LCM(DistillMethod):
    """Latent consistency distillation: every point of a teacher trajectory maps to its clean end."""

    Config = ConsistencyConfig
    config: ConsistencyConfig
    summary = "LCM: consistency distillation, re-noising sampler"
    sampler_name = "renoise"
    extra_roles = ("target",)
    first_index = 1

    @classmethod
    def data_needs(cls, config: ConsistencyConfig) -> DataNeeds:
        return DataNeeds(images=True)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        grid = solver_grid(self.schedule, self.config.solver_steps).to(batch.device)
        n = self.first_index + batch.integers("n", len(grid) - self.first_index)
        t, r = grid[n], grid[n - 1]
        s = grid[(batch.uniform("s") * n).long()]
        x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        teacher = self.teacher(x_t, t, batch)
        x_r = self.schedule.add_noise(teacher.x0, teacher.eps, r)
        with torch.no_grad():
            target = self.jump(self.roles.target(x_r, r, batch.cond), s)
        return {"consistency": pseudo_huber(self.jump(self.student(x_t, t, batch), s) - target, self.config.huber)}

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t): the predicted clean end, exact at t = 0."""
        c_skip, c_out = boundary(self.schedule, prediction.t)
        x_t, x0 = prediction.x_t, prediction.x0
        return per_sample(c_skip, x0) * x_t + per_sample(c_out, x0) * x0

    def after_update(self, player: str) -> None:
        self.average(self.roles.target, self.config.target_ema)


class TCD(LCM):
    """Trajectory consistency distillation: every point maps to every earlier time of its trajectory."""

    summary = "TCD: trajectory consistency distillation, strategic stochastic sampling"
    sampler_name = "tcd"
    # A jump from grid[0] has nowhere to go, and some predictions have no eps at sigma = 0.
    first_index = 2

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t, s) = alpha_s x_0 + sigma_s eps."""
        return self.schedule.add_noise(prediction.x0, prediction.eps, s)
