"""DisBack (Zhang et al. 2024, "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion
Distillation"): DMD2 whose real score begins near the student and walks back to the teacher.

    degradation, the first ``critic_warmup`` steps:
        the critic learns the samples of the untrained student; N - 1 times on the way, evenly spaced, a snapshot
        phi_1 .. phi_{N-1} of its weights is kept
    backtracking, from then on, n = 0, 1, .. updates of the student:
        D_real = phi_{N-1}, then phi_{N-2}, .., phi_1, each for M updates of the student, then the guided teacher
        student, critic as in DMD2

Snapshots are unguided: they know samples of one guidance alone, the student's own.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.errors import InputError
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.roles import Roles, RoleTraining


class DisBackConfig(DMD2Config):
    """Keys of ``method`` for DisBack."""

    critic_warmup: int = Field(400, ge=1, description="first steps, in which the critic learns the untrained student")
    snapshots: int = Field(4, ge=1, description="N: equal parts of the warm-up; one snapshot between each two")
    snapshot_updates: int = Field(1000, ge=1, description="M: student updates towards each snapshot")


class DisBack(DMD2):
    """DMD2 towards snapshots of what the teacher became on the untrained student's samples, in reverse."""

    Config = DisBackConfig
    config: DisBackConfig
    name = "disback"
    family = "Distribution matching"
    paper = "DisBack, Zhang et al. 2024"
    summary = "DisBack: DMD2 whose real score walks from the student's distribution back to the teacher"
    extra_roles = ("critic", "guide")
    shards = False

    def __init__(self, config: DisBackConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.interval = config.critic_warmup // config.snapshots
        weights = [*roles.critic.network.parameters()]
        if [p.shape for p in weights] != [p.shape for p in roles.guide.network.parameters()]:
            raise InputError("critic.rank, critic.targets: expected the student's for disback, whose guide has these")
        self.snapshots = nn.ModuleList(
            nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in weights)
            for _ in range(config.snapshots - 1)
        )

    @classmethod
    def role_training(cls, config: DisBackConfig) -> Mapping[str, RoleTraining]:
        return {"critic": config.critic, "guide": config.critic} if config.critic else {}

    @classmethod
    def problems(cls, config: DisBackConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        if config.critic_warmup < config.snapshots:
            yield "method.critic_warmup", f"expected at least method.snapshots ({config.snapshots})"

    def extra_modules(self) -> dict[str, nn.Module]:
        return super().extra_modules() | ({"snapshots": self.snapshots} if self.snapshots else {})

    def target(self, step: int) -> int | None:
        """The number of the snapshot that stands for the data at a training step, from 0; None: the teacher does."""
        updates = (step - self.config.regression_steps - self.config.critic_warmup) // self.config.critic_steps
        number = len(self.snapshots) - 1 - updates // self.config.snapshot_updates
        return number if number >= 0 else None

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        # Micro-batches repeat the copies to no effect: the critic and the guide move between steps alone.
        done = batch.step - self.config.regression_steps
        number, rest = divmod(done, self.interval)
        if rest == 0 and 1 <= number < self.config.snapshots and done < self.config.critic_warmup:
            copy_weights(self.roles.critic.network.parameters(), self.snapshots[number - 1].parameters())
        number = self.target(batch.step)
        if player == "student" and number is not None and done >= self.config.critic_warmup:
            copy_weights(self.snapshots[number].parameters(), self.roles.guide.network.parameters())
        return super().losses(player, batch)

    def real(self, x_t: Tensor, t: Tensor, batch: Batch, scale: float) -> Tensor:
        if self.target(batch.step) is None:
            return super().real(x_t, t, batch, scale)
        return self.roles.guide(x_t, t, batch.cond).x0


@torch.no_grad()
def copy_weights(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    """Copy parameters into others of the same shapes, in order."""
    torch._foreach_copy_([*target], [*source])
