"""A student of a pipeline of text works in those that share its network: image to image, inpainting, ControlNet."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from pipeline.no_preview import NoPreview
from pipeline.zoo import ZOO, controlnet
from stepdistill import train
from stepdistill.diffusion.nested import first_tensor
from stepdistill.pipeline.assemble import save_pipeline

PICTURE, MASK = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64), 255)
IMAGE, FILL = {"image": PICTURE}, {"image": PICTURE, "mask_image": MASK}
STEPS = 4

# (zoo's name, form of the student, class of the sibling, what its call takes beside the prompt)
SIBLINGS = [
    ("sd", "full", "StableDiffusionImg2ImgPipeline", IMAGE),
    ("sd", "lora", "StableDiffusionControlNetPipeline", IMAGE),
    ("sdxl", "lora", "StableDiffusionXLImg2ImgPipeline", IMAGE),
    ("sdxl", "full", "StableDiffusionXLInpaintPipeline", FILL),
    ("sd3", "lora", "StableDiffusion3Img2ImgPipeline", IMAGE),
    ("flux", "lora", "FluxImg2ImgPipeline", IMAGE),
    ("flux", "lora", "FluxInpaintPipeline", FILL),
    ("qwen-image", "lora", "QwenImageImg2ImgPipeline", IMAGE),
    ("z-image", "lora", "ZImageImg2ImgPipeline", IMAGE),
    ("z-image", "full", "ZImageInpaintPipeline", FILL),
]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Exports by the zoo's name and form, trained for one step when they are first needed."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def student(name: str, form: str) -> tuple[Path, Path]:
        if (name, form) not in made:
            folder, exhibit = tmp_path_factory.mktemp(f"{name}-{form}"), ZOO[name]
            save_pipeline(exhibit.build(), folder / "teacher")
            recipe = {
                "teacher": {
                    "pipeline": str(folder / "teacher"),
                    "guidance": {"scale": exhibit.guidance},
                    "arguments": exhibit.arguments,
                },
                "student": {"steps": STEPS, "train": form, **({"rank": 2} if form == "lora" else {})},
                "data": {"conditions": ["rain"]},
                "method": {"name": "sfd", "substeps": 1},
                "train": {"steps": 1, "batch_size": 1, "lr": 0.1, "preview_every": 100, "tracker": "none"},
                "export": {"check": "off"},
                "report": {"samples": 0},
                "output": str(folder / "run"),
            }
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
                patch.setattr("stepdistill.run.check_conventions", lambda _session: None)
                patch.setattr("stepdistill.run.check_stock_call", lambda _session: None)
                train(recipe)
            made[name, form] = folder / "teacher", folder / "run" / "export"
        return made[name, form]

    return student


def network(pipeline: Any) -> torch.nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def loaded(teacher: Path, export: Path, form: str) -> Any:
    """The pipeline of text with its student, as the card says."""
    if form == "full":
        return diffusers.DiffusionPipeline.from_pretrained(export)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(export)
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(export, subfolder="scheduler")
    return pipeline


@pytest.mark.parametrize(("name", "form", "sibling", "beside"), SIBLINGS)
def test_a_student_works_in_its_sibling(name, form, sibling, beside, students):
    teacher, export = students(name, form)
    of_text, kind = loaded(teacher, export, form), getattr(diffusers, sibling)
    parts = {}
    if "ControlNet" in sibling:
        parts["controlnet"] = controlnet().controlnet
    other = kind.from_pipe(of_text, **parts)
    other.set_progress_bar_config(disable=True)
    assert network(other) is network(of_text)
    seen: list[torch.Tensor] = []
    network(other).register_forward_hook(lambda _module, _inputs, output: seen.append(first_tensor(output).clone()))
    size = {"sd": {}, "sd3": {"height": 32, "width": 32, "max_sequence_length": 16}}.get(
        name, {"height": 64, "width": 64}
    )
    strength = {} if "ControlNet" in sibling else {"strength": 0.5}
    call = {"prompt": "rain", "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    torch.manual_seed(0)
    made = other(**call, **beside, **size, **strength)
    assert made[0].isfinite().all()
    assert len(seen) == (STEPS if not strength else STEPS // 2)  # one pass a step, of those that the strength leaves
    if form == "lora":  # and it is the student that made it
        other.unload_lora_weights()
        torch.manual_seed(0)
        other(**call, **beside, **size, **strength)
        assert not torch.equal(seen[0], seen[len(seen) // 2])
