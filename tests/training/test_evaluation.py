"""Evaluation during training: the best checkpoints are kept and exported, and a student past its best ends the run."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make_recipe, teacher  # noqa: F401

from pipeline.tiny import tiny_sd
from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.evaluation import Evaluation, best_checkpoint, ranked, read_values
from stepdistill.training.run_samples import diffuse, distilled
from stepdistill.training.session import build

METHOD = {"name": "dmd2", "critic_steps": 1}


def values_as(monkeypatch, values: dict[int, float]) -> None:
    """The metric of the student after each step, as if it had been measured."""
    steps = iter(values)
    monkeypatch.setattr(Evaluation, "measure", lambda self, averaged: values[next(steps)])


def recipe_of(teacher: Path, out: Path, steps: int, **evaluation) -> dict:  # noqa: F811
    return make_recipe(teacher, out, METHOD, steps=steps) | {"evaluation": {"every": 1, "samples": 16} | evaluation}


def test_the_best_are_kept_and_the_very_best_is_exported(teacher, tmp_path, monkeypatch):  # noqa: F811
    values_as(monkeypatch, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0})
    run = train(recipe_of(teacher, tmp_path / "run", 4, keep_best=2))
    assert run.step == 4 and not run.interrupted
    kept = sorted(path.name for path in (run.folder / "best").glob("step-*"))
    assert kept == ["step-000002", "step-000003"]
    assert best_checkpoint(run.folder).name == "step-000002"
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation/teacher_kid_enet"] for line in lines] == [3.0, 1.0, 2.0, 4.0]
    assert json.loads((run.folder / "export" / "stepdistill.json").read_text())["trained_steps"] == 2
    best = load_file(run.folder / "best" / "step-000002" / "student.average.safetensors")
    exported = load_file(run.folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(best[name], exported[name]) for name in best)
    # A damaged best is passed over.
    (run.folder / "best" / "step-000002" / "student.safetensors").write_bytes(b"")
    assert best_checkpoint(run.folder).name == "step-000003"


def test_a_student_past_its_best_ends_the_run(teacher, tmp_path, monkeypatch, capfd):  # noqa: F811
    values_as(monkeypatch, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 0.0})
    recipe = recipe_of(teacher, tmp_path / "run", 5, patience=2)
    run = train(recipe)
    assert (run.step, run.interrupted) == (4, False)
    assert "teacher_kid_enet has not improved since step 2 (best 1)" in capfd.readouterr().err
    assert (run.folder / "export" / "model_index.json").is_file()
    # It stays ended; with more patience it goes on where it stopped.
    assert train(recipe).step == 4
    values_as(monkeypatch, {5: 0.0})
    assert train(recipe | {"evaluation": recipe["evaluation"] | {"patience": 3}}).step == 5
    assert best_checkpoint(run.folder).name == "step-000005"


def test_values_of_steps_to_come_are_forgotten(teacher, tmp_path, monkeypatch):  # noqa: F811
    values_as(monkeypatch, {1: 3.0, 2: 1.0, 3: 2.0})
    recipe = recipe_of(teacher, tmp_path / "run", 3)
    run = train(recipe)
    session = build(load(recipe), torch.device("cpu"))
    assert Evaluation(session, run.folder, 2).values == {1: 3.0, 2: 1.0}
    assert read_values(run.folder) == {1: 3.0, 2: 1.0, 3: 2.0}
    assert read_values(tmp_path) == {} and best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("metric", ["teacher_kid_enet", "teacher_fd_enet"])
def test_a_student_like_its_teacher_is_measured_better(metric, teacher, tmp_path):  # noqa: F811
    recipe = recipe_of(teacher, tmp_path, 1, metric=metric)
    session = build(load(recipe), torch.device("cpu"))
    evaluation = Evaluation(session, tmp_path, 0)
    student = session.method.roles.student.network
    as_teacher = evaluation.measure(nullcontext())
    assert as_teacher == evaluation.measure(nullcontext())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert evaluation.measure(nullcontext()) > as_teacher


def test_samples_do_not_depend_on_the_batch(teacher, tmp_path):  # noqa: F811
    session = build(load(recipe_of(teacher, tmp_path, 1)), torch.device("cpu"))
    torch.testing.assert_close(distilled(session, 5, 7), distilled(session, 5, 7, batch=2))
    torch.testing.assert_close(diffuse(session, "teacher", 5, 7), diffuse(session, "teacher", 5, 7, batch=2))


def test_a_metric_of_other_images_is_refused(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "sd")
    recipe = recipe_of(tmp_path / "sd", tmp_path / "run", 1, metric="fd_enet") | {"data": {"conditions": ["a shoe"]}}
    session = build(load(recipe), torch.device("cpu"))
    with pytest.raises(InputError, match=r"evaluation\.metric: expected teacher_fd_enet: .* expects 10 classes"):
        Evaluation(session, tmp_path / "run", 0)


def test_ranked_prefers_the_earlier_of_equals():
    assert ranked({3: 1.0, 1: 2.0, 2: 1.0}) == [2, 3, 1]
