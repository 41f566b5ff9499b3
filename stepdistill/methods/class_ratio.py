"""DiffRatio (Zhang et al. 2025, "Towards Training One-Step Diffusion Models Without Distillation"): distribution
matching by a learned ratio of densities. No pass of the teacher; its weights are where student and ratio network begin.

    x = the student's samples, as in DMD2;  x_t = alpha x + sigma eps,  t ~ U[0.02, 0.98]
    l(x_t, t) = mean vote of heads on the critic's states: log p_real,t/p_fake,t where they have learnt it
    student, every ``critic_steps``-th step:
        minimise E[phi(e^l)],  phi(r) = f(r) - r f'(r):  -log r for the reverse KL, -r for the forward KL
    critic and heads, every step, real and sg(x) with the same t and eps:
        minimise softplus(l(x_t)) + softplus(-l(real x_t))

phi is not f: with l's weights frozen its gradient is -h(r) grad l with h = r^2 f'', that of the divergence f. A critic
that is only a classifier learns no denoising.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.methods.base import CriticConfig, DataNeeds, RealConfig
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.divergence import WEIGHTS, Divergence, RatioWeight
from stepdistill.methods.parts.gan import LatentDiscriminator
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import Roles


class DiffRatioConfig(RealConfig, MatchingConfig):
    """Keys of ``method`` for DiffRatio."""

    critic: Literal["lora", "full"] | None = Field("full", description=CriticConfig.model_fields["critic"].description)
    divergence: Divergence = Field("reverse-kl", description="what is minimised")
    r1: float = Field(0.0, ge=0, description="weight of the gradient penalty on the heads' input; 0 is off")


class DiffRatio(DistributionMatching):
    """A student that climbs the log ratio of real and generated density, which a classifier of the two learns."""

    Config = DiffRatioConfig
    config: DiffRatioConfig
    name = "diff-ratio"
    family = "Distribution matching"
    paper = "DiffRatio, Zhang et al. 2025"
    summary = "DiffRatio: distribution matching by a learned density ratio, no pass of the teacher"

    def __init__(self, config: DiffRatioConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.ratio = LatentDiscriminator(roles.critic, self.noise_times, r1=config.r1)

    @classmethod
    def data_needs(cls, config: DiffRatioConfig) -> DataNeeds:
        return config.real_needs()

    def noise_times(self, batch: Batch, name: str) -> Tensor:
        config = self.config
        return uniform_times(batch, name, self.schedule, config.t_min, config.t_max, config.time_shift)

    def prepare(self, batch: Batch) -> None:
        self.ratio.build(batch)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) + ([self.ratio.heads] if player == "critic" else [])

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"heads": self.ratio.heads}

    def sample_losses(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        logit = self.ratio.logits(x, batch).mean(1)
        ratio = logit.detach().exp().clamp(RatioWeight.LOWEST, RatioWeight.HIGHEST)
        return {"ratio": -(WEIGHTS[self.config.divergence](ratio) * logit).mean()}

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        if "x" not in batch.state:
            with torch.no_grad():
                batch.state["x"] = self.generate(batch)
        return {"ratio": self.ratio.loss_of_heads(batch.state["x"], batch.latents, batch)}
