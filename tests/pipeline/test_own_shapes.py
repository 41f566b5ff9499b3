"""Pipelines whose conditions have shapes of their own and no mask: every row goes through the network unpadded."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional

from pipeline.tiny import redraw
from pipeline.toy import ToyPipeline
from stepdistill.diffusion.ragged import Field
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode, plain_conditions
from stepdistill.pipeline.live import live
from stepdistill.pipeline.trace import trace

PROMPTS = ["a", "rain on a tin roof"]


class Placed(nn.Module):
    """Sees every letter at its place; a dict may hold a mask, of a form that no padding fits."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.letters = nn.Linear(2, 4)
        self.speed = nn.Linear(1, 4)

    def forward(self, picture: Tensor, noise_level: Tensor, text: Tensor, layers: list, places: Tensor, more: dict):
        letters = (text + layers[0] * layers[1]) * (1 + places / 10)[:, None]
        weight = more["mask"][:, 0].float() if "mask" in more else torch.ones_like(text[..., 0])
        mean = (letters * weight[..., None]).sum(1) / weight.sum(1)[:, None]
        shift = self.letters(mean) + self.speed(noise_level.reshape(-1, 1).to(picture.dtype))
        return (self.blocks[1](torch.tanh(self.blocks[0](picture + shift[:, :, None, None]))),)


class PlacedPipeline(ToyPipeline):
    """Pads the prompts of a call to the longest; both passes are one batch, or two calls."""

    def _network(self, x: Tensor, t: Tensor, texts: list[Tensor], step: int) -> Tensor:
        length = max(map(len, texts))
        text = torch.stack([functional.pad(one, (0, 0, 0, length - len(one))) for one in texts])
        mask = torch.stack([torch.arange(length) < len(one) for one in texts])[:, None]
        more = {} if mask.all() else {"mask": mask}
        layers = [text.cos(), text.sin()]
        return self.network(x, self.level(t).expand(len(x)), text, layers, torch.arange(length), more=more)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "no",
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        texts = [letters(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        empty = [letters("no")] * len(texts)
        x = torch.randn(len(texts), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            if guidance_scale <= 1:
                output = self._network(x, t, texts, step)
            elif self.two_calls:
                output = self.rule(self._network(x, t, texts, step), self._network(x, t, empty, step), guidance_scale)
            else:
                both = self._network(torch.cat([x, x]), t, texts + empty, step)
                output = self.rule(*both.chunk(2), guidance_scale)
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


def letters(text: str) -> Tensor:
    return torch.tensor([[ord(letter) / 100, number / 10] for number, letter in enumerate(text)])


@pytest.mark.parametrize("two_calls", [True, False])
def test_rows_of_their_own_shapes_are_computed_unpadded(two_calls: bool, tmp_path):
    pipeline: Any = PlacedPipeline(redraw(Placed(), 9), DDIMScheduler(clip_sample=False))
    pipeline.two_calls = two_calls
    traced = trace(pipeline)
    assert traced.alone and traced.self_test_error <= 1e-5
    fields = traced.denoiser.spec.ragged.fields
    assert fields["layers 1"] == Field(2, torch.float32) and fields["places"] == Field(1, torch.int64, shared=True)
    assert traced.conditioning["text"] == (None,) and ("more.mask" in fields) is not two_calls
    stored, kept = encode(traced, PROMPTS, tmp_path), encode(traced, PROMPTS)
    rows = torch.tensor([1, 0, 1])
    (cond, null), (again, _) = stored.batch(rows), kept.batch(rows)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.9, 0.5, 0.2])
    made = traced.denoiser(x, t, cond).raw
    assert torch.equal(made, traced.denoiser(x, t, again).raw)
    plain = traced.denoiser(x[:1], t[:1], plain_conditions(traced, PROMPTS[1:], 2)).raw
    own = pipeline._network(x[:1], traced.denoiser.schedule.timestep(t[:1]), [letters(PROMPTS[1])], 0)
    empty = pipeline._network(x[1:2], traced.denoiser.schedule.timestep(t[1:2]), [letters("no")], 0)
    assert torch.allclose(plain, own, atol=1e-6) and torch.allclose(made[:1], own, atol=1e-6)
    assert torch.allclose(traced.denoiser(x, t, null).raw[1:2], empty, atol=1e-6)


def test_an_empty_condition_as_long_as_each_prompt_is_stored_for_each():
    pipeline: Any = PlacedPipeline(redraw(Placed(), 9), DDIMScheduler(clip_sample=False))
    traced = trace(pipeline)
    assert torch.equal(live(traced, PROMPTS).cond["text"][:], encode(traced, PROMPTS).cond["text"][:])
    pipeline.two_calls = False
    traced = trace(pipeline)
    assert len(encode(traced, PROMPTS).null["text shape"]) == 2
    with pytest.raises(InputError, match="expected 'store'"):
        live(traced, PROMPTS)
