"""Looks at a pipeline: ``inspect`` says how it is driven, ``sample`` draws images from it."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.errors import InputError
from stepdistill.eval.pictures import image_grid
from stepdistill.generation.generate import decode, generate
from stepdistill.generation.named_rules import needs_empty, rule_for
from stepdistill.generation.negative import away_from
from stepdistill.generation.teacher_rules import check_teacher, teacher_first, teacher_refined
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.load import export_arguments, is_export, load_pipeline
from stepdistill.pipeline.trace import Trace, trace
from stepdistill.recipe import IPAdapter


@dataclass(frozen=True)
class SampleResult:
    """``images`` uint8 (N, C, H, W), the label of each, the grid's path (None: not written), wall-clock seconds.

    ``nfe`` is the mean number of network passes for an image.
    """

    images: Tensor
    labels: tuple[str, ...]
    path: Path | None
    seconds: float
    nfe: float


def inspect(
    path: str | Path,
    revision: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    ip_adapter: IPAdapter | None = None,
    variant: str | None = None,
) -> Trace:
    """Trace a pipeline: an embedded teacher's name, a folder, a run folder (its export), or a hub id.

    Args:
        arguments: further arguments of the pipeline's call, such as height and width; None: those that an export was
            trained for.
        ip_adapter: loaded into it; None: the one that an export was trained with.
        variant: of its weights' files, such as "fp16".

    Raises:
        InputError: no such pipeline, or it cannot be traced; the message names the failed check.
    """
    run = Path(path) / "export"
    folder = run if is_export(run) else path
    pipeline = load_pipeline(folder, revision, ip_adapter=ip_adapter, variant=variant)
    return trace(pipeline, export_arguments(folder) if arguments is None else arguments)


def sample(
    path: str | Path,
    *,
    steps: int = 4,
    guidance: float = 1.0,
    seed: int = 0,
    count: int = 16,
    conditions: str | Path | Sequence[str | int] | None = None,
    out: str | Path | None = None,
    rule: str = "cfg",
    interval: tuple[float, float] | None = None,
    teacher: str | Path | None = None,
    teacher_steps: int = 1,
    refine: float | None = None,
    negative: str | None = None,
    negative_scale: float = 0.2,
) -> SampleResult:
    """Draw ``count`` images; image i depends on (seed, i) and its condition alone.

    Args:
        path: see :func:`inspect`. steps: of the pipeline's own scheduler. guidance: w, 1 is off.
        conditions: class names, class numbers or prompts, or a file with one a line; taken in turn. None: all classes.
        out: where to write the images as one PNG grid.
        rule: how guidance is done, a name in :data:`.named_rules.NAMES`; ``NAME:NUMBER`` sets it.
        interval: the times, of which 1 is noise and 0 data, with guidance; at others there is none. None: all.
        teacher: a pipeline that makes the first ``teacher_steps`` steps, with ``guidance``; the others have none.
        refine: instead, the student makes them and moves by this weight, 0 to 1, towards the teacher's x_0.
        negative: a prompt that the network's cross-attention steers away from, without guidance, by negative_scale.

    Raises:
        InputError: no such pipeline, class, guidance or rule.
    """
    for name, value in (("steps", steps), ("count", count), ("teacher_steps", teacher_steps)):
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, found {value}")
    if seed < 0:
        raise InputError(f"seed: expected an integer from 0 up, found {seed}")
    if refine is not None and (teacher is None or not 0 <= refine <= 1):
        raise InputError(f"refine: expected a teacher and a weight from 0 to 1, found {refine}")
    alone = {"rule": (rule, "cfg"), "interval": (interval, None)}
    if teacher is not None:
        _check_plain("where a teacher helps", alone)
    if negative is not None:
        _check_plain("with a negative prompt", alone | {"guidance": (guidance, 1), "teacher": (teacher, None)})
    traced = inspect(path)
    scheduler = traced.pipeline.scheduler
    if steps > (most := scheduler.config.get("original_inference_steps") or steps):
        kind = type(scheduler).__name__
        raise InputError(f"steps: expected at most {most}, what the {kind} of {path} was made for, found {steps}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    traced.pipeline.to(device)
    wanted = str(conditions) if isinstance(conditions, str | Path) else list(conditions or ()) or "classes"
    conditioning = encode(traced, entries(traced, wanted), None).to(device)
    if conditioning.null is None and needs_empty(rule, guidance):
        problem = f"found {guidance}" if guidance != 1 else f"and rule cfg, found {rule}"
        raise InputError(f"guidance: expected 1 for a pipeline without guidance, {problem}")
    denoisers = [traced.denoiser]
    if teacher is not None:
        helper = _teacher(teacher, traced)
        denoisers.append(helper)
        guide = functools.partial(teacher_first, helper, guidance, teacher_steps)
        if refine is not None:
            guide = functools.partial(teacher_refined, helper, guidance, refine, teacher_steps)
    elif negative is not None:
        guide = functools.partial(away_from, traced, negative, negative_scale)
    else:
        settings = {"steps": steps, "guidance": guidance, "seed": seed, "interval": interval}
        guide = rule_for(traced, conditioning, rule, **settings)
    before = sum(denoiser.evaluations for denoiser in denoisers)
    start = time.perf_counter()
    index = torch.arange(count) % len(conditioning)
    scheduler = traced.pipeline.scheduler
    latents = generate(traced, scheduler, conditioning, index, steps=steps, guidance=guidance, seed=seed, rule=guide)
    nfe = (sum(denoiser.evaluations for denoiser in denoisers) - before) / count
    images = decode(traced, latents)
    seconds = time.perf_counter() - start
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = len(conditioning) if 1 < len(conditioning) <= 16 else round(count**0.5)
        image_grid(images, columns).save(out, format="PNG")
    return SampleResult(images, tuple(conditioning.labels[i] for i in index.tolist()), out, seconds, nfe)


def _teacher(path: str | Path, student: Trace) -> Denoiser:
    """The denoiser of the pipeline at ``path``, on the student's device."""
    found = inspect(path)
    check_teacher(found, student, str(path))
    found.pipeline.to(student.pipeline.device)
    return found.denoiser


def _check_plain(when: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Whether each setting (found, expected) is left as it is."""
    for name, (found, expected) in settings.items():
        if found != expected:
            raise InputError(f"{name}: expected {'none' if expected is None else expected} {when}, found {found}")
