"""Pipelines whose call takes one prompt: single calls are watched and stacked, and every later call is for one."""

import json
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from pipeline import zoo
from pipeline.no_preview import NoPreview
from pipeline.tiny import redraw
from pipeline.toy import ToyPipeline
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.live import live
from stepdistill.pipeline.trace import trace
from stepdistill.run import train

PROMPTS = ["a red shoe", "two birds on a wire"]
ARGUMENTS = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def traced():
    return trace(zoo.vace(), ARGUMENTS)


def test_single_calls_are_one_batch(traced):
    assert traced.alone and traced.self_test_error <= 1e-5
    assert (traced.guidance.kind, traced.denoiser.spec.sample) == ("two_calls", "hidden_states")
    assert traced.conditioning["encoder_hidden_states"] == (16, 16)
    assert traced.probe == "a red shoe" and traced.at_once(32) == 1


def test_prompts_are_encoded_and_samples_decoded_one_by_one(traced):
    both = encode(traced, PROMPTS)
    name = "encoder_hidden_states"
    assert torch.equal(both.cond[name][1:], encode(traced, PROMPTS[1:]).cond[name][:])
    assert not torch.equal(both.cond[name][0], both.cond[name][1]) and len(both.null[name]) == 1
    assert torch.equal(live(traced, PROMPTS).cond[name][:], both.cond[name][:])
    assert decode(traced, torch.zeros(2, *traced.latent_shape)).shape == (2, 3, 32, 32)


def test_it_is_distilled_and_exported(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    save_pipeline(zoo.vace(), tmp_path / "teacher")
    run = train(
        {
            "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 2.0}, "arguments": ARGUMENTS},
            "student": {"steps": 2, "train": "lora", "rank": 2},
            "data": {"conditions": PROMPTS},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
            "report": {"samples": 0},
            "output": str(tmp_path / "run"),
        }
    )
    assert json.loads((run.folder / "export" / "stepdistill.json").read_text())["form"] == "lora"


class Reader(nn.Module):
    """Sees the mean of a prompt's letters, without those that a mask leaves out."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.letters = nn.Linear(2, 4)
        self.speed = nn.Linear(1, 4)

    def forward(self, picture: Tensor, noise_level: Tensor, text: Tensor, seen: Tensor | None = None) -> Any:
        weight = torch.ones_like(text[..., 0]) if seen is None else seen.to(text.dtype)
        mean = (text * weight[..., None]).sum(1) / weight.sum(1)[:, None]
        shift = self.letters(mean) + self.speed(noise_level.reshape(-1, 1).to(picture.dtype))
        return (self.blocks[1](torch.tanh(self.blocks[0](picture + shift[:, :, None, None]))),)


class OnePromptPipeline(ToyPipeline):
    """Takes one prompt and states no mask of it: no letter of one prompt is left out."""

    def _network(self, x: Tensor, t: Tensor, text: Tensor, step: int) -> Tensor:
        return self.network(x, self.level(t).expand(len(x)), text=text, seen=None)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        read, empty = (
            torch.tensor([[[ord(letter) / 100, number / 10] for number, letter in enumerate(f"<{text}>")]])
            for text in (prompt.strip(), negative_prompt)
        )
        x = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            output = self._network(x, t, read, step)
            if guidance_scale > 1:
                output = self.rule(output, self._network(x, t, empty, step), guidance_scale)
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


class Frames(Reader):
    """Sees a row of the prompt for each of two frames, and two pictures' numbers for each image."""

    def forward(self, picture: Tensor, noise_level: Tensor, text: Tensor, seen: Any = None) -> Any:
        first, second = seen
        picture = picture * first[:, :1, None, None] + second[:, :1, None, None]
        return super().forward(picture, noise_level, text.unflatten(0, (len(picture), 2)).mean(1))


class FramesPipeline(ToyPipeline):
    """Guides with one batch, whose prompts have one length."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        texts = [prompt.strip(), ""] if guidance_scale > 1 else [prompt.strip()]
        letters = [[[ord(letter) / 100, 0.1] for letter in text.ljust(40)] for text in texts]
        x = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            both, level = x.expand(len(texts), -1, -1, -1), self.level(t).expand(len(texts))
            numbers = [torch.full((len(texts), 2), number) for number in (0.5, 0.2)]
            rows = torch.tensor(letters).repeat_interleave(2, 0)
            outputs = self.network(both, level, text=rows, seen=numbers)[0].chunk(len(texts))
            output = self.rule(*outputs, guidance_scale) if len(texts) > 1 else outputs[0]
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


def test_several_rows_for_each_prompt_and_lists_of_rows():
    traced = trace(FramesPipeline(redraw(Frames(), 9), DDIMScheduler(clip_sample=False)))
    assert traced.alone and traced.self_test_error <= 1e-5
    assert traced.denoiser.spec.layouts == {"text": RowLayout(0, 2)}


def test_the_mask_of_prompts_of_their_own_lengths_is_found():
    traced = trace(OnePromptPipeline(redraw(Reader(), 9), DDIMScheduler(clip_sample=False)))
    assert traced.alone and traced.self_test_error <= 1e-5
    assert traced.denoiser.spec.masks == {"text": ("seen", torch.bool)}
    assert traced.conditioning == {"text": (None, 2), "seen": (None,)}
    seen = encode(traced, ["a", "rain"]).cond["seen"][:]
    assert seen.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
