"""Guidance rules for the teacher. One convention everywhere: uncond + w (cond - uncond), w = 1 is off."""

import torch

from stepdistill.kernels import cfg_affine
from stepdistill.pipeline.denoiser import Conditions, Denoiser
from stepdistill.schedule import Prediction


def guided(
    denoiser: Denoiser,
    x_t: torch.Tensor,
    t: torch.Tensor,
    cond: Conditions,
    null: Conditions | None,
    scale: float | torch.Tensor,
) -> Prediction:
    """The denoiser under classifier-free guidance (Ho & Salimans 2022), as one doubled batch.

    Args:
        x_t: noisy samples (B, ...). t: times (B,) in [0, 1].
        cond: conditions, B rows. null: the empty condition, B rows; unused when ``scale`` is 1.
        scale: w, a number or one per row (B,); the number 1 means no guidance and costs one pass instead of two.

    Raises:
        ValueError: ``scale`` is not 1 and there is no null condition.
    """
    if not isinstance(scale, torch.Tensor) and scale == 1:
        return denoiser(x_t, t, cond)
    if null is None:
        raise ValueError(f"guidance scale {scale} needs a null condition, and this teacher has none")
    both = {name: torch.cat([rows, null[name]]) for name, rows in cond.items()}
    doubled = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    conditional, unconditional = doubled.raw.chunk(2)
    raw = cfg_affine(conditional, unconditional, x_t, scale, 0.0, 1.0)
    return Prediction(raw, x_t, t, doubled.schedule, doubled.kind)
