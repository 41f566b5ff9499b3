"""What distribution-matching methods share: a student that descends a divergence between its samples and the
teacher's, a critic that follows those samples, and whose turn it is.

    first: regression_steps of trajectory regression, then critic_warmup steps of the critic alone     (0 by default)
    every step:
        k ~ U{0..K-1}, the same for the whole batch
        x_t = student's own rollout from noise to t_k                       (backward simulation, no graph)
        x   = student(x_t, t_k).x0
        student, every ``critic_steps``-th step:
            minimise 1/2 |x - sg(x - g)|^2,   g = the subclass' gradient of a divergence at x
        critic, every step, on sg(x):
            minimise its denoising loss
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.samplers import Sampler
from stepdistill.methods.base import CriticConfig, DistillMethod
from stepdistill.methods.parts.losses import denoising_loss, dmd_gradient, surrogate
from stepdistill.methods.parts.times import uniform_times
from stepdistill.methods.trajectory import TrajectoryConfig, TrajectoryRegression
from stepdistill.roles import Roles


class MatchingConfig(CriticConfig):
    """Keys of ``method`` that every distribution-matching method has."""

    critic_steps: int = Field(1, ge=1, description="critic updates per student update (two time scales)")
    critic_warmup: int = Field(0, ge=0, description="first steps in which the critic moves alone")
    regression_steps: int = Field(0, ge=0, description="first steps, of trajectory regression instead (see sfd)")
    regression_substeps: int = Field(3, ge=1, description="teacher solver steps per student step in them")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the distribution-matching noise")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the distribution-matching noise")
    sampler: Literal["renoise", "ddim"] = Field("renoise", description="how the student moves between steps")


class DistributionMatching(DistillMethod):
    """A student that descends a divergence between its samples and the teacher's, by the scores of both."""

    Config = MatchingConfig
    config: MatchingConfig
    players = ("student", "critic")
    extra_roles = ("critic",)
    trains_grid = True

    def __init__(self, config: MatchingConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.regression = TrajectoryRegression(TrajectoryConfig(substeps=config.regression_substeps), roles, sampler)

    @classmethod
    def may_start_lower(cls, config: MatchingConfig) -> bool:
        return config.regression_steps == 0

    @classmethod
    def sampler_of(cls, config: MatchingConfig) -> str:
        return config.sampler

    def turns(self, step: int) -> Sequence[str]:
        step -= self.config.regression_steps
        if step < 0:
            return self.regression.turns(step)
        step -= self.config.critic_warmup
        return ("student", "critic") if step >= 0 and step % self.config.critic_steps == 0 else ("critic",)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        if batch.step < self.config.regression_steps:
            return self.regression.losses(player, batch)
        return self.student_losses(batch) if player == "student" else self.critic_losses(batch)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self.generate(batch)
        batch.state["x"] = x.detach()
        return self.sample_losses(x, batch)

    def sample_losses(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The student's terms on its samples ``x`` (B, ...), which carry the graph."""
        with torch.no_grad():
            gradient = self.gradient(x.detach(), batch)
        return {"dm": surrogate(x, gradient)}

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        """The divergence's gradient at the student's samples ``x`` (B, ...), up to a positive weight; no graph.

        By default DMD's (Yin et al. 2023, eq. 7-8).
        """
        t = self.matching_times(batch)
        x_t = self.schedule.add_noise(x, batch.noise("dm"), t)
        return dmd_gradient(x, self.teacher(x_t, t, batch).x0, self.roles.critic(x_t, t, batch.cond).x0)

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        if "x" not in batch.state:
            with torch.no_grad():
                batch.state["x"] = self.generate(batch)
        t, noise = self.critic_times(batch), batch.noise("critic")
        cond = self.critic_conditions(batch)
        return {"denoising": denoising_loss(self.roles.critic, batch.state["x"], t, noise, cond)}

    def matching_times(self, batch: Batch) -> Tensor:
        """Times (B,) at which the two distributions are compared."""
        config = self.config
        return uniform_times(batch, "dm time", self.schedule, config.t_min, config.t_max, config.time_shift)

    def critic_times(self, batch: Batch) -> Tensor:
        """Times (B,) at which the critic learns."""
        return uniform_times(batch, "critic time", self.schedule, shift=self.config.time_shift)

    def critic_conditions(self, batch: Batch) -> Conditions:
        """The conditions of the critic's training samples."""
        return batch.cond
