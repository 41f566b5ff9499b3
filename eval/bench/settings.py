"""Settings of a benchmark that change its run and not its results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from stepdistill.errors import InputError, suggest

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, images done, images in all)."""


@dataclass(frozen=True)
class Settings:
    """The options of :func:`stepdistill.bench`.

    Args:
        protocol: name or YAML file.
        networks: of the protocol's networks; None: all of them.
        solvers: also run the teacher under stock fast solvers at the student's NFE, with and without guidance.
        guidance: w of a plain pipeline's own row and solvers, where the protocol leaves it open.
        cost: measure latency and operations of every row; without it only where the protocol is not of classes.
        also: of "lpips", "imagereward", "hpsv2" and "pickscore", beside the metrics of a protocol of prompts.
        data: folder of prompts, reference images and network weights.
        offline: download nothing.
        batch: images at once, at most 64; None: 16. Of the cost, and of samples unless the protocol fixes it.
        precision: of the pipelines' weights.
        device: default a GPU if there is one.
        cache: default $STEPDISTILL_CACHE or ~/.cache/stepdistill.
        single_file: the page holds its pictures itself.
        alone: no other process measures, whatever launcher started this one.
        remarks: further notes for the report's reader.
        complete: measure stored rows again that lack metrics which are younger than they are.
    """

    protocol: str | Path = "fashion-v1"
    networks: Sequence[str] | None = None
    solvers: bool = True
    guidance: float = 1.0
    cost: bool = False
    also: Sequence[str] = ()
    data: str | Path = "data"
    offline: bool = False
    batch: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str | torch.device | None = None
    cache: str | Path | None = None
    single_file: bool = False
    alone: bool = False
    remarks: Sequence[str] = ()
    complete: bool = False
    progress: Progress | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the pipelines' weights."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The settings of keyword arguments; raises InputError for one that there is not."""
    known = [field.name for field in fields(Settings)]
    if unknown := [name for name in options if name not in known]:
        hint = suggest(unknown[0], known) or f"; expected some of {', '.join(known)}"
        raise InputError(f"bench: found the unknown option '{unknown[0]}'{hint}")
    return Settings(**options)
