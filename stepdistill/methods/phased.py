"""Phased DMD (Fan et al. 2025, "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within
Subintervals") and TDM (Luo et al. 2025, "Learning Few-Step Diffusion Models by Trajectory Distribution Matching").

A phase is an equal part of the student's steps. Each phase matches the noisy distribution that it ends at, and only the
last one the clean samples: what comes later need not repair what came before.

    every step:
        k ~ U{0..K-1}, the same for the whole batch; its phase starts at time h and ends at s (the last at 0)
        x_k = student's own rollout from noise to t_k                       (no graph)
        x   = student(x_k, t_k).x0;  x_s = deterministic step from x_k to s (affine in x)
        t ~ U[s + margin, h];  a = alpha_t/alpha_s;  b^2 = sigma_t^2 - a^2 sigma_s^2;  x_t = a x_s + b eps
        student, every ``critic_steps``-th step:
            g = (D_fake(x_t) - D_real(x_t)) / max(mean|x - D_real(x_t)|, 1e-4)        (per sample)
            minimise 1/2 |x - sg(x - g)|^2
        critic, every step:
            minimise its loss at x_t for the target  D* = (x_t - sigma_t^2/b eps) / alpha_t

No clean sample belongs to x_s. E[D* | x_t] is the posterior mean that the score of p_t means, by Tweedie's formula with
the kernel's score -eps/b. In the last phase s = 0, and D* is x.

    TDM:  a phase for every step

The paper of Phased DMD trains a network for each phase, and also compares the last phase at times above its start with
a further critic. Here one network, which is given the time, has all phases, and one critic, so that each phase keeps
to times of its own. Where the teacher's networks take turns (Wan 2.2) student and critic are as many networks, and
``phases: experts`` makes the steps of each a phase, as in the paper; these need not be equal parts.

TDM's paper has the critic learn from x with importance weights; D* needs none.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.experts import parts
from stepdistill.diffusion.samplers import Sampler, Step, forward_kernel
from stepdistill.diffusion.schedule import per_sample
from stepdistill.errors import InputError
from stepdistill.methods.distribution_matching import DistributionMatching, MatchingConfig
from stepdistill.methods.parts.losses import dmd_gradient, prediction_loss
from stepdistill.methods.parts.times import uniform_times
from stepdistill.roles import Roles

FLOOR = 1e-4


class PhasedConfig(MatchingConfig):
    """Keys of ``method`` for Phased DMD."""

    critic_steps: int = Field(5, ge=1, description="critic updates per student update (two time scales)")
    phases: Annotated[int, Ge(1)] | Literal["experts"] = Field(
        2,
        description="phases, each of as many of the student's steps; experts: of the steps of each of the teacher's "
        "networks, where they take turns",
    )
    margin: float = Field(0.02, gt=0, lt=1, description="how far above its end the times of a phase stay")
    sampler: Literal["ddim"] = Field("ddim", description="how the student moves between steps")


class TDMConfig(PhasedConfig):
    """Keys of ``method`` for TDM."""

    critic_steps: int = Field(1, ge=1, description="critic updates per student update (two time scales)")
    phases: int = Field(0, ge=0, description="phases, each of as many of the student's steps; 0: one for each step")
    margin: float = Field(0.01, gt=0, lt=1, description="how far above its end the times of a phase stay")


class Phase(NamedTuple):
    """Where a phase ends, None for the clean end, and the times (low, high) of its comparison."""

    end: float | None
    low: float
    high: float


class PhasedDMD(DistributionMatching):
    """Distribution matching phase by phase, each against the teacher's distribution at the time where it ends."""

    Config = PhasedConfig
    config: PhasedConfig
    name = "phased-dmd"
    family = "Distribution matching"
    paper = "Phased DMD, Fan et al. 2025"
    summary = "Phased DMD: each part of the steps matches the teacher's noisy distribution where it ends"
    sampler_name = "ddim"

    def __init__(self, config: PhasedConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        if config.phases == "experts" and not getattr(getattr(roles.teacher, "spec", None), "experts", None):
            raise InputError("method.phases: expected a number for a teacher with one denoiser, found 'experts'")
        for k in range(len(sampler.grid())):
            _, low, high = self.phase(k)
            if low >= high:
                raise InputError(
                    f"method.margin: expected less, step {k + 1} has no times from {low:.3g} to {high:.3g}"
                )

    @classmethod
    def problems(cls, config: PhasedConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        if isinstance(config.phases, int) and config.phases and student_steps % config.phases:
            yield "method.phases", f"expected a divisor of student.steps ({student_steps}), found {config.phases}"

    def phase(self, k: int) -> Phase:
        """The phase of grid position ``k``."""
        grid, (first, last) = self.sampler.grid(), self._steps(k)
        end, lowest, highest = grid[last].r, self.config.t_min, self.config.t_max
        return Phase(
            end,
            lowest if end is None else max(lowest, end + self.config.margin),
            min(highest, grid[first].t) if first else highest,
        )

    def _steps(self, k: int) -> tuple[int, int]:
        """The first and last grid position of the phase of ``k``."""
        grid = self.sampler.grid()
        if isinstance(self.config.phases, int):
            length = len(grid) // (self.config.phases or len(grid))
            first = k - k % length
            return first, first + length - 1
        times = torch.tensor([step.t for step in grid], dtype=torch.float64)
        split = parts(self.schedule.timestep(times), self.roles.teacher.spec.experts)
        own = next((rows.tolist() for _, rows in split if rows is not None and k in rows), range(len(grid)))
        return own[0], own[-1]

    def generate(self, batch: Batch, position: int | None = None) -> Tensor:
        """x_0 as in DMD2; the point x_s that it leads to, and its phase, stay in the batch's state, without graph."""
        grid = self.sampler.grid()
        k = batch.integer("k", len(grid)) if position is None else position
        jump = Step(grid[k].t, self.phase(k).end)
        prediction = self.student_step(self.backward_simulation(batch, k), jump, batch)
        x_s = self.sampler.advance(prediction, jump, lambda: batch.noise("jump"))
        batch.state["landed"] = x_s.detach(), self.phase(k)
        return prediction.x0

    def noised(self, batch: Batch, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (B, ...) above the end of the phase, t (B,), and the target D* (B, ...) that a denoiser learns there."""
        x_s, (end, low, high) = batch.state["landed"]
        t, eps = (
            uniform_times(batch, f"{name} time", self.schedule, low, high, self.config.time_shift),
            batch.noise(name),
        )
        if end is None:
            return self.schedule.add_noise(x_s, eps, t), t, x_s
        ratio, b = forward_kernel(self.schedule, torch.full_like(t, end), t)
        x_t = per_sample(ratio, x_s) * x_s + per_sample(b, x_s) * eps
        alpha, sigma = self.schedule.coefficients(t)
        return x_t, t, (x_t - per_sample(sigma**2 / b, x_s) * eps) / per_sample(alpha, x_s)

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        x_t, t, _ = self.noised(batch, "dm")
        return dmd_gradient(x, self.teacher(x_t, t, batch).x0, self.roles.critic(x_t, t, batch.cond).x0, FLOOR)

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        if "landed" not in batch.state:
            with torch.no_grad():
                self.generate(batch)
        x_t, t, target = self.noised(batch, "critic")
        return {"denoising": prediction_loss(self.roles.critic(x_t, t, batch.cond), target)}


class TDM(PhasedDMD):
    """Trajectory distribution matching: every point of the student's deterministic path has the teacher's marginal."""

    Config = TDMConfig
    config: TDMConfig
    name = "tdm"
    family = "Distribution matching"
    paper = "TDM, Luo et al. 2025"
    summary = "TDM: every step of a deterministic student matches the teacher's marginal where it lands"
