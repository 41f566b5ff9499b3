"""Guidance rules for the teacher. One convention everywhere: uncond + w (cond - uncond), w = 1 is off.

Adaptive Projected Guidance (Sadat et al. 2024) is a rule of the predicted x_0, as in the paper; all others are rules of
the network's output, as in the pipelines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Conditions, Denoiser, joined
from stepdistill.diffusion.experts import parts
from stepdistill.diffusion.passes import in_pass
from stepdistill.diffusion.schedule import Prediction, per_sample
from stepdistill.errors import InputError
from stepdistill.kernels import Rule, Update, guide


@dataclass(frozen=True)
class Pair:
    """The two outputs of a denoiser at one point, before they are combined: alone, or with the step that follows.

    Args:
        denoiser: whose outputs they are.
        cond: the conditional prediction, B rows.
        uncond: the unconditional output (B, ...), or what stands for it; None: no guidance.
        scale: w, a number or one per row (B,).
        rule: how they are combined; None: as the denoiser's call is described.
        share: how much of the result is guided (B,), the rest is ``uncond``; None: all of it.
        running: APG's running difference, float32 (B, ...), overwritten when the two are combined; None: no momentum.
    """

    denoiser: Denoiser
    cond: Prediction
    uncond: Tensor | None = None
    scale: float | Tensor = 1.0
    rule: Rule | None = None
    share: Tensor | None = None
    running: Tensor | None = None

    @cached_property
    def raw(self) -> Tensor:
        """The guided output (B, ...).

        In at least float32, whatever the outputs are in: w times a difference in half precision is w times its
        rounding.
        """
        cond, uncond = self.cond.raw, self.uncond
        if uncond is None:
            return cond
        wide = torch.promote_types(cond.dtype, torch.float32)
        cond, uncond = cond.to(wide), uncond.to(wide)
        if self._rule.projects:
            raw = self._projected(uncond)
        else:
            raw = guide(cond, uncond, self.scale, self._rule, self.cond.t)
        if self.denoiser.norm_axis:
            raw = with_norm_of(cond, raw, self.denoiser.norm_axis)
        return raw if self.share is None else torch.lerp(uncond, raw, per_sample(self.share, raw))

    @property
    def prediction(self) -> Prediction:
        """The guided output as a prediction."""
        return self.cond if self.uncond is None else replace(self.cond, raw=self.raw)

    def step(self, sample: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a sample + b guided output (B, ...), in one pass with guidance where nothing comes between.

        Args:
            sample: float32 (B, ...): x_t, or what a scheduler made it of.
            a: of one element, on its device.
            b: of one element, on its device.
        """
        if self.uncond is None or self.denoiser.norm_axis or self._rule.projects:
            return a * sample + b * self.raw.to(sample)  # a number of one element leaves half precision as it is
        update = Update(sample, a, b) if self.share is None else Update(sample, a, b * self.share, b * (1 - self.share))
        return guide(self.cond.raw, self.uncond, self.scale, self._rule, self.cond.t, update=update)

    def _projected(self, uncond: Tensor) -> Tensor:
        """The output (B, ...) whose x_0 is that of APG."""
        x_t, t, schedule, kind = self.cond.x_t.to(uncond), self.cond.t, self.cond.schedule, self.cond.kind
        others = schedule.to_x0(uncond, x_t, t, kind)
        x0 = guide(self.cond.x0, others, self.scale, self._rule, t, self.running)
        return schedule.from_x0(x0, x_t, t, kind)

    @property
    def _rule(self) -> Rule:
        return self.denoiser.rule if self.rule is None else self.rule


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    null: Conditions | None,
    scale: float | Tensor,
    rule: Rule | None = None,
) -> Prediction:
    """The denoiser under classifier-free guidance; arguments and errors as for :func:`outputs`."""
    return outputs(denoiser, x_t, t, cond, null, scale, rule).prediction


def outputs(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    null: Conditions | None,
    scale: float | Tensor,
    rule: Rule | None = None,
) -> Pair:
    """The outputs that classifier-free guidance combines (Ho & Salimans 2022), from one doubled batch.

    Where the pipeline scales the guided output back to the conditional one's norm, so does their combination.

    Args:
        x_t: noisy samples (B, ...).
        t: times (B,) in [0, 1].
        cond: conditions, B rows.
        null: the empty condition, B rows; unused when ``scale`` is 1.
        scale: w, a number or one per row (B,); the number 1 means no guidance and costs one pass instead of two.
        rule: how the two outputs are combined; None: as the denoiser's call is described. Rows outside its interval
            cost no second pass, but knowing which they are is one read from the device.

    Raises:
        InputError: several students are guided, each of which has guidance in its weights.
        ValueError: ``scale`` is not 1 and there is no null condition.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return Pair(denoiser, denoiser(x_t, t, cond))
    if isinstance(denoiser, Denoiser) and denoiser.spec.router is not None:
        raise InputError("guidance: expected 1 for several students, each of which has it in its weights")
    guider = denoiser.spec.guider if rule is None and isinstance(denoiser, Denoiser) else None
    rule, scale = denoiser.rule if rule is None else rule, scale_at(denoiser, t, scale)
    if guider is not None:
        conditional, raw = guider.outputs(denoiser, x_t, t, cond, null, scale)
        return Pair(denoiser, conditional, raw, 0.0, Rule())
    if null is None:
        raise ValueError(f"guidance scale {scale} needs a null condition, and this teacher has none")
    if getattr(denoiser, "mix", ()):
        return _mixed(denoiser, x_t, t, cond, null, scale, rule)
    if rule.interval is None:
        conditional, unconditional = doubled(denoiser, x_t, t, cond, null)
        return Pair(denoiser, conditional, unconditional.raw, scale, rule)
    inside = rule.inside(t).nonzero()[:, 0]
    conditional, unconditional = doubled(denoiser, x_t, t, cond, null, inside)
    # Where both are the same, w makes no difference.
    return Pair(denoiser, conditional, conditional.raw.index_copy(0, inside, unconditional.raw), scale, rule)


def scale_at(denoiser: Denoiser, t: Tensor, scale: float | Tensor) -> float | Tensor:
    """The guidance scale at times ``t`` (B,): ``scale``, or one per row (B,) where experts have scales of their own."""
    turns = denoiser.spec.experts if isinstance(denoiser, Denoiser) else {}
    if all(turn.scale is None for turn in turns.values()):
        return scale
    scales = torch.as_tensor(scale, dtype=torch.float64, device=t.device).expand(len(t)).clone()
    for name, rows in parts(denoiser.schedule.timestep(t), turns):
        if (own := turns[name].scale) is not None:
            scales[slice(None) if rows is None else rows] = own
    return scales


def _mixed(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    null: Conditions,
    scale: float | Tensor,
    rule: Rule,
) -> Pair:
    """As :func:`outputs`, where there are several unconditional passes.

    With w cond + the sum of (a + b w) times theirs, whose weights sum to 1 - w, guidance is the usual one of the
    conditional output and that sum over 1 - w.
    """
    count = 1 + len(denoiser.mix)
    rows = joined([cond, *(in_pass(null, number) for number in range(count - 1))])
    output = denoiser(torch.cat([x_t] * count), torch.cat([t] * count), rows)
    conditional, *others = output.raw.chunk(count)
    wide = torch.promote_types(conditional.dtype, torch.float32)
    others = [one.to(wide) for one in others]
    w = torch.as_tensor(scale, dtype=wide, device=x_t.device).expand(len(x_t))
    w = w if rule.interval is None else torch.where(rule.inside(t), w, 1)
    off = w == 1
    weights = [(a + b * w) / torch.where(off, 1, 1 - w) for a, b in denoiser.mix]
    mixed = sum(per_sample(weight, one) * one for weight, one in zip(weights, others, strict=True))
    off = off.reshape(-1, *[1] * (conditional.ndim - 1))
    mixed = torch.where(off, conditional.to(wide), mixed)
    return Pair(denoiser, Prediction(conditional, x_t, t, output.schedule, output.kind), mixed, scale, rule)


def doubled(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditions,
    null: Conditions,
    rows: Tensor | slice = slice(None),
) -> tuple[Prediction, Prediction]:
    """(the conditional predictions, the unconditional ones of ``rows``), from one batch; arguments as for outputs().

    Where the pipeline guides some channels alone, the others of the unconditional predictions are the conditional ones.
    """
    both = {name: torch.cat([value, null[name][rows]]) for name, value in cond.items()}
    output = denoiser(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)
    halves = (slice(len(x_t)), x_t, t), (slice(len(x_t), None), x_t[rows], t[rows])
    conditional, unconditional = (
        Prediction(output.raw[part], x, at, output.schedule, output.kind) for part, x, at in halves
    )
    if (count := denoiser.spec.guided_channels if isinstance(denoiser, Denoiser) else None) is None:
        return conditional, unconditional
    raw = with_channels_of(conditional.raw[rows], unconditional.raw, count)
    return conditional, replace(unconditional, raw=raw)


def rule_text(rule: Rule) -> str:
    """The rule in words that follow a scale: "" for the plain one."""
    text = "" if rule.interval is None else " on times {:g}-{:g}".format(*rule.interval)
    if rule.projects:
        text += f" by APG with eta {rule.parallel:g}" + (f" and norm {rule.max_norm:g}" if rule.max_norm else "")
    return text + (f" rescaled {rule.rescale:g}" if rule.rescale else "")


def rule_of(settings: Mapping[str, Any]) -> Rule:
    """The rule that a recipe's ``teacher.guidance`` states; what it leaves out is off."""
    interval = settings.get("interval")
    apg = {"parallel": settings.get("eta", 0.0), "max_norm": settings.get("norm") or None}
    return Rule(
        rescale=settings.get("rescale", 0.0),
        interval=None if interval is None else tuple(interval),
        **(apg if settings.get("rule") == "apg" else {}),
    )


def with_channels_of(conditional: Tensor, unconditional: Tensor, count: int) -> Tensor:
    """The unconditional output (B, C, ...) with the conditional one's channels after the first ``count`` (Lumina)."""
    return torch.cat([unconditional[:, :count], conditional[:, count:]], 1)


def with_norm_of(conditional: Tensor, guided: Tensor, axis: int) -> Tensor:
    """The guided output (B, ...) scaled to the conditional one's norm along an axis (Lumina 2, Qwen-Image)."""
    return guided * (conditional.norm(dim=axis, keepdim=True) / guided.norm(dim=axis, keepdim=True))
