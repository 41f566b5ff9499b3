"""Trajectory regression: the student walks its own few-step trajectory towards the teacher's.

Simple and Fast Distillation (SFD, Zhou et al. 2024): one teacher trajectory per batch, finely stepped; the student
takes K coarse steps from its own, detached, previous point, and each is pulled to the teacher's point at the same
time. Errors made earlier are therefore corrected, not passed on.

    every step:
        y_0 = x_0 = noise at t_0;  y_k = guided teacher's point at t_k, ``substeps`` DPM-Solver++(2M) steps each
        for k = 0 .. K-1:
            x_{k+1} = sampler step of the student from sg(x_k)
            minimise mean |x_{k+1} - y_{k+1}|,  update

``paths`` trains on that many stored trajectories instead of new ones, so that most of a budget is the student's own.

Regression on ODE pairs (knowledge distillation, Luhman & Luhman 2021; GET, Geng et al. 2023, with its L1): pairs of
noise and the guided teacher's endpoint, made once; the student's whole sampler, K steps with graph, learns the map.

    every step:
        (noise, y) ~ stored pairs
        minimise d( student's sample from noise, y ),  d = L1, L2, pseudo-Huber, or "features":
            L1 + the distance of their states in the teacher's own layers, both noised alike to t ~ U[0.02, 0.3]
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.samplers import dpm_solver_step
from stepdistill.methods.base import DataNeeds, DistillMethod, MethodConfig, PathNeeds
from stepdistill.methods.parts.losses import latent_distance, pseudo_huber


class TrajectoryConfig(MethodConfig):
    """Keys of ``method`` for trajectory regression."""

    substeps: int = Field(3, ge=1, description="teacher solver steps per student step")
    paths: int = Field(0, ge=0, description="stored teacher trajectories to train on; 0: new ones in every step")
    path_steps: int = Field(12, ge=1, description="solver steps of a stored trajectory, a multiple of student.steps")


class TrajectoryRegression(DistillMethod):
    """SFD: a deterministic few-step student, minutes of training, conditions only."""

    Config = TrajectoryConfig
    config: TrajectoryConfig
    name = "sfd"
    family = "Trajectory regression"
    paper = "SFD, Zhou et al. 2024"
    summary = "SFD: regression of the student's own trajectory on the teacher's (deterministic sampler)"
    trains_grid = True
    sampler_name = "ddim"

    @classmethod
    def data_needs(cls, config: TrajectoryConfig) -> DataNeeds:
        stored = PathNeeds(config.paths, config.path_steps, keep="all", solver="dpm", through_grid=True)
        return DataNeeds(paths=stored if config.paths else None)

    @classmethod
    def problems(cls, config: TrajectoryConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        if config.paths and config.path_steps % student_steps:
            fits = f"expected a multiple of student.steps ({student_steps}), such as {3 * student_steps}"
            yield "method.path_steps", f"{fits}, found {config.path_steps}"

    def turns(self, step: int) -> Sequence[str]:
        return ("student",) * len(self.sampler.grid())

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        grid, turn = self.sampler.grid(), batch.turn
        if turn == 0:
            batch.state["points"] = self.stored_points(batch.path) if self.config.paths else self.teacher_points(batch)
            batch.state["x"] = batch.state["points"][0]
        step, cond = grid[turn], batch.path.cond if self.config.paths else batch.cond
        prediction = self.roles.student(batch.state["x"], self.times(step.t, batch), cond)
        x = self.sampler.advance(prediction, step, lambda: batch.noise("step"))
        batch.state["x"] = x.detach()
        return {"regression": (x - batch.state["points"][turn + 1]).abs().mean()}

    def stored_points(self, path: PathRows) -> list[Tensor]:
        """The stored trajectories' x at every time of the student's grid, from noise to the clean end."""
        return list(path.points[:, :: self.config.path_steps // len(self.sampler.grid())].unbind(1))

    @torch.no_grad()
    def teacher_points(self, batch: Batch) -> list[Tensor]:
        """The guided teacher's x at every time of the student's grid, from noise to the clean end."""
        x, previous, points = batch.noise("start"), None, []
        for step in self.sampler.grid():
            points.append(x)
            # A stock grid may start a step beside where the last one ended (DDIM); the teacher then continues.
            shares = torch.linspace(0, 1, self.config.substeps + 1)
            ends = self.schedule.between(torch.tensor(step.t), torch.tensor(step.r or 0.0), shares).tolist()
            for t, r in zip(ends, [*ends[1:-1], step.r], strict=False):
                current = self.teacher(x, self.times(t, batch), batch)
                x = dpm_solver_step(current, previous, None if r is None else self.times(r, batch))
                previous = current
        return [*points, x]


class OdeConfig(MethodConfig):
    """Keys of ``method`` for regression on ODE pairs."""

    pairs: int = Field(2000, ge=1, description="pairs of noise and teacher's endpoint, made once")
    solver_steps: int = Field(12, ge=1, description="DPM-Solver++(2M) steps of the teacher for each pair")
    metric: Literal["l1", "l2", "huber", "features"] = Field(
        "l1", description="distance between sample and endpoint; features: l1, and that of the teacher's hidden states"
    )
    huber: float = Field(0.1, gt=0, description="c of the pseudo-Huber metric sqrt(d^2 + c^2) - c")


class OdeRegression(DistillMethod):
    """The teacher's endpoint map by plain regression: no teacher, critic or images while it trains."""

    Config = OdeConfig
    config: OdeConfig
    name = "ode-regression"
    family = "Trajectory regression"
    paper = "Luhman & Luhman 2021"
    summary = "Regression on stored pairs of noise and the teacher's ODE endpoint (deterministic sampler)"
    sampler_name = "ddim"

    @classmethod
    def data_needs(cls, config: OdeConfig) -> DataNeeds:
        return DataNeeds(paths=PathNeeds(config.pairs, config.solver_steps, solver="dpm"))

    @classmethod
    def may_start_lower(cls, config: OdeConfig) -> bool:
        return True  # the pairs begin at t = 1 all the same

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        x, end = batch.path.points[:, 0], batch.path.points[:, -1]
        for step in self.sampler.grid():
            prediction = self.roles.student(x, self.times(step.t, batch), batch.path.cond)
            x = self.sampler.advance(prediction, step, lambda: batch.noise("step"))
        losses = {"regression": self.distance(x - end)}
        if self.config.metric == "features":
            losses["features"] = latent_distance(self.roles.teacher, x, end, batch.path.cond, batch)
        return losses

    def distance(self, difference: Tensor) -> Tensor:
        """The mean over all elements of the chosen metric."""
        match self.config.metric:
            case "l1" | "features":
                return difference.abs().mean()
            case "l2":
                return difference.square().mean()
            case "huber":
                return pseudo_huber(difference, self.config.huber)
