"""A made-up pipeline around a made-up network, to bend one thing at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from pipeline.tiny import redraw


class ToyNetwork(nn.Module):
    """Unusual argument names, a nested dict, time as a plain number in [0, 1]; no diffusers base class."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, channels, 3, padding=1)])
        self.label = nn.Embedding(11, 4)
        self.speed = nn.Linear(1, 4)

    def forward(self, picture: Tensor, noise_level: Tensor, extra: dict[str, Any], flag: bool = False) -> Any:
        shift = self.label(extra["what"]) + self.speed(noise_level.reshape(-1, 1).to(picture.dtype))
        hidden = torch.tanh(self.blocks[0](picture + shift[:, :, None, None]))
        bias = extra["bias"]
        if isinstance(bias, dict):
            bias = bias["rows"] * bias["mask"][..., None]
        bias = torch.as_tensor(bias)
        if bias.ndim:  # one for each image
            bias = bias.reshape(len(picture), -1).mean(1)[:, None, None, None]
        return (self.blocks[1](hidden) + bias,)


class ToyPipeline(DiffusionPipeline):
    """Guides with two calls, or one when ``two_calls`` is False; every behaviour is a public attribute."""

    def __init__(self, network: nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.two_calls = True
        self.level: Callable[[Tensor], Tensor] = lambda t: 1 - t.float() / 1000
        self.feed: Callable[[Tensor], Tensor] = lambda x: x
        self.read: Callable[[Tensor], Tensor] = lambda raw: raw
        self.rule: Callable[[Tensor, Tensor, float], Tensor] = lambda c, u, w: u + w * (c - u)
        self.calls = 1
        self.side = 8
        self.times: Callable[[Tensor], Tensor] = lambda timesteps: timesteps
        self.bias: Callable[[int, int], Any] = lambda step, count: 0.25

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        level = self.level(t).expand(len(x))
        for _ in range(self.calls):
            raw = self.network(self.feed(x), level, extra={"what": labels, "bias": self.bias(step, len(x))})[0]
        return self.read(raw)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        labels, null = torch.tensor(class_labels), torch.full((len(class_labels),), 10)
        x = torch.randn(len(class_labels), 4, self.side, self.side, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.times(self.scheduler.timesteps)):
            if guidance_scale <= 1:
                output = self._network(x, t, labels, step)
            elif self.two_calls:
                output = self.rule(self._network(x, t, labels, step), self._network(x, t, null, step), guidance_scale)
            else:
                both = self._network(torch.cat([x, x]), t, torch.cat([labels, null]), step)
                output = self.rule(*both.chunk(2), guidance_scale)
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


class PicturedPipeline(ToyPipeline):
    """Takes a picture for each image, and its mean colour, noised where ``drawn``, is an input of the network."""

    drawn = False

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        image: Any,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        pictures = image if isinstance(image, list) else [image]
        if len(pictures) != len(class_labels):
            raise ValueError(f"{len(pictures)} pictures for {len(class_labels)} images")
        colours = torch.tensor([float(np.asarray(picture).mean()) / 255 for picture in pictures])
        if self.drawn:
            colours += 0.01 * torch.randn(len(colours), generator=generator)
        self.bias = lambda _step, _count: colours
        return super().__call__(class_labels, guidance_scale, generator, num_inference_steps)


class Control(nn.Module):
    """A network that sees the noisy sample and its time, and returns a number for each image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, picture: Tensor, noise_level: Tensor) -> tuple[Tensor]:
        return (self.scale * picture.std((1, 2, 3)) + noise_level,)


class ControlledPipeline(ToyPipeline):
    """A second network feeds both passes of a step and is called once for them."""

    def __init__(self, network: nn.Module, scheduler: Any, control: nn.Module):
        super().__init__(network, scheduler)
        self.register_modules(control=control)
        self.seen: Tensor | None = None

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        if self.seen is not x:
            (made,) = self.control(x, self.level(t).expand(len(x)))
            self.seen, self.bias = x, lambda _step, _count: made
        return super()._network(x, t, labels, step)


def toy(channels: int = 4, scheduler: Any = None, **behaviour: Any) -> ToyPipeline:
    """A toy with some of its attributes replaced."""
    pipeline = ToyPipeline(redraw(ToyNetwork(channels), 9), scheduler or DDIMScheduler(clip_sample=False))
    for name, value in behaviour.items():
        setattr(pipeline, name, value)
    return pipeline
