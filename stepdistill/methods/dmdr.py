"""DMDR (Jiang et al. 2025, "Distribution Matching Distillation Meets Reinforcement Learning"): DMD2 with a gentler
beginning. Its two switches stand alone.

    n is the number of the training step, N their duration, d = (1 + cos(pi n/N))/2, from 1 to 0
    dynamic guidance:   D_real <- D_real + c d (D_fake - D_real)                     c = .375
    dynamic renoising:  t ~ Beta(1 + 3 d, 1 + d/2), for the matching and for the critic

After N steps both are DMD2's own. The paper mixes weights: its real score is the teacher with the critic's LoRA at a
share of the LoRA's own scale. Predictions mix for any critic, and agree with that to first order. The paper's reward
is left out.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.schedule import shifted
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.parts.losses import dmd_gradient
from stepdistill.methods.parts.times import T_FLOOR


class DMDRConfig(DMD2Config):
    """Keys of ``method`` for DMDR."""

    dynamic_steps: int = Field(1000, ge=1, description="N: training steps until both switches have faded out")
    dynamic_guidance: float = Field(
        0.375, ge=0, lt=1, description="c: share of the critic in the real score at the first step; 0 is off"
    )
    dynamic_renoising: bool = Field(True, description="whether times begin near noise and become uniform")


class DMDR(DMD2):
    """DMD2 whose real score starts near the critic's, and whose times start near noise."""

    Config = DMDRConfig
    config: DMDRConfig
    name = "dmdr"
    family = "Distribution matching"
    paper = "DMDR, Jiang et al. 2025"
    summary = "DMDR: DMD2 that begins at high noise and with a real score near the student's"

    def rest(self, step: int) -> float:
        """d: what is left of the switches at a training step, from 1 to 0."""
        return (1 + math.cos(math.pi * min(1.0, step / self.config.dynamic_steps))) / 2

    def matching_times(self, batch: Batch) -> Tensor:
        if not self.begins_at_noise(batch):
            return super().matching_times(batch)
        return self.early_times(batch, "dm time", self.config.t_min, self.config.t_max)

    def critic_times(self, batch: Batch) -> Tensor:
        if not self.begins_at_noise(batch):
            return super().critic_times(batch)
        return self.early_times(batch, "critic time", T_FLOOR, 1.0)

    def begins_at_noise(self, batch: Batch) -> bool:
        """Whether the times of this step are others than DMD2's."""
        return self.config.dynamic_renoising and self.rest(batch.step) > 0

    def early_times(self, batch: Batch, name: str, low: float, high: float) -> Tensor:
        """Times (B,) of the step's Beta distribution, cut to [low, high]."""
        d = self.rest(batch.step)
        t = shifted(beta(batch.uniform(name), 1 + 3 * d, 1 + d / 2), self.config.time_shift)
        return self.schedule.snap(t.clamp(low, high))

    def difference(self, x: Tensor, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        return dmd_gradient(x, torch.lerp(real, fake, self.config.dynamic_guidance * self.rest(batch.step)), fake)


def beta(uniform: Tensor, a: float, b: float) -> Tensor:
    """Draws of Beta(a, b), with a and b at least 1, from uniform ones (B,): its cumulative probability inverted."""
    edges = torch.linspace(0, 1, 4097, dtype=torch.float64, device=uniform.device)
    middle = (edges[1:] + edges[:-1]) / 2
    below = (middle ** (a - 1) * (1 - middle) ** (b - 1)).cumsum(0)
    below = torch.cat([below.new_zeros(1), below / below[-1]])
    right = torch.searchsorted(below, uniform.double()).clamp(1, len(below) - 1)
    part = (uniform - below[right - 1]) / (below[right] - below[right - 1])
    return edges[right - 1] + part * (edges[right] - edges[right - 1])
