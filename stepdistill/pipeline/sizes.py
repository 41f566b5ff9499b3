"""A traced pipeline at another size of picture.

What depends on the size is recorded again: the latents' shape, the network's constants (position ids), the shift of the
grid, conditions (SDXL's sizes). All else is taken from the trace, and held to the pipeline's own step at that size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepdistill.data.sample import Pictures
from stepdistill.diffusion.denoiser import CallSpec, Conditions, Helper
from stepdistill.diffusion.schedule import FlowSchedule, Schedule, from_scheduler
from stepdistill.diffusion.window import Span
from stepdistill.errors import InputError, first_line
from stepdistill.pipeline import always, explain, joint
from stepdistill.pipeline.call import TraceError, entry_argument, fewest_steps, run
from stepdistill.pipeline.compare import close, deviation, rows_equal, single_value, tolerance
from stepdistill.pipeline.conditioning import Conditioning, encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.frames import as_one
from stepdistill.pipeline.live import live
from stepdistill.pipeline.modular import free_hooks
from stepdistill.pipeline.places import cut_by, kept_by_time, only_free, place_of, scaled_sample, without
from stepdistill.pipeline.recording import Call, Recording, Step, forked_random
from stepdistill.pipeline.stock_call import parameters
from stepdistill.pipeline.students import routed
from stepdistill.pipeline.trace import PROBES, Trace, shapes_of, trace
from stepdistill.roles.views import noting_inputs

Size = tuple[int, int]
"""Height and width of a picture in pixels."""

HIGHEST_MULTIPLE = 128

LARGE = 2**13
"""Numbers in one sample's noise above which a pipeline is traced at a smaller size."""
SMALL_SIZES = ((64, 96), (128, 192), (256, 384))
FEW_FRAMES = (9, 25)
"""One more than a multiple of 8, and of 6 as well: what compresses time takes no others."""


def in_words(size: Size) -> str:
    """A size as messages and files name it: HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def at_size(trace: Trace, size: Size, key: str = "size") -> Trace:
    """The same pipeline, called with this height and width, which ``key`` states in messages.

    Raises:
        InputError: the pipeline takes no height and width, or makes no pictures of this size.
    """
    problem, sized, name = "", None, type(trace.pipeline).__name__
    if lacking := {"height", "width"} - parameters(trace.pipeline).keys():
        raise InputError(f"{key}: {name} takes no {' and no '.join(sorted(lacking))}: its pictures have one size")
    if (router := trace.denoiser.spec.router) is not None:
        return routed(at_size(routed(trace, trace.network, None), size, key), trace.denoiser.network, router)
    try:
        sized = recorded(trace, _with_size(trace, size))
        if (made := picture_size(sized)) != size:
            problem = f"it makes pictures of {in_words(made)}"
    except TraceError as error:
        problem = error.reason.rstrip(".")
    if sized is None or problem:
        number = multiple(trace)
        known = f"; it takes multiples of {number}" if number else ""
        raise InputError(f"{key}: {name} cannot make pictures of {in_words(size)} (height x width): {problem}{known}")
    return sized


def trace_small(pipeline: Any, arguments: Mapping[str, Any] | None = None) -> Trace:
    """:func:`.trace`, of a large picture or video at the smallest size that its call takes.

    A trace is some thirty calls of the denoiser, guided ones of several prompts among them. At the size that is stated
    (the pipeline's own, where ``arguments`` state none) one unguided step of one prompt confirms what was learned.
    """
    arguments = dict(arguments or {})
    entry, steps = entry_argument(pipeline), fewest_steps(pipeline)
    shape = noise_shape(pipeline, PROBES[entry][:1], arguments, steps)
    if shape is None and entry == "prompt":  # whose call may take one prompt and no list
        shape = noise_shape(pipeline, PROBES[entry][0], arguments, steps)
    for small in _smaller(pipeline) if shape is not None and shape.numel() > LARGE else ():
        try:
            with quiet():  # of the sizes that it does not take
                traced = trace(pipeline, arguments | small)
                own = {name: (arguments if name in small else traced.arguments)[name] for name in arguments}
                return recorded(traced, own)
        except TraceError as error:
            if error.check not in ("call", "size"):
                break
    return trace(pipeline, arguments)


class _Drawn(Exception):
    """Raised inside a pipeline's run to end it at its first noise."""


def noise_shape(
    pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any], steps: int
) -> torch.Size | None:
    """The shape of the first noise of a run, before which only encoders work; None: it draws none, or fails."""
    shape: list[torch.Size] = []

    class Draws(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.randn:
                shape.append(result.shape)
                raise _Drawn
            return result

    device = getattr(pipeline, "_execution_device", torch.device("cpu"))
    with forked_random(device), Draws():
        try:
            run(pipeline, entries, arguments, steps=steps, guidance=1.0, output_type="latent")
        except Exception:  # of any kind: the run that counts reports it
            free_hooks(pipeline)
    return shape[0] if shape else None


def _smaller(pipeline: Any) -> Iterator[dict[str, int]]:
    """Arguments of small sizes, the smallest first; none of a call that takes no size."""
    accepted = parameters(pipeline)
    frames = [{"num_frames": number} for number in FEW_FRAMES] if "num_frames" in accepted else [{}]
    sides = [dict(zip(("height", "width"), size, strict=True)) for size in SMALL_SIZES]
    for few in frames:
        for side in sides if {"height", "width"} <= accepted.keys() else [{}]:
            if few or side:
                yield few | side


@torch.no_grad()
def picture_size(trace: Trace) -> Size:
    """Height and width of the pictures that the pipeline makes; of a video's frames."""
    height, width = decode(trace, torch.zeros(1, *trace.latent_shape)).shape[-2:]
    return height, width


def multiple(trace: Trace) -> int | None:
    """The number whose multiples the pipeline takes as height and width, a power of 2, found by trying.

    None: it makes no pictures of sizes near its own.
    """
    own, number = picture_size(trace), 1
    with quiet():  # of the sizes that it does not take
        while number <= min(HIGHEST_MULTIPLE, *own):
            # Odd multiples: those of no larger number.
            size = tuple(number * (side // number - (side // number + 1) % 2) for side in own)
            if _makes(trace, size):
                return number
            number *= 2
    return None


def _makes(trace: Trace, size: Size) -> bool:
    try:
        return picture_size(recorded(trace, _with_size(trace, size))) == size
    except InputError:
        return False


def _with_size(trace: Trace, size: Size) -> dict[str, Any]:
    return {**trace.arguments, "height": size[0], "width": size[1]}


@torch.no_grad()
def recorded(trace: Trace, arguments: dict[str, Any]) -> Trace:
    """The trace with what depends on the size from the first step of a run with these arguments.

    Raises:
        TraceError: its run fails, or its step is not what was learned.
    """
    recording = trace.observe(arguments=arguments, stop_steps=1)
    old = trace.denoiser
    names = [helper.name for helper in old.spec.helpers]
    if trace.guidance.always:
        place, count = trace.guidance.passes[0], recording.count
        recording = recording.each(lambda step: always.one_pass(step, trace.component, place, count))
    known, (whole,) = old.spec, as_one(recording).only(trace.component, names).steps
    if known.joint is not None:
        own, whole = joint.again(known.joint, whole, trace.component)
        known = replace(known, joint=own)
    call = whole.calls[0]
    spec, step, free = _placed(known, whole, trace.free)
    schedule = _schedule(old.schedule, trace.pipeline.scheduler, recording.grid)
    helpers = tuple(_helper(helper, whole, schedule) for helper in old.spec.helpers)
    spec = replace(spec, constants=_constants(spec, call.arguments), helpers=helpers)
    denoiser = old.called(spec, schedule)
    t = schedule.time(explain.received_timestep(step, spec, schedule).to(step.sample.device)).expand(1)
    try:
        rows = spec.conditions(call.arguments, trace.conditioning)
        with noting_inputs(denoiser.network):
            raw = denoiser(scaled_sample(step), t, rows).raw.to(step.model_output.dtype)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = first_line(error)
        raise TraceError(
            "size", f"the network's call at this size is not the one that was explained: {reason}"
        ) from error
    if not (error := deviation(raw, step.model_output)) <= tolerance(call.output.dtype):
        raise TraceError("size", f"the network's output at this size is off the pipeline's own by {error:.1e}")
    return replace(
        trace,
        denoiser=denoiser,
        latent_shape=tuple(step.sample.shape[1:]),
        conditioning=shapes_of(spec, call, trace.conditioning),
        self_test_error=max(trace.self_test_error, error),
        arguments=arguments,
        free=free,
        set_ups={},
    )


def _placed(spec: CallSpec, step: Step, former: Span | None = None) -> tuple[CallSpec, Step, Span | None]:
    """(the spec for the places in a step's call, the step of the free part of its sample, that part).

    ``former`` is the free part at the traced size.
    """
    call = step.calls[0]
    given = call.arguments[spec.sample]
    place, time = place_of(given, scaled_sample(step)), single_value(call.arguments[spec.timestep])
    if place is None or time is None:
        raise TraceError("size", f"'{spec.sample}' is not the sample, or '{spec.timestep}' no time")
    known, mask = spec.timestep_mask, time[1]
    if not time[0] and known is not None and not known.all():
        raise TraceError("size", f"'{spec.timestep}' begins at 0, which does not show the part that is kept")
    if place.window.frames is not None and spec.window.frames is not None:
        before, each = spec.window.frames.each, place.window.frames.each
        layouts = {name: replace(rows, each=each) for name, rows in spec.layouts.items() if rows.each == before}
        spec = explain.with_times_of_frames(replace(spec, window=place.window, layouts={**spec.layouts, **layouts}))
    else:
        if mask is None and known is not None:  # a time for each frame, and all are the same
            mask = torch.ones_like(call.arguments[spec.timestep][:1])
        spec = replace(spec, window=cut_by(place.window, given, call.output), timestep_mask=mask)
    if spec.times_apart:
        apart = explain.times_apart([call.arguments], spec.timestep, {spec.sample, *spec.times})
        spec = replace(spec, times_apart={name: apart.get(name) for name in spec.times_apart})
    spec, free = kept_by_time(spec, step, place.free)
    if free is None and former is not None:  # one step does not show what is put back before each
        if step.sample.shape[former.axis] != sum(former[1:]):
            raise TraceError("size", "it does not show which part of the sample is kept")
        free, window = former, without(spec.window, former)
        spec = replace(spec, window=cut_by(window, given, call.output))
    (step,) = only_free(Recording(1, [step]), free).steps
    return spec, step, free


def _schedule(schedule: Schedule, scheduler: Any, grid: Mapping[str, Any]) -> Schedule:
    """With the shift that the pipeline computes for this size, where it does."""
    if isinstance(schedule, FlowSchedule) and schedule.dynamic:
        return from_scheduler(scheduler, grid.get("mu"))[0]
    return schedule


def _constants(spec: CallSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name][:1] if name in spec.expanded else arguments[name] for name in spec.constants}


def _helper(helper: Helper, step: Step, schedule: Schedule) -> Helper:
    old, own = helper.denoiser, helper.own(step.calls[0].arguments)
    spec, _, _ = _placed(old.spec, replace(step, calls=[Call(helper.name, own)]))
    spec = replace(spec, constants=_constants(spec, own))
    return replace(helper, denoiser=old.called(spec, schedule))


def conditioning_at(
    trace: Trace,
    base: Trace,
    conditioning: Conditioning,
    cache: Path | None = None,
    pictures: Sequence[Pictures] | None = None,
) -> Conditioning:
    """``conditioning``, the conditions at the size of ``base``, at the size of ``trace``.

    What does not depend on the size is shared, and what depends on nothing else (SDXL's sizes) is one row. All entries
    are encoded again where a condition depends on both, as those of pictures do.

    Args:
        cache: as in :func:`stepdistill.pipeline.conditioning.encode`.
        pictures: as there.
    """
    if conditioning.encoder is not None:
        return live(trace, conditioning.entries)
    if pictures is not None:
        return encode(trace, conditioning.entries, cache, pictures)
    probes = PROBES[trace.entry]
    entries = probes if trace.entry == "prompt" else conditioning.entries[: len(probes)]
    theirs, ours = (encode(one, entries) for one in (base, trace))
    changed: list[Conditions] = []
    for before, after in ((theirs.cond, ours.cond), (theirs.null or {}, ours.null or {})):
        rows = {name: value for name, value in after.items() if not _same(before[name], value)}
        if not all(rows_equal(value) for value in rows.values()):
            return encode(trace, conditioning.entries, cache, pictures)
        changed.append({name: value[:1] for name, value in rows.items()})
    count = len(conditioning)
    cond = conditioning.cond | {name: row.expand(count, *row.shape[1:]) for name, row in changed[0].items()}
    null = None if conditioning.null is None else conditioning.null | changed[1]
    return replace(conditioning, cond=cond, null=null).to(conditioning.device)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (close(b, a) if a.is_floating_point() else torch.equal(a, b))
