"""Where a network's argument holds the rows of a batch's images, if not one after the other along its first axis."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """How rows (B, ...) or (B, each, ...) are laid out in an argument.

    Args:
        axis: of the argument, along which the rows are.
        each: how many of them an image has (the frames of a video, the first and the last picture).
        outer: the first rows of all images come first, then the second ones; else an image's are together.
        place: of ``each`` among the axes of the rows (the frames of a video (B, C, F, H, W)).
    """

    axis: int = 0
    each: int = 1
    outer: bool = False
    place: int = 1

    def rows(self, argument: Tensor) -> Tensor:
        """The rows, batch first."""
        whole = argument.movedim(self.axis, 0)
        if self.each == 1:
            return whole
        if self.outer:
            return whole.unflatten(0, (self.each, -1)).movedim(1, 0)
        return whole.unflatten(0, (-1, self.each)).movedim(1, self.place)

    def argument(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        if self.each > 1:
            rows = (rows.movedim(0, 1) if self.outer else rows.movedim(self.place, 1)).flatten(0, 1)
        return rows.movedim(0, self.axis)
