"""Samples under a standard protocol: which pipeline, which request, which noise."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.eval.row_cache import row_key
from stepdistill.generation.generate import decode, generate, passes
from stepdistill.guidance import rule_text
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.trace import Trace


@dataclass(frozen=True)
class Sampler:
    """One row to be: a traced pipeline, steps and guidance; ``wanted[i]`` is asked of sample i.

    ``solver``: a scheduler in place of the pipeline's own.
    """

    name: str
    role: str
    trace: Trace
    weights: str
    wanted: tuple[str | int, ...]
    steps: int
    guidance: float
    solver: Any = None

    @property
    def nfe(self) -> int:
        return passes(self.trace, self.scheduler, self.steps, self.guidance)

    @property
    def scheduler(self) -> Any:
        return self.trace.pipeline.scheduler if self.solver is None else self.solver

    def key(self, seed: int, samples: int, also: str) -> str:
        """SHA-256 over what decides the samples, their number, and ``also``."""
        return row_key(
            weights=self.weights,
            scheduler=self.scheduler,
            steps=self.steps,
            guidance=self.guidance,
            seed=seed,
            samples=samples,
            protocol=digest(self.wanted, also, *([told] if (told := self.trace.told) else [])),
            rule=rule_text(self.trace.denoiser.rule) if self.guidance != 1 else "",
        )

    def entry(self, index: int) -> str | int:
        return self.wanted[index % len(self.wanted)]


def draw(sampler: Sampler, numbers: Sequence[int], first: int, *, seed: int, batch: int) -> Tensor:
    """Images uint8 (N, C, H, W) asked for as entries ``numbers``, image k on the noise of index ``first`` + k.

    Args:
        batch: images through the networks at once; it decides nothing but speed and memory.
    """
    conditioning = encode(sampler.trace, [sampler.entry(number) for number in numbers])
    latents = generate(
        sampler.trace,
        sampler.scheduler,
        conditioning.to(sampler.trace.pipeline.device),
        torch.arange(len(numbers)),
        steps=sampler.steps,
        guidance=sampler.guidance,
        seed=seed,
        indices=range(first, first + len(numbers)),
        batch=batch,
    )
    return decode(sampler.trace, latents, batch=batch)


def digest(*parts: Any) -> str:
    """SHA-256 of anything that JSON holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
