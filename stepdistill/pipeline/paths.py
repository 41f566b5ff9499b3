"""Read off whether a pipeline converts between its scheduler and its network, which is on another path then."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from stepdistill.diffusion.path import Path
from stepdistill.diffusion.schedule import Kind, Schedule
from stepdistill.pipeline.compare import close
from stepdistill.pipeline.places import Place, place_of, scaled_sample
from stepdistill.pipeline.recording import Call, Recording, Runs, Step, calls_of

PATHS = (Path("sample"), Path("flow", flow=True), Path("edm", levels=True))


def seen_by_scheduler(runs: Runs, component: str, schedule: Schedule, kind: Kind) -> tuple[Runs, Path | None]:
    """The runs as if the network took what the scheduler steps and returned a prediction of ``kind``; its path.

    As they are where it does.
    """
    path = _path_of(runs.off, component, schedule, kind)
    if path is None:
        return runs, None
    change = partial(_converted, path=path, schedule=schedule, kind=kind)
    return runs.each(lambda run: run.with_calls(component, partial(change, count=run.count))), path


def _path_of(off: Recording, component: str, schedule: Schedule, kind: Kind) -> Path | None:
    """The path of the network ``component``; None: it predicts ``kind``, or is on no known path."""
    outputs = _outputs(off, component)
    if not outputs or any(close(output, step.model_output) for step, _, output in outputs):
        return None
    floored = [replace(PATHS[0], floor=floor)] if (floor := _floor(outputs)) else []
    for path in (*PATHS, *floored):
        found = []
        for step, call, output in outputs:
            seen = path.sample(schedule, scaled_sample(step), _time(step, schedule))
            made = path.prediction(output, schedule, scaled_sample(step), _time(step, schedule), kind)
            find = _whole_place if path.flow else place_of
            places = [place for value in call.arguments.values() if (place := find(value, seen))]
            free = places[0].free if places else None
            stepped = (step.replay(made.to(step.model_output)), step.previous)
            # Of rounding a division by a small sigma makes much, and the step makes as little of it again.
            found.append(bool(places) and close(*(one if free is None else free.inside(one) for one in stepped)))
        if all(found):
            return path
    return None


def _floor(outputs: Sequence[tuple[Step, Call, Tensor]]) -> float:
    """What the pipeline divides by at its last step, if it makes velocities of x_0 there."""
    step, _, x0 = outputs[-1]
    difference, given = (step.sample - x0).double(), step.model_output.double()
    return float(f"{float((difference * given).sum() / given.square().sum()):.4g}")


def _converted(call: Call, step: Step, count: int, path: Path, schedule: Schedule, kind: Kind) -> Call:
    passes = len(call.output) // count
    x_t = scaled_sample(step)[:count]
    x_t = x_t.repeat(passes, *[1] * (x_t.ndim - 1))
    t = _time(step, schedule).expand(len(x_t))
    seen = path.sample(schedule, x_t, t)
    arguments = dict(call.arguments)
    for name, value in call.arguments.items() if path.flow else ():
        if (place := _whole_place(value, seen)) is not None:
            stepped, free = path.stepped(schedule, value, t), place.free
            # What is kept is in the argument as the network sees it.
            arguments[name] = stepped if free is None else free.whole(free.inside(stepped), free.outside(value))
    return replace(call, arguments=arguments, output=path.prediction(call.output, schedule, x_t, t, kind))


def _whole_place(value: object, seen: Tensor) -> Place | None:
    """The place of what the network sees in an argument of its shape, which may hold something else in a part of it."""
    alike = isinstance(value, Tensor) and value.shape == seen.shape
    return place_of(value, seen) if alike else None


def times_of(steps: Sequence[Step], path: Path | None, schedule: Schedule) -> list[Tensor]:
    """The scheduler's timestep at each step, as the network's path has it."""
    if path is None:
        return [step.timestep for step in steps]
    return [path.time(schedule, _time(step, schedule)).reshape(()) for step in steps]


def _outputs(off: Recording, component: str) -> list[tuple[Step, Call, Tensor]]:
    """Each step with the network's call and its output, where that is like the sample, without channels behind its."""
    found = []
    for step in off.steps:
        for call in calls_of(step.calls, component)[-1:]:
            output, given = call.output, step.model_output
            cut = output[:, : given.shape[1]] if isinstance(output, Tensor) and output.ndim > 1 else None
            if cut is not None and cut.shape == given.shape:
                found.append((step, call, cut))
    return found


def _time(step: Step, schedule: Schedule) -> Tensor:
    """The time (1,) of a step, on its device."""
    return schedule.time(step.timestep.reshape(-1)[:1]).to(step.sample.device)
