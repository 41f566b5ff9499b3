"""Losses that several methods share. All are means over every element, so their scale is that of one element.

Those that a kernel computes come from :mod:`stepdistill.kernels`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Conditions, Denoiser
from stepdistill.diffusion.float32 import no_autocast
from stepdistill.diffusion.schedule import Prediction
from stepdistill.kernels import dmd_gradient, identity_loss, mean_per_sample, pseudo_huber, sid_loss, surrogate
from stepdistill.methods.parts.times import uniform_times

__all__ = [
    "GanLoss",
    "denoising_loss",
    "discriminator_loss",
    "dmd_gradient",
    "feature_distance",
    "generator_loss",
    "gradient_penalty",
    "identity_loss",
    "latent_distance",
    "mean_per_sample",
    "prediction_loss",
    "pseudo_huber",
    "sid_loss",
    "surrogate",
]

FEATURE_TIMES = 0.02, 0.3

GanLoss = Literal["softplus", "hinge"]


def denoising_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, cond: Conditions) -> Tensor:
    """MSE between what the denoiser emits at ``x_t`` and what it should emit for ``x0``, in its own prediction kind."""
    return prediction_loss(denoiser(denoiser.schedule.add_noise(x0, eps, t), t, cond), x0)


def prediction_loss(prediction: Prediction, x0: Tensor) -> Tensor:
    """MSE between what was emitted and what means ``x0`` (B, ...) at the same x_t, in the prediction's own kind."""
    target = prediction.schedule.from_x0(x0, prediction.x_t, prediction.t, prediction.kind)
    return F.mse_loss(prediction.raw.to(target.dtype), target)


def feature_distance(denoiser: Denoiser, x: Tensor, y: Tensor, t: Tensor, eps: Tensor, cond: Conditions) -> Tensor:
    """How far apart a denoiser's layers find ``x`` and ``y`` (B, ...) under one noise; gradients reach ``x`` alone.

    LPIPS (Zhang et al. 2018) of latents, without weights of its own: the squared distance of each token's or pixel's
    hidden states, scaled to length 1; a mean over those of every depth, from 0 to 4.
    """
    with torch.no_grad():
        there = denoiser.features(denoiser.schedule.add_noise(y, eps, t), t, cond)
    here = denoiser.features(denoiser.schedule.add_noise(x, eps, t), t, cond)
    apart = []
    for one, other in zip(here, there, strict=True):
        channels = -1 if one.ndim == 3 else 1
        units = [F.normalize(state.float(), dim=channels) for state in (one, other)]
        apart.append((units[0] - units[1]).square().sum(channels).mean())
    return torch.stack(apart).mean()


def latent_distance(teacher: Denoiser, x: Tensor, y: Tensor, cond: Conditions, batch: Batch) -> Tensor:
    """:func:`feature_distance` in the teacher's layers, at little noise: t ~ U[0.02, 0.3], drawn for each row."""
    t = uniform_times(batch, "feature time", teacher.schedule, *FEATURE_TIMES)
    return feature_distance(teacher, x, y, t, batch.noise("features"), cond)


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
        logits: (B, votes), each of which sees its own part of the inputs alone.
        inputs: what the heads were given.
    """
    # Under autocast a backward pass takes its matrix products in half precision, whatever the forward pass did.
    with no_autocast(logits.device):
        slopes = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        return sum(slope.square().sum() for slope in slopes) / logits.numel()
