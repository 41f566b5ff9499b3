"""Guidance at inference by other rules than uncond + w (cond - uncond) at every step. Nothing is trained.

A rule is called at every step of one batch and returns the prediction that the scheduler goes on with. What it does to
a sample depends on the sample's seed and index alone, never on the batch it is in.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.denoiser import Conditions, Denoiser
from stepdistill.errors import InputError
from stepdistill.guidance import combined, ddim_update, guided
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.schedule import Prediction


@dataclass(frozen=True)
class Step:
    """One step of a batch's generation.

    Args:
        number: from 0 up. x_t: noisy samples (B, ...). t, r: times (B,) of this step and of the next one, 0 at the end.
        cond, null: conditions of B rows: those of entries ``rows`` (B,) of ``conditioning``.
        dice: makes each sample's own random numbers for this step. seed: of the whole generation.
    """

    number: int
    x_t: Tensor
    t: Tensor
    r: Tensor
    cond: Conditions
    null: Conditions | None
    conditioning: Conditioning
    rows: Tensor
    dice: Callable[[], list[torch.Generator]]
    seed: int


StepRule = Callable[[Denoiser, Step], Prediction]


def classifier_free(scale: float) -> StepRule:
    """uncond + w (cond - uncond), as the denoiser's own call describes it."""
    return lambda denoiser, step: guided(denoiser, step.x_t, step.t, step.cond, step.null, scale)


def limited(rule: StepRule, low: float, high: float) -> StepRule:
    """``rule`` at times from ``low`` to ``high``, both included, and no guidance at others, which costs one pass
    (limited interval, Kynkäänniemi et al. 2024)."""

    def within(denoiser: Denoiser, step: Step) -> Prediction:
        # A batch is at one time.
        t = step.t[0].float()
        return rule(denoiser, step) if bool((low <= t) & (t <= high)) else denoiser(step.x_t, step.t, step.cond)

    return within


def cfg_plus_plus(scale: float) -> StepRule:
    """CFG++ (Chung et al. 2024): x_0 of the guided prediction, the noise that stays of the unguided one; w in [0, 1].

    Under DDIM (Euler on a flow) both are linear in the network's outputs, so this is guidance with a scale that depends
    on the step. Other solvers are given the same scale.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        update = ddim_update(denoiser.schedule, denoiser.kind, step.x_t, step.t, step.r, plus_plus=True)
        # The last step ends in x_0, where no noise stays.
        share = torch.where(step.r > 0, update.b / (update.b + update.c), 1.0)
        return guided(denoiser, step.x_t, step.t, step.cond, step.null, (scale * share).float())

    return rule


class Adaptive:
    """Adaptive Guidance (Castillo et al. 2023): a sample whose two predictions agree is not guided any more.

    Args:
        scale: w. threshold: cosine of the two predicted noises above which they agree.
    """

    def __init__(self, scale: float, threshold: float = 0.99):
        self.scale, self.threshold = scale, threshold
        self.open: Tensor | None = None

    def __call__(self, denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t = step.x_t, step.t
        if self.open is None:
            self.open = torch.arange(len(x_t), device=x_t.device)
        rows = self.open
        both = {name: torch.cat([value, step.null[name][rows]]) for name, value in step.cond.items()}
        doubled = denoiser(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)
        cond, uncond = doubled.raw[: len(x_t)], doubled.raw[len(x_t) :]
        raw = cond.index_copy(0, rows, combined(denoiser, cond[rows], uncond, self.scale, t[rows]))
        noises = doubled.eps
        cosine = F.cosine_similarity(noises[: len(x_t)][rows].flatten(1), noises[len(x_t) :].flatten(1))
        self.open = rows[cosine <= self.threshold]
        return Prediction(raw, x_t, t, doubled.schedule, doubled.kind)


def independent_condition(scale: float) -> StepRule:
    """Independent condition guidance (Sadat et al. 2024): away from a random other condition, new at every step.

    For networks that know no empty condition.

    Raises:
        InputError: there is one condition only.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        count = len(step.conditioning)
        if count < 2:
            raise InputError("rule: icg needs a second class or prompt to guide away from")
        drawn = torch.cat([torch.randint(1, count, (1,), generator=dice) for dice in step.dice()])
        other, _ = step.conditioning.batch((step.rows + drawn.to(step.rows.device)) % count)
        return guided(denoiser, step.x_t, step.t, step.cond, other, scale)

    return rule


def time_step(scale: float, spread: float = 0.05) -> StepRule:
    """Time-step guidance (Sadat et al. 2024): away from what the network says when it is told a wrong time.

    Args:
        spread: standard deviation of the error in time, of which there is 1 in all.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t = step.x_t, step.t
        error = torch.cat([torch.randn(1, generator=dice) for dice in step.dice()])
        wrong = (t + spread * error.to(t)).clamp(0, 1)
        both = {name: torch.cat([value, value]) for name, value in step.cond.items()}
        doubled = denoiser(torch.cat([x_t, x_t]), torch.cat([t, wrong]), both)
        raw = combined(denoiser, *doubled.raw.chunk(2), scale, t)
        return Prediction(raw, x_t, t, doubled.schedule, doubled.kind)

    return rule


def dropped_blocks(scale: float, strength: float = 0.25, share: float = 0.1) -> StepRule:
    """S2-Guidance (Chen et al. 2025): classifier-free guidance, and away from the network without some of its blocks.

    Args:
        scale: w. strength: s in guided + s (cond - dropped). share: of the blocks that are left out, at least one and
            others at every step; the first and the last stay.

    Raises:
        InputError: the network has no three equal blocks.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        blocks = equal_blocks(denoiser.network)
        if len(blocks) < 3:
            name = type(denoiser.network).__name__
            raise InputError(f"rule: s2 leaves out one of at least 3 equal blocks, found {len(blocks)} in {name}")
        count = max(1, round(share * len(blocks)))
        dice = torch.Generator().manual_seed(step.seed * 1000 + step.number)
        chosen = (torch.randperm(len(blocks) - 2, generator=dice)[:count] + 1).tolist()
        cond = denoiser(step.x_t, step.t, step.cond)
        with without([blocks[i] for i in chosen]):
            less = denoiser(step.x_t, step.t, step.cond).raw
        raw = cond.raw
        if scale != 1:
            uncond = denoiser(step.x_t, step.t, step.null).raw
            raw = combined(denoiser, cond.raw, uncond, scale, step.t)
        return Prediction(raw + strength * (cond.raw - less), step.x_t, step.t, cond.schedule, cond.kind)

    return rule


def equal_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """The network's blocks with attention, of the class that it has most of: in a UNet, those inside its own blocks."""
    found: dict[type, list[nn.Module]] = {}
    lists = [listed for listed in network.modules() if isinstance(listed, nn.ModuleList)]
    for equal in (listed for listed in lists if len({type(block) for block in listed}) == 1):
        if any(hasattr(part, "set_processor") for part in equal[0].modules()):
            found.setdefault(type(equal[0]), []).extend(equal)
    # Of as many of two classes, the later are inside the earlier.
    return max(reversed(found.values()), key=len, default=[])


@contextlib.contextmanager
def without(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """These blocks let their hidden states through as they are."""

    def through(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        if isinstance(output, Tensor):
            return next(iter(given.values()))
        streams = given["encoder_hidden_states"], given["hidden_states"]
        # Most of diffusers' classes answer in this order, the rest in the other one.
        return streams if output[1].shape == streams[1].shape else streams[::-1]

    handles = [block.register_forward_hook(through, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
