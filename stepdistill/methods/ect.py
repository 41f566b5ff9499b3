"""ECT, easy consistency tuning (Geng et al. 2024, arXiv 2406.14548): a diffusion model becomes a consistency model.

rho = sigma/alpha is EDM's noise level, f the student's x_0, q ``shrink``, (k, b) ``gap_extra`` and ``gap_slope``:

every step:
    x_0 ~ data;  eps ~ N(0, I);  ln rho_t ~ N(``time_mean``, ``time_std``^2)
    a = 1 + floor(step / ``stage_steps``);  n = 1 + k sigmoid(-b rho_t);  rho_r = max(0, rho_t (1 - n/q^a))
    x_t, x_r = x_0 with the same eps at t and at r
    y = f(x_r, r), or x_0 where rho_r is 0                                            (no graph)
    minimise mean of (sqrt(|f(x_t, t) - y|^2 + c^2) - c)/(rho_t - rho_r)              (per sample; |.|^2 per element)

Where rho_r is 0 this is diffusion training, from whose weights the student starts; each further stage has smaller gaps.
The paper's c is ``huber_c`` times the root of a sample's number of elements.
"""

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.methods import (
    T_FLOOR,
    Batch,
    DataNeeds,
    DistillMethod,
    RealConfig,
    mean_per_sample,
    normal_log_snr_times,
    per_sample,
    time_of_ratio,
)


class ECTConfig(RealConfig):
    """Keys of ``method``. The paper's numbers are for data of deviation 0.5, these defaults for deviation 1."""

    shrink: float = Field(2.0, gt=1, description="q: every stage divides the gap between t and r by it")
    stage_steps: int = Field(100, ge=1, description="training steps of each stage")
    gap_extra: float = Field(8.0, ge=0, description="k of n(t) = 1 + k sigmoid(-b sigma/alpha)")
    gap_slope: float = Field(0.5, ge=0, description="b of n(t); the paper's 1 for EDM's data of deviation 0.5")
    time_mean: float = Field(-0.4, description="mean of ln(sigma/alpha); the paper's -1.1 for EDM's data")
    time_std: float = Field(2.0, ge=0, description="standard deviation of ln(sigma/alpha)")
    huber_c: float = Field(0.0005, gt=0, description="c of the pseudo-Huber norm, per element of a sample")


class ECT(DistillMethod):
    """The teacher gives the student's first weights and, with ``real: teacher``, the samples; it is no target."""

    Config = ECTConfig
    config: ECTConfig
    name = "ect"
    family = "Consistency"
    paper = "ECT, Geng et al. 2024"
    summary = "ECT: consistency tuning on data, in stages of smaller and smaller gaps, 1-2 steps"
    sampler_name = "renoise"

    @classmethod
    def data_needs(cls, config: ECTConfig) -> DataNeeds:
        return config.real_needs()

    def ratio(self, t: Tensor) -> Tensor:
        """sigma/alpha at ``t``."""
        alpha, sigma = self.schedule.coefficients(t)
        return sigma / alpha

    def earlier(self, t: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The time r (B,) of each ``t`` (B,), and where r is the clean end itself (B,)."""
        config, ratio = self.config, self.ratio(t)
        n = 1 + config.gap_extra * torch.sigmoid(-config.gap_slope * ratio)
        goal = ratio * (1 - n / config.shrink ** (1 + step // config.stage_steps))
        clean = goal < self.ratio(torch.full_like(t, T_FLOOR))
        return time_of_ratio(self.schedule, goal.clamp_min(1e-6)), clean

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        config, x0, eps = self.config, batch.latents, batch.noise("eps")
        t = normal_log_snr_times(batch, "t", self.schedule, config.time_mean, config.time_std)
        r, clean = self.earlier(t, batch.step)
        with torch.no_grad():
            target = self.student(self.schedule.add_noise(x0, eps, r), r, batch).x0
            target = torch.where(per_sample(clean, x0).bool(), x0, target)
        guess = self.student(self.schedule.add_noise(x0, eps, t), t, batch).x0
        norm = (mean_per_sample((guess - target).square()) + config.huber_c**2).sqrt() - config.huber_c
        gap = self.ratio(t) - torch.where(clean, 0, self.ratio(r))
        # A small gap may end at the same entry of a table of times: such a row is 0.
        return {"consistency": (norm.flatten() / gap.clamp_min(1e-6)).mean()}
