"""Adaptive collaboration (Starodubcev et al. 2024): the student drafts, the teacher refines what is weak."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.generate import generate

Oracle = Callable[[Tensor, Sequence[str]], Tensor]
"""(images uint8 (N, C, H, W), the prompt or class name of each) -> scores (N,), higher is better."""

# The teacher's noise is not the student's.
TEACHERS_SEED = 2**32


@dataclass(frozen=True)
class Collaboration:
    """``images`` uint8 (N, C, H, W); the drafts' ``scores`` (N,); which were ``refined`` (N,).

    ``nfe`` is the mean number of network passes for an image, the teacher's included and the oracle's not.
    """

    images: Tensor
    scores: Tensor
    refined: Tensor
    nfe: float


@dataclass(frozen=True)
class Refinement:
    """How drafts are made and refined.

    Args:
        steps: of the student.
        teacher_steps: of the teacher, on each draft that is refined.
        rollback: the share of the teacher's grid that is gone back, in (0, 1]: ``teacher_steps`` is the last part of a
            grid of teacher_steps / rollback.
        guidance: the teacher's w; the student is not guided.
    """

    steps: int = 4
    teacher_steps: int = 12
    rollback: float = 0.7
    guidance: float = 1.0


def collaborate(
    student: Trace,
    teacher: Trace,
    conditions: Sequence[str | int],
    oracle: Oracle,
    threshold: float,
    *,
    count: int,
    seed: int = 0,
    **refinement: Any,
) -> Collaboration:
    """``count`` images in the student's steps; those below the threshold get noise and the teacher's steps on top.

    The paper takes ImageReward as the oracle, and for threshold a percentile of its scores for the student: with the
    threshold -inf nothing is refined, and ``scores.quantile(0.5)`` of that refines one draft of two. Image i depends on
    (seed, i), its condition and the threshold alone.

    Args:
        student: makes the drafts.
        teacher: of the same latents, on the same device.
        conditions: class names, numbers or prompts, in turn.
        oracle: scores the drafts.
        threshold: the lowest score of a draft that stays.
        count: how many images.
        seed: of all random numbers.
        refinement: the fields of :class:`Refinement`, such as ``steps`` and ``rollback``.

    Raises:
        InputError: other latents, a rollback out of range, or not a score for each image.
    """
    chosen = Refinement(**refinement)
    if student.latent_shape != teacher.latent_shape:
        raise InputError(f"teacher: expected latents {student.latent_shape}, found {teacher.latent_shape}")
    if not 0 < chosen.rollback <= 1:
        raise InputError(f"rollback: expected a number above 0 and up to 1, found {chosen.rollback}")
    before = student.denoiser.evaluations + teacher.denoiser.evaluations
    requested = entries(student, list(conditions))
    index = torch.arange(count) % len(requested)
    conditioning, teachers = (encode(one, requested).to(one.pipeline.device) for one in (student, teacher))
    drafts = generate(
        student, student.pipeline.scheduler, conditioning, index, steps=chosen.steps, guidance=1.0, seed=seed
    )
    images = decode(student, drafts)
    scores = oracle(images, [conditioning.labels[i] for i in index.tolist()])
    if scores.shape != (count,):
        raise InputError(f"oracle: expected {count} scores, found a tensor of shape {tuple(scores.shape)}")
    refined = ~(scores >= threshold).cpu()
    if refined.any():
        grid = round(chosen.teacher_steps / chosen.rollback)
        better = generate(
            teacher,
            teacher.pipeline.scheduler,
            teachers,
            index[refined],
            steps=grid,
            guidance=chosen.guidance,
            seed=seed + TEACHERS_SEED,
            indices=refined.nonzero()[:, 0].tolist(),
            onto=drafts[refined.to(drafts.device)],
            start=grid - chosen.teacher_steps,
        )
        images[refined] = decode(teacher, better)
    nfe = (student.denoiser.evaluations + teacher.denoiser.evaluations - before) / count
    return Collaboration(images, scores, refined, nfe)
