"""rCM (Zheng et al. 2025, "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency"): sCM
for diversity and distribution matching for sharpness, both in every update of the student.

    the first H steps: sCM alone
    student, every ``critic_steps``-th step from then on:
        minimise  sCM, by this g  +  w_dm DM(x)
        g = cos a sqrt(1 - r^2 sin^2 a) (F_teacher - F) - r cos a sin a x - cos a sin a dF/da,   r = min(1, step / H)
        x = student's sample by n ~ U{1..N} steps from noise, at random descending times;  graph in the last alone
        DM: as in DMD2, but a sum over the elements of a sample, as sCM's is
    critic, in the other steps, on sg(x):  minimise its denoising loss

sCM's own g anneals dF/da as well; at r = 1 both are the same. x, F and a are those of sCM in TrigFlow's scale.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Prediction, per_sample
from stepdistill.methods.base import CriticConfig
from stepdistill.methods.continuous import SCM, SCMConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.parts.times import T_FLOOR
from stepdistill.methods.parts.trigflow import TrigFlow
from stepdistill.roles import Roles


class RCMConfig(SCMConfig, CriticConfig):
    """Keys of ``method`` for rCM."""

    dm_weight: float = Field(0.01, ge=0, description="w_dm: weight of distribution matching, summed over a sample")
    critic_steps: int = Field(5, ge=2, description="of so many steps one moves the student, the others the critic")
    rollout_steps: int = Field(4, ge=1, description="N: most steps of the samples that are matched")
    t_min: float = Field(0.02, ge=0, lt=1, description="lowest time of the distribution-matching noise")
    t_max: float = Field(0.98, gt=0, le=1, description="highest time of the distribution-matching noise")


class RandomRollout(DMD2):
    """DMD2 on samples of 1 .. ``steps`` steps at random times."""

    def __init__(self, config: DMD2Config, roles: Roles, sampler: Sampler, steps: int):
        super().__init__(config, roles, sampler)
        self.steps = steps

    def generate(self, batch: Batch, position: int | None = None) -> Tensor:
        """x_0 (B, ...) after one of 1 .. ``steps`` steps, the last with graph where grad is enabled."""
        count, first = 1 + batch.integer("rollout steps", self.steps), self.sampler.grid()[0].t
        low = T_FLOOR / first
        shares = [low + (1 - low) * batch.integer(f"time {i}", 1000) / 1000 for i in range(1, count)]
        times = [self.schedule.snap(self.times(first * share, batch)) for share in (1.0, *sorted(shares, reverse=True))]
        x = batch.noise("start")
        for i, t in enumerate(times[1:]):
            with torch.no_grad():
                x = self.schedule.add_noise(self.student(x, times[i], batch).x0, batch.noise(f"rollout {i}"), t)
        return self.student(x, times[-1], batch).x0


class RCM(SCM):
    """Score-regularised continuous-time consistency."""

    Config = RCMConfig
    config: RCMConfig
    name = "rcm"
    family = "Consistency"
    paper = "rCM, Zheng et al. 2025"
    summary = "rCM: continuous-time consistency and distribution matching in one student, 1-4 steps"
    players = ("student", "critic")
    extra_roles = ("critic",)

    def __init__(self, config: RCMConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        shared = {name: getattr(config, name) for name in ("t_min", "t_max", "time_shift")}
        self.matching = RandomRollout(DMD2Config(**shared), roles, sampler, config.rollout_steps)

    @classmethod
    def adapt(cls, config: RCMConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        return super().adapt(config, role, network, scale) if role == "student" else network

    def turns(self, step: int) -> Sequence[str]:
        step -= self.config.tangent_warmup
        return ("student",) if step < 0 or step % self.config.critic_steps == 0 else ("critic",)

    def modules(self, player: str) -> list[nn.Module]:
        return super().modules(player) if player == "student" else [self.roles.critic.network]

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        if player == "critic":
            return self.matching.critic_losses(batch)
        losses = super().losses(player, batch)
        if self.config.dm_weight and batch.step >= self.config.tangent_warmup:
            summed = self.matching.student_losses(batch)["dm"] * batch.latents[0].numel()
            losses["dm"] = self.config.dm_weight * summed
        return losses

    def direction(self, trig: TrigFlow, teacher: Prediction, velocity: Tensor, tangent: Tensor, r: float) -> Tensor:
        cos, sin = trig.cos, trig.sin
        # cos a df/da = cos^2 a (F_teacher - F) - cos a sin a x - cos a sin a dF/da
        share = cos * (1 - (r * sin) ** 2).sqrt() - cos**2
        x = per_sample(cos, velocity) * teacher.x0 + per_sample(sin * trig.sigma_data, velocity) * teacher.eps
        apart = trig.velocity(teacher) - velocity
        return tangent + per_sample(share, velocity) * apart + (1 - r) * per_sample(cos * sin, velocity) * x
