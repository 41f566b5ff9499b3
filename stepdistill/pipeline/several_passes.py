"""Guidance of more than one unconditional pass, read off as a linear combination of the passes.

At two scales the weights of the passes are what solves for the scheduler's input by least squares, and must do so
exactly. A weight may grow with the scale: w_i = a_i + b_i scale. The pass with b = 1 is the conditional one, and
guidance is scale cond + the sum of (a_i + b_i scale) times the others (InstructPix2Pix: one without the text, one
without text and picture). What is no such combination is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import CallSpec
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import deviation, tolerance
from stepdistill.pipeline.explain import GUIDANCE_LIMIT, Guidance
from stepdistill.pipeline.guidance_rule import with_drawn
from stepdistill.pipeline.observe import Recording

DIGITS = 3
"""Of the weights, which the float32 of the passes blurs."""


def linear_rule(
    runs: Mapping[float, Recording], spec: CallSpec, conditions: list[str], batched: bool
) -> tuple[Guidance, CallSpec]:
    """The guidance, and the spec with the weights of the unconditional passes.

    Args:
        runs: guided ones by their scale, two of them.

    Raises:
        TraceError: the passes are not combined linearly, or none of them is the conditional one.
    """
    (low, first), (high, second) = runs.items()
    (at_low, off_low), (at_high, off_high) = (_weights(run, spec) for run in (first, second))
    residual, count = max(off_low, off_high), len(at_low)
    if residual > max(GUIDANCE_LIMIT, tolerance(first.steps[0].model_output.dtype)):
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
