"""Samples and feature rows on disk in blocks of fixed indices, so that work can be split, stopped and resumed.

A shard is written once, whole or not at all, and its content does not depend on who wrote it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.eval.metrics import Moments, MomentSum
from stepdistill.eval.networks import FeatureNetwork, feature_pass

SHARD = 64
"""Indices in a shard where a protocol has no other number."""


class Blocks(ABC):
    """Tensors of ``count`` items that are read in blocks of ``size``."""

    def __init__(self, count: int, size: int = SHARD):
        self.count, self.size = count, size

    @property
    def ranges(self) -> list[range]:
        """The item indices of every block; those of the last may be fewer."""
        return [range(first, min(first + self.size, self.count)) for first in range(0, self.count, self.size)]

    @abstractmethod
    def read(self, indices: range) -> dict[str, Tensor]:
        """One block."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One tensor of every block, in order."""
        for indices in self.ranges:
            yield self.read(indices)[name]

    def all(self, name: str) -> Tensor:
        """One tensor of all blocks, concatenated."""
        return torch.cat(list(self.blocks(name)))

    def moments(self) -> Moments:
        """Mean and covariance of ``rows``, one block in memory at a time."""
        return MomentSum.of(self.blocks("rows")).moments()


class HeldRows(Blocks):
    """Tensors (count, ...) in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], size: int = SHARD):
        super().__init__(len(next(iter(tensors.values()))), size)
        self.tensors = tensors

    def read(self, indices: range) -> dict[str, Tensor]:
        """See :class:`Blocks`."""
        return {name: value[indices.start : indices.stop] for name, value in self.tensors.items()}


class Shards(Blocks):
    """Tensors in a folder, a block to a file.

    Args:
        folder: names everything that the content depends on; made on the first write.
        size: of a block; it decides what is computed together.
    """

    def __init__(self, folder: Path, count: int, size: int = SHARD):
        super().__init__(count, size)
        self.folder = folder

    def path(self, indices: range) -> Path:
        """The file of a shard; a short last shard has a name of its own."""
        return self.folder / f"{indices.start:07d}-{len(indices)}.safetensors"

    def missing(self) -> list[range]:
        """Shards that are not there yet."""
        return [indices for indices in self.ranges if not self.path(indices).is_file()]

    def fill(
        self,
        make: Callable[[range], dict[str, Tensor]],
        *,
        rank: int = 0,
        processes: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write the missing shards that are this process's, ``ranges[rank::processes]``; returns how many items."""
        done = 0
        for indices in self.ranges[rank::processes]:
            path = self.path(indices)
            if path.is_file():
                continue
            if progress and not done:
                progress(indices.start, self.count)  # before the first, which may take minutes
            tensors = {name: value.contiguous().cpu() for name, value in make(indices).items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}.partial")
            save_file(tensors, draft)
            draft.replace(path)
            done += len(indices)
            if progress:
                progress(indices.stop, self.count)
        return done

    def read(self, indices: range) -> dict[str, Tensor]:
        """A shard; a damaged one is removed, so that the next run makes it again.

        Raises:
            OSError: it is damaged or not there.
        """
        path = self.path(indices)
        try:
            return load_file(path)
        except SafetensorError as error:
            path.unlink()
            raise OSError(f"{path} was damaged and has been removed; run the command again") from error


def features_of(
    images: Callable[[range], Iterable[Any]],
    network: FeatureNetwork,
    device: str | torch.device,
    load: Callable[[Any], Tensor] | None = None,
    batch: int = SHARD,
) -> Callable[[range], dict[str, Tensor]]:
    """What :meth:`Shards.fill` needs to write a network's rows of ``images(indices)``, uint8 (C, H, W) each.

    Args:
        load: see :func:`stepdistill.eval.networks.feature_pass`.
        batch: see :func:`stepdistill.eval.networks.feature_pass`.
    """
    return lambda indices: feature_pass(network, images(indices), load=load, device=device, batch=batch)
