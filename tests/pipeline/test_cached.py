"""A network that keeps what it made of references at the first step, and is called without them after it."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from pipeline.tiny import redraw
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import TraceError, trace

REFERENCES = 3


class Keeping(nn.Module):
    """Of tokens (B, N, 4), the first ``references`` see themselves alone; the others see their mean."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(4, 4), nn.Linear(8, 4)
        self.moves = False

    def forward(
        self, tokens: Tensor, time: Tensor, labels: Tensor, kept: Any = None, references: int | None = None
    ) -> tuple[Tensor, Any]:
        if kept is None:
            kept, tokens = [self.inside(tokens[:, :references]).mean(1, keepdim=True)], tokens[:, references:]
        if self.moves:
            kept = [kept[0] + time.reshape(-1, 1, 1)]
        hidden = torch.cat([tokens + time.reshape(-1, 1, 1) + labels.reshape(-1, 1, 1), kept[0].expand_as(tokens)], 2)
        return self.outside(hidden.tanh()), kept


class WithReferences(DiffusionPipeline):
    def __init__(self, network: nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
        output_type: str = "pt",
    ) -> tuple[Tensor]:
        labels = torch.tensor(class_labels).float() / 10
        x, kept = torch.randn(len(labels), 6, 4, generator=generator), None
        references = torch.linspace(-1, 1, REFERENCES * 4).reshape(1, REFERENCES, 4).expand(len(labels), -1, -1)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            time = t.expand(len(x)) / 1000
            if kept is None:
                raw, kept = self.network(torch.cat([references, x], 1), time, labels, references=REFERENCES)
            else:
                raw = self.network(x, time, labels, kept=kept)[0]
            x = self.scheduler.step(raw, t, x).prev_sample
        return (x[:, None],)


def test_calls_without_the_references_are_read_as_calls_with_them():
    found = trace(WithReferences(redraw(Keeping(), 9), DDIMScheduler(clip_sample=False)))
    assert found.self_test_error <= 1e-5 and found.latent_shape == (6, 4) and found.returned == 2
    assert found.conditioning["beside tokens on axis 1"] == (REFERENCES, 4)
    assert found.denoiser.spec.constants["references"] == REFERENCES
    assert decode(found, torch.ones(1, 6, 4)).eq(255).all()


def test_what_is_kept_and_changes_with_the_time_is_refused():
    network = redraw(Keeping(), 9)
    network.moves = True
    with pytest.raises(TraceError, match="check 'sample' failed"):
        trace(WithReferences(network, DDIMScheduler(clip_sample=False)))
