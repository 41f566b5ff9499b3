"""The grid of a pipeline's call: the fewest steps that it takes, and that it runs it once."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.pipeline.call import TraceError, again, fewest_steps, one_part
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.observe import observe


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
    try:
        made = observe(pipeline, entries, arguments, steps=count, guidance=1.0, stop_steps=count + 1).steps
    except TraceError:  # it fails after its last step, as a student's export would
        return count
    if len(made) > count and same(made[count].timestep, made[0].timestep):
        reason = f"{type(pipeline).__name__} runs its grid again, and a student has one grid"
        raise TraceError("components", reason + (again(pipeline, arguments) or one_part(pipeline, arguments)))
    return count
