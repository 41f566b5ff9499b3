"""Samples of a run in progress: of its teacher, its student, its critic. Sample i depends on (seed, i) alone."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stepdistill.pipeline.decode import at_once
from stepdistill.sampling.generate import generate, noise
from stepdistill.training.session import Session

TEACHER_STEPS = 50


def conditions_of(session: Session, count: int) -> Tensor:
    """The conditions (count,) of samples 0 .. count - 1: all of the run's in turn, repeated."""
    return torch.arange(count) % len(session.conditioning)


def diffuse(
    session: Session, role: Literal["teacher", "critic"], count: int, seed: int, batch: int | None = None
) -> Tensor:
    """Latents (count, ...) of the teacher with the recipe's guidance, or of the critic without, in many stock steps."""
    trace, roles = session.trace, session.method.roles
    scheduler = trace.pipeline.scheduler
    # The teacher's passes here train nobody and are not counted.
    denoiser = roles.critic if role == "critic" else roles.teacher.on(roles.teacher.network)
    return generate(
        replace(trace, denoiser=denoiser),
        type(scheduler).from_config(scheduler.config),
        session.conditioning,
        conditions_of(session, count),
        steps=TEACHER_STEPS,
        guidance=1.0 if role == "critic" else roles.scale,
        seed=seed,
        batch=batch,
    )


@torch.no_grad()
def distilled(session: Session, count: int, seed: int, batch: int | None = None) -> Tensor:
    """Latents (count, ...) of the student by the training-time sampler, from the noise that :func:`diffuse` takes."""
    shape, student = session.trace.latent_shape, session.method.roles.student
    parts, batch = [], batch or at_once(shape)
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        cond, _ = session.conditioning.batch(conditions_of(session, count)[rows.start : rows.stop])
        streams = iter(range(100))

        def fresh(rows=rows, streams=streams) -> Tensor:
            return noise(shape, seed, rows, stream=next(streams)).to(session.device)

        parts.append(session.sampler.sample(lambda x, t, cond=cond: student(x, t, cond), fresh(), fresh))
    return torch.cat(parts)
