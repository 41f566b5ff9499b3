"""What a pipeline's call is given: arguments that other keys set, lists for tuples, long prompts; and its checker."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from pipeline import zoo
from pipeline.tiny import redraw, tiny_flux, tiny_sd, tiny_sd3
from pipeline.toy import PicturedPipeline, ToyNetwork, ToyPipeline
from pipeline.zoo import sdxl
from stepdistill.errors import InputError
from stepdistill.exporting.copied import save_student
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.call import call_arguments
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.trace import TraceError, trace
from stepdistill.pipeline.unread import unread

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


def test_a_call_that_refuses_one_picture_for_all_gets_one_for_each(tmp_path):
    file = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(file)
    pipeline = PicturedPipeline(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    traced = trace(pipeline, {"image": file})
    assert traced.pictures == ["image"] and traced.arguments == {"image": [file]}
    call = call_arguments(pipeline, [1, 2, 3], traced.arguments, steps=2, guidance=1.0)
    assert call["image"] == [file] * 3
    assert stock_call.record(pipeline, json.loads(json.dumps(call)))["latents"].shape == (3, 4, 8, 8)
    # Those of the samples' own are laid out alike.
    own = [{"image": Image.new("RGB", (8, 8), (value,) * 3)} for value in (0, 255)]
    torch.testing.assert_close(encode(traced, [1, 2], None, own).cond["extra.bias"][:], torch.tensor([0.0, 1.0]))
    assert trace(zoo.inpainting(), {"image": file, "mask_image": file}).arguments["image"] == file


def test_pictures_that_are_drawn_anew_are_the_same_in_both_passes(tmp_path):
    file = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(file)
    pipeline = PicturedPipeline(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    pipeline.drawn = True
    traced = trace(pipeline, {"image": file})
    for cache in (None, tmp_path):
        cond, null = encode(traced, [1, 2, 3], cache).batch(torch.arange(3))
        assert torch.equal(cond["extra.bias"], null["extra.bias"]) and len(cond["extra.bias"].unique()) == 3
        assert null["extra.what"].tolist() == [10] * 3


def test_several_pictures_are_a_list(tmp_path):
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    Image.new("RGB", (8, 8)).save(files[0])
    pipeline = PicturedPipeline(ToyNetwork(), DDIMScheduler())
    with pytest.raises(InputError, match=r"arguments: image: expected a picture, found no file .*b\.png"):
        call_arguments(pipeline, [1], {"image": files}, steps=2, guidance=1.0)
    Image.new("RGB", (8, 8)).save(files[1])
    call = call_arguments(pipeline, [1, 2, 3], {"image": files}, steps=2, guidance=1.0)
    assert call["image"] == files and [one.size for one in stock_call.ready(pipeline, call)["image"]] == [(8, 8)] * 2


class Holding(ToyPipeline):
    """Samples with the scheduler that it was made with, whatever is put in its place, as combined pipelines do."""

    def __init__(self, network, scheduler):
        super().__init__(network, scheduler)
        self.held = scheduler

    def __call__(self, class_labels, guidance_scale=3.0, generator=None, num_inference_steps=5):
        with patched(self, "scheduler", self.held):
            return super().__call__(class_labels, guidance_scale, generator, num_inference_steps)


def test_a_pipeline_that_takes_no_other_scheduler_is_refused():
    traced = trace(Holding(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)))
    with pytest.raises(InputError, match=r"Holding does not sample with its component 'scheduler'"):
        set_up(traced, DDIMScheduler(), 2)


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
    save_student(pipeline, ["unet"], tmp_path / "out")
    export = DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert type(export.safety_checker) is StableDiffusionSafetyChecker
    # And the call that the export is checked by.
    request = {"pipeline": str(tmp_path / "out"), "call": call, "device": "cpu", "dtype": "float32"}
    request |= dict.fromkeys(("revision", "variant", "ip_adapter", "lora"), None) | {"guiders": []}
    (tmp_path / "request.json").write_text(json.dumps(request))
    with quiet():
        stock_call.main(str(tmp_path / "request.json"), str(tmp_path / "result.safetensors"))
    assert load_file(tmp_path / "result.safetensors")["images"].max() > 0


class InParts(ToyPipeline):
    """Samples a video part by part: of so many frames, or as it is parted."""

    def __call__(
        self,
        class_labels: list[int],
        num_frames: int = 9,
        base_num_frames: int = 5,
        chunk_partition: list[int] | None = (1, 2),
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        for _ in range(max(num_frames // base_num_frames, len(chunk_partition))):
            made = super().__call__(class_labels, guidance_scale, generator, num_inference_steps)
        return made


def test_a_video_in_parts_is_refused_with_what_makes_it_one():
    pipeline = InParts(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    named = r"teacher\.arguments\.base_num_frames=9 .*; teacher\.arguments\.chunk_partition=\[3\]"
    with pytest.raises(TraceError, match=f"runs its grid again.*{named}"):
        trace(pipeline)
    assert trace(pipeline, {"base_num_frames": 9, "chunk_partition": [3]}).self_test_error <= 1e-5
