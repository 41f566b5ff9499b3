"""Pipelines that make every pass of guidance at any scale: the conditional one is taken out of their steps.

At the scale that leaves guidance out, the scheduler is given what one of the passes predicts. That pass is the run
without guidance, as if the pipeline had made it alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from stepdistill.diffusion.ragged import Rows
from stepdistill.pipeline import explain
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.explain import Guidance
from stepdistill.pipeline.places import only_free, sample_argument
from stepdistill.pipeline.recording import Call, Recording, Runs, Step, calls_of


def conditional(runs: Mapping[float, Recording]) -> tuple[float, int, Recording] | None:
    """(scale, place of the pass, the run with that pass alone), of ``runs`` without guidance by their scale.

    None: no pass alone is what the scheduler is given.
    """
    for scale, run in runs.items():
        component = explain.denoiser_component(run)
        for place in range(explain.passes_seen(run)):
            one = run.each(partial(one_pass, component=component, place=place, count=run.count))
            if _is_given(one.only(component), component):
                return scale, place, one
    return None


def _is_given(run: Recording, component: str) -> bool:
    """Whether what the network predicts in a run of one pass is what the scheduler is given."""
    try:
        spec, free, _ = sample_argument(Runs(run, run), component)
        explain.output_map(only_free(run, free), spec, component)
    except TraceError:
        return False
    return True


def stated(guidance: Guidance, place: int) -> Guidance:
    """The guidance of a pipeline that makes all passes at any scale; that at ``place`` is the run without guidance.

    Raises:
        TraceError: the rule has another pass for the conditional one.
    """
    if guidance.passes[0] != place:
        reason = "the pass that is left at the scale without guidance is not the conditional one of the guided steps"
        raise TraceError("guidance", reason)
    return replace(guidance, always=True)


def one_pass(step: Step, component: str, place: int, count: int) -> Step:
    """The step as if the network had been called for one of its passes alone.

    Args:
        place: of the pass among a step's.
        count: images of the run.
    """
    number = len(calls_of(step.calls, component))
    if number == 1:
        return replace(step, calls=[_rows_of(call, place, count) for call in step.calls])
    kept = [call for name in {call.component: 0 for call in step.calls} for call in _kept(step, name, number, place)]
    order = {id(call): at for at, call in enumerate(step.calls)}
    return replace(step, calls=sorted(kept, key=lambda call: order[id(call)]))


def _kept(step: Step, name: str, number: int, place: int) -> list[Call]:
    """Of a component's calls that of the pass, where it has one for each of ``number`` passes; else all."""
    own = calls_of(step.calls, name)
    return own[place : place + 1] if len(own) == number else own


def _rows_of(call: Call, place: int, count: int) -> Call:
    """The call with the rows of one pass, of all that has rows for each image and pass."""
    rows = len(call.output) if isinstance(call.output, Tensor) and call.output.ndim else 0
    if rows <= count or rows % count:
        return call

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor | list) and getattr(value, "ndim", 1) and len(value) == rows:
            own = value[place * count : (place + 1) * count]
            return type(value)(own) if isinstance(value, Rows) else own
        parts = isinstance(value, list | tuple) and value and all(isinstance(part, Tensor | Rows) for part in value)
        return type(value)(map(taken, value)) if parts else value

    arguments = {name: taken(value) for name, value in call.arguments.items()}
    return replace(call, arguments=arguments, output=taken(call.output), outputs=[*map(taken, call.outputs)])
