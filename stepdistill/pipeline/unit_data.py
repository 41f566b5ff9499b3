"""Schedulers that carry data of another deviation than 1 (TrigFlow's of Sana Sprint), replaced by ones of unit data.

Students start from noise of deviation 1. A pipeline that reads the deviation off its scheduler multiplies the noise by
it, and divides what its network and its autoencoder get. So its networks get the same under either scheduler, which two
runs have to show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.components import put, scheduled
from stepdistill.pipeline.observe import Recording, observe

STEPS = 2
"""Of the two runs; the grid that diffusers' scheduler of TrigFlow has by default is one of two steps."""


def with_unit_data(pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any]) -> None:
    """Make the pipeline's scheduler one of unit data, where it is TrigFlow's and the networks get the same under it.

    Args:
        entries: of the pipeline's call.
        arguments: further arguments of it.
    """
    config = getattr(pipeline.scheduler, "config", {})
    if config.get("prediction_type") != "trigflow" or config["sigma_data"] == 1:
        return
    unit = type(pipeline.scheduler).from_config(config, sigma_data=1.0)
    watched = {"steps": STEPS, "guidance": 1.0, "stop_steps": STEPS}
    try:
        own = observe(pipeline, entries, arguments, **watched)
        with scheduled(pipeline, unit):
            other = observe(pipeline, entries, arguments, **watched)
    except TraceError:  # tracing itself reports it, if it is one
        return
    if _same_calls(own, other):
        put(pipeline, "scheduler", unit)


def _same_calls(one: Recording, other: Recording) -> bool:
    calls = [[call for step in run.steps for call in step.calls] for run in (one, other)]
    return len(calls[0]) == len(calls[1]) and all(
        same(value, second.arguments.get(name))
        for first, second in zip(*calls, strict=True)
        for name, value in first.arguments.items()
    )
