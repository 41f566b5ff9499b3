"""What every distillation method is: who plays when, and each player's loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.guidance import guided
from stepdistill.pipeline.denoiser import Denoiser
from stepdistill.samplers import Sampler
from stepdistill.schedule import Prediction


class MethodConfig(BaseModel):
    """A method's part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class DataNeeds:
    """What a method must be given: conditions (prompts or classes) always, images only where stated."""

    images: bool = False
    conditions: bool = True


@dataclass
class Roles:
    """The networks of a run. ``target`` is the student's slow copy where a method wants one.

    ``scale`` is the teacher's guidance scale, the one that is distilled.
    """

    teacher: Denoiser
    student: Denoiser
    critic: Denoiser | None = None
    target: Denoiser | None = None
    scale: float = 1.0


class DistillMethod(ABC):
    """The mathematics of one paper. Subclasses read like the paper's algorithm box.

    Class attributes:
        Config: its keys of the recipe's ``method`` section.
        summary: one line for ``stepdistill methods``. sampler: the default few-step sampler's name.
        roles: the roles it needs beside teacher and student: "critic", "target".
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    summary: ClassVar[str]
    sampler_name: ClassVar[str] = "renoise"
    players: ClassVar[tuple[str, ...]] = ("student",)
    extra_roles: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MethodConfig, roles: Roles, sampler: Sampler):
        self.config, self.roles, self.sampler = config, roles, sampler
        self.schedule = sampler.schedule

    @classmethod
    def data_needs(cls, config: MethodConfig) -> DataNeeds:
        """What this configuration must be given."""
        return DataNeeds()

    @classmethod
    def sampler_of(cls, config: MethodConfig) -> str:
        """The name of the few-step sampler this configuration trains for."""
        return cls.sampler_name

    def turns(self, step: int) -> Sequence[str]:
        """The players that move at ``step``, in order; a player may move more than once."""
        return self.players

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

    def extra_modules(self) -> dict[str, nn.Module]:
        """Networks of the method's own that belong in a checkpoint, by name."""
        return {}

    def teacher(self, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        """The guided teacher, without graph."""
        with torch.no_grad():
            return guided(self.roles.teacher, x_t, t, batch.cond, batch.null, self.roles.scale)

    def student(self, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        """The student, with graph unless the caller forbids it."""
        return self.roles.student(x_t, t, batch.cond)

    def times(self, time: float, batch: Batch) -> Tensor:
        """One time for every row, (B,)."""
        return torch.full((batch.size,), time, device=batch.device, dtype=torch.float64)

    @torch.no_grad()
    def backward_simulation(self, batch: Batch, upto: int) -> Tensor:
        """The student's own x at grid position ``upto``, from pure noise (DMD2, Yin et al. 2024, sec. 4.5)."""
        x = batch.noise("start")
        for index, step in enumerate(self.sampler.grid()[:upto]):
            prediction = self.student(x, self.times(step.t, batch), batch)
            x = self.sampler.advance(prediction, step, lambda i=index: batch.noise(f"rollout {i}"))
        return x


def mean_per_sample(value: Tensor) -> Tensor:
    """Mean over all but the batch dimension, kept broadcastable: (B, ...) -> (B, 1, ...)."""
    return value.mean(dim=tuple(range(1, value.ndim)), keepdim=True)
