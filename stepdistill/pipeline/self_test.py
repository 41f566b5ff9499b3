"""What a trace has learned, held to the pipeline's own steps: its schedule, and every recorded step replayed."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import Kind, Schedule
from stepdistill.diffusion.stock_schedulers import as_network_input, stepped_timesteps
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.explain import Guidance, received_timestep
from stepdistill.pipeline.places import scaled_sample
from stepdistill.pipeline.recording import CARRIED, Runs, Step, forked_random, stepped
from stepdistill.roles.views import noting_inputs

SELF_TEST_LIMIT = 1e-5
ROUNDING = 1e-6
"""How far samples of one computation may be apart, relative to the largest number."""
UNSTEADY_LIMIT = 1e-4
"""What no network may be off by, however much it makes of rounding."""
SCHEDULE_LIMIT = 0.1


def check_schedule(step: Step, schedule: Schedule, kind: Kind) -> None:
    """A scheduler that gets exact outputs for a known image must arrive at that image."""
    scheduler = copy.deepcopy(step.scheduler)
    device = step.sample.device
    if begin := getattr(scheduler, "begin_index", None):
        raise TraceError(
            "schedule",
            f"the pipeline begins at step {begin + 1} of its grid; students are trained from pure noise",
        )
    with forked_random(device):
        x0 = torch.rand(step.sample.shape, device=device) * 1.6 - 0.8
        eps = torch.randn(step.sample.shape, device=device)
        x, options = None, {name: None for name in step.options if name in CARRIED} | {"return_dict": False}
        for timestep in stepped_timesteps(scheduler):
            t = schedule.time(timestep.to(device)).expand(len(x0))
            if x is None:
                unit = torch.ones_like(x0)
                x = schedule.add_noise(x0, eps, t) / as_network_input(scheduler, unit, timestep)
            x_t = as_network_input(scheduler, x, timestep)
            x, options = stepped(scheduler, schedule.from_x0(x0, x_t, t, kind), timestep, x, options)
    error = float((x - x0).square().mean().sqrt() / x0.square().mean().sqrt())
    if not error <= SCHEDULE_LIMIT:
        raise TraceError(
            "schedule",
            f"{type(step.scheduler).__name__}, given exact {kind} predictions of an image, does not arrive at it "
            f"(off by {error:.1e})",
        )


def self_test(runs: Runs, denoiser: Denoiser, guidance: Guidance, conditions: list[str]) -> float:
    """The largest relative error of the recorded steps replayed with the learned description.

    Layers that the network gives their input by name are noted on the way (:func:`.views.noting_inputs`).

    Raises:
        TraceError: it is above 1e-5 (float32), or above what rounding of 1e-6 makes of the network's samples.
    """
    with noting_inputs(denoiser.network):
        replayed = list(_replays(runs, denoiser, guidance, conditions))
        worst = max(deviation(ours, own) for ours, own in replayed)
        limit = max(SELF_TEST_LIMIT, tolerance(runs.on.steps[0].calls[0].output.dtype)) + denoiser.schedule.rounding
        if limit < worst <= UNSTEADY_LIMIT:  # of a network that makes much of rounding no replay is nearer
            moved = _replays(runs, denoiser, guidance, conditions, ROUNDING)
            limit = max(limit, *(deviation(other, ours) for (other, _), (ours, _) in zip(moved, replayed, strict=True)))
    if not worst <= limit:
        raise TraceError("self-test", f"a replayed step is off the pipeline's own by {worst:.1e} (limit {limit:.0e})")
    return worst


def _replays(
    runs: Runs, denoiser: Denoiser, guidance: Guidance, conditions: list[str], rounding: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every recorded step as the description has it, and as the pipeline made it.

    Args:
        rounding: how far samples are moved before, relative to the largest number.
    """
    # An embedded scale is a constant of the network, learned at the scale of the guided run.
    for recording in (runs.on,) if guidance.kind == "embedded" else runs:
        for step in recording.steps:
            n = recording.count
            x_t = scaled_sample(step)[:n]
            if rounding:
                signs = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)).sign().to(x_t)
                x_t = x_t + rounding * x_t.abs().max() * signs
            timestep = received_timestep(step, denoiser.spec, denoiser.schedule)
            t = denoiser.schedule.time(timestep.to(x_t.device)).expand(n)
            if recording is runs.on:
                cond, null = guidance.split(step.calls, denoiser.spec, conditions, n)
                scale = 1.0 if null is None else guidance.w
                prediction = guided(denoiser, x_t, t, cond, null, scale)
            else:
                prediction = denoiser(x_t, t, denoiser.spec.conditions(step.calls[0].arguments, conditions))
            raw = prediction.raw.to(step.model_output.dtype)
            copies = len(step.sample) // n
            yield step.replay(torch.cat([raw] * copies)), step.previous  # ty: ignore[invalid-yield], recorded ones have it
