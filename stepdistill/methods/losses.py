"""Losses that several methods share. All are means over every element, so their scale is that of one element."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.pipeline.denoiser import Conditions, Denoiser
from stepdistill.schedule import Prediction

GanLoss = Literal["softplus", "hinge"]


def mean_per_sample(value: Tensor) -> Tensor:
    """Mean over all but the batch dimension, kept broadcastable: (B, ...) -> (B, 1, ...)."""
    return value.mean(dim=tuple(range(1, value.ndim)), keepdim=True)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(D_fake - D_real) / mean|x - D_real|, per sample (DMD eq. 7-8 in x_0 space, as DMD2's code); shapes (B, ...)."""
    return (fake - real) / mean_per_sample((x - real).abs())


def denoising_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, cond: Conditions) -> Tensor:
    """MSE between what the denoiser emits at ``x_t`` and what it should emit for ``x0``, in its own prediction kind."""
    return prediction_loss(denoiser(denoiser.schedule.add_noise(x0, eps, t), t, cond), x0)


def prediction_loss(prediction: Prediction, x0: Tensor) -> Tensor:
    """MSE between what was emitted and what means ``x0`` (B, ...) at the same x_t, in the prediction's own kind."""
    target = prediction.schedule.from_x0(x0, prediction.x_t, prediction.t, prediction.kind)
    return F.mse_loss(prediction.raw.to(target.dtype), target)


def identity_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """(r - f) (r - x - alpha (r - f)), elementwise: SiD's estimate of (1 - alpha) (r - f)^2 (Zhou et al. 2024, eq. 23).

    Args:
        x: the student's samples (B, ...). real, fake: r and f, denoised x_t by teacher and critic, with their graph
            back to ``x``.
    """
    return (real - fake) * (real - x - alpha * (real - fake))


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """mean( sqrt(d^2 + c^2) - c )."""
    return ((difference.square() + c**2).sqrt() - c).mean()


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
    slopes = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return sum(slope.square().sum() for slope in slopes) / logits.numel()
