"""Denoisers that take turns (the experts of Wan 2.2): which network a pipeline calls at which timestep.

Networks of one class, of which the pipeline calls one at each step, are experts. Recorded calls of them are read as
those of one network, so that every other fact about them has to hold for all. The timestep at which the pipeline
changes from one to the next is found by calling it: its scheduler is given timesteps of our choice, a fixed tensor
stands in for its networks' outputs, and the place of the change is narrowed down until it is between two neighbouring
numbers of float32, in which pipelines compare.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.experts import Turn
from stepdistill.errors import first_line
from stepdistill.pipeline.call import TraceError, run
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.observe import Answer
from stepdistill.pipeline.probe_call import ProbeCall
from stepdistill.pipeline.recording import Recording, forked_random

CALLED = "a call at timesteps of our choice does not show which of them runs when"
PROBES = 400
"""Timesteps of a call: three calls narrow 1000 timesteps down to neighbours in float32."""


def alike(recording: Recording, networks: Mapping[str, nn.Module]) -> list[str]:
    """The networks of the class of the last one that is called at the last step: the denoiser, or its experts."""
    calls = recording.steps[-1].calls
    last = type(networks[calls[-1].component]) if calls else None
    return [name for name, network in networks.items() if type(network) is last]


def as_one(recording: Recording, names: Sequence[str]) -> Recording:
    """The recording as if one network had answered all calls of ``names``, that of the first step.

    Its ``experts`` are the networks that answered, step by step.
    """
    called = [[call.component for call in step.calls if call.component in names] for step in recording.steps]
    if not all(called):
        return recording
    for name in names:
        recording = recording.with_calls(name, lambda call, _: replace(call, component=called[0][0]))
    return replace(recording, experts=[names[-1] for names in called])


def steps_of(name: str, recording: Recording) -> Recording:
    """The recording's steps at which the network ``name`` was called."""
    steps = [step for step, called in zip(recording.steps, recording.experts, strict=True) if called == name]
    return replace(recording, steps=steps)


def turns_of(call: ProbeCall, names: Sequence[str], off: Recording, scale: float) -> dict[str, Turn]:
    """When each of ``names`` is called, from the noise end to the clean end; empty where one network has all times.

    Args:
        off: a run without guidance, as one network's.
        scale: the pipeline's guidance scale in it.

    Raises:
        TraceError: which one is called is no matter of the timestep alone.
    """
    if len(names) < 2:
        return {}
    together, answer = " and ".join(names), off.steps[0].calls[-1].output[:1]
    called = functools.partial(_called, call, names, answer, scale)
    high = float(off.steps[0].timestep)
    values = torch.linspace(high, 0.0, PROBES)
    seen = called(values)
    blocks = [name for name, _ in itertools.groupby(seen)]
    if len(blocks) == 1:
        return {}
    if len(set(blocks)) < len(blocks):
        raise TraceError("denoiser", f"{together} take turns more than once between noise and image")
    lowest = {name: values[i] for i, name in enumerate(seen)}
    highest = {name: values[i] for i, name in reversed([*enumerate(seen)])}
    for name, following in itertools.pairwise(blocks):
        lowest[name] = _lowest(called, name, lowest[name], highest[following])
    turns = {name: Turn(float(lowest[name])) for name in blocks[:-1]} | {blocks[-1]: Turn(0.0)}
    for step, name in zip(off.steps, off.experts, strict=True):
        if name != next(one for one, turn in turns.items() if float(step.timestep) >= turn.lowest):
            raise TraceError("denoiser", f"which of {together} is called does not depend on the timestep alone")
    return turns


def _lowest(called: Any, name: str, high: Tensor, low: Tensor) -> Tensor:
    """The lowest timestep, a number of float32, at which ``name`` is called: ``high`` is one such, ``low`` is none."""
    while torch.nextafter(high, low) > low:
        inside = torch.linspace(float(high), float(low), PROBES, dtype=torch.float64).float().unique().flip(0)
        inside = inside[(inside < high) & (inside > low)]
        seen = called(inside)
        count = sum(one == name for one in seen)
        high, low = inside[count - 1] if count else high, inside[count] if count < len(inside) else low
    return high


def _called(call: ProbeCall, names: Iterable[str], answer: Tensor, scale: float, values: Tensor) -> list[str]:
    """The network of ``names`` that is called at each of the timesteps ``values`` (N,); each returns ``answer``."""
    pipeline, scheduler, seen, last = call.pipeline, call.pipeline.scheduler, [], [""]
    own = scheduler.set_timesteps

    @functools.wraps(own)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        scheduler.timesteps = values.to(scheduler.timesteps.device)

    @functools.wraps(scheduler.step)
    def step(_model_output: Tensor, _timestep: Any, sample: Tensor, *_: Any, **__: Any) -> Answer:
        seen.append(last[0])
        return Answer((sample,))

    with ExitStack() as stack:
        stack.enter_context(forked_random(getattr(pipeline, "_execution_device", torch.device("cpu"))))
        stack.enter_context(patched(scheduler, "set_timesteps", set_timesteps))
        stack.enter_context(patched(scheduler, "step", step))
        for name in names:
            network = getattr(pipeline, name)

            @functools.wraps(network.forward)
            def forward(*_: Any, _name: str = name, **__: Any) -> Answer:
                last[0] = _name
                return Answer((answer,))

            stack.enter_context(patched(network, "forward", forward))
        try:
            run(pipeline, call.one, call.arguments, steps=len(values), guidance=scale, output_type="latent")
        except Exception as error:
            reason = first_line(error)
            raise TraceError("denoiser", f"{' and '.join(names)} are of one class, and {CALLED}: {reason}") from error
    if len(seen) != len(values):
        raise TraceError("denoiser", f"{' and '.join(names)} are of one class, and {CALLED}: it takes others")
    return seen
