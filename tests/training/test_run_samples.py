"""Samples of a run in progress: each role is drawn by its own weights."""

from pathlib import Path

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.pipeline.open import open_teacher
from stepdistill.recipe import load
from stepdistill.training import run_samples
from stepdistill.training.session import build


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_dit(tiny_dit(), folder)
    return folder


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_teacher_is_drawn_without_the_students_weights(train, teacher, tmp_path):
    """With adapters all roles share one network, on which the one that ran last is still switched on."""
    recipe = {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "train": train},
        "method": {"name": "dmd2"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
        "output": str(tmp_path),
    }
    session = build(load(recipe), torch.device("cpu"))
    roles = session.method.roles
    before = {role: run_samples.diffuse(session, role, 2, 0) for role in ("teacher", "critic")}
    counted = roles.teacher.evaluations
    with torch.no_grad():
        for role in (roles.critic, roles.student):
            for _, parameter in role.network.named_parameters():
                parameter.add_(0.1)
    student = run_samples.distilled(session, 2, 0)
    assert torch.equal(run_samples.diffuse(session, "teacher", 2, 0), before["teacher"])
    assert roles.teacher.evaluations == counted
    assert not torch.equal(run_samples.diffuse(session, "critic", 2, 0), before["critic"])
    assert not torch.equal(student, before["teacher"])


def test_the_trace_of_a_run_is_its_teacher_whatever_ran_last(teacher, tmp_path):
    recipe = {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 1.5}},
        "student": {"steps": 2, "train": "lora"},
        "method": {"name": "dmd2"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
        "output": str(tmp_path),
    }
    session = build(load(recipe), torch.device("cpu"))
    roles, batch = session.method.roles, session.batch(0, 0, 2)
    x, t = batch.noise("x"), torch.tensor([0.3, 0.9])
    assert session.trace.denoiser is roles.teacher
    with torch.no_grad():
        own = open_teacher(teacher).denoiser(x, t, batch.cond).raw
        for role in (roles.student, roles.critic):
            for _, parameter in role.network.named_parameters():
                parameter.add_(0.1)
            assert not torch.equal(role(x, t, batch.cond).raw, own)
            assert torch.equal(session.trace.denoiser(x, t, batch.cond).raw, own)
            with pytest.raises(RuntimeError):
                role(x[:, :1], t, batch.cond)
            assert torch.equal(session.trace.denoiser(x, t, batch.cond).raw, own)
