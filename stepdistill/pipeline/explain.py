"""What recorded runs of a pipeline mean: each fact is read off the calls, verified on all of them, or refused by name.

Every function takes the recording of three images without guidance (``off``) and of two with it (``on``): what follows
those numbers has a batch dimension.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.denoiser import (
    CallSpec,
    Conditions,
    Output,
    is_list_of_rows,
    joined,
    tensors_in,
    unflatten,
)
from stepdistill.guidance import with_norm_of
from stepdistill.pipeline.compare import close, deviation, rows_equal, same, single_value, tolerance
from stepdistill.pipeline.observe import Call, Recording, Step, TraceError, calls_of

GUIDANCE_LIMIT = 1e-4

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
    """

    kind: GuidanceKind
    cond_first: bool = False
    scale: float = 1.0
    shift: float = 0.0
    residual: float = 0.0

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
        both = joined(parts[:2] if self.kind == "two_calls" else parts[:1])
        halves = ({n: v[:count] for n, v in both.items()}, {n: v[count:] for n, v in both.items()})
        return halves if self.cond_first else (halves[1], halves[0])


def denoiser_component(off: Recording) -> str:
    """The network that is called for every scheduler step."""
    counts = [Counter(call.component for call in step.calls) for step in off.steps]
    steady = {name for name in counts[-1] if all(count[name] == counts[-1][name] <= 2 for count in counts)}
    if not steady:
        told = "; ".join(", ".join(f"{name} {n}" for name, n in count.items()) or "none" for count in counts)
        if all(sum(count.values()) == 1 for count in counts[1:]):  # at the first step text encoders run too
            told += " (denoisers that take turns are not supported)"
        raise TraceError(
            "denoiser", f"no component is called once or twice at every scheduler step; calls per step: {told}"
        )
    # A helper network that runs at every step feeds the denoiser, so the denoiser is called last.
    return [call.component for call in off.steps[-1].calls if call.component in steady][-1]


def feeding(off: Recording, on: Recording, component: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The networks whose outputs are arguments of the denoiser's at every step, with what a Helper calls feeds."""
    found, steps = {}, [*off.steps, *on.steps]
    for name in names:
        counts = [[len(calls_of(step.calls, one)) for step in steps] for one in (name, component)]
        if name != component and counts[0] == counts[1] and (fed := _feeds(steps, component, name)):
            found[name] = fed
    return found


def _feeds(steps: Sequence[Step], component: str, helper: str) -> dict[str, int | tuple[int, ...]]:
    common = None
    for step in steps:
        for call, other in zip(calls_of(step.calls, component), calls_of(step.calls, helper), strict=True):
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


def only(recording: Recording, component: str, helpers: Iterable[str] = ()) -> Recording:
    """The recording as if ``component`` had been its only network, see :func:`calls_of`."""
    steps = [replace(step, calls=calls_of(step.calls, component, helpers)) for step in recording.steps]
    return replace(recording, steps=steps)


def is_guided(recording: Recording) -> bool:
    """Whether the denoiser sees every sample twice."""
    component, step = denoiser_component(recording), recording.steps[0]
    calls = [call for call in step.calls if call.component == component]
    twice = torch.cat([scaled_sample(step)[: recording.count]] * 2)
    seen = (as_latents(value, twice)[0] for value in calls[0].arguments.values())
    return len(calls) == 2 or any(latents is not None and close(latents, twice) for latents in seen)


def scaled_sample(step: Step) -> Tensor:
    """The latents of a step as its scheduler scales them for the network."""
    scheduler = copy.deepcopy(step.scheduler)
    if not hasattr(scheduler, "scale_model_input"):
        return step.sample
    return scheduler.scale_model_input(step.sample, step.timestep)


def sample_argument(off: Recording, on: Recording, component: str) -> tuple[CallSpec, bool]:
    """(a spec that knows the argument which is the scheduler's sample, whether guidance doubles it)."""
    layouts = None
    lengths = set()
    for recording in (off, on):
        for step in recording.steps:
            scaled = scaled_sample(step)[: recording.count]
            for call in step.calls:
                found = set()
                for name, value in call.arguments.items():
                    latents, layout = as_latents(value, scaled)
                    repeats = 0 if latents is None else len(latents) / len(scaled)
                    if repeats in (1, 2) and close(latents, torch.cat([scaled] * int(repeats))):
                        found.add((name, *layout))
                        if recording is on:
                            lengths.add(repeats)
                layouts = found if layouts is None else layouts & found
    if not layouts or len(lengths) != 1:
        arguments = off.steps[0].calls[0].arguments
        tensors = ", ".join(f"{name} {list(v.shape)}" for name, v in arguments.items() if isinstance(v, Tensor))
        raise TraceError(
            "sample",
            f"no argument of {component} equals the scheduler's sample {list(off.steps[0].sample.shape)}, scaled or "
            f"doubled; its tensors are {tensors}",
        )
    name, axis, is_list, appended = min(layouts)
    spec = CallSpec(name, "", frame_axis=axis, lists=frozenset([name] if is_list else []), appended=appended)
    return spec, lengths == {2}


Layout = tuple[int | None, bool, tuple[int, int] | None]


def as_latents(value: Any, like: Tensor) -> tuple[Tensor | None, Layout]:
    """``value`` laid out like ``like`` (None if it cannot be), and how: frame axis, list, what is appended to it."""
    is_list = is_list_of_rows(value)
    tensor = torch.stack(value) if is_list else value
    if isinstance(tensor, Tensor) and tensor.ndim:
        if tensor.shape[1:] == like.shape[1:]:
            return tensor, (None, is_list, None)
        for axis in range(1, tensor.ndim):
            if tensor.shape[axis] == 1 and tensor.squeeze(axis).shape[1:] == like.shape[1:]:
                return tensor.squeeze(axis), (axis, is_list, None)
            if not is_list and tensor.ndim == like.ndim and tensor.shape[axis] > like.shape[axis]:
                first = tensor.narrow(axis, 0, like.shape[axis])
                if first.shape[1:] == like.shape[1:]:
                    return first, (None, False, (axis, like.shape[axis]))
    return None, (None, False, None)


def timestep_map(off: Recording, on: Recording, spec: CallSpec, network: nn.Module) -> CallSpec:
    """The spec with timestep argument = scale * scheduler's timestep + offset at every call."""
    steps = [*off.steps, *on.steps]
    given = torch.stack([step.timestep.double().cpu() for step in steps])
    best, closest = None, float("inf")
    for name in off.steps[0].calls[0].arguments:
        values = [single_value(step.calls[0].arguments.get(name)) for step in steps]
        if name == spec.sample or any(value is None for value in values):
            continue
        dtype = values[0].dtype
        told = torch.stack([value.double().cpu() for value in values])
        low, high = given.argmin(), given.argmax()
        if given[high] > given[low]:
            if told[high] == told[low]:
                continue
            scale = _rounded((told[high] - told[low]) / (given[high] - given[low]), dtype)
            offset = told[high] - scale * given[high]
            offset = 0.0 if offset.abs() <= tolerance(dtype) * told.abs().max() else _rounded(offset, dtype)
        else:
            scale, offset = _rounded(told[0] / given[0], dtype), 0.0
        residual = deviation(scale * given + offset, told)
        if residual < closest:
            best, closest, found = (name, scale, offset), residual, dtype
    if best is None or closest > tolerance(found):
        fit = f"; the closest, '{best[0]}', is off by {closest:.1e}" if best else ""
        raise TraceError("timestep", f"no argument is an affine function of the scheduler's timestep{fit}")
    name, scale, offset = best
    if not found.is_floating_point and _takes_fractions(network, off.steps[0].calls[0], name):
        found = torch.float32
    return replace(spec, timestep=name, timestep_scale=scale, timestep_offset=offset, timestep_dtype=found)


def _takes_fractions(network: nn.Module, call: Call, timestep: str) -> bool:
    """Whether the network is the same function of a floating timestep (it embeds it, it does not index with it)."""
    value = torch.as_tensor(call.arguments[timestep]).to(call.outputs[0].device)
    try:
        outputs = tensors_in(network(**unflatten({**call.arguments, timestep: value.float()})))
    except (RuntimeError, TypeError, IndexError):
        return False
    return all(map(close, outputs, call.outputs))


def output_map(off: Recording, spec: CallSpec, component: str) -> CallSpec:
    """The spec with the map from the network's output to what the scheduler is given."""
    maps: dict[Output, float] = {}
    for output in ("identity", "negated", "first_half"):
        errors = []
        for step in off.steps:
            raw = step.calls[0].output
            if not isinstance(raw, Tensor):
                raise TraceError("output", f"{component} returns {type(raw).__name__}, expected a tensor")
            if output == "first_half" and (raw.ndim < 2 or raw.shape[1] % 2):
                errors.append(float("inf"))
                continue
            errors.append(deviation(replace(spec, output=output).decode_output(raw), step.model_output))
        maps[output] = max(errors)
    best = min(maps, key=lambda name: maps[name])
    step = off.steps[0]
    if maps[best] > tolerance(step.model_output.dtype):
        raise TraceError(
            "output",
            f"{component}'s output reaches the scheduler neither unchanged, nor negated, nor as the first half of its "
            f"channels; the closest, {best}, is off by {maps[best]:.1e}",
        )
    if step.model_output.shape != step.sample.shape:
        raise TraceError(
            "output",
            f"the scheduler is given {list(step.model_output.shape)} for a sample {list(step.sample.shape)}; "
            "a learned variance that the scheduler uses is not supported",
        )
    return replace(spec, output=best)


def sort_arguments(off: Recording, on: Recording, spec: CallSpec) -> tuple[CallSpec, list[str]]:
    """(the spec with its constants, lists and masks; the names of the conditions)."""
    first_off, first_on = off.steps[0].calls[0].arguments, on.steps[0].calls[0].arguments
    if first_off.keys() != first_on.keys():
        raise TraceError(
            "constants", f"guidance changes which arguments are passed: {sorted(first_off.keys() ^ first_on.keys())}"
        )
    fed = {name for helper in spec.helpers for name in helper.feeds}
    rest = [name for name in first_off if name not in (spec.sample, spec.timestep) and name not in fed]
    for name, recording in itertools.product(rest, (off, on)):
        for step in recording.steps:
            for call, first in zip(step.calls, recording.steps[0].calls, strict=True):
                if not same(call.arguments.get(name), first.arguments[name]):
                    raise TraceError("constants", f"'{name}' changes from step to step and is not the timestep")
    if spec.extra is not None:
        for recording in (off, on):
            first, *later = [spec.conditions(step.calls[0].arguments, [spec.extra]) for step in recording.steps]
            if not all(same(first[spec.extra], other[spec.extra]) for other in later):
                raise TraceError("constants", f"what follows the sample in '{spec.sample}' changes from step to step")
    calls = [*off.steps[0].calls, *on.steps[0].calls]
    values = {name: [call.arguments[name] for call in calls] for name in rest}
    sizes = [{off.count}] * len(off.steps[0].calls) + [{on.count, 2 * on.count}] * len(on.steps[0].calls)

    def follows_batch(name: str, kind: type) -> bool:
        """Whether the argument has a row for each image at every call."""
        found = values[name]
        if not all(isinstance(value, kind) for value in found) or (kind is Tensor and not all(v.ndim for v in found)):
            return False
        return all(len(value) in size for value, size in zip(found, sizes, strict=True))

    lists, masks = set(spec.lists), {}
    for name in rest:
        if follows_batch(name, Tensor) and len({value.shape[1:] for value in values[name]}) > 1:
            masks[name] = _mask_of(name, values)
        elif follows_batch(name, list) and all(isinstance(row, Tensor) and row.ndim for row in values[name][0]):
            lists.add(name)
            masks[name] = (f"{name} mask", torch.bool)
    conditions = [*masks, *(mask for mask, _ in masks.values()), *([spec.extra] if spec.extra else [])]
    constants, expanded = {}, set()
    for name in (name for name in rest if name not in conditions):
        value, *others = values[name]
        if follows_batch(name, Tensor):
            if all(map(rows_equal, values[name])) and not same(value[0], others[0][0]):
                # Nothing but the guidance scale differs between the runs and not between their rows.
                constants[name] = others[0][:1]
                expanded.add(name)
            else:
                conditions.append(name)
        elif all(same(value, other) for other in others):
            constants[name] = value
        elif follows_batch(name, list) and all(same(row, value[0]) for rows in values[name] for row in rows):
            constants[name] = value[:1]
            expanded.add(name)
        else:
            raise TraceError("constants", f"'{name}' differs between two runs and has no batch dimension")
    spec = replace(spec, constants=constants, expanded=frozenset(expanded), lists=frozenset(lists), masks=masks)
    return spec, conditions


def _mask_of(name: str, values: dict[str, list[Any]]) -> tuple[str, torch.dtype]:
    """The argument that says which of the padded rows of ``name`` count (None where all do), and its dtype."""
    shapes = [value.shape[:2] for value in values[name]]
    for other, found in values.items():
        given = [value for value in found if value is not None]
        fits = (v is None or (isinstance(v, Tensor) and v.shape == s) for v, s in zip(found, shapes, strict=True))
        if other != name and given and all(fits):
            return other, given[0].dtype
    raise TraceError(
        "conditioning",
        f"the rows of '{name}' change shape with the prompt, {' and '.join(str(list(s[1:])) for s in shapes)}, and no "
        "argument is a mask of them; pad them to one length",
    )


def guidance_rule(
    off: Recording, on: Recording, spec: CallSpec, conditions: list[str], batched: bool, scale: float
) -> tuple[Guidance, CallSpec]:
    """How the guided run's outputs were combined, and the spec that knows whether the norm was kept."""
    calls = len(on.steps[0].calls)
    if calls == 1 and not batched:
        embedded = any(isinstance(spec.constants[name], Tensor) for name in spec.expanded)
        return (Guidance("embedded", scale=scale) if embedded else Guidance("none")), spec
    if calls not in (1, 2) or (calls == 2 and batched):
        raise TraceError("guidance", f"{calls} calls per step on {'doubled' if batched else 'single'} batches")
    residuals: dict[tuple[bool, float, bool], float] = {}
    apart = 0.0
    for step in on.steps:
        raw = torch.cat([call.output for call in step.calls])
        first, second = spec.decode_output(raw).double().chunk(2)
        apart = max(apart, deviation(first, second))
        expected = step.model_output.double()
        for half in expected.chunk(len(expected) // on.count):
            for rule in itertools.product((True, False), (0.0, 1.0), (False, True)):
                cond_first, shift, keeps_norm = rule
                cond, uncond = (first, second) if cond_first else (second, first)
                found = uncond + (scale + shift) * (cond - uncond)
                found = with_norm_of(cond, found) if keeps_norm else found
                residuals[rule] = max(residuals.get(rule, 0.0), deviation(found, half))
    limit = max(GUIDANCE_LIMIT, tolerance(on.steps[0].model_output.dtype))
    if apart * scale <= limit:
        raise TraceError("guidance", "the network says the same with and without its condition, so no rule can be told")
    rule = min(residuals, key=lambda rule: residuals[rule])
    if residuals[rule] > limit:
        raise TraceError(
            "guidance",
            "the pipeline's rule is not uncond + w (cond - uncond), nor that with the norm of cond: off by "
            f"{residuals[rule]:.1e} at w = {scale}",
        )
    cond_first, shift, keeps_norm = rule
    guidance = Guidance("batched" if batched else "two_calls", cond_first, scale, shift, residuals[rule])
    null = guidance.split(on.steps[0].calls, spec, conditions, on.count)[1]
    for name, rows in (null or {}).items():
        if not rows_equal(rows):
            raise TraceError("guidance", f"the unconditional rows of '{name}' differ from image to image")
    return guidance, replace(spec, keeps_norm=keeps_norm)


def _rounded(value: Tensor, dtype: torch.dtype) -> float:
    # 0.001 rather than the 0.00099999994 that timesteps in float32 would give, or 0.00100074 in bfloat16.
    return float(f"{float(value):.{6 if tolerance(dtype) <= 1e-5 else 2}g}")
