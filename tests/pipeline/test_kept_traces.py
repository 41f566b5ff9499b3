"""Traces on the disk: a second start takes the same facts from there, and only those that the pipeline confirms."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from pipeline import zoo
from pipeline.test_cut_timesteps import Cutting, flow
from pipeline.test_joint import PLAIN, ltx2
from pipeline.tiny import redraw, tiny_dit, tiny_sd
from pipeline.toy import ToyNetwork, ToyPipeline
from stepdistill.diffusion.nested import tensors_in
from stepdistill.errors import InputError
from stepdistill.files import write_text
from stepdistill.pipeline import kept_traces
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.kept_traces import kept_trace
from stepdistill.roles.views import lora_targets

VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
CASES = {
    "classes": (tiny_dit, {}),
    "a list for each": (zoo.z_image, zoo.ZOO["z-image"].arguments),
    "a ControlNet": (zoo.controlnet, {"image": "picture.png", **zoo.SMALL}),
    "beside the sample": (zoo.inpainting, {"image": "picture.png", "mask_image": "picture.png", **zoo.SMALL}),
    "experts": (lambda: zoo.wan(boundary_ratio=0.875), zoo.SMALLER | VIDEO),
    "one by one": (zoo.vace, VIDEO),
    "two ControlNets": (zoo.controlnets, {"image": ["picture.png", "picture.png"], **zoo.SMALL}),
    "three passes": (zoo.pix2pix, {"image": "picture.png", "image_guidance_scale": 2.0}),
    "a first frame": (zoo.wan_from_a_frame, VIDEO | {"image": "picture.png", "num_frames": 9}),
    "timesteps that are cut off": (lambda: flow(Cutting), {}),
    "two samples": (ltx2, zoo.SMALLER | PLAIN | {"num_frames": 9, "max_sequence_length": 16}),
}


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), (200, 80, 40)).save("picture.png")


def made(build, seed=0):
    torch.manual_seed(seed)
    return build()


def not_traced(*_):
    pytest.fail("it was traced again")


@pytest.mark.parametrize("name", CASES)
def test_a_second_start_knows_what_the_first_has_learned(name, monkeypatch):
    build, arguments = CASES[name]
    first = kept_trace(made(build), arguments)
    monkeypatch.setattr(kept_traces, "trace_small", not_traced)
    second = kept_trace(made(build), arguments)
    facts = [one.name for one in fields(first) if one.name not in ("pipeline", "denoiser", "self_test_error")]
    assert {fact: getattr(second, fact) for fact in facts} == {fact: getattr(first, fact) for fact in facts}
    assert second.summary() | {"self_test_error": 0} == first.summary() | {"self_test_error": 0}
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    x, entries = torch.randn(2, *first.latent_shape), (["rain", "a shoe"] if first.entry == "prompt" else [0, 1])
    with torch.no_grad():
        outputs = []
        for traced in (first, second):
            torch.manual_seed(1)
            cond, _ = encode(traced, entries).batch(torch.tensor([0, 1]))
            outputs.append(traced.denoiser(x, t, cond).raw)
    assert torch.equal(*outputs)
    assert torch.equal(*(traced.denoiser.schedule.timestep(t) for traced in (first, second)))


def test_the_guided_calls_are_left_out(monkeypatch):
    def count() -> int:
        pipeline, calls = made(tiny_sd), []
        pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        kept_trace(pipeline, zoo.SMALL)
        return len(calls)

    first, second = count(), count()
    assert second == 2 < first / 3  # of the pipeline and of the denoiser that is held to it


def test_what_it_depends_on_is_in_its_name():
    def name(pipeline, arguments=zoo.SMALL):
        return kept_traces._name(pipeline, arguments)

    pipeline = made(tiny_sd)
    names = {name(pipeline), name(made(tiny_sd)), name(pipeline, zoo.SMALL | {"height": 32})}
    assert len(names) == 2
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1
    names.add(name(pipeline))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    names.add(name(pipeline))
    names |= {name(pipeline, {"image": "picture.png"})}
    Image.new("RGB", (32, 32)).save("picture.png")
    names |= {name(pipeline, {"image": "picture.png"}), name(pipeline.to(torch.float16))}
    assert len(names) == 7 and None not in names
    assert name(pipeline.to("meta")) is None and name(made(tiny_sd), {"image": Image.new("RGB", (8, 8))}) is None


class ByName(ToyNetwork):
    """Gives one layer its input by name, as AnimateDiff's motion modules do."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(8, 8)

    def forward(self, picture, noise_level, extra):
        return (self.out(input=super().forward(picture, noise_level, extra)[0]),)


def test_layers_that_can_have_no_lora_are_noted_again(monkeypatch):
    def build():
        return toy_of(redraw(ByName(), 9))

    first = kept_trace(build())
    monkeypatch.setattr(kept_traces, "trace_small", not_traced)
    assert lora_targets(kept_trace(build()).network) == lora_targets(first.network) == ["blocks.0", "blocks.1", "speed"]


def toy_of(network):
    return ToyPipeline(network, DDIMScheduler(clip_sample=False))


def test_another_code_of_the_pipeline_has_another_name(tmp_path, monkeypatch):
    pipeline = toy_of(redraw(ToyNetwork(), 9))
    before = kept_traces._name(pipeline, {})
    changed = tmp_path / "toy.py"
    changed.write_text("# edited")
    own = inspect.getsourcefile
    monkeypatch.setattr(inspect, "getsourcefile", lambda kind: str(changed) if kind is ToyPipeline else own(kind))
    assert kept_traces._name(pipeline, {}) not in (None, before)


def test_a_picture_that_is_not_there_is_refused_by_the_call():
    with pytest.raises(InputError, match=r"image: expected a picture, found no file no\.png"):
        kept_trace(made(zoo.inpainting), {"image": "no.png", "mask_image": "picture.png", **zoo.SMALL})


def test_a_full_disk_costs_the_file_alone(tmp_path, monkeypatch):
    def full(_content, draft):
        draft.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")

    monkeypatch.setattr(torch, "save", full)
    assert kept_trace(made(tiny_dit)).entry == "class_labels"
    assert not list((tmp_path / "cache").iterdir())


class Mischief:
    """Calls a function where it is unpickled."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, (Path("ran"), "")


def lies(content):
    """A time that is twice what the network takes."""
    content["spec"] = kept_traces.replace(content["spec"], timestep_scale=2.0)
    return content


def with_a(function):
    return lambda content: content | {"more": Mischief(function)}


@pytest.mark.parametrize("change", [lies, lambda _: {}, with_a(Path.write_text), with_a(write_text), None])
def test_a_file_that_is_not_right_is_made_again(change, tmp_path):
    expected = kept_trace(made(tiny_sd), zoo.SMALL)
    (file,) = (tmp_path / "cache").glob("traces-*")
    whole = file.read_bytes()
    if change is None:
        file.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save(change(torch.load(file, weights_only=False)), file)
    assert kept_trace(made(tiny_sd), zoo.SMALL).summary() == expected.summary()
    assert not Path("ran").exists()
    content = torch.load(file, weights_only=False)
    assert content["spec"].timestep_scale == 1.0 and not list(tensors_in(content["facts"]))
