"""IP-Adapters: the picture's embedding is a condition, and the adapter's weights are nobody's to train."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import tiny, zoo
from pipeline.no_preview import NoPreview
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.ip_adapter import load_ip_adapter
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import IPAdapter
from stepdistill.run import train

PROMPTS = ["a red shoe", "two birds on a wire"]
EMBEDDING = "added_cond_kwargs.image_embeds.0"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> SimpleNamespace:
    """A teacher's folder, an adapter's section of the recipe, a picture."""
    folder = tmp_path_factory.mktemp("parts")
    pipeline = tiny.tiny_sd()
    adapter = zoo.ip_adapter(pipeline.unet, folder / "adapter") | {"scale": 0.5}
    save_pipeline(pipeline, folder / "teacher")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "style.png")
    return SimpleNamespace(teacher=folder / "teacher", adapter=adapter, picture=str(folder / "style.png"))


@pytest.fixture(scope="module")
def traced(parts):
    pipeline = load_pipeline(parts.teacher)
    load_ip_adapter(pipeline, IPAdapter(**parts.adapter))
    return trace(pipeline, {"ip_adapter_image": parts.picture, **zoo.SMALL})


def test_the_embedding_is_a_condition(traced):
    assert traced.self_test_error <= 1e-5
    assert traced.conditioning == {"encoder_hidden_states": (40, 16), EMBEDDING: (1, 6)}
    encoded = encode(traced, PROMPTS)
    picture, nothing = encoded.cond[EMBEDDING], encoded.null[EMBEDDING]
    assert torch.equal(picture[0], picture[1]) and picture.std() > 0 and not nothing.any()
    cond, _ = encoded.batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        found = traced.denoiser(x, t, cond).raw
        told = {"added_cond_kwargs": {"image_embeds": [picture]}, "return_dict": False}
        timestep = traced.denoiser.schedule.timestep(t)
        expected = traced.pipeline.unet(x, timestep, cond["encoder_hidden_states"], **told)[0]
        without = traced.denoiser(x, t, cond | {EMBEDDING: torch.zeros(2, 1, 6)}).raw
    torch.testing.assert_close(found, expected)
    assert (found - without).abs().max() > 1e-3


def test_the_adapter_is_no_parameter(traced, parts):
    unet, plain = traced.pipeline.unet, load_pipeline(parts.teacher).unet
    assert unet.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in plain.named_parameters()]
    extra = dict(unet.named_buffers()).keys()
    assert {"encoder_hid_proj.image_projection_layers.0.image_embeds.weight", "ip_adapter_scale"} <= extra


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_student_is_distilled_exported_and_loaded(how, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    arguments = {"ip_adapter_image": parts.picture, **zoo.SMALL}
    run = train(
        {
            "teacher": {
                "pipeline": str(parts.teacher),
                "guidance": {"scale": 2.0},
                "ip_adapter": parts.adapter,
                "arguments": arguments,
            },
            "student": {"steps": 2, "train": how, "rank": 2},
            "data": {"conditions": PROMPTS},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
            "report": {"samples": 0},
            "output": str(tmp_path / "run"),
        }
    )
    out = run.folder / "export"
    card = (out / "README.md").read_text()
    assert parts.adapter["source"] not in card
    assert "pipe.load_ip_adapter('PATH_OF_THE_IP_ADAPTER', subfolder='models', weight_name='ip.safetensors'" in card
    assert "pipe.set_ip_adapter_scale(0.5)" in card and 'ip_adapter_image=load_image("style.png")' in card
    if how == "full":
        # Without the adapter it is a plain pipeline; the class refuses weights that are not its own.
        assert StableDiffusionPipeline.from_pretrained(out).unet.config.encoder_hid_dim_type is None
    else:
        with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
            assert not any("_ip" in name or "hid_proj" in name for name in file.keys())  # noqa: SIM118
    again = load_pipeline(out)
    assert trace(again, arguments).conditioning[EMBEDDING] == (1, 6)


def test_what_is_no_adapter(parts, tmp_path):
    for changed, pipeline, reason in (
        ({"weights": "models/other.safetensors"}, load_pipeline(parts.teacher), "cannot be loaded into StableDiff"),
        ({}, tiny.tiny_dit(), "DiTPipeline takes none"),
    ):
        with pytest.raises(InputError, match=f"teacher.ip_adapter: {reason}"):
            load_ip_adapter(pipeline, IPAdapter(**parts.adapter | changed))


def test_an_image_encoder_without_all_of_its_weights_is_refused(parts, tmp_path):
    shutil.copytree(parts.adapter["source"], tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").rglob("image_encoder/*.safetensors")
    kept = {name: value for name, value in load_file(file).items() if "visual_projection" not in name}
    save_file(kept, file, {"format": "pt"})
    broken = IPAdapter(**parts.adapter | {"source": str(tmp_path / "adapter")})
    with pytest.raises(InputError, match=r"image_encoder/\S+ does not fill .*1 weights are missing: visual_projection"):
        load_ip_adapter(load_pipeline(parts.teacher), broken)
