"""Rounding to bfloat16 adds noise to x_0: this check estimates it before any weight is loaded."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from stepdistill import assets
from stepdistill.diffusion.samplers import SAMPLERS, Sampler
from stepdistill.diffusion.schedule import Kind, Schedule, from_scheduler
from stepdistill.errors import InputError
from stepdistill.recipe import Recipe

ROUNDING = 2.0**-9
"""Bfloat16's rounding relative to the number, about its rms: 8 bits of significand."""

LIMIT = 0.05
"""Most rms noise in x_0, where data have a deviation of about 1. DMD2 trains Stable Diffusion at .03; the linear table
of DiT and PixArt has .31, with which a one-step student does not learn."""


def rounding_noise(schedule: Schedule, kind: Kind, t: float) -> float:
    """Rms noise in x_0 from rounding what a network of this ``kind`` emits at time ``t`` to bfloat16.

    For epsilon (sigma / alpha) 2^-9: .029 at timestep 999 of Stable Diffusion, .31 of DiT and PixArt.
    """
    one = torch.ones(1, dtype=torch.float64)
    return ROUNDING * abs(float(schedule.to_x0(one, 0 * one, t * one, kind)))


def latest_start(schedule: Schedule, kind: Kind) -> int | None:
    """The highest timestep in hundreds, less 1, whose rounding noise is within the limit; None where there is none."""
    last = round(float(schedule.timestep(torch.ones(1))))
    fitting = (
        step
        for step in range(last - last % 100 - 1, 0, -100)
        if rounding_noise(schedule, kind, float(schedule.time(torch.tensor(float(step))))) <= LIMIT
    )
    return next(fitting, None)


def is_half(recipe: Recipe) -> bool:
    """Whether what the student's network emits is in bfloat16."""
    whole = recipe.role_training["student"] == "full"
    return recipe.train.precision == "bf16" or (recipe.teacher.precision == "bf16" and not whole)


def check_rounding(recipe: Recipe, sampler: Sampler, kind: Kind) -> None:
    """Refuse a first time of the student at which rounding to bfloat16 alone puts too much noise into x_0.

    Args:
        sampler: the student's.
        kind: what its network emits.

    Raises:
        InputError: it does.
    """
    schedule = sampler.schedule
    # Elsewhere the coefficient of the output is at most 1, and a grid may need the pipeline's own set-up.
    t = sampler.grid()[0].t if schedule.name == "vp_discrete" else 1.0
    noise = rounding_noise(schedule, kind, t)
    if not is_half(recipe) or noise <= LIMIT:
        return
    keys = [key for key in ("train", "teacher") if getattr(recipe, key).precision == "bf16"]
    first = round(float(schedule.timestep(torch.tensor([t], dtype=torch.float64))))
    start = latest_start(schedule, kind)
    earlier = f", or student.start: {start}" if start is not None and schedule.name == "vp_discrete" else ""
    raise InputError(
        f"{keys[0]}.precision: expected fp32{earlier}; at the first timestep, {first}, the rounding of the network's "
        f"output to bf16 alone is noise of {noise:.2g} in x_0 (limit {LIMIT:g}), found bf16"
    )


def check_scheduler(recipe: Recipe) -> None:
    """:func:`check_rounding` before any weight is loaded, where the pipeline's files are at hand.

    Raises:
        InputError: bfloat16 puts too much noise into x_0 at the student's first time.
    """
    config = _scheduler_config(recipe.teacher.pipeline)
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    if kind is None or not is_half(recipe):
        return
    scheduler = kind.from_config(config)
    try:
        schedule, emitted = from_scheduler(scheduler)
        implementation, settings = recipe.method.implementation, recipe.method.config
        sampler = SAMPLERS[implementation.sampler_of(settings)](
            schedule, scheduler, recipe.student.steps, start=recipe.student.start
        )
    except InputError:
        return  # it is refused with its reason where the pipeline is watched
    check_rounding(recipe, sampler, emitted)


def _scheduler_config(pipeline: str) -> dict[str, Any]:
    """The config of the scheduler in a folder or of an embedded teacher; empty where it is not on this machine."""
    folder = assets.find(f"teachers/{pipeline}") if pipeline in assets.teachers() else Path(pipeline)
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
