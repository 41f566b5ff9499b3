"""What a method gets to see of a step: conditions, images if it asked for them, and repeatable randomness."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepdistill.host_rows import to_device


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by ``key`` alone (numbers and strings), the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class PathRows:
    """Stored trajectories of the guided teacher, one per row of the batch and independent of the batch's conditions.

    Args:
        points: (B, K + 1, ...) from noise, index 0, to the clean end, index K. times: theirs (K + 1,), from 1 to 0.
        cond, null: the conditions they were made with. scales: the guidance scales they were made with (B,).
    """

    points: Tensor
    times: Tensor
    cond: dict[str, Tensor]
    null: dict[str, Tensor] | None
    scales: Tensor


@dataclass
class Batch:
    """Rows ``first`` .. ``first + size`` of the global batch of one step.

    Every draw is made for the whole global batch from a key (seed, step, turn, name) and then sliced, so it
    depends on a sample's global index alone: not on micro-batches, processes or interruptions.

    Args:
        cond, null: conditions of these rows, and the empty condition of the same length (or None).
        latents: real x_0, (size, ...), or None when the method needs no images.
        path: stored trajectories, or None when the method needs none.
        shape: one sample's shape. total: the global batch size.
        state: scratch of the method, kept between the turns of one step.
        signals: numbers of this turn that nobody minimises and the metrics should show, by name (0-d tensors).
    """

    seed: int
    step: int
    first: int
    size: int
    total: int
    shape: tuple[int, ...]
    cond: dict[str, Tensor]
    null: dict[str, Tensor] | None = None
    latents: Tensor | None = None
    path: PathRows | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    turn: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)

    def _generator(self, name: str) -> torch.Generator:
        return generator(self.seed, self.step, self.turn, name)

    def _mine(self, whole: Tensor) -> Tensor:
        """This batch's rows of a draw for the global batch, on its device."""
        return to_device(whole[self.first : self.first + self.size], self.device)

    def noise(self, name: str) -> Tensor:
        """Standard normal noise (size, *shape)."""
        whole = torch.randn(self.total, *self.shape, generator=self._generator(name), dtype=self.dtype)
        return self._mine(whole)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform times (size,) in [low, high)."""
        whole = torch.rand(self.total, generator=self._generator(name), dtype=torch.float64)
        return self._mine(low + (high - low) * whole)

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
        whole = torch.randint(high, (self.total,), generator=self._generator(name))
        return whole[self.first : self.first + self.size]

    def integer(self, name: str, high: int) -> int:
        """One integer in 0 .. high - 1, the same for the whole global batch."""
        return int(torch.randint(high, (), generator=self._generator(name)))

    def picks(self, name: str, values: Sequence[float], shares: Sequence[float]) -> Tensor:
        """One of ``values`` for each row, (size,) float64; value i has the probability ``shares[i]``."""
        return self._mine(torch.tensor(values, dtype=torch.float64)[self._weighted(name, shares, self.total)])

    def pick(self, name: str, shares: Sequence[float]) -> int:
        """One position, i with probability ``shares[i]``, the same for the whole global batch."""
        return int(self._weighted(name, shares, 1))

    def _weighted(self, name: str, shares: Sequence[float], count: int) -> Tensor:
        weights = torch.tensor(shares, dtype=torch.float64)
        return torch.multinomial(weights, count, replacement=True, generator=self._generator(name))
