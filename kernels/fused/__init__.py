"""Fused kernels, each beside the PyTorch expression it must equal."""

from stepdistill.kernels.guide import Rule, Update, guide, guide_reference
from stepdistill.kernels.huber import pseudo_huber, pseudo_huber_reference
from stepdistill.kernels.matching import (
    dmd_gradient,
    dmd_gradient_reference,
    identity_loss,
    mean_per_sample,
    sid_loss,
    sid_loss_reference,
    surrogate,
    surrogate_reference,
)
from stepdistill.kernels.noise import add_noise, add_noise_reference

__all__ = [
    "Rule",
    "Update",
    "add_noise",
    "add_noise_reference",
    "dmd_gradient",
    "dmd_gradient_reference",
    "guide",
    "guide_reference",
    "identity_loss",
    "mean_per_sample",
    "pseudo_huber",
    "pseudo_huber_reference",
    "sid_loss",
    "sid_loss_reference",
    "surrogate",
    "surrogate_reference",
]
