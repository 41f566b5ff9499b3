"""Set up a scheduler as the pipeline itself does: its grid, the options of its steps, and the passes they cost."""

import copy
import json
from typing import Any

import torch

from stepdistill.diffusion.stock_schedulers import stepped_timesteps
from stepdistill.errors import InputError
from stepdistill.pipeline.components import scheduled
from stepdistill.pipeline.places import options_of_all
from stepdistill.pipeline.trace import Trace


def set_up(trace: Trace, scheduler: Any, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of set_timesteps() and of step() that the pipeline itself gives this scheduler in ``steps`` steps.

    Pipelines compute sigmas and shifts for set_timesteps and pass eta to step; one image's first step shows
    both. The result is kept in the trace.

    Raises:
        InputError: the pipeline samples with another scheduler: one that a pipeline inside it holds.
    """
    key = json.dumps([type(scheduler).__name__, dict(scheduler.config), steps], default=str)
    if key not in trace.set_ups:
        with scheduled(trace.pipeline, copy.deepcopy(scheduler)):
            recording = trace.observe(steps=steps, stop_steps=1)
        if not recording.steps:
            raise InputError(
                f"teacher.pipeline: {type(trace.pipeline).__name__} does not sample with its component 'scheduler' "
                "when another is put there, so that no student's sampler can be"
            )
        options = options_of_all(recording.steps[0].options)
        options.pop("return_dict", None)
        trace.set_ups[key] = (recording.grid, options)
    return trace.set_ups[key]


def can_run(trace: Trace, steps: int) -> bool:
    """Whether the pipeline's own scheduler takes so many: few-step ones refuse some that they were not made for."""
    try:
        ready_scheduler(trace, trace.pipeline.scheduler, steps, torch.device("cpu"))
    except InputError:
        return False
    return True


def passes(trace: Trace, scheduler: Any, steps: int, guidance: float) -> int:
    """Passes through the network per image (NFE): guidance costs further ones at each step where it is on."""
    ready, _ = ready_scheduler(trace, scheduler, steps, torch.device("cpu"))
    timesteps = stepped_timesteps(ready)
    count = len(timesteps)  # more than the steps under schedulers of second order, and PNDM's
    if guidance == 1:
        return count
    guider = trace.denoiser.spec.guider
    further = guider.passes - 1 if guider else max(1, len(trace.denoiser.mix))
    if trace.denoiser.rule.interval is None:
        return (1 + further) * count
    return count + further * int(trace.denoiser.rule.inside(trace.denoiser.schedule.time(timesteps)).sum())


def ready_scheduler(trace: Trace, scheduler: Any, steps: int, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """(a copy of the scheduler with its grid, the options of its step()), as the pipeline itself would have them."""
    if steps == 1 and (last := scheduler.config.get("shift_terminal")):
        # A grid of one number cannot be stretched down to there.
        kind = type(scheduler).__name__
        raise InputError(f"steps: expected at least 2 under {kind} with shift_terminal {last:g}, found 1")
    grid, options = set_up(trace, scheduler, steps)
    ready = copy.deepcopy(scheduler)
    ready.set_timesteps(**grid, device=device)
    return ready, dict(options)
