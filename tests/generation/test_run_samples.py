"""Samples of a run in progress: each role is drawn by its own weights."""

from pathlib import Path

import pytest
import torch

from pipeline.tiny import save_dit, tiny_dit
from stepdistill.generation import run_samples
from stepdistill.recipe import load
from stepdistill.session import build


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_dit(tiny_dit(), folder)
    return folder


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_teacher_is_drawn_without_the_students_weights(train, teacher, tmp_path, monkeypatch):
    """With adapters all roles share one network, on which the one that ran last is still switched on."""
    monkeypatch.setattr(run_samples, "TEACHER_STEPS", 2)
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
