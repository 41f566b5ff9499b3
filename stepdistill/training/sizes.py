"""The sizes of a run: what its batches, losses and samples are made of at each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data import images
from stepdistill.data.batch import generator
from stepdistill.data.buckets import Bucket, bucket_sizes
from stepdistill.data.sample import Pictures
from stepdistill.data.store import Rows
from stepdistill.diffusion.samplers import Sampler
from stepdistill.errors import InputError
from stepdistill.methods.base import DataNeeds
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.latents import decoder
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.sizes import Size, at_size, conditioning_at, in_words, multiple, picture_size
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.recipe import Recipe, Train
from stepdistill.sampling.trajectories import Paths, teacher_paths
from stepdistill.training.real_images import RealImages


@dataclass(frozen=True)
class AtSize:
    """What depends on the size of the pictures.

    Args:
        trace: of the pipeline called with this size.
        sampler: the student's, on the grid of this size.
        conditioning: all conditions.
        name: of the size in files and messages, HEIGHTxWIDTH; "" where the run has one size.
        share: the probability that a step has this size.
        paths: the teacher's trajectories.
        made: those whose clean ends stand for real samples.
        bucket: of the real images that are cut to this size.
        real: the real images of this size, where the method needs some.
        rows: their latents (N, ...), and the index of each one's condition (N,).
    """

    trace: Trace
    sampler: Sampler
    conditioning: Conditioning
    name: str = ""
    share: float = 1.0
    paths: Paths | None = None
    made: Paths | None = None
    bucket: Bucket | None = None
    real: RealImages | None = None
    rows: tuple[Rows | Tensor, Tensor] | None = None

    @cached_property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """See :class:`stepdistill.roles.Roles`."""
        return decoder(self.trace)

    def with_paths(self, needs: DataNeeds, scale: float, seed: int, cache: Path | None) -> "AtSize":
        """With the trajectories that the method needs, as many as are this size's share.

        Args:
            needs: of the method.
            scale: the guidance that is distilled.
            seed: of the run.
            cache: see :func:`stepdistill.sampling.trajectories.teacher_paths`.
        """
        teacher, shape = self.trace.denoiser, self.trace.latent_shape
        grid = [step.t for step in self.sampler.grid()]
        paths, made = (
            each
            and teacher_paths(
                teacher,
                self.conditioning,
                replace(each, count=max(1, round(self.share * each.count))),
                scale,
                shape,
                seed,
                cache,
                grid,
            )
            for each in (needs.paths, needs.made)
        )
        return replace(self, paths=paths, made=made)


def at_first_size(recipe: Recipe, opened: Callable[[dict[str, Any]], Trace]) -> Trace:
    """The pipeline at the first size that the recipe states, at its own size where it states none.

    Args:
        opened: loads and traces it with these arguments of its call.

    Raises:
        InputError: whatever ``opened`` raises, or it makes no pictures of this size.
    """
    arguments = recipe.teacher.arguments
    if not recipe.sizes:
        return opened(arguments)
    height, width = recipe.sizes[0]
    try:
        traced = opened(arguments | {"height": height, "width": width})
        if picture_size(traced) == (height, width):
            return traced
    except InputError as error:
        if getattr(error, "check", "call") != "call":
            raise
    # Its own size shows which it takes.
    return at_size(opened(arguments), (height, width), _key(recipe))


def _key(recipe: Recipe) -> str:
    """The recipe's key that states the sizes."""
    return "data.buckets" if recipe.train.sizes is None else "train.sizes"


def sizes_and_shares(
    recipe: Recipe, traced: Trace, counted: bool = True, cache: Path | None = None, source: str | None = None
) -> list[tuple[Size, float]]:
    """The sizes of a run, the traced one first, and the probability of each; none where it has the pipeline's own.

    Args:
        traced: the pipeline at the first size that the recipe states, see :func:`at_first_size`.
        counted: the probabilities of buckets are the shares of the images in them; False: the images may be gone, and
            the first and the last bucket stand for all.
        cache: where the bucket of each image is kept.
        source: the identity of ``data.images``, where it is known.

    Raises:
        InputError: no image can be opened.
    """
    sizes: list[Size] = [(height, width) for height, width in recipe.sizes]
    if recipe.data.buckets == "off":
        return list(zip(sizes, _shares(recipe.train), strict=True))
    if recipe.data.buckets == "auto":
        sizes = bucket_sizes(picture_size(traced), multiple(traced) or 1)
    if not counted:
        return [(size, 0.5) for size in dict.fromkeys((sizes[0], sizes[-1]))]
    numbers = images.bucket_numbers(recipe.data, sizes, cache, source)
    counts = [numbers.count(number) for number in range(len(sizes))]
    if not any(counts):
        raise InputError(f"data.images: expected images in {recipe.data.images}, found none")
    return [(size, count / sum(counts)) for size, count in zip(sizes, counts, strict=True)]


def _shares(train: Train) -> list[float]:
    sizes = train.sizes or []
    return train.size_probabilities or [1 / len(sizes) for _ in sizes]


def sizes_of(
    recipe: Recipe,
    traced: Trace,
    sampler: Sampler,
    conditioning: Conditioning,
    stated: Sequence[tuple[Size, float]],
    cache: Path | None = None,
    pictures: Sequence[Pictures] | None = None,
) -> list[AtSize]:
    """What depends on the size, for the first of the sizes and for each of the others that has a probability.

    Args:
        traced: the pipeline at the first size.
        sampler: at the first size; its scheduler is the one that is exported.
        conditioning: at the first size.
        stated: see :func:`sizes_and_shares`.
        cache: see :func:`stepdistill.pipeline.conditioning.encode`.
        pictures: as there.

    Raises:
        InputError: the pipeline makes no pictures of one of them.
    """
    first, data = AtSize(traced, sampler, conditioning), recipe.data
    if data.buckets == "off" and len(stated) < 2:
        return [first]
    seed = recipe.train.seed if data.crop == "random" else None
    sizes = [replace(first, name=in_words(stated[0][0]), share=stated[0][1])]
    for size, share in stated[1:]:
        if share:
            trace = at_size(traced, size, _key(recipe))
            conditions = conditioning_at(trace, traced, conditioning, cache, pictures)
            sizes.append(AtSize(trace, _sampler_at(sampler, trace), conditions, in_words(size), share))
    if data.buckets != "off":
        every = tuple(size for size, _ in stated)
        names = [in_words(size) for size in every]
        sizes = [replace(one, bucket=Bucket(every, names.index(one.name), seed)) for one in sizes]
    say(f"{_key(recipe)}: {', '.join(f'{one.name} ({one.share:.0%})' for one in sizes)}")
    return sizes


def _sampler_at(sampler: Sampler, traced: Trace) -> Sampler:
    def arguments(scheduler: Any, steps: int) -> dict[str, Any]:
        return set_up(traced, scheduler, steps)[0]

    return sampler.at_size(traced.denoiser.schedule, arguments)


def size_of_step(sizes: Sequence[AtSize], seed: int, step: int) -> int:
    """The number of the size of a step's batch; it depends on (seed, step) alone."""
    if len(sizes) < 2:
        return 0
    shares = torch.tensor([one.share for one in sizes], dtype=torch.float64)
    return int(torch.multinomial(shares, 1, generator=generator(seed, step, "size")))
