"""Target-driven distillation, TDD (Wang et al. 2024): only the jumps that a few-step sampler makes are trained.

    S = the times that the n-step sampler visits, for every n in n_min..n_max
    every step:
        t, r = neighbors on the teacher's DDIM grid;  x_t = alpha x_0 + sigma eps         (x_0 real)
        s' ~ U{times of S in [t - longest step of n_min, r]};  s = s' (1 - undershoot U[0, 1])
        x_r = one DDIM step of the guided teacher from x_t to r
        minimise Huber( f(x_t, t, s) - sg f(x_r, r, s) ),   f = TCD's jump, both of the student itself

The undershoot is the sampler's own: TCD goes to s = 0.7 s' and noises back up to s'. Guidance is decoupled from the
condition: for a share of the rows the prompt is the empty one, where every w gives the unconditional teacher. So the
student keeps an unconditional branch, and CFG still tunes it.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.errors import InputError
from stepdistill.methods.consistency import TCD, SolverConfig


class TDDConfig(SolverConfig):
    """Keys of ``method`` for TDD."""

    n_min: int = Field(4, ge=1, description="fewest sampling steps whose times are trained")
    n_max: int = Field(8, ge=1, le=50, description="most sampling steps whose times are trained")
    undershoot: float = Field(0.3, ge=0, lt=1, description="largest share of a target time that a jump overshoots by")
    null_share: float = Field(0.2, ge=0, lt=1, description="share of rows whose condition is the empty one")
    sampler: Literal["tcd", "ddim"] = Field("tcd", description="how the student is run; flow models take ddim")

    @model_validator(mode="after")
    def _range_of_n(self) -> "TDDConfig":
        if self.n_min > self.n_max:
            raise ValueError(f"expected n_min at most n_max, got {self.n_min} and {self.n_max}")
        return self


class TDD(TCD):
    """Trajectory consistency towards the times of n-step schedules, with the student as its own target."""

    Config = TDDConfig
    config: TDDConfig
    name = "tdd"
    family = "Consistency"
    paper = "TDD, Wang et al. 2024"
    summary = "TDD: trajectory consistency towards the times of 4- to 8-step schedules, CFG stays tunable"
    extra_roles = ()

    @classmethod
    def sampler_of(cls, config: TDDConfig) -> str:
        return config.sampler

    def prepare(self, batch: Batch) -> None:
        super().prepare(batch)
        if self.config.null_share and batch.null is None:
            raise InputError(f"method.null_share: expected 0 without an empty prompt, found {self.config.null_share}")

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        batch = batch.but(cond=batch.partly_empty("empty", self.config.null_share)[0])
        student = self.roles.student
        return {"consistency": self.consistency(student, student, *self.draw(batch), batch)}

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        grid = self.solver_grid(batch)
        n = self.first_index + batch.integers("n", len(grid) - self.first_index)
        t, r = grid[n], grid[n - 1]
        further = self.config.undershoot * batch.uniform("undershoot")
        return t, r, self.schedule.snap(self.aim(t, r, batch) * (1 - further))

    def aim(self, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """A time of some n-step schedule within one step below ``t`` and not above ``r``, (B,)."""
        times, longest = schedule_times(self.sampler, self.config.n_min, self.config.n_max)
        times = self.table("schedule times", lambda: times, batch.device)
        # Where the solver's step is longer than a sampler's, the nearest time below it is the only one.
        last = torch.searchsorted(times, r + 1e-6, right=True) - 1
        first = torch.minimum(torch.searchsorted(times, t - longest - 1e-6), last)
        return times[first + (batch.uniform("aim") * (last - first + 1)).long()]

    def after_update(self, player: str) -> None:
        """No moving average: the target is the student."""


def schedule_times(sampler: Sampler, n_min: int, n_max: int) -> tuple[Tensor, float]:
    """The times at which n-step runs land, ascending from 0, and the longest step of the n_min-step run."""
    grids = {n: sampler.grid(n) for n in range(n_min, n_max + 1)}
    times = {step.r or 0.0 for grid in grids.values() for step in grid}
    return torch.tensor(sorted(times), dtype=torch.float64), max(t - (r or 0.0) for t, r in grids[n_min])
