"""How a pipeline combines the outputs of its passes at a guided step, read off a recorded run.

As in :mod:`stepdistill.pipeline.explain`, ``on`` is a run of two images with guidance.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import CallSpec
from stepdistill.diffusion.guidance import with_channels_of, with_norm_of
from stepdistill.diffusion.passes import plain_name
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import close, deviation, rows_equal, same, tolerance
from stepdistill.pipeline.explain import GUIDANCE_LIMIT, Guidance
from stepdistill.pipeline.observe import Recording


def guidance_rule(
    on: Recording, spec: CallSpec, conditions: list[str], batched: bool, scale: float, hint: str = ""
) -> tuple[Guidance, CallSpec]:
    """How the guided run's outputs were combined, and the spec that knows whether the norm was kept.

    Args:
        hint: which arguments switch off what is no such rule; the refusal ends with it.
    """
    calls = len(on.steps[0].calls)
    if calls == 1 and not batched:
        embedded = any(isinstance(spec.constants[name], Tensor) for name in spec.expanded)
        return (Guidance("embedded", scale=scale) if embedded else Guidance("none")), spec
    if (calls > 1 and batched) or passes_of(on, spec) != 2:
        raise TraceError("guidance", f"{calls} calls per step on {'repeated' if batched else 'single'} batches")
    residuals: dict[tuple[bool, float, int | None], float] = {}
    apart, pairs = 0.0, _outputs(on, spec)
    channels = {cond_first: _guided_channels(pairs, cond_first) for cond_first in (True, False)}
    for first, second, expected in pairs:
        apart = max(apart, deviation(first, second))
        for half in expected.chunk(len(expected) // on.count):
            for rule in itertools.product((True, False), (0.0, 1.0), (None, -1, *range(1, half.ndim - 1))):
                cond_first, shift, norm_axis = rule
                cond, uncond = (first, second) if cond_first else (second, first)
                if channels[cond_first]:
                    uncond = with_channels_of(cond, uncond, channels[cond_first])
                combined = uncond + (scale + shift) * (cond - uncond)
                combined = with_norm_of(cond, combined, norm_axis) if norm_axis else combined
                residuals[rule] = max(residuals.get(rule, 0.0), deviation(combined, half))
    limit = max(GUIDANCE_LIMIT, tolerance(on.steps[0].model_output.dtype))
    if apart * scale <= limit:
        raise TraceError(
            "guidance",
            "the network's outputs are the same with and without its condition, so the guidance rule cannot be read",
        )
    rule = min(residuals, key=lambda rule: residuals[rule])
    if residuals[rule] > limit:
        raise TraceError(
            "guidance",
            "the pipeline's rule is not uncond + w (cond - uncond), of all channels or the first, with or without the "
            f"norm of cond: off by {residuals[rule]:.1e} at w = {scale}{hint}",
        )
    cond_first, shift, norm_axis = rule
    guidance = Guidance("batched" if batched else "two_calls", cond_first, scale, shift, residuals[rule])
    spec = replace(spec, norm_axis=norm_axis, guided_channels=channels[cond_first])
    return with_drawn(guidance, on, spec, conditions), spec


def _outputs(on: Recording, spec: CallSpec) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(the first pass's output, the second's, what the scheduler was given) at each step, float64."""
    # Where it is divided by sigma, rounding is much at the last step, whose sigma may be .002.
    divided = spec.path is not None or on.steps[-1].in_two
    steps = on.steps[:-1] if divided and len(on.steps) > 1 else on.steps
    raws = (torch.cat([call.output for call in step.calls]) for step in steps)
    halves = (spec.decode_output(raw).double().chunk(2) for raw in raws)
    return [(*two, step.model_output.double()) for two, step in zip(halves, steps, strict=True)]


def _guided_channels(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], cond_first: bool) -> int | None:
    """How many channels are guided, where those after them are the conditional pass's; None: all."""
    given = [(expected[: len(first)], first if cond_first else second) for first, second, expected in pairs]
    count = given[0][0].shape[1]
    if given[0][0].ndim < 3:
        return None
    while count and all(close(out[:, count - 1], cond[:, count - 1]) for out, cond in given):
        count -= 1
    return count if 0 < count < given[0][0].shape[1] else None


def passes_of(on: Recording, spec: CallSpec) -> int:
    """How often every image goes through the network at a guided step."""
    return sum(spec.window.rows(call.arguments[spec.sample]) for call in on.steps[0].calls) // on.count


def with_drawn(guidance: Guidance, on: Recording, spec: CallSpec, conditions: list[str]) -> Guidance:
    """The guidance with what is drawn anew for every unconditional row, or has another shape in each."""
    own, found = guidance.split(on.steps[0].calls, spec, conditions, on.count)
    null = found or {}
    apart = [name for name, value in null.items() if not rows_equal(value)]
    if spec.ragged is None:  # whose empty conditions may be as long as each prompt's own
        apart = [name for name in apart if not same(null[name], own[plain_name(name)])]
    return replace(guidance, drawn=frozenset(apart))
