"""Score differences and what is minimised with them: DMD's normalised gradient, its surrogate loss, SiD's loss.

The sums over a sample are partial sums in a fixed order, so equal inputs give equal bits; a second read uses them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.kernels.dispatch import HAS_TRITON, common_type, differentiated, fusible, launches, operation
from stepdistill.kernels.layout import empty_result

if HAS_TRITON:
    from stepdistill.kernels.training_triton import dmd_gradient_triton, sid_loss_backward_triton, sid_loss_triton


def mean_per_sample(value: Tensor) -> Tensor:
    """Mean over all but the batch dimension, kept broadcastable: (B, ...) -> (B, 1, ...)."""
    return value.mean(dim=tuple(range(1, value.ndim)), keepdim=True)


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor, floor: float = 0.0) -> Tensor:
    """(D_fake - D_real) / max(mean|x - D_real|, floor), per sample (DMD eq. 7-8 in x_0 space, as DMD2's code).

    Shapes (B, ...). Computed in at least float32; autograd and float64 take the PyTorch expression.
    """
    if differentiated(x, real, fake) or not fusible(x, real, fake):
        return dmd_gradient_reference(x, real, fake, floor)
    return dmd_gradient_op(x, real, fake, floor)


def dmd_gradient_reference(x: Tensor, real: Tensor, fake: Tensor, floor: float = 0.0) -> Tensor:
    """The definition of :func:`dmd_gradient`."""
    dtype = common_type(x, real, fake)
    compute = torch.promote_types(dtype, torch.float32)
    x, real, fake = x.to(compute), real.to(compute), fake.to(compute)
    weight = mean_per_sample((x - real).abs())
    return ((fake - real) / (weight.clamp_min(floor) if floor else weight)).to(dtype)


@operation("dmd_gradient")
def dmd_gradient_op(x: Tensor, real: Tensor, fake: Tensor, floor: float) -> Tensor:
    """:func:`dmd_gradient` as one operation, whatever the device."""
    if launches(x):
        with torch.cuda.device_of(x):  # Triton launches on the current one
            return dmd_gradient_triton(x, real, fake, floor)
    return empty_result(x, common_type(x, real, fake)).copy_(dmd_gradient_reference(x, real, fake, floor))


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``; its value is half the mean of g^2."""
    return _Surrogate.apply(x, gradient) if fusible(x, gradient) else surrogate_reference(x, gradient)


def surrogate_reference(x: Tensor, gradient: Tensor) -> Tensor:
    """The definition of :func:`surrogate`."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


class _Surrogate(torch.autograd.Function):
    """x cancels from the value and from its derivative: one reduction of g, and g kept for backward, are enough."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return 0.5 * norm.square() / gradient.numel()

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad / gradient.numel())).to(ctx.dtype), None


def identity_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """(r - f) (r - x - alpha (r - f)), elementwise: SiD's estimate of (1 - alpha) (r - f)^2 (Zhou et al. 2024, eq. 23).

    Args:
        x: the student's samples (B, ...).
        real: r, x_t denoised by the teacher, with its graph back to ``x``.
        fake: f, x_t denoised by the critic, with its graph back to ``x``.
    """
    return (real - fake) * (real - x - alpha * (real - fake))


def sid_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float, floor: float = 1e-5) -> Tensor:
    """The mean of :func:`identity_loss` / max(mean|x - r|, floor), the weight of a sample without graph.

    Differentiable in all three (B, ...), once; float64 takes the PyTorch expression.
    """
    if not fusible(x, real, fake):
        return sid_loss_reference(x, real, fake, alpha, floor)
    return sid_loss_op(x, real, fake, alpha, floor)[0]


def sid_loss_reference(x: Tensor, real: Tensor, fake: Tensor, alpha: float, floor: float = 1e-5) -> Tensor:
    """The definition of :func:`sid_loss`."""
    compute = torch.promote_types(common_type(x, real, fake), torch.float32)
    x, real, fake = x.to(compute), real.to(compute), fake.to(compute)
    weight = mean_per_sample((x - real).abs()).detach().clamp_min(floor)
    return (identity_loss(x, real, fake, alpha) / weight).mean()


@operation("sid_loss")
def sid_loss_op(x: Tensor, real: Tensor, fake: Tensor, alpha: float, floor: float) -> tuple[Tensor, Tensor]:
    """(:func:`sid_loss`, the weights (B,)), float32, whatever the device."""
    if launches(x):
        with torch.cuda.device_of(x):  # Triton launches on the current one
            return sid_loss_triton(x, real, fake, alpha, floor)
    weight = mean_per_sample((x.float() - real.float()).abs()).clamp_min(floor)
    return sid_loss_reference(x, real, fake, alpha, floor).float(), weight.flatten()


@operation("sid_loss_backward")
def sid_loss_backward_op(
    x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, gradient: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`sid_loss` in x, real and fake; ``gradient`` is that of the loss, 0-d."""
    if launches(x):
        with torch.cuda.device_of(x):  # Triton launches on the current one
            return sid_loss_backward_triton(x, real, fake, weight, gradient, alpha)
    difference, gap = real.float() - fake.float(), real.float() - x.float()
    scale = (gradient / (x.numel() * weight)).reshape(-1, *[1] * (x.ndim - 1))
    along_fake = 2 * alpha * difference - gap
    gradients = (-difference * scale, (difference - along_fake) * scale, along_fake * scale)
    return tuple(empty_result(x, of.dtype).copy_(value) for of, value in zip((x, real, fake), gradients, strict=True))


def _setup(ctx, inputs, output) -> None:
    *samples, ctx.alpha, _ = inputs
    ctx.save_for_backward(*samples, output[1])


def _backward(ctx, gradient, _):
    return *sid_loss_backward_op(*ctx.saved_tensors, gradient, ctx.alpha), None, None


sid_loss_op.register_autograd(_backward, setup_context=_setup)
