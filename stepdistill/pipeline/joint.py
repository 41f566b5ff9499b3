"""Several samples that a pipeline steps in one iteration, read as one: a video by its scheduler, its sound by a copy.

The recorded steps of all samples become one step of the packed sample, and the network's calls get the packed argument
and output (:class:`stepdistill.diffusion.joint.Joint`), so that the rest of tracing sees one sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from stepdistill.diffusion.joint import Joint, Part
from stepdistill.diffusion.window import Window
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, same, single_value
from stepdistill.pipeline.places import (
    Place,
    cut_by,
    most_whole,
    only_free,
    options_of_all,
    place_of,
    range_of,
    same_places,
    scaled_sample,
    tensors_of,
)
from stepdistill.pipeline.recording import Call, Recording, Runs, Step, several_as_one


def as_one(runs: Runs, component: str) -> tuple[Runs, Joint | None]:
    """Both recordings with one sample, and how it is made of several; as they are where there is one.

    Raises:
        TraceError: not every step has the same samples, or the network does not take or return one of them.
    """
    others = runs.steps[0].others
    if not others:
        return runs, None
    if kept := [list(one.sample.shape[1:]) for one in others if same(one.previous, one.sample)]:
        raise TraceError(
            "sample",
            f"a copy of the pipeline's scheduler steps a second sample {kept[0]} and leaves it as it is: it is drawn "
            "for each call, and no student can be trained for it",
        )
    if len({len(step.others) for step in runs.steps}) > 1:
        raise TraceError("components", "the pipeline's copies of its scheduler step at some of its steps only")
    joint = Joint(tuple(_part(runs, component, number) for number in range(1 + len(others))))
    return runs.each(partial(joined, joint=joint, component=component)), joint


def joined(recording: Recording, joint: Joint | None, component: str) -> Recording:
    """The recording as one of the packed sample."""
    if joint is None:
        return recording

    def call_of_all(call: Call, _: Step) -> Call:
        output = joint.output(call.outputs)
        return Call(component, joint.packed_call(call.arguments), output, [output])

    return recording.each(partial(_whole, joint=joint)).with_calls(component, call_of_all)


def _whole(step: Step, joint: Joint) -> Step:
    """The steps of all samples of an iteration as one."""
    own = [_own(_of(step, number), part) for number, part in enumerate(joint.parts)]
    return several_as_one(own, joint.packed, joint.split, options=options_of_all(step.options), others=[])


def again(joint: Joint, step: Step, component: str) -> tuple[Joint, Step]:
    """The joint and the step as one, of a step at another size.

    Raises:
        TraceError: it has not the samples that the joint has.
    """
    parts = []
    for number, part in enumerate(joint.parts):
        own = _of(step, number)
        place = place_of(own.calls[0].arguments[part.argument], scaled_sample(own))
        if place is None:
            raise TraceError("size", f"'{part.argument}' is not the sample")
        if part.free is not None:
            place = _kept_by_time(place, part.argument, [own])
        parts.append(_made(part.argument, place, own, part.output))
    joint = Joint(tuple(parts))
    return joint, joined(Recording(1, [step]), joint, component).steps[0]


def around(joint: Joint | None, network: nn.Module) -> Callable[..., Any]:
    """The network as one that takes the packed sample and returns the packed prediction."""
    if joint is None:
        return network

    def call(**arguments: Any) -> Tensor:
        return joint.output(network(**joint.network_call(arguments)))

    return call


def _of(step: Step, number: int) -> Step:
    """The step of the part of this number, with the calls of its iteration."""
    return replace(step.others[number - 1], calls=step.calls) if number else step


def _own(step: Step, part: Part) -> Step:
    return only_free(Recording(1, [step]), part.free).steps[0]


def _part(runs: Runs, component: str, number: int) -> Part:
    """The part of this number."""
    runs = runs.each(lambda run: run.each(partial(_of, number=number))).only(component)
    places, _ = same_places(runs)
    found = {name: place for name, place in places.items() if place.window.frames is None}
    step = runs.off.steps[0]
    if not found:
        raise TraceError(
            "sample",
            f"the pipeline steps several samples at once, and no argument of {component} equals that of "
            f"{list(step.sample.shape)}; its tensors are {tensors_of(step.calls[0])}",
        )
    name = most_whole(found)
    return _made(name, _kept_by_time(found[name], name, runs.off.steps), step)


def _kept_by_time(place: Place, argument: str, steps: Sequence[Step]) -> Place:
    """The place without the tokens (B, N, C) whose time is 0, as :func:`.places.kept_by_time` leaves them out."""
    each = [step.calls[0].arguments for step in steps]
    shape = each[0][argument].shape[:2]
    if place.window != Window() or place.free is not None or shape != steps[0].sample.shape[:2]:
        return place
    for name, value in each[0].items():
        found = [single_value(one[name]) for one in each] if isinstance(value, Tensor) and value.shape == shape else []
        if not found or None in found or found[0][1] is None:
            continue
        changes = len(steps) == 1 or not all(same(number, found[0][0]) for number, _ in found)  # a mask does not
        if changes and (span := range_of(found[0][1].flatten().bool(), 1)):
            return replace(place, window=Window(spans=(span,)), free=span)
    return place


def _made(argument: str, place: Place, step: Step, output: int | None = None) -> Part:
    """The part at a place of an unguided step's call; ``output`` None: it is the one that the scheduler was given."""
    call, errors = step.calls[0], {}
    given = _own(step, Part(argument, place.window, (), 0, place.free)).model_output
    for index, raw in enumerate(call.outputs) if output is None else ():
        try:
            made = cut_by(place.window, call.arguments[argument], raw).prediction(raw)
        except (RuntimeError, IndexError):  # it is not laid out as the argument
            continue
        errors[index] = min(deviation(sign * made, given) for sign in (1, -1))
    chosen = output if output is not None else min(errors, key=lambda index: errors[index], default=None)
    if chosen is None:
        raise TraceError("output", f"no output of the network is laid out as its argument '{argument}'")
    window = cut_by(place.window, call.arguments[argument], call.outputs[chosen])
    return Part(argument, window, tuple(given.shape[1:]), chosen, place.free)
