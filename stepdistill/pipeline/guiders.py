"""Pipelines whose guidance is a component, a guider, and no argument of their call.

A guider says how many passes a step takes and combines them, by a rule of its own (APG, skipped layers). What a run
distils is the recipe's guidance, whatever the guider is: plain guidance takes its place while the pipeline is watched
with a scale, and one pass per step where it is called without. Exports hold it switched off.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance

from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.stock_call import off, parameters


def guiders(pipeline: Any) -> dict[str, BaseGuidance]:
    """The components of a pipeline that combine the passes of a step, by name; empty for most pipelines."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}


def negative_prompt(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, str]:
    """An empty negative prompt, which some pipelines with a guider need and do not fill in themselves; else empty."""
    missing = "negative_prompt" in parameters(pipeline) and "negative_prompt" not in arguments
    return {"negative_prompt": ""} if guiders(pipeline) and missing else {}


@contextmanager
def guided_at(pipeline: Any, scale: float) -> Iterator[None]:
    """Inside, the pipeline's guiders are plain guidance of this scale; 1 or less: there is one pass per step."""
    own = guiders(pipeline)
    if not own:
        yield
        return
    with quiet():  # each new one warns that all of them are experimental
        plain = {name: ClassifierFreeGuidance(guidance_scale=scale, enabled=scale > 1) for name in own}
    pipeline.__dict__.update(plain)
    try:
        yield
    finally:
        pipeline.__dict__.update(own)


def switched_off(guider: BaseGuidance) -> BaseGuidance:
    """The same guider for one pass per step."""
    with quiet():
        return guider.new(**off(guider))
