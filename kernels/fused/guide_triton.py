"""The Triton kernels of ``guide``: one read of the pair, two where sums over a sample are needed; float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from stepdistill.kernels.dispatch import common_type
from stepdistill.kernels.layout import empty_result, rows
from stepdistill.kernels.sums_triton import BLOCK, PARTS, chunks, sum_of_parts

SUMS = 5


@triton.jit
def _pair(cond, uncond, running, sample, s_cond, s_uncond, s_run, column, inside, momentum, MOMENTUM: tl.constexpr):
    """cond and the difference to uncond, with its running part."""
    c = tl.load(cond + sample * s_cond + column, mask=inside, other=0.0).to(tl.float32)
    difference = c - tl.load(uncond + sample * s_uncond + column, mask=inside, other=0.0).to(tl.float32)
    if MOMENTUM:
        difference += momentum * tl.load(running + sample * s_run + column, mask=inside, other=0.0)
    return c, difference


@triton.jit
def sums_kernel(
    cond,
    uncond,
    running,
    sums,
    s_cond,
    s_uncond,
    s_run,
    elements,
    momentum,
    MOMENTUM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, j): sums of c, d, c c, d d, c d over chunk p of sample j, to sums[j, :, p]; writes the running d."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c_sum = tl.zeros((BLOCK,), tl.float32)
    d_sum = tl.zeros((BLOCK,), tl.float32)
    cc = tl.zeros((BLOCK,), tl.float32)
    dd = tl.zeros((BLOCK,), tl.float32)
    cd = tl.zeros((BLOCK,), tl.float32)
    begin = part.to(tl.int64) * CHUNK
    for start in range(0, CHUNK, BLOCK):
        column = begin + start + tl.arange(0, BLOCK)
        inside = column < elements
        c, d = _pair(cond, uncond, running, sample, s_cond, s_uncond, s_run, column, inside, momentum, MOMENTUM)
        if MOMENTUM:
            tl.store(running + sample * s_run + column, d, mask=inside)
        c_sum += c
        d_sum += d
        cc += c * c
        dd += d * d
        cd += c * d
    at = sums + sample * 5 * PARTS + part
    tl.store(at, tl.sum(c_sum))
    tl.store(at + PARTS, tl.sum(d_sum))
    tl.store(at + 2 * PARTS, tl.sum(cc))
    tl.store(at + 3 * PARTS, tl.sum(dd))
    tl.store(at + 4 * PARTS, tl.sum(cd))


@triton.jit
def guide_kernel(
    cond,
    uncond,
    x,
    running,
    t,
    w,
    a,
    b,
    c,
    sums,
    out,
    s_cond,
    s_uncond,
    s_x,
    s_run,
    s_t,
    s_w,
    s_a,
    s_b,
    s_c,
    elements,
    parts,
    low,
    high,
    rescale,
    parallel,
    max_norm,
    UPDATE: tl.constexpr,
    PLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    PROJECTS: tl.constexpr,
    CLIPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    RESCALE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, j) writes block i of sample j. g is lin_c cond + lin_d d with numbers of the sample for lin_*."""
    sample = tl.program_id(1).to(tl.int64)  # a large batch has more than 2^31 elements
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    # Read before the sums, which wait for all of the program's threads: no read passes such a barrier.
    value_c = tl.load(cond + sample * s_cond + column, mask=inside, other=0.0).to(tl.float32)
    value_u = tl.load(uncond + sample * s_uncond + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(w + sample * s_w)
    if LIMITED:
        time = tl.load(t + sample * s_t).to(tl.float32)
        scale = tl.where((time >= low) & (time <= high), scale, 1.0)
    lin_c = 1.0
    lin_d = scale - 1.0
    if PROJECTS or RESCALE:
        at = sums + sample * 5 * PARTS
        cc = sum_of_parts(at + 2 * PARTS, parts, PARTS)
        dd = sum_of_parts(at + 3 * PARTS, parts, PARTS)
        cd = sum_of_parts(at + 4 * PARTS, parts, PARTS)
        if PROJECTS:
            if CLIPS:
                lin_d *= max_norm / tl.maximum(tl.sqrt(dd), max_norm)
            lin_c += lin_d * (parallel - 1.0) * cd / cc
        if RESCALE:
            # g is linear in c and d, and so its variance follows from their moments.
            c_mean = sum_of_parts(at, parts, PARTS) / elements
            d_mean = sum_of_parts(at + PARTS, parts, PARTS) / elements
            c_var = cc / elements - c_mean * c_mean
            d_var = dd / elements - d_mean * d_mean
            cov = cd / elements - c_mean * d_mean
            variance = lin_c * lin_c * c_var + lin_d * lin_d * d_var + 2.0 * lin_c * lin_d * cov
            factor = rescale * tl.sqrt(c_var / variance) + 1.0 - rescale
            lin_c *= factor
            lin_d *= factor
    if MOMENTUM:
        guided = lin_c * value_c + lin_d * tl.load(running + sample * s_run + column, mask=inside, other=0.0)
    elif PROJECTS or RESCALE:
        guided = lin_c * value_c + lin_d * (value_c - value_u)
    else:
        guided = value_u + scale * (value_c - value_u)
    if UPDATE:
        value_x = tl.load(x + sample * s_x + column, mask=inside, other=0.0).to(tl.float32)
        guided = tl.load(a + sample * s_a) * value_x + tl.load(b + sample * s_b) * guided
    if PLUS:
        guided += tl.load(c + sample * s_c) * value_u
    tl.store(out + sample * elements + column, guided.to(out.dtype.element_ty), mask=inside)


def guide_triton(
    cond: Tensor,
    uncond: Tensor,
    w: Tensor,
    t: Tensor | None,
    running: Tensor | None,
    step: list[Tensor],
    numbers: list[float],
) -> Tensor:
    """``torch.ops.stepdistill.guide`` by the kernels; arguments as there, coefficients of any stride.

    Raises:
        ValueError: the samples differ in shape.
    """
    x, a, b, c = [*step, *[None] * (4 - len(step))]
    low, high, rescale, parallel, max_norm, momentum = numbers
    out = empty_result(cond, common_type(cond, uncond, x))
    if out.numel() == 0:
        return out
    (cond, uncond, x, state), strides = rows(out, cond, uncond, x, running)
    batch, elements = len(cond), cond[0].numel()
    projects, sums = parallel != 1 or max_norm > 0 or momentum != 0, None
    chunk, parts = chunks(elements)
    columns = (t, w, a, b, c)
    places = [*strides, *(0 if column is None else column.stride(0) for column in columns)]
    if projects or rescale:
        sums = torch.empty(batch, SUMS, PARTS, dtype=torch.float32, device=cond.device)
        summed = (cond, uncond, state, sums, *strides[:2], strides[3], elements, momentum)
        # Samples lie on the second grid axis, which CUDA limits to 65535: far more than a batch of latents.
        wrap_triton(sums_kernel)[(parts, batch)](*summed, MOMENTUM=momentum != 0, CHUNK=chunk, PARTS=PARTS, BLOCK=BLOCK)
    scalars = (elements, parts, low, high, rescale, parallel, max_norm)
    wrap_triton(guide_kernel)[(triton.cdiv(elements, BLOCK), batch)](
        *(cond, uncond, x, state, *columns, sums, out, *places, *scalars),
        UPDATE=x is not None,
        PLUS=c is not None,
        LIMITED=t is not None,
        PROJECTS=projects,
        CLIPS=max_norm > 0,
        MOMENTUM=momentum != 0,
        RESCALE=rescale != 0,
        PARTS=PARTS,
        BLOCK=BLOCK,
    )
    if state is not running:
        running.copy_(state)
    return out
