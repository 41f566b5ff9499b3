"""A start that fails leaves nothing behind that blocks the corrected command."""

from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import yaml_lines
from stepdistill.training.run_folder import check_grid
from stepdistill.training.trainer import Trainer


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A run is its start, and no more."""
    monkeypatch.setattr(Trainer, "run", lambda self, start: (0, True))
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)


def recipe_in(folder: Path, **data) -> str:
    recipe = {
        "teacher": {"pipeline": str(folder / "teacher")},
        "student": {"steps": 2},
        "method": {"name": "sfd", "substeps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml_lines.dump(recipe | ({"data": data} if data else {})))
    return str(folder / "recipe.yaml")


def test_images_without_captions(tmp_path, capsys):
    save_pipeline(tiny_sd(), tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "0.png")
    wrong = recipe_in(tmp_path, conditions=str(tmp_path / "images"))
    assert cli.run(["train", wrong]) == 2
    assert cli.run(["train", wrong, "data.conditions=['a red shoe']"]) == 0
    assert "another recipe" not in capsys.readouterr().err
    assert not list(tmp_path.glob("run.previous-*"))


def test_a_teacher_that_is_not_there(tmp_path, capsys):
    recipe = recipe_in(tmp_path)
    (tmp_path / "teacher").mkdir()
    assert cli.run(["train", recipe]) == 2
    save_dit(tiny_dit(), tmp_path / "other")
    assert cli.run(["train", recipe, f"teacher.pipeline={tmp_path / 'other'}"]) == 0
    assert "another recipe" not in capsys.readouterr().err


def test_a_start_from_nothing_moves_no_run_aside(tmp_path):
    recipe = recipe_in(tmp_path)
    save_dit(tiny_dit(), tmp_path / "teacher")
    for _ in range(2):
        assert cli.run(["train", recipe, "resume=never"]) == 0
    assert not list(tmp_path.glob("run.previous-*"))


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-000001"])
def test_what_took_steps_is_a_run(left, tmp_path, capsys):
    recipe = recipe_in(tmp_path)
    save_dit(tiny_dit(), tmp_path / "teacher")
    assert cli.run(["train", recipe]) == 0
    (tmp_path / "run" / left).mkdir(parents=True)
    assert cli.run(["train", recipe, "train.lr=0.1"]) == 2
    assert "train.lr is 0.001 there" in capsys.readouterr().err


def test_a_run_is_held_to_the_times_it_was_trained_at(tmp_path):
    stretched, plain = FlowMatchEulerDiscreteScheduler(shift_terminal=0.5), FlowMatchEulerDiscreteScheduler()
    check_grid(tmp_path, [1.0, 0.75], stretched, resumes=False)
    check_grid(tmp_path, [1.0, 0.75], stretched, resumes=True)
    with pytest.raises(InputError, match="trained by another version of stepdistill"):
        check_grid(tmp_path, [1.0, 0.5], stretched, resumes=True)
    check_grid(tmp_path, [1.0, 0.5], plain, resumes=False)  # a fresh run in its place
    (tmp_path / "grid.json").unlink()
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match="finish and export it with that version"):
        check_grid(tmp_path, [1.0, 0.75], stretched, resumes=True)
    check_grid(tmp_path, [1.0, 0.5], plain, resumes=True)
