"""A frozen backbone in few bits: adapters learn on it, and the export stands on the plain one."""

import sys

import pytest
import torch
from torch import nn

from pipeline.no_preview import NoPreview
from pipeline.tiny import save_dit, tiny_dit
from stepdistill.errors import InputError
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.optimizer import only_moving
from stepdistill.training.session import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quantized") / "teacher"
    save_dit(tiny_dit(), folder)
    return str(folder)


def recipe_of(teacher, output, how="int8", **student) -> dict:
    return {
        "teacher": {"pipeline": teacher, "guidance": {"scale": 2.0}, "precision": "bf16", "quantize": how},
        "student": {"steps": 2, "train": "lora", "rank": 2} | student,
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "bf16", "tracker": "none"},
        "report": {"samples": 0},
        "output": str(output),
    }


def test_linear_layers_are_in_eight_bits(teacher, tmp_path):
    pytest.importorskip("torchao")
    session = build(load(recipe_of(teacher, tmp_path)), CPU)
    backbone = session.method.roles.teacher.network.backbone
    bases = [m for m in backbone.modules() if isinstance(m, nn.Linear) and "Int8" in type(m.weight).__name__]
    assert bases and not any(base.weight.requires_grad for base in bases)
    exact = build(load(recipe_of(teacher, tmp_path, None)), CPU).method.roles.teacher
    cond, _ = session.conditioning.batch(torch.arange(4))
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        found, expected = (role(x, t, cond).raw.float() for role in (session.method.roles.teacher, exact))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    student = session.method.roles.student
    adapter = list(student.network.parameters())
    with only_moving(adapter):
        student(x, t, cond).raw.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter)


def test_a_run_on_eight_bits_ends_in_a_plain_export(teacher, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    run = train(recipe_of(teacher, tmp_path / "run"))
    exported = load_pipeline(run.folder / "export")
    assert {p.dtype for p in exported.transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize(("how", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_package_that_is_not_there_is_named(how, package, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.quantization", None)
    with pytest.raises(InputError, match=rf"teacher\.quantize: {how} needs {package} \(pip install {package}\)"):
        load_pipeline(teacher, dtype=torch.bfloat16, quantize=how)


def test_what_a_recipe_cannot_mean(teacher, tmp_path):
    wrong = recipe_of(teacher, tmp_path, train="full")
    with pytest.raises(InputError, match=r"student\.train: expected 'lora' beside teacher\.quantize; all weights"):
        load(wrong)
    wrong = recipe_of(teacher, tmp_path)
    wrong["teacher"]["precision"] = "fp32"
    with pytest.raises(InputError, match=r"teacher\.precision: expected 'bf16' beside teacher\.quantize, found 'fp32'"):
        load(wrong)
