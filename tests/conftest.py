"""Settings for the whole suite: no network, one way to draw, repeatable examples, GPU tests only where there is one."""

import gc
import os
import tempfile
from collections.abc import Iterator

# Before any test imports these libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["STEPDISTILL_CACHE"] = tempfile.mkdtemp(prefix="stepdistill-tests-")

import hypothesis
import pytest
import torch

# The operations as where there is a device, with their kernels inside: tests/kernels look at what is compiled.
with pytest.MonkeyPatch.context() as patched:
    patched.setattr(torch.cuda, "device_count", lambda: 1)
    import stepdistill.kernels  # noqa: F401

from diffusers.hooks import group_offloading

import short_samples
from stepdistill.exporting import check
from stock_here import call_here

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("suite")
short_samples.shorten()
CALL_ELSEWHERE = check.call_elsewhere
LONG = ("test_distributed", "test_real_run", "test_docs_commands", "test_notebook", "test_compare")
"""Modules with tests of up to a minute: they come first, so that no worker is left with one at the end."""


def _hook_of(network: torch.nn.Module) -> object | None:
    """What diffusers' function finds, without a failing getattr for each module: it is called several times a call."""
    hooks = (vars(module).get("_diffusers_hook") for module in network.modules())
    found = (hook.get_hook("group_offloading") for hook in hooks if hook is not None)
    return next((one for one in found if one is not None), None)


group_offloading._get_top_level_group_offload_hook = _hook_of


def pytest_collection_finish() -> None:
    """What is there by now stays: the collector need not walk through the libraries again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _called_here() -> Iterator[None]:
    """Also for exports that fixtures of a module or of the session make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "call_elsewhere", call_here)
        yield


@pytest.fixture(autouse=True)
def _as_for_users(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("own_process"):
        monkeypatch.setattr(check, "call_elsewhere", CALL_ELSEWHERE)
    if request.node.get_closest_marker("true_samples"):
        for place, value in short_samples.TRUE.items():
            monkeypatch.setattr(*place, value)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # torch.manual_seed formats the stack for each kind of device that this machine lacks.
    torch.manual_seed(0) if torch.accelerator.is_available() else torch.default_generator.manual_seed(0)
