"""Every shipped recipe of a real teacher at the real shape of its latents: from its data to a turn of each player."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.real_sizes import REAL_SIZES
from stepdistill import assets
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import Recipe, load
from stepdistill.training.optimizer import only_moving
from stepdistill.training.recompute import forward_passes
from stepdistill.training.session import Session, build

CAPTIONS = ("a red shoe", "rain")
STATED = {name: yaml.safe_load(assets.recipe(name).read_text(encoding="utf-8")) for name in assets.recipes()}
TEACHERS = {name: stated["teacher"]["pipeline"] for name, stated in STATED.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Captioned images, and room for the stand-ins."""
    folder = tmp_path_factory.mktemp("real sizes")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(random.integers(0, 255, (300, 256, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(caption)
    return folder


def small(name: str, place: Path) -> Recipe:
    """The recipe with its stand-in and one row a batch, its method as shipped. CPUs are slow in half precision."""
    own = [f"data.images={place / 'images'}"] if "images" in STATED[name].get("data", {}) else []
    shipped, teacher = load(name, own), TEACHERS[name]
    folder = place / teacher.replace("/", "-")
    if not folder.exists():
        save_pipeline(REAL_SIZES[teacher].build(), folder)
    keys = {"teacher.pipeline": folder, "teacher.arguments": json.dumps(REAL_SIZES[teacher].arguments)}
    keys |= {"student.rank": 2, "train.batch_size": 1, "train.accumulation": 1, "train.lr_warmup": 0}
    keys |= {"teacher.precision": "fp32", "train.precision": "fp32"}
    if not own and shipped.data.conditions != "classes":
        keys["data.conditions"] = list(CAPTIONS)
    needs = shipped.method.implementation.data_needs(shipped.method.config)
    if needs.paths is not None:
        keys |= {f"method.{key}": 1 for key, value in shipped.method.model_extra.items() if value == needs.paths.count}
    if needs.made is not None:
        keys |= {"method.real_rows": 1, "method.real_steps": 2}
    return load(name, own + [f"{key}={value}" for key, value in keys.items()])


def one_step(session: Session) -> None:
    """Every player's losses reach its parameters, and are finite."""
    method, train = session.method, session.recipe.train
    step = next(step for step in range(100) if set(method.turns(step)) == set(method.players))
    batch = session.batch(step, 0, 1)
    for batch.turn, player in enumerate(method.turns(step)):
        parameters = [p for module in method.modules(player) for p in module.parameters()]
        with only_moving(parameters):
            with forward_passes(train, "cpu"):
                losses = method.losses(player, batch)
            sum(losses.values()).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert gradients, player
        assert all(value.isfinite().all() for value in (*losses.values(), *gradients)), player


@pytest.mark.parametrize("name", [name for name, teacher in TEACHERS.items() if "/" in teacher])
def test_a_recipe_starts(name, place):
    recipe = small(name, place)
    session = build(recipe, torch.device("cpu"))
    assert "x".join(map(str, session.trace.latent_shape)) == REAL_SIZES[TEACHERS[name]].title
    one_step(session)
