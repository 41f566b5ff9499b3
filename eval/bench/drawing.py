"""Samples under a protocol: which pipeline, which request, which noise."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.guidance import rule_text
from stepdistill.eval.row_cache import row_key
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.set_up import passes
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.generate import generate

TEACHER_STEPS = 50
"""Steps of a teacher whose protocol states none."""


@dataclass(frozen=True)
class Sampler:
    """One row of a report to be: a traced pipeline, steps and guidance; sample i is of entry ``entries[i]``.

    ``solver``: a scheduler in place of the pipeline's own.
    """

    name: str
    role: str
    trace: Trace
    weights: str
    entries: tuple[str | int, ...]
    steps: int
    guidance: float
    solver: Any = None

    @property
    def nfe(self) -> int:
        return passes(self.trace, self.scheduler, self.steps, self.guidance)

    @property
    def scheduler(self) -> Any:
        return self.trace.pipeline.scheduler if self.solver is None else self.solver

    def key(self, seed: int, samples: int, protocol: str) -> str:
        """SHA-256 over what decides the row; ``protocol`` stands for the metrics and the entries."""
        spec = self.trace.denoiser.spec
        how = rule_text(spec.rule) if spec.guider is None else str(spec.guider)
        return row_key(
            weights=self.weights,
            scheduler=self.scheduler,
            steps=self.steps,
            guidance=self.guidance,
            seed=seed,
            samples=samples,
            protocol=protocol,
            rule=how if self.guidance != 1 else "",
        )

    def requests(self, also: str) -> str:
        """SHA-256 over the entries, the call's settings and ``also``."""
        return digest(self.entries, also, *([settings] if (settings := self.trace.call_settings) else []))

    def entry(self, index: int) -> str | int:
        return self.entries[index % len(self.entries)]


def draw(sampler: Sampler, numbers: Sequence[int], first: int, *, seed: int, batch: int | None) -> Tensor:
    """Images uint8 (N, C, H, W) of the entries ``numbers``, image k on the noise of index ``first`` + k.

    Args:
        batch: images through the networks at once, which decides nothing but speed, memory and the last bits; None: as
            :func:`stepdistill.pipeline.decode.at_once`.
    """
    requested = [sampler.entry(number) for number in numbers]
    once = list(dict.fromkeys(requested))
    latents = generate(
        sampler.trace,
        sampler.scheduler,
        encode(sampler.trace, once).to(sampler.trace.pipeline.device),
        torch.tensor([once.index(entry) for entry in requested]),
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
