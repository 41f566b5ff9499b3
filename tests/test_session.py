"""Switches of how networks run: the same numbers, and one clear error."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.session import Session, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), path)
    return path


@pytest.fixture(autouse=True)
def same_backend_afterwards(monkeypatch):
    """diffusers keeps the active backend for the whole process."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


def session(folder, **keys) -> Session:
    recipe = {
        "teacher": {"pipeline": str(folder), "guidance": {"scale": 1.5}},
        "student": {"steps": 2},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, **keys},
    }
    return build(load(recipe), torch.device("cpu"))


def loss(built: Session) -> torch.Tensor:
    return built.method.losses("student", built.batch(0, 0, 2))["dm"].detach()


def test_switches_of_how_networks_run_change_no_number(folder):
    plain, other = session(folder), session(folder, channels_last=True, attention_backend="native")
    weight = next(p for p in other.method.roles.student.network.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(loss(plain), loss(other))


@pytest.mark.parametrize("backend,problem", [("natve", "must be one of the following"), ("flash_hub", "from the hub")])
def test_a_backend_that_is_not_there(folder, backend, problem):
    with pytest.raises(InputError, match=rf"train\.attention_backend: .*{problem}"):
        session(folder, attention_backend=backend)
