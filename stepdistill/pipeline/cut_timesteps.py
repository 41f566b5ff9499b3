"""Whether a pipeline cuts off the timesteps of flow to integers itself (SkyReels V2 with diffusion forcing).

Its scheduler's are integers, and under one whose timesteps are not, the pipeline's steps are refused.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.schedule import FlowSchedule, Kind, Schedule, from_scheduler
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.components import scheduled
from stepdistill.pipeline.observe import Recording, observe


def schedule_of(
    pipeline: Any, off: Recording, entries: Sequence[Any] | str, arguments: Mapping[str, Any]
) -> tuple[Schedule, Kind]:
    """The schedule and the prediction kind of the pipeline's scheduler.

    Args:
        off: a run of it.
        entries: of a call for one image.
        arguments: further arguments of the call.

    Raises:
        InputError: see :func:`.from_scheduler`.
    """
    schedule, kind = from_scheduler(pipeline.scheduler, off.grid.get("mu"))
    whole = not pipeline.scheduler.timesteps.is_floating_point()
    if whole and isinstance(schedule, FlowSchedule) and _refuses_fractions(pipeline, entries, arguments):
        schedule = copy.copy(schedule)
        schedule.cut = True
    return schedule, kind


def _refuses_fractions(pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any]) -> bool:
    with scheduled(pipeline, FlowMatchEulerDiscreteScheduler()):
        try:
            observe(pipeline, entries, arguments, steps=2, guidance=1.0, stop_steps=1)
        except TraceError as error:
            return "integer" in error.reason
    return False
