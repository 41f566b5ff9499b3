"""Trajectory regression: the student walks its own few-step trajectory towards the teacher's.

Simple and Fast Distillation (SFD, Zhou et al. 2024): one teacher trajectory per batch, finely stepped; the student
takes K coarse steps from its own, detached, previous point, and each is pulled to the teacher's point at the same
time. Errors made earlier are therefore corrected, not passed on.

    every step:
        y_0 = x_0 = noise at t_0;  y_k = guided teacher's point at t_k, ``substeps`` DPM-Solver++(2M) steps each
        for k = 0 .. K-1:
            x_{k+1} = sampler step of the student from sg(x_k)
            minimise mean |x_{k+1} - y_{k+1}|,  update
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.methods.base import DistillMethod, MethodConfig
from stepdistill.samplers import dpm_solver_step


class TrajectoryConfig(MethodConfig):
    """Keys of ``method`` for trajectory regression."""

    substeps: int = Field(3, ge=1, description="teacher solver steps per student step")


class TrajectoryRegression(DistillMethod):
    """SFD: a deterministic few-step student, minutes of training, conditions only."""

    Config = TrajectoryConfig
    config: TrajectoryConfig
    summary = "SFD: regression of the student's own trajectory on the teacher's (deterministic sampler)"
    sampler_name = "ddim"

    def turns(self, step: int) -> Sequence[str]:
        return ("student",) * len(self.sampler.grid())

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        grid, turn = self.sampler.grid(), batch.turn
        if turn == 0:
            batch.state["points"] = self.teacher_points(batch)
            batch.state["x"] = batch.state["points"][0]
        step = grid[turn]
        prediction = self.student(batch.state["x"], self.times(step.t, batch), batch)
        x = self.sampler.advance(prediction, step, lambda: batch.noise("step"))
        batch.state["x"] = x.detach()
        return {"regression": (x - batch.state["points"][turn + 1]).abs().mean()}

    @torch.no_grad()
    def teacher_points(self, batch: Batch) -> list[Tensor]:
        """The guided teacher's x at every time of the student's grid, from noise to the clean end."""
        x, previous, points = batch.noise("start"), None, []
        for step in self.sampler.grid():
            points.append(x)
            # A stock grid may start a step beside where the last one ended (DDIM); the teacher just goes on.
            ends = torch.linspace(step.t, step.r or 0.0, self.config.substeps + 1, dtype=torch.float64)
            ends = self.schedule.snap(ends).tolist()
            for t, r in zip(ends, [*ends[1:-1], step.r], strict=False):
                current = self.teacher(x, self.times(t, batch), batch)
                x = dpm_solver_step(current, previous, None if r is None else self.times(r, batch))
                previous = current
        return [*points, x]
