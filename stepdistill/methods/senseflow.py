"""SenseFlow (Ge et al. 2025, "SenseFlow: Scaling Distribution Matching for Flow-based Text-to-Image Distillation"):
DMD2 with two switches that stand alone.

    implicit distribution alignment, after every student update:
        critic <- (1 - p) critic + p student                            (weights; the critic's moments stay)
    intra-segment guidance, with every student update at x_k, t_k, step end r:
        t_m ~ U[r + .2 (t_k - r), t_k - .2 (t_k - r)];  w ~ U[2, 4]
        x_m    = one deterministic step of the teacher under guidance w from x_k to t_m
        target = one deterministic step of the student from x_m to r    (no graph)
        minimise  + lambda pseudo_huber(the student's own step from x_k to r - target)

At p = 0 and lambda = 0 it is DMD2. The alignment needs a critic that means by its weights what the student means: a
whole copy of the teacher, as the student is. The paper's discriminator on a vision model's features is left out; DMD2's
own, on the critic's, is there (``gan_weight``).
"""

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler, Step
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.parts.losses import pseudo_huber
from stepdistill.roles import Roles
from stepdistill.roles.views import AdapterView

HUBER = 1e-3


class SenseFlowConfig(DMD2Config):
    """Keys of ``method`` for SenseFlow."""

    critic_pull: float = Field(
        0.02, ge=0, le=1, description="p: how far the critic's weights move to the student's after its update; 0 is off"
    )
    segment_weight: float = Field(0.5, ge=0, description="lambda: weight of the intra-segment guidance; 0 is off")
    segment_scales: list[NonNegativeFloat] = Field(
        [2.0, 4.0], min_length=2, max_length=2, description="w of each sample's step inside the segment is between"
    )
    segment_margin: float = Field(0.2, ge=0, lt=0.5, description="share of a step that t_m keeps from both of its ends")


class SenseFlow(DMD2):
    """DMD2 whose critic is pulled to the student, and whose steps agree with two half as long ones."""

    Config = SenseFlowConfig
    config: SenseFlowConfig
    name = "senseflow"
    family = "Distribution matching"
    paper = "SenseFlow, Ge et al. 2025"
    summary = "SenseFlow: DMD2 with a critic pulled to the student, and guidance inside each step"

    def __init__(self, config: SenseFlowConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        adapters = any(isinstance(role.network, AdapterView) for role in (roles.student, roles.critic))
        if config.critic_pull and adapters:
            # The mean of two products B A is not the product of the means.
            raise InputError("method.critic_pull: expected 0 beside adapters; student.train and method.critic: full")

    @classmethod
    def may_start_lower(cls, config: SenseFlowConfig) -> bool:
        return config.segment_weight == 0 and super().may_start_lower(config)

    def student_losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.config.segment_weight:
            return super().student_losses(batch)
        grid = self.sampler.grid()
        step = grid[k := batch.integer("k", len(grid))]
        prediction = self.student_step(self.backward_simulation(batch, k), Step(step.t, None), batch)
        batch.state["x"] = prediction.x0.detach()
        target = self.two_steps(prediction.x_t, step, batch)
        segment = pseudo_huber(self.lands(prediction, step.r) - target, HUBER)
        return self.sample_losses(prediction.x0, batch) | {"segment": self.config.segment_weight * segment}

    @torch.no_grad()
    def two_steps(self, x_t: Tensor, step: Step, batch: Batch) -> Tensor:
        """Where the guided teacher's step to a time inside the student's step and the student's own from there lead."""
        r, margin = step.r or 0.0, self.config.segment_margin * (step.t - (step.r or 0.0))
        middle = self.schedule.snap(batch.uniform("segment time", r + margin, step.t - margin))
        scale = batch.uniform("segment scale", *self.config.segment_scales)
        teacher = self.teacher(x_t, self.times(step.t, batch), batch, scale)
        x_m = self.schedule.add_noise(teacher.x0, teacher.eps, middle)
        return self.lands(self.student(x_m, middle, batch), step.r)

    def lands(self, prediction: Prediction, r: float | None) -> Tensor:
        """The deterministic step of a prediction to time ``r``, None for the clean end, whatever the sampler."""
        if r is None:
            return prediction.x0
        return self.schedule.add_noise(prediction.x0, prediction.eps, torch.full_like(prediction.t, r))

    def after_update(self, player: str) -> None:
        super().after_update(player)
        if player == "student" and self.config.critic_pull:
            self.average(self.roles.critic, 1 - self.config.critic_pull)
