"""What a plan says of encoded conditions and latents of images: the host keeps all of them, the device a few."""

from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.blueprint import Blueprint
from stepdistill.data.conditions import wanted
from stepdistill.data.forms import count as samples_in
from stepdistill.data.forms import form
from stepdistill.pipeline.conditioning import CHUNK, class_names
from stepdistill.recipe import Recipe
from stepdistill.text_files import read_text


@dataclass(frozen=True)
class Stored:
    """How many there are, and bytes.

    Args:
        conditions: their number.
        images: their number.
        row: bytes of one condition.
        latents: bytes of one image's latents.
        halves: 2 where guidance doubles a batch's conditions, 1 otherwise.
    """

    conditions: int
    images: int
    row: int
    latents: int
    halves: int

    @property
    def host(self) -> int:
        """All of them, kept in the host's memory."""
        return self.conditions * self.row + self.images * self.latents

    @property
    def chunk(self) -> int:
        """On the device while conditions are encoded: a chunk as the pipeline makes it, and as it is caught."""
        return 2 * self.halves * min(CHUNK, self.conditions) * self.row

    def batch(self, size: int) -> int:
        """On the device in training: the conditions and latents of a batch."""
        return size * (self.halves * self.row + (self.latents if self.images else 0))


def stored(recipe: Recipe, drawn: Blueprint) -> Stored:
    """What the recipe's own data will take, without a download."""
    return Stored(
        _conditions(recipe, drawn),
        _images(recipe),
        sum(row.numel() * row.element_size() for row in drawn.condition.values()),
        torch.Size(drawn.trace.latent_shape).numel() * 4,
        1 if recipe.teacher.guidance.scale == 1 else 2,
    )


def _conditions(recipe: Recipe, drawn: Blueprint) -> int:
    """How many conditions the data has; of a data set on the hub ``data.limit``."""
    data = recipe.data
    if isinstance(data.conditions, list):
        return len(data.conditions)
    source = data.images if data.conditions == "captions" else data.conditions
    if form(source) == "hub":
        return data.limit
    if data.arguments:
        return samples_in(source, data.limit)
    conditions = wanted(data, aloud=False)[0]
    if conditions == "classes":
        return max(1, len(class_names(drawn.trace)))
    if isinstance(conditions, str):
        return sum(bool(line.strip()) for line in read_text(Path(conditions)).splitlines())
    return len(conditions)


def _images(recipe: Recipe) -> int:
    if recipe.data.images is None:
        return 0
    return 60_000 if recipe.data.images == "fashion-mnist" else samples_in(recipe.data.images, recipe.data.limit)
