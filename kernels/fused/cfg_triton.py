"""The Triton kernel of ``cfg_affine``: three reads and one write per element, float32 arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _cfg_affine(cond, uncond, x_t, w, a, b, out, elements, BLOCK: tl.constexpr):
    """Program (i, j) handles block i of sample j; w, a, b hold one float32 per sample."""
    sample = tl.program_id(1).to(tl.int64)  # a large batch has more than 2^31 elements
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    at = sample * elements + column
    c = tl.load(cond + at, mask=inside).to(tl.float32)
    u = tl.load(uncond + at, mask=inside).to(tl.float32)
    x = tl.load(x_t + at, mask=inside).to(tl.float32)
    guided = u + tl.load(w + sample) * (c - u)
    value = tl.load(a + sample) * x + tl.load(b + sample) * guided
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def cfg_affine_triton(
    cond: Tensor,
    uncond: Tensor,
    x_t: Tensor,
    w: Tensor | float,
    a: Tensor | float,
    b: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """``cfg_affine`` by the kernel, with the result in ``dtype``.

    Raises:
        ValueError: the three tensors differ in shape (the kernel would read out of bounds).
    """
    if not cond.shape == uncond.shape == x_t.shape:
        raise ValueError(f"shapes differ: cond {cond.shape}, uncond {uncond.shape}, x_t {x_t.shape}")
    out = torch.empty(x_t.shape, dtype=dtype, device=x_t.device)
    if out.numel() == 0:
        return out
    batch = len(x_t)
    w, a, b = (
        torch.as_tensor(value, dtype=torch.float32, device=x_t.device).expand(batch).contiguous() for value in (w, a, b)
    )
    elements = out[0].numel()
    # Samples lie on the second grid axis, which CUDA limits to 65535: far more than a batch of latents.
    _cfg_affine[(triton.cdiv(elements, BLOCK), batch)](
        cond.contiguous(), uncond.contiguous(), x_t.contiguous(), w, a, b, out, elements, BLOCK=BLOCK
    )
    return out
