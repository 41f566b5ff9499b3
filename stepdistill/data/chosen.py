"""Some of many entries or rows, by their numbers; none is copied before it is read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.store import Rows


class Chosen(Sequence[Any]):
    """The entries ``numbers`` of ``whole``."""

    def __init__(self, whole: Sequence[Any], numbers: Sequence[int]):
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self.whole[number] for number in self.numbers[index])
        return self.whole[self.numbers[index]]


class ChosenRows(Rows):
    """The rows ``index`` (N,) of a store's rows; indexing reads them."""

    def __init__(self, rows: Rows, index: Tensor):
        self.rows, self.index = rows, index
        self.shape = torch.Size((len(index), *rows.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Any) -> Tensor:
        chosen = self.index[index]
        return self.rows[chosen] if chosen.ndim else self.rows[chosen[None]][0]


def chosen_rows(rows: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """The rows ``index`` (N,): of a tensor as a tensor, of a store unread."""
    return rows[index] if isinstance(rows, Tensor) else ChosenRows(rows, index)
