"""What a method gets to see of a step: conditions, images if it asked for them, and repeatable randomness."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from stepdistill.data.host_rows import to_device
from stepdistill.errors import InputError

T = TypeVar("T")


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by ``key`` alone (numbers and strings), the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def random_rows(first: int, size: int, *key: object) -> Iterator[np.random.Generator]:
    """For each of the rows ``first`` .. ``first + size`` of a draw its random numbers, until the next row's.

    128 bits of ``key`` (numbers and strings) are the key of a Philox generator, and the row is the top word of its
    counter: no two rows or draws share numbers, and they are the same on every machine.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    stream = np.random.Philox(key=int.from_bytes(digest, "big"))
    numbers, counter = np.random.Generator(stream), [0, 0, 0, 0]
    # Of plain numbers a state is set in less than half of the time that one of arrays takes.
    state: Any = stream.state
    state["state"] = {"counter": counter, "key": state["state"]["key"].tolist()}
    state["buffer"] = state["buffer"].tolist()
    for row in range(first, first + size):
        counter[3] = row
        stream.state = state
        yield numbers


@dataclass(frozen=True)
class PathRows:
    """Stored trajectories of the guided teacher, one per row of the batch and independent of the batch's conditions.

    Args:
        points: (B, K + 1, ...) from noise, index 0, to the clean end, index K.
        times: of the points (K + 1,), from 1 to 0.
        cond, null: the conditions they were made with. scales: the guidance scales they were made with (B,).
    """

    points: Tensor
    times: Tensor
    cond: dict[str, Tensor]
    null: dict[str, Tensor] | None
    scales: Tensor


class Given(Generic[T]):
    """A field that is None until it is given, and says so to whoever reads it before.

    Args:
        needs: what a method declares to be given it.
    """

    def __init__(self, needs: str):
        self.needs = needs

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, batch: None, owner: type) -> None: ...

    @overload
    def __get__(self, batch: "Batch", owner: type) -> T: ...

    def __get__(self, batch: "Batch | None", owner: type) -> Any:
        value = vars(batch).get(self.name) if batch is not None else None
        if batch is not None and value is None:
            raise InputError(f"batch.{self.name} is not given: declare DataNeeds({self.needs}) in data_needs()")
        return value

    def __set__(self, batch: "Batch", value: T | None) -> None:
        vars(batch)[self.name] = value


@dataclass(repr=False, eq=False)
class Batch:
    """Rows ``first`` .. ``first + size`` of the global batch of one step.

    Every draw depends on (seed, step, turn, name) and a sample's global index alone: not on micro-batches, processes or
    interruptions. Only these rows are drawn.

    Args:
        cond: conditions of these rows.
        null: the empty condition, of the same length; None: there is none.
        latents: real x_0, (size, ...), where the method needs images.
        path: stored trajectories, where the method needs them.
        shape: one sample's shape.
        state: scratch of the method, kept between the turns of one step.
        signals: diagnostics to log for this turn, 0-d tensors by name; not part of any loss.
    """

    seed: int
    step: int
    first: int
    size: int
    shape: tuple[int, ...]
    cond: dict[str, Tensor]
    null: dict[str, Tensor] | None = None
    latents: Given[Tensor] = Given("images=True")
    path: Given[PathRows] = Given("paths=PathNeeds(...)")
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    turn: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def empty(self) -> dict[str, Tensor]:
        """``null``, for what cannot do without it.

        Raises:
            InputError: there is none.
        """
        if self.null is None:
            raise InputError("batch.empty: expected a teacher with an empty condition, found none")
        return self.null

    def but(self, **changes: Any) -> "Batch":
        """The same batch with other fields; scratch and signals are shared."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def _generator(self, name: str) -> torch.Generator:
        """For one draw that the whole global batch shares."""
        return generator(*self._key(name))

    def _rows(self, name: str) -> Iterator[np.random.Generator]:
        return random_rows(self.first, self.size, *self._key(name))

    def _key(self, name: str) -> tuple[object, ...]:
        return self.seed, self.step, self.turn, name

    def _mine(self, rows: Tensor) -> Tensor:
        """What was drawn for these rows, on their device."""
        return to_device(rows, self.device)

    def _uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), (size,) float64 on the host."""
        return torch.tensor([row.random() for row in self._rows(name)], dtype=torch.float64)

    def noise(self, name: str) -> Tensor:
        """Standard normal noise (size, *shape)."""
        wide = np.float64 if self.dtype == torch.float64 else np.float32
        drawn = np.empty((self.size, *self.shape), wide)
        for place, row in zip(drawn, self._rows(name), strict=True):
            row.standard_normal(out=place, dtype=wide)
        return self._mine(torch.from_numpy(drawn).to(self.dtype))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform times (size,) in [low, high)."""
        return self._mine(low + (high - low) * self._uniform(name))

    def partly_empty(self, name: str, share: float) -> tuple[dict[str, Tensor], Tensor]:
        """The conditions with a random ``share`` of the rows replaced by the empty one, and which rows (size,).

        A batch without an empty condition keeps all of its own.
        """
        if self.null is None or not share:
            return self.cond, torch.zeros(self.size, dtype=torch.bool, device=self.device)
        empty = self.uniform(name) < share
        cond = {
            key: torch.where(empty.reshape(-1, *[1] * (rows.ndim - 1)), self.null[key], rows)
            for key, rows in self.cond.items()
        }
        return cond, empty

    def integers(self, name: str, high: int) -> Tensor:
        """Integers (size,) in 0 .. high - 1."""
        return to_device(self.rows(name, high), self.device)

    def rows(self, name: str, high: int) -> Tensor:
        """The same integers on the host, where what they number is kept."""
        return torch.tensor([int(row.integers(high)) for row in self._rows(name)], dtype=torch.int64)

    def integer(self, name: str, high: int) -> int:
        """One integer in 0 .. high - 1, the same for the whole global batch."""
        return int(torch.randint(high, (), generator=self._generator(name)))

    def picks(self, name: str, values: Sequence[float], shares: Sequence[float]) -> Tensor:
        """One of ``values`` for each row, (size,) float64; value i has the probability ``shares[i]``."""
        ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        position = torch.searchsorted(ends, self._uniform(name) * ends[-1], right=True).clamp_max(len(values) - 1)
        return self._mine(torch.tensor(values, dtype=torch.float64)[position])

    def pick(self, name: str, shares: Sequence[float]) -> int:
        """One position, i with probability ``shares[i]``, the same for the whole global batch."""
        weights = torch.tensor(shares, dtype=torch.float64)
        return int(torch.multinomial(weights, 1, replacement=True, generator=self._generator(name)))
