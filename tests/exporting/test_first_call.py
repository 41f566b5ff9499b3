"""What a plain call of the pipeline does otherwise than the sampler in training is found before the first step."""

import diffusers
import pytest
import torch
from PIL import Image

from pipeline import tiny, zoo
from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.exporting.first_call import check_stock_call
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.session import Session, build


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, str]:
    """A picture and the mask of its left half, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "image.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "mask_image": str(folder / "mask.png")}


def recipe_of(folder, pipeline, arguments=None, **keys) -> dict:
    save_pipeline(pipeline, folder / "teacher")
    entry = {"conditions": ["a red shoe", "rain"]} if hasattr(pipeline, "tokenizer") else {}
    return {
        "teacher": {"pipeline": str(folder / "teacher"), "arguments": arguments or {}},
        "student": {"steps": 4},
        "data": entry,
        "method": {"name": "dmd2"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    } | keys


def session_of(*given, **keys) -> Session:
    return build(load(recipe_of(*given, **keys)), torch.device("cpu"))


def image_to_image(kind=diffusers.StableDiffusionImg2ImgPipeline):
    return zoo.ready(kind(**tiny.tiny_sd().components, requires_safety_checker=False))


def refused(folder, pipeline, arguments, **keys) -> str:
    """The one line that training ends with, before its first step."""
    with pytest.raises(InputError) as raised:
        train(recipe_of(folder, pipeline, arguments, **keys))
    assert "\n" not in str(raised.value)
    assert not (folder / "run" / "metrics.jsonl").exists()
    return str(raised.value)


def test_inpainting_with_a_network_that_takes_no_mask(pictures, tmp_path):
    """Such a pipeline puts its picture into the latents after each step."""
    parts = tiny.tiny_sd().components | {"image_encoder": None}
    pipeline = zoo.ready(diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))
    line = refused(tmp_path, pipeline, pictures | zoo.SMALL)
    assert "differs from sampler renoise" in line and "9 channels" in line


def test_inpainting_with_a_network_that_takes_another_picture(pictures, tmp_path):
    """There is something beside its sample, but not the mask."""
    parts = {name: part for name, part in ZOO["flux"].build().components.items() if part is not None}
    config = {name: value for name, value in parts["transformer"].config.items() if name[0] != "_"}
    double = {"in_channels": 2 * config["in_channels"], "out_channels": config["in_channels"]}
    parts["transformer"] = tiny.redraw(diffusers.FluxTransformer2DModel(**config | double), 4)
    pipeline = zoo.ready(diffusers.FluxControlInpaintPipeline(**parts))
    arguments = pictures | zoo.SMALL | {"control_image": pictures["image"], "strength": 1.0}
    line = refused(tmp_path, pipeline, arguments)
    assert "takes the mask beside the latents" in line and "a white picture as teacher.arguments.mask_image" in line


def test_noise_that_the_call_adds(tmp_path):
    """``eta`` reaches the student's DDIM, which is trained without."""
    line = refused(tmp_path, tiny.tiny_sd(), {"eta": 1.0}, method={"name": "sfd", "substeps": 1})
    assert "differs from sampler ddim" in line and "teacher.arguments.eta" in line


def test_a_call_that_tells_its_scheduler_what_another_does_not_take(tmp_path):
    line = refused(tmp_path, ZOO["lcm"].build(), zoo.SMALL, method={"name": "sfd", "substeps": 1})
    assert line.startswith("sampler ddim: ") and "original_inference_steps" in line and "renoise are dmd2" in line


@pytest.mark.parametrize(("strength", "said"), [({}, "0.8, its default"), ({"strength": 0.9999}, "found 0.9999")])
def test_a_strength_that_leaves_steps_out(strength, said, pictures, tmp_path):
    line = refused(tmp_path, image_to_image(), {"image": pictures["image"]} | strength)
    assert said in line and "strength=1.0" in line


def test_a_strength_that_leaves_nothing_out(pictures, tmp_path):
    session = session_of(tmp_path, image_to_image(), {"image": pictures["image"], "strength": 1.0})
    assert check_stock_call(session) <= 1e-5


def test_a_call_that_fails(tmp_path, monkeypatch):
    session = session_of(tmp_path, tiny.tiny_sd())
    monkeypatch.setattr(type(session.sampler.scheduler), "step", lambda *_, **__: [][0])
    with pytest.raises(InputError, match=r"a plain call in 4 steps .* fails: list index out of range"):
        check_stock_call(session)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("lcm", "wan")])
@pytest.mark.parametrize("student", [{"train": "lora", "rank": 2}, {"steps": 2}], ids=["lora", "whole"])
def test_it_repeats_what_can_be_exported(name, student, tmp_path):
    exhibit, settings = ZOO[name], {"steps": 4} | student
    method = {"name": "sfd", "substeps": 1} if name != "ddpm" and student.get("train") else {"name": "dmd2"}
    session = session_of(tmp_path, exhibit.build(), exhibit.arguments, student=settings, method=method)
    evaluations = session.method.roles.teacher.evaluations
    assert check_stock_call(session) <= 1e-5
    assert session.method.roles.teacher.evaluations == evaluations


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_many_steps_in_half_precision(precision, tmp_path):
    keys = {"student": {"steps": 30, "train": "lora", "rank": 2}, "method": {"name": "dmd2", "sampler": "ddim"}}
    recipe = load(recipe_of(tmp_path, zoo.sdxl(), **keys), [f"teacher.precision={precision}"])
    assert check_stock_call(build(recipe, torch.device("cpu"))) <= (0.06 if precision == "bf16" else 1e-5)


def test_it_leaves_random_numbers_and_the_pipeline_alone(tmp_path):
    session = session_of(tmp_path, tiny.tiny_sd())
    pipeline, state = session.trace.pipeline, torch.get_rng_state()
    scheduler, forward = pipeline.scheduler, pipeline.unet.forward
    check_stock_call(session)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler and pipeline.unet.forward == forward
    assert "step" not in session.sampler.scheduler.__dict__


def test_a_resumed_run_is_not_asked_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("stepdistill.run.check_stock_call", asked.append)
    monkeypatch.setattr("stepdistill.run.export_trained", lambda *_: None)
    recipe = recipe_of(tmp_path, tiny.tiny_dit())
    train(recipe)
    train(recipe, ["train.steps=2"])
    assert len(asked) == 1
