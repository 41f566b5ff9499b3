"""Progressive distillation (Salimans & Ho 2022), with the guidance of Meng et al. 2023 folded into its first phase.

    phases: a teacher of 2n DDIM steps becomes a student of n, for n = start/2, start/4, ..., student.steps
    teacher: in the first phase the guided teacher; from then on the average of the student over the phase before,
        from which the student starts again as well

    every step:
        k ~ U{grid of n};  t -> m -> r: the student's step k, halved at m;  x_t = alpha x_0 + sigma eps   (x_0 real)
        D_1 = teacher(x_t, t);  x_m = its DDIM step;  D_2 = teacher(x_m, m);  x_r = its DDIM step
        target: the x_0 with which one DDIM step from x_t arrives at x_r. With l = alpha / sigma it is
            D_1 + (l_r - l_m) / (l_r - l_t) (D_2 - D_1),  and D_2 where r is the clean end
        minimise max(alpha_t^2 / sigma_t^2, 1) |student(x_t, t).x0 - target|^2

``inputs: rollout`` needs no images: x_t are then the student's own points, all n of them in turn, as in SFD.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.samplers import Sampler, Step
from stepdistill.diffusion.schedule import Prediction, Schedule, per_sample
from stepdistill.methods.base import DataNeeds, DistillMethod, RealConfig
from stepdistill.roles import Roles


class ProgressiveConfig(RealConfig):
    """Keys of ``method`` for progressive distillation."""

    start_steps: int = Field(32, ge=2, description="DDIM steps of the teacher: student.steps times a power of 2")
    phase_steps: int = Field(100, ge=1, description="training steps before the number of steps is halved again")
    average: float = Field(0.98, ge=0, lt=1, description="decay of the average that is the next phase's teacher")
    inputs: Literal["images", "rollout"] = Field("images", description="noised real images, or the student's own x_t")


class ProgressiveDistillation(DistillMethod):
    """One student step learns two of the teacher, again and again; the last phase lasts to the end of the run."""

    Config = ProgressiveConfig
    config: ProgressiveConfig
    name = "pd"
    family = "Trajectory regression"
    paper = "Progressive distillation, Salimans & Ho 2022"
    summary = "Progressive distillation: half the steps again and again (deterministic sampler)"
    sampler_name = "ddim"
    extra_roles = ("target",)
    shards = False

    def __init__(self, config: ProgressiveConfig, roles: Roles, sampler: Sampler):
        super().__init__(config, roles, sampler)
        self.averages = nn.ParameterList(p.detach().clone() for p in roles.student.network.parameters())
        self.averages.requires_grad_(False)
        self.grids = phase_grids(sampler, config.start_steps)

    def at_size(self, sampler: Sampler, call: Denoiser, decode: Callable[[Tensor], Tensor] | None) -> None:
        super().at_size(sampler, call, decode)
        self.grids = phase_grids(sampler, self.config.start_steps)

    @classmethod
    def data_needs(cls, config: ProgressiveConfig) -> DataNeeds:
        return config.real_needs() if config.inputs == "images" else DataNeeds()

    @classmethod
    def problems(cls, config: ProgressiveConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        halvings = math.log2(config.start_steps / student_steps)
        if halvings < 1 or halvings % 1:
            numbers = f"found {config.start_steps} for {student_steps} steps"
            yield "method.start_steps", f"expected student.steps times 2, 4, 8, ..., {numbers}"
        elif train_steps <= (last := round(halvings - 1) * config.phase_steps):
            phases = f"which the phase of {student_steps} steps begins"
            yield "train.steps", f"expected more than {last}, at {phases} (method.phase_steps), found {train_steps}"

    def phase(self, step: int) -> int:
        """The phase of a training step, from 0."""
        return min(step // self.config.phase_steps, len(self.grids) - 1)

    def turns(self, step: int) -> Sequence[str]:
        return ("student",) * (len(self.grids[self.phase(step)]) if self.config.inputs == "rollout" else 1)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        phase = self.phase(batch.step)
        if phase > 0 and batch.turn == 0 and batch.step == phase * self.config.phase_steps:
            # Nothing has moved since the phase before ended; micro-batches repeat the copies to no effect.
            for role in (self.roles.target, self.roles.student):
                _copy(self.averages, role.network)
        grid, rollout = self.grids[phase], self.config.inputs == "rollout"
        turn = torch.full((batch.size,), batch.turn, device=batch.device)
        halves = self.halves(phase, turn if rollout else batch.integers("k", len(grid)))
        t = halves[:, 0]
        if not rollout:
            x_t = self.schedule.add_noise(batch.latents, batch.noise("forward"), t)
        else:
            x_t = batch.noise("start") if batch.turn == 0 else batch.state["x"]
        prediction = self.student(x_t, t, batch)
        if rollout:
            batch.state["x"] = self.sampler.advance(prediction, grid[batch.turn], lambda: batch.noise("step")).detach()
        alpha, sigma = self.schedule.coefficients(t)
        weight = per_sample((alpha / sigma).square().clamp_min(1), x_t)
        return {"progressive": (weight * (prediction.x0 - self.target(x_t, halves, phase, batch)).square()).mean()}

    @torch.no_grad()
    def after_update(self, player: str) -> None:
        moving = [p.detach() for p in self.roles.student.network.parameters()]
        torch._foreach_lerp_(list(self.averages), moving, 1 - self.config.average)

    def extra_modules(self) -> dict[str, nn.Module]:
        return {"average": self.averages}

    def halves(self, phase: int, k: Tensor) -> Tensor:
        """(B, 4): t, m, r of the student's steps ``k`` (B,), and 1 where r is the clean end."""

        def steps() -> Tensor:
            halves = halved(self.grids[phase], self.schedule)
            rows = [(a.t, b.t, b.r or 0.0, b.r is None) for a, b in zip(halves[::2], halves[1::2], strict=True)]
            return torch.tensor(rows, dtype=torch.float64)

        return self.table(f"halves {phase}", steps, k.device)[k]

    @torch.no_grad()
    def target(self, x_t: Tensor, halves: Tensor, phase: int, batch: Batch) -> Tensor:
        """The x_0 (B, ...) with which one DDIM step does what the phase's teacher does in two."""
        t, m, r, clean = halves.unbind(1)
        first = self.phase_teacher(x_t, t, phase, batch)
        second = self.phase_teacher(self.schedule.add_noise(first.x0, first.eps, m), m, phase, batch)
        l_t, l_m, l_r = (alpha / sigma for alpha, sigma in map(self.schedule.coefficients, (t, m, r)))
        share = torch.where(clean > 0, 1.0, (l_r - l_m) / (l_r - l_t))
        return torch.lerp(first.x0, second.x0, per_sample(share, x_t))

    def phase_teacher(self, x_t: Tensor, t: Tensor, phase: int, batch: Batch) -> Prediction:
        """The guided teacher at first, then the student of the phase before."""
        return self.roles.target(x_t, t, batch.cond) if phase else self.teacher(x_t, t, batch)


@torch.no_grad()
def _copy(values: nn.ParameterList, network: nn.Module) -> None:
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.copy_(value)


def phase_grids(sampler: Sampler, start_steps: int) -> list[list[Step]]:
    """The grid of each phase, from the finest to the exported one; each holds every time of the one after it."""
    grids = [sampler.grid()]
    while 2 * len(grids[0]) < start_steps:
        grids.insert(0, halved(grids[0], sampler.schedule))
    return grids


def halved(grid: Sequence[Step], schedule: Schedule) -> list[Step]:
    """Every step as two; on VP the trailing grid of twice as many steps, up to rounding to the table's entries."""
    # The trailing grid's clean end lies one entry below the table's first.
    end = schedule.time(torch.tensor(-1.0)).item() if schedule.name == "vp_discrete" else 0.0
    steps = []
    for t, r in grid:
        low = torch.tensor(end if r is None else r, dtype=torch.float64)
        middle = schedule.between(low, torch.tensor(t, dtype=torch.float64), torch.tensor(0.5)).item()
        steps += [Step(t, middle), Step(middle, r)]
    return steps
