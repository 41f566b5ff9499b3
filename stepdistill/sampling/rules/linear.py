"""LinearAG (Castillo et al. 2023): at every second step the unconditional prediction is a guess from earlier ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import Pair
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.generate import generate
from stepdistill.sampling.rules.steps import Step, limited

# The samples that it is fitted on are none of those that are drawn.
FITS_SEED = 2**33


class LinearAdaptive:
    """Guidance whose unconditional output is at some steps a sum of the outputs so far; one pass there, else two.

    Args:
        scale: w.
        coefficients: by the number of the guided step, one for each output so far, in the order of the passes and the
            conditional one first; see :func:`fit_linear`.
    """

    def __init__(self, scale: float, coefficients: Mapping[int, Tensor]):
        self.scale, self.coefficients = scale, coefficients
        self.seen: list[Tensor] = []
        self.number = -1

    def __call__(self, denoiser: Denoiser, step: Step) -> Pair:
        cond = denoiser(step.x_t, step.t, step.cond)
        self.seen.append(cond.raw)
        self.number += 1
        if (known := self.coefficients.get(self.number)) is None:
            uncond = denoiser(step.x_t, step.t, step.null).raw
            self.seen.append(uncond)
        else:
            uncond = torch.tensordot(known.to(cond.raw), torch.stack(self.seen), 1)
        return Pair(denoiser, cond, uncond, self.scale)


def fit_linear(
    trace: Trace,
    conditioning: Conditioning,
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    count: int = 16,
    interval: tuple[float, float] | None = None,
) -> dict[int, Tensor]:
    """The coefficients of every second guided step, by least squares over ``count`` samples of the pipeline itself.

    The same for every sample, condition and pixel; they hold for this pipeline, number of steps, guidance scale and
    interval of times.
    """
    watched = LinearAdaptive(guidance, {})
    rule = limited(watched, *interval) if interval else watched
    index = torch.arange(count) % len(conditioning)
    settings = {"steps": steps, "guidance": guidance, "seed": seed + FITS_SEED, "batch": count}
    generate(trace, trace.pipeline.scheduler, conditioning, index, rule=lambda: rule, **settings)
    outputs = [output.double().flatten().cpu() for output in watched.seen]
    seen: list[Tensor] = []
    coefficients = {}
    for number, (cond, uncond) in enumerate(zip(outputs[::2], outputs[1::2], strict=True)):
        seen.append(cond)
        if number % 2:
            # Neighbouring outputs are nearly the same: this driver takes the smallest coefficients of many.
            coefficients[number] = torch.linalg.lstsq(torch.stack(seen, 1), uncond[:, None], driver="gelsd")[0][:, 0]
        else:
            seen.append(uncond)
    return coefficients
