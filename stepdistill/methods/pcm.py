"""Consistency inside segments of the trajectory: PCM (Wang et al. 2024) and Hyper-SD's TSCD (Ren et al. 2024).

    noise -> clean is cut at the times of the k-step sampler; each segment has its own DDIM grid
    every step:
        a segment, and neighbors t > r of its grid;  x_t = alpha x_0 + sigma eps          (x_0 real)
        x_r = one DDIM step of the guided teacher from x_t to r
        PCM:   s = the segment's end;               k = the student's steps
        TSCD:  s ~ U{grid times of the segment below t};   k = 8, then 4, 2, 1
        y = x_r where r = s, else f_target(x_r, r, s);     f(x, t, s) = alpha_s x_0(x, t) + sigma_s eps(x, t)
        minimise Huber( f_student(x_t, t, s) - y );   target <- moving average of the student

One jump per (t, s) is what a network without the input s can express exactly, so PCM's loss can reach zero, at the
teacher's DDIM steps composed to the segment's end; TSCD's cannot, and its free s serves every number of steps.

The adversarial terms of both papers and Hyper-SD's human feedback are not part of it.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.samplers import Sampler, Step
from stepdistill.diffusion.schedule import Prediction
from stepdistill.methods.consistency import LCM, ConsistencyConfig


def segment_points(sampler: Sampler, count: int, solver_steps: int) -> Tensor:
    """Times (count, k + 1), each row ascending through one segment: the ``count``-step run's step, cut in k.

    The first row is the noise end's. Time 0 stands for the clean end, where the sampler's last step goes.
    """
    each = -(-solver_steps // count)
    ends = torch.tensor([(step.r or 0.0, step.t) for step in sampler.grid(count)], dtype=torch.float64)
    parts = torch.linspace(0, 1, each + 1, dtype=torch.float64)
    return sampler.schedule.between(ends[:, :1], ends[:, 1:], parts)


class PCM(LCM):
    """Phased consistency: every point maps to the end of its segment, which is where the sampler's next step starts."""

    name = "pcm"
    family = "Consistency"
    paper = "PCM, Wang et al. 2024"
    summary = "PCM: consistency to the end of each of the sampler's own steps, deterministic"
    sampler_name = "ddim"

    def segments(self, step: int) -> int:
        """The number of segments at training step ``step``."""
        return self.sampler.steps

    def aim(self, position: Tensor, batch: Batch) -> Tensor:
        """Positions (B,) in the segment's grid, 0 its end and below ``position``, that the jumps go to."""
        return torch.zeros_like(position)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        points, position = self.place(batch)
        t, r, s = (pick(points, at) for at in (position, position - 1, self.aim(position, batch)))
        return t, r, s

    def place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The times of each row's segment (B, k + 1), ascending, and a position (B,) in 1..k."""
        count = self.segments(batch.step)
        name, steps = f"segments {count}", self.config.solver_steps
        points = self.table(name, lambda: segment_points(self.sampler, count, steps), batch.device)
        return points[batch.integers("segment", count)], 1 + batch.integers("n", points.shape[1] - 1)

    def solver_step(self, teacher: Prediction, r: Tensor) -> Tensor:
        return self.jump(teacher, r)

    def target(self, slow: Denoiser, x_r: Tensor, r: Tensor, s: Tensor, cond: Conditions) -> Tensor:
        return torch.where(_rows(r != s, x_r), super().target(slow, x_r, r, s, cond), x_r)

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """f(x_t, t, s) = alpha_s x_0 + sigma_s eps, and at s = 0 what the sampler's last step gives."""
        end = self.sampler.advance(prediction, Step(0.0, None), lambda: torch.zeros_like(prediction.x_t))
        moved = self.schedule.add_noise(prediction.x0, prediction.eps, s)
        return torch.where(_rows(s > 0, moved), moved, end)


class TSCDConfig(ConsistencyConfig):
    """Keys of ``method`` for TSCD."""

    segments: list[Annotated[int, Field(ge=1, le=50)]] = Field(
        [8, 4, 2, 1], min_length=1, description="segments of the stages, in order"
    )
    stage_steps: int = Field(1000, gt=0, description="updates of each stage; the last one lasts")
    sampler: Literal["tcd", "ddim"] = Field("tcd", description="how the student is run; flow models take ddim")


class TSCD(PCM):
    """Trajectory-segmented consistency: free jumps inside segments that grow, stage by stage, to the whole."""

    Config = TSCDConfig
    config: TSCDConfig
    name = "tscd"
    family = "Consistency"
    paper = "Hyper-SD, Ren et al. 2024"
    summary = "TSCD (Hyper-SD): trajectory consistency inside segments, 8 to 1 in stages"

    @classmethod
    def sampler_of(cls, config: TSCDConfig) -> str:
        return config.sampler

    @classmethod
    def problems(cls, config: TSCDConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        last = (len(config.segments) - 1) * config.stage_steps
        if train_steps <= last:
            stage = f"which the stage of {config.segments[-1]} segments begins"
            yield "train.steps", f"expected more than {last}, at {stage} (method.stage_steps), found {train_steps}"

    def segments(self, step: int) -> int:
        stages = self.config.segments
        return stages[min(step // self.config.stage_steps, len(stages) - 1)]

    def aim(self, position: Tensor, batch: Batch) -> Tensor:
        return (batch.uniform("s") * position).long()


def pick(points: Tensor, position: Tensor) -> Tensor:
    """Entry ``position`` (B,) of each row of ``points`` (B, k + 1)."""
    return points.gather(1, position[:, None])[:, 0]


def _rows(condition: Tensor, like: Tensor) -> Tensor:
    """A (B,) condition shaped to select from ``like`` (B, ...)."""
    return condition.reshape(-1, *[1] * (like.ndim - 1))
