"""Step rules by their names on the command line."""

import functools
import inspect
from collections.abc import Callable

from stepdistill import assets
from stepdistill.errors import InputError, suggest
from stepdistill.files import read_text
from stepdistill.pipeline.conditioning import Conditioning, class_count, encode
from stepdistill.pipeline.trace import Trace
from stepdistill.sampling.rules.linear import LinearAdaptive, fit_linear
from stepdistill.sampling.rules.sag import self_attention
from stepdistill.sampling.rules.steps import (
    Adaptive,
    Projected,
    StepRule,
    cfg_plus_plus,
    classifier_free,
    dropped_blocks,
    independent_condition,
    limited,
    noise_correction,
    time_step,
)

RULES: dict[str, Callable[..., StepRule]] = {
    "cfg": classifier_free,
    "cfg++": cfg_plus_plus,
    "apg": Projected,
    "adaptive": Adaptive,
    "tsg": time_step,
    "sag": self_attention,
    "s2": dropped_blocks,
    "noise-correction": noise_correction,
}
"""By the names of ``stepdistill sample --rule NAME[:NUMBER,...]``; the numbers are a rule's arguments after w."""

FITTED = "linear"
"""The rule that is fitted to the pipeline first: :mod:`.linear`; the number is of samples."""

POOLED = "icg"
"""The rule that draws conditions from :func:`condition_pool`; it takes no number."""

NAMES = [*RULES, POOLED, FITTED]

PROMPTS = 32
"""Of a pool."""


def needs_empty(text: str, scale: float) -> bool:
    """Whether the rule ``NAME`` or ``NAME:NUMBER`` asks the network about the empty condition."""
    name = text.partition(":")[0]
    return name not in (POOLED, "tsg") and (scale != 1 or name not in ("cfg", "apg", "sag", "s2", "noise-correction"))


def rule_named(text: str, scale: float) -> Callable[[], StepRule]:
    """What makes the rule ``NAME`` or ``NAME:NUMBER,...`` of :data:`RULES`, once for each batch.

    Raises:
        InputError: no such rule, or it takes no number, or fewer.
    """
    name, colon, number = text.partition(":")
    if name not in RULES:
        raise InputError(f"rule: expected one of {', '.join(NAMES)}, found {name!r}{suggest(name, NAMES)}")
    if not colon:
        return lambda: RULES[name](scale)
    most = len(inspect.signature(RULES[name]).parameters) - 1
    if not most:
        raise InputError(f"rule: {name} takes no number, found {text!r}")
    try:
        values = [float(one) for one in number.split(",")]
    except ValueError:
        raise InputError(f"rule: expected a number after {name}:, found {number!r}") from None
    if len(values) > most:
        raise InputError(f"rule: expected at most {most} numbers after {name}:, found {number!r}")
    return lambda: RULES[name](scale, *values)


def condition_pool(trace: Trace, conditioning: Conditioning) -> Conditioning:
    """What ``icg`` draws conditions from, on the pipeline's device: none of it depends on a sample's own condition.

    Every class of a class-conditional pipeline, whichever are sampled; the prompts of the call where it has at least
    :data:`PROMPTS`, as many shipped everyday prompts where it has fewer.

    Raises:
        InputError: the pipeline has no conditions, or one class only.
    """
    classes = class_count(trace)
    if trace.entry == "prompt":
        if len(set(conditioning.entries)) >= PROMPTS:
            return conditioning
        drawn = read_text(assets.prompts("everyday")).splitlines()[:PROMPTS]
    elif classes > 1:
        drawn = list(range(classes))
    else:
        raise InputError(f"rule: icg needs prompts or a second class, found {type(trace.pipeline).__name__} without")
    return encode(trace, drawn).to(trace.pipeline.device)


def rule_for(
    trace: Trace,
    conditioning: Conditioning,
    text: str,
    *,
    steps: int,
    guidance: float,
    seed: int,
    interval: tuple[float, float] | None = None,
) -> Callable[[], StepRule]:
    """What makes the rule for this pipeline in so many steps, once for each batch.

    ``linear`` is fitted now, and the pool of ``icg`` is encoded now.

    Args:
        text: ``NAME`` or ``NAME:NUMBER``.
        interval: the times at which it is in force; None: all.

    Raises:
        InputError: as :func:`rule_named` and :func:`condition_pool`, or an interval outside [0, 1].
    """
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(f"interval: expected low, high with 0 <= low < high <= 1, found {interval}")
    name, colon, number = text.partition(":")
    if name == POOLED:
        if colon:
            raise InputError(f"rule: {name} takes no number, found {text!r}")
        make = functools.partial(independent_condition, guidance, condition_pool(trace, conditioning))
    elif name != FITTED:
        make = rule_named(text, guidance)
    else:
        if colon and not (number.isdecimal() and int(number)):
            raise InputError(f"rule: expected a number of samples after {FITTED}:, found {number!r}")
        count = {"count": int(number)} if number else {}
        coefficients = fit_linear(
            trace, conditioning, steps=steps, guidance=guidance, seed=seed, interval=interval, **count
        )
        make = functools.partial(LinearAdaptive, guidance, coefficients)
    return make if interval is None else lambda: limited(make(), *interval)
