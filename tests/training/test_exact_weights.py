"""What is trained whole starts from the exact weights, and nothing else is read or copied for it."""

import pytest
import torch
from diffusers import DiffusionPipeline

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import load
from stepdistill.roles.stored_weights import StoredWeight
from stepdistill.training import session as sessions
from stepdistill.training.session import build, build_without_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "dit"
    save_dit(tiny_dit(), folder)
    return folder


def recipe_of(teacher, **keys):
    return load(
        {
            "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}, "precision": "bf16"} | keys,
            "student": {"steps": 2},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "bf16"},
        }
    )


def test_weights_are_read_in_the_precision_that_they_get(teacher, monkeypatch):
    """Not in float32 first, of which twelve billion take 48 GB."""
    seen, to = [], DiffusionPipeline.to
    monkeypatch.setattr(
        DiffusionPipeline,
        "to",
        lambda self, *given: (seen.append({p.dtype for p in self.transformer.parameters()}), to(self, *given))[1],
    )
    load_pipeline(teacher, dtype=torch.bfloat16)
    assert seen == [{torch.bfloat16}]


@pytest.mark.parametrize("keys", [{}, {"storage": "fp8"}])
def test_a_whole_student_starts_from_the_files_of_its_network_alone(keys, teacher, monkeypatch):
    monkeypatch.setattr(sessions, "load_pipeline", None)
    roles = build(recipe_of(teacher, **keys), CPU).method.roles
    exact = tiny_dit().transformer.state_dict()
    for role in (roles.student, roles.critic):
        assert all(torch.equal(weight, exact[name]) for name, weight in role.network.named_parameters())
    assert any(isinstance(weight, StoredWeight) for weight in roles.teacher.network.parameters()) == bool(keys)


def test_an_export_has_no_critic(teacher):
    assert "critic" not in build_without_data(recipe_of(teacher), CPU).method.roles


def test_copies_that_will_be_sharded_hold_no_memory(teacher, monkeypatch):
    """Each is a view of the same weights, in the precision of the files."""
    recipe, exact = recipe_of(teacher), load_pipeline(teacher).transformer.half()
    monkeypatch.setattr(sessions, "exact_network", lambda *_: exact)
    roles = build(recipe, CPU, shared=True).method.roles
    for role in (roles.student, roles.critic):
        assert type(role.network) is type(exact) and dict(role.network.named_parameters()).keys()
        for name, weight in role.network.named_parameters():
            assert weight.dtype == torch.float16 and weight.data_ptr() == exact.get_parameter(name).data_ptr()
    assert next(roles.student.network.parameters()) is not next(roles.critic.network.parameters())
