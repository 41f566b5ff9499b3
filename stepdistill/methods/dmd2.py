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
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.discriminator import Heads
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, Roles, mean_per_sample
from stepdistill.methods.trajectory import TrajectoryRegression
from stepdistill.pipeline.denoiser import Denoiser
from stepdistill.samplers import Sampler

# The critic sees the whole range of noise, short of none at all, where an epsilon has no meaning.
T_FLOOR = 0.001


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


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(D_fake - D_real) / mean|x - D_real|, per sample (DMD eq. 7-8 in x_0 space, as DMD2's code); shapes (B, ...)."""
    return (fake - real) / mean_per_sample((x - real).abs())


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """MSE between what the denoiser emits at ``x_t`` and what it should emit for ``x0``, in its own prediction kind."""
    schedule = denoiser.schedule
    x_t = schedule.add_noise(x0, eps, t)
    target = schedule.from_x0(x0, x_t, t, denoiser.kind)
    return F.mse_loss(denoiser(x_t, t, cond).raw.to(target.dtype), target)


class DMD2(DistillMethod):
    """Distribution matching distillation with a critic on its own clock and multi-step students."""

    Config = DMD2Config
    config: DMD2Config
    summary = "DMD2: distribution matching with a learned critic, backward simulation, optional GAN head"
    players = ("student", "critic")
    extra_roles = ("critic",)

    def __init__(self, config: DMD2Config, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.heads: Heads | None = None
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
        if self.config.gan_weight > 0 and self.heads is None:
            with torch.no_grad():
                features = self.roles.critic.features(batch.latents, self.times(0.5, batch), batch.cond)
            self.heads = Heads([f.shape[1:] for f in features]).to(batch.device)

    def modules(self, player: str) -> list[nn.Module]:
        own = [self.heads] if player == "critic" and self.heads is not None else []
        return super().modules(player) + own

    def extra_modules(self) -> dict[str, nn.Module]:
        return {} if self.heads is None else {"heads": self.heads}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        if batch.step < self.config.regression_steps:
            return self.regression.losses(player, batch)
        return self.student_losses(batch) if player == "student" else self.critic_losses(batch)

    def generate(self, batch: Batch) -> Tensor:
        """x_0 from the student at a random grid position of its own rollout; with graph where grad is enabled."""
        k = batch.integer("k", len(self.sampler.grid()))
        x_t = self.backward_simulation(batch, k)
        return self.student(x_t, self.times(self.sampler.grid()[k].t, batch), batch).x0

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self.generate(batch)
        batch.state["x"] = x.detach()
        t = self.schedule.snap(batch.uniform("dm time", self.config.t_min, self.config.t_max))
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
            real = self.teacher(x_t, t, batch).x0
            fake = self.roles.critic(x_t, t, batch.cond).x0
            gradient = dmd_gradient(x, real, fake)
        losses = {"dm": self.config.dm_weight * surrogate(x, gradient)}
        if self.heads is not None:
            losses["gan"] = self.config.gan_weight * F.softplus(-self.logits(x, batch)).mean()
        return losses

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        if "x" not in batch.state:
            with torch.no_grad():
                batch.state["x"] = self.generate(batch)
        x = batch.state["x"]
        t = self.schedule.snap(batch.uniform("critic time", T_FLOOR, 1.0))
        losses = {"denoising": denoising_loss(self.roles.critic, x, t, batch.noise("critic"), batch.cond)}
        if self.heads is not None:
            fake, real = self.logits(x, batch), self.logits(batch.latents, batch)
            losses["gan"] = self.config.gan_critic_weight * (F.softplus(fake) + F.softplus(-real)).mean()
        return losses

    def logits(self, x0: Tensor, batch: Batch) -> Tensor:
        """Discriminator logits of noised samples, from heads on the critic's features ("diffusion GAN")."""
        t = self.schedule.snap(batch.uniform("gan time", T_FLOOR, 1.0))
        x_t = self.schedule.add_noise(x0, batch.noise("gan"), t)
        return self.heads(self.roles.critic.features(x_t, t, batch.cond))
