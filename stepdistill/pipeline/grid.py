"""The grid of a pipeline's call: the fewest steps that it takes, and that it runs it once."""

from dataclasses import replace

from stepdistill.pipeline.call import TraceError, fewest_steps, given, one_part
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.probe_call import ProbeCall


def fewest(call: ProbeCall, component: str, most: int) -> int:
    """The fewest steps that the pipeline's call takes, ``most`` or fewer: some compute no grid of one.

    Raises:
        TraceError: the call runs its grid again after the last step.
    """
    count = most
    for steps in range(fewest_steps(call.pipeline), most):
        try:
            call.observe(steps=steps, guidance=1.0, stop_calls=(component, 1))
        except TraceError:
            continue
        count = steps
        break
    if _runs_again(call, count):
        reason = f"{type(call.pipeline).__name__} runs its grid again, and a student has one grid"
        hint = _without_the_second(call, count) or one_part(call.pipeline, call.arguments)
        raise TraceError("components", reason + hint)
    return count


def _runs_again(call: ProbeCall, count: int) -> bool | None:
    """Whether a call of ``count`` steps goes on with the first of them; None: it fails."""
    try:
        made = call.observe(steps=count, guidance=1.0, stop_steps=count + 1).steps
    except TraceError:
        return None
    return len(made) > count and same(made[count].timestep, made[0].timestep)


def _without_the_second(call: ProbeCall, count: int) -> str:
    """Which strength of 0 leaves out the second run, over the first one's picture, as a run shows; may be empty."""
    for name, value in given(call.pipeline, call.arguments).items():
        stated = name.endswith("_strength") and isinstance(value, int | float) and value > 0
        if stated and _runs_again(replace(call, arguments={**call.arguments, name: 0}), count) is False:
            return f"; teacher.arguments.{name}=0 leaves out what runs over the picture of the first"
    return ""
