"""Flash Diffusion (Chadebec et al. 2024, "Flash Diffusion: Accelerating Any Conditional Diffusion Model for Few Steps
Image Generation"): regression on the end of the teacher's path, then distribution matching and a GAN, stage by stage.

    grid of N times from noise, t_0 = 1 > .. > t_{N-1}, and the clean end
    every step:
        n ~ four Gaussians on the grid at 0, N/4, N/2, 3N/4, with probabilities by stage; the same for the batch
        x_t = alpha y + sigma eps at t_n, y real;  noise alone at n = 0
        x   = student(x_t, t_n).x0
        student:  minimise d(x, sg(end))  +  w_dm DM(x)  +  w_G GAN(x)
            end: the guided teacher's DPM-Solver++(2M) from the same x_t through t_{n+1}, .., to the clean end
            DM: as in DMD2, its fake score the student's own, without graph;  no critic
        heads, on sg(x) and y:  minimise their loss on the frozen teacher's states at t in {.01, .25, .5, .75}
    stage                 1         2               3               4
    probabilities   .5 .5 0 0   .1 .3 .3 .3   .25 .25 .25 .25   .25 .25 .25 .25
    w_dm                  0        .3              .5              .7
    w_G                   0        .1              .2              .3

A few-step student is no denoiser, and its own score says less than a critic's would: the end of the path is no zero of
DM(x), which pushes samples outwards. Weights of 1 and more are not the paper's.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler, dpm_solver_step, solver_grid
from stepdistill.errors import InputError
from stepdistill.methods.adversarial import StudentAndHeads
from stepdistill.methods.base import DataNeeds, RealConfig
from stepdistill.methods.parts.gan import LatentDiscriminator
from stepdistill.methods.parts.losses import GanLoss, dmd_gradient, latent_distance, surrogate
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import Roles

MODES = ((0.5, 0.5, 0.0, 0.0), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.25,) * 4)
VARIANCE = 0.5
GAN_TIMES = (0.01, 0.25, 0.5, 0.75)


class FlashDiffusionConfig(RealConfig):
    """Keys of ``method`` for Flash Diffusion."""

    solver_steps: int = Field(32, ge=4, description="N: DPM-Solver++ steps of the teacher's whole path")
    stage_steps: int = Field(5000, ge=1, description="training steps of each of the first three stages")
    dm_weights: list[NonNegativeFloat] = Field(
        [0.0, 0.3, 0.5, 0.7], min_length=4, max_length=4, description="w_dm of each stage"
    )
    gan_weights: list[NonNegativeFloat] = Field(
        [0.0, 0.1, 0.2, 0.3], min_length=4, max_length=4, description="w_G of each stage"
    )
    guidance_range: list[NonNegativeFloat] | None = Field(
        None, min_length=2, max_length=2, description="w of each sample is uniform between; null: the teacher's scale"
    )
    metric: Literal["l2", "features"] = Field(
        "l2", description="distance to the path's end; features: l2, and that of the teacher's hidden states"
    )
    gan: GanLoss = Field("hinge", description="the GAN loss: hinge, or softplus (non-saturating)")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the distribution-matching noise")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the distribution-matching noise")


class FlashDiffusion(StudentAndHeads):
    """Regression on ends of the teacher's path, with distribution matching and a GAN that grow by stages."""

    Config = FlashDiffusionConfig
    config: FlashDiffusionConfig
    name = "flash-diffusion"
    family = "Trajectory regression"
    paper = "Flash Diffusion, Chadebec et al. 2024"
    summary = "Flash Diffusion: regression on the end of the teacher's path, matching and a GAN by stages"

    def __init__(self, config: FlashDiffusionConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = LatentDiscriminator(roles.teacher, self.gan_times, config.gan, conditional=True)

    @classmethod
    def data_needs(cls, config: FlashDiffusionConfig) -> DataNeeds:
        return config.real_needs()

    def stage(self, step: int) -> int:
        """The stage of a training step, from 0."""
        return min(step // self.config.stage_steps, len(MODES) - 1)

    def turns(self, step: int) -> Sequence[str]:
        return ("student", "discriminator") if self.config.gan_weights[self.stage(step)] else ("student",)

    def prepare(self, batch: Batch) -> None:
        if self.config.guidance_range is not None and batch.null is None:
            raise InputError("method.guidance_range: expected null for a pipeline without guidance, found a range")
        super().prepare(batch)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        stage, grid = self.stage(batch.step), solver_grid(self.schedule, self.config.solver_steps).flip(0).tolist()
        n = batch.pick("n", start_shares(stage, self.config.solver_steps))
        t, noise = self.times(grid[n], batch), batch.noise("start")
        x_t = self.schedule.add_noise(batch.latents, noise, t) if n else noise
        x = self.student(x_t, t, batch).x0
        batch.state["x"] = x.detach()
        end = self.end(x_t, grid[n:], batch)
        losses = {"distill": F.mse_loss(x, end)}
        if self.config.metric == "features":
            losses["features"] = latent_distance(self.roles.teacher, x, end, batch.cond, batch)
        if weight := self.config.dm_weights[stage]:
            losses["dm"] = weight * surrogate(x, self.gradient(x.detach(), batch))
        if weight := self.config.gan_weights[stage]:
            losses["gan"] = weight * self.gan.student_loss(x, batch)
        return losses

    @torch.no_grad()
    def end(self, x: Tensor, times: Sequence[float], batch: Batch) -> Tensor:
        """Where the guided teacher's path through descending ``times`` ends, from ``x`` (B, ...) at the first."""
        scale, previous = self.guidance(batch, "path guidance"), None
        for t, r in zip(times, [*times[1:-1], None], strict=False):
            current = self.teacher(x, self.times(t, batch), batch, scale)
            x = dpm_solver_step(current, previous, None if r is None else self.times(r, batch))
            previous = current
        return x

    @torch.no_grad()
    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        """DMD's gradient at the student's samples ``x`` (B, ...), who is its own critic."""
        t = uniform_times(batch, "dm time", self.schedule, self.config.t_min, self.config.t_max)
        x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
        real = self.teacher(x_t, t, batch, self.guidance(batch, "dm guidance"))
        return dmd_gradient(x, real.x0, self.student(x_t, t, batch).x0)

    def guidance(self, batch: Batch, name: str) -> float | Tensor:
        """w: the recipe's, or one per sample (B,)."""
        ends = self.config.guidance_range
        return self.roles.scale if ends is None else batch.uniform(name, *ends)

    def gan_times(self, batch: Batch, name: str) -> Tensor:
        """Times (B,) at which the heads look at samples."""
        return self.schedule.snap(batch.picks(name, GAN_TIMES, [1.0] * len(GAN_TIMES)))


def start_shares(stage: int, count: int) -> list[float]:
    """The probability of each of ``count`` places of the grid, noise end first, in a stage from 0."""
    places = torch.arange(count, dtype=torch.float64)[:, None]
    modes = torch.arange(len(MODES[stage]), dtype=torch.float64) * count / len(MODES[stage])
    bumps = (-((places - modes) ** 2) / (2 * VARIANCE)).exp()
    return (bumps / bumps.sum(0) @ torch.tensor(MODES[stage], dtype=torch.float64)).tolist()
