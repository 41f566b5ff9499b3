"""A pipeline that makes each step in two: one for the x_0 of its passes, one that goes on from the guided x_0."""

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from pipeline.tiny import redraw
from pipeline.toy import ToyNetwork, ToyPipeline
from stepdistill.diffusion.window import Span
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.self_test import SELF_TEST_LIMIT
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.trace import TraceError, trace


class InTwo(ToyPipeline):
    """Guides x_0; the first two lines of the network's sample are kept, and so are those of each x_0."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        augment_sigma: float = 0.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
        output_type: str = "pt",
    ) -> tuple[Tensor]:
        labels, count = torch.tensor(class_labels), len(class_labels)
        kept = torch.linspace(0, 0.4, 8).expand(count, 4, 2, 8)
        x = torch.randn(count, 4, 8, 8, generator=generator) * self.scheduler.config.sigma_max
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, t)
            seen[:, :, :2] = kept + augment_sigma * torch.randn(kept.shape, generator=generator)
            passes = [labels] if guidance_scale <= 1 else [torch.full_like(labels, 10), labels]
            raw = torch.cat([self._network(seen, t, one, step) for one in passes])
            x0 = self.scheduler.step(raw, t, torch.cat([x] * len(passes)), return_dict=False)[1]
            self.scheduler._step_index -= 1
            if len(passes) == 2:
                uncond, cond = x0.chunk(2)
                x0 = cond + guidance_scale * (cond - uncond)
            x0[:, :, :2] = kept
            x = self.scheduler.step(x0, t, x, return_dict=False, pred_original_sample=x0)[0]
        return (x,)


def in_two() -> InTwo:
    network = redraw(ToyNetwork(), 9)
    network.dtype = torch.float32  # as networks of diffusers have it
    return InTwo(network, EDMEulerScheduler())


def test_two_steps_are_one():
    found = trace(in_two())
    assert found.free == Span(2, 2, 6, 0) and found.latent_shape == (4, 6, 8)
    assert (found.guidance.kind, found.guidance.cond_first, found.guidance.shift) == ("two_calls", False, 1.0)
    assert found.denoiser.kind == "edm" and found.self_test_error <= SELF_TEST_LIMIT
    assert set_up(found, found.pipeline.scheduler, 2) == ({"num_inference_steps": 2}, {})
    pictures = decode(found, torch.zeros(2, 4, 6, 8))
    assert not pictures[:, :, 2:].any()
    assert pictures[0, 0, 0].tolist() == (torch.linspace(0, 0.4, 8) * 255).round().tolist()


def test_noise_that_is_added_at_every_step_is_refused_with_what_leaves_it_out():
    with pytest.raises(TraceError, match=r"from step to step; teacher\.arguments\.augment_sigma=0 leaves its noise"):
        trace(in_two(), {"augment_sigma": 0.1})
