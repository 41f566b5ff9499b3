"""Memory and time of the teacher's trajectories in a plan; they are made once, before the first training step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.guidance import guided
from stepdistill.kernels import Rule
from stepdistill.methods.base import DistillMethod
from stepdistill.pipeline.decode import at_once
from stepdistill.planning.fake_pipeline import Blueprint
from stepdistill.recipe import Recipe
from stepdistill.recipe.memory import LiveBytes
from stepdistill.sampling.trajectories import HALF_ABOVE
from stepdistill.training.make_method import guidance_scale


@dataclass(frozen=True)
class Trajectories:
    """How many, the rows that go through the teacher for them, and their bytes.

    Args:
        count: of all that the method needs.
        evaluations: of all that the method needs.
        stored: bytes in the host's memory.
        activations: bytes on the device while they are made, beside weights and conditions.
    """

    count: int = 0
    evaluations: int = 0
    stored: int = 0
    activations: int = 0

    def as_text(self) -> str:
        """One line for people."""
        stored = f"{self.stored / 2**30:.3f} GiB in the host's memory"
        return f"trajectories: {self.count} of the teacher before training, {self.evaluations} evaluations, {stored}"


NO_TRAJECTORIES = Trajectories()


def trajectories(recipe: Recipe, drawn: Blueprint, method: DistillMethod, known: Sequence[Tensor]) -> Trajectories:
    """What the method's trajectories cost, those that stand for real samples as well.

    Args:
        known: tensors that are there anyway.
    """
    data = method.data_needs(recipe.method.config)
    kinds = [needs for needs in (data.paths, data.made) if needs is not None]
    if not kinds:
        return NO_TRAJECTORIES
    guidance, shape = guidance_scale(recipe, drawn.trace), drawn.trace.latent_shape
    count = evaluations = stored = 0
    for needs in kinds:
        passes = 1 if needs.scales is None and guidance == 1 else 2
        count, evaluations = count + needs.count, evaluations + passes * needs.count * needs.steps
        points = needs.count * (needs.steps + 1 if needs.keep == "all" else 2) * torch.Size(shape).numel()
        stored += points * (4 if points * 4 <= HALF_ABOVE else 2)
    rows = min(at_once(shape), max(needs.count for needs in kinds))
    with torch.no_grad(), LiveBytes(known) as live:
        cond = {name: row.expand(rows, *row.shape[1:]).clone() for name, row in drawn.condition.items()}
        x, t = torch.zeros(rows, *shape), torch.full((rows,), 0.5, dtype=torch.float64)
        scale = guidance if all(needs.scales is None for needs in kinds) else 2.0
        null = {name: row.clone() for name, row in cond.items()}
        guided(method.roles.teacher, x, t, cond, null, scale, Rule())
    return Trajectories(count, evaluations, stored, live.peak)
