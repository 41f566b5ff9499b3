"""Previews, the check of conventions and measured times, with fewer steps and samples than for users.

Runs are many, and nearly all of their teachers have random weights: to draw 16 previews of a teacher in 50 steps, and
images of it to check its conventions, would take longer than all else. Tests that are about these are marked
true_samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest

from stepdistill.eval.protocol import Protocol, load_protocol
from stepdistill.sampling import cost
from stepdistill.training import previews, run_samples, selfcheck

SHORT = {
    (run_samples, "TEACHER_STEPS"): 2,
    (previews, "COUNT"): 2,
    (selfcheck, "TRAJECTORY_STEPS"): 2,
    (cost, "REPEATS"): 1,
}
TRUE = {place: getattr(*place) for place in SHORT}


def shorten() -> None:
    """For this process, as tests/conftest.py does."""
    for place, value in SHORT.items():
        setattr(*place, value)


def short_report(patch: pytest.MonkeyPatch) -> None:
    """The report at the end of a run, with a teacher of two steps and few further samples."""

    def shortened(name: str) -> Protocol:
        full = load_protocol(name)
        few = {"teacher": full.teacher.model_copy(update={"steps": 2})}
        if full.diversity:
            few["diversity"] = full.diversity.model_copy(update={"prompts": 2, "images": 2})
        return full.model_copy(update=few)

    patch.setattr("stepdistill.eval.bench.rows.load_protocol", shortened)
    patch.setattr("stepdistill.eval.measure.standard_error", lambda *_, **__: 0.5)


@contextmanager
def bare(*but: str) -> Iterator[None]:
    """Runs train and save, and do nothing else: checks before the first step, previews and the export are not of it."""
    with pytest.MonkeyPatch.context() as patch:
        preview = MagicMock()
        preview.return_value.write.return_value = {}
        patch.setattr("stepdistill.training.between_steps.Preview", preview)
        for name in {"check_stock_call", "check_conventions", "export_trained"}.difference(but):
            patch.setattr(f"stepdistill.run.{name}", MagicMock())
        yield
