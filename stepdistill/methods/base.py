"""What every distillation method is: who plays when, and each player's loss."""

import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.devices import DeviceTable
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.samplers import SAMPLERS, Sampler, Step
from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError, RunError
from stepdistill.roles import Roles, RoleTraining

Family = Literal[
    "Trajectory regression", "Consistency", "Distribution matching", "Score identity", "Adversarial", "Guidance"
]
FAMILY_NAMES: tuple[str, ...] = get_args(Family)
"""In the order of the documentation's tables."""


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


@dataclass(frozen=True)
class PathNeeds:
    """Teacher trajectories a method trains on, made once from noise and stored.

    Args:
        count: how many.
        steps: solver steps of the guided teacher, from noise to the clean end.
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


PACKAGE = Path(__file__).parents[1]


@contextmanager
def own_mistakes(method: "DistillMethod", called: Callable[..., Any]) -> Iterator[None]:
    """Inside, an exception of a user's method becomes one line that begins with its place in the user's file.

    ``called`` is the method's function that is called inside.

    Memory is no mistake of the method's, and its exceptions pass as they are; so do all of the package's own methods.

    Raises:
        InputError: in the place of the exception.
    """
    kind = type(method)
    file = inspect.getsourcefile(kind)
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RunError):
        raise
    except Exception as error:
        memory = isinstance(error, RuntimeError) and "memory" in str(error)
        if file is None or PACKAGE in Path(file).resolve().parents or memory:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        # What it returned is wrong, or it left the call to the package's class.
        where = called if inspect.getsourcefile(called) == file else kind
        line = lines[-1] if lines else inspect.getsourcelines(where)[1]
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{file}:{line}: {name}{error}") from error


class DistillMethod(ABC):
    """The mathematics of one paper. Subclasses read like the paper's algorithm box.

    Class attributes:
        Config: its keys of the recipe's ``method`` section.
        name, family, paper: its recipe name, and what the documentation's tables say; a user's file needs none.
        summary: one line for ``stepdistill methods``.
        sampler_name: the default few-step sampler's name.
        extra_roles: the roles it needs beside teacher and student, under any names ("critic", "old_policy"), which
            are also those of their files in a checkpoint.
        slow: names of those that start as the student, and that no player moves.
        guides_itself: it forms guidance otherwise than by :meth:`teacher`, which alone knows interval and rescale.
        guides_both: it compares two guided scores that begin equal: bf16 rounds their difference away.
        exported: the roles beside the student whose networks belong in an export, in folders of their names.
        trains_grid: whether the student's updates start at the times of its sampler's grid.
        shards: whether its networks' weights may be shared out; not where it keeps copies of weights, or derives
            networks forwards.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[str]
    summary: ClassVar[str]
    sampler_name: ClassVar[str] = "renoise"
    players: ClassVar[tuple[str, ...]] = ("student",)
    extra_roles: ClassVar[tuple[str, ...]] = ()
    slow: ClassVar[tuple[str, ...]] = ("target",)
    exported: ClassVar[tuple[str, ...]] = ()
    guides_itself: ClassVar[bool] = False
    guides_both: ClassVar[bool] = False
    trains_grid: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        for name in cls.extra_roles:
            if not name.isidentifier() or name in ("teacher", "student", "scale", "decode", "items"):
                raise TypeError(f"{cls.__name__}.extra_roles: expected names of further roles, found {name!r}")
        if cls.sampler_name not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise TypeError(f"{cls.__name__}.sampler_name: expected one of {known}, found {cls.sampler_name!r}")

    def __init__(self, config: MethodConfig, roles: Roles, sampler: Sampler):
        self.config, self.roles, self.sampler = config, roles, sampler
        self.schedule = sampler.schedule
        self._tables: dict[tuple[Sampler, str], DeviceTable] = {}

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
        """The network of ``role`` with whatever the method adds to it (see stepdistill.roles.views); ``scale`` is w."""
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

    def at_size(self, sampler: Sampler, call: Denoiser, decode: Callable[[Tensor], Tensor] | None) -> None:
        """Set what depends on the size of the samples, before a batch of another size than the last.

        Methods that this one holds are set as well.

        Args:
            sampler: the few-step sampler, whose grid and schedule are those of this size.
            call: a denoiser that is called as every role's network is at this size.
            decode: see :class:`stepdistill.roles.Roles`.
        """
        self.sampler, self.schedule, self.roles.decode = sampler, sampler.schedule, decode
        for _, role in self.roles.items():
            role.call_as(call)
        for part in vars(self).values():
            if isinstance(part, DistillMethod):
                part.at_size(sampler, call, decode)

    def checked_prepare(self, batch: Batch) -> None:
        """:meth:`prepare`, with mistakes as in :meth:`checked_losses`."""
        with own_mistakes(self, self.prepare):
            self.prepare(batch)

    def checked_losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """:meth:`losses` for a trainer: a mistake in a method's own code is named by its file and line.

        Raises:
            InputError: there is one.
        """
        with own_mistakes(self, self.losses):
            terms = self.losses(player, batch)
            scalars = isinstance(terms, Mapping) and all(isinstance(x, Tensor) and x.ndim == 0 for x in terms.values())
            if not scalars or not terms:
                kind = f"{type(terms).__name__} of {[*terms.items()]}" if isinstance(terms, Mapping) else type(terms)
                raise TypeError(f"losses({player!r}): expected a dict of named 0-d tensors, found {kind}")
        return terms

    def checked_modules(self, player: str) -> list[nn.Module]:
        """:meth:`modules`, with mistakes as in :meth:`checked_losses`."""
        with own_mistakes(self, self.modules):
            return self.modules(player)

    def checked_turns(self, step: int) -> Sequence[str]:
        """:meth:`turns`, with mistakes as in :meth:`checked_losses`."""
        with own_mistakes(self, self.turns):
            turns = tuple(self.turns(step))  # which may be an iterator
            if unknown := set(turns) - set(self.players):
                raise ValueError(f"turns({step}): expected players of {self.players}, found {sorted(unknown)}")
        return turns

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

    def student(self, x_t: Tensor, t: Tensor, batch: Batch, r: Tensor | None = None) -> Prediction:
        """The student, with graph unless the caller forbids it; ``r`` is the end of the step where it takes one."""
        second = () if r is None else (r,)
        return self.roles.student(x_t, t, batch.cond, *second)

    def student_step(self, x_t: Tensor, step: Step, batch: Batch) -> Prediction:
        """The student at the start of a step of its sampler, with the step's end where it takes one."""
        r = self.times(step.r or 0.0, batch) if self.roles.student.takes_r else None
        return self.student(x_t, self.times(step.t, batch), batch, r)

    def times(self, time: float, batch: Batch) -> Tensor:
        """One time for every row, (B,)."""
        return torch.full((batch.size,), time, device=batch.device, dtype=torch.float64)

    def table(self, name: str, make: Callable[[], Tensor], device: torch.device | str) -> Tensor:
        """A constant by its name, such as a grid of times, made once for each size and copied to a device once."""
        return self._tables.setdefault((self.sampler, name), DeviceTable(make)).on(device)

    @torch.no_grad()
    def backward_simulation(self, batch: Batch, upto: int) -> Tensor:
        """The student's own x at grid position ``upto``, from pure noise (DMD2, Yin et al. 2024, sec. 4.5)."""
        x = batch.noise("start")
        for index, step in enumerate(self.sampler.grid()[:upto]):
            prediction = self.student_step(x, step, batch)
            x = self.sampler.advance(prediction, step, lambda i=index: batch.noise(f"rollout {i}"))
        return x

    def generate(self, batch: Batch, position: int | None = None) -> Tensor:
        """x_0 from the student at a grid position of its own rollout; with graph where grad is enabled.

        Args:
            position: the same for the whole batch (and on every device), as in DMD2; None: a uniform draw.
        """
        k = batch.integer("k", len(self.sampler.grid())) if position is None else position
        x_t = self.backward_simulation(batch, k)
        return self.student_step(x_t, Step(self.sampler.grid()[k].t, None), batch).x0

    @torch.no_grad()
    def average(self, role: Denoiser, decay: float) -> None:
        """Move the weights of ``role`` towards the student's: role <- decay role + (1 - decay) student."""
        slow, fast = role.network.parameters(), self.roles.student.network.parameters()
        torch._foreach_lerp_([p.detach() for p in slow], [p.detach() for p in fast], 1 - decay)
