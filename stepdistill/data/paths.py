"""Trajectories of the guided teacher, made once from noise and kept on disk for every run that wants the same ones.

    x_1 ~ N(0, I);  c ~ the recipe's conditions;  w = the teacher's scale, or ~ U[low, high]
    times 1 = t_0 > ... > t_S = 0, evenly spaced (on flow before its shift), or through the student's grid
    x_{k+1} = solver step of the guided teacher from t_k to t_{k+1}

The last step lands on the teacher's x_0.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data.batch import PathRows, generator
from stepdistill.denoiser import Denoiser
from stepdistill.device_table import DeviceTable
from stepdistill.errors import InputError
from stepdistill.generation.generate import at_once
from stepdistill.guidance import guided, rule_text
from stepdistill.methods.base import PathNeeds
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.progress import WorkProgress
from stepdistill.samplers import dpm_solver_step, solver_grid
from stepdistill.schedule import Schedule
from stepdistill.tensor_cache import cached

CHUNK = 250
# Above this, points are kept as float16: latents are of order one, and the error is far below a solver step's.
HALF_ABOVE = 2**30


@dataclass(frozen=True)
class Paths:
    """All stored trajectories, on the CPU.

    Args:
        points: (N, K + 1, ...), float32, or float16 where they would take more than 1 GiB. times: (K + 1,).
        index: (N,), the entry of the conditioning. scales: (N,) guidance scales.
        evaluations: rows that went through the teacher to make them.
    """

    points: Tensor
    times: Tensor
    index: Tensor
    scales: Tensor
    evaluations: int

    @cached_property
    def _times(self) -> DeviceTable:
        return DeviceTable(self.times)

    def __len__(self) -> int:
        return len(self.points)

    def rows(self, row: Tensor, conditioning: Conditioning, device: torch.device | str) -> PathRows:
        """The trajectories ``row`` (B,), in float32 on ``device``, with their conditions."""
        cond, null = conditioning.batch(self.index[row])
        points = self.points[row].to(device, torch.float32)
        return PathRows(points, self._times.on(device), cond, null, self.scales[row].to(device))


def teacher_paths(
    teacher: Denoiser,
    conditioning: Conditioning,
    needs: PathNeeds,
    scale: float,
    shape: tuple[int, ...],
    seed: int,
    cache: Path | None = None,
    grid: Sequence[float] = (),
) -> Paths:
    """The trajectories that ``needs`` describes, from ``cache`` where they have been made before.

    Args:
        scale: the guidance scale of all of them where ``needs`` names no range. shape: of one sample.
        seed: of noise, conditions and scales. cache: folder; the file's name is a hash of all that they depend on.
        grid: the times of the student's steps, descending from 1; for ``needs.through_grid``.

    Raises:
        InputError: guidance scales are wanted of a teacher without guidance.
    """
    if needs.scales is not None and conditioning.null is None:
        raise InputError(
            f"method: trains on guidance scales from {needs.scales[0]:g} to {needs.scales[1]:g}; expected a teacher "
            "with guidance, found a pipeline without an empty condition"
        )
    times = path_times(teacher.schedule, needs, grid)
    rule = rule_text(teacher.rule)
    key = _key(teacher, conditioning, times, needs, scale, shape, seed, *([rule] if rule else []))
    file = cache / f"paths-{key}.safetensors" if cache else None
    stored = cached(file, lambda: _solve(teacher, conditioning, times, needs, scale, shape, seed))
    kept = times if needs.keep == "all" else times[[0, -1]]
    return Paths(stored["points"], kept, stored["index"], stored["scales"], int(stored["evaluations"]))


def path_times(schedule: Schedule, needs: PathNeeds, grid: Sequence[float] = ()) -> Tensor:
    """Descending times (steps + 1,) from noise to the clean end that the trajectories stop at."""
    if not needs.through_grid:
        return solver_grid(schedule, needs.steps).flip(0)
    knots = torch.tensor([*grid, 0.0], dtype=torch.float64)
    shares = torch.arange(needs.steps // len(grid), dtype=torch.float64) * len(grid) / needs.steps
    inside = schedule.between(knots[:-1, None], knots[1:, None], shares)
    return torch.cat([inside.flatten(), knots[-1:]])


@torch.no_grad()
def _solve(
    teacher: Denoiser,
    conditioning: Conditioning,
    times: Tensor,
    needs: PathNeeds,
    scale: float,
    shape: tuple[int, ...],
    seed: int,
) -> dict[str, Tensor]:
    """The file's tensors."""
    count, draws = needs.count, generator(seed, "paths")
    index = torch.randint(len(conditioning), (count,), generator=draws)
    scales = torch.full((count,), float(scale), dtype=torch.float64)
    if needs.scales is not None:
        low, high = needs.scales
        scales = low + (high - low) * torch.rand(count, generator=draws, dtype=torch.float64)
    device = next(teacher.network.parameters()).device
    kept = len(times) if needs.keep == "all" else 2
    dtype = torch.float16 if 4 * count * kept * torch.Size(shape).numel() > HALF_ABOVE else torch.float32
    points = torch.empty(count, kept, *shape, dtype=dtype)
    before = teacher.evaluations
    with WorkProgress() as progress:
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            noise = torch.randn(rows.stop - start, *shape, generator=draws)  # by CHUNK, whatever fits at once
            for part in torch.arange(rows.start, rows.stop).split(at_once(shape)):
                x = noise[part - start].to(device)
                points[part, 0] = x.cpu().to(dtype)
                cond, null = conditioning.batch(index[part])
                w = scale if needs.scales is None else scales[part].to(device)
                previous = None
                for k, (t, r) in enumerate(itertools.pairwise(times), 1):
                    prediction = guided(teacher, x, t.expand(len(x)).to(device), cond, null, w)
                    # The end is clean, though a VP table's first entry is not quite. The first-order step is DDIM's.
                    end = None if k == needs.steps else r.expand(len(x)).to(device)
                    x = dpm_solver_step(prediction, previous, end)
                    previous = prediction if needs.solver == "dpm" else None
                    if needs.keep == "all" or end is None:
                        points[part, min(k, kept - 1)] = x.cpu().to(dtype)
                progress("teacher trajectories", int(part[-1]) + 1, count)
    evaluations = torch.tensor(teacher.evaluations - before)
    return {"points": points, "index": index, "scales": scales, "evaluations": evaluations}


def _key(teacher: Denoiser, conditioning: Conditioning, times: Tensor, *values: object) -> str:
    """A hash of everything the trajectories depend on: weights, call, schedule, conditions and ``values``."""
    digest, schedule, spec = hashlib.sha256(), teacher.schedule, teacher.spec

    def add(*values: object) -> None:
        for value in values:
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            else:
                digest.update(repr(value).encode())

    add(type(teacher.network).__name__, spec.output, teacher.kind, *values)
    add(*schedule.coefficients(times), spec.network_timestep(schedule.timestep(times)))
    weights = teacher.network.state_dict() | dict(teacher.network.named_buffers())
    for tensors in (weights, spec.constants, conditioning.cond, conditioning.null or {}):
        for name, value in sorted(tensors.items()):
            add(name, value)
    return digest.hexdigest()[:24]
