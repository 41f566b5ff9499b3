"""Every shipped recipe, on a tiny stand-in of its teacher: it trains, each player in its turn; a run of each kind of
student goes all the way, from the checks before its first step to its export."""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import PHASES
from PIL import Image
from safetensors.torch import load_file

from pipeline.zoo import ZOO
from short_samples import bare
from stepdistill import assets
from stepdistill.methods import Roles
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import Recipe, load
from stepdistill.run import train
from stepdistill.training import checkpoint


def steps_of(recipe: Recipe) -> int:
    """One for each stage, where the recipe has some, and one after them."""
    return 4 if {"phase_steps", "stage_steps"} & recipe.method.model_extra.keys() else 3


# The stand-in of each family of teachers: an entry of the zoo.
STAND_INS = {
    "fashion-dit": "dit",
    "emoji": "sd",
    "facebook/DiT-XL-2-256": "dit",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
}
CAPTIONS = ("a red shoe", "rain")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures of classes and of captions; called with a teacher's name, the folder of its stand-in."""
    folder = tmp_path_factory.mktemp("stand-in")
    random = np.random.default_rng(0)
    for name in ("Trouser", "Bag", "Dress"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(
                folder / "images" / name / f"{i}.png"
            )
    (folder / "captioned").mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "captioned" / f"{i}.png")
        (folder / "captioned" / f"{i}.txt").write_text(caption)

    def of(teacher: str) -> Path:
        made = folder / STAND_INS[teacher]
        if not made.exists():
            save_pipeline(ZOO[STAND_INS[teacher]].build(), made)
        return made

    of.folder = folder
    return of


def stated(name: str, images: Path) -> Recipe:
    """The recipe as it is shipped; the user's own images are in this folder."""
    text = assets.recipe(name).read_text(encoding="utf-8")
    own = any(folder in text for folder in ("data/images", "build/emoji"))
    return load(name, [f"data.images={images}"] if own else [])


def shortened(recipe: Recipe, place, out: Path) -> list[str]:
    """Overrides that leave the recipe's settings and take its teacher, data and length away."""
    settings = recipe.method.model_extra
    keys = {f"method.{key}": 1 for key in PHASES if settings.get(key)}
    if settings.get("snapshots"):
        keys["method.snapshots"] = 1  # more than the warm-up has steps
    needs = recipe.method.implementation.data_needs(recipe.method.config)
    if needs.paths is not None:
        (count,) = [key for key, value in settings.items() if value == needs.paths.count]
        keys[f"method.{count}"] = 6
    if needs.made is not None:
        keys |= {"method.real_rows": 6, "method.real_steps": 3}
    if recipe.train.sizes:
        keys["train.sizes"] = "[[16, 16], [8, 24]]"
    keys |= {"teacher.pipeline": place(recipe.teacher.pipeline), "report.samples": 0, "output": out}
    keys["teacher.arguments"] = json.dumps(ZOO[STAND_INS[recipe.teacher.pipeline]].arguments)
    if recipe.data.images == "fashion-mnist":
        keys["data.images"] = place.folder / "images"
    elif recipe.data.images is not None:
        keys["data.images"] = recipe.data.images
    elif recipe.data.conditions != "classes":
        keys["data.conditions"] = list(CAPTIONS)
    if settings.get("critic_steps", 1) > 2:
        keys["method.critic_steps"] = 2  # a critic that has not moved yet teaches nothing
    keys |= {"train.steps": steps_of(recipe), "train.batch_size": 4, "train.lr_warmup": 0, "train.log_every": 1}
    keys |= {"train.preview_every": 100, "train.checkpoint_every": 100, "train.tracker": "none"}
    keys["train.accumulation"] = min(2, recipe.train.accumulation)
    return [f"{key}={value}" for key, value in keys.items()]


def kind_of(recipe: Recipe) -> tuple[object, ...]:
    """What checks, previews and the export see of a recipe: those that share it differ in updates and in numbers.

    Grids of any number of steps and any start are exported in tests/exporting.
    """
    method, config = recipe.method.implementation, recipe.method.config
    student = recipe.student.model_dump_json(exclude={"rank", "alpha", "targets", "ema", "steps", "start"})
    given = (recipe.teacher.pipeline, student, recipe.teacher.precision, bool(recipe.train.sizes))
    return *given, method.sampler_of(config), method.exported, method.adapt.__func__, method.trains_grid


@cache
def first_of_their_kind() -> set[str]:
    return set({kind_of(stated(name, Path(__file__).parent)): name for name in reversed(assets.recipes())}.values())


@pytest.mark.parametrize("name", assets.recipes())
def test_a_recipe_trains_and_exports(name, place, tmp_path):
    recipe = stated(name, place.folder / "captioned")
    whole = name in first_of_their_kind()
    if recipe.method.name in ("add", "flash-dmd"):
        pytest.importorskip("efficientnet_lite_pytorch")
    with nullcontext() if whole else bare():
        result = train(name, shortened(recipe, place, tmp_path / "run"))
    assert (result.step, result.interrupted) == (steps_of(recipe), False)
    if whole:
        facts = json.loads((result.folder / "export" / "stepdistill.json").read_text())
        assert facts["method"] == recipe.method.name and facts["trained_steps"] == result.step
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in logged for key in line}
    for player in recipe.method.implementation.players:
        assert any(key.startswith(f"{player}/loss/") for key in keys), player
    # The student learns something to the end, and nothing that is not finite.
    weights = load_file(checkpoint.latest(result.folder / "checkpoints") / "student.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert max(line.get("student/grad_norm", 0) for line in logged) > 0


@pytest.mark.parametrize("name", ["sdxl_ladd", "sd35_medium_ladd", "flux_dev_ladd"])
def test_ladd_of_a_published_model_is_the_papers(name):
    """Samples of its teacher, so that prompts are enough; four times; the noise end after a warm-up."""
    recipe = load(name)
    method = recipe.method.implementation(recipe.method.config, Roles(None, None), Four())
    assert recipe.data.images is None and recipe.method.config.real == "teacher"
    assert method.shares(0) == [0, 0, 0.5, 0.5] and method.shares(499) == method.shares(0)
    assert method.shares(500) == pytest.approx([0.7, 0.1, 0.1, 0.1])


def test_settings_of_published_runs_that_are_changed_stay_changed():
    """DMD2's guidance on SD 1.5 is for FID (1.75), DiT's main branch has pickled weights alone."""
    assert load("sd15_dmd2").teacher.guidance.scale >= 3
    assert load("dit_xl_256").teacher.revision == "refs/pr/1"


class Four:
    """A sampler of four steps."""

    schedule = None

    def grid(self):
        return range(4)


def test_a_recipe_begins_with_what_it_is_and_how_to_run_it():
    for name in assets.recipes():
        head = assets.recipe(name).read_text(encoding="utf-8").partition("\nteacher:")[0]
        assert head.startswith("# ") and len(head.partition("\n")[0]) > 20, name
        assert f"stepdistill train recipes/{name}.yaml" in head, name
