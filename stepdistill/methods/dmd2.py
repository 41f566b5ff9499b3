"""DMD2: distribution matching with a learned fake score (Yin et al. 2024, "Improved Distribution Matching
Distillation"), building on DMD (Yin et al. 2023).

    every step:
        k ~ U{0..K-1}, the same for the whole batch
        x_t = student's own rollout from noise to t_k                       (backward simulation, no graph)
        x   = student(x_t, t_k).x0
        student, every ``critic_steps``-th step:
            s ~ U[0.02, 0.98];  x_s = alpha x + sigma eps
            g = (D_fake(x_s) - D_real(x_s)) / mean|x - D_real(x_s)|         (per sample)
            minimise 1/2 |x - sg(x - g)|^2  +  w_G softplus(-head(critic features of x_s'))
        critic, every step, on sg(x):
            minimise its denoising loss  +  w_D [softplus(head(fake)) + softplus(-head(real))]
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, Roles
from stepdistill.methods.gan import LatentDiscriminator
from stepdistill.methods.losses import denoising_loss, dmd_gradient, surrogate
from stepdistill.methods.times import uniform_times
from stepdistill.methods.trajectory import TrajectoryRegression
from stepdistill.samplers import Sampler


class DMD2Config(MethodConfig):
    """Keys of ``method`` for DMD2."""

    critic_steps: int = Field(5, ge=1, description="critic updates per student update (two time scales)")
    critic_warmup: int = Field(0, ge=0, description="first steps in which the critic moves alone")
    regression_steps: int = Field(0, ge=0, description="first steps of trajectory regression instead of DMD2")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the distribution-matching noise")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the distribution-matching noise")
    dm_weight: float = Field(1.0, ge=0, description="weight of the distribution-matching term")
    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN term; 0 needs no images")
    gan_critic_weight: float = Field(0.01, gt=0, description="weight of the discriminator's loss in the critic")
    sampler: Literal["renoise", "ddim"] = Field("renoise", description="how the student moves between steps")


class DMD2(DistillMethod):
    """Distribution matching distillation with a critic on its own clock and multi-step students."""

    Config = DMD2Config
    config: DMD2Config
    summary = "DMD2: distribution matching with a learned critic, backward simulation, optional GAN head"
    players = ("student", "critic")
    extra_roles = ("critic",)

    def __init__(self, config: DMD2Config, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = LatentDiscriminator(roles.critic) if config.gan_weight > 0 else None
        self.regression = TrajectoryRegression(TrajectoryRegression.Config(), roles, sampler)

    @classmethod
    def data_needs(cls, config: DMD2Config) -> DataNeeds:
        return DataNeeds(images=config.gan_weight > 0)

    @classmethod
    def sampler_of(cls, config: DMD2Config) -> str:
        return config.sampler

    def turns(self, step: int) -> Sequence[str]:
        step -= self.config.regression_steps
        if step < 0:
            return self.regression.turns(step)
        step -= self.config.critic_warmup
        return ("student", "critic") if step >= 0 and step % self.config.critic_steps == 0 else ("critic",)

    def prepare(self, batch: Batch) -> None:
        if self.gan:
            self.gan.build(batch)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) + ([self.gan.heads] if self.gan and player == "critic" else [])

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"heads": self.gan.heads} if self.gan else {}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        if batch.step < self.config.regression_steps:
            return self.regression.losses(player, batch)
        return self.student_losses(batch) if player == "student" else self.critic_losses(batch)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self.generate(batch)
        batch.state["x"] = x.detach()
        t = uniform_times(batch, "dm time", self.schedule, self.config.t_min, self.config.t_max)
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
            real = self.teacher(x_t, t, batch).x0
            fake = self.roles.critic(x_t, t, batch.cond).x0
            gradient = dmd_gradient(x, real, fake)
        losses = {"dm": self.config.dm_weight * surrogate(x, gradient)}
        if self.gan:
            losses["gan"] = self.config.gan_weight * self.gan.student_loss(x, batch)
        return losses

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        if "x" not in batch.state:
            with torch.no_grad():
                batch.state["x"] = self.generate(batch)
        x = batch.state["x"]
        t = uniform_times(batch, "critic time", self.schedule)
        losses = {"denoising": denoising_loss(self.roles.critic, x, t, batch.noise("critic"), batch.cond)}
        if self.gan:
            losses["gan"] = self.config.gan_critic_weight * self.gan.loss_of_heads(x, batch.latents, batch)
        return losses
