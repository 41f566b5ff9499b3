"""What a trace has learned, held to the pipeline's own steps: its schedule, and every recorded step replayed."""

import copy

import torch

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
        TraceError: it is above 1e-5 (float32).
    """
    with noting_inputs(denoiser.network):
        worst = _largest_error(runs, denoiser, guidance, conditions)
    limit = max(SELF_TEST_LIMIT, tolerance(runs.on.steps[0].calls[0].output.dtype)) + denoiser.schedule.rounding
    if not worst <= limit:
        raise TraceError("self-test", f"a replayed step is off the pipeline's own by {worst:.1e} (limit {limit:.0e})")
    return worst


def _largest_error(runs: Runs, denoiser: Denoiser, guidance: Guidance, conditions: list[str]) -> float:
    worst = 0.0
    # An embedded scale is a constant of the network, learned at the scale of the guided run.
    for recording in (runs.on,) if guidance.kind == "embedded" else runs:
        for step in recording.steps:
            n = recording.count
            x_t = scaled_sample(step)[:n]
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
            worst = max(worst, deviation(step.replay(torch.cat([raw] * copies)), step.previous))
    return worst
