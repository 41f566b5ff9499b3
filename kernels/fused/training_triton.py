"""The Triton kernels of training: forward diffusion, DMD's gradient, SiD's and the pseudo-Huber loss; float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from stepdistill.kernels.dispatch import common_type
from stepdistill.kernels.layout import empty_result, rows
from stepdistill.kernels.sums_triton import BLOCK, PARTS, chunks, sum_of_parts


@triton.jit
def _row(pointer, sample, stride, column, inside):
    return tl.load(pointer + sample * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight(sums, sample, parts, elements, floor, PARTS: tl.constexpr):
    """max(mean|x - real|, floor) of a sample, from as many partial sums as it has."""
    return tl.maximum(sum_of_parts(sums + sample * PARTS, parts, PARTS) / elements, floor)


@triton.jit
def add_noise_kernel(x0, eps, alpha, sigma, out, s_x0, s_eps, s_alpha, s_sigma, elements, BLOCK: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    value = tl.load(alpha + sample * s_alpha) * _row(x0, sample, s_x0, column, inside)
    value += tl.load(sigma + sample * s_sigma) * _row(eps, sample, s_eps, column, inside)
    tl.store(out + sample * elements + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gap_sums_kernel(
    x, real, sums, s_x, s_real, elements, CHUNK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (p, j): the sum of |x - real| over chunk p of sample j, to sums[j, p]."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = part.to(tl.int64) * CHUNK
    for start in range(0, CHUNK, BLOCK):
        column = begin + start + tl.arange(0, BLOCK)
        inside = column < elements
        total += tl.abs(_row(x, sample, s_x, column, inside) - _row(real, sample, s_real, column, inside))
    tl.store(sums + sample * PARTS + part, tl.sum(total))


@triton.jit
def dmd_gradient_kernel(
    real, fake, sums, out, s_real, s_fake, elements, parts, floor, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    # Read before the weight, whose sum waits for all of the program's threads: no read passes such a barrier.
    difference = _row(fake, sample, s_fake, column, inside) - _row(real, sample, s_real, column, inside)
    value = difference / _weight(sums, sample, parts, elements, floor, PARTS)
    tl.store(out + sample * elements + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sid_sums_kernel(
    x,
    real,
    fake,
    gaps,
    sums,
    weights,
    s_x,
    s_real,
    s_fake,
    elements,
    alpha,
    floor,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, j): the sum of SiD's loss over chunk p of sample j, to sums[j, p], and the weight to weights[j]."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = part.to(tl.int64) * CHUNK
    for start in range(0, CHUNK, BLOCK):
        column = begin + start + tl.arange(0, BLOCK)
        inside = column < elements
        r = _row(real, sample, s_real, column, inside)
        difference = r - _row(fake, sample, s_fake, column, inside)
        total += difference * (r - _row(x, sample, s_x, column, inside) - alpha * difference)
    weight = _weight(gaps, sample, tl.num_programs(0), elements, floor, PARTS)
    tl.store(sums + sample * PARTS + part, tl.sum(total) / weight)
    if part == 0:
        tl.store(weights + sample, weight)


@triton.jit
def sid_backward_kernel(
    x,
    real,
    fake,
    weights,
    gradient,
    to_x,
    to_real,
    to_fake,
    s_x,
    s_real,
    s_fake,
    elements,
    total,
    alpha,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    at = sample * elements + column
    r = _row(real, sample, s_real, column, inside)
    difference = r - _row(fake, sample, s_fake, column, inside)
    scale = tl.load(gradient).to(tl.float32) / (total * tl.load(weights + sample))
    along_fake = 2.0 * alpha * difference - (r - _row(x, sample, s_x, column, inside))
    tl.store(to_x + at, (-difference * scale).to(to_x.dtype.element_ty), mask=inside)
    tl.store(to_real + at, ((difference - along_fake) * scale).to(to_real.dtype.element_ty), mask=inside)
    tl.store(to_fake + at, (along_fake * scale).to(to_fake.dtype.element_ty), mask=inside)


@triton.jit
def huber_sums_kernel(
    difference, sums, stride, elements, c, CHUNK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = part.to(tl.int64) * CHUNK
    for start in range(0, CHUNK, BLOCK):
        column = begin + start + tl.arange(0, BLOCK)
        inside = column < elements
        d = _row(difference, sample, stride, column, inside)
        total += tl.where(inside, tl.sqrt(d * d + c * c) - c, 0.0)
    tl.store(sums + sample * PARTS + part, tl.sum(total))


@triton.jit
def huber_backward_kernel(difference, gradient, out, stride, elements, total, c, BLOCK: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    d = _row(difference, sample, stride, column, inside)
    value = d / tl.sqrt(d * d + c * c) * (tl.load(gradient).to(tl.float32) / total)
    tl.store(out + sample * elements + column, value.to(out.dtype.element_ty), mask=inside)


def _blocks(like: Tensor) -> tuple[int, tuple[int, int]]:
    """(elements of a sample, the grid with a program for each block of each sample)."""
    elements = like[0].numel()
    return elements, (triton.cdiv(elements, BLOCK), len(like))


def _chunks(like: Tensor) -> tuple[int, int, tuple[int, int], Tensor]:
    """(elements of a sample, elements of a partial sum, the grid of partial sums, room for PARTS of each sample)."""
    elements = like[0].numel()
    chunk, parts = chunks(elements)
    sums = torch.empty(len(like), PARTS, dtype=torch.float32, device=like.device)
    return elements, chunk, (parts, len(like)), sums


def _gaps(x: Tensor, real: Tensor, strides: list[int]) -> tuple[Tensor, int]:
    """(partial sums of |x - real|, how many of them a sample has)."""
    elements, chunk, grid, sums = _chunks(x)
    wrap_triton(gap_sums_kernel)[grid](x, real, sums, *strides, elements, CHUNK=chunk, PARTS=PARTS, BLOCK=BLOCK)
    return sums, grid[0]


def add_noise_triton(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``torch.ops.stepdistill.add_noise``; coefficients (B,) float32 of any stride."""
    out = empty_result(x0, common_type(x0, eps))
    if out.numel():
        (x0, eps), strides = rows(out, x0, eps)
        elements, grid = _blocks(out)
        strides += [alpha.stride(0), sigma.stride(0)]
        wrap_triton(add_noise_kernel)[grid](x0, eps, alpha, sigma, out, *strides, elements, BLOCK=BLOCK)
    return out


def dmd_gradient_triton(x: Tensor, real: Tensor, fake: Tensor, floor: float) -> Tensor:
    """``torch.ops.stepdistill.dmd_gradient``."""
    out = empty_result(x, common_type(x, real, fake))
    if out.numel():
        (x, real, fake), strides = rows(out, x, real, fake)
        sums, parts = _gaps(x, real, strides[:2])
        elements, grid = _blocks(out)
        wrap_triton(dmd_gradient_kernel)[grid](
            real, fake, sums, out, *strides[1:], elements, parts, floor, PARTS=PARTS, BLOCK=BLOCK
        )
    return out


def sid_loss_triton(x: Tensor, real: Tensor, fake: Tensor, alpha: float, floor: float) -> tuple[Tensor, Tensor]:
    """``torch.ops.stepdistill.sid_loss``."""
    (x, real, fake), strides = rows(empty_result(x, x.dtype), x, real, fake)
    gaps, parts = _gaps(x, real, strides[:2])
    elements, chunk, grid, sums = _chunks(x)
    weights = torch.empty(len(x), dtype=torch.float32, device=x.device)
    wrap_triton(sid_sums_kernel)[grid](
        x, real, fake, gaps, sums, weights, *strides, elements, alpha, floor, CHUNK=chunk, PARTS=PARTS, BLOCK=BLOCK
    )
    return sums[:, :parts].sum() / x.numel(), weights


def sid_loss_backward_triton(
    x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, gradient: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.stepdistill.sid_loss_backward``."""
    gradients = tuple(empty_result(x, of.dtype) for of in (x, real, fake))
    (x, real, fake), strides = rows(gradients[0], x, real, fake)
    elements, grid = _blocks(x)
    wrap_triton(sid_backward_kernel)[grid](
        x, real, fake, weight, gradient, *gradients, *strides, elements, x.numel(), alpha, BLOCK=BLOCK
    )
    return gradients


def pseudo_huber_triton(difference: Tensor, c: float) -> Tensor:
    """``torch.ops.stepdistill.pseudo_huber``."""
    (difference,), (stride,) = rows(empty_result(difference, difference.dtype), difference)
    elements, chunk, grid, sums = _chunks(difference)
    wrap_triton(huber_sums_kernel)[grid](difference, sums, stride, elements, c, CHUNK=chunk, PARTS=PARTS, BLOCK=BLOCK)
    return sums[:, : grid[0]].sum() / difference.numel()


def pseudo_huber_backward_triton(difference: Tensor, gradient: Tensor, c: float) -> Tensor:
    """``torch.ops.stepdistill.pseudo_huber_backward``."""
    out = empty_result(difference, difference.dtype)
    (difference,), (stride,) = rows(out, difference)
    elements, grid = _blocks(out)
    wrap_triton(huber_backward_kernel)[grid](difference, gradient, out, stride, elements, out.numel(), c, BLOCK=BLOCK)
    return out
