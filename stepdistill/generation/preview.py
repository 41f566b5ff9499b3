"""Previews: teacher, student and critic from the same noise, and how far the student's latents have drifted."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from stepdistill.eval.pictures import image_grid
from stepdistill.generation.generate import decode
from stepdistill.generation.run_samples import diffuse, distilled
from stepdistill.session import Session

COUNT = 16
# Apart from training and benchmark seeds, which a user picks.
SEED = 987_654_321


class Preview:
    """Writes previews/NNNNNN.png: one row each of teacher (guided), student and, where there is one, critic.

    Args:
        session: the run. folder: its folder. writes: False in a process that only takes part in the networks' calls.
    """

    def __init__(self, session: Session, folder: Path, writes: bool = True):
        self.session, self.folder, self.writes = session, folder / "previews", writes
        if writes:
            self.folder.mkdir(exist_ok=True)
        self.teacher = diffuse(session, "teacher", COUNT, SEED)
        self.teacher_images = decode(session.trace, self.teacher)

    @torch.no_grad()
    def write(self, step: int, averaged: AbstractContextManager) -> dict[str, float]:
        """Write the picture of ``step``; returns how far the latents' mean and deviation are from the teacher's."""
        session = self.session
        with averaged:
            student = distilled(session, COUNT, SEED)
        rows = [self.teacher_images, decode(session.trace, student)]
        if session.method.roles.critic is not None:
            rows.append(decode(session.trace, diffuse(session, "critic", COUNT, SEED)))
        if self.writes:
            image_grid(torch.cat(rows), columns=COUNT).save(self.folder / f"{step:06d}.png")
        difference = student.float().mean() - self.teacher.float().mean()
        return {
            "drift/mean": difference.item(),
            "drift/std": (student.float().std() / self.teacher.float().std()).item() - 1,
        }
