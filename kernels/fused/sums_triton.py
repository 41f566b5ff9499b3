"""Sums over a sample, as the Triton kernels make them: partial ones first, then their total; float32.

How many partial sums a sample has, and their order, depend on its size alone: deterministic.
"""

import triton
import triton.language as tl

BLOCK = 1024
PARTS = 64
"""Room for so many partial sums of a sample."""


@triton.jit
def sum_of_parts(sums, parts, PARTS: tl.constexpr):
    """The sum of the first ``parts`` numbers at ``sums``; what lies behind them was never written."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + part, mask=part < parts, other=0.0))


def chunks(elements: int) -> tuple[int, int]:
    """(elements of a partial sum, how many partial sums) of a sample with so many elements."""
    chunk = triton.cdiv(elements, PARTS * BLOCK) * BLOCK
    return chunk, triton.cdiv(elements, chunk)
