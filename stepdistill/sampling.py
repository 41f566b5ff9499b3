"""Looks at a pipeline: ``inspect`` says how it is driven, ``sample`` draws images from it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.pictures import image_grid
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.generate import decode, generate
from stepdistill.pipeline.load import export_arguments, is_export, load_pipeline
from stepdistill.pipeline.trace import Trace, trace


@dataclass(frozen=True)
class SampleResult:
    """``images`` uint8 (N, C, H, W), the label of each, the grid's path (None: not written), wall-clock seconds."""

    images: Tensor
    labels: tuple[str, ...]
    path: Path | None
    seconds: float


def inspect(path: str | Path, revision: str | None = None, arguments: Mapping[str, Any] | None = None) -> Trace:
    """Trace a pipeline: an embedded teacher's name, a folder, a run folder (its export), or a hub id.

    Args:
        arguments: further arguments of the pipeline's call, such as height and width; None: those that an export was
            trained for.

    Raises:
        InputError: no such pipeline, or it cannot be traced; the message names the failed check.
    """
    run = Path(path) / "export"
    folder = run if is_export(run) else path
    return trace(load_pipeline(folder, revision), export_arguments(folder) if arguments is None else arguments)


def sample(
    path: str | Path,
    *,
    steps: int = 4,
    guidance: float = 1.0,
    seed: int = 0,
    count: int = 16,
    conditions: Sequence[str | int] | None = None,
    out: str | Path | None = None,
) -> SampleResult:
    """Draw ``count`` images; image i depends on (seed, i) and its condition alone.

    Args:
        path: see :func:`inspect`. steps: of the pipeline's own scheduler. guidance: w, 1 is off.
        conditions: class names, class numbers or prompts, taken in turn; None: all classes.
        out: where to write the images as one PNG grid.

    Raises:
        InputError: no such pipeline, class or guidance.
    """
    for name, value in (("steps", steps), ("count", count)):
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, found {value}")
    if seed < 0:
        raise InputError(f"seed: expected an integer from 0 up, found {seed}")
    traced = inspect(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    traced.pipeline.to(device)
    conditioning = encode(traced, entries(traced, list(conditions) if conditions else "classes"), None).to(device)
    if guidance != 1 and conditioning.null is None:
        raise InputError(f"guidance: expected 1 for a pipeline without guidance, found {guidance}")
    start = time.perf_counter()
    index = torch.arange(count) % len(conditioning)
    scheduler = traced.pipeline.scheduler
    latents = generate(traced, scheduler, conditioning, index, steps=steps, guidance=guidance, seed=seed)
    images = decode(traced, latents)
    seconds = time.perf_counter() - start
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = len(conditioning) if 1 < len(conditioning) <= 16 else round(count**0.5)
        image_grid(images, columns).save(out, format="PNG")
    return SampleResult(images, tuple(conditioning.labels[i] for i in index.tolist()), out, seconds)
