"""Latents and images from a traced pipeline under any stock scheduler, each sample on its own random numbers."""

import copy
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import first_tensor
from stepdistill.errors import InputError
from stepdistill.generation.inference_guidance import Step, StepRule, classifier_free
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.observe import TraceError, fewest_steps, forked_random, observe, patched, run, stepped
from stepdistill.pipeline.trace import PROBES, Trace
from stepdistill.schedule import from_scheduler


def sample_generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of sample ``index``; it depends on (seed, index, stream) alone.

    torch keeps 32 bits of a seed, so the streams are offsets and indices are added to them: two samples of
    one stream never share random numbers.
    """
    offset = int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((offset + index) % 2**32)


def noise(shape: Sequence[int], seed: int, indices: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (len(indices), *shape), float32 on the CPU; row i depends on (seed, indices[i], stream)."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, int(i), stream)) for i in indices])


def at_once(shape: Sequence[int], numbers: int = 2**18) -> int:
    """How many samples go through a network at once where no recipe says: 250 small ones, 4 of SDXL's at 1024 px.

    Args:
        shape: of one. numbers: that they may have together.
    """
    return max(1, min(250, numbers // torch.Size(shape).numel()))


def _dice(seed: int, indices: Sequence[int], stream: int) -> list[torch.Generator]:
    return [sample_generator(seed, index, stream) for index in indices]


@torch.no_grad()
def generate(
    trace: Trace,
    scheduler: Any,
    conditioning: Conditioning,
    labels_index: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    indices: Sequence[int] | None = None,
    batch: int | None = None,
    timesteps: Sequence[int] | None = None,
    initial: Tensor | None = None,
    onto: Tensor | None = None,
    start: int = 0,
    rule: Callable[[], StepRule] | None = None,
) -> Tensor:
    """Latents (N, *latent_shape), float32; sample i depends on (seed, indices[i]) and its condition alone.

    The scheduler is set up and stepped with the arguments that the pipeline itself would give it.

    Args:
        scheduler: a stock scheduler of the denoiser's prediction type; it is copied, not changed.
        labels_index: entries of ``conditioning``, (N,). guidance: w, 1 is off. indices: N numbers; None: from 0 up.
        batch: samples at once; None: as :func:`at_once`.
        timesteps: explicit timesteps instead of the scheduler's own grid of ``steps``.
        initial: noise (N, *latent_shape) to start from instead of the seed's.
        onto: clean latents (N, *latent_shape) that the noise is put onto, the grid's first ``start`` steps being left
            out (SDEdit, Meng et al. 2022; the image-to-image pipelines); None: from pure noise.
        rule: makes a guidance rule of :mod:`.inference_guidance` for each batch, instead of ``guidance``.

    Raises:
        InputError: the scheduler's prediction type is another, or it cannot make a grid of so many steps.
    """
    denoiser = trace.denoiser
    kind = from_scheduler(scheduler)[1]
    if kind != denoiser.kind:
        raise InputError(
            f"scheduler: expected prediction type {denoiser.kind} (the pipeline's), found {kind} in "
            f"{type(scheduler).__name__}"
        )
    device = next(denoiser.network.parameters()).device
    ready, options = _ready(trace, scheduler, steps, timesteps, device)
    takes_generator = "generator" in inspect.signature(ready.step).parameters
    indices = range(len(labels_index)) if indices is None else indices
    # Schedulers of second order go through each step in two.
    skipped = start * getattr(ready, "order", 1)
    if hasattr(ready, "set_begin_index"):
        ready.set_begin_index(skipped)
    parts, batch = [], batch or at_once(trace.latent_shape)
    for first in range(0, len(labels_index), batch):
        chosen = slice(first, first + batch)
        rows, numbers = labels_index[chosen], indices[chosen]
        cond, null = conditioning.batch(rows)
        x = noise(trace.latent_shape, seed, numbers) if initial is None else initial[chosen]
        x = x.to(device, torch.float32)
        stepper = copy.deepcopy(ready)
        if takes_generator:
            options["generator"] = [sample_generator(seed, i, stream=1) for i in numbers]
        guide, carried = rule() if rule else classifier_free(guidance), {**options, "return_dict": False}
        timesteps = stepper.timesteps
        times = [denoiser.schedule.time(timestep.to(device)).expand(len(x)) for timestep in timesteps]
        times.append(torch.zeros_like(times[0]))
        if onto is None:
            x = x * getattr(ready, "init_noise_sigma", 1.0)
        else:
            x_t = denoiser.schedule.add_noise(onto[chosen].to(x), x, times[skipped])
            x = x_t / _scaled(stepper, torch.ones_like(x), timesteps[skipped])
        for number in range(skipped, len(timesteps)):
            x_t = _scaled(stepper, x, timesteps[number])
            dice = functools.partial(_dice, seed, numbers, 2 + number)
            step = Step(number, x_t, *times[number : number + 2], cond, null, conditioning, rows, dice, seed)
            raw = guide(denoiser, step).raw.to(x.dtype)
            x, carried = stepped(stepper, raw, timesteps[number], x, carried)
        parts.append(x)
    return torch.cat(parts)


def _scaled(scheduler: Any, x: Tensor, timestep: Tensor) -> Tensor:
    """The scheduler's sample as the network takes it: x_t."""
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


@torch.no_grad()
def decode(trace: Trace, latents: Tensor, batch: int | None = None) -> Tensor:
    """Images uint8 (N, C, H, W) of ``latents`` (N, *latent_shape), by the pipeline's own decoding code.

    Of a video its middle frame. ``batch`` None: fewer at once than :func:`at_once`, as autoencoders take more memory.

    The pipeline runs a step, or two, in which the denoiser is silent and the scheduler returns ``latents``.

    Raises:
        TraceError: the pipeline does not return images as a tensor.
    """
    pipeline = trace.pipeline
    network, scheduler = getattr(pipeline, trace.component), pipeline.scheduler
    accepted = inspect.signature(pipeline.__call__).parameters
    silent = stand_in(trace, torch.zeros_like)
    parts = []
    for chunk in latents.split(batch or at_once(trace.latent_shape, 2**16)):
        chunk = chunk.to(next(network.parameters()).device, network.dtype)

        @functools.wraps(scheduler.step)
        def given(*_args: Any, chunk: Tensor = chunk, **_kwargs: Any) -> "_Output":
            # LCM's pipeline takes the denoised latents from the second place.
            return _Output((chunk, chunk))

        probe = PROBES[trace.entry][:1]
        many = {"num_images_per_prompt": len(chunk)} if "num_images_per_prompt" in accepted else {}
        with (
            patched(network, "forward", silent),
            patched(scheduler, "step", given),
            forked_random(chunk.device),
        ):
            entries = probe if many else probe * len(chunk)
            wishes = {"guidance": trace.guidance.plain_scale, "output_type": "pt", **many}
            images = first_tensor(run(pipeline, entries, trace.arguments, steps=fewest_steps(pipeline), **wishes))
        if not isinstance(images, Tensor) or len(images) != len(chunk):
            raise TraceError("decode", f"{type(pipeline).__name__} does not return its images as one tensor")
        if images.ndim == 5:
            images = images[:, images.shape[1] // 2]
        parts.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def stand_in(trace: Trace, answer: Callable[[Tensor], Tensor]) -> Callable[..., "_Output"]:
    """A forward for the pipeline's denoiser that returns ``answer`` of the sample (B, ...), laid out as its own output.

    With it in the network's place a pipeline's call costs no pass through the network.
    """
    spec, own = trace.denoiser.spec, trace.denoiser.network.forward
    signature = inspect.signature(own)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> _Output:
        x = signature.bind(*args, **kwargs).arguments[spec.sample]
        if isinstance(x, list):
            return _Output(([answer(row) for row in x],))
        said = answer(x if spec.appended is None else x.narrow(spec.appended[0], 0, spec.appended[1]))
        return _Output((torch.cat([said, said], 1) if spec.output == "first_half" else said,))

    return forward


class _Output(tuple):
    """One tensor, readable as a tuple and under the names that networks and schedulers return it by."""

    @property
    def sample(self) -> Tensor:
        return self[0]

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def set_up(trace: Trace, scheduler: Any, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of set_timesteps() and of step() that the pipeline itself gives this scheduler in ``steps`` steps.

    Pipelines compute sigmas and shifts for set_timesteps and pass eta to step; one image's first step shows
    both. The result is kept in the trace.
    """
    key = json.dumps([type(scheduler).__name__, dict(scheduler.config), steps], default=str)
    if key not in trace.set_ups:
        with patched(trace.pipeline, "scheduler", copy.deepcopy(scheduler)):
            recording = observe(
                trace.pipeline,
                PROBES[trace.entry][:1],
                trace.arguments,
                steps=steps,
                guidance=trace.guidance.plain_scale,
                stop_steps=1,
            )
        options = {name: value for name, value in recording.steps[0].options.items() if name != "return_dict"}
        trace.set_ups[key] = (recording.grid, options)
    return trace.set_ups[key]


def can_run(trace: Trace, steps: int) -> bool:
    """Whether the pipeline's own scheduler takes so many: few-step ones refuse some that they were not made for."""
    try:
        _ready(trace, trace.pipeline.scheduler, steps, None, torch.device("cpu"))
    except InputError:
        return False
    return True


def passes(trace: Trace, scheduler: Any, steps: int, guidance: float) -> int:
    """Passes through the network per image (NFE): guidance costs a second one at each step where it is on."""
    ready, _ = _ready(trace, scheduler, steps, None, torch.device("cpu"))
    count = len(ready.timesteps)  # more than the steps under schedulers of second order, and PNDM's
    if guidance == 1:
        return count
    if (interval := trace.denoiser.rule.interval) is None:
        return 2 * count
    times = trace.denoiser.schedule.time(ready.timesteps).float()
    return count + int(((interval[0] <= times) & (times <= interval[1])).sum())


def _ready(
    trace: Trace, scheduler: Any, steps: int, timesteps: Sequence[int] | None, device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """(a copy of the scheduler with its grid, the options of its step()), as the pipeline itself would have them."""
    own_grid = timesteps is None
    if own_grid and steps == 1 and (last := scheduler.config.get("shift_terminal")):
        # A grid of one number cannot be stretched down to there.
        kind = type(scheduler).__name__
        raise InputError(f"steps: expected at least 2 under {kind} with shift_terminal {last:g}, found 1")
    grid, options = set_up(trace, scheduler, steps if own_grid else 1)
    ready = copy.deepcopy(scheduler)
    ready.set_timesteps(**(grid if own_grid else {"timesteps": list(timesteps)}), device=device)
    return ready, dict(options)
