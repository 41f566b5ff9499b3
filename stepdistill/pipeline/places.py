"""Find the scheduler's sample among a network's arguments, and the part of it that a pipeline lets be sampled.

As in :mod:`stepdistill.pipeline.explain`, ``off`` is a run of three images without guidance and ``on`` one of two.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import CallSpec
from stepdistill.diffusion.nested import is_list_of_rows
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.diffusion.stock_schedulers import as_network_input
from stepdistill.diffusion.window import Span, Window
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import close, deviation, tolerance
from stepdistill.pipeline.recording import CARRIED, SAMPLES, Call, Recording, Runs, Step

PASSES = 3
"""The most that a guided step takes: a conditional one, one without the text, one without text and picture."""


@dataclass(frozen=True)
class Place:
    """Where an argument holds a sample.

    Args:
        window: where.
        free: the part of the sample that it holds; None: all. The rest is replaced by what is kept, a first frame.
        repeats: how often it holds all rows, one after the other.
    """

    window: Window
    free: Span | None
    repeats: int


def scaled_sample(step: Step) -> Tensor:
    """The latents of a step as its scheduler scales them for the network."""
    return as_network_input(copy.deepcopy(step.scheduler), step.sample, step.timestep)


def only_free(recording: Recording, free: Span | None) -> Recording:
    """The recording as if the scheduler had stepped the free part of its sample alone (None: all of it is).

    Raises:
        TraceError: the scheduler takes more for each part of the sample than its time.
    """
    return recording.each(partial(_part_of, free=free))


def options_of_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a step that are no tensors with a value for each part of the sample (times per token)."""
    return {n: v for n, v in options.items() if n in CARRIED or not isinstance(v, Tensor) or v.ndim < 2}


def _part_of(step: Step, free: Span | None) -> Step:
    """The step as if its scheduler had stepped the free part of the sample alone, with no other option."""
    options = options_of_all(step.options)
    if free is None and len(options) == len(step.options):
        return step
    inside = {name: getattr(step, name) if free is None else free.inside(getattr(step, name)) for name in SAMPLES}
    plain = replace(step, **inside, options=options, replayed=None)
    sign = 1 if len(options) == len(step.options) else _sign(plain, step)

    def replayed(model_output: Tensor) -> Tensor:
        given = sign * model_output
        if free is None:
            return step.replay(given)
        return free.inside(step.replay(free.whole(given, free.outside(step.model_output))))

    return replace(plain, model_output=sign * plain.model_output, replayed=replayed)


def _sign(plain: Step, step: Step) -> int:
    """-1 where the scheduler was given minus what it steps by; ``plain`` is the step without some of its options.

    Raises:
        TraceError: the scheduler steps otherwise without them.
    """
    given = plain.model_output
    error, sign = min((deviation(plain.replay(sign * given.float()), plain.previous), sign) for sign in (1, -1))
    if error <= tolerance(given.dtype):
        return sign
    more, name = ", ".join(step.options.keys() - plain.options.keys()), type(step.scheduler).__name__
    raise TraceError("schedule", f"{name} steps the sample otherwise without {more}, which a student's does not take")


def kept_by_time(spec: CallSpec, step: Step, free: Span | None) -> tuple[CallSpec, Span | None]:
    """(the spec, the free part of the sample), where tokens (B, N, C) whose time is 0 at every step are not part of it.

    Raises:
        TraceError: the time of parts of the sample is 0, and the rest is no range of tokens.
    """
    mask = spec.timestep_mask
    if mask is None or mask.all() or spec.beside or (spec.joint is not None and any(spec.joint.beside)):
        return spec, free
    call = step.calls[0]
    given = call.arguments[spec.sample]
    span = range_of(mask.flatten().bool(), 1) if mask.shape[1:] == given.shape[1:2] == step.sample.shape[1:2] else None
    if span is None:
        raise TraceError(
            "timestep",
            f"'{spec.timestep}' is 0 at every step for parts of the sample that are no range of tokens; one range of "
            "them can be kept, such as a first frame",
        )
    return replace(spec, window=cut_by(Window(spans=(span,)), given, call.output)), span


def sample_argument(runs: Runs, component: str) -> tuple[CallSpec, Span | None, bool]:
    """(a spec that knows the argument which is the scheduler's sample, the sample's free part, whether it is doubled).

    Raises:
        TraceError: there is none.
    """
    (off, on), (found, repeats) = runs, same_places(runs)
    call = off.steps[0].calls[0]
    if not all(step.sample.isfinite().all() for step in runs.steps):
        raise TraceError("sample", f"{component} makes numbers that are not finite in {len(on.steps)} steps")
    if not found or len(repeats) != 1:
        raise TraceError(
            "sample",
            f"no argument of {component} equals the scheduler's sample {list(off.steps[0].sample.shape)}, scaled or "
            f"doubled, or a part of it; its tensors are {tensors_of(call)}",
        )
    name = most_whole(found)
    window, free = found[name].window, found[name].free
    if free is None and window == Window(spans=window.spans) and (free := _not_put_back(off)):
        window = without(window, free)
    given = call.arguments[name]
    window = cut_by(window, given, call.output)
    spec = CallSpec(name, "", window=window, lists=frozenset([name] if isinstance(given, list) else []))
    return spec, free, repeats != {1}


def same_places(runs: Runs) -> tuple[dict[str, Place], set[int]]:
    """(where arguments hold the sample, the same at every call; how often those of guided calls repeat it)."""
    found: dict[str, Place] | None = None
    repeats: set[int] = set()
    for run, step in ((one, step) for one in runs for step in one.steps):
        scaled = scaled_sample(step)[: run.count]
        for call in step.calls:
            here = {name: place for name, value in call.arguments.items() if (place := place_of(value, scaled))}
            once = {name: replace(place, repeats=1) for name, place in here.items()}
            found = once if found is None else {name: place for name, place in found.items() if once.get(name) == place}
            if run is runs.on:
                repeats |= {here[name].repeats for name in found}
    return found or {}, repeats


def most_whole(places: Mapping[str, Place]) -> str:
    """The argument that is the sample as it is, before one that holds more, or less."""
    return min(places, key=lambda name: (places[name].free is not None, len(places[name].window.spans), name))


def tensors_of(call: Call) -> str:
    """The shapes of a call's tensors, for messages."""
    return ", ".join(f"{name} {list(v.shape)}" for name, v in call.arguments.items() if isinstance(v, Tensor))


def cut_by(window: Window, argument: Any, output: Any) -> Window:
    """The window that knows where the network's output is as long as its argument."""
    if not window.spans or not isinstance(output, Tensor) or output.ndim != argument.ndim:
        return window
    axes = (span.axis for span in window.spans)
    return replace(window, cut=frozenset(axis for axis in axes if output.shape[axis] == argument.shape[axis]))


def place_of(value: Any, sample: Tensor) -> Place | None:
    """Where an argument holds the sample (B, ...), or a part of it along one axis; None: it does not."""
    partial = None
    for argument, window in windows(value, sample):
        once = window.laid_out(sample)
        count, rest = divmod(len(argument), len(once))
        if rest or not 1 <= count <= PASSES:
            continue
        laid_out = once.repeat(count, *[1] * (argument.ndim - 1))
        inside = argument
        for span in window.spans:
            inside = span.inside(inside)
        if close(inside, laid_out):
            return Place(window, None, count)
        if partial is None and window == Window(spans=window.spans):
            partial = _partial(inside, laid_out, window, count)
    return partial


def passes(call: Call, sample: Tensor) -> int:
    """How often a call holds all rows of a sample, one for each pass of guidance that it makes; 0: it sees none."""
    places = [place_of(value, sample) for value in call.arguments.values()]
    return max((place.repeats for place in places if place is not None), default=0)


def _partial(inside: Tensor, sample: Tensor, window: Window, count: int) -> Place | None:
    """The place of an argument that is the sample in one range of an axis only."""
    equal = (inside - sample.to(inside)).abs() <= tolerance(inside.dtype) * sample.abs().max()
    for axis in range(1, sample.ndim):
        if free := range_of(equal.movedim(axis, 0).flatten(1).all(1), axis):
            return Place(without(window, free), free, count)
    return None


def without(window: Window, free: Span) -> Window:
    """The window of the free part of a sample whose window is given."""
    spans = {span.axis: span for span in window.spans}
    axis, before, length, after = free
    _, more_before, _, more_after = spans.get(axis, Span(axis, 0, 0, 0))
    spans[axis] = Span(axis, more_before + before, length, more_after + after)
    return replace(window, spans=tuple(spans[key] for key in sorted(spans)))


def _not_put_back(run: Recording) -> Span | None:
    """The part of the sample that is stepped, where the pipeline puts the same in the place of the rest at each step.

    None: it passes on all of the sample, or what it puts there is no range, or another at each step.
    """
    pairs = [(one.previous, other.sample) for one, other in itertools.pairwise(run.steps)]
    first = run.steps[0].sample
    for axis in range(1, first.ndim if pairs else 0):
        equal = torch.stack([(a == b).movedim(axis, 0).flatten(1).all(1) for a, b in pairs]).all(0)
        free = range_of(equal, axis)
        if free and all(torch.equal(free.outside(step.sample), free.outside(first)) for step in run.steps):
            return free
    return None


def range_of(chosen: Tensor, axis: int) -> Span | None:
    """The chosen entries (N,) of an axis where they are some, not all, and next to each other."""
    places = chosen.nonzero().flatten().tolist()
    if not places or len(places) == len(chosen) or places != [*range(places[0], places[-1] + 1)]:
        return None
    return Span(axis, places[0], len(places), len(chosen) - places[-1] - 1)


def windows(value: Any, sample: Tensor) -> Iterator[tuple[Tensor, Window]]:
    """(the argument as a tensor, a window of it) for each way in which shapes let it hold the sample."""
    is_list = is_list_of_rows(value)
    argument = torch.stack(value) if is_list else value
    if not isinstance(argument, Tensor) or not argument.ndim or not argument.is_floating_point():
        return
    plain = [Window()]
    if argument.ndim == sample.ndim + 1:
        plain = [Window(frame_axis=axis) for axis in range(1, argument.ndim) if argument.shape[axis] == 1]
    elif argument.ndim < sample.ndim:
        plain = [Window(grid=tuple(sample.shape[2:]))] if argument.ndim == 3 else []
        if argument.ndim == sample.ndim - 1:
            ways = (RowLayout(each=sample.shape[axis], place=axis) for axis in range(2, sample.ndim))
            plain += [Window(frames=way) for way in ways]
    for window in plain:
        shape = window.laid_out(sample).shape
        if len(shape) != argument.ndim:
            continue
        longer = [own - length for own, length in zip(argument.shape, shape, strict=True)]
        axes = [axis for axis in range(1, len(shape)) if longer[axis] > 0]
        if any(own < 0 for own in longer[1:]) or (axes and is_list):
            continue
        # What is beside the sample is behind it, before it, or half of it at each end (a first and a last frame).
        for before in itertools.product(*(dict.fromkeys((0, longer[a], longer[a] // 2)) for a in axes)):
            spans = (Span(a, b, shape[a], longer[a] - b) for a, b in zip(axes, before, strict=True))
            yield argument, replace(window, spans=tuple(spans))
