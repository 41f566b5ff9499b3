"""Forward diffusion: x_t = alpha x_0 + sigma eps, with one alpha and sigma per sample."""

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import (
    HAS_TRITON,
    broadcast,
    common_type,
    differentiated,
    fusible,
    launches,
    operation,
    per_row,
)
from stepdistill.kernels.layout import empty_result

if HAS_TRITON:
    from stepdistill.kernels.training_triton import add_noise_triton


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha x_0 + sigma eps for samples (B, ...) and coefficients (B,), in the samples' common type; differentiable.

    Computed in at least float32. Coefficients that carry a graph, and float64, take the PyTorch expression.
    """
    if differentiated(alpha, sigma) or not fusible(x0, eps):
        return add_noise_reference(x0, eps, alpha, sigma)
    return add_noise_op(x0, eps, per_row(alpha, x0), per_row(sigma, x0))


def add_noise_reference(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The definition of :func:`add_noise`."""
    dtype = common_type(x0, eps)
    compute = torch.promote_types(dtype, torch.float32)
    alpha, sigma = broadcast(alpha, x0, compute), broadcast(sigma, x0, compute)
    return (alpha * x0.to(compute) + sigma * eps.to(compute)).to(dtype)


@operation("add_noise")
def add_noise_op(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """:func:`add_noise` as one operation, whatever the device; coefficients float32."""
    if launches(x0):
        with torch.cuda.device_of(x0):  # Triton launches on the current one
            return add_noise_triton(x0, eps, alpha, sigma)
    return empty_result(x0, common_type(x0, eps)).copy_(add_noise_reference(x0, eps, alpha, sigma))


def _setup(ctx, inputs, output) -> None:
    x0, eps, *coefficients = inputs
    ctx.types = (x0.dtype, eps.dtype)
    ctx.save_for_backward(*coefficients)


def _backward(ctx, gradient):
    wide = gradient.float()
    gradients = [
        (broadcast(factor, wide, torch.float32) * wide).to(dtype) if needed else None
        for factor, dtype, needed in zip(ctx.saved_tensors, ctx.types, ctx.needs_input_grad[:2], strict=True)
    ]
    return *gradients, None, None


add_noise_op.register_autograd(_backward, setup_context=_setup)
