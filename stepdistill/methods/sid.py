"""Score identity distillation: SiD (Zhou et al. 2024, "Score identity Distillation"), its guided form SiD-LSG ("Guided
Score identity Distillation", long and short guidance) and its adversarial form SiDA ("Adversarial Score identity
Distillation"); in several steps as in "Few-Step Diffusion via Score identity Distillation" (Zhou et al. 2025).

The student minimises the Fisher divergence between its diffused distribution and the teacher's. With f the denoiser of
the student's own samples, E |r - f|^2 = E (r - f)(r - x), so their difference is free: it corrects for what the critic
does not know, how f moves with the student. Gradients pass through both networks.

    every step:
        critic, on x = the student's sample at a random position of its own rollout:
            minimise the denoising loss of the guided critic                            (kappa_1; 10 % null conditions)
                     [+ w_D GAN loss of heads on its features]                          (SiDA)
        student, on a fresh x = its sample, with graph:
            s ~ U[0.02, 0.98];  x_s = alpha x + sigma eps;  r = teacher(x_s), f = critic(x_s)      (kappa_4; kappa_2,3)
            minimise (r - f) [r - x - A (r - f)] / mean|x - r|  [+ w_G softplus(-heads)]

SiD leaves the critic unguided (kappa_1..3 = 1), LSG guides it like the teacher. Whenever kappa_1 = kappa_2,3 the guided
critic is the denoiser of the student's samples, and the student goes where that equals the *guided* teacher. The loss
itself says nothing about progress: for A = 1 its expectation is 0 for every student.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Prediction
from stepdistill.methods.base import CriticConfig, DataNeeds, DistillMethod, RealConfig
from stepdistill.methods.parts.gan import LatentDiscriminator
from stepdistill.methods.parts.losses import prediction_loss, sid_loss
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import Roles


class SiDConfig(RealConfig, CriticConfig):
    """Keys of ``method`` for SiD."""

    alpha: float = Field(1.2, ge=0, description="A: how much of |r - f|^2 is taken off the cross term; 0.5 to 1.2")
    critic_steps: int = Field(1, ge=1, description="critic updates per student update, each on fresh samples")
    critic_scale: float | None = Field(1.0, description="critic's guidance in the student's loss; null: the teacher's")
    critic_train_scale: float | None = Field(1.0, description="critic's guidance in its own loss; null: the teacher's")
    null_dropout: float = Field(0.0, ge=0, lt=1, description="part of the critic's samples without condition")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the noise in the student's loss")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the noise in the student's loss")
    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN term; 0 needs no images")
    gan_critic_weight: float = Field(0.01, gt=0, description="weight of the discriminator's loss in the critic")
    sampler: Literal["renoise", "ddim"] = Field("renoise", description="how the student moves between steps")


class LSGConfig(SiDConfig):
    """SiD's keys, with the critic guided like the teacher."""

    alpha: float = Field(1.0, ge=0, description=SiDConfig.model_fields["alpha"].description)
    critic_scale: float | None = Field(None, description=SiDConfig.model_fields["critic_scale"].description)
    critic_train_scale: float | None = Field(None, description=SiDConfig.model_fields["critic_train_scale"].description)
    null_dropout: float = Field(0.1, ge=0, lt=1, description=SiDConfig.model_fields["null_dropout"].description)


class SiDAConfig(SiDConfig):
    """SiD's keys, with the adversarial term on."""

    alpha: float = Field(1.0, ge=0, description=SiDConfig.model_fields["alpha"].description)
    gan_weight: float = Field(0.01, ge=0, description=SiDConfig.model_fields["gan_weight"].description)


class SiD(DistillMethod):
    """Score identity distillation of multi-step students."""

    Config = SiDConfig
    config: SiDConfig
    name = "sid"
    family = "Score identity"
    paper = "SiD, Zhou et al. 2024"
    summary = "SiD: score identity distillation, gradients through teacher and critic"
    players = ("critic", "student")
    extra_roles = ("critic",)
    trains_grid = True

    def __init__(self, config: SiDConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = LatentDiscriminator(roles.critic, shift=config.time_shift) if config.gan_weight > 0 else None

    @classmethod
    def data_needs(cls, config: SiDConfig) -> DataNeeds:
        return config.real_needs() if config.gan_weight > 0 else DataNeeds()

    @classmethod
    def may_start_lower(cls, config: SiDConfig) -> bool:
        return True

    @classmethod
    def sampler_of(cls, config: SiDConfig) -> str:
        return config.sampler

    def turns(self, step: int) -> Sequence[str]:
        return ("critic",) * self.config.critic_steps + ("student",)

    def prepare(self, batch: Batch) -> None:
        if self.gan:
            self.gan.build(batch)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) + ([self.gan.heads] if self.gan and player == "critic" else [])

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"heads": self.gan.heads} if self.gan else {}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        return self.student_losses(batch) if player == "student" else self.critic_losses(batch)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self.generate(batch)
        config = self.config
        t = uniform_times(batch, "identity time", self.schedule, config.t_min, config.t_max, config.time_shift)
        x_t = self.schedule.add_noise(x, batch.noise("identity"), t)
        real = self.guided(self.roles.teacher, x_t, t, batch, self.roles.scale).x0
        fake = self.guided(self.roles.critic, x_t, t, batch, self.config.critic_scale).x0
        losses = {"identity": sid_loss(x, real, fake, self.config.alpha)}
        if self.gan:
            losses["gan"] = self.config.gan_weight * self.gan.student_loss(x, batch)
        return losses

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.but(cond=batch.partly_empty("null", self.config.null_dropout)[0])
        with torch.no_grad():
            x = self.generate(batch)
        t = uniform_times(batch, "critic time", self.schedule, shift=self.config.time_shift)
        x_t = self.schedule.add_noise(x, batch.noise("critic"), t)
        fake = self.guided(self.roles.critic, x_t, t, batch, self.config.critic_train_scale)
        losses = {"denoising": prediction_loss(fake, x)}
        if self.gan:
            losses["gan"] = self.config.gan_critic_weight * self.gan.loss_of_heads(x, batch.latents, batch)
        return losses

    def guided(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, batch: Batch, scale: float | None) -> Prediction:
        """Teacher or critic under guidance, with graph back to ``x_t``; a scale of None is the teacher's."""
        return guided(denoiser, x_t, t, batch.cond, batch.null, self.roles.scale if scale is None else scale)


class SiDLSG(SiD):
    """SiD with guidance in the teacher, the critic and the critic's training."""

    Config = LSGConfig
    name = "sid-lsg"
    family = "Score identity"
    paper = "SiD-LSG, Zhou et al. 2024"
    summary = "SiD-LSG: score identity distillation with the critic guided too (long and short guidance)"
    guides_both = True


class SiDA(SiD):
    """SiD with a GAN term on the critic's features of real and generated samples."""

    Config = SiDAConfig
    name = "sida"
    family = "Score identity"
    paper = "SiDA, Zhou et al. 2024"
    summary = "SiDA: score identity distillation with an adversarial term on the critic's features"
