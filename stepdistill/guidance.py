"""Guidance rules for the teacher. One convention everywhere: uncond + w (cond - uncond), w = 1 is off.

What follows a guided prediction (x_0, a solver's step) is linear in the sample and the networks' outputs; the
``*_update`` functions give the coefficients, with which :func:`stepdistill.kernels.guide` does it in the same pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import Conditions, Denoiser
from stepdistill.kernels import Rule, Update, guide
from stepdistill.schedule import Kind, Prediction, Schedule


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    null: Conditions | None,
    scale: float | Tensor,
    rule: Rule | None = None,
) -> Prediction:
    """The denoiser under classifier-free guidance (Ho & Salimans 2022), as one doubled batch.

    Where the pipeline scales the guided output back to the conditional one's norm, so does this.

    Args:
        x_t: noisy samples (B, ...). t: times (B,) in [0, 1].
        cond: conditions, B rows. null: the empty condition, B rows; unused when ``scale`` is 1.
        scale: w, a number or one per row (B,); the number 1 means no guidance and costs one pass instead of two.
        rule: how the two outputs are combined; None: as the denoiser's call is described. Rows outside its interval
            cost no second pass, but knowing which they are is one read from the device.

    Raises:
        ValueError: ``scale`` is not 1 and there is no null condition.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, cond)
    rule = denoiser.rule if rule is None else rule
    if null is None:
        raise ValueError(f"guidance scale {scale} needs a null condition, and this teacher has none")
    if rule.interval is None:
        both = {name: torch.cat([rows, null[name]]) for name, rows in cond.items()}
        doubled = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = doubled.raw.chunk(2)
    else:
        low, high = rule.interval
        second = ((low <= t.float()) & (t.float() <= high)).nonzero()[:, 0]
        both = {name: torch.cat([rows, null[name][second]]) for name, rows in cond.items()}
        doubled = denoiser(torch.cat([x_t, x_t[second]]), torch.cat([t, t[second]]), both)
        conditional = doubled.raw[: len(x_t)]
        # Where both are the same, w makes no difference.
        unconditional = conditional.index_copy(0, second, doubled.raw[len(x_t) :])
    raw = combined(denoiser, conditional, unconditional, scale, t, rule)
    return Prediction(raw, x_t, t, doubled.schedule, doubled.kind)


def combined(
    denoiser: Denoiser, cond: Tensor, uncond: Tensor, scale: float | Tensor, t: Tensor, rule: Rule | None = None
) -> Tensor:
    """The denoiser's two outputs (B, ...) at times t (B,) as its pipeline combines them; arguments as for guided().

    In at least float32, whatever the outputs are in: w times a difference in half precision is w times its rounding.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(wide), uncond.to(wide)
    raw = guide(cond, uncond, scale, denoiser.rule if rule is None else rule, t)
    return with_norm_of(cond, raw) if denoiser.keeps_norm else raw


def rule_text(rule: Rule) -> str:
    """The rule in words that follow a scale: "" for the plain one."""
    text = "" if rule.interval is None else " on times {:g}-{:g}".format(*rule.interval)
    return text + (f" rescaled {rule.rescale:g}" if rule.rescale else "")


def stated_rule(facts: Mapping[str, Any]) -> Rule:
    """The rule that an export's facts state: that of its recipe; the plain one where they say nothing."""
    told = facts.get("recipe", {}).get("teacher", {}).get("guidance", {})
    interval = told.get("interval")
    return Rule(rescale=told.get("rescale", 0.0), interval=None if interval is None else tuple(interval))


def with_norm_of(conditional: Tensor, guided: Tensor) -> Tensor:
    """The guided output (B, ...) scaled to the conditional one's norm along the last axis (Lumina 2, Qwen-Image)."""
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def x0_update(schedule: Schedule, kind: Kind, x_t: Tensor, t: Tensor) -> Update:
    """From a prediction of this ``kind`` at ``x_t`` (B, ...), t (B,), to x_0."""
    return Update(x_t, *_linear(schedule.to_x0, t, kind))


def ddim_update(schedule: Schedule, kind: Kind, x_t: Tensor, t: Tensor, r: Tensor, plus_plus: bool = False) -> Update:
    """From a prediction at time t (B,) by DDIM (Euler on a flow) to time r (B,).

    With ``plus_plus`` the noise that stays is that of the unguided prediction (CFG++, Chung et al. 2024).
    """
    (x_a, x_b), (eps_a, eps_b) = _linear(schedule.to_x0, t, kind), _linear(schedule.to_eps, t, kind)
    alpha, sigma = schedule.coefficients(r)
    a = alpha * x_a + sigma * eps_a
    return Update(x_t, a, alpha * x_b, sigma * eps_b) if plus_plus else Update(x_t, a, alpha * x_b + sigma * eps_b)


def renoise_update(schedule: Schedule, kind: Kind, x_t: Tensor, t: Tensor, r: Tensor, noise: Tensor) -> Update:
    """From a prediction at time t (B,) to x_0, then with fresh ``noise`` (B, ...) to time r (B,): LCM's sampling."""
    a, b = _linear(schedule.to_x0, t, kind)
    alpha, sigma = schedule.coefficients(r)
    return Update(x_t, alpha * a, alpha * b, d=sigma, noise=noise)


def _linear(conversion, t: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(a, b), (B,) each, of a conversion a x_t + b prediction, read off at unit arguments."""
    one, zero = torch.ones_like(t, dtype=torch.float64), torch.zeros_like(t, dtype=torch.float64)
    return conversion(zero, one, t, kind), conversion(one, zero, t, kind)
