"""Encoded conditions and image latents in a plan: all of them on disk, a few in the host's memory and on the device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.data import images
from stepdistill.data.sources import count as samples_in
from stepdistill.data.sources import form
from stepdistill.files import read_text
from stepdistill.pipeline.conditioning import class_names, together
from stepdistill.planning.fake_pipeline import Blueprint
from stepdistill.recipe import Recipe
from stepdistill.training.make_method import guidance_scale


@dataclass(frozen=True)
class Stored:
    """How many there are, and bytes.

    Args:
        conditions: their number.
        images: their number.
        row: bytes of one condition.
        latents: bytes of one image's latents.
        halves: 2 where guidance doubles a batch's conditions, 1 otherwise.
        at_once: how many conditions are encoded at once.
        live: conditions are encoded for each batch, and none is stored.
    """

    conditions: int
    images: int
    row: int
    latents: int
    halves: int
    at_once: int
    live: bool = False

    @property
    def disk(self) -> int:
        """Their stores, at most: zeros that pad a condition are left out there."""
        return (0 if self.live else self.conditions * self.row) + self.images * self.latents

    def host(self, size: int) -> int:
        """In the host's memory: what is encoded at once, twice, or two batches, the one after being gathered."""
        encoded = 0 if self.live else min(self.at_once, self.conditions) * self.row
        return 2 * max(encoded, self.latents if self.images else 0, self.batch(size))

    @property
    def chunk(self) -> int:
        """On the device while conditions are encoded: a chunk as the pipeline makes it, and as it is caught."""
        return 2 * self.halves * min(self.at_once, self.conditions) * self.row

    def batch(self, size: int) -> int:
        """On the device in training: the conditions and latents of a batch, and what they are encoded among."""
        own = size * (self.halves * self.row + (self.latents if self.images else 0))
        return own + (self.chunk if self.live else 0)


def stored(recipe: Recipe, drawn: Blueprint) -> Stored:
    """What the recipe's own data will take, without a download."""
    return Stored(
        _conditions(recipe, drawn),
        _images(recipe),
        sum(row.numel() * row.element_size() for row in drawn.condition.values()),
        torch.Size(drawn.trace.latent_shape).numel() * 4,
        1 if guidance_scale(recipe, drawn.trace) == 1 else 2,
        together(drawn.trace),
        recipe.data.encode != "store",
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
    conditions = images.conditions(data, log=False)[0]
    if conditions == "classes":
        return max(1, len(class_names(drawn.trace)))
    if isinstance(conditions, str):
        return sum(bool(line.strip()) for line in read_text(Path(conditions)).splitlines())
    return len(conditions)


def _images(recipe: Recipe) -> int:
    if recipe.data.images is None:
        return 0
    return 60_000 if recipe.data.images == "fashion-mnist" else samples_in(recipe.data.images, recipe.data.limit)
