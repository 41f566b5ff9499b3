"""Trajectories of the guided teacher, made once from noise and cached on disk for runs with the same settings.

    x_1 ~ N(0, I);  c ~ the recipe's conditions;  w = the teacher's scale, or ~ U[low, high]
    times 1 = t_0 > ... > t_S = 0, evenly spaced (on flow before its shift), or through the student's grid
    x_{k+1} = solver step of the guided teacher from t_k to t_{k+1}

The last step lands on the teacher's x_0. Every step is a sum of sample and output (DPM-Solver++(2M): of sample, x_0 and
the x_0 before), whose numbers are made once; guidance and the sum are one pass. Points equal those of
:func:`.samplers.dpm_solver_step` within float32's rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data.batch import PathRows, generator
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.devices import DeviceTable
from stepdistill.diffusion.guidance import outputs, rule_text
from stepdistill.diffusion.samplers import dpm_solver_step, solver_grid
from stepdistill.diffusion.schedule import Kind, Prediction, Schedule
from stepdistill.errors import InputError
from stepdistill.files import cached, digest
from stepdistill.methods.base import PathNeeds
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.decode import at_once
from stepdistill.progress import WorkProgress

CHUNK = 250
# Above this, points are kept as float16: latents are of order one, and the error is far below a solver step's.
HALF_ABOVE = 2**30


@dataclass(frozen=True)
class Paths:
    """All stored trajectories, on the CPU.

    Args:
        points: (N, K + 1, ...), float32, or float16 where they would take more than 1 GiB.
        times: (K + 1,).
        index: (N,), the entry of the conditioning.
        scales: (N,) guidance scales.
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
        scale: the guidance scale of all of them where ``needs`` names no range.
        shape: of one sample.
        seed: of noise, conditions and scales.
        cache: folder; the file's name is a hash of all that they depend on.
        grid: the times of the student's steps, descending from 1; for ``needs.through_grid``.

    Raises:
        InputError: guidance scales are requested of a teacher without guidance.
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
    stored_times = times if needs.keep == "all" else times[[0, -1]]
    return Paths(stored["points"], stored_times, stored["index"], stored["scales"], int(stored["evaluations"]))


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
    whole = needs.keep == "all"
    length = len(times) if whole else 2
    dtype = torch.float16 if 4 * count * length * torch.Size(shape).numel() > HALF_ABOVE else torch.float32
    points = torch.empty(count, length, *shape, dtype=dtype)
    solver = Solver(teacher, times, needs.solver)
    before = teacher.evaluations
    with WorkProgress() as progress:
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            noise = torch.randn(rows.stop - start, *shape, generator=draws)  # by CHUNK, whatever fits at once
            for part in torch.arange(rows.start, rows.stop).split(at_once(shape)):
                cond, null = conditioning.batch(index[part])
                w = scale if needs.scales is None else scales[part].to(solver.device)
                path = solver.path(noise[part - start], cond, null, w)
                solved = torch.stack([x.to(dtype) for k, x in enumerate(path) if whole or k in (0, needs.steps)], 1)
                points[part] = solved.cpu()
                progress("teacher trajectories", int(part[-1]) + 1, count)
    evaluations = torch.tensor(teacher.evaluations - before)
    return {"points": points, "index": index, "scales": scales, "evaluations": evaluations}


class Solver:
    """The guided teacher's steps through one grid; on its device nothing but the first noise is copied there.

    Args:
        teacher: whose path it is.
        times: descending (K + 1,); the last is the clean end.
        solver: "ddim" or "dpm".
    """

    def __init__(self, teacher: Denoiser, times: Tensor, solver: str):
        self.teacher, self.multistep = teacher, solver == "dpm"
        self.device = next(teacher.network.parameters()).device
        make = multistep_table if self.multistep else first_order_table
        self._table = DeviceTable(make(teacher.schedule, teacher.kind, times).float())
        self._times = DeviceTable(times)

    def path(self, noise: Tensor, cond: Conditions, null: Conditions | None, w: float | Tensor) -> Iterator[Tensor]:
        """The points (B, ...), float32, from ``noise`` (B, ...) on: K + 1 of them."""
        x, previous = noise.to(self.device), None
        times = self._times.on(self.device)
        yield x
        for t, row in zip(times, self._table.on(self.device), strict=False):
            pair = outputs(self.teacher, x, t.expand(len(x)), cond, null, w)
            if self.multistep:
                to_x, to_raw, by_x, by_x0, by_previous = row
                x0 = pair.step(x, to_x, to_raw)
                x = by_x * x + by_x0 * x0 + (0 if previous is None else by_previous * previous)
                previous = x0
            else:
                x = pair.step(x, *row)
            yield x


def first_order_table(schedule: Schedule, kind: Kind, times: Tensor) -> Tensor:
    """(a, b) of every step a x + b output through ``times`` (K + 1,), the last to x_0: float64 (K, 2)."""
    x, output = torch.eye(2, dtype=torch.float64)
    rows = []
    for k, t in enumerate(times[:-1]):
        prediction = Prediction(output, x, t.expand(2), schedule, kind)
        rows.append(dpm_solver_step(prediction, None, _target(times, k, 2)))
    return torch.stack(rows)


def multistep_table(schedule: Schedule, kind: Kind, times: Tensor) -> Tensor:
    """Of every step of DPM-Solver++(2M) what makes x_0 of (x, output), and the next x of (x, x_0, x_0 before).

    float64 (K, 5), as :func:`first_order_table`.
    """
    (x, output), (y, x0, before) = torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    rows, previous = [], None
    for k, t in enumerate(times[:-1]):
        to_x0 = schedule.to_x0(output, x, t.expand(2), kind)
        step = dpm_solver_step(Prediction(x0, y, t.expand(3), schedule, "sample"), previous, _target(times, k, 3))
        previous = Prediction(before, y, t.expand(3), schedule, "sample")
        rows.append(torch.cat([to_x0, step]))
    return torch.stack(rows)


def _target(times: Tensor, k: int, count: int) -> Tensor | None:
    """Where step ``k`` goes; None: the clean end, though a VP table's first entry is not quite."""
    return None if k + 2 == len(times) else times[k + 1].expand(count)


def _key(teacher: Denoiser, conditioning: Conditioning, times: Tensor, *values: object) -> str:
    """A hash of everything the trajectories depend on: weights, call, schedule, conditions and ``values``."""
    schedule, spec, network = teacher.schedule, teacher.spec, teacher.network
    call = (type(network).__name__, spec.output, teacher.kind, spec.constants)
    grid = (*schedule.coefficients(times), spec.network_timestep(schedule.timestep(times)))
    weights = network.state_dict() | dict(network.named_buffers())
    if spec.norm_axis or spec.helpers:
        values = (*values, spec.norm_axis)
    if spec.guided_channels:
        values = (*values, spec.guided_channels)
    if spec.experts:
        values = (*values, spec.experts)
    if spec.mix:
        values = (*values, spec.mix)
    if spec.guider:
        values = (*values, spec.guider)
    for helper in spec.helpers:
        own = helper.denoiser
        values = (*values, helper.name, helper.feeds, own.spec.constants, own.network.state_dict())
    return digest(call, grid, weights, conditioning.content, values)
