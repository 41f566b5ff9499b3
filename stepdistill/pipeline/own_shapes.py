"""Recorded calls whose conditions have shapes of their own, with the flat rows that the rest of tracing sees."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from stepdistill.diffusion.ragged import Ragged, Rows, found
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.observe import Call, Recording, Step, calls_of
from stepdistill.pipeline.places import passes, scaled_sample


def of_own_shapes(off: Recording, on: Recording, component: str) -> tuple[Recording, Recording, Ragged | None]:
    """Both recordings with flat rows, and how they are made; as they are where all rows have one shape.

    Raises:
        TraceError: the calls of another network have such rows.
    """
    for step in (*off.steps, *on.steps):
        for call in step.calls:
            if call.component != component and any(isinstance(value, Rows) for value in call.arguments.values()):
                reason = f"the conditions of {call.component}, which feeds {component}, have shapes of their own"
                raise TraceError("conditioning", reason)
    calls = [call.arguments for run in (off, on) for step in run.steps for call in calls_of(step.calls, component)]
    if (ragged := found(calls)) is None:
        return off, on, None
    return packed(off, component, ragged), packed(on, component, ragged), ragged


def unpadded(ragged: Ragged, network: nn.Module, off: Recording, on: Recording) -> Callable[..., Any]:
    """The network as one that takes the flat rows: :meth:`.Ragged.around`."""
    first, second = (run.steps[0].calls[0].arguments for run in (off, on))  # of other numbers of images
    return ragged.around(network, {name for name, value in first.items() if same(value, second.get(name))})


def packed(run: Recording, component: str, ragged: Ragged) -> Recording:
    """The recording with flat rows in the network's calls."""

    def flat(call: Call, step: Step) -> Call:
        rows = run.count * max(passes(call, scaled_sample(step)[: run.count]), 1)
        return replace(call, arguments=ragged.packed_call(call.arguments, rows))

    return run.with_calls(component, flat)
