"""Losses that several methods share. All are means over every element, so their scale is that of one element.

Those that a kernel computes come from :mod:`stepdistill.kernels`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.denoiser import Conditions, Denoiser
from stepdistill.float32 import no_autocast
from stepdistill.kernels import dmd_gradient, identity_loss, mean_per_sample, pseudo_huber, sid_loss, surrogate
from stepdistill.schedule import Prediction

__all__ = [
    "GanLoss",
    "denoising_loss",
    "discriminator_loss",
    "dmd_gradient",
    "generator_loss",
    "gradient_penalty",
    "identity_loss",
    "mean_per_sample",
    "prediction_loss",
    "pseudo_huber",
    "sid_loss",
    "surrogate",
]

GanLoss = Literal["softplus", "hinge"]


def denoising_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, cond: Conditions) -> Tensor:
    """MSE between what the denoiser emits at ``x_t`` and what it should emit for ``x0``, in its own prediction kind."""
    return prediction_loss(denoiser(denoiser.schedule.add_noise(x0, eps, t), t, cond), x0)


def prediction_loss(prediction: Prediction, x0: Tensor) -> Tensor:
    """MSE between what was emitted and what means ``x0`` (B, ...) at the same x_t, in the prediction's own kind."""
    target = prediction.schedule.from_x0(x0, prediction.x_t, prediction.t, prediction.kind)
    return F.mse_loss(prediction.raw.to(target.dtype), target)


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """What the student minimises, from logits of its samples: softplus(-l) (non-saturating) or -l (hinge)."""
    return (F.softplus(-fake) if kind == "softplus" else -fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor, kind: GanLoss) -> Tensor:
    """softplus(fake) + softplus(-real), or relu(1 + fake) + relu(1 - real); 2 ln 2 and 2 at logits of 0."""
    if kind == "softplus":
        return (F.softplus(fake) + F.softplus(-real)).mean()
    return (torch.relu(1 + fake) + torch.relu(1 - real)).mean()


def gradient_penalty(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018): the mean over votes of |d vote / d inputs|^2, with graph.

    Args:
        logits: (B, votes), each of which sees its own part of the inputs alone. inputs: what the heads were given.
    """
    # Under autocast a backward pass takes its matrix products in half precision, whatever the forward pass did.
    with no_autocast(logits.device):
        slopes = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        return sum(slope.square().sum() for slope in slopes) / logits.numel()
