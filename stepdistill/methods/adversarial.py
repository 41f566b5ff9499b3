"""Adversarial distillation: LADD (Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial
Diffusion Distillation") and ADD (Sauer et al. 2023, "Adversarial Diffusion Distillation").

    every step:
        s ~ the n times of the student, with probabilities
            p = [.7, .1, .1, .1]   (n = 4; the noise end has .7, the others share the rest)
            p = [0, 0, .5, .5]     in the first ``warmup`` steps: the cleaner half alone
        x_s = alpha x_0 + sigma eps  (x_0 real), or the student's own rollout to s;  x_s = eps at the noise end
        x = student(x_s, s).x0
        student:
            minimise GAN loss(x)  +  lambda c(t) |x - sg D_teacher(x_t)|^2,   c = alpha_t,  t ~ U[0.02, 0.98]
        discriminator, on sg(x):
            minimise hinge( heads(x), heads(x_0) )  +  r1/2 |d heads/d features|^2

    LADD:  heads on the frozen teacher's features of x_u, which get u and the pooled condition,
           ln(sigma/alpha)(u) ~ N(m, s^2);  lambda = 0
    ADD:   heads on a frozen image network's features of the decoded x, which get the pooled condition;  lambda = 2.5

At the noise end x_s has nothing of x_0, as at inference. A table that ends short of pure noise (Stable Diffusion's has
alpha = .068) would leave each image's brightness readable: the mean over 128 x 128 latent pixels has noise of 1/128
alone. Samples of one batch may have different student times where they start from data; a rollout has one for all.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.samplers import Sampler
from stepdistill.methods.base import DataNeeds, DistillMethod, RealConfig
from stepdistill.methods.parts.gan import Discriminator, LatentDiscriminator, PixelDiscriminator
from stepdistill.methods.parts.losses import GanLoss
from stepdistill.methods.parts.times import normal_log_snr_times, uniform_times
from stepdistill.roles import Roles


class AdversarialConfig(RealConfig):
    """Keys of ``method`` that LADD and ADD share."""

    inputs: Literal["data", "rollout"] = Field(
        "data", description="what the student denoises: noised real samples, or its own rollout from noise"
    )
    gan: GanLoss = Field("hinge", description="the GAN loss: hinge, or softplus (non-saturating)")
    gan_weight: float = Field(1.0, gt=0, description="weight of the student's GAN term")
    r1: float = Field(0.0, ge=0, description="weight of the gradient penalty on the heads' input; 0 is off")
    distill_weight: float = Field(0.0, ge=0, description="lambda: weight of the distance to the teacher's guess")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the noise in the distance")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the noise in the distance")
    discriminator_steps: int = Field(1, ge=1, description="discriminator updates per student update, on its samples")
    sampler: Literal["renoise", "ddim"] = Field("renoise", description="how the student moves between steps")
    first_share: float = Field(
        0.7, gt=0, le=1, description="share of the student's first time; the others share the rest"
    )
    warmup: int = Field(0, ge=0, description="first steps, of the cleaner half of the student's times alone")


class LADDConfig(AdversarialConfig):
    """Keys of ``method`` for LADD."""

    noise_mean: float = Field(1.0, description="m: mean of ln(sigma/alpha) of what the discriminator sees")
    noise_std: float = Field(1.0, gt=0, description="s: its standard deviation")
    depths: int | None = Field(
        None, ge=1, description="heads, on evenly spaced blocks of the teacher; null: on every block, as in the paper"
    )


class ADDConfig(AdversarialConfig):
    """Keys of ``method`` for ADD."""

    distill_weight: float = Field(2.5, ge=0, description=AdversarialConfig.model_fields["distill_weight"].description)
    r1: float = Field(1e-5, ge=0, description=AdversarialConfig.model_fields["r1"].description)
    features: str = Field(
        "efficientnet-lite2",
        description="the image network that is read: efficientnet-lite2, or a transformers vision model, folder or id",
    )
    resolution: int = Field(224, gt=0, description="side in pixels to which images are resized for it")


class StudentAndHeads(DistillMethod):
    """A student, and heads of a discriminator as a player of their own, which look at the student's last samples.

    ``gan`` is the discriminator; the student's turn leaves its samples in ``batch.state["x"]``.
    """

    players = ("student", "discriminator")
    gan: Discriminator

    def prepare(self, batch: Batch) -> None:
        self.gan.build(batch)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) if player == "student" else [self.gan.heads]

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"heads": self.gan.heads}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        if player == "student":
            return self.student_losses(batch)
        return {"gan": self.gan.loss_of_heads(batch.state["x"], batch.latents, batch)}

    @abstractmethod
    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The student's loss terms."""


class LADD(StudentAndHeads):
    """Latent adversarial diffusion distillation: the teacher itself, frozen, is the discriminator's eye."""

    Config = LADDConfig
    config: LADDConfig
    name = "ladd"
    family = "Adversarial"
    paper = "LADD, Sauer et al. 2024"
    summary = "LADD: adversarial distillation, discriminator heads on the frozen teacher's features"

    def __init__(self, config: LADDConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.gan = self.discriminator()

    @classmethod
    def data_needs(cls, config: AdversarialConfig) -> DataNeeds:
        return config.real_needs()

    @classmethod
    def problems(cls, config: AdversarialConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        if config.warmup >= train_steps:
            yield "method.warmup", f"expected below train.steps ({train_steps}), found {config.warmup}"

    @classmethod
    def may_start_lower(cls, config: AdversarialConfig) -> bool:
        return True  # at its first time it sees noise alone, as at inference

    @classmethod
    def sampler_of(cls, config: AdversarialConfig) -> str:
        return config.sampler

    def discriminator(self) -> Discriminator:
        """The part that tells samples from real ones."""
        config, teacher = self.config, self.roles.teacher
        return LatentDiscriminator(teacher, self.noise_times, config.gan, config.r1, True, config.depths)

    def noise_times(self, batch: Batch, name: str) -> Tensor:
        return normal_log_snr_times(batch, name, self.schedule, self.config.noise_mean, self.config.noise_std)

    def turns(self, step: int) -> Sequence[str]:
        return ("student",) + ("discriminator",) * self.config.discriminator_steps

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self.continue_rollout(batch) if self.config.inputs == "rollout" else self.denoise_data(batch)
        batch.state["x"] = x.detach()
        losses = {"gan": self.config.gan_weight * self.gan.student_loss(x, batch)}
        if self.config.distill_weight:
            losses["distill"] = self.config.distill_weight * self.distance(x, batch)
        return losses

    def shares(self, step: int) -> list[float]:
        """The probability of each of the student's times, noise end first, at a training step."""
        count = len(self.sampler.grid())
        if count == 1:
            return [1.0]
        if step < self.config.warmup:
            cleaner = count // 2
            return [0.0] * (count - cleaner) + [1 / cleaner] * cleaner
        return [self.config.first_share] + [(1 - self.config.first_share) / (count - 1)] * (count - 1)

    def continue_rollout(self, batch: Batch) -> Tensor:
        """The student's x_0 at one of its times for the whole batch, reached by its own steps."""
        return self.generate(batch, batch.pick("k", self.shares(batch.step)))

    def denoise_data(self, batch: Batch) -> Tensor:
        """The student's x_0 of real samples, each noised to one of its times; of noise alone at the noise end."""
        times, noise = [step.t for step in self.sampler.grid()], batch.noise("start")
        t = batch.picks("start time", times, self.shares(batch.step))
        pure = (t == times[0]).reshape(-1, *[1] * (noise.ndim - 1))
        x_t = torch.where(pure, noise, self.schedule.add_noise(batch.latents, noise, t))
        return self.student(x_t, t, batch).x0

    def distance(self, x: Tensor, batch: Batch) -> Tensor:
        """c(t) times the mean squared distance to what the guided teacher makes of the re-noised sample."""
        t = uniform_times(batch, "distill time", self.schedule, self.config.t_min, self.config.t_max)
        x_t = self.schedule.add_noise(x.detach(), batch.noise("distill"), t)
        target = self.teacher(x_t, t, batch).x0
        return (self.schedule.alpha(t).to(x) * (x - target).square().flatten(1).mean(1)).mean()


class ADD(LADD):
    """Adversarial diffusion distillation: a frozen image network looks at decoded samples."""

    Config = ADDConfig
    config: ADDConfig
    gan: PixelDiscriminator
    name = "add"
    family = "Adversarial"
    paper = "ADD, Sauer et al. 2023"
    summary = "ADD: adversarial distillation in pixels, with a distance to the teacher's guess"

    def discriminator(self) -> PixelDiscriminator:
        config = self.config
        return PixelDiscriminator(self.roles.decode, config.features, config.resolution, config.gan, config.r1, True)

    def at_size(self, sampler: Sampler, call: Denoiser, decode: Callable[[Tensor], Tensor] | None) -> None:
        super().at_size(sampler, call, decode)
        self.gan.decode = decode
