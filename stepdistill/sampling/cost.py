"""Cost of a sampler, measured after a warm-up run, which loads kernels and fills caches."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.generate import generate
from stepdistill.sampling.meter import metered

REPEATS = 3


def sampling_cost(
    trace: Trace,
    conditioning: Conditioning,
    scheduler: Any,
    *,
    steps: int,
    guidance: float,
    batch: int,
) -> dict[str, float]:
    """The cost of images from encoded conditions to pixels, measured now on the pipeline's device.

    Returns:
        latency_seconds: median of warm runs at batch 1. seconds_per_image: of a warm run at ``batch``, median over
        images. peak_memory_mib: at ``batch``. flops: of one image as torch counts them, matrix products and
        convolutions, guidance's second pass and decoding included. parameters: of the denoiser.
    """
    images = _drawing(trace, conditioning, scheduler, steps, guidance)
    with FlopCounterMode(display=False) as counter:
        images(1)
    latency, _ = _warm_median(lambda: images(1), _device(trace), REPEATS)
    many = throughput(trace, conditioning, scheduler, steps=steps, guidance=guidance, batch=batch)
    return many | {"latency_seconds": latency, "batch": batch, "flops": counter.get_total_flops()}


def throughput(
    trace: Trace,
    conditioning: Conditioning,
    scheduler: Any,
    *,
    steps: int,
    guidance: float,
    batch: int,
    repeats: int | None = None,
) -> dict[str, float]:
    """seconds_per_image, peak_memory_mib and parameters of :func:`sampling_cost`, which takes longer.

    Args:
        repeats: warm runs; None: as many as there.
    """
    images = _drawing(trace, conditioning, scheduler, steps, guidance)
    seconds, memory = _warm_median(lambda: images(batch), _device(trace), repeats or REPEATS)
    parameters = sum(p.numel() for p in trace.denoiser.network.parameters())
    return {"seconds_per_image": seconds / batch, "peak_memory_mib": memory, "parameters": parameters}


def _device(trace: Trace) -> torch.device:
    return next(trace.denoiser.network.parameters()).device


def _drawing(
    trace: Trace, conditioning: Conditioning, scheduler: Any, steps: int, guidance: float
) -> Callable[[int], None]:
    """A function that makes so many images and forgets them."""

    def images(count: int) -> None:
        rows = torch.arange(count) % len(conditioning)
        options = {"steps": steps, "guidance": guidance, "seed": 0, "batch": count}
        decode(trace, generate(trace, scheduler, conditioning, rows, **options), batch=count)

    return images


def _warm_median(work: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float]:
    """(median seconds, largest peak in MiB) over ``repeats`` runs after one that is not counted."""
    work()
    costs = []
    for _ in range(repeats):
        with metered(device) as cost:
            work()
        costs.append(cost)
    return statistics.median(cost.seconds for cost in costs), max(cost.peak_memory_mib for cost in costs)
