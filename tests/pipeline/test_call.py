"""What a pipeline's call is given: arguments that other keys set, lists for tuples, long prompts; and its checker."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from pipeline.tiny import redraw, tiny_flux, tiny_sd, tiny_sd3
from pipeline.zoo import sdxl
from stepdistill.errors import InputError
from stepdistill.exporting import stock_call
from stepdistill.exporting.copied import save_student
from stepdistill.generation.generate import decode
from stepdistill.pipeline.conditioning import unread
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.observe import call_arguments
from stepdistill.pipeline.trace import TraceError, trace

SIZE = {"height": 16, "width": 16}


@pytest.mark.parametrize("build", [tiny_sd, tiny_flux, tiny_sd3])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("guidance_scale", 3.0, "teacher.guidance.scale"),
        ("num_inference_steps", 4, "student.steps"),
        ("output_type", "pil", "every run sets itself"),
    ],
)
def test_what_other_keys_set_is_no_argument(build, name, value, said):
    with pytest.raises(InputError, match=rf"arguments: expected no '{name}', .*{said}.*found {value!r}"):
        trace(build(), {name: value})


@pytest.mark.parametrize("names", [["original_size"], ["original_size", "target_size", "crops_coords_top_left"]])
def test_lists_of_yaml_are_the_tuples_that_a_call_declares(names):
    pipeline, sizes = sdxl(), {name: [16, 16] for name in names}
    traced = trace(pipeline, SIZE | sizes)
    assert traced.self_test_error <= 1e-5
    call = call_arguments(pipeline, ["rain"], traced.arguments, steps=2, guidance=1.0, output_type="pt")
    assert stock_call.record(pipeline, json.loads(json.dumps(call)))["images"].shape[0] == 1
    assert stock_call.declared(pipeline, sizes) == {name: (16, 16) for name in names}


def test_lists_stay_lists_where_a_call_takes_them():
    given = {"prompt": ["rain"], "timesteps": [3, 1], "negative_prompt": ["a"]}
    assert stock_call.declared(sdxl(), given) == given


def test_a_call_that_transformers_5_has_broken_names_the_cause():
    pipeline = tiny_sd()
    if hasattr(pipeline.text_encoder, "text_model"):
        pytest.skip("transformers 4")
    with pytest.raises(TraceError, match=r"clip_skip of this pipeline needs transformers 4.*diffusers/issues/14124"):
        trace(pipeline, {"clip_skip": 1})


@pytest.mark.parametrize("build", [tiny_sd, sdxl])
def test_prompts_that_no_tokenizer_reads_to_the_end_are_found(build):
    traced = trace(build(), SIZE)
    long = "rain " * 9 + "umbrella"
    cut = unread(traced, [long, "rain"])
    assert list(cut) == [long] and cut[long].endswith("brella") and len(cut[long]) < len(long)


def test_prompts_that_one_tokenizer_reads_to_the_end_are_read():
    traced, long = trace(tiny_sd3(), SIZE), "rain " * 9 + "umbrella"
    assert list(unread(traced, [long])) == [long]
    traced.pipeline.tokenizer_3.model_max_length = 512
    assert unread(traced, [long]) == {}
    short = trace(tiny_sd3(), SIZE | {"max_sequence_length": 20})
    short.pipeline.tokenizer_3.model_max_length = 512
    assert list(unread(short, [long])) == [long]


def suspicious(folder):
    """A teacher whose checker flags every picture."""
    pipeline = tiny_sd()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=16)
    checker = redraw(StableDiffusionSafetyChecker(config), 9)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(-2.0)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(**sizes))
    pipeline.register_to_config(requires_safety_checker=True)
    pipeline.save_pretrained(folder)
    return folder


def test_a_checker_of_pictures_hides_nothing_here_and_stays_in_the_export(tmp_path):
    teacher = suspicious(tmp_path / "teacher")
    call = {"prompt": ["rain"], "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    stock = DiffusionPipeline.from_pretrained(teacher, use_safetensors=True)
    assert stock_call.record(stock, call)["images"].max() == 0  # black, as it is for everyone
    pipeline = load_pipeline(teacher)
    assert pipeline.safety_checker is None
    traced = trace(pipeline)
    assert decode(traced, torch.randn(1, 4, 8, 8)).max() > 0
    save_student(pipeline, "unet", tmp_path / "out")
    export = DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert type(export.safety_checker) is StableDiffusionSafetyChecker
    stock_call.without_black_pictures(export)
    assert stock_call.record(export, call)["images"].max() > 0
