"""Teacher by tracing: watch one short run of a pipeline and learn how to drive its denoiser.

No pipeline and no network is known by name. Each fact is read off the recorded calls and verified on all of
them; what cannot be explained is refused with the name of the check. A self-test then replays every recorded
step with the learned description and compares it with the pipeline's own.
"""

import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.denoiser import Denoiser, Helper
from stepdistill.errors import InputError
from stepdistill.exporting.stock_call import is_picture
from stepdistill.guidance import guided, rule_text
from stepdistill.kernels import Rule
from stepdistill.pipeline import explain
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.explain import Guidance
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.observe import (
    CARRIED,
    Recording,
    Step,
    TraceError,
    entry_argument,
    fewest_steps,
    forked_random,
    guidance_argument,
    modules,
    observe,
    stepped,
)
from stepdistill.schedule import FlowSchedule, Kind, Schedule, from_scheduler

__all__ = ["Guidance", "Trace", "TraceError", "load_pipeline", "trace"]

PROBES: dict[str, tuple[Any, ...]] = {
    # Of different lengths, the longest last (the guided run leaves it out), so that conditions which grow with the
    # prompt are noticed.
    "prompt": ("a red shoe", "rain", "two grey birds on a long wire"),
    "class_labels": (0, 1, 2),
    "batch_size": (0, 1, 2),
}
PROBE_STEPS = 3
PROBE_SCALE = 4.0
SELF_TEST_LIMIT = 1e-5
SCHEDULE_LIMIT = 0.1


@dataclass(frozen=True)
class Trace:
    """What was learned about a pipeline.

    Args:
        component: the denoiser's attribute, such as "transformer". entry: the argument that asks for images.
        latent_shape: one sample as the scheduler sees it.
        conditioning: one row's shape by argument; None for the length of what grows with the prompt.
        arguments: what every call of the pipeline is given besides: height, num_frames, negative_prompt, ...
        self_test_error: the largest relative error of a replayed step.
        encoders: the networks that work before the first step alone, and make conditions.
        set_ups: how the pipeline sets up the schedulers that were run so far (filled by ``generate``).
    """

    pipeline: Any
    component: str
    entry: str
    denoiser: Denoiser
    guidance: Guidance
    latent_shape: tuple[int, ...]
    conditioning: dict[str, tuple[int | None, ...]]
    self_test_error: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ()
    set_ups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pictures(self) -> list[str]:
        """The arguments of its call that are pictures: what to paint in, what to follow."""
        return [name for name, value in self.arguments.items() if is_picture(value)]

    @property
    def told(self) -> dict[str, Any]:
        """What decides its pictures beside weights, entries and noise, as plain values; nothing for most pipelines."""
        told = dict(self.arguments)
        told |= {f"{name} sha256": hashlib.sha256(Path(told[name]).read_bytes()).hexdigest() for name in self.pictures}
        return told | ({"guidance inside": self.guidance.scale} if self.guidance.kind == "embedded" else {})

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
def trace(pipeline: Any, arguments: Mapping[str, Any] | None = None) -> Trace:
    """Learn how to drive the pipeline's denoiser from two short runs, guidance off and on.

    Args:
        arguments: further arguments of the pipeline's call; what is learned holds for these (a size, for instance).

    Raises:
        InputError: the pipeline takes no such arguments.
        TraceError: a check failed; ``check`` is one of components, call, denoiser, sample, timestep, output,
            conditioning, constants, guidance, schedule, self-test.
    """
    entry, arguments = entry_argument(pipeline), dict(arguments or {})
    _check_strength(pipeline, arguments)
    scale = _probe_scale(pipeline)
    # Three images without guidance, two with it: an argument whose length follows is one with a batch dimension.
    for unguided in (1.0, 0.0):
        off = _few_steps(pipeline, PROBES[entry], arguments, unguided)
        if not explain.is_guided(off):
            break
    else:
        raise TraceError("guidance", "the denoiser is still called twice per step at guidance scales 1 and 0")
    on = _few_steps(pipeline, PROBES[entry][:2], arguments, scale)
    schedule, kind = from_scheduler(pipeline.scheduler, off.grid.get("mu"))
    component = explain.denoiser_component(off)
    networks = modules(pipeline)
    network = networks[component]
    if twins := [name for name, other in networks.items() if type(other) is type(network) and other is not network]:
        raise TraceError(
            "denoiser",
            f"{component} and {', '.join(twins)} are of one class; denoisers that take turns are not supported",
        )
    helpers, told = _helpers(off, on, component, networks, schedule, kind)
    names = [helper.name for helper in helpers]
    whole, (off, on) = (off, on), (explain.only(off, component), explain.only(on, component))
    if len({len(step.calls) for step in on.steps}) > 1:
        raise TraceError("guidance", f"{component} is called twice at some steps and once at others")
    spec, batched = explain.sample_argument(off, on, component)
    spec = explain.timestep_map(off, on, spec, network)
    spec = explain.output_map(off, spec, component)
    spec, conditions = explain.sort_arguments(off, on, replace(spec, helpers=helpers))
    conditions += told
    off, on = (explain.only(recording, component, names) for recording in whole)
    guidance, spec = explain.guidance_rule(off, on, spec, conditions, batched, scale)
    denoiser = Denoiser(network, spec, schedule, kind)
    _check_schedule(off.steps[0], schedule, kind)
    padded = {name for owner, (mask, _) in spec.masks.items() for name in (owner, mask)}
    rows = spec.conditions(off.steps[0].calls[0].arguments, conditions)
    shapes = {name: tuple(value.shape[1:]) for name, value in rows.items()}
    return Trace(
        pipeline=pipeline,
        component=component,
        entry=entry,
        denoiser=denoiser,
        guidance=guidance,
        latent_shape=tuple(off.steps[0].sample.shape[1:]),
        conditioning={name: (None, *shape[1:]) if name in padded else shape for name, shape in shapes.items()},
        self_test_error=_self_test(off, on, denoiser, guidance, conditions),
        arguments=arguments,
        encoders=explain.encoders(whole[0].steps[0], component, names),
    )


def _helpers(
    off: Recording, on: Recording, component: str, networks: Mapping[str, nn.Module], schedule: Schedule, kind: Kind
) -> tuple[tuple[Helper, ...], list[str]]:
    """The networks that make arguments of the denoiser's at every step, and the names of their conditions."""
    helpers, names = [], []
    for name, feeds in explain.feeding(off, on, component, networks).items():
        alone = [explain.only(recording, name) for recording in (off, on)]
        spec, _ = explain.sample_argument(*alone, name)
        spec = explain.timestep_map(*alone, spec, networks[name])
        spec, conditions = explain.sort_arguments(*alone, spec)
        helpers.append(Helper(name, Denoiser(networks[name], spec, schedule, kind), feeds))
        names += [helpers[-1].prefix + condition for condition in conditions]
    return tuple(helpers), names


@torch.no_grad()
def at_guidance(trace: Trace, scale: float) -> Trace:
    """The same pipeline with another guidance scale as its network's input; for embedded guidance only."""
    recording = observe(
        trace.pipeline,
        PROBES[trace.entry][:1],
        trace.arguments,
        steps=fewest_steps(trace.pipeline),
        guidance=scale,
        stop_calls=(trace.component, 1),
    )
    call = next(call for call in recording.calls if call.component == trace.component)
    spec = trace.denoiser.spec
    told = {name: call.arguments[name][:1] for name in spec.expanded if isinstance(spec.constants[name], torch.Tensor)}
    spec = replace(spec, constants={**spec.constants, **told})
    denoiser = Denoiser(trace.denoiser.network, spec, trace.denoiser.schedule, trace.denoiser.kind)
    return replace(trace, denoiser=denoiser, guidance=replace(trace.guidance, scale=scale), set_ups={})


def asked_for(trace: Trace, scale: float) -> Trace:
    """:func:`at_guidance` where that is how a pipeline guides and ``scale`` is not 1; any other as it is."""
    return at_guidance(trace, scale) if trace.guidance.kind == "embedded" and scale != 1 else trace


def under(trace: Trace, rule: Rule) -> Trace:
    """The same pipeline with its guidance combined by ``rule``.

    Raises:
        InputError: it has no second pass for a rule to combine.
    """
    if rule == Rule():
        return trace
    if trace.guidance.kind in ("none", "embedded"):
        raise InputError(
            "teacher.guidance: expected neither interval nor rescale for a pipeline whose guidance is "
            f"{trace.guidance.kind}, found{rule_text(rule)}"
        )
    old = trace.denoiser
    return replace(trace, denoiser=Denoiser(old.network, replace(old.spec, rule=rule), old.schedule, old.kind))


def sampled_at(trace: Trace, shift: float | None) -> Trace:
    """The same pipeline with this shift of flow's sampling grids; None: its own.

    Raises:
        InputError: its schedule knows none.
    """
    old = trace.denoiser
    if shift is None:
        return trace
    if old.schedule.name != "flow":
        raise InputError(f"student.shift: expected null for a {old.schedule.name} schedule, found {shift:g}")
    schedule = FlowSchedule(shift, old.schedule.train_timesteps)
    return replace(trace, denoiser=Denoiser(old.network, old.spec, schedule, old.kind))


def _check_strength(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """A pipeline that starts from a noised picture leaves out the first steps of its grid; all are to be there."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("strength")
    if parameter is None:
        return
    strength = arguments.get("strength", parameter.default)
    if isinstance(strength, int | float) and strength != 1:
        stated = "" if "strength" in arguments else ", its default"
        raise InputError(
            f"arguments: strength: expected 1.0 for {type(pipeline).__name__}, found {strength:g}{stated}; with less "
            "its first steps are left out, and the student is trained for all of them from pure noise (in a recipe: "
            "teacher.arguments.strength=1.0)"
        )


def _probe_scale(pipeline: Any) -> float:
    parameter = guidance_argument(pipeline)
    default = parameter.default if parameter is not None else None
    return float(default) if isinstance(default, int | float) and default > 1 else PROBE_SCALE


def _few_steps(pipeline: Any, entries: Sequence[Any], arguments: Mapping[str, Any], scale: float) -> Recording:
    # Schedulers of few-step pipelines refuse more steps than they were made for.
    for steps in range(PROBE_STEPS, 0, -1):
        try:
            recording = observe(pipeline, entries, arguments, steps=steps, guidance=scale, stop_steps=steps)
        except TraceError as error:
            if error.check != "call" or steps == 1:
                raise
        else:
            break
    if not recording.steps:
        raise TraceError("components", f"{type(pipeline).__name__} never called its scheduler's step()")
    return recording


def _check_schedule(step: Step, schedule: Schedule, kind: Kind) -> None:
    """A scheduler that is told the exact outputs for a known image must arrive at that image."""
    scheduler = copy.deepcopy(step.scheduler)
    device = step.sample.device
    with forked_random(device):
        x0 = torch.rand(step.sample.shape, device=device) * 1.6 - 0.8
        eps = torch.randn(step.sample.shape, device=device)
        x, options = None, {name: None for name in step.options if name in CARRIED} | {"return_dict": False}
        for timestep in scheduler.timesteps:
            t = schedule.time(timestep.to(device)).expand(len(x0))
            scales = hasattr(scheduler, "scale_model_input")
            if x is None:
                unit = torch.ones_like(x0)
                x = schedule.add_noise(x0, eps, t) / (scheduler.scale_model_input(unit, timestep) if scales else unit)
            x_t = scheduler.scale_model_input(x, timestep) if scales else x
            x, options = stepped(scheduler, schedule.from_x0(x0, x_t, t, kind), timestep, x, options)
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
            x_t = explain.scaled_sample(step)[:n]
            t = denoiser.schedule.time(step.timestep.to(x_t.device)).expand(n)
            if recording is on:
                cond, null = guidance.split(step.calls, denoiser.spec, conditions, n)
                scale = 1.0 if null is None else guidance.w
                prediction = guided(denoiser, x_t, t, cond, null, scale)
            else:
                prediction = denoiser(x_t, t, denoiser.spec.conditions(step.calls[0].arguments, conditions))
            raw = prediction.raw.to(step.model_output.dtype)
            copies = len(step.sample) // n
            worst = max(worst, deviation(step.replay(torch.cat([raw] * copies)), step.previous))
    limit = max(SELF_TEST_LIMIT, tolerance(on.steps[0].model_output.dtype))
    if not worst <= limit:
        raise TraceError("self-test", f"a replayed step is off the pipeline's own by {worst:.1e} (limit {limit:.0e})")
    return worst
