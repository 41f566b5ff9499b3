"""Measure the student while it trains: one metric, few samples; the best checkpoints stay, and a run may end early.

Adversarial and distribution-matching students are at their best before the end, and no loss shows when.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from stepdistill import checkpoint
from stepdistill.errors import InputError
from stepdistill.eval.features import extract
from stepdistill.eval.metrics import Moments, frechet_distance, kid
from stepdistill.eval.protocol import load_networks, load_protocol, load_reference
from stepdistill.eval.row_cache import write_json
from stepdistill.fitting import check_fit
from stepdistill.generation.generate import decode
from stepdistill.generation.run_samples import diffuse, distilled
from stepdistill.session import Session

# Apart from training, preview and benchmark seeds.
SEED = 987_654_322
BEST, VALUES = "best", "values.json"


class Evaluation:
    """What the recipe's section ``evaluation`` asks for; lower values are better.

    A metric ``teacher_...`` compares with the teacher's samples of the same conditions and noise, so it needs no images
    and suits every pipeline; the others compare with the embedded protocol's reference.

    Args:
        session: the run. folder: its folder; best/ in it holds the best checkpoints and the value of each step. step:
            where the run starts or goes on; values of later steps, which will be measured again, are forgotten.

    Raises:
        InputError: the metric needs a network that is not installed, or images of another shape.
    """

    def __init__(self, session: Session, folder: Path, step: int):
        self.session, self.settings, self.folder = session, session.recipe.evaluation, folder / BEST
        self.values = {at: value for at, value in read_values(folder).items() if at <= step}
        train = session.recipe.train
        self.batch = train.batch_size // train.accumulation
        against, _, name = self.settings.metric.rpartition("_")
        self.distance = against.removeprefix("teacher_")
        protocol = load_protocol()
        self.network = load_networks(protocol, [name], session.device)[name]
        if against.startswith("teacher_"):
            self.rows = extract(self.network, self._decoded(diffuse(session, "teacher", *self._request)))
            self.moments = Moments.of(self.rows)
        else:
            try:
                check_fit(session.trace, protocol, session.recipe.teacher.pipeline)
            except InputError as error:
                raise InputError(f"evaluation.metric: expected teacher_{self.settings.metric}: {error}") from None
            reference = load_reference(protocol)
            self.rows, self.moments = reference.rows[name], reference.moments[name]

    @property
    def _request(self) -> tuple[int, int, int]:
        return self.settings.samples, SEED, self.batch

    def _decoded(self, latents: Tensor) -> Tensor:
        return decode(self.session.trace, latents, self.batch).cpu()

    @torch.no_grad()
    def measure(self, averaged: AbstractContextManager) -> float:
        """The metric of the student now."""
        with averaged:
            rows = extract(self.network, self._decoded(distilled(self.session, *self._request)))
        if self.distance == "kid":
            return kid(self.rows, rows)[0]
        return frechet_distance(self.moments, Moments.of(rows))

    @property
    def best(self) -> list[int]:
        """The steps whose checkpoints stay, best value first."""
        return ranked(self.values)[: self.settings.keep_best]

    def write(self) -> None:
        """Write the values down, and delete checkpoints that are no longer among the best."""
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / VALUES, self.values)
        for path in self.folder.glob("step-*"):
            if path not in [_place(self.folder, step) for step in self.best]:
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
    file = run / BEST / VALUES
    if not file.is_file():
        return {}
    return {int(step): float(value) for step, value in json.loads(file.read_text(encoding="utf-8")).items()}


def best_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the best value, where the run was evaluated."""
    for step in ranked(read_values(run)):
        path = _place(run / BEST, step)
        if path.is_dir():
            try:
                checkpoint.verify(path)
            except InputError:
                continue
            return path
    return None


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"
