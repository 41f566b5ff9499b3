"""Samples whose frames are stepped one by one, each by a copy of the scheduler (diffusion forcing), as one sample."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.observe import Recording, Step
from stepdistill.pipeline.places import place_of, scaled_sample


@dataclass(kw_only=True)
class FrameByFrame(Step):
    """The steps of all frames as one.

    Args:
        frames: one for each.
        axis: of the frames in the sample.
    """

    frames: Sequence[Step]
    axis: int

    def replay(self, model_output: Tensor) -> Tensor:
        """As :meth:`Step.replay`, of all frames."""
        own = zip(self.frames, model_output.unbind(self.axis), strict=True)
        return torch.stack([frame.replay(output) for frame, output in own], self.axis)


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
    return replace(recording, steps=[_whole(step, axis) for step in recording.steps], frames=axis)


def _whole(step: Step, axis: int) -> FrameByFrame:
    frames = [step, *step.others]
    values = {one.name: getattr(step, one.name) for one in fields(Step)} | {"others": []}
    for name in ("sample", "model_output", "previous"):
        values[name] = torch.stack([getattr(frame, name) for frame in frames], axis)
    return FrameByFrame(**values, frames=frames, axis=axis)


def _axis(step: Step) -> int | None:
    """The axis of an argument of the network along which the frames of a step are one sample."""
    frames = [scaled_sample(one) for one in (step, *step.others)]
    arguments = [value for call in step.calls[-1:] for value in call.arguments.values()]
    for axis in range(1, frames[0].ndim + 1):
        whole = torch.stack(frames, axis)
        if any(place_of(value, whole) is not None for value in arguments):
            return axis
    return None
