"""What every distillation method is: who plays when, and each player's loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.denoiser import Denoiser
from stepdistill.device_table import DeviceTable
from stepdistill.guidance import guided
from stepdistill.parts import part
from stepdistill.samplers import Sampler
from stepdistill.schedule import Prediction


class MethodConfig(BaseModel):
    """A method's part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="after")
    def _range_of_times(self) -> "MethodConfig":
        low, high = getattr(self, "t_min", 0.0), getattr(self, "t_max", 1.0)
        if low > high:
            raise ValueError(f"expected t_min not above t_max, got {low:g} and {high:g}")
        return self


class CriticConfig(MethodConfig):
    """Keys of ``method`` for methods with a critic."""

    critic: Literal["lora", "full"] | None = Field(
        None, description="the critic's weights: an adapter, or all of them; null: as student.train"
    )
    time_shift: float = Field(
        1.0,
        gt=0,
        description="s of t = s u/(1 + (s - 1) u) for a flow model's noise times (matching, critic, GAN): above 1 more "
        "noise, for large pictures; 1: u itself",
    )


RoleTraining = Literal["full", "lora", "frozen"]
"""A role's weights: a copy of the teacher's, an adapter on them, or the teacher's own, untouched."""


@dataclass(frozen=True)
class PathNeeds:
    """Teacher trajectories a method trains on, made once from noise and stored.

    Args:
        count: how many. steps: solver steps of the guided teacher, from noise to the clean end.
        keep: "ends" (noise and clean end) or "all" (every point between as well).
        scales: the guidance scale of each is uniform in [low, high]; None: the teacher's own for all.
        solver: "ddim", or "dpm" for DPM-Solver++(2M), which is as exact in fewer steps.
        through_grid: whether each step of the student's own grid is solved in an equal number of them, so that its
            times are among theirs; ``steps`` is then a multiple of the student's.
    """

    count: int
    steps: int
    keep: Literal["ends", "all"] = "ends"
    scales: tuple[float, float] | None = None
    solver: Literal["ddim", "dpm"] = "ddim"
    through_grid: bool = False


@dataclass(frozen=True)
class DataNeeds:
    """What a method must be given: conditions (prompts or classes) always, the rest only where stated.

    Args:
        images: real ones, as ``batch.latents``.
        paths: trajectories, as ``batch.path``.
        made: trajectories whose clean ends are ``batch.latents``, in place of images.
    """

    images: bool = False
    conditions: bool = True
    paths: PathNeeds | None = None
    made: PathNeeds | None = None


class RealConfig(MethodConfig):
    """Keys of ``method`` where real samples are trained on."""

    real: Literal["data", "teacher"] = Field(
        "data", description="real samples: data.images, or made by the guided teacher for data.conditions, once"
    )
    real_rows: int = Field(2000, ge=1, description="samples that the teacher makes, where real is teacher")
    real_steps: int = Field(20, ge=2, description="DPM-Solver++ steps of each; guidance makes one two evaluations")

    def real_needs(self, scale: float | None = None) -> DataNeeds:
        """Images, or as many samples of the teacher under guidance ``scale``; None: the recipe's."""
        if self.real == "data":
            return DataNeeds(images=True)
        scales = None if scale is None else (scale, scale)
        return DataNeeds(made=PathNeeds(self.real_rows, self.real_steps, scales=scales, solver="dpm"))


@dataclass
class Roles:
    """The networks of a run.

    ``target`` is the student's slow copy and ``encoder`` its inverse, where a method wants them. ``scale`` is the
    teacher's guidance scale, the one that is distilled. ``decode`` maps latents (B, ...) to images (B, C, H, W) in
    [-1, 1], with graph; None where the pipeline has no autoencoder.
    """

    teacher: Denoiser
    student: Denoiser
    critic: Denoiser | None = None
    target: Denoiser | None = None
    encoder: Denoiser | None = None
    scale: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None


class DistillMethod(ABC):
    """The mathematics of one paper. Subclasses read like the paper's algorithm box.

    Class attributes:
        Config: its keys of the recipe's ``method`` section.
        summary: one line for ``stepdistill methods``.
        sampler_name: the default few-step sampler's name.
        extra_roles: the roles it needs beside teacher and student: "critic", "target", "encoder".
        guides_itself: it forms guidance otherwise than by :meth:`teacher`, which alone knows interval and rescale.
        guides_both: it compares two guided scores that begin equal: bf16 rounds their difference away.
        exported: the roles beside the student whose networks belong in an export, in folders of their names.
        trains_grid: whether the student's updates start at the times of its sampler's grid.
        shards: whether its networks' weights may be shared out; not where it keeps copies of weights, or derives
            networks forwards.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    summary: ClassVar[str]
    sampler_name: ClassVar[str] = "renoise"
    players: ClassVar[tuple[str, ...]] = ("student",)
    extra_roles: ClassVar[tuple[str, ...]] = ()
    exported: ClassVar[tuple[str, ...]] = ()
    guides_itself: ClassVar[bool] = False
    guides_both: ClassVar[bool] = False
    trains_grid: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def __init__(self, config: MethodConfig, roles: Roles, sampler: Sampler):
        self.config, self.roles, self.sampler = config, roles, sampler
        self.schedule = sampler.schedule
        self._tables: dict[str, DeviceTable] = {}

    @classmethod
    def data_needs(cls, config: MethodConfig) -> DataNeeds:
        """What this configuration must be given."""
        return DataNeeds()

    @classmethod
    def problems(cls, config: MethodConfig, student_steps: int, train_steps: int) -> Iterator[tuple[str, str]]:
        """What of this configuration does not fit the run: a recipe key, dotted, and what is wrong with it."""
        yield from ()

    @classmethod
    def may_start_lower(cls, config: MethodConfig) -> bool:
        """Whether its student may start below t = 1 (``student.start``), where it sees pure noise all the same.

        False where what it learns from are points of the teacher's path at that time, among which noise is none.
        """
        return False

    @classmethod
    def sampler_of(cls, config: MethodConfig) -> str:
        """The name of the few-step sampler this configuration trains for."""
        return cls.sampler_name

    @classmethod
    def role_training(cls, config: MethodConfig) -> Mapping[str, RoleTraining]:
        """Roles whose weights are made otherwise than ``student.train`` says."""
        critic = getattr(config, "critic", None)
        return {"critic": critic} if critic else {}

    @classmethod
    def adapt(cls, config: MethodConfig, role: str, network: nn.Module, scale: float) -> nn.Module:
        """The network of ``role`` with whatever the method adds to it (see stepdistill.adapters); ``scale`` is w."""
        return network

    def turns(self, step: int) -> Sequence[str]:
        """The players that move at ``step``, in order; a player may move more than once."""
        return self.players

    def shares(self, step: int) -> list[float] | None:
        """The share of the student's updates at each position of its grid, noise end first, at training step ``step``.

        None: its times are not the grid's.
        """
        count = len(self.sampler.grid())
        return [1 / count] * count if self.trains_grid else None

    def prepare(self, batch: Batch) -> None:  # noqa: B027
        """Called once before training with the shapes of a real batch (to build heads on features)."""

    @abstractmethod
    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The named, already weighted loss terms of ``player``; their sum is minimised by it."""

    def modules(self, player: str) -> list[nn.Module]:
        """The networks whose parameters ``player`` moves."""
        return [getattr(self.roles, player).network]

    def after_update(self, player: str) -> None:  # noqa: B027
        """Called after each optimizer step of ``player`` (moving averages)."""

    def statistics(self) -> list[Tensor]:
        """Sums over a batch that :meth:`after_update` reads: added up, in place, over the processes that share it."""
        return []

    def extra_modules(self) -> dict[str, nn.Module]:
        """Networks of the method's own that belong in a checkpoint, by name."""
        return {}

    def teacher(self, x_t: Tensor, t: Tensor, batch: Batch, scale: float | Tensor | None = None) -> Prediction:
        """The guided teacher, without graph; ``scale`` is a number or one per row (B,), by default the recipe's."""
        scale = self.roles.scale if scale is None else scale
        with torch.no_grad():
            return guided(self.roles.teacher, x_t, t, batch.cond, batch.null, scale)

    def student(self, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        """The student, with graph unless the caller forbids it."""
        return self.roles.student(x_t, t, batch.cond)

    def times(self, time: float, batch: Batch) -> Tensor:
        """One time for every row, (B,)."""
        return torch.full((batch.size,), time, device=batch.device, dtype=torch.float64)

    def table(self, name: str, make: Callable[[], Tensor], device: torch.device | str) -> Tensor:
        """A constant of the run by its name, such as a grid of times, made once and copied to a device once."""
        return self._tables.setdefault(name, DeviceTable(make)).on(device)

    @torch.no_grad()
    def backward_simulation(self, batch: Batch, upto: int) -> Tensor:
        """The student's own x at grid position ``upto``, from pure noise (DMD2, Yin et al. 2024, sec. 4.5)."""
        x = batch.noise("start")
        for index, step in enumerate(self.sampler.grid()[:upto]):
            prediction = self.student(x, self.times(step.t, batch), batch)
            x = self.sampler.advance(prediction, step, lambda i=index: batch.noise(f"rollout {i}"))
        return x

    def generate(self, batch: Batch, position: int | None = None) -> Tensor:
        """x_0 from the student at a grid position of its own rollout; with graph where grad is enabled.

        Args:
            position: the same for the whole batch (and on every device), as in DMD2; None: a uniform draw.
        """
        k = batch.integer("k", len(self.sampler.grid())) if position is None else position
        x_t = self.backward_simulation(batch, k)
        return self.student(x_t, self.times(self.sampler.grid()[k].t, batch), batch).x0

    @torch.no_grad()
    def average(self, role: Denoiser, decay: float) -> None:
        """Move the weights of ``role`` towards the student's: role <- decay role + (1 - decay) student."""
        slow, fast = role.network.parameters(), self.roles.student.network.parameters()
        torch._foreach_lerp_([part(p) for p in slow], [part(p) for p in fast], 1 - decay)
