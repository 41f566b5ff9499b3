"""Images, videos and sounds from latents, by the pipeline's own decoding code."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.diffusion.nested import first_tensor
from stepdistill.diffusion.stock_schedulers import as_network_input
from stepdistill.diffusion.window import Span, Window
from stepdistill.errors import InputError, first_line
from stepdistill.pipeline import in_two
from stepdistill.pipeline.call import TraceError, run
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.observe import Answer
from stepdistill.pipeline.recording import forked_random
from stepdistill.pipeline.resting import rest
from stepdistill.pipeline.stock_call import Replaced, in_each, parameters, tiled
from stepdistill.pipeline.trace import Trace


def at_once(shape: Sequence[int], numbers: int = 2**18) -> int:
    """How many samples go through a network at once where no recipe says: 250 small ones, 4 of SDXL's at 1024 px.

    Args:
        shape: of one.
        numbers: that they may have together.
    """
    return max(1, min(250, numbers // torch.Size(shape).numel()))


def decode(trace: Trace, latents: Tensor, batch: int | None = None, left: Tensor | None = None) -> Tensor:
    """Images uint8 (N, C, H, W) of ``latents``, see :func:`played`.

    Of a video its middle frame; of several pictures for each sample one beside the other.
    """
    return torch.cat([as_pictures(made, count) for made, count in played(trace, latents, batch, left)])


def played(
    trace: Trace, latents: Tensor, batch: int | None = None, left: Tensor | None = None
) -> Iterator[tuple[Tensor, int]]:
    """What the pipeline's own code makes of ``latents`` (N, *latent_shape), float, in the host's memory; a few at once,
    each time with their number, as videos are large.

    Pictures (N, C, H, W) or videos (N, F, C, H, W) in about [0, 1], or several of them for each sample; sounds
    (N, channels, length) or (N, length) in about [-1, 1]. ``batch`` None: fewer at once than :func:`at_once`, as
    autoencoders take more memory, and one by one where the pipeline cannot decode several at once (HunyuanVideo 1.5).

    Args:
        left: whole samples as a run's scheduler left them, for what the pipeline keeps; None: what it keeps them at.

    Raises:
        TraceError: the pipeline's decoding fails, or does not return its images as a tensor.
    """
    if left is not None and trace.free is not None:
        latents = trace.free.whole(latents, trace.free.outside(left).to(latents))
    for chunk in latents.split(trace.at_once(batch or at_once(trace.latent_shape, 2**16))):
        try:
            made = [(_decoded(trace, chunk), len(chunk))]
        except TraceError:
            if batch is not None or len(chunk) == 1:
                raise
            made = ((_decoded(trace, one), 1) for one in chunk.split(1))
        yield from made
    rest(trace.pipeline)


@torch.no_grad()
def _decoded(trace: Trace, latents: Tensor) -> Tensor:
    """:func:`played` of so many that one call makes them.

    The pipeline runs a step, or two, in which the denoiser is silent and the scheduler returns ``latents``.
    """
    pipeline, network = trace.pipeline, trace.network
    name, scheduler = type(pipeline).__name__, pipeline.scheduler
    latents = latents.to(next(network.parameters()).device, network.dtype)
    accepted = parameters(pipeline)
    many = {"num_images_per_prompt": len(latents)} if "num_images_per_prompt" in accepted else {}
    entries = trace.probe if many or trace.alone else trace.probe * len(latents)
    wishes = {"guidance": trace.guidance.plain_scale, "output_type": "pt", **many}
    with (
        standing_in(trace, torch.zeros_like),
        patched(scheduler, "step", _giving(trace, latents)),
        forked_random(latents.device),
    ):
        try:
            made = run(pipeline, entries, trace.arguments, steps=trace.fewest_steps, **wishes)
        except (InputError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if "out of memory" in str(error).lower():
                raise
            if tiled(pipeline, error):
                return _decoded(trace, latents)
            reason = first_line(error)
            raise TraceError("decode", f"{name} fails after its last step: {reason}") from error
    if isinstance(made[0], Mapping):  # of a pipeline inside this one (VisualCloze)
        made = made[0]
    images = made[0] if isinstance(made[0], np.ndarray) else first_tensor(made)
    if isinstance(images, np.ndarray):  # of a pipeline that knows no tensors (T2I adapters)
        images = torch.from_numpy(images)
        images = images.movedim(-1, 1) if images.ndim == 4 else images
    if not isinstance(images, Tensor) or len(images) % len(latents):
        raise TraceError("decode", f"{name} does not return its images as one tensor")
    return images.float().cpu()


def as_pictures(images: Tensor, count: int) -> Tensor:
    """Pictures uint8 (count, C, H, W) of what was :func:`played` of so many samples.

    Of videos the middle frames; several pictures for each sample beside each other; of sounds the wave (count, ...).
    """
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    if images.ndim < 4:
        images = (images + 1) / 2
    images = torch.cat(images.unflatten(0, (count, -1)).unbind(1), -1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _as_stepped(trace: Trace, latents: Tensor) -> list[tuple[Tensor, Span | None]]:
    """What the pipeline's scheduler, and then those of its copies that step, return of latents or whole samples.

    Each with the part of a sample that it is; None: all of it.
    """
    joint = trace.denoiser.spec.joint
    if trace.frames is not None:
        return [(one, None) for one in (latents, *latents.unbind(trace.frames))]
    if joint is None:
        return [(latents, trace.free if tuple(latents.shape[1:]) == trace.latent_shape else None)]
    return [(x, part.free) for part, x in zip(joint.parts, joint.split(latents), strict=True)]


def _giving(trace: Trace, latents: Tensor) -> Replaced:
    """A step() that returns latents (B, *latent_shape), or whole samples; that of the n-th copy the n-th of several."""
    samples, scheduler = _as_stepped(trace, latents), trace.pipeline.scheduler

    def given(own_step: Callable[..., Any], number_of: Callable[[], int]) -> Callable[..., Answer]:
        signature = inspect.signature(own_step)

        @functools.wraps(own_step)
        def step(*args: Any, **kwargs: Any) -> Answer:
            number = number_of()
            sample, free = samples[number if number < len(samples) else 0]
            if free is not None:
                kept = free.outside(_kept(trace, free, signature.bind(*args, **kwargs).arguments))
                sample = free.whole(sample, kept.to(sample))
            # LCM's pipeline takes the denoised latents from the second place.
            return Answer((sample, sample))

        return step

    return in_each(scheduler, given)


def _kept(trace: Trace, free: Span, call: Mapping[str, Any]) -> Tensor:
    """A sample that outside its ``free`` part is what the pipeline keeps there at the end.

    That is the x_0 which a step is called with; where the pipeline adds nothing to what the silent network answers, it
    keeps the sample as it is.
    """
    x0, output = call.get(in_two.GIVEN), call["model_output"]
    if x0 is not None:
        return x0
    several = trace.denoiser.spec.joint is not None
    if several or output.shape != call["sample"].shape or not free.outside(output).any():
        return call["sample"]
    schedule, timestep = trace.denoiser.schedule, torch.as_tensor(call["timestep"]).reshape(-1)[:1]
    x_t = as_network_input(copy.deepcopy(trace.pipeline.scheduler), call["sample"], timestep)
    t = schedule.time(timestep.to(x_t.device)).expand(len(x_t))
    return schedule.to_x0(output, x_t, t, trace.denoiser.kind)


@contextmanager
def standing_in(trace: Trace, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the pipeline's denoiser returns ``answer`` of the sample (B, ...), laid out as its own output.

    A pipeline's call costs no pass through the network then. Of several that take turns the second returns half of
    ``answer``, the third a third of it, so that what comes out shows who was called.
    """
    with ExitStack() as stack:
        for number, name in enumerate(trace.components):
            network = getattr(trace.pipeline, name)
            share = answer if number == 0 else lambda x, number=number: answer(x) / (number + 1)
            stack.enter_context(patched(network, "forward", _stand_in(trace, network, share)))
        yield


def _stand_in(trace: Trace, network: nn.Module, answer: Callable[[Tensor], Tensor]) -> Callable[..., Answer]:
    spec, own = trace.denoiser.spec, network.forward
    signature, beside = inspect.signature(own), {}

    def of(x: Tensor | list[Tensor], window: Window) -> Tensor | list[Tensor]:
        if isinstance(x, list):
            return [answer(row) for row in x]
        left_out = [x.shape[span.axis] == span.length for span in window.spans]
        if window.spans and not any(left_out):  # else the network has kept what it made of it (KV caches)
            beside[window] = sum(answer(part).flatten(1).mean(1) for part in window.beside(x))
        for span, left in zip(window.spans, left_out, strict=True):
            x = x if span.axis in window.cut or left else span.inside(x)
        raw = answer(x)
        if window in beside:  # it is not to change
            raw = raw + beside[window].reshape(-1, *[1] * (raw.ndim - 1))
        channels = 2 if window.grid or window.frame_axis == 1 else 1
        channels = -1 if spec.output.endswith("last_axis") else channels
        return torch.cat([raw, raw], channels) if "first_half" in spec.output else raw

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Answer:
        bound = signature.bind(*args, **kwargs).arguments
        if spec.joint is None:
            return Answer((of(bound[spec.sample], spec.window), *[None] * (trace.returned - 1)))
        made = {part.output: of(bound[part.argument], part.window) for part in spec.joint.parts}
        return Answer(made.get(number) for number in range(max(made) + 1))

    return forward
