"""The grid of a pipeline's call: the fewest steps that it takes, and that it runs it once."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.pipeline.call import TraceError, fewest_steps, one_part
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.stock_call import parameters


def fewest(pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any], component: str, most: int) -> int:
    """The fewest steps that the pipeline's call takes, ``most`` or fewer: some compute no grid of one.

    Raises:
        TraceError: the call runs its grid again after the last step.
    """
    count = most
    for steps in range(fewest_steps(pipeline), most):
        try:
            observe(pipeline, entries, arguments, steps=steps, guidance=1.0, stop_calls=(component, 1))
        except TraceError:
            continue
        count = steps
        break
    if _runs_again(pipeline, entries, arguments, count):
        reason = f"{type(pipeline).__name__} runs its grid again, and a student has one grid"
        hint = _without_the_second(pipeline, entries, arguments, count) or one_part(pipeline, arguments)
        raise TraceError("components", reason + hint)
    return count


def _runs_again(pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any], count: int) -> bool | None:
    """Whether a call of ``count`` steps goes on with the first of them; None: it fails."""
    try:
        made = observe(pipeline, entries, arguments, steps=count, guidance=1.0, stop_steps=count + 1).steps
    except TraceError:
        return None
    return len(made) > count and same(made[count].timestep, made[0].timestep)


def _without_the_second(pipeline: Any, entries: Sequence[Any] | str, arguments: Mapping[str, Any], count: int) -> str:
    """Which strength of 0 leaves out the second run, over the first one's picture, as a run shows; may be empty."""
    for name, parameter in parameters(pipeline).items():
        value = arguments.get(name, parameter.default)
        stated = name.endswith("_strength") and isinstance(value, int | float) and value > 0
        if stated and _runs_again(pipeline, entries, {**arguments, name: 0}, count) is False:
            return f"; teacher.arguments.{name}=0 leaves out what runs over the picture of the first"
    return ""
