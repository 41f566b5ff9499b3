"""The scheduler that a pipeline is traced with: one that a student can have, and the schedule that it stands for.

Students are trained to predict a mean, and start from noise of deviation 1. So a scheduler of learned variance gives
way to one that takes the mean alone, and one whose data have another deviation than 1 (TrigFlow's of Sana Sprint) to
one of unit data. A pipeline that reads the deviation off its scheduler multiplies the noise by it, and divides what its
network and its autoencoder get: its networks get the same under either, which two runs have to show.
"""

import copy

from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.schedule import FlowSchedule, Kind, Schedule, from_scheduler
from stepdistill.diffusion.stock_schedulers import without_learned_variance
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import same_in
from stepdistill.pipeline.components import put, scheduled
from stepdistill.pipeline.probe_call import ProbeCall
from stepdistill.pipeline.recording import Recording

STEPS = 2
"""Of the two runs; the grid that diffusers' scheduler of TrigFlow has by default is one of two steps."""


def replace_scheduler(call: ProbeCall) -> None:
    """Put the scheduler that a student can have in the place of one that learns a variance, or is not of unit data."""
    pipeline = call.pipeline
    if not hasattr(pipeline, "scheduler"):
        return
    put(pipeline, "scheduler", without_learned_variance(pipeline.scheduler))
    config = getattr(pipeline.scheduler, "config", {})
    if config.get("prediction_type") != "trigflow" or config["sigma_data"] == 1:
        return
    unit = type(pipeline.scheduler).from_config(config, sigma_data=1.0)
    watched = {"steps": STEPS, "guidance": 1.0, "stop_steps": STEPS}
    try:
        own = call.observe(**watched)
        with scheduled(pipeline, unit):
            other = call.observe(**watched)
    except TraceError:  # tracing itself reports it, if it is one
        return
    if _same_calls(own, other):
        put(pipeline, "scheduler", unit)


def _same_calls(one: Recording, other: Recording) -> bool:
    calls = [[call for step in run.steps for call in step.calls] for run in (one, other)]
    alike = len(calls[0]) == len(calls[1])
    return alike and all(same_in(first.arguments, second.arguments) for first, second in zip(*calls, strict=True))


def schedule_of(call: ProbeCall, off: Recording) -> tuple[Schedule, Kind]:
    """The schedule and the prediction kind of the pipeline's scheduler; ``off`` is a run of it.

    Raises:
        InputError: see :func:`.from_scheduler`.
    """
    scheduler = call.pipeline.scheduler
    schedule, kind = from_scheduler(scheduler, off.grid.get("mu"))
    whole = not scheduler.timesteps.is_floating_point()
    if whole and isinstance(schedule, FlowSchedule) and _refuses_fractions(call):
        schedule = copy.copy(schedule)
        schedule.cut = True
    return schedule, kind


def _refuses_fractions(call: ProbeCall) -> bool:
    """Whether the pipeline cuts off the timesteps of flow to integers itself (SkyReels V2 with diffusion forcing).

    Its steps are refused under a scheduler whose timesteps are not.
    """
    with scheduled(call.pipeline, FlowMatchEulerDiscreteScheduler()):
        try:
            call.observe(steps=2, guidance=1.0, stop_steps=1)
        except TraceError as error:
            return "integer" in error.reason
    return False
