"""A run on several sizes: one a batch, drawn for each step, and everything at a size is that size's own."""

import json
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from pipeline import tiny, zoo
from stepdistill.errors import InputError
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.sampling.sample import sample
from stepdistill.training.run_samples import distilled
from stepdistill.training.session import Session, build
from stepdistill.training.sizes import size_of_step

SIZES = [[16, 16], [16, 24]]


def sd3_with_dynamic_shift():
    """Its pipeline hands the scheduler a shift and no sigmas, so that grids are stretched to a last time."""
    pipeline = tiny.tiny_sd3()
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings))
    return pipeline


BUILDERS = {
    "sdxl": zoo.sdxl,
    "flux": tiny.tiny_flux,
    "sd3": sd3_with_dynamic_shift,
    "pixart": lambda: zoo.pixart(sigma=False),
}


def recipe_of(folder: Path, pipeline, method=None, arguments=None, **train_keys) -> dict:
    save_pipeline(pipeline, folder / "teacher")
    return {
        "teacher": {"pipeline": str(folder / "teacher"), "arguments": arguments or {}},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": ["a red shoe", "rain on a long street"]},
        "method": method or {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "tracker": "none", "sizes": SIZES} | train_keys,
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }


def session_of(*given, **keys) -> Session:
    return build(load(recipe_of(*given, **keys)), torch.device("cpu"))


@pytest.fixture
def short(monkeypatch):
    """Small previews, and no check of conventions, which networks without training have none of."""
    monkeypatch.setattr("stepdistill.training.previews.COUNT", 2)
    monkeypatch.setattr("stepdistill.training.run_samples.TEACHER_STEPS", 2)
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_export_called_at_each_size_is_the_student_at_each_size(name, tmp_path, short, monkeypatch):
    """The export's own check compares them; here the calls are those of stock diffusers at both sizes."""
    calls = []
    record = stock_call.record
    monkeypatch.setattr(stock_call, "record", lambda pipeline, call: calls.append(call) or record(pipeline, call))
    run = train(recipe_of(tmp_path, BUILDERS[name](), arguments=zoo.NO_BINS if name == "pixart" else None))
    checked = [(call["height"], call["width"]) for call in calls if call["output_type"] == "pt"]
    assert checked == [(16, 16), (16, 24)]
    facts = json.loads((run.folder / "export" / "stepdistill.json").read_text())
    assert facts["recipe"]["train"]["sizes"] == SIZES
    assert "16x16, 16x24" in (run.folder / "export" / "README.md").read_text()
    shown = sorted(path.name for path in (run.folder / "previews").iterdir())
    assert shown == ["000000.png", "000000_16x24.png", "000002.png", "000002_16x24.png"]
    with Image.open(run.folder / "previews" / "000002_16x24.png") as image:
        assert image.width > 2 * 24  # two pictures a row, and what is between them
    drawn = sample(run.folder, size=(24, 16), count=2, steps=2, conditions=["rain", "cat"])
    assert drawn.images.shape == (2, 3, 24, 16)


def test_everything_that_a_loss_sees_is_of_the_batch_s_size(tmp_path):
    session = build(load(recipe_of(tmp_path, sd3_with_dynamic_shift()), ["student.steps=4"]), torch.device("cpu"))
    method, seen = session.method, {}
    for size in (0, 1):
        with session.at(size):
            batch = session.batch(0, 0, 2)
            role = method.roles.student
            shift, times = method.schedule.shift, [step.t for step in method.sampler.grid()]
            assert shift == role.schedule.shift == session.trace.denoiser.schedule.shift
            assert session.sampler is method.sampler and batch.noise("a").shape[1:] == batch.shape
            assert distilled(session, 2, 0).shape[1:] == batch.shape
            seen[size] = batch.shape, shift, times
    (square, low, short), (wide, high, long) = seen[0], seen[1]
    assert square == (4, 8, 8) and wide == (4, 8, 12)
    # The last time is in the export's scheduler, which serves all sizes.
    assert high > low and long[1] > short[1] and (long[0], long[-1]) == (short[0], short[-1])
    assert method.schedule.shift == low and session.trace.latent_shape == square


def test_trajectories_are_made_of_each_size_as_many_as_its_share(tmp_path):
    method = {"name": "ode-regression", "pairs": 8, "solver_steps": 2}
    session = session_of(tmp_path, tiny.tiny_sd(), method, size_probabilities=[0.25, 0.75])
    assert [len(one.paths) for one in session.sizes] == [2, 6]
    with session.at(1):
        assert session.batch(0, 0, 2).path.points.shape[2:] == (4, 8, 12)


def test_the_size_of_a_step_depends_on_seed_and_step_alone(tmp_path):
    session = session_of(tmp_path, tiny.tiny_sd(), size_probabilities=[0.2, 0.8])
    drawn = [session.size_of(step) for step in range(400)]
    assert 50 < Counter(drawn)[0] < 110
    assert drawn[7:20] == [size_of_step(session.sizes, 0, step) for step in range(7, 20)]
    assert drawn != [size_of_step(session.sizes, 1, step) for step in range(400)]


def test_a_size_that_the_pipeline_has_not_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.sizes: StableDiffusionPipeline cannot.*18x16.*multiples of 8"):
        session_of(tmp_path, tiny.tiny_sd(), sizes=[[16, 16], [18, 16]])


def write_pictures(folder: Path, shapes) -> None:
    folder.mkdir()
    for number, (height, width) in enumerate(shapes):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(("a red shoe", "rain")[number % 2])


def test_real_images_of_several_proportions_are_trained_on_in_buckets(tmp_path, short):
    """The buckets that have pictures, in proportion to these, and an export that holds at two sizes."""
    write_pictures(tmp_path / "images", [(40, 64), (40, 64), (30, 48), (64, 40)])
    recipe = recipe_of(tmp_path, zoo.sdxl(), {"name": "lcm"}, sizes=None)
    recipe |= {"data": {"conditions": "captions", "images": str(tmp_path / "images"), "buckets": "auto"}}
    recipe["teacher"]["arguments"] = {"height": 32, "width": 32}
    session = build(load(recipe), torch.device("cpu"))
    assert [(one.name, one.share) for one in session.sizes] == [("32x32", 0), ("24x40", 0.75), ("40x24", 0.25)]
    assert Counter(session.size_of(step) for step in range(100)).keys() == {1, 2}
    with session.at(1):
        batch = session.batch(0, 0, 2)
        assert batch.latents.shape == (2, 4, 12, 20) and batch.shape == (4, 12, 20)
        assert batch.cond["added_cond_kwargs.time_ids"][0].tolist() == [24, 40, 0, 0, 24, 40]
    run = train(recipe)
    assert (run.folder / "export" / "README.md").is_file()
    assert [path.name for path in sorted((run.folder / "previews").iterdir())] == ["000000.png", "000002.png"]
