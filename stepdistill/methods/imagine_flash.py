"""Imagine Flash (Kohler et al. 2024, "Imagine Flash: Accelerating Emu Diffusion Models with Backward Distillation"):
the student is corrected at its own points, in structure at first and in detail at last, and sees no noised data.

    every step:
        k ~ U{0..K-1}, the same for the whole batch
        x_t = student's own rollout from noise to t_k                       (backward distillation, no graph)
        x   = student(x_t, t_k).x0
        u ~ U[r, t_k], r the end of the student's step;  s = S(u) = S(0) + (S(1) - S(0)) u      (shifted reconstruction)
        y   = the guided teacher's n DDIM steps from alpha_s x + sigma_s eps to the clean end
        student:  minimise |x - sg(y)|^2  +  w_G GAN(x)
        heads, on sg(x) and real samples:  minimise their loss on the frozen teacher's states at t ~ U[0, 1]

S rises: early steps are renoised far, so that the teacher says what the picture should be, and late ones a little. A
teacher that looks at x through noise draws it to the mean, also where x is right: E[x - y] = (1 - alpha mu)(x - m) on a
Gaussian of mean m, mu the slope of the n steps. A lower S and more steps weaken that; only the GAN holds against it. At
w_G = 0, which needs no images, samples narrow for as long as one trains.

The paper's S and its adversarial term were not at hand; a line is the simplest S that rises. Its noise correction of
the first step is ``stepdistill sample --rule noise-correction``.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler, Step
from stepdistill.methods.adversarial import StudentAndHeads
from stepdistill.methods.base import DataNeeds, RealConfig
from stepdistill.methods.parts.gan import LatentDiscriminator
from stepdistill.methods.parts.losses import GanLoss
from stepdistill.roles import Roles


class ImagineFlashConfig(RealConfig):
    """Keys of ``method`` for Imagine Flash."""

    teacher_steps: int = Field(4, ge=1, description="n: DDIM steps of the teacher; guidance makes one two evaluations")
    shift_low: float = Field(0.02, gt=0, lt=1, description="S(0): where samples of the clean end are renoised to")
    shift_high: float = Field(0.6, gt=0, lt=1, description="S(1): where samples of the noise end are renoised to")
    gan: GanLoss = Field("hinge", description="the GAN loss: hinge, or softplus (non-saturating)")
    gan_weight: float = Field(0.0, ge=0, description="w_G: weight of the student's GAN term; 0 needs no images")
    sampler: Literal["ddim", "renoise"] = Field("ddim", description="how the student moves between steps")


class ImagineFlash(StudentAndHeads):
    """Backward distillation with shifted reconstruction, from conditions alone and without a critic."""

    Config = ImagineFlashConfig
    config: ImagineFlashConfig
    name = "imagine-flash"
    family = "Trajectory regression"
    paper = "Imagine Flash, Kohler et al. 2024"
    summary = "Imagine Flash: the student's own samples, renoised, and what the teacher makes of them"
    sampler_name = "ddim"
    trains_grid = True

    def __init__(self, config: ImagineFlashConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = LatentDiscriminator(roles.teacher, loss=config.gan, conditional=True)

    @classmethod
    def data_needs(cls, config: ImagineFlashConfig) -> DataNeeds:
        return config.real_needs() if config.gan_weight else DataNeeds()

    @classmethod
    def sampler_of(cls, config: ImagineFlashConfig) -> str:
        return config.sampler

    @classmethod
    def may_start_lower(cls, config: ImagineFlashConfig) -> bool:
        return True  # what it learns from are its own samples

    def turns(self, step: int) -> Sequence[str]:
        return self.players if self.config.gan_weight else ("student",)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        grid = self.sampler.grid()
        k = batch.integer("k", len(grid))
        x = self.student_step(self.backward_simulation(batch, k), Step(grid[k].t, None), batch).x0
        batch.state["x"] = x.detach()
        losses = {"reconstruction": F.mse_loss(x, self.reconstructed(x.detach(), grid[k], batch))}
        if self.config.gan_weight:
            losses["gan"] = self.config.gan_weight * self.gan.student_loss(x, batch)
        return losses

    def shifted(self, step: Step, batch: Batch) -> Tensor:
        """S(u) (B,) for u in the student's step."""
        low, high = self.config.shift_low, self.config.shift_high
        return self.schedule.snap(low + (high - low) * batch.uniform("shifted time", step.r or 0.0, step.t))

    @torch.no_grad()
    def reconstructed(self, x: Tensor, step: Step, batch: Batch) -> Tensor:
        """y (B, ...): what the teacher makes of the student's samples ``x`` (B, ...), renoised."""
        start = self.shifted(step, batch)
        s, x_s = start, self.schedule.add_noise(x, batch.noise("renoise"), start)
        for share in torch.arange(1, self.config.teacher_steps, device=start.device) / self.config.teacher_steps:
            prediction = self.teacher(x_s, s, batch)
            s = self.schedule.between(start, torch.zeros_like(start), share)
            x_s = self.schedule.add_noise(prediction.x0, prediction.eps, s)
        return self.teacher(x_s, s, batch).x0
