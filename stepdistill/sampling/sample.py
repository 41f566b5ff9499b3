"""``inspect`` traces a pipeline and describes its call; ``sample`` draws images from it."""

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.devices import best_device
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import Conditioning, encode, entries
from stepdistill.pipeline.load import as_teacher, pipeline_of
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.sizes import Size, at_size
from stepdistill.pipeline.trace import Trace
from stepdistill.recipe import IPAdapter
from stepdistill.sampling.generate import generate
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.playing import drawn, write_whole
from stepdistill.sampling.rules.names import needs_empty, rule_for
from stepdistill.sampling.rules.nasa import away_from
from stepdistill.sampling.rules.steps import StepRule
from stepdistill.sampling.rules.teacher import check_teacher, teacher_first, teacher_refined


@dataclass(frozen=True)
class SampleResult:
    """``images`` uint8 (N, C, H, W), the label of each, the grid's path (None: not written), wall-clock seconds.

    ``nfe`` is the mean number of network passes for an image. Of videos images are the middle frames, of sounds the
    spectra; ``files`` are the first of them, whole, beside the grid.
    """

    images: Tensor
    labels: tuple[str, ...]
    path: Path | None
    seconds: float
    nfe: float
    files: tuple[Path, ...] = ()

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        image_grid(self.images, columns=8).save(file, "PNG")
        return file.getvalue()


def inspect(
    path: str | Path,
    revision: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    ip_adapter: IPAdapter | None = None,
    variant: str | None = None,
    config: str | None = None,
) -> Trace:
    """Trace a pipeline: an embedded teacher's name, a folder, a run folder (its export), a checkpoint file or a hub id.

    Args:
        arguments: further arguments of the pipeline's call, such as height and width; None: those that an export was
            trained for.
        ip_adapter: loaded into it; None: the one that an export was trained with.
        variant: of its weights' files, such as "fp16".
        config: for a checkpoint file, the folder or hub id of a pipeline with the same configs.

    Raises:
        InputError: no such pipeline, or it cannot be traced; the message names the failed check.
    """
    named = as_teacher(pipeline_of(path)).model_copy(
        update={"revision": revision, "variant": variant, "config": config}
    )
    return open_teacher(named, arguments=arguments, ip_adapter=ip_adapter)


@dataclass(frozen=True)
class Guiding:
    """How samples are guided beside w.

    Args:
        rule: how guidance is done, a name in :data:`.rules.names.NAMES`; ``NAME:NUMBER`` sets its numbers.
        interval: the times, of which 1 is noise and 0 data, with guidance; at others there is none. None: all.
        teacher: a pipeline that makes the first ``teacher_steps`` steps, with guidance; the others have none.
        teacher_steps: see ``teacher``.
        refine: instead, the student makes them and moves by this weight, 0 to 1, towards the teacher's x_0.
        negative: a prompt that the network's cross-attention steers away from, without guidance.
        negative_scale: how far from it.
    """

    rule: str = "cfg"
    interval: tuple[float, float] | None = None
    teacher: str | Path | None = None
    teacher_steps: int = 1
    refine: float | None = None
    negative: str | None = None
    negative_scale: float = 0.2

    def check(self, guidance: float) -> None:
        """Whether these settings go together.

        Raises:
            InputError: they do not.
        """
        if self.refine is not None and (self.teacher is None or not 0 <= self.refine <= 1):
            raise InputError(f"refine: expected a teacher and a weight from 0 to 1, found {self.refine}")
        alone = {"rule": (self.rule, "cfg"), "interval": (self.interval, None)}
        if self.teacher is not None:
            _check_plain("where a teacher helps", alone)
        if self.negative is not None:
            others = {"guidance": (guidance, 1), "teacher": (self.teacher, None)}
            _check_plain("with a negative prompt", alone | others)


def sample(
    path: str | Path,
    *,
    steps: int = 4,
    guidance: float = 1.0,
    seed: int = 0,
    count: int = 16,
    size: Size | None = None,
    conditions: str | Path | Sequence[str | int] | None = None,
    out: str | Path | None = None,
    **guiding: Any,
) -> SampleResult:
    """Draw ``count`` images; image i depends on (seed, i) and its condition alone.

    Args:
        path: see :func:`inspect`.
        steps: of the pipeline's own scheduler.
        guidance: w, 1 is off.
        seed: of all random numbers.
        count: how many images.
        size: their height and width in pixels; None: those of the pipeline, or the first that an export was trained on.
        conditions: class names, class numbers or prompts, or a file with one a line; taken in turn. None: all classes.
        out: where to write the images as one PNG grid; of videos and sounds also a few files that play, beside it.
        guiding: the fields of :class:`Guiding`, such as ``rule`` and ``interval``.

    Raises:
        InputError: no such pipeline, class, guidance or rule, or the pipeline makes no pictures of this size.
    """
    chosen = Guiding(**guiding)
    for name, value in (("steps", steps), ("count", count), ("teacher_steps", chosen.teacher_steps)):
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, found {value}")
    if seed < 0:
        raise InputError(f"seed: expected an integer from 0 up, found {seed}")
    chosen.check(guidance)
    traced = inspect(path)
    scheduler = traced.pipeline.scheduler
    if steps > (most := scheduler.config.get("original_inference_steps") or steps):
        kind = type(scheduler).__name__
        raise InputError(f"steps: expected at most {most}, what the {kind} of {path} was made for, found {steps}")
    device = best_device()
    traced.pipeline.to(device)
    traced.denoiser.network.to(device)  # of several students the pipeline has one
    traced = _sized(traced, size)
    requested = str(conditions) if isinstance(conditions, str | Path) else list(conditions or ()) or "classes"
    conditioning = encode(traced, entries(traced, requested), None).to(device)
    settings = {"steps": steps, "guidance": guidance, "seed": seed}
    rule, denoisers = _rule(traced, conditioning, chosen, size, **settings)
    before = sum(denoiser.evaluations for denoiser in denoisers)
    start = time.perf_counter()
    index = torch.arange(count) % len(conditioning)
    latents = generate(traced, scheduler, conditioning, index, **settings, rule=rule)
    nfe = (sum(denoiser.evaluations for denoiser in denoisers) - before) / count
    images, whole = drawn(traced, latents)
    seconds = time.perf_counter() - start
    files: list[Path] = []
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = len(conditioning) if 1 < len(conditioning) <= 16 else round(count**0.5)
        image_grid(images, columns).save(out, format="PNG")
        files = write_whole(out.with_name(f"{out.stem}_whole"), whole, traced)
    return SampleResult(images, tuple(conditioning.labels[i] for i in index.tolist()), out, seconds, nfe, tuple(files))


def _rule(
    traced: Trace,
    conditioning: Conditioning,
    chosen: Guiding,
    size: Size | None,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> tuple[Callable[[], StepRule], list[Denoiser]]:
    """(what makes the rule for each batch, the denoisers that it calls)."""
    if conditioning.null is None and needs_empty(chosen.rule, guidance):
        problem = f"found {guidance}" if guidance != 1 else f"and rule cfg, found {chosen.rule}"
        raise InputError(f"guidance: expected 1 for a pipeline without guidance, {problem}")
    if chosen.teacher is not None:
        helper = _teacher(chosen.teacher, traced, size)
        rule = functools.partial(teacher_first, helper, guidance, chosen.teacher_steps)
        if chosen.refine is not None:
            rule = functools.partial(teacher_refined, helper, guidance, chosen.refine, chosen.teacher_steps)
        return rule, [traced.denoiser, helper]
    if chosen.negative is not None:
        return functools.partial(away_from, traced, chosen.negative, chosen.negative_scale), [traced.denoiser]
    settings = {"steps": steps, "guidance": guidance, "seed": seed, "interval": chosen.interval}
    return rule_for(traced, conditioning, chosen.rule, **settings), [traced.denoiser]


def _teacher(path: str | Path, student: Trace, size: Size | None) -> Denoiser:
    """The denoiser of the pipeline at ``path``, on the student's device and at its size."""
    traced = inspect(path)
    traced.pipeline.to(student.pipeline.device)
    traced = _sized(traced, size)
    check_teacher(traced, student, str(path))
    return traced.denoiser


def _sized(traced: Trace, size: Size | None) -> Trace:
    return traced if size is None else at_size(traced, size)


def _check_plain(when: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Whether each setting (found, expected) is left as it is."""
    for name, (value, expected) in settings.items():
        if value != expected:
            raise InputError(f"{name}: expected {'none' if expected is None else expected} {when}, found {value}")
