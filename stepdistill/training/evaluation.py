"""Evaluation during training: one metric on few samples; keeps the best checkpoints and allows early stopping.

Adversarial and distribution-matching students are at their best before the end, and no loss shows when.
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.bench.samples import check_classes
from stepdistill.eval.measure import CLASS_BATCH, load_view
from stepdistill.eval.metrics import Moments, frechet_distance, kid
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.references import class_statistics
from stepdistill.files import read_json, write_json
from stepdistill.pipeline.decode import decode
from stepdistill.training import checkpoint
from stepdistill.training.layout import RunFolder
from stepdistill.training.run_samples import diffuse, distilled
from stepdistill.training.session import Session

# Apart from training, preview and benchmark seeds.
SEED = 987_654_322


class Evaluation:
    """The measurements of the recipe's section ``evaluation``; lower values are better.

    A metric ``teacher_...`` compares with the teacher's samples of the same conditions and noise, so it needs no images
    and suits every pipeline; the others compare with the embedded protocol's reference.

    Args:
        session: the run.
        folder: its folder; best/ in it holds the best checkpoints and the value of each step.
        step: where the run starts or resumes; values of later steps are dropped, as they will be measured again.

    Raises:
        InputError: the metric needs a network that is not installed, or images of another shape.
    """

    def __init__(self, session: Session, folder: Path, step: int):
        self.session, self.settings, self.folder = session, session.recipe.evaluation, RunFolder(folder)
        self.values = {at: value for at, value in read_values(folder).items() if at <= step}
        train = session.recipe.train
        self.batch = train.batch_size // train.accumulation
        against, _, name = self.settings.metric.rpartition("_")
        self.distance = against.removeprefix("teacher_")
        protocol = load_protocol()
        self.network = load_view(protocol.views[name], Path(), session.device)
        if against.startswith("teacher_"):
            self.rows = self._rows(diffuse(session, "teacher", *self._request))
            self.moments = Moments.of(self.rows)
        else:
            try:
                check_classes(session.trace, protocol, session.recipe.teacher.pipeline)
            except InputError as error:
                raise InputError(f"evaluation.metric: expected teacher_{self.settings.metric}: {error}") from None
            real = class_statistics(protocol.reference, name)
            self.rows, self.moments = real.rows(), real.moments

    @property
    def _request(self) -> tuple[int, int, int]:
        return self.settings.samples, SEED, self.batch

    def _rows(self, latents: Tensor) -> Tensor:
        """Feature rows (N, d), on the CPU."""
        images = decode(self.session.trace, latents, self.batch).cpu()
        return feature_pass(self.network, images, device=self.session.device, batch=CLASS_BATCH)["rows"]

    @torch.no_grad()
    def measure(self, averaged: AbstractContextManager) -> float:
        """The metric of the student now."""
        with averaged:
            rows = self._rows(distilled(self.session, *self._request))
        if self.distance == "kid":
            return kid(self.rows, rows)[0]
        return frechet_distance(self.moments, Moments.of(rows))

    @property
    def best(self) -> list[int]:
        """The steps whose checkpoints stay, best value first."""
        return ranked(self.values)[: self.settings.keep_best]

    def write(self) -> None:
        """Write the values down, and delete checkpoints that are no longer among the best."""
        best = self.folder.best
        write_json(self.folder.best_values, self.values)
        for path in best.glob("step-*"):
            if path not in [checkpoint.path_of(best, step) for step in self.best]:
                shutil.rmtree(path)

    @property
    def exhausted(self) -> bool:
        """Whether the last ``patience`` values brought nothing better."""
        if not self.settings.patience or not self.values:
            return False
        later = sum(step > ranked(self.values)[0] for step in self.values)
        return later >= self.settings.patience


def ranked(values: dict[int, float]) -> list[int]:
    """The steps, best value first; of equal ones the earlier."""
    return sorted(values, key=lambda step: (values[step], step))


def read_values(run: Path) -> dict[int, float]:
    """The value of each evaluated step of a run; empty where it was not evaluated."""
    file = RunFolder(run).best_values
    if not file.is_file():
        return {}
    return {int(step): float(value) for step, value in read_json(file).items()}


def best_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the best value, where the run was evaluated."""
    for step in ranked(read_values(run)):
        path = checkpoint.path_of(RunFolder(run).best, step)
        if path.is_dir():
            try:
                checkpoint.verify(path)
            except InputError:
                continue
            return path
    return None
