"""Pipelines that make all passes of guidance at any scale: the student is the conditional pass."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pipeline.tiny import redraw
from pipeline.toy import ToyNetwork, ToyPipeline
from stepdistill.pipeline.conditioning import encode, plain_conditions
from stepdistill.pipeline.sizes import at_size
from stepdistill.pipeline.trace import TraceError, trace

ARGUMENTS = {"image_guidance_scale": 1.0}


class Always(ToyPipeline):
    """Guides at any scale; its unconditional pass is the first."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        image_guidance_scale: float = 1.5,
        height: int = 8,
        width: int = 8,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        labels, null = torch.tensor(class_labels), torch.full((len(class_labels),), 10)
        x = torch.randn(len(class_labels), 4, height, width, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            if self.two_calls:
                uncond, cond = self._network(x, t, null, step), self._network(x, t, labels, step)
            else:
                uncond, cond = self._network(torch.cat([x, x]), t, torch.cat([null, labels]), step).chunk(2)
            guided = uncond + guidance_scale * (cond - uncond) + (image_guidance_scale - 1) * cond
            x = self.scheduler.step(guided, t, x).prev_sample
        return (x,)


@pytest.mark.parametrize("two_calls", [True, False])
def test_the_conditional_pass_is_the_run_without_guidance(two_calls: bool, monkeypatch):
    monkeypatch.setattr("stepdistill.pipeline.sizes.picture_size", lambda trace: trace.latent_shape[1:])
    pipeline: Any = Always(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    pipeline.two_calls = two_calls
    traced = trace(pipeline, ARGUMENTS)
    assert traced.self_test_error <= 1e-5
    assert traced.guidance.always and traced.guidance.passes == (1, 0) and traced.guidance.plain_scale == 1
    assert traced.summary()["passes_without_guidance"] == 2
    encoded = encode(traced, [4, 2])
    assert encoded.cond["extra.what"].tolist() == [4, 2] and encoded.null["extra.what"].tolist() == [10]
    assert plain_conditions(traced, [4, 2], 2)["extra.what"].tolist() == [4, 2]
    assert at_size(traced, (16, 8)).latent_shape == (4, 16, 8)


def test_passes_of_which_none_is_left_at_scale_1_are_refused():
    pipeline = Always(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    with pytest.raises(TraceError, match=r"none alone is the result; teacher\.arguments\.image_guidance_scale=1 "):
        trace(pipeline)
