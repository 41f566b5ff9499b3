"""A method of one's own: every step of the student lands where several DDIM steps of the guided teacher land.

every step:
    k ~ U{0..K-1};  x_t = the student's own rollout to t_k                            (no graph)
    y = ``substeps`` DDIM steps of the guided teacher from x_t to r_k                 (no graph)
    minimise mean |sampler step of the student from x_t to r_k - y|^2
"""

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.methods import Batch, DistillMethod, MethodConfig, Step


class MyConfig(MethodConfig):
    """Keys of ``method``."""

    substeps: int = Field(4, ge=1, description="teacher steps for one of the student")


class MyMethod(DistillMethod):
    """The student skips the teacher's steps; no images, no critic."""

    Config = MyConfig
    config: MyConfig
    summary = "my method: one step of the student for several of the teacher's"
    sampler_name = "ddim"

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        grid = self.sampler.grid()
        k = batch.integer("k", len(grid))
        x_t = self.backward_simulation(batch, k)
        prediction = self.student(x_t, self.times(grid[k].t, batch), batch)
        landed = self.sampler.advance(prediction, grid[k], lambda: batch.noise("step"))
        return {"match": (landed - self.teacher_lands(x_t, grid[k], batch)).square().mean()}

    @torch.no_grad()
    def teacher_lands(self, x: Tensor, step: Step, batch: Batch) -> Tensor:
        """Where the guided teacher is at ``step.r`` when it starts at ``x``, ``step.t``."""
        times = torch.linspace(step.t, step.r or 0.0, self.config.substeps + 1, dtype=torch.float64)
        times = self.schedule.snap(times).tolist()
        for t, r in zip(times, [*times[1:-1], step.r], strict=False):
            prediction = self.teacher(x, self.times(t, batch), batch)
            x = self.sampler.advance(prediction, Step(t, r), lambda: batch.noise("step"))
        return x
