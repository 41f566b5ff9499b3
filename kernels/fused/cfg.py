"""Classifier-free guidance and the affine step around it: a x_t + b (uncond + w (cond - uncond)).

With (a, b) = (0, 1) this is the guided network output; with the coefficients of a prediction kind it is x_0
(epsilon: 1/alpha, -sigma/alpha; v on VP: alpha, -sigma; flow: 1, -sigma); with those of a solver, its next sample.
"""

import torch
from torch import Tensor

try:
    from stepdistill.kernels.cfg_triton import cfg_affine_triton
except ImportError:  # Triton is an optional dependency and has no wheels for some systems.
    cfg_affine_triton = None


def cfg_affine(
    cond: Tensor, uncond: Tensor, x_t: Tensor, w: Tensor | float, a: Tensor | float, b: Tensor | float
) -> Tensor:
    """a x_t + b (uncond + w (cond - uncond)) in one pass over memory where Triton can run it.

    Args:
        cond, uncond: the two halves of a doubled batch's output (B, ...); x_t: the noisy sample (B, ...).
        w: guidance scale (1 is off), a, b: coefficients; each a number or one per sample (B,).

    Returns:
        (B, ...), in the common type of the three tensors; computed in at least float32.

    Autograd and float64 take the PyTorch expression; the kernel has no backward and computes in float32.
    """
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), x_t.dtype)
    tensors = [value for value in (cond, uncond, x_t, w, a, b) if isinstance(value, Tensor)]
    differentiated = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    if cfg_affine_triton is None or not cond.is_cuda or differentiated or dtype == torch.float64:
        return cfg_affine_reference(cond, uncond, x_t, w, a, b)
    return cfg_affine_triton(cond, uncond, x_t, w, a, b, dtype)


def cfg_affine_reference(
    cond: Tensor, uncond: Tensor, x_t: Tensor, w: Tensor | float, a: Tensor | float, b: Tensor | float
) -> Tensor:
    """The definition of :func:`cfg_affine`: same arguments, same result, differentiable."""
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), x_t.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    cond, uncond, x_t = cond.to(compute), uncond.to(compute), x_t.to(compute)
    w, a, b = (
        torch.as_tensor(value, dtype=compute, device=x_t.device).reshape(-1, *[1] * (x_t.ndim - 1))
        for value in (w, a, b)
    )
    return (a * x_t + b * (uncond + w * (cond - uncond))).to(dtype)
