"""DMD: distribution matching distillation, the first version (Yin et al. 2023, "One-step Diffusion with Distribution
Matching Distillation").

    once: pairs (z, y), y = end of the guided teacher's deterministic trajectory from z
    every step:
        x = student(z', 1).x0;  s ~ U[0.02, 0.98];  x_s = alpha x + sigma eps
        g = (D_fake(x_s) - D_real(x_s)) / mean|x - D_real(x_s)|             (per sample)
        student:  minimise 1/2 |x - sg(x - g)|^2  +  lambda d(student(z, 1).x0, y)
        critic, on sg(x):  minimise its denoising loss

The paper's d is LPIPS between decoded images. Ours is the squared error of latents, which is the same for every kind of
data; with ``metric: features`` the distance in the teacher's own layers is added, LPIPS without another network.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.methods.base import DataNeeds, PathNeeds
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.losses import latent_distance


class DMDConfig(MatchingConfig):
    """Keys of ``method`` for DMD."""

    pair_weight: float = Field(0.25, gt=0, description="lambda: weight of the regression on pairs")
    metric: Literal["l2", "features"] = Field(
        "l2", description="distance of a pair; features: l2, and that of the teacher's hidden states"
    )
    pairs: int = Field(1000, ge=1, description="noise-sample pairs, made once by the teacher")
    pair_steps: int = Field(25, ge=1, description="DDIM steps of each")


class DMD(DistributionMatching):
    """A one-step student by distribution matching, held to its modes by regression on the teacher's own pairs."""

    Config = DMDConfig
    config: DMDConfig
    name = "dmd"
    family = "Distribution matching"
    paper = "DMD, Yin et al. 2023"
    summary = "DMD: distribution matching with regression on the teacher's noise-sample pairs, one step"

    @classmethod
    def data_needs(cls, config: DMDConfig) -> DataNeeds:
        return DataNeeds(paths=PathNeeds(config.pairs, config.pair_steps, keep="ends"))

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        return super().student_losses(batch) | {"pairs": self.config.pair_weight * self.pair_loss(batch)}

    def pair_loss(self, batch: Batch) -> Tensor:
        """The distance of one student step from each pair's noise to its end."""
        path = batch.path
        noise, end = path.points[:, 0], path.points[:, -1]
        start = self.sampler.grid()[0].t  # of the student; the pairs begin at t = 1
        student = self.roles.student(noise, self.times(start, batch), path.cond).x0
        loss = F.mse_loss(student, end)
        if self.config.metric == "features":
            loss = loss + latent_distance(self.roles.teacher, student, end, path.cond, batch)
        return loss
