"""Samples whose frames are stepped one by one, each by a copy of the scheduler (diffusion forcing), as one sample."""

from dataclasses import replace
from functools import partial

import torch

from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.places import place_of, scaled_sample
from stepdistill.pipeline.recording import Recording, Step, several_as_one


def as_one(recording: Recording) -> Recording:
    """The recording as one of samples with all frames; as it is where the scheduler steps whole samples.

    Raises:
        TraceError: what the copies step are no frames of an argument of the network, or not the same at each step.
    """
    if not recording.apart or recording.frames is not None:
        return recording
    axis = _axis(recording.steps[0])
    if axis is None or len({len(step.others) for step in recording.steps}) > 1:
        raise TraceError("components", "the pipeline steps copies of its scheduler, and not all frames at each step")
    pack, unpack = partial(torch.stack, dim=axis), partial(torch.unbind, dim=axis)
    whole = recording.each(lambda step: several_as_one([step, *step.others], pack, unpack, others=[]))
    return replace(whole, frames=axis)


def _axis(step: Step) -> int | None:
    """The axis of an argument of the network along which the frames of a step are one sample."""
    frames = [scaled_sample(one) for one in (step, *step.others)]
    arguments = [value for call in step.calls[-1:] for value in call.arguments.values()]
    for axis in range(1, frames[0].ndim + 1):
        whole = torch.stack(frames, axis)
        if any(place_of(value, whole) is not None for value in arguments):
            return axis
    return None
