"""Guidance and the step after it: out = a x + b g + c uncond, with g = uncond + w (cond - uncond).

Every conversion of a prediction to x_0 and every deterministic first-order step is such a sum, with one number per
sample for each term. What may be added to g:

    interval         w where low <= t <= high, else 1             (limited interval, Kynkäänniemi et al. 2024)
    APG              d = cond - uncond + momentum running;  d <- d min(1, max_norm/|d|)
                     g = cond + (w - 1) (d_orthogonal + parallel d_parallel),  parts by cond     (Sadat et al. 2024)
    rescale          g <- g (phi std(cond)/std(g) + 1 - phi),  deviations of a sample            (Lin et al. 2023)
    CFG++            the term c uncond: the noise that a step keeps is the unguided one          (Chung et al. 2024)

One read of the inputs and one write; APG and rescale need sums over a sample first, hence a second read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import (
    HAS_TRITON,
    Coefficient,
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
    from stepdistill.kernels.guide_triton import guide_triton


@dataclass(frozen=True)
class Rule:
    """How cond and uncond are combined; by default plain classifier-free guidance.

    Args:
        rescale: phi in [0, 1]; 0 is off.
        interval: the times with guidance, both ends included, compared in float32; None: all of them.
        parallel: APG's factor on the part of the difference along ``cond``; 1 keeps it.
        max_norm: APG's largest norm of a sample's difference; None: any.
        momentum: APG's factor on the running difference, usually below 0; 0 is off.
    """

    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    parallel: float = 1.0
    max_norm: float | None = None
    momentum: float = 0.0

    @property
    def projects(self) -> bool:
        """Whether any part of APG is on."""
        return self.parallel != 1 or self.max_norm is not None or self.momentum != 0

    def inside(self, t: Tensor) -> Tensor:
        """Whether there is guidance at times t (any shape); only where an interval is stated."""
        low, high = self.interval
        t = t.float()
        return (low <= t) & (t <= high)


@dataclass(frozen=True)
class Update:
    """What becomes of g: a x + b g + c uncond; each coefficient a number or one per sample (B,).

    Args:
        x: the sample (B, ...).
        a: of the sample.
        b: of g.
        c: of the unconditional output; None: 0.
    """

    x: Tensor
    a: Coefficient
    b: Coefficient
    c: Coefficient | None = None


def guide(
    cond: Tensor,
    uncond: Tensor,
    w: Coefficient,
    rule: Rule = Rule(),
    t: Tensor | None = None,
    running: Tensor | None = None,
    update: Update | None = None,
) -> Tensor:
    """The guided output, or with ``update`` what follows from it, by one kernel where Triton can run it.

    Args:
        cond: the conditional output, or that half of a doubled batch's (B, ...); any strides.
        uncond: the unconditional output (B, ...).
        w: guidance scale (1 is off), a number or one per sample (B,).
        rule: what else is done.
        t: times (B,), for ``rule.interval``.
        running: the float32 running difference (B, ...), zeros at the start of a trajectory and overwritten, for
            ``rule.momentum``.
        update: the step after guidance.

    Returns:
        (B, ...) in the common type of all the samples given; computed in at least float32.

    Autograd and float64 take the PyTorch expression; the kernel has no backward and computes in float32. The plain rule
    alone is torch.lerp, which is one kernel of PyTorch's own.
    """
    given, samples = ((update.a, update.b, update.c, update.x), (update.x,)) if update else ((), ())
    if differentiated(cond, uncond, w, *given) or not fusible(cond, uncond, *samples):
        return guide_reference(cond, uncond, w, rule, t, running, update)
    if rule == Rule() and update is None and cond.dtype == uncond.dtype == torch.float32:
        return torch.lerp(uncond, cond, broadcast(w, cond, torch.float32) if isinstance(w, Tensor) else w)
    return guide_op(cond, uncond, *operands(cond, w, rule, t, running, update))


def operands(
    like: Tensor, w: Coefficient, rule: Rule, t: Tensor | None, running: Tensor | None, update: Update | None
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor], list[float]]:
    """The arguments of ``torch.ops.stepdistill.guide`` that follow the two outputs."""
    step = [] if update is None else [update.x, *(per_row(one, like) for one in (update.a, update.b))]
    if update is not None and update.c is not None:
        step.append(per_row(update.c, like))
    numbers = [*(rule.interval or (0.0, 1.0)), rule.rescale, rule.parallel, rule.max_norm or 0.0, rule.momentum]
    return per_row(w, like), t if rule.interval else None, running if rule.momentum else None, step, numbers


@operation("guide", mutates_args=("running",))
def guide_op(
    cond: Tensor,
    uncond: Tensor,
    w: Tensor,
    t: Tensor | None,
    running: Tensor | None,
    step: list[Tensor],
    numbers: list[float],
) -> Tensor:
    """:func:`guide` as one operation, whatever the device: torch.compile sees the kernel inside.

    Args:
        cond: (B, ...).
        uncond: (B, ...).
        w: float32 (B,).
        t: (B,), None: no interval.
        running: float32 (B, ...), None: no momentum.
        step: nothing, or x and a, b and perhaps c of an :class:`Update`, float32 (B,).
        numbers: low, high, rescale, parallel, max_norm (0: any), momentum.
    """
    if launches(cond):
        with torch.cuda.device_of(cond):  # Triton launches on the current one
            return guide_triton(cond, uncond, w, t, running, step, numbers)
    low, high, rescale, parallel, max_norm, momentum = numbers
    rule = Rule(rescale, (low, high) if t is not None else None, parallel, max_norm or None, momentum)
    value = guide_reference(cond, uncond, w, rule, t, running, Update(*step) if step else None)
    return empty_result(cond, value.dtype).copy_(value)


def guide_reference(
    cond: Tensor,
    uncond: Tensor,
    w: Coefficient,
    rule: Rule = Rule(),
    t: Tensor | None = None,
    running: Tensor | None = None,
    update: Update | None = None,
) -> Tensor:
    """The definition of :func:`guide`: same arguments, same result, differentiable."""
    dtype = common_type(cond, uncond, update and update.x)
    compute = torch.promote_types(dtype, torch.float32)
    cond, uncond = cond.to(compute), uncond.to(compute)
    w = broadcast(w, cond, compute)
    if rule.interval is not None:
        w = torch.where(rule.inside(broadcast(t, cond, torch.float32)), w, 1.0)
    if rule.projects:
        guided = cond + (w - 1) * _projected(cond, cond - uncond, rule, running)
    else:
        guided = uncond + w * (cond - uncond)
    if rule.rescale:
        inner = tuple(range(1, cond.ndim))
        ratio = cond.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
        guided = guided * (rule.rescale * ratio + 1 - rule.rescale)
    if update is None:
        return guided.to(dtype)
    terms = [(update.a, update.x), (update.b, guided), (update.c, uncond)]
    first, *others = (
        broadcast(factor, cond, compute) * value.to(compute) for factor, value in terms if factor is not None
    )
    return sum(others, first).to(dtype)


def _projected(cond: Tensor, difference: Tensor, rule: Rule, running: Tensor | None) -> Tensor:
    """APG's update direction: the difference with its running mean, shortened, its part along ``cond`` scaled."""
    if rule.momentum:
        difference = difference + rule.momentum * running.to(difference.dtype)
        running.copy_(difference.detach())
    inner = tuple(range(1, cond.ndim))
    if rule.max_norm is not None:
        norm = torch.linalg.vector_norm(difference, dim=inner, keepdim=True)
        difference = difference * (rule.max_norm / norm.clamp_min(rule.max_norm))  # has a gradient at 0 too
    along = (difference * cond).sum(inner, keepdim=True) / cond.square().sum(inner, keepdim=True)
    return difference + (rule.parallel - 1) * along * cond
