"""How a pipeline combines the outputs of its passes at a guided step, read off a recorded run.

Of two passes the rule is uncond + w (cond - uncond), or one like it. Of more it is a linear combination: at two scales
the weights of the passes are what solves for the scheduler's input by least squares, and must do so exactly. A weight
may grow with the scale: w_i = a_i + b_i scale. The pass with b = 1 is the conditional one, and guidance is scale cond +
the sum of (a_i + b_i scale) times the others (InstructPix2Pix: one without the text, one without text and picture).
What is no such combination is refused.

As in :mod:`stepdistill.pipeline.explain`, ``on`` is a run of two images with guidance.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import CallSpec
from stepdistill.diffusion.experts import Turn
from stepdistill.diffusion.guidance import with_channels_of, with_norm_of
from stepdistill.diffusion.passes import plain_name
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import close, deviation, rows_equal, same, tolerance
from stepdistill.pipeline.explain import Guidance
from stepdistill.pipeline.recording import Recording

GUIDANCE_LIMIT = 1e-4
DIGITS = 3
"""Of the weights of several passes, which the float32 of these blurs."""


def guidance_rule(
    on: Recording, spec: CallSpec, conditions: list[str], batched: bool, scale: float, hint: str = ""
) -> tuple[Guidance, CallSpec]:
    """How the guided run's outputs were combined, and the spec that knows whether the norm was kept.

    A refusal ends with ``hint``: which arguments switch off what is no such rule.
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
                combined = _combined(cond, uncond, scale + shift, norm_axis)
                residuals[rule] = max(residuals.get(rule, 0.0), deviation(combined, half))
    limit = _limit(on)
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


def _combined(cond: Tensor, uncond: Tensor, w: float, norm_axis: int | None) -> Tensor:
    combined = uncond + w * (cond - uncond)
    return with_norm_of(cond, combined, norm_axis) if norm_axis else combined


def _limit(on: Recording) -> float:
    """How far the scheduler's input may be off a rule."""
    return max(GUIDANCE_LIMIT, tolerance(on.steps[0].model_output.dtype))


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


def with_scales(turns: dict[str, Turn], on: Recording, spec: CallSpec, guidance: Guidance) -> dict[str, Turn]:
    """The turns with the guidance scales that experts have of their own, read off a guided run.

    Where an expert's w in uncond + w (cond - uncond) is not the pipeline's, it has one of its own.
    """
    if guidance.kind not in ("batched", "two_calls"):
        return turns
    found = {}
    for step, name in zip(on.steps, on.experts, strict=True):
        first, second = spec.decode_output(torch.cat([call.output for call in step.calls])).double().chunk(2)
        cond, uncond = (first, second) if guidance.cond_first else (second, first)
        if spec.guided_channels is not None:
            uncond = with_channels_of(cond, uncond, spec.guided_channels)
        given = step.model_output.double()[: on.count]
        difference = cond - uncond
        w = ((given - uncond) * difference).sum() / difference.square().sum()
        off_rule = deviation(_combined(cond, uncond, guidance.w, spec.norm_axis), given) > _limit(on)
        found[name] = float(f"{float(w):.4g}") if off_rule else None
    return {name: turn._replace(scale=found.get(name)) for name, turn in turns.items()}


def passes_of(on: Recording, spec: CallSpec) -> int:
    """How often every image goes through the network at a guided step."""
    return sum(spec.window.rows(call.arguments[spec.sample]) for call in on.steps[0].calls) // on.count


def linear_rule(
    runs: Mapping[float, Recording], spec: CallSpec, conditions: list[str], batched: bool
) -> tuple[Guidance, CallSpec]:
    """The guidance of two guided runs by their scale, and the spec with the weights of the unconditional passes.

    Raises:
        TraceError: the passes are not combined linearly, or none of them is the conditional one.
    """
    (low, first), (high, second) = runs.items()
    (at_low, off_low), (at_high, off_high) = (_weights(run, spec) for run in (first, second))
    residual, count = max(off_low, off_high), len(at_low)
    if residual > _limit(first):
        raise TraceError(
            "guidance",
            f"the pipeline's {count} passes are not combined linearly: off by {residual:.1e} at scale {low:g}",
        )
    slopes = ((at_high - at_low) / (high - low)).tolist()
    b = [round(slope, DIGITS) for slope in slopes]
    a = [round(weight - slope * low, DIGITS) for weight, slope in zip(at_low.tolist(), slopes, strict=True)]
    conditional = [number for number, slope in enumerate(b) if slope == 1]
    if len(conditional) != 1 or abs(sum(b)) > 0.01 or abs(sum(a) - 1) > 0.01:
        weights = ", ".join(f"{weight:.3g}" for weight in at_low.tolist())
        raise TraceError(
            "guidance",
            f"the weights of the pipeline's {count} passes at scale {low:g} are {weights}, none of which is the "
            "scale of a conditional pass",
        )
    (cond,) = conditional
    shift = a[cond]
    others = sorted((number for number in range(count) if number != cond), key=lambda number: b[number])
    mix = tuple((a[number] - shift * b[number], b[number]) for number in others)
    kind = "batched" if batched else "two_calls"
    guidance = Guidance(kind, cond == 0, low, shift, residual, order=(cond, *others))
    return with_drawn(guidance, first, spec, conditions), replace(spec, mix=mix)


def _weights(run: Recording, spec: CallSpec) -> tuple[Tensor, float]:
    """(the weight of each pass, how far their sum is from what the scheduler is given)."""
    passes, given = [], []
    for step in run.steps:
        raw = spec.decode_output(torch.cat([call.output for call in step.calls])).double()
        passes.append(raw.unflatten(0, (-1, run.count)).flatten(1))
        given.append(step.model_output[: run.count].double().flatten())
    whole, combined = torch.cat(passes, 1).T.cpu(), torch.cat(given).cpu()
    weights = torch.linalg.lstsq(whole, combined[:, None]).solution[:, 0]
    return weights, deviation(whole @ weights, combined)


def with_drawn(guidance: Guidance, on: Recording, spec: CallSpec, conditions: list[str]) -> Guidance:
    """The guidance with what is drawn anew for every unconditional row, or has another shape in each."""
    own, found = guidance.split(on.steps[0].calls, spec, conditions, on.count)
    null = found or {}
    apart = [name for name, value in null.items() if not rows_equal(value)]
    if spec.ragged is None:  # whose empty conditions may be as long as each prompt's own
        apart = [name for name in apart if not same(null[name], own[plain_name(name)])]
    return replace(guidance, drawn=frozenset(apart))
