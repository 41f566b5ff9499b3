"""Distillation by plain score differences: VSD as SwiftBrush uses it (Nguyen & Tran 2023), PG-SB (SNOOPI, Nguyen et
al. 2024), and Diff-Instruct (Luo et al. 2023), the first of them.

    every step:   x = student(x_t, t_k).x0;  x_s = alpha x + sigma eps
        VSD:            s ~ U[0.02, 0.98]
                        g = sigma^2 (eps_real,w(x_s) - eps_fake,w(x_s))     both under guidance w
        PG-SB:          the same with w ~ U[2, 5] for each sample
        Diff-Instruct:  ln(sigma/alpha) ~ N(-1.2, 1.2^2);  g = D_fake(x_s) - D_real(x_s)
        student:  minimise 1/2 |x - sg(x - g)|^2
        critic, on sg(x):  minimise its denoising loss;  VSD, PG-SB: a LoRA on the teacher, one condition in ten empty

Guidance on both scores cancels where student and teacher agree: the data are a fixed point at any w, which they are not
for DMD2 and Diff-Instruct with guidance on the teacher alone. It shapes the way there, not the end.
"""

import math
from typing import Literal

from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import per_sample
from stepdistill.errors import InputError
from stepdistill.methods.base import CriticConfig
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.times import normal_log_snr_times


class VSDConfig(MatchingConfig):
    """Keys of ``method`` for VSD."""

    critic: Literal["lora", "full"] | None = Field("lora", description=CriticConfig.model_fields["critic"].description)
    critic_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty conditions in the critic's training")
    guidance_range: list[NonNegativeFloat] | None = Field(
        None, min_length=2, max_length=2, description="w of each sample is uniform between; null: the teacher's scale"
    )

    @field_validator("guidance_range")
    @classmethod
    def _ascending(cls, ends: list[float] | None) -> list[float] | None:
        if ends is not None and ends[0] > ends[1]:
            raise ValueError("expected the lower end first")
        return ends


class VSD(DistributionMatching):
    """Variational score distillation into a generator: no normaliser, no images, guidance on both scores."""

    Config = VSDConfig
    config: VSDConfig
    name = "vsd"
    family = "Distribution matching"
    paper = "SwiftBrush, Nguyen & Tran 2023"
    summary = "VSD (SwiftBrush): guided score differences with a LoRA critic"
    guides_both = True

    def prepare(self, batch: Batch) -> None:
        if self.config.guidance_range is not None and batch.null is None:
            raise InputError("method.guidance_range: expected null for a pipeline without guidance, found a range")

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        t, w = self.matching_times(batch), self.guidance(batch)
        x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
        real = self.teacher(x_t, t, batch, w).eps
        fake = guided(self.roles.critic, x_t, t, batch.cond, batch.null, w).eps
        alpha, sigma = self.schedule.coefficients(t)
        # sigma^2 is meant on a VP schedule; at the same noise-to-signal ratio this is the same on every other.
        return per_sample(sigma**2 / (alpha**2 + sigma**2), x) * (real - fake)

    def guidance(self, batch: Batch) -> float | Tensor:
        """w, the same for both scores: the recipe's, or one per sample (B,)."""
        ends = self.config.guidance_range
        return self.roles.scale if ends is None else batch.uniform("guidance", *ends)

    def critic_conditions(self, batch: Batch) -> Conditions:
        return batch.partly_empty("dropout", self.config.critic_dropout)[0]


class PGSBConfig(VSDConfig):
    """Keys of ``method`` for PG-SB."""

    guidance_range: list[NonNegativeFloat] | None = Field(
        [2.0, 5.0], min_length=2, max_length=2, description="w of each sample is uniform between"
    )


class PGSB(VSD):
    """VSD under random guidance, which broadens what the scores are compared at."""

    Config = PGSBConfig
    name = "pg-sb"
    family = "Distribution matching"
    paper = "SNOOPI, Nguyen et al. 2024"
    summary = "PG-SB (SNOOPI): VSD under a random guidance scale"


class DiffInstructConfig(MatchingConfig):
    """Keys of ``method`` for Diff-Instruct."""

    noise_mean: float = Field(-1.2, description="mean of ln(sigma/alpha) of the noise")
    noise_std: float = Field(1.2, gt=0, description="its standard deviation")


class DiffInstruct(DistributionMatching):
    """The integral KL divergence's gradient as it is: no normaliser, guidance on the teacher alone."""

    Config = DiffInstructConfig
    config: DiffInstructConfig
    name = "diff-instruct"
    family = "Distribution matching"
    paper = "Diff-Instruct, Luo et al. 2023"
    summary = "Diff-Instruct: plain score differences at log-normal noise"

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        t = self.matching_times(batch)
        x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
        return self.roles.critic(x_t, t, batch.cond).x0 - self.teacher(x_t, t, batch).x0

    def matching_times(self, batch: Batch) -> Tensor:
        times = self.noise_times(batch, "dm time")
        return self.schedule.snap(times.clamp(self.config.t_min, self.config.t_max))

    def critic_times(self, batch: Batch) -> Tensor:
        return self.noise_times(batch, "critic time")

    def noise_times(self, batch: Batch, name: str) -> Tensor:
        """Times (B,) of log-normal noise-to-signal ratios."""
        mean = self.config.noise_mean + math.log(self.config.time_shift)  # a shift multiplies sigma/alpha
        return normal_log_snr_times(batch, name, self.schedule, mean, self.config.noise_std)
