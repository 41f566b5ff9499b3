"""The pseudo-Huber loss of consistency distillation: mean( sqrt(d^2 + c^2) - c ), with backward."""

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import HAS_TRITON, fusible, launches, operation
from stepdistill.kernels.layout import empty_result

if HAS_TRITON:
    from stepdistill.kernels.training_triton import pseudo_huber_backward_triton, pseudo_huber_triton


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """mean( sqrt(d^2 + c^2) - c ) of a difference (B, ...), at least in float32; differentiable, once by the kernel.

    float64 takes the PyTorch expression.
    """
    return pseudo_huber_op(difference, c) if fusible(difference) else pseudo_huber_reference(difference, c)


def pseudo_huber_reference(difference: Tensor, c: float) -> Tensor:
    """The definition of :func:`pseudo_huber`."""
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return ((wide.square() + c**2).sqrt() - c).mean()


@operation("pseudo_huber")
def pseudo_huber_op(difference: Tensor, c: float) -> Tensor:
    """:func:`pseudo_huber` as one operation, float32, whatever the device."""
    if launches(difference):
        with torch.cuda.device_of(difference):  # Triton launches on the current one
            return pseudo_huber_triton(difference, c)
    return pseudo_huber_reference(difference, c).float()


@operation("pseudo_huber_backward")
def pseudo_huber_backward_op(difference: Tensor, gradient: Tensor, c: float) -> Tensor:
    """The gradient of :func:`pseudo_huber` in ``difference``; ``gradient`` is that of the loss, 0-d."""
    if launches(difference):
        with torch.cuda.device_of(difference):  # Triton launches on the current one
            return pseudo_huber_backward_triton(difference, gradient, c)
    wide = difference.float()
    value = wide / (wide.square() + c**2).sqrt() * (gradient / difference.numel())
    return empty_result(difference, difference.dtype).copy_(value)


def _setup(ctx, inputs, output) -> None:
    difference, ctx.c = inputs
    ctx.save_for_backward(difference)


def _backward(ctx, gradient):
    (difference,) = ctx.saved_tensors
    return pseudo_huber_backward_op(difference, gradient, ctx.c), None


pseudo_huber_op.register_autograd(_backward, setup_context=_setup)
