"""The pseudo-Huber loss of consistency distillation: mean( sqrt(d^2 + c^2) - c ), with backward."""

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import fusible, on_cuda
from stepdistill.kernels.layout import empty_result


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """mean( sqrt(d^2 + c^2) - c ) of a difference (B, ...), at least in float32; differentiable, once by the kernel.

    float64 takes the PyTorch expression.
    """
    return pseudo_huber_op(difference, c) if fusible(difference) else pseudo_huber_reference(difference, c)


def pseudo_huber_reference(difference: Tensor, c: float) -> Tensor:
    """The definition of :func:`pseudo_huber`."""
    wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return ((wide.square() + c**2).sqrt() - c).mean()


@torch.library.custom_op("stepdistill::pseudo_huber", mutates_args=())
def pseudo_huber_op(difference: Tensor, c: float) -> Tensor:
    """:func:`pseudo_huber` as one operation, float32, whatever the device."""
    return pseudo_huber_reference(difference, c).float()


@pseudo_huber_op.register_fake
def _(difference, c):
    return difference.new_empty((), dtype=torch.float32)


@torch.library.custom_op("stepdistill::pseudo_huber_backward", mutates_args=())
def pseudo_huber_backward_op(difference: Tensor, gradient: Tensor, c: float) -> Tensor:
    """The gradient of :func:`pseudo_huber` in ``difference``; ``gradient`` is that of the loss, 0-d."""
    wide = difference.float()
    value = wide / (wide.square() + c**2).sqrt() * (gradient / difference.numel())
    return empty_result(difference, difference.dtype).copy_(value)


@pseudo_huber_backward_op.register_fake
def _(difference, gradient, c):
    return empty_result(difference, difference.dtype)


def _setup(ctx, inputs, output) -> None:
    difference, ctx.c = inputs
    ctx.save_for_backward(difference)


def _backward(ctx, gradient):
    (difference,) = ctx.saved_tensors
    return pseudo_huber_backward_op(difference, gradient, ctx.c), None


pseudo_huber_op.register_autograd(_backward, setup_context=_setup)
on_cuda(pseudo_huber_op, "training_triton", "pseudo_huber_triton")
on_cuda(pseudo_huber_backward_op, "training_triton", "pseudo_huber_backward_triton")
