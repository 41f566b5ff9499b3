"""Settings for the whole suite: no network, one way to draw, repeatable examples, GPU tests only where there is one."""

import os
import tempfile

# Before any test imports these libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["STEPDISTILL_CACHE"] = tempfile.mkdtemp(prefix="stepdistill-tests-")

import hypothesis
import pytest
import torch

from stepdistill.exporting import export
from stock_here import call_here

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _called_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("own_process"):
        monkeypatch.setattr(export, "call_elsewhere", call_here)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
