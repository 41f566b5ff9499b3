"""A run's real images, in their store, and what its pipeline is called with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data import images
from stepdistill.data.buckets import Bucket
from stepdistill.data.chosen import chosen_rows
from stepdistill.data.shards import Share
from stepdistill.data.store import Rows, Store
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import Conditioning, encode, entries
from stepdistill.pipeline.latents import captions_of, medium, store_images
from stepdistill.pipeline.trace import Trace
from stepdistill.recipe import Recipe


@dataclass(frozen=True)
class RealImages:
    """The store of a recipe's real images.

    Args:
        captions: the different ones.
        index: the number of each image's caption (N,).
        pictures: of each image, where data.arguments names some.
    """

    store: Store
    captions: list[str]
    index: Tensor
    pictures: images.OwnPictures | None

    def rows(self, conditioning: Conditioning, own: bool) -> tuple[Rows | Tensor, Tensor]:
        """Latents of the images, and which condition each has: by its prompt, or by its class's name or number.

        Of images with conditions of other groups there are none.

        Args:
            own: conditions come with pictures, and each image has its own condition.

        Raises:
            InputError: an image has a condition that is not one of the recipe's.
        """
        latents = self.store.rows("")["latents"]
        if own:
            return latents, torch.arange(len(self.index))
        known = {str(entry): i for i, entry in enumerate(conditioning.entries)}
        known |= {label: i for i, label in enumerate(conditioning.labels)}
        group = conditioning.group
        elsewhere = set() if group is None else {*map(str, group.entries), *group.labels}
        strangers = sorted(set(self.captions) - known.keys() - elsewhere)
        if strangers:
            raise InputError(
                f"data.images: expected images of the recipe's conditions ({', '.join(list(known)[:4])}, ...), "
                f"found {strangers[0]!r} and {len(strangers) - 1} more"
            )
        index = torch.tensor([known.get(caption, -1) for caption in self.captions])[self.index]
        if group is None:
            return latents, index
        own_rows = (index >= 0).nonzero()[:, 0]
        if not len(own_rows):
            raise InputError("data.images: expected images of this run's group of conditions, found none")
        return chosen_rows(latents, own_rows), index[own_rows]


def real_images(
    recipe: Recipe,
    traced: Trace,
    cache: Path | None,
    share: Share | None,
    verify: bool,
    bucket: Bucket | None = None,
    log: bool = True,
) -> RealImages | None:
    """Real images as latents, those of a ``bucket`` alone where there is one; None for a method that needs none."""
    data = recipe.data
    if not recipe.method.implementation.data_needs(recipe.method.config).images:
        return None
    if common := [name for name in traced.pictures if name not in data.arguments]:
        raise InputError(
            f"data.images: expected none beside teacher.arguments.{common[0]}, and a method or settings that need "
            "none: real images would have to be those of that picture; data.arguments gives each its own"
        )
    if bucket is None and data.crop == "random":
        bucket = Bucket((medium(traced).size,), 0, recipe.train.seed)
    store = store_images(traced, data, cache, share, verify, bucket, log)
    pictures = (
        images.own_pictures(data, medium(traced, data.frame_rate), len(store), store.index["key"])
        if data.arguments
        else None
    )
    return RealImages(store, *captions_of(store), pictures)


def entries_of(
    recipe: Recipe, traced: Trace, real: RealImages | None, cache: Path | None, log: bool = True
) -> tuple[Sequence[str | int], images.OwnPictures | None]:
    """What the pipeline is called with, and the pictures of each where data.arguments gives them."""
    data, pictures = recipe.data, None
    if data.conditions != "captions" or real is None:
        stated, pictures = images.conditions(data, log, cache)
    elif data.arguments:
        stated, pictures = [real.captions[number] for number in real.index.tolist()], real.pictures
    else:
        stated = real.captions
    return entries(traced, stated), pictures


def preview_conditions(recipe: Recipe, traced: Trace, cache: Path | None, share: Share) -> Conditioning | None:
    """The conditions of ``train.preview_prompts``; None where the previews are of the run's own."""
    stated = recipe.train.preview_prompts
    if not stated:
        return None
    if traced.pictures:
        named = ", ".join(traced.pictures)
        raise InputError(f"train.preview_prompts: expected none for a pipeline that is called with pictures ({named})")
    try:
        with share.after_the_first():
            return encode(traced, entries(traced, stated), cache)
    except InputError as error:
        raise InputError(f"train.preview_prompts: {error}") from None
