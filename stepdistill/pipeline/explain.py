"""Infer facts about a pipeline from recorded runs: each fact is verified on all calls, or refused by name.

Functions take the recording of three images without guidance (``off``), of two with it (``on``), or both as
:class:`.Runs`: what follows those numbers has a batch dimension.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import CallSpec, Conditions, Output, joined
from stepdistill.diffusion.nested import tensors_in
from stepdistill.diffusion.passes import of_pass
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.diffusion.schedule import FlowSchedule, Schedule
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import close, deviation, gives, one_number, same, same_in, single_value, tolerance
from stepdistill.pipeline.paths import times_of
from stepdistill.pipeline.places import PASSES, passes, scaled_sample
from stepdistill.pipeline.recording import Call, Recording, Runs, Step, calls_of

GuidanceKind = Literal["none", "batched", "two_calls", "embedded"]


@dataclass(frozen=True)
class Guidance:
    """How the pipeline guides: uncond + w (cond - uncond), perhaps scaled back to the norm of cond.

    Args:
        kind: one doubled batch, two calls, a scale that is an input of the network, or nothing.
        cond_first: whether the conditional half or call comes first.
        scale: the pipeline's own argument it was observed at: its default where that is above 1.
        shift: what the pipeline's argument lacks to be w: 1 where it computes cond + scale (cond - uncond).
        residual: the largest relative deviation from the rule.
        order: which pass is the conditional one and which are the unconditional ones, where there are several of these.
        drawn: the conditions whose unconditional rows are another's for each image and not the conditional ones either:
            latents of a picture that are drawn for every row, or rows as long as the image's prompt.
        always: whether all passes are made at any scale, one that leaves guidance out among them.
    """

    kind: GuidanceKind
    cond_first: bool = False
    scale: float = 1.0
    shift: float = 0.0
    residual: float = 0.0
    order: tuple[int, ...] = ()
    drawn: frozenset[str] = frozenset()
    always: bool = False

    @property
    def w(self) -> float:
        """The scale of the observed run in the library's convention."""
        return self.scale + self.shift

    @property
    def plain_scale(self) -> float:
        """The pipeline's argument for one pass per step: off, or what the network's input was learned at."""
        return self.scale if self.kind == "embedded" else 1.0 - self.shift

    def split(
        self, calls: Sequence[Call], spec: CallSpec, names: Iterable[str], count: int
    ) -> tuple[Conditions, Conditions | None]:
        """(cond, null) rows of one step's calls, ``count`` rows each; null is None where there is none."""
        parts = [spec.conditions(call.arguments, names) for call in calls]
        if self.kind not in ("batched", "two_calls"):
            return parts[0], None
        whole = joined(parts[: self.calls])
        passes = [{n: v[i * count : (i + 1) * count] for n, v in whole.items()} for i in self.passes]
        null = {n: v for number, one in enumerate(passes[1:]) for n, v in of_pass(one, number).items()}
        return passes[0], null

    @property
    def passes(self) -> tuple[int, ...]:
        """The places of the conditional pass and of each unconditional one among a step's."""
        return self.order or ((0, 1) if self.cond_first else (1, 0))

    @property
    def calls(self) -> int:
        """How often the network is called at a guided step."""
        return len(self.passes) if self.kind == "two_calls" else 1


def denoiser_component(off: Recording) -> str:
    """The network that is called for every scheduler step."""
    counts = [Counter(call.component for call in step.calls) for step in off.steps]
    steady = {name for name in counts[-1] if all(count[name] == counts[-1][name] <= PASSES for count in counts)}
    if not steady:
        listing = "; ".join(", ".join(f"{name} {n}" for name, n in count.items()) or "none" for count in counts)
        reason = "no component is called once or twice at every scheduler step"
        if not all(counts):
            reason = "the scheduler is stepped several times for one call of the network"
        raise TraceError("denoiser", f"{reason}; calls per step: {listing}")
    # A helper network that runs at every step feeds the denoiser, so the denoiser is called last.
    return [call.component for call in off.steps[-1].calls if call.component in steady][-1]


def feeding(runs: Runs, component: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The networks whose outputs are arguments of the denoiser's at every step, with what a Helper calls feeds."""
    feeds, steps = {}, runs.steps
    for name in names:
        counts = [[len(calls_of(step.calls, one)) for step in steps] for one in (name, component)]
        often = all(own and passes % own == 0 for own, passes in zip(*counts, strict=True))
        if name != component and often and (fed := _feeds(steps, component, name)):
            feeds[name] = fed
    return feeds


def _feeds(steps: Sequence[Step], component: str, helper: str) -> dict[str, int | tuple[int, ...]]:
    common = None
    for step in steps:
        calls, others = calls_of(step.calls, component), calls_of(step.calls, helper)
        for call, other in zip(calls, others * (len(calls) // len(others)), strict=True):
            fed = {}
            for name, value in call.arguments.items():
                index = [_place(tensor, other.outputs) for tensor in tensors_in(value)]
                if index and None not in index:
                    fed[name] = index[0] if isinstance(value, Tensor) else tuple(index)
            common = fed if common is None else {name: i for name, i in common.items() if fed.get(name) == i}
    return common or {}


def _place(tensor: Tensor, outputs: Sequence[Tensor]) -> int | None:
    return next((i for i, one in enumerate(outputs) if one.shape == tensor.shape and torch.equal(one, tensor)), None)


def encoders(first: Step, component: str, helpers: Iterable[str]) -> tuple[str, ...]:
    """The networks that work before the denoiser and its helpers do: they make conditions."""
    names = [call.component for call in first.calls]
    return tuple(dict.fromkeys(name for name in names[: names.index(component)] if name not in helpers))


def passes_seen(recording: Recording) -> int:
    """How often the denoiser sees every sample at a step."""
    component, step = denoiser_component(recording), recording.steps[0]
    calls = calls_of(step.calls, component)
    return max(len(calls), passes(calls[0], scaled_sample(step)[: recording.count]))


def repeats(on: Recording) -> bool:
    """Whether a guided step calls the denoiser several times with the same arguments."""
    first, *others = on.only(denoiser_component(on)).steps[0].calls
    return any(same_in(first.arguments, other.arguments) for other in others)


def timestep_map(runs: Runs, spec: CallSpec, network: nn.Module, schedule: Schedule) -> CallSpec:
    """The spec with timestep argument = scale * scheduler's timestep + offset at every call, and all that is the time.

    A flow scheduler may truncate its timesteps to integers. Then the network may get the exact ones, of its sigmas.
    """
    steps = runs.steps
    best, closest, dtype_of_time = None, float("inf"), torch.float32
    for given in (times_of(steps, spec.path, schedule), [_exact(step, schedule) for step in steps]):
        for name in steps[0].calls[0].arguments:
            held = one_number(step.calls[0].arguments.get(name) for step in steps)
            if name == spec.sample or held is None:
                continue
            values, mask = held
            scale, offset, residual = _affine(given, values)
            if residual < closest:
                best, closest, dtype_of_time = (name, scale, offset, mask), residual, values[0].dtype
        if best is not None and closest <= tolerance(dtype_of_time):
            break
    if best is None or closest > tolerance(dtype_of_time):
        fit = f"; the closest, '{best[0]}', is off by {closest:.1e}" if best else ""
        raise TraceError("timestep", f"no argument is an affine function of the scheduler's timestep{fit}")
    name, scale, offset, mask = best
    if not dtype_of_time.is_floating_point and _takes_fractions(network, steps[0].calls[0], name):
        dtype_of_time = torch.float32
    calls = [call for step in steps for call in step.calls]
    others = [other for other in calls[0].arguments if other != name]
    times = {other for other in others if all(_same_time(call.arguments, name, other) for call in calls)}
    spec = replace(spec, timestep=name, timestep_scale=scale, timestep_offset=offset, timestep_dtype=dtype_of_time)
    apart = times_apart((call.arguments for call in calls), name, times | {spec.sample})
    spec = replace(spec, times=frozenset(times), times_apart=apart)
    if spec.window.frames is not None:
        return with_times_of_frames(spec)
    return replace(spec, timestep_mask=_time_of_each(network, calls[0], (name, *times)) if mask is None else mask)


def times_apart(calls: Iterable[Mapping[str, Any]], timestep: str, known: Collection[str]) -> dict[str, Tensor | None]:
    """The arguments that hold the number of ``timestep`` at every step in another layout, with the mask of each.

    Args:
        calls: the arguments of each.
        known: other arguments that are left out.
    """
    found: dict[str, Tensor | None] = {}
    every = list(calls)
    times = [single_value(one[timestep]) for one in every]
    for name in (n for n in every[0] if n != timestep and n not in known and all(n in one for one in every)):
        values = [one[name] for one in every]
        held = one_number(values) if all(isinstance(value, Tensor) and value.ndim for value in values) else None
        if held and all(time and close(own, time[0]) for own, time in zip(held[0], times, strict=True)):
            found[name] = torch.ones_like(values[0][:1]) if held[1] is None and values[0].ndim > 1 else held[1]
    return found


def with_times_of_frames(spec: CallSpec) -> CallSpec:
    """The spec of a network that takes frames as rows, and a time for each frame."""
    each = spec.window.frames.each
    layouts = {**spec.layouts, **dict.fromkeys((spec.timestep, *spec.times), RowLayout(each=each))}
    return replace(spec, layouts=layouts, timestep_mask=torch.ones(1, each, dtype=spec.timestep_dtype))


def _affine(timesteps: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[float, float, float]:
    """(scale, offset, how far scale * timestep + offset is from what was received); a number each, step by step."""
    dtype = values[0].dtype
    given, received = (torch.stack([one.double().cpu() for one in column]) for column in (timesteps, values))
    low, high = given.argmin(), given.argmax()
    if given[high] == given[low]:
        scale, offset = _rounded(received[0] / given[0], dtype), 0.0
    elif received[high] == received[low]:
        return 0.0, 0.0, float("inf")
    else:
        scale = _rounded((received[high] - received[low]) / (given[high] - given[low]), dtype)
        offset = received[high] - scale * given[high]
        offset = 0.0 if offset.abs() <= tolerance(dtype) * received.abs().max() else _rounded(offset, dtype)
    return scale, offset, deviation(scale * given + offset, received)


def _exact(step: Step, schedule: Schedule) -> Tensor:
    """The timestep of a step, in flow that of its sigma."""
    if not isinstance(schedule, FlowSchedule):
        return step.timestep
    scheduler, index = step.scheduler, getattr(step.scheduler, "step_index", None)
    if index is None:
        places = (scheduler.timesteps == step.timestep.to(scheduler.timesteps.device)).nonzero()
        if not len(places):
            return step.timestep
        index = places[0, 0]
    sigma = scheduler.sigmas[index].double()
    return schedule.timestep(1 - sigma if schedule.inverted else sigma)


def received_timestep(step: Step, spec: CallSpec, schedule: Schedule) -> Tensor:
    """The timestep that the network received at a step: the scheduler's, or the exact one of its sigma."""
    value = single_value(step.calls[0].arguments[spec.timestep])[0].double().cpu()
    ways = (step.timestep, _exact(step, schedule))
    return min(ways, key=lambda way: float((spec.network_timestep(way.cpu()).double() - value).abs()))


def _same_time(arguments: Mapping[str, Any], name: str, other: str) -> bool:
    """Whether an argument is a tensor that is the same as the time's."""
    value = arguments.get(other)
    return isinstance(value, Tensor) and same(value, arguments[name])


def _takes_fractions(network: nn.Module, call: Call, timestep: str) -> bool:
    """Whether the network is the same function of a floating timestep (it embeds it, it does not index with it)."""
    value = torch.as_tensor(call.arguments[timestep]).to(call.outputs[0].device)
    return gives(network, {**call.arguments, timestep: value.float()}, call.outputs)


def _time_of_each(network: nn.Module, call: Call, names: Sequence[str]) -> Tensor | None:
    """Ones (1, ...) like a row of the time's arguments ``names``; None: the network does with one time for each row."""
    value = call.arguments[names[0]]
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    once = value.flatten(1)[:, 0]
    changed = {**call.arguments, **dict.fromkeys(names, once)}
    return None if gives(network, changed, call.outputs) else torch.ones_like(value[:1])


def output_map(off: Recording, spec: CallSpec, component: str) -> CallSpec:
    """The spec with the map from the network's output to what the scheduler is given."""
    maps: dict[Output, float] = {}
    for output in get_args(Output):
        errors = []
        for step in off.steps:
            raw = step.calls[0].output
            if not isinstance(raw, Tensor):
                raise TraceError("output", f"{component} returns {type(raw).__name__}, expected a tensor")
            try:
                decoded = replace(spec, output=output).decode_output(raw)
            except (RuntimeError, IndexError):  # it has no channels, or is not laid out as the argument
                errors.append(float("inf"))
            else:
                error = deviation(decoded, step.model_output)
                # A division by a small sigma makes much of rounding, and the step as little of it again.
                if spec.path is not None and decoded.shape == step.sample.shape:
                    error = min(error, deviation(step.replay(decoded.to(step.model_output)), step.previous))
                errors.append(error)
        maps[output] = max(errors)
    best = min(maps, key=lambda name: maps[name])
    step = off.steps[0]
    if maps[best] > tolerance(step.model_output.dtype):
        raise TraceError(
            "output",
            f"{component}'s output reaches the scheduler neither as it is nor as the first half of its channels, "
            f"negated or not; the closest, {best.replace('_', ' ')}, is off by {maps[best]:.1e}",
        )
    if step.model_output.shape != step.sample.shape:
        raise TraceError(
            "output",
            f"the scheduler is given {list(step.model_output.shape)} for a sample {list(step.sample.shape)}; "
            "a learned variance that the scheduler uses is not supported",
        )
    return replace(spec, output=best)


def _rounded(value: Tensor, dtype: torch.dtype) -> float:
    # 0.001 rather than the 0.00099999994 that timesteps in float32 would give, or 0.00100074 in bfloat16.
    return float(f"{float(value):.{6 if tolerance(dtype) <= 1e-5 else 2}g}")
