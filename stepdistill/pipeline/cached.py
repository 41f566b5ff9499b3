"""Networks that keep what they made of a step's references for the steps after it (FLUX.2 Klein KV).

Their calls at later steps leave the references out. They are read as calls like the first one, with the sample and the
time of their own step, where the network gives on those what it gave: a student, at any step, is called like that.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stepdistill.pipeline.compare import gives
from stepdistill.pipeline.places import place_of, scaled_sample
from stepdistill.pipeline.recording import Call, Recording, Step, calls_of


def as_first(recording: Recording, networks: Mapping[str, nn.Module]) -> Recording:
    """The recording with calls like those of the first step, where later ones have other arguments."""
    first = recording.steps[0]

    def as_first_one(step: Step) -> Step:
        calls, models = [], {name: iter(calls_of(first.calls, name)) for name in networks}
        for call in step.calls:
            model = next(models[call.component], call)
            changed = model.arguments.keys() != call.arguments.keys()
            calls.append(_filled(call, step, model, first, networks[call.component]) if changed else call)
        return replace(step, calls=calls)

    return recording.each(as_first_one)


def _filled(call: Call, step: Step, model: Call, first: Step, network: nn.Module) -> Call:
    """The call with the arguments of ``model``, if the network gives the same; else as it is."""
    arguments = {
        name: _of_step(value, call.arguments.get(name), step, first) for name, value in model.arguments.items()
    }
    return replace(call, arguments=arguments) if gives(network, arguments, call.outputs[:1]) else call


def _of_step(value: Any, own: Any, step: Step, first: Step) -> Any:
    """What stands for the first step's ``value`` at a later one, where the argument is ``own``."""
    place = place_of(value, scaled_sample(first))
    if place is not None and place.free is None:
        sample = scaled_sample(step)
        sample = sample.repeat(place.repeats, *[1] * (sample.ndim - 1))
        return place.window.argument(sample, place.window.beside(value)).to(value)
    return own if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape else value
