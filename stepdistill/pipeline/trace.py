"""Teacher by tracing: watch one short run of a pipeline and learn how to drive its denoiser.

No pipeline and no network is known by name. Each fact is read off the recorded calls and verified on all of
them; what cannot be explained is refused with the name of the check. A self-test then replays every recorded
step with the learned description and compares it with the pipeline's own.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.guidance import guided
from stepdistill.pipeline.compare import close, deviation, rows_equal, same, single_value, tolerance
from stepdistill.pipeline.denoiser import CallSpec, Conditions, Denoiser, Output, first_tensor, unflatten
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.observe import (
    Call,
    Recording,
    Step,
    TraceError,
    entry_argument,
    forked_random,
    guidance_argument,
    modules,
    observe,
)
from stepdistill.schedule import Kind, Schedule, from_scheduler

__all__ = ["Guidance", "Trace", "TraceError", "load_pipeline", "trace"]

PROBES: dict[str, tuple[Any, ...]] = {
    # Of different lengths, so that conditions which grow with the prompt are noticed.
    "prompt": ("a red shoe", "two grey birds on a long wire", "rain"),
    "class_labels": (0, 1, 2),
    "batch_size": (0, 1, 2),
}
PROBE_STEPS = 3
PROBE_SCALE = 4.0
SELF_TEST_LIMIT = 1e-5
GUIDANCE_LIMIT = 1e-4
SCHEDULE_LIMIT = 0.1

GuidanceKind = Literal["none", "batched", "two_calls", "embedded"]


@dataclass(frozen=True)
class Guidance:
    """How the pipeline guides. Every rule accepted is uncond + w (cond - uncond).

    Args:
        kind: one doubled batch, two calls, a scale that is an input of the network, or nothing.
        cond_first: whether the conditional half or call comes first.
        scale: the scale it was observed at: the pipeline's default where that is above 1.
        residual: the largest relative deviation from the rule.
    """

    kind: GuidanceKind
    cond_first: bool = False
    scale: float = 1.0
    residual: float = 0.0

    def split(self, calls: Sequence[Call], names: Iterable[str], count: int) -> tuple[Conditions, Conditions | None]:
        """(cond, null) rows of one step's calls, ``count`` rows each; null is None where there is none."""
        first = {name: calls[0].arguments[name] for name in names}
        if self.kind not in ("batched", "two_calls"):
            return first, None
        if self.kind == "two_calls":
            halves = first, {name: calls[1].arguments[name] for name in names}
        else:
            halves = ({n: v[:count] for n, v in first.items()}, {n: v[count:] for n, v in first.items()})
        return halves if self.cond_first else (halves[1], halves[0])


@dataclass(frozen=True)
class Trace:
    """What was learned about a pipeline.

    Args:
        component: the denoiser's attribute, such as "transformer". entry: the argument that asks for images.
        latent_shape: one sample as the scheduler sees it. conditioning: one row's shape by argument.
        self_test_error: the largest relative error of a replayed step.
        set_ups: how the pipeline sets up the schedulers that were run so far (filled by ``generate``).
    """

    pipeline: Any
    component: str
    entry: str
    denoiser: Denoiser
    guidance: Guidance
    latent_shape: tuple[int, ...]
    conditioning: dict[str, tuple[int, ...]]
    self_test_error: float
    set_ups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """The facts as plain values, the contract of ``inspect --json``."""
        network, spec = self.denoiser.network, self.denoiser.spec
        return {
            "pipeline": type(self.pipeline).__name__,
            "denoiser": type(network).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            "schedule": self.denoiser.schedule.name,
            "prediction": self.denoiser.kind,
            "timestep": {
                "argument": spec.timestep,
                "scale": spec.timestep_scale,
                "offset": spec.timestep_offset,
                "dtype": str(spec.timestep_dtype).removeprefix("torch."),
            },
            "output": spec.output,
            "guidance": self.guidance.kind,
            "conditioning": {name: list(shape) for name, shape in self.conditioning.items()},
            "latent_shape": list(self.latent_shape),
            "self_test_error": self.self_test_error,
        }


@torch.no_grad()
def trace(pipeline: Any) -> Trace:
    """Learn how to drive the pipeline's denoiser from two short runs, guidance off and on.

    Raises:
        TraceError: a check failed; ``check`` is one of components, call, denoiser, sample, timestep, output,
            conditioning, constants, guidance, schedule, self-test.
    """
    entry = entry_argument(pipeline)
    scale = _probe_scale(pipeline)
    # Three images without guidance, two with it: an argument whose length follows is one with a batch dimension.
    off = _few_steps(pipeline, PROBES[entry], 1.0)
    on = _few_steps(pipeline, PROBES[entry][:2], scale)
    schedule, kind = from_scheduler(pipeline.scheduler)
    component = _denoiser_component(off)
    network = modules(pipeline)[component]
    for recording in (off, on):
        for step in recording.steps:
            step.calls = [call for call in step.calls if call.component == component]
    if len({len(step.calls) for step in on.steps}) > 1:
        raise TraceError("guidance", f"{component} is called twice at some steps and once at others")
    sample, batched = _sample_argument(off, on, component)
    timestep, timestep_scale, timestep_offset, dtype = _timestep_map(off, on, sample)
    if not dtype.is_floating_point and _takes_fractions(network, off.steps[0].calls[0], timestep):
        dtype = torch.float32
    output = _output_map(off, component)
    learned = (sample, timestep)
    conditions, constants, expanded = _sort_arguments(off, on, learned)
    spec = CallSpec(sample, timestep, timestep_scale, timestep_offset, dtype, output, constants, expanded)
    guidance = _guidance(off, on, spec, conditions, batched, scale)
    denoiser = Denoiser(network, spec, schedule, kind)
    _check_schedule(off.steps[0], schedule, kind)
    return Trace(
        pipeline=pipeline,
        component=component,
        entry=entry,
        denoiser=denoiser,
        guidance=guidance,
        latent_shape=tuple(off.steps[0].sample.shape[1:]),
        conditioning={name: tuple(off.steps[0].calls[0].arguments[name].shape[1:]) for name in conditions},
        self_test_error=_self_test(off, on, denoiser, guidance, conditions),
    )


def _probe_scale(pipeline: Any) -> float:
    parameter = guidance_argument(pipeline)
    default = parameter.default if parameter is not None else None
    return float(default) if isinstance(default, int | float) and default > 1 else PROBE_SCALE


def _few_steps(pipeline: Any, entries: Sequence[Any], scale: float) -> Recording:
    # Schedulers of few-step pipelines refuse more steps than they were made for.
    for steps in range(PROBE_STEPS, 0, -1):
        try:
            recording = observe(pipeline, entries, steps=steps, guidance=scale, stop_steps=steps)
        except TraceError as error:
            if error.check != "call" or steps == 1:
                raise
        else:
            break
    if not recording.steps:
        raise TraceError("components", f"{type(pipeline).__name__} never called its scheduler's step()")
    return recording


def _denoiser_component(off: Recording) -> str:
    counts = [Counter(call.component for call in step.calls) for step in off.steps]
    steady = {name for name in counts[-1] if all(count[name] == counts[-1][name] <= 2 for count in counts)}
    if not steady:
        raise TraceError(
            "denoiser",
            "no component is called once or twice at every scheduler step; calls per step: "
            + "; ".join(", ".join(f"{name} {n}" for name, n in count.items()) or "none" for count in counts),
        )
    # A helper network that runs at every step feeds the denoiser, so the denoiser is called last.
    name = [call.component for call in off.steps[-1].calls if call.component in steady][-1]
    if counts[-1][name] == 2:
        raise TraceError("guidance", f"{name} is still called twice per step at guidance scale 1")
    return name


def _scaled_sample(step: Step) -> Tensor:
    scheduler = copy.deepcopy(step.scheduler)
    if not hasattr(scheduler, "scale_model_input"):
        return step.sample
    return scheduler.scale_model_input(step.sample, step.timestep)


def _sample_argument(off: Recording, on: Recording, component: str) -> tuple[str, bool]:
    """The argument that is the scheduler's sample, and whether guidance doubles it."""
    names = None
    lengths = set()
    for recording in (off, on):
        for step in recording.steps:
            scaled = _scaled_sample(step)[: recording.count]
            for call in step.calls:
                found = set()
                for name, value in call.arguments.items():
                    if not isinstance(value, Tensor) or value.shape[1:] != scaled.shape[1:]:
                        continue
                    repeats = len(value) / len(scaled)
                    if repeats in (1, 2) and close(value, torch.cat([scaled] * int(repeats))):
                        found.add(name)
                        if recording is on:
                            lengths.add(repeats)
                names = found if names is None else names & found
    if not names or len(lengths) != 1:
        raise TraceError(
            "sample",
            f"no argument of {component} equals the scheduler's sample {list(off.steps[0].sample.shape)}, scaled or "
            f"doubled; its tensors are {_tensors(off.steps[0].calls[0])}",
        )
    return sorted(names)[0], lengths == {2}


def _timestep_map(off: Recording, on: Recording, sample: str) -> tuple[str, float, float, torch.dtype]:
    """(argument, scale, offset, dtype) with argument = scale * scheduler's timestep + offset at every call."""
    steps = [*off.steps, *on.steps]
    given = torch.stack([step.timestep.double().cpu() for step in steps])
    best, closest = None, float("inf")
    for name in off.steps[0].calls[0].arguments:
        values = [single_value(step.calls[0].arguments.get(name)) for step in steps]
        if name == sample or any(value is None for value in values):
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
            best, closest, found = (name, scale, offset, dtype), residual, dtype
    if best is None or closest > tolerance(found):
        fit = f"; the closest, '{best[0]}', is off by {closest:.1e}" if best else ""
        raise TraceError("timestep", f"no argument is an affine function of the scheduler's timestep{fit}")
    return best


def _takes_fractions(network: nn.Module, call: Call, timestep: str) -> bool:
    """Whether the network is the same function of a floating timestep (it embeds it, it does not index with it)."""
    value = torch.as_tensor(call.arguments[timestep]).to(call.output.device)
    try:
        output = network(**unflatten({**call.arguments, timestep: value.float()}))
    except (RuntimeError, TypeError, IndexError):
        return False
    return close(first_tensor(output), call.output)


def _output_map(off: Recording, component: str) -> Output:
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
            errors.append(deviation(CallSpec("", "", output=output).decode_output(raw), step.model_output))
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
    return best


def _sort_arguments(
    off: Recording, on: Recording, learned: tuple[str, str]
) -> tuple[list[str], dict[str, Any], frozenset[str]]:
    """The remaining arguments as (conditioning names, constants, constants stored as one row)."""
    first_off, first_on = off.steps[0].calls[0].arguments, on.steps[0].calls[0].arguments
    if first_off.keys() != first_on.keys():
        raise TraceError(
            "constants", f"guidance changes which arguments are passed: {sorted(first_off.keys() ^ first_on.keys())}"
        )
    conditions, constants, expanded = [], {}, set()
    for name, value in first_off.items():
        if name in learned:
            continue
        other = first_on[name]
        for recording in (off, on):
            for step in recording.steps:
                for call, first in zip(step.calls, recording.steps[0].calls, strict=True):
                    if not same(call.arguments.get(name), first.arguments[name]):
                        raise TraceError("constants", f"'{name}' changes from step to step and is not the timestep")
        if _holds_tensors(value):
            raise TraceError("conditioning", f"'{name}' is a list of tensors, expected one tensor with a batch")
        if _is_batched(value, other, off.count, on.count):
            if value.shape[1:] != other.shape[1:]:
                raise TraceError(
                    "conditioning",
                    f"the rows of '{name}' change shape with the prompt: {list(value.shape[1:])} and "
                    f"{list(other.shape[1:])}; pad them to one length",
                )
            if rows_equal(value) and rows_equal(other) and not same(value[0], other[0]):
                # Nothing but the guidance scale differs between the runs and not between their rows.
                constants[name] = other[:1]
                expanded.add(name)
            else:
                conditions.append(name)
        elif same(value, other):
            constants[name] = value
        else:
            raise TraceError("constants", f"'{name}' differs between two runs and has no batch dimension")
    return conditions, constants, frozenset(expanded)


def _guidance(
    off: Recording, on: Recording, spec: CallSpec, conditions: list[str], batched: bool, scale: float
) -> Guidance:
    calls = len(on.steps[0].calls)
    if calls == 1 and not batched:
        return Guidance("embedded", scale=scale) if spec.expanded else Guidance("none")
    if calls not in (1, 2) or (calls == 2 and batched):
        raise TraceError("guidance", f"{calls} calls per step on {'doubled' if batched else 'single'} batches")
    kind: GuidanceKind = "batched" if batched else "two_calls"
    residuals = {True: 0.0, False: 0.0}
    for step in on.steps:
        raw = torch.cat([call.output for call in step.calls])
        halves = spec.decode_output(raw).double().chunk(2)
        expected = step.model_output.double()
        for half in expected.chunk(len(expected) // on.count):
            for cond_first in residuals:
                cond, uncond = halves if cond_first else halves[::-1]
                error = deviation(uncond + scale * (cond - uncond), half)
                residuals[cond_first] = max(residuals[cond_first], error)
    limit = max(GUIDANCE_LIMIT, tolerance(on.steps[0].model_output.dtype))
    if max(residuals.values()) <= limit:
        raise TraceError("guidance", "the network says the same with and without its condition, so no rule can be told")
    cond_first = residuals[True] < residuals[False]
    if residuals[cond_first] > limit:
        raise TraceError(
            "guidance",
            f"the pipeline's rule is not uncond + w (cond - uncond): off by {residuals[cond_first]:.1e} at w = {scale}",
        )
    guidance = Guidance(kind, cond_first, scale, residuals[cond_first])
    null = guidance.split(on.steps[0].calls, conditions, on.count)[1]
    for name, rows in (null or {}).items():
        if not rows_equal(rows):
            raise TraceError("guidance", f"the unconditional rows of '{name}' differ from image to image")
    return guidance


def _check_schedule(step: Step, schedule: Schedule, kind: Kind) -> None:
    """A scheduler that is told the exact outputs for a known image must arrive at that image."""
    scheduler = copy.deepcopy(step.scheduler)
    device = step.sample.device
    with forked_random(device):
        x0 = torch.rand(step.sample.shape, device=device) * 1.6 - 0.8
        eps = torch.randn(step.sample.shape, device=device)
        x = None
        for timestep in scheduler.timesteps:
            t = schedule.time(timestep.to(device)).expand(len(x0))
            scales = hasattr(scheduler, "scale_model_input")
            if x is None:
                unit = torch.ones_like(x0)
                x = schedule.add_noise(x0, eps, t) / (scheduler.scale_model_input(unit, timestep) if scales else unit)
            x_t = scheduler.scale_model_input(x, timestep) if scales else x
            x = first_tensor(scheduler.step(schedule.from_x0(x0, x_t, t, kind), timestep, x, return_dict=False))
    error = float((x - x0).square().mean().sqrt() / x0.square().mean().sqrt())
    if not error <= SCHEDULE_LIMIT:
        raise TraceError(
            "schedule",
            f"{type(step.scheduler).__name__}, told exact {kind} predictions of an image, does not arrive at it "
            f"(off by {error:.1e})",
        )


def _self_test(off: Recording, on: Recording, denoiser: Denoiser, guidance: Guidance, conditions: list[str]) -> float:
    """The largest relative error of the recorded steps replayed with the learned description.

    Raises:
        TraceError: it is above 1e-5 (float32).
    """
    worst = 0.0
    # An embedded scale is a constant of the network, learned at the scale of the guided run.
    for recording in (on,) if guidance.kind == "embedded" else (off, on):
        for step in recording.steps:
            n = recording.count
            x_t = _scaled_sample(step)[:n]
            t = denoiser.schedule.time(step.timestep.to(x_t.device)).expand(n)
            if recording is on:
                cond, null = guidance.split(step.calls, conditions, n)
                scale = 1.0 if null is None else guidance.scale
                prediction = guided(denoiser, x_t, t, cond, null, scale)
            else:
                prediction = denoiser(x_t, t, {name: step.calls[0].arguments[name] for name in conditions})
            raw = prediction.raw.to(step.model_output.dtype)
            copies = len(step.sample) // n
            worst = max(worst, deviation(step.replay(torch.cat([raw] * copies)), step.previous))
    limit = max(SELF_TEST_LIMIT, tolerance(on.steps[0].model_output.dtype))
    if not worst <= limit:
        raise TraceError("self-test", f"a replayed step is off the pipeline's own by {worst:.1e} (limit {limit:.0e})")
    return worst


def _rounded(value: Tensor, dtype: torch.dtype) -> float:
    # 0.001 rather than the 0.00099999994 that timesteps in float32 would give, or 0.00100074 in bfloat16.
    return float(f"{float(value):.{6 if tolerance(dtype) <= 1e-5 else 2}g}")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Tensor) or _holds_tensors(item) for item in value)


def _is_batched(off: Any, on: Any, count_off: int, count_on: int) -> bool:
    if not isinstance(off, Tensor) or not isinstance(on, Tensor) or not off.ndim or not on.ndim:
        return False
    return len(off) == count_off and len(on) in (count_on, 2 * count_on)


def _tensors(call: Call) -> str:
    return ", ".join(f"{name} {list(v.shape)}" for name, v in call.arguments.items() if isinstance(v, Tensor))
