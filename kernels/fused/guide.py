"""Guidance and the step after it: out = a x_t + b g + c uncond + d noise, with g = uncond + w (cond - uncond).

Every conversion of a prediction to x_0 and every first-order update is such a sum, with one number per sample for each
term (:func:`stepdistill.guidance.ddim_update` and its neighbours give them). What may be added to g:

    interval         w where low <= t <= high, else 1             (limited interval, Kynkäänniemi et al. 2024)
    APG              d = cond - uncond + momentum running;  d <- d min(1, max_norm/|d|)
                     g = cond + (w - 1) (d_orthogonal + parallel d_parallel),  parts by cond     (Sadat et al. 2024)
    rescale          g <- g (phi std(cond)/std(g) + 1 - phi),  deviations of a sample            (Lin et al. 2023)
    CFG++            the term c uncond: the update's noise is the unguided one                   (Chung et al. 2024)

One read of the inputs and one write; APG and rescale need sums over a sample first, hence a second read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import Coefficient, broadcast, common_type, differentiated, fusible, on_cuda, per_row
from stepdistill.kernels.layout import empty_result


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


@dataclass(frozen=True)
class Update:
    """What becomes of g: a x_t + b g + c uncond + d noise; each coefficient a number or one per sample (B,).

    Args:
        x_t: the noisy sample (B, ...). noise: fresh normal noise, with ``d``.
    """

    x_t: Tensor
    a: Coefficient
    b: Coefficient
    c: Coefficient | None = None
    d: Coefficient | None = None
    noise: Tensor | None = None


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
        cond, uncond: the two outputs, or the two halves of a doubled batch's (B, ...); any strides.
        w: guidance scale (1 is off), a number or one per sample (B,).
        t: times (B,), for ``rule.interval``. running: the float32 running difference (B, ...), zeros at the start of a
            trajectory and overwritten, for ``rule.momentum``.

    Returns:
        (B, ...) in the common type of all the samples given; computed in at least float32.

    Autograd and float64 take the PyTorch expression; the kernel has no backward and computes in float32.
    """
    given = (update.a, update.b, update.c, update.d, update.x_t, update.noise) if update else ()
    samples = (cond, uncond) + ((update.x_t, update.noise) if update else ())
    if differentiated(cond, uncond, w, *given) or not fusible(*samples):
        return guide_reference(cond, uncond, w, rule, t, running, update)
    return guide_op(cond, uncond, w, rule, t, running, update)


def guide_op(
    cond: Tensor,
    uncond: Tensor,
    w: Coefficient,
    rule: Rule = Rule(),
    t: Tensor | None = None,
    running: Tensor | None = None,
    update: Update | None = None,
) -> Tensor:
    """:func:`guide` as the operation ``torch.ops.stepdistill.guide``, whatever the device: opaque to torch.compile."""
    low, high = rule.interval or (0.0, 1.0)
    x_t, noise = (update.x_t, update.noise) if update else (None, None)
    coefficients = (update.a, update.b, update.c, update.d) if update else (None,) * 4
    return _guide(
        cond,
        uncond,
        x_t,
        noise,
        running if rule.momentum else None,
        t if rule.interval else None,
        per_row(w, cond),
        *(None if value is None else per_row(value, cond) for value in coefficients),
        low,
        high,
        rule.rescale,
        rule.parallel,
        rule.max_norm or 0.0,
        rule.momentum,
    )


@torch.library.custom_op("stepdistill::guide", mutates_args=("running",))
def _guide(
    cond: Tensor,
    uncond: Tensor,
    x_t: Tensor | None,
    noise: Tensor | None,
    running: Tensor | None,
    t: Tensor | None,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    low: float,
    high: float,
    rescale: float,
    parallel: float,
    max_norm: float,
    momentum: float,
) -> Tensor:
    rule = Rule(rescale, (low, high) if t is not None else None, parallel, max_norm or None, momentum)
    update = None if x_t is None else Update(x_t, a, b, c, d, noise)
    value = guide_reference(cond, uncond, w, rule, t, running, update)
    return empty_result(cond, value.dtype).copy_(value)


@_guide.register_fake
def _(cond, uncond, x_t, noise, *_):
    return empty_result(cond, common_type(cond, uncond, x_t, noise))


on_cuda(_guide, "guide_triton", "guide_triton")


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
    dtype = common_type(cond, uncond, *((update.x_t, update.noise) if update else ()))
    compute = torch.promote_types(dtype, torch.float32)
    cond, uncond = cond.to(compute), uncond.to(compute)
    w = broadcast(w, cond, compute)
    if rule.interval is not None:
        low, high = rule.interval
        inside = broadcast(t, cond, torch.float32)
        w = torch.where((low <= inside) & (inside <= high), w, 1.0)
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
    terms = [(update.a, update.x_t), (update.b, guided), (update.c, uncond), (update.d, update.noise)]
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
        norm = difference.square().sum(inner, keepdim=True).sqrt()
        difference = difference * (rule.max_norm / norm).clamp_max(1)
    along = (difference * cond).sum(inner, keepdim=True) / cond.square().sum(inner, keepdim=True)
    return difference + (rule.parallel - 1) * along * cond
