"""Teacher by tracing: watch one short run of a pipeline and learn how to drive its denoiser.

No pipeline and no network is known by name. Each fact is read off the recorded calls and verified on all of
them; what cannot be explained is refused with the name of the check. A self-test then replays every recorded
step with the learned description and compares it with the pipeline's own.

In this order: a scheduler that a student can have (schedulers); runs of a few steps (probe_call, observe, recording),
without guidance (always) and with it; what is unusual of them made plain: calls for one prompt each (singly), frames
(frames), networks that keep what they made (cached) or take turns (turns), conditions with shapes of their own
(own_shapes), several samples (joint), another path (paths). Of plain runs the facts are read: sample (places), time and
output (explain), other arguments (sorting), guidance (guidance_rule). Then self_test and grid hold them to the calls.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.diffusion.denoiser import CallSpec, Denoiser, Helper, innermost
from stepdistill.diffusion.experts import Experts, Turn
from stepdistill.diffusion.schedule import Kind, Schedule
from stepdistill.diffusion.window import Span
from stepdistill.files import sha256
from stepdistill.pipeline import always, cached, explain, joint, turns
from stepdistill.pipeline.call import (
    TraceError,
    added_noise,
    by_itself,
    check_needed,
    entry_argument,
    guidance_argument,
    in_any_way,
    one_guidance,
    other_guidance,
    without_guidance,
)
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.explain import Guidance
from stepdistill.pipeline.frames import as_one
from stepdistill.pipeline.grid import fewest
from stepdistill.pipeline.guidance_rule import guidance_rule, linear_rule, passes_of, with_scales
from stepdistill.pipeline.guiders import guiders, negative_prompt
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.own_shapes import of_own_shapes, packed, unpadded
from stepdistill.pipeline.paths import seen_by_scheduler
from stepdistill.pipeline.places import kept_by_time, only_free, sample_argument
from stepdistill.pipeline.probe_call import PROBES, ProbeCall
from stepdistill.pipeline.recording import Call, Recording, Runs
from stepdistill.pipeline.schedulers import replace_scheduler, schedule_of
from stepdistill.pipeline.self_test import check_schedule, self_test
from stepdistill.pipeline.sorting import sort_arguments
from stepdistill.pipeline.stock_call import pictures_in

__all__ = ["Guidance", "Trace", "TraceError", "load_pipeline", "trace"]

OF_SEVERAL = ("conditioning", "constants")
"""Checks that may fail for what prompts of one call have in common, and not for calls of one each."""
PROBE_STEPS = 3
MOST_STEPS = 50
PROBE_SCALE = 4.0
Watched = tuple[Runs, dict[str, Turn], int | None]
"""What :func:`_watched` returns."""


@dataclass(frozen=True)
class Trace:
    """What was learned about a pipeline.

    Args:
        component: the denoiser's attribute, such as "transformer"; that of the noise end where several take turns.
        entry: the argument that states the images: prompt, class_labels, or one of COUNTS.
        latent_shape: one sample as the scheduler sees it; where it has a :attr:`free` part, that.
        conditioning: one row's shape by argument; None for the length of what grows with the prompt.
        arguments: what every call of the pipeline is given besides: height, num_frames, negative_prompt, ...
        self_test_error: the largest relative error of a replayed step.
        alone: its call is for one entry: it takes no list of prompts, or makes one image.
        encoders: the networks that work before the first step alone, and make conditions.
        fewest_steps: the fewest steps that its call takes.
        free: the part of the scheduler's sample that is sampled, where the pipeline keeps the rest (a first frame).
        returned: how many values a call of the denoiser returns: it may be more than the output.
        frames: the axis of the sample whose parts copies of the scheduler step, where they do; None: it steps it whole.
        set_ups: how the pipeline sets up the schedulers that were run so far (filled by :func:`.set_up.set_up`).
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
    alone: bool = False
    encoders: tuple[str, ...] = ()
    fewest_steps: int = 1
    free: Span | None = None
    frames: int | None = None
    returned: int = 1
    set_ups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def probe(self) -> Sequence[Any] | str:
        """What a call for one image is given, whatever its condition."""
        return self.entries(PROBES[self.entry][:1])

    def entries(self, entries: Sequence[Any]) -> Sequence[Any] | str:
        """What one call is given for ``entries``, of which there is one where the call is for one alone."""
        return by_itself(entries[0]) if self.alone else entries

    def at_once(self, count: int) -> int:
        """How many of ``count`` entries one call takes."""
        return 1 if self.alone else count

    def observe(
        self, entries: Sequence[Any] | None = None, arguments: Mapping[str, Any] | None = None, **options: Any
    ) -> Recording:
        """A run as :func:`.observe.observe` records it: by default of one entry, in the fewest steps, not guided."""
        given = self.probe if entries is None else self.entries(entries)
        plain = {"steps": self.fewest_steps, "guidance": self.guidance.plain_scale}
        return observe(self.pipeline, given, self.arguments if arguments is None else arguments, **{**plain, **options})

    @property
    def network(self) -> nn.Module:
        """The pipeline's own denoiser, of experts the first; the one of :attr:`denoiser` may be a role's view of it."""
        return getattr(self.pipeline, self.component)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all its networks that denoise: one, or several that take turns."""
        network = innermost(self.denoiser.network)
        several = isinstance(network, Experts) and self.denoiser.spec.router is None
        return tuple(network) if several else (self.component,)

    def denoiser_in(self, pipeline: Any) -> nn.Module:
        """What denoises in a pipeline of the same kind: its network, or several that take turns."""
        networks = {name: getattr(pipeline, name) for name in self.components}
        return Experts(networks) if len(networks) > 1 else networks[self.component]

    @property
    def pictures(self) -> list[str]:
        """The arguments of its call that are pictures: what to paint in, what to follow."""
        return [name for name, value in self.arguments.items() if pictures_in(value)]

    @property
    def call_settings(self) -> dict[str, Any]:
        """Settings of the call that change its images beside weights, entries and noise; empty for most pipelines."""
        settings = dict(self.arguments)
        for name in self.pictures:
            hashes = [sha256(Path(file)) for file in pictures_in(settings[name])]
            settings[f"{name} sha256"] = hashes[0] if isinstance(settings[name], str) else hashes
        return settings | ({"guidance inside": self.guidance.scale} if self.guidance.kind == "embedded" else {})

    def summary(self) -> dict[str, Any]:
        """The facts as plain values, the contract of ``inspect --json``."""
        spec = self.denoiser.spec
        facts = {
            "pipeline": type(self.pipeline).__name__,
            "denoiser": type(self.network).__name__,
            "parameters": sum(p.numel() for p in self.denoiser.network.parameters()),
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
        if spec.joint is not None:
            facts["joint"] = {part.argument: list(part.shape) for part in spec.joint.parts}
        if self.guidance.always:
            facts["passes_without_guidance"] = len(self.guidance.passes)
        if spec.experts:
            facts["experts"] = {name: turn._asdict() for name, turn in spec.experts.items()}
        return facts


@torch.no_grad()
def trace(pipeline: Any, arguments: Mapping[str, Any] | None = None) -> Trace:
    """Learn how to drive the pipeline's denoiser from two short runs, guidance off and on.

    A scheduler of learned variance is replaced by one that takes the mean alone, TrigFlow's by one of unit data.

    Args:
        arguments: further arguments of the pipeline's call; what is learned holds for these (a size, for instance).

    Raises:
        InputError: the pipeline takes no such arguments.
        TraceError: a check failed, the one that ``check`` names.
    """
    entry, arguments = entry_argument(pipeline), dict(arguments or {})
    check_needed(pipeline, arguments)
    replace_scheduler(ProbeCall(pipeline, entry, arguments))
    try:
        return _traced(pipeline, entry, arguments)
    except TraceError as error:
        if entry != "prompt" or error.check not in OF_SEVERAL:
            raise
        refusal = error
    try:
        return _traced(pipeline, entry, arguments, singly=True)
    except TraceError as error:
        raise refusal from error


def _traced(pipeline: Any, entry: str, arguments: dict[str, Any], singly: bool = False) -> Trace:
    """:func:`trace`, by calls for one prompt each where ``singly``, whatever else the pipeline takes."""
    scale, networks = _probe_scale(pipeline, arguments), modules(pipeline)

    def watched(given: Mapping[str, Any], alone: bool) -> Watched:
        return _watched(ProbeCall(pipeline, entry, given, alone), scale)

    if singly:
        (runs, experts, kept), alone = watched(arguments, True), True
    else:
        (runs, experts, kept), arguments, alone = in_any_way(watched, arguments, alone=True, pipeline=pipeline)
    call = ProbeCall(pipeline, entry, arguments, alone)
    schedule, kind = schedule_of(call, runs.off)
    network = networks[component := explain.denoiser_component(runs.off)]
    runs, ragged = of_own_shapes(runs, component)
    runs, one = joint.as_one(runs, component)
    if ragged and (experts or one):
        raise TraceError("conditioning", "conditions have shapes of their own, beside several networks or samples")
    helpers, helper_conditions, seen = _helpers(runs, component, networks, schedule, kind)
    names = [helper.name for helper in helpers]
    called = runs.only(component)
    whole, path = seen_by_scheduler(runs, component, schedule, kind)
    runs = whole.only(component)
    if len({len(step.calls) for step in runs.on.steps}) > 1:
        raise TraceError("guidance", f"{component} is called twice at some steps and once at others")
    spec, free, batched = sample_argument(runs, component)
    around = joint.around(one, network) if ragged is None else unpadded(ragged, network, runs)
    spec = explain.timestep_map(called, replace(spec, joint=one, path=path, ragged=ragged), around, schedule)
    spec, free = kept_by_time(spec, runs.off.steps[0], free)
    if other := next((name for name, part in seen.items() if part != free), None):
        raise TraceError("sample", f"{other} sees another part of the sample than {component}, which keeps a part")
    whole = whole.each(partial(only_free, free=free))
    runs = whole.only(component)
    spec = explain.output_map(runs.off, spec, component)
    spec, conditions = sort_arguments(runs, replace(spec, helpers=helpers), added_noise(pipeline, arguments))
    conditions += helper_conditions
    off, on = runs = whole.only(component, names)
    if passes_of(on, spec) > 2:
        again = joint.joined(_few_steps(call, 2, scale + 1), one, component)
        again = again if ragged is None else packed(again, component, ragged)
        at_scales = {scale: on, scale + 1: only_free(again, free).only(component, names)}
        guidance, spec = linear_rule(at_scales, spec, conditions, batched)
    else:
        first = turns.steps_of(component, on) if experts else on
        hint = one_guidance(pipeline, arguments) if one else without_guidance(pipeline)
        guidance, spec = guidance_rule(first, spec, conditions, batched, scale, hint)
    if kept is not None:
        guidance = always.stated(guidance, kept)
    if experts:
        spec = replace(spec, experts=with_scales(experts, on, spec, guidance))
        network = Experts({name: networks[name] for name in experts})
    denoiser = Denoiser(network, spec, schedule, kind)
    check_schedule(off.steps[0], schedule, kind)
    return Trace(
        pipeline=pipeline,
        component=component,
        entry=entry,
        denoiser=denoiser,
        guidance=guidance,
        latent_shape=tuple(off.steps[0].sample.shape[1:]),
        conditioning=shapes_of(spec, off.steps[0].calls[0], conditions),
        self_test_error=self_test(runs, denoiser, guidance, conditions),
        arguments=arguments,
        alone=alone,
        encoders=explain.encoders(whole.off.steps[0], component, names),
        fewest_steps=fewest(call, component, PROBE_STEPS),
        free=free,
        frames=off.frames,
        returned=off.steps[0].calls[0].returned,
    )


def shapes_of(spec: CallSpec, call: Call, conditions: Iterable[str]) -> dict[str, tuple[int | None, ...]]:
    """One row's shape of each condition; None for the length of what grows with the prompt."""
    padded = {name for owner, (mask, _) in spec.masks.items() for name in (owner, mask)}
    padded |= set() if spec.ragged is None else {*spec.ragged.fields}
    rows = spec.conditions(call.arguments, conditions)
    shapes = {name: tuple(value.shape[1:]) for name, value in rows.items()}
    return {name: (None, *shape[1:]) if name in padded else shape for name, shape in shapes.items()}


def _watched(call: ProbeCall, scale: float) -> Watched:
    """Three images without guidance, two with it, the turns of networks that take turns, and the place of the pass.

    That is the conditional one's, where the pipeline makes all passes at any scale; None: it makes one at some scale.
    An argument whose length follows the number of images is one with rows for each.
    """
    pipeline, arguments = call.pipeline, call.arguments
    guided, kept = {}, None
    for unguided in (1.0, 0.0):
        try:
            off = _few_steps(call, 3, unguided)
        except TraceError as error:
            if error.check != "call" or not guiders(pipeline):
                raise
            _few_steps(call, 2, scale, most=1)  # which fails for the same reason, or not
            reason = "its blocks run only with guidance, and a student is called without it, one pass per step"
            raise TraceError("call", f"{error.reason}; {reason}") from error
        if explain.passes_seen(off) == 1:
            break
        guided[unguided] = off
    else:
        if (found := always.conditional(guided)) is None:
            reason = "at scales 1 and 0 the denoiser makes several passes at a step, and none alone is the result"
            raise TraceError("guidance", reason + other_guidance(pipeline, arguments))
        unguided, kept, off = found
    alike = turns.alike(off, modules(pipeline))
    experts = turns.turns_of(call, alike, off, unguided)
    steps = PROBE_STEPS
    while experts.keys() - {*off.experts} and steps < MOST_STEPS:  # each is to be seen
        steps *= 2
        off = _few_steps(call, 3, unguided, steps)
    on = _few_steps(call, 2, scale, steps)
    if negative_prompt(pipeline, arguments) and explain.repeats(on):
        raise TraceError("call", "both passes of a guided step are the same, as no negative prompt is stated")
    return Runs(off, on), experts, kept


def _helpers(
    runs: Runs, component: str, networks: Mapping[str, nn.Module], schedule: Schedule, kind: Kind
) -> tuple[tuple[Helper, ...], list[str], dict[str, Span | None]]:
    """The networks that make arguments of the denoiser's at every step, their conditions, the free part each sees."""
    helpers, names, seen = [], [], {}
    for name, feeds in explain.feeding(runs, component, networks).items():
        alone = runs.only(name)
        spec, free, _ = sample_argument(alone, name)
        spec = explain.timestep_map(alone, spec, networks[name], schedule)
        spec, seen[name] = kept_by_time(spec, alone.off.steps[0], free)
        spec, conditions = sort_arguments(alone, spec)
        helpers.append(Helper(name, Denoiser(networks[name], spec, schedule, kind), feeds))
        names += [helpers[-1].prefix + condition for condition in conditions]
    return tuple(helpers), names, seen


def _probe_scale(pipeline: Any, arguments: Mapping[str, Any]) -> float:
    """The default, where that is above 1; not a number that another argument has, the scale of an expert perhaps."""
    parameter = guidance_argument(pipeline)
    default = parameter.default if parameter is not None else None
    scale = float(default) if isinstance(default, int | float) and default > 1 else PROBE_SCALE
    taken = {value for value in arguments.values() if isinstance(value, int | float)}
    while scale in taken:
        scale += 1
    return scale


def _few_steps(call: ProbeCall, count: int, scale: float, most: int = PROBE_STEPS) -> Recording:
    """A run for ``count`` images of ``most`` steps or fewer, in which networks that take turns are one."""
    # Schedulers of few-step pipelines refuse more steps than they were made for.
    for steps in range(most, 0, -1):
        try:
            recording = call.several(count, steps=steps, guidance=scale, stop_steps=steps)
        except TraceError as error:
            if error.check != "call" or steps == 1:
                raise
        else:
            break
    if not recording.steps:
        name = type(call.pipeline).__name__
        raise TraceError("components", f"{name} never steps its own scheduler; perhaps it steps copies of it")
    networks = modules(call.pipeline)
    recording = cached.as_first(as_one(recording), networks)
    return turns.as_one(recording, turns.alike(recording, networks))
