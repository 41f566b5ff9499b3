"""Every shipped recipe, on a tiny stand-in of its teacher: it trains, each player in its turn, and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import assets, checkpoint
from stepdistill.eval.comparison import PHASES
from stepdistill.recipe import load
from stepdistill.trainer import train

STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny teacher, and two grey pictures of each of its classes in folders of their names."""
    folder = tmp_path_factory.mktemp("stand-in")
    pipeline = tiny_dit()
    save_dit(pipeline, folder / "teacher")
    random = np.random.default_rng(0)
    for name in ("Trouser", "Bag", "Dress"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(
                folder / "images" / name / f"{i}.png"
            )
    return folder


def shortened(name: str, place: Path, out: Path) -> list[str]:
    """Overrides that leave the recipe's settings and take its teacher, data and length away."""
    recipe = load(name)
    stated = recipe.method.model_extra
    keys = {f"method.{key}": 1 for key in PHASES if stated.get(key)}
    needs = recipe.method.implementation.data_needs(recipe.method.config)
    if needs.paths is not None:
        (count,) = [key for key, value in stated.items() if value == needs.paths.count]
        keys[f"method.{count}"] = 6
    keys |= {"teacher.pipeline": place / "teacher", "report.samples": 0, "output": out}
    if recipe.data.images is not None:
        keys["data.images"] = place / "images"
    keys |= {"train.steps": STEPS, "train.batch_size": 4, "train.lr_warmup": 0, "train.log_every": 1}
    keys |= {"train.preview_every": 100, "train.checkpoint_every": 100, "train.tracker": "none"}
    return [f"{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize("name", assets.recipes())
def test_a_recipe_trains_and_exports(name, place, tmp_path, monkeypatch):
    if load(name).method.name == "add":
        pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr("stepdistill.preview.TEACHER_STEPS", 2)
    result = train(name, shortened(name, place, tmp_path / "run"))
    assert (result.step, result.interrupted) == (STEPS, False)
    facts = json.loads((result.folder / "export" / "stepdistill.json").read_text())
    assert facts["method"] == load(name).method.name and facts["trained_steps"] == STEPS
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in logged for key in line}
    for player in load(name).method.implementation.players:
        assert any(key.startswith(f"{player}/loss/") for key in keys), player
    # The student learns something to the end, and nothing that is not finite.
    weights = load_file(checkpoint.latest(result.folder / "checkpoints") / "student.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert max(line.get("student/grad_norm", 0) for line in logged) > 0


def test_a_recipe_begins_with_what_it_is_and_how_to_run_it():
    for name in assets.recipes():
        head = assets.recipe(name).read_text(encoding="utf-8").partition("\nteacher:")[0]
        assert head.startswith("# ") and len(head.partition("\n")[0]) > 20, name
        assert f"stepdistill train recipes/{name}.yaml" in head, name
