"""Calls with a generator, a dataclass, a second grid switched off, or the answer of a pipeline inside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from torch import Tensor

from pipeline.tiny import redraw, tiny_sd
from pipeline.toy import ToyNetwork, ToyPipeline, toy
from stepdistill.pipeline.components import shared_inside
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.stock_call import pictures_in, ready, record
from stepdistill.pipeline.trace import TraceError, trace

CALL = {"class_labels": [1], "num_inference_steps": 2}


def made(kind: type) -> Any:
    return kind(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))


def test_a_rule_that_is_none_of_ours_is_left_out_by_a_scale_of_1():
    pipeline = toy(rule=lambda cond, uncond, w: cond + w * (cond - uncond).abs())
    with pytest.raises(TraceError, match=r"the pipeline's rule.*teacher\.arguments\.guidance_scale=1 leaves"):
        trace(pipeline)
    traced = trace(pipeline, {"guidance_scale": 1})
    assert traced.guidance.kind == "none" and traced.self_test_error <= 1e-5


class Drawing(ToyPipeline):
    """Draws with the generator that it is given, and knows no call without."""

    needed: Any = torch.Generator

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Any]:
        if not isinstance(generator, self.needed):
            raise TypeError("'NoneType' object is not subscriptable")
        return super().__call__(class_labels, guidance_scale, generator, num_inference_steps)


def test_a_call_that_fails_without_a_generator_gets_one():
    pipeline = made(Drawing)
    first, again = record(pipeline, CALL), record(pipeline, CALL)
    assert pipeline.needs_generator and torch.equal(first["noise"], again["noise"])
    other = made(Drawing)
    other.needed = int
    with pytest.raises(TypeError, match="not subscriptable"):
        record(other, CALL)
    assert not other.needs_generator


class Outer(ToyPipeline):
    """Returns what a pipeline inside it returned."""

    def __call__(self, class_labels: list[int], num_inference_steps: int = 5, again_strength: float = 0.0) -> tuple:
        (images,) = super().__call__(class_labels, 1.0, None, num_inference_steps)
        if again_strength:
            (images,) = super().__call__(class_labels, 1.0, None, num_inference_steps)
        return (StableDiffusionPipelineOutput(images=images[:, :3], nsfw_content_detected=None),)


def test_the_answer_of_a_pipeline_inside_and_its_second_grid():
    pipeline = made(Outer)
    with pytest.raises(TraceError, match=r"its grid again.*teacher\.arguments\.again_strength=0 leaves out"):
        trace(pipeline, {"again_strength": 0.4})
    traced = trace(pipeline)
    pipeline.network.dtype = torch.float32
    assert decode(traced, torch.zeros(2, 4, 8, 8)).shape == (2, 3, 8, 8)
    assert record(pipeline, CALL)["images"].shape == (1, 3, 8, 8)


class Keeping(ToyPipeline):
    """Keeps the first row of what its scheduler steps, and does not put it back after the last step."""

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], generator: torch.Generator | None = None, num_inference_steps: int = 5
    ) -> tuple[Tensor]:
        x = torch.randn(len(class_labels), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            x[:, :, 0] = 0.6
            x = self.scheduler.step(self._network(x, t, torch.tensor(class_labels), step), t, x).prev_sample
        return (x[:, :3],)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # begins at the noise end itself
def test_what_a_pipeline_keeps_is_decoded_as_the_pipeline_has_it(spacing):
    pipeline = made(Keeping)
    pipeline.scheduler.register_to_config(timestep_spacing=spacing)
    pipeline.network.dtype = torch.float32
    traced = trace(pipeline)
    assert traced.latent_shape == (4, 7, 8)
    picture = decode(traced, torch.zeros(1, 4, 7, 8))
    assert (picture[:, :, 0] == 153).all() and (picture[:, :, 1:] == 0).all()


def test_a_scheduler_that_a_pipeline_inside_has_too():
    pipeline = tiny_sd()
    assert not shared_inside(pipeline, "scheduler")
    pipeline.inner = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    assert shared_inside(pipeline, "scheduler")


@dataclass
class Condition:
    frames: Any
    index: int = 0


class Conditioned(ToyPipeline):
    """Takes a condition that is an object."""

    def __call__(self, class_labels: list[int], conditions: Condition | list[Condition] | None = None) -> tuple[Tensor]:
        return ()


def test_a_dict_with_a_picture_is_the_dataclass_that_a_call_declares(tmp_path: Path):
    file = str(tmp_path / "first.png")
    Image.new("RGB", (8, 8)).save(file)
    stated = {"frames": file, "index": 2}
    assert pictures_in(stated) == pictures_in([stated]) == [file]
    for given in (stated, [stated]):
        (condition,) = [ready(made(Conditioned), {"conditions": given})["conditions"]]
        condition = condition[0] if isinstance(given, list) else condition
        assert isinstance(condition, Condition) and condition.index == 2 and condition.frames.size == (8, 8)
    assert ready(made(Conditioned), {"conditions": {"index": 2}})["conditions"] == {"index": 2}


class Adding(ToyPipeline):
    """The unconditional call has an argument that the conditional one leaves out."""

    value: bool | None = None

    def _network(self, x, t, labels, step):
        more = {"flag": self.value} if (labels == 10).all() else {}
        extra = {"what": labels, "bias": self.bias(step, len(x))}
        return self.network(self.feed(x), self.level(t).expand(len(x)), extra=extra, **more)[0]


def test_an_argument_that_one_pass_leaves_out_is_none_in_the_other():
    pipeline = made(Adding)
    found = trace(pipeline)
    assert found.guidance.kind == "two_calls" and found.self_test_error <= 1e-5
    pipeline.value = True
    with pytest.raises(TraceError, match=r"guidance changes which arguments are passed: \['flag'\]"):
        trace(pipeline)
