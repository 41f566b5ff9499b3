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

from stepdistill.adapters import time_embeddings
from stepdistill.denoiser import Conditions, Denoiser, innermost
from stepdistill.errors import InputError
from stepdistill.guidance import combined, ddim_update, guided
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.schedule import Prediction, per_sample


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

    A DDIM step (Euler on a flow) is linear in the prediction, so one prediction between the unguided and the guided
    one makes exactly this step, however the pipeline combines the two. Other solvers are given the same prediction.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t = step.x_t, step.t
        cond, uncond = denoiser(x_t, t, step.cond).raw, denoiser(x_t, t, step.null).raw
        update = ddim_update(denoiser.schedule, denoiser.kind, x_t, t, step.r, plus_plus=True)
        # The last step ends in x_0, where no noise stays.
        share = torch.where(step.r > 0, update.b / (update.b + update.c), 1.0)
        share = per_sample(share, x_t)
        raw = share * combined(denoiser, cond, uncond, scale, t) + (1 - share) * uncond
        return Prediction(raw, x_t, t, denoiser.schedule, denoiser.kind)

    return rule


class Adaptive:
    """Adaptive Guidance (Castillo et al. 2023): a sample whose two predictions agree is not guided any more.

    Args:
        scale: w.
        threshold: cosine of the two predicted x_0 above which they agree. Not of the two predicted noises: near t = 1
            each of those is the sample itself, on a flow exactly, so they always agree there.
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
        guided = combined(denoiser, cond[rows], uncond, self.scale, t[rows])
        raw = cond.to(guided).index_copy(0, rows, guided)
        x0 = doubled.x0
        cosine = F.cosine_similarity(x0[: len(x_t)][rows].flatten(1), x0[len(x_t) :].flatten(1))
        self.open = rows[cosine <= self.threshold]
        return Prediction(raw, x_t, t, doubled.schedule, doubled.kind)


def independent_condition(scale: float, pool: Conditioning) -> StepRule:
    """Independent condition guidance (Sadat et al. 2024): away from a random condition, new at every step.

    For networks that know no empty condition. The condition is drawn uniformly from the pool, whatever the sample's own
    one is, which may be among them: an average over draws is what stands for the unconditional prediction.

    Args:
        pool: what is drawn from, on the samples' device, such as :func:`.named_rules.condition_pool`.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t = step.x_t, step.t
        drawn = torch.cat([torch.randint(len(pool), (1,), generator=dice) for dice in step.dice()])
        # Not one doubled batch: prompts of another list may be padded to another length.
        cond, other = denoiser(x_t, t, step.cond).raw, denoiser(x_t, t, pool.batch(drawn)[0]).raw
        return Prediction(combined(denoiser, cond, other, scale, t), x_t, t, denoiser.schedule, denoiser.kind)

    return rule


def time_step(scale: float, strength: float = 2.0, power: float = 1.0) -> StepRule:
    """Time-step guidance (Sadat et al. 2024, section 5 and figure 12): away from what the network says when its time
    embedding is perturbed.

    The embedding becomes t_emb + s t^alpha std(t_emb) n with n ~ N(0, I), in all layers. With :func:`limited` only
    from T_min to T_max. The defaults are the paper's for the conditional DiT-XL/2.

    Args:
        strength: s.
        power: alpha.

    Raises:
        InputError: the network has no time embedding of a class that is known.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction:
        x_t, t = step.x_t, step.t
        embeddings = time_embeddings(denoiser.network)
        if not embeddings:
            name = type(innermost(denoiser.network)).__name__
            raise InputError(f"rule: tsg perturbs diffusers' TimestepEmbedding, and {name} has none")
        width = max(one.linear_2.out_features for one in embeddings)
        noise = torch.stack([torch.randn(width, generator=dice) for dice in step.dice()]).to(t.device)
        size = (strength * t.float() ** power)[:, None]

        def perturbed(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            embedded = out.float()
            return (embedded + size * embedded.std(-1, keepdim=True) * noise[:, : out.shape[-1]]).to(out.dtype)

        cond = denoiser(x_t, t, step.cond).raw
        with contextlib.ExitStack() as hooks:
            for embedding in embeddings:
                hooks.callback(embedding.register_forward_hook(perturbed).remove)
            worse = denoiser(x_t, t, step.cond).raw
        return Prediction(combined(denoiser, cond, worse, scale, t), x_t, t, denoiser.schedule, denoiser.kind)

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
