"""Buckets of real images: sizes of one area and different proportions, and the one that a picture is cut to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from stepdistill.data import picture
from stepdistill.data.batch import generator

Size = tuple[int, int]
"""Height and width in pixels."""

STEPS = 16
"""Buckets' sides are multiples of about this part of the mean side: 64 pixels of 1024."""
UNKNOWN = -1
"""In the place of a bucket's number."""
WIDEST = 2.0
"""The largest proportion of one side to the other."""


def bucket_sizes(own: Size, multiple: int) -> list[Size]:
    """Sizes of about the area of ``own``, which is the first, from WIDEST times as high to WIDEST times as wide.

    Args:
        multiple: the number whose multiples the pipeline takes as height and width.
    """
    area = math.prod(own)
    step = multiple * max(1, round(math.sqrt(area) / STEPS / multiple))
    sizes = set()
    for long in range(step, math.ceil(math.sqrt(WIDEST * area)) + 1, step):
        short = round(area / long / step) * step
        if short and 1 <= long / short <= WIDEST:
            sizes |= {(long, short), (short, long)}
    return [own, *sorted(sizes - {own})]


def nearest(width: int, height: int, sizes: Sequence[Size]) -> int:
    """The number of the size whose proportions are the nearest to those of a picture."""
    wanted = math.log(width / height)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][1] / sizes[number][0]) - wanted))


@dataclass(frozen=True)
class Bucket:
    """One bucket: which pictures are in it, and how they are cut.

    Args:
        sizes: of all buckets.
        number: of this one.
        seed: of the place that is cut out of each picture; None: the middle.
        numbers: the bucket of each picture, UNKNOWN of one that cannot be read; None: their sizes show it.
        source: the identity of what they are pictures of; None: to be looked up.
    """

    sizes: tuple[Size, ...]
    number: int
    seed: int | None = None
    numbers: Sequence[int] | None = None
    source: str | None = None

    @property
    def size(self) -> Size:
        """Of this bucket."""
        return self.sizes[self.number]

    def lacks(self, row: int) -> bool:
        """Whether picture number ``row`` is known to be in another bucket."""
        return self.numbers is not None and self.numbers[row] not in (self.number, UNKNOWN)

    def holds(self, row: int, size: tuple[int, int]) -> bool:
        """Whether picture number ``row``, of this width and height, is in this bucket."""
        return not self.lacks(row) and nearest(*size, self.sizes) == self.number

    def moment(self, row: int) -> float:
        """Where in video or sound number ``row`` the part lies that is kept, from 0 to 1."""
        if self.seed is None:
            return 0.5
        return torch.rand((), generator=generator(self.seed, "moment", row)).item()

    def cut(self, image: Image.Image, row: int) -> Image.Image:
        """The part of picture number ``row`` that has the bucket's proportions."""
        if self.seed is None:
            return picture.cut(image, self.size)
        across, down = torch.rand(2, generator=generator(self.seed, "crop", row)).tolist()
        return picture.cut(image, self.size, (across, down))
