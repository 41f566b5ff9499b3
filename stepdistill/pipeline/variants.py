"""A traced pipeline with one thing changed: the scale that its network takes, its guidance's rule, its grids' shift."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stepdistill.diffusion.guidance import rule_text
from stepdistill.diffusion.guiders import Guider
from stepdistill.diffusion.schedule import FlowSchedule
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.pipeline.trace import Trace


@torch.no_grad()
def with_guidance(trace: Trace, scale: float) -> Trace:
    """The same pipeline with this guidance scale as its network's input.

    A pipeline that guides in another way is returned as it is, and so is any at scale 1.
    """
    if trace.guidance.kind != "embedded" or scale == 1:
        return trace
    recording = trace.observe(guidance=scale, stop_calls=(trace.component, 1))
    call = next(call for call in recording.calls if call.component == trace.component)
    spec = trace.denoiser.spec
    expanded = {
        name: call.arguments[name][:1] for name in spec.expanded if isinstance(spec.constants[name], torch.Tensor)
    }
    spec = replace(spec, constants={**spec.constants, **expanded})
    return replace(
        trace, denoiser=trace.denoiser.called(spec), guidance=replace(trace.guidance, scale=scale), set_ups={}
    )


def with_rule(trace: Trace, rule: Rule) -> Trace:
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
    return replace(trace, denoiser=trace.denoiser.called(replace(trace.denoiser.spec, rule=rule)))


def with_guider(trace: Trace, settings: Mapping[str, Any] | None) -> Trace:
    """The same pipeline guided by a guider of diffusers; None: by its rule.

    Args:
        settings: ``name``, and arguments of that class.

    Raises:
        InputError: no such guider, or none for this pipeline.
    """
    if settings is None:
        return trace
    old = trace.denoiser
    if trace.guidance.kind in ("none", "embedded") or old.mix or old.spec.experts:
        kind = "one of several passes or networks" if old.mix or old.spec.experts else trace.guidance.kind
        raise InputError(f"teacher.guidance.guider: expected null for a pipeline whose guidance is {kind}")
    if old.spec.guided_channels is not None:
        raise InputError("teacher.guidance.guider: expected null for a pipeline that guides some channels alone")
    guider = Guider(settings["name"], {name: value for name, value in settings.items() if name != "name"})
    guider.made(2.0)  # refused here, at any scale at which it is on
    return replace(trace, denoiser=old.called(replace(old.spec, guider=guider, norm_axis=None)))


def with_shift(trace: Trace, shift: float | None) -> Trace:
    """The same pipeline with this shift of flow's sampling grids; None: its own.

    Raises:
        InputError: its schedule knows none.
    """
    old = trace.denoiser
    if shift is None:
        return trace
    if old.schedule.name != "flow":
        raise InputError(f"student.shift: expected null for a {old.schedule.name} schedule, found {shift:g}")
    known = old.schedule
    schedule = FlowSchedule(shift, known.train_timesteps, inverted=known.inverted, cut=known.cut)
    return replace(trace, denoiser=old.called(old.spec, schedule))
