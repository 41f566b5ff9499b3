"""Where a network's argument holds the sample, if the argument is more than the sample or laid out otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.row_layout import RowLayout


class Span(NamedTuple):
    """A part of an axis: ``length`` entries, with so many before it and after it."""

    axis: int
    before: int
    length: int
    after: int

    def inside(self, whole: Tensor) -> Tensor:
        """The part."""
        return whole.narrow(self.axis, self.before, self.length)

    def outside(self, whole: Tensor) -> Tensor:
        """What is before it, and behind that what is after it."""
        before, _, after = whole.split((self.before, self.length, self.after), self.axis)
        return torch.cat([before, after], self.axis)

    def whole(self, inside: Tensor, outside: Tensor) -> Tensor:
        """The inverse of :meth:`inside` and :meth:`outside`."""
        before, after = outside.split((self.before, self.after), self.axis)
        return torch.cat([before, inside, after], self.axis)


@dataclass(frozen=True)
class Window:
    """How x_t (B, C, ...) lies in an argument, and the prediction in an output.

    Args:
        frame_axis: an axis of length 1 that x_t has not, or None.
        frames: how its frames are rows of their own, or None.
        grid: x_t's axes after its channels where the argument has tokens (B, N, C) in their place; empty: it has not.
        spans: x_t's part of each axis on which the argument holds more: an inpainting network's mask and masked image,
            a reference picture's tokens, a first frame that is kept.
        cut: the axes of :attr:`spans` on which the output is as long as the argument.
    """

    frame_axis: int | None = None
    frames: RowLayout | None = None
    grid: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    cut: frozenset[int] = frozenset()

    def laid_out(self, x: Tensor) -> Tensor:
        """x_t as it is in the argument, alone."""
        if self.grid:
            return x.flatten(2).transpose(1, 2)
        if self.frames is not None:
            return self.frames.argument(x)
        return x if self.frame_axis is None else x.unsqueeze(self.frame_axis)

    def rows(self, argument: Sequence[Any]) -> int:
        """How many samples an argument holds."""
        return len(argument) // (1 if self.frames is None else self.frames.each)

    def beside_names(self, argument: str) -> tuple[str, ...]:
        """A name for each of :meth:`beside` in the argument of this name."""
        return tuple(f"beside {argument} on axis {span.axis}" for span in self.spans)

    def argument(self, x: Tensor, beside: Sequence[Tensor]) -> Tensor:
        """The argument that holds x_t and what is beside it, see :meth:`beside`."""
        whole = self.laid_out(x)
        for span, outside in zip(reversed(self.spans), reversed(beside), strict=True):
            whole = span.whole(whole, outside)
        return whole

    def beside(self, argument: Tensor) -> list[Tensor]:
        """What an argument holds beside x_t: along each span's axis, inside the spans before it."""
        parts = []
        for span in self.spans:
            parts.append(span.outside(argument))
            argument = span.inside(argument)
        return parts

    def sample(self, argument: Tensor) -> Tensor:
        """x_t (B, C, ...) in an argument: the inverse of :meth:`argument`."""
        for span in self.spans:
            argument = span.inside(argument)
        return self._as_sample(argument)

    def prediction(self, output: Tensor) -> Tensor:
        """The prediction (B, C, ...) in an output, without what is beside it."""
        for span in self.spans:
            output = span.inside(output) if span.axis in self.cut else output
        return self._as_sample(output)

    def _as_sample(self, laid_out: Tensor) -> Tensor:
        """The inverse of :meth:`laid_out`."""
        if self.grid:
            return laid_out.transpose(1, 2).unflatten(2, self.grid)
        if self.frames is not None:
            return self.frames.rows(laid_out)
        return laid_out if self.frame_axis is None else laid_out.squeeze(self.frame_axis)
