"""Previews: teacher, student and critic from the same noise, and how far the student's latents have drifted."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from stepdistill.eval.pictures import image_grid
from stepdistill.pipeline.generate import decode, generate, noise
from stepdistill.session import Session

COUNT = 16
TEACHER_STEPS = 50
# Apart from training and benchmark seeds, which a user picks.
SEED = 987_654_321


class Preview:
    """Writes previews/NNNNNN.png: one row each of teacher (guided), student and, where there is one, critic.

    Args:
        session: the run. folder: its folder.
    """

    def __init__(self, session: Session, folder: Path):
        self.session, self.folder = session, folder / "previews"
        self.folder.mkdir(exist_ok=True)
        self.index = torch.arange(COUNT) % len(session.conditioning)
        self.noise = noise(session.trace.latent_shape, SEED, range(COUNT)).to(session.device)
        self.teacher = self._diffuse(session.trace, session.method.roles.scale)
        self.teacher_images = decode(session.trace, self.teacher)

    def _diffuse(self, trace, guidance: float) -> torch.Tensor:
        scheduler = trace.pipeline.scheduler
        return generate(
            trace,
            type(scheduler).from_config(scheduler.config),
            self.session.conditioning,
            self.index,
            steps=TEACHER_STEPS,
            guidance=guidance,
            seed=SEED,
        )

    @torch.no_grad()
    def write(self, step: int, averaged: AbstractContextManager) -> dict[str, float]:
        """Write the picture of ``step``; returns how far the latents' mean and deviation are from the teacher's."""
        session, roles = self.session, self.session.method.roles
        cond, _ = session.conditioning.batch(self.index.to(session.device))
        draws = iter(range(1, 100))
        with averaged:
            student = session.sampler.sample(
                lambda x, t: roles.student(x, t, cond),
                self.noise,
                lambda: noise(session.trace.latent_shape, SEED, range(COUNT), stream=next(draws)).to(session.device),
            )
        rows = [self.teacher_images, decode(session.trace, student)]
        if roles.critic is not None:
            critic = self._diffuse(replace(session.trace, denoiser=roles.critic), guidance=1.0)
            rows.append(decode(session.trace, critic))
        image_grid(torch.cat(rows), columns=COUNT).save(self.folder / f"{step:06d}.png")
        difference = student.float().mean() - self.teacher.float().mean()
        return {
            "drift/mean": difference.item(),
            "drift/std": (student.float().std() / self.teacher.float().std()).item() - 1,
        }
