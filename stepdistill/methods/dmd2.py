"""DMD2: distribution matching with a learned fake score (Yin et al. 2024, "Improved Distribution Matching
Distillation"), and what was built on it: f-distill's divergences (Xu et al. 2025) and Decoupled DMD (Liu et al. 2025,
"CFG Augmentation as the Spear, Distribution Matching as the Shield").

    every step:
        k ~ U{0..K-1}, the same for the whole batch
        x_t = student's own rollout from noise to t_k                       (backward simulation, no graph)
        x   = student(x_t, t_k).x0
        student, every ``critic_steps``-th step:
            s ~ U[0.02, 0.98];  x_s = alpha x + sigma eps
            g = (D_fake(x_s) - D_real(x_s)) / mean|x - D_real(x_s)|         (per sample)
            f-distill:   g <- h(r) g,   r = exp(head(critic features of x_s)); r and h with mean 1
            minimise 1/2 |x - sg(x - g)|^2  +  w_G softplus(-head(critic features of x_s'))
        critic, every step, on sg(x):
            minimise its denoising loss  +  w_D [softplus(head(fake)) + softplus(-head(real))]

    Decoupled DMD:   D_fake - D_w = (D_fake - D_cond) - (w - 1) (D_cond - D_uncond),  each part at times of its own:
        matching:        s ~ U[0.02, 0.98]    whatever k;  times mu
        augmentation:    u ~ U[0.02, t_k]     guidance for what the student has yet to decide at t_k
    mu = 0 is classifier score distillation (Yu et al. 2023): no critic, and a drift to where guidance adds nothing.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import per_sample
from stepdistill.methods.base import DataNeeds, RealConfig
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.divergence import Divergence, RatioWeight
from stepdistill.methods.parts.gan import LatentDiscriminator
from stepdistill.methods.parts.losses import dmd_gradient
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import Roles


class DMD2Config(RealConfig, MatchingConfig):
    """Keys of ``method`` for DMD2."""

    critic_steps: int = Field(5, ge=1, description="critic updates per student update (two time scales)")
    dm_weight: float = Field(
        1.0, ge=0, description="weight of the distribution-matching term; 0 costs no pass of the teacher"
    )
    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN term; 0 needs no images")
    gan_critic_weight: float = Field(0.01, gt=0, description="weight of the discriminator's loss in the critic")
    divergence: Divergence = Field("reverse-kl", description="what is minimised; all others need gan_weight")

    @field_validator("divergence")
    @classmethod
    def _has_a_ratio(cls, divergence: Divergence, info: ValidationInfo) -> Divergence:
        if divergence != "reverse-kl" and not info.data.get("gan_weight"):
            raise ValueError("expected 'reverse-kl', or method.gan_weight above 0, whose head estimates the ratio")
        return divergence

    @model_validator(mode="after")
    def _has_a_loss(self) -> "DMD2Config":
        if not self.dm_weight and not self.gan_weight:
            raise ValueError("expected dm_weight or gan_weight above 0, got 0 for both")
        return self


class DMD2(DistributionMatching):
    """Distribution matching distillation with a critic on its own clock and multi-step students."""

    Config = DMD2Config
    config: DMD2Config
    name = "dmd2"
    family = "Distribution matching"
    paper = "DMD2, Yin et al. 2024"
    summary = "DMD2: distribution matching with a learned critic, backward simulation, optional GAN head"

    def __init__(self, config: DMD2Config, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = LatentDiscriminator(roles.critic, shift=config.time_shift) if config.gan_weight > 0 else None
        self.ratio = RatioWeight(config.divergence) if config.divergence != "reverse-kl" else None

    @classmethod
    def data_needs(cls, config: DMD2Config) -> DataNeeds:
        return config.real_needs() if config.gan_weight > 0 else DataNeeds()

    def prepare(self, batch: Batch) -> None:
        if self.gan:
            self.gan.build(batch)
        if self.ratio:
            self.ratio.to(batch.device)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) + ([self.gan.heads] if self.gan and player == "critic" else [])

    def extra_modules(self) -> dict[str, nn.Module]:
        return ({"heads": self.gan.heads} if self.gan else {}) | ({"ratio": self.ratio} if self.ratio else {})

    def sample_losses(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        losses = {}
        if self.config.dm_weight:
            losses["dm"] = self.config.dm_weight * super().sample_losses(x, batch)["dm"]
        if self.gan:
            losses["gan"] = self.config.gan_weight * self.gan.student_loss(x, batch)
        return losses

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().critic_losses(batch)
        if self.gan:
            heads = self.gan.loss_of_heads(batch.state["x"], batch.latents, batch)
            losses["gan"] = self.config.gan_critic_weight * heads
        return losses

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        return self.matching(x, batch, self.roles.scale)

    def matching(self, x: Tensor, batch: Batch, scale: float) -> Tensor:
        """The gradient between the teacher under guidance ``scale`` and the critic, weighted by the divergence."""
        t = self.matching_times(batch)
        x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
        real = self.real(x_t, t, batch, scale)
        fake = self.roles.critic(x_t, t, batch.cond).x0
        gradient = self.difference(x, real, fake, batch)
        if self.ratio and self.gan:
            logit = self.gan.heads(self.roles.critic.features(x_t, t, batch.cond)).mean(1)
            gradient = per_sample(self.ratio(logit, t), x) * gradient
        return gradient

    def real(self, x_t: Tensor, t: Tensor, batch: Batch, scale: float) -> Tensor:
        """The real score's guess of x_0 (B, ...) under guidance ``scale``."""
        return self.teacher(x_t, t, batch, scale).x0

    def difference(self, x: Tensor, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        """The gradient from the two scores' guesses of x_0."""
        return dmd_gradient(x, real, fake)

    def statistics(self) -> list[Tensor]:
        return [self.ratio.seen] if self.ratio else []

    def after_update(self, player: str) -> None:
        if self.ratio and player == "student":
            self.ratio.update()


class FDistillConfig(DMD2Config):
    """Keys of ``method`` for f-distill."""

    gan_weight: float = Field(1e-3, gt=0, description="weight of the student's GAN term")
    divergence: Divergence = Field("jensen-shannon", description="what is minimised")


class FDistill(DMD2):
    """DMD2 with another divergence than the mode-seeking reverse KL."""

    Config = FDistillConfig
    name = "f-distill"
    family = "Distribution matching"
    paper = "f-distill, Xu et al. 2025"
    summary = "f-distill: DMD2 under any f-divergence, its density ratio read off the GAN head"


class DecoupledDMDConfig(DMD2Config):
    """Keys of ``method`` for Decoupled DMD."""

    matching_weight: float = Field(1.0, ge=0, description="mu: weight of matching beside guidance; 0 needs no critic")


class DecoupledDMD(DMD2):
    """DMD2 whose guidance acts only below the noise that the student still sees."""

    Config = DecoupledDMDConfig
    config: DecoupledDMDConfig
    name = "decoupled-dmd"
    family = "Distribution matching"
    paper = "Decoupled DMD, Liu et al. 2025"
    summary = "Decoupled DMD: DMD2 with guidance and distribution matching at noise times of their own"
    guides_itself = True

    def turns(self, step: int) -> Sequence[str]:
        critic_is_read = self.config.matching_weight or self.gan
        return super().turns(step) if critic_is_read or step < self.config.regression_steps else ("student",)

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        weight, guidance = self.config.matching_weight, self.roles.scale - 1
        gradient = weight * self.matching(x, batch, 1.0) if weight else torch.zeros_like(x)
        return gradient + guidance * self.augmentation(x, batch) if guidance else gradient

    def augmentation(self, x: Tensor, batch: Batch) -> Tensor:
        """(D_uncond - D_cond) / mean|x - D_cond| of the teacher; the paper counts time from noise: its tau > t."""
        grid = self.sampler.grid()
        now = grid[batch.integer("k", len(grid))].t
        highest, shift = min(now, self.config.t_max), self.config.time_shift
        t = uniform_times(batch, "augmentation time", self.schedule, self.config.t_min, highest, shift)
        x_t = self.schedule.add_noise(x, batch.noise("augmentation"), t)
        cond = self.teacher(x_t, t, batch, 1.0).x0
        uncond = self.roles.teacher(x_t, t, batch.empty).x0
        return dmd_gradient(x, cond, uncond)
