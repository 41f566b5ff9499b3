"""Recorded calls whose conditions have shapes of their own, with the flat rows that the rest of tracing sees."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from stepdistill.diffusion.ragged import Ragged, Rows, found
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.places import passes, scaled_sample
from stepdistill.pipeline.recording import Call, Recording, Runs, Step


def of_own_shapes(runs: Runs, component: str) -> tuple[Runs, Ragged | None]:
    """Both recordings with flat rows, and how they are made; as they are where all rows have one shape.

    Raises:
        TraceError: the calls of another network have such rows.
    """
    for step in runs.steps:
        for call in step.calls:
            if call.component != component and any(isinstance(value, Rows) for value in call.arguments.values()):
                reason = f"the conditions of {call.component}, which feeds {component}, have shapes of their own"
                raise TraceError("conditioning", reason)
    calls = [call.arguments for step in runs.only(component).steps for call in step.calls]
    if (ragged := found(calls)) is None:
        return runs, None
    return runs.each(partial(packed, component=component, ragged=ragged)), ragged


def unpadded(ragged: Ragged, network: nn.Module, runs: Runs) -> Callable[..., Any]:
    """The network as one that takes the flat rows: :meth:`.Ragged.around`."""
    first, second = (run.steps[0].calls[0].arguments for run in runs)  # of other numbers of images
    return ragged.around(network, {name for name, value in first.items() if same(value, second.get(name))})


def packed(run: Recording, component: str, ragged: Ragged) -> Recording:
    """The recording with flat rows in the network's calls."""

    def flat(call: Call, step: Step) -> Call:
        rows = run.count * max(passes(call, scaled_sample(step)[: run.count]), 1)
        return replace(call, arguments=ragged.packed_call(call.arguments, rows))

    return run.with_calls(component, flat)
