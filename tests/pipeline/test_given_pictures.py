"""Networks that are told a picture: inpainting channels beside the noisy sample, a ControlNet's residuals.

The picture is an argument of the pipeline's call, the same for every prompt.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipeline import zoo
from pipeline.no_preview import NoPreview
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.run import train
from stepdistill.sampling import trajectories

BESIDE = "beside sample on axis 1"
PROMPTS = ["a red shoe", "two birds on a wire"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, str]:
    """A picture and the mask of its left half, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "image.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "mask_image": str(folder / "mask.png")}


@pytest.fixture(scope="module")
def traced(pictures):
    return trace(zoo.inpainting(), {**pictures, **zoo.SMALL})


@pytest.fixture(scope="module")
def controlled(pictures):
    return trace(zoo.controlnet(), {"image": pictures["image"], **zoo.SMALL})


def recipe_of(folder, arguments, **keys) -> dict:
    return {
        "teacher": {
            "pipeline": str(folder / "teacher"),
            "guidance": {"scale": 2.0},
            "arguments": {**arguments, **zoo.SMALL},
        },
        "student": {"steps": 2},
        "data": {"conditions": PROMPTS},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    } | keys


def test_the_channels_after_the_sample_are_a_condition(traced):
    spec = traced.denoiser.spec
    assert traced.self_test_error <= 1e-5
    assert (spec.sample, spec.window.spans, spec.beside) == ("sample", ((1, 0, 4, 5),), (BESIDE,))
    assert traced.latent_shape == (4, 8, 8) and traced.conditioning[BESIDE] == (5, 8, 8)


def test_the_network_is_called_as_the_pipeline_calls_it(traced):
    cond, null = encode(traced, PROMPTS).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    unet = traced.pipeline.unet
    with torch.no_grad():
        found = traced.denoiser(x, t, cond).raw
        timestep = traced.denoiser.schedule.timestep(t)
        given = torch.cat([x, cond[BESIDE]], 1)
        expected = unet(given, timestep, cond["encoder_hidden_states"], return_dict=False)[0]
    torch.testing.assert_close(found, expected)
    mask = cond[BESIDE][:, 0]
    assert mask[..., :4].eq(1).all() and mask[..., 4:].eq(0).all()
    assert torch.equal(null[BESIDE], cond[BESIDE])


def test_inpainting_is_distilled_and_exported(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    save_pipeline(zoo.inpainting(), tmp_path / "teacher")
    run = train(recipe_of(tmp_path, pictures, student={"steps": 2, "train": "lora", "rank": 2}))
    card = (run.folder / "export" / "README.md").read_text()
    assert 'image=load_image("image.png"), mask_image=load_image("mask.png")' in card
    assert "from diffusers.utils import load_image" in card


def test_a_controlnet_is_a_network_that_is_asked_first(controlled):
    (helper,) = controlled.denoiser.spec.helpers
    assert controlled.component == "unet" and helper.name == "controlnet" and controlled.self_test_error <= 1e-5
    assert helper.feeds == {"down_block_additional_residuals": (0, 1, 2, 3), "mid_block_additional_residual": 4}
    assert controlled.conditioning["controlnet/controlnet_cond"] == (3, 16, 16)


def test_the_residuals_are_those_of_the_noisy_sample(controlled):
    cond, _ = encode(controlled, PROMPTS).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.full((2,), 0.5)
    found = controlled.denoiser(x, t, cond).raw
    pipeline, timestep = controlled.pipeline, controlled.denoiser.schedule.timestep(t)
    text, picture = cond["encoder_hidden_states"], cond["controlnet/controlnet_cond"]
    down, middle = pipeline.controlnet(x, timestep, text, picture, return_dict=False)
    told = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    torch.testing.assert_close(found, pipeline.unet(x, timestep, text, **told, return_dict=False)[0])
    alone = pipeline.unet(x, timestep, text, return_dict=False)[0]
    assert (found - alone).abs().max() > 0.01
    assert torch.autograd.grad(found.sum(), x)[0].abs().sum() > 0


def test_trajectories_depend_on_the_controlnet_its_scale_and_the_scale_of_a_picture(controlled, pictures):
    given = {"image": pictures["image"], **zoo.SMALL}
    conditioning = SimpleNamespace(cond={}, null=None, content=())
    times = torch.linspace(1, 0, 4, dtype=torch.float64)

    def key(traced):
        return trajectories._key(traced.denoiser, conditioning, times)

    other = zoo.controlnet()
    with torch.no_grad():
        next(other.controlnet.parameters()).add_(1)
    keys = {key(controlled), key(trace(other, given))}
    keys.add(key(trace(zoo.controlnet(), given | {"controlnet_conditioning_scale": 0.5})))
    assert len(keys) == 3 and key(trace(zoo.controlnet(), given)) == key(controlled)
    given = {"image": pictures["image"], "image_guidance_scale": 1.5}
    assert key(trace(zoo.pix2pix(), given)) != key(trace(zoo.pix2pix(), given | {"image_guidance_scale": 1.2}))


def test_a_student_with_a_controlnet_is_distilled_and_exported(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    pipeline = zoo.controlnet()
    save_pipeline(pipeline, tmp_path / "teacher")
    run = train(recipe_of(tmp_path, {"image": pictures["image"]}))
    exported = DiffusionPipeline.from_pretrained(run.folder / "export")
    for name, same in (("controlnet", True), ("unet", False)):
        before, after = (getattr(one, name).state_dict() for one in (pipeline, exported))
        assert all(torch.equal(before[key], after[key]) for key in before) == same


def test_helpers_get_no_gradient(controlled):
    build_roles(controlled.denoiser, {"student": "full"}, 1.0, LoRA(4))
    assert not any(p.requires_grad for p in controlled.pipeline.controlnet.parameters())


def test_two_controlnets_are_distilled_and_exported(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    files = {"image": [pictures["image"], pictures["mask_image"]]}
    traced = trace(zoo.controlnets(), {**files, **zoo.SMALL})
    (helper,) = traced.denoiser.spec.helpers
    shapes = {name: shape for name, shape in traced.conditioning.items() if "controlnet_cond" in name}
    assert helper.denoiser.spec.apart == {"controlnet_cond": list}
    assert shapes == {f"controlnet/controlnet_cond.{number}": (3, 16, 16) for number in (0, 1)}
    save_pipeline(zoo.controlnets(), tmp_path / "teacher")
    run = train(recipe_of(tmp_path, files, student={"steps": 2, "train": "lora", "rank": 2}))
    assert (run.folder / "export" / "stepdistill.json").is_file()


def test_an_edit_with_two_unconditional_passes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    traced = trace(zoo.pix2pix(), {"image": pictures["image"]})
    assert traced.denoiser.spec.mix == ((1.5, -1.0), (-0.5, 0.0)) and traced.guidance.order == (0, 1, 2)
    for cache in (None, tmp_path / "cache"):
        _, null = encode(traced, PROMPTS, cache).batch(torch.tensor([0, 1]))
        assert null[BESIDE].any() and not null[f"pass 1/{BESIDE}"].any()
        assert torch.equal(null["encoder_hidden_states"], null["pass 1/encoder_hidden_states"])
    save_pipeline(zoo.pix2pix(), tmp_path / "teacher")
    teacher = {
        "pipeline": str(tmp_path / "teacher"),
        "guidance": {"scale": 3.0},
        "arguments": {"image": pictures["image"]},
    }
    lora = {"steps": 2, "train": "lora", "rank": 2}
    run = train(recipe_of(tmp_path, {}, teacher=teacher, student=lora))
    assert (run.folder / "export" / "stepdistill.json").is_file()


def test_a_picture_that_is_not_there(pictures, tmp_path):
    with pytest.raises(InputError, match=r"arguments: image: expected a picture, found no file no/such\.png"):
        trace(zoo.inpainting(), {**pictures, "image": "no/such.png"})


def test_real_images_are_not_those_of_the_picture(pictures, tmp_path):
    save_pipeline(zoo.inpainting(), tmp_path / "teacher")
    data = {"conditions": PROMPTS, "images": str(tmp_path)}
    with pytest.raises(InputError, match=r"data\.images: expected none beside teacher\.arguments\.image, and"):
        train(recipe_of(tmp_path, pictures, data=data, method={"name": "tcd"}))
