"""Guidance at inference by other rules than uncond + w (cond - uncond) at every step. Nothing is trained.

A rule is called at every step of one batch. It returns the prediction for the scheduler's step, or a pair of
outputs, which is then combined together with the scheduler's step. What it does to a sample depends on the sample's
seed and index alone, never on the batch it is in.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Conditions, Denoiser, innermost
from stepdistill.diffusion.guidance import Pair, doubled, outputs
from stepdistill.diffusion.schedule import Prediction, per_sample
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.roles.added import time_embeddings


@dataclass(frozen=True)
class Step:
    """One step of a batch's generation.

    Args:
        number: from 0 up.
        x_t: noisy samples (B, ...).
        t: time (B,) of this step.
        r: time (B,) of the next step, 0 at the end.
        cond: conditions of B rows: those of entries ``rows`` (B,) of ``conditioning``.
        null: the empty conditions of the same rows.
        dice: makes each sample's own random numbers for this step.
        seed: of the whole generation.
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


StepRule = Callable[[Denoiser, Step], Prediction | Pair]


def classifier_free(scale: float) -> StepRule:
    """uncond + w (cond - uncond), as the denoiser's own call describes it."""
    return lambda denoiser, step: outputs(denoiser, step.x_t, step.t, step.cond, step.null, scale)


def limited(rule: StepRule, low: float, high: float) -> StepRule:
    """``rule`` at times from ``low`` to ``high``, both included, and no guidance at others, which costs one pass
    (limited interval, Kynkäänniemi et al. 2024)."""

    interval = Rule(interval=(low, high))

    def within(denoiser: Denoiser, step: Step) -> Prediction | Pair:
        # A batch is at one time.
        inside = bool(interval.inside(step.t[0]))
        return rule(denoiser, step) if inside else denoiser(step.x_t, step.t, step.cond)

    return within


def cfg_plus_plus(scale: float) -> StepRule:
    """CFG++ (Chung et al. 2024): x_0 of the guided prediction, the noise that stays of the unguided one; w in [0, 1].

    A DDIM step (Euler on a flow) is linear in the prediction, so one prediction between the unguided and the guided
    one makes exactly this step, however the pipeline combines the two. Other solvers are given the same prediction.
    """

    def rule(denoiser: Denoiser, step: Step) -> Pair:
        cond, uncond = (denoiser(step.x_t, step.t, condition) for condition in (step.cond, step.null))
        return Pair(denoiser, cond, uncond.raw, scale, share=_guided_share(denoiser, step))

    return rule


def _guided_share(denoiser: Denoiser, step: Step) -> Tensor:
    """How much of the output that makes CFG++'s step is the guided one (B,): all where no noise stays."""
    schedule, kind, t = denoiser.schedule, denoiser.kind, step.t
    one, zero = torch.ones_like(t, dtype=torch.float64), torch.zeros_like(t, dtype=torch.float64)
    alpha, sigma = schedule.coefficients(step.r)
    # Both are linear in the output: what it is multiplied by.
    by_x0, by_eps = alpha * schedule.to_x0(one, zero, t, kind), sigma * schedule.to_eps(one, zero, t, kind)
    return torch.where(step.r > 0, by_x0 / (by_x0 + by_eps), 1.0)


def noise_correction(scale: float) -> StepRule:
    """Imagine Flash's first step (Kohler et al. 2024), alpha_r x_0 + sigma_r x: the noise that stays is the sample.

    At t = 1 the sample is noise, and what a network says of it is off by a little that x_0 carries on. As in CFG++, one
    prediction makes exactly this step of DDIM or Euler; a scheduler that noises afresh has none that stays.
    """

    def rule(denoiser: Denoiser, step: Step) -> Prediction | Pair:
        pair = outputs(denoiser, step.x_t, step.t, step.cond, step.null, scale)
        if step.number or not bool(step.r[0] > 0):
            return pair
        schedule, x = denoiser.schedule, pair.prediction.x0
        (alpha, sigma), (alpha_r, sigma_r) = (
            [per_sample(one, x) for one in schedule.coefficients(time)] for time in (step.t, step.r)
        )
        rest = sigma_r / sigma
        x0 = (alpha_r * x + (sigma_r - rest) * step.x_t) / (alpha_r - rest * alpha)
        return replace(pair.cond, raw=schedule.from_x0(x0, step.x_t.to(x0), step.t, denoiser.kind))

    return rule


class Projected:
    """Adaptive Projected Guidance, APG (Sadat et al. 2024): less of the difference along the conditional x_0, which
    saturates colours; the difference cut to a norm; and a running mean of it.

    Args:
        scale: w.
        eta: factor on the part along the conditional x_0; 1 keeps it.
        norm: r, the largest norm of a sample's difference; 0: any.
        momentum: beta, factor on the running difference of the steps before, usually below 0; 0: none.
    """

    def __init__(self, scale: float, eta: float = 0.0, norm: float = 0.0, momentum: float = 0.0):
        self.scale, self.rule = scale, Rule(parallel=eta, max_norm=norm or None, momentum=momentum)
        self.running: Tensor | None = None

    def __call__(self, denoiser: Denoiser, step: Step) -> Pair:
        pair = outputs(denoiser, step.x_t, step.t, step.cond, step.null, self.scale, self.rule)
        if self.rule.momentum and self.running is None:
            self.running = torch.zeros_like(pair.cond.raw, dtype=torch.float32)
        return replace(pair, running=self.running)


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
        if self.open is None:
            self.open = torch.arange(len(step.x_t), device=step.x_t.device)
        rows = self.open
        cond, uncond = doubled(denoiser, step.x_t, step.t, step.cond, step.null, rows)
        still = replace(uncond, raw=cond.raw[rows])
        guided = Pair(denoiser, still, uncond.raw, self.scale).raw
        cosine = F.cosine_similarity(cond.x0[rows].flatten(1), uncond.x0.flatten(1))
        self.open = rows[cosine <= self.threshold]
        return replace(cond, raw=cond.raw.to(guided).index_copy(0, rows, guided))


def independent_condition(scale: float, pool: Conditioning) -> StepRule:
    """Independent condition guidance (Sadat et al. 2024): away from a random condition, new at every step.

    For networks that know no empty condition. The condition is drawn uniformly from the pool, whatever the sample's own
    one is, which may be among them: an average over draws is what stands for the unconditional prediction.

    Args:
        pool: what is drawn from, on the samples' device, such as :func:`.names.condition_pool`.
    """

    def rule(denoiser: Denoiser, step: Step) -> Pair:
        x_t, t = step.x_t, step.t
        drawn = torch.cat([torch.randint(len(pool), (1,), generator=dice) for dice in step.dice()])
        # Not one doubled batch: prompts of another list may be padded to another length.
        cond, other = denoiser(x_t, t, step.cond), denoiser(x_t, t, pool.batch(drawn)[0])
        return Pair(denoiser, cond, other.raw, scale)

    return rule


def time_step(scale: float, strength: float = 2.0, power: float = 1.0) -> StepRule:
    """Time-step guidance (Sadat et al. 2024, section 5 and figure 12): away from the network's prediction when its time
    embedding is perturbed.

    The embedding becomes t_emb + s t^alpha std(t_emb) n with n ~ N(0, I), in all layers. With :func:`limited` only
    from T_min to T_max. The defaults are the paper's for the conditional DiT-XL/2.

    Args:
        strength: s.
        power: alpha.

    Raises:
        InputError: the network has no time embedding of a class that is known.
    """

    def rule(denoiser: Denoiser, step: Step) -> Pair:
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

        cond = denoiser(x_t, t, step.cond)
        with contextlib.ExitStack() as hooks:
            for embedding in embeddings:
                hooks.callback(embedding.register_forward_hook(perturbed).remove)
            worse = denoiser(x_t, t, step.cond).raw
        return Pair(denoiser, cond, worse, scale)

    return rule


def dropped_blocks(scale: float, strength: float = 0.25, share: float = 0.1) -> StepRule:
    """S2-Guidance (Chen et al. 2025): classifier-free guidance, and away from the network without some of its blocks.

    Args:
        scale: w.
        strength: s in guided + s (cond - dropped).
        share: of the blocks that are left out, at least one and others at every step; the first and the last stay.

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
        pair = outputs(denoiser, step.x_t, step.t, step.cond, step.null, scale)
        with without([blocks[i] for i in chosen]):
            less = denoiser(step.x_t, step.t, step.cond).raw
        return replace(pair.cond, raw=pair.raw + strength * (pair.cond.raw - less))

    return rule


def equal_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """The network's blocks with attention, of the class that it has most of: in a UNet, those inside its own blocks."""
    by_class: dict[type, list[nn.Module]] = {}
    lists = [listed for listed in network.modules() if isinstance(listed, nn.ModuleList)]
    for equal in (listed for listed in lists if len({type(block) for block in listed}) == 1):
        if any(hasattr(part, "set_processor") for part in equal[0].modules()):
            by_class.setdefault(type(equal[0]), []).extend(equal)
    # Of as many of two classes, the later are inside the earlier.
    return max(reversed(by_class.values()), key=len, default=[])


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
