"""What is recorded of a pipeline's run: its scheduler's steps, and the calls of its networks before each."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.devices import torch_of
from stepdistill.diffusion.nested import first_tensor

SAMPLES = ("sample", "model_output", "previous")
"""What of a :class:`Step` is like the sample that it steps."""


@dataclass
class Call:
    """One forward of one component: its arguments by (dotted) name, the first tensor and all tensors of its output,
    and how many values it ``returned``."""

    component: str
    arguments: dict[str, Any]
    output: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    returned: int = 1


@dataclass
class Step:
    """One scheduler step: the scheduler as it was before, what went in, what came out, who was called before.

    ``others`` are the steps of the scheduler's copies that followed it: those of further samples (a video's sound).
    ``in_two`` is whether the pipeline made it in two (:mod:`stepdistill.pipeline.in_two`). ``replayed`` is how a step
    is replayed that stands for others: for several as one, or for a part of one.
    """

    scheduler: Any
    timestep: Tensor
    model_output: Tensor
    sample: Tensor
    options: dict[str, Any]
    random_state: dict[str, Any]
    calls: list[Call]
    previous: Tensor | None = None
    others: list["Step"] = field(default_factory=list)
    in_two: bool = False
    replayed: Callable[[Tensor], Tensor] | None = None

    def replay(self, model_output: Tensor) -> Tensor:
        """The next latents for this ``model_output``, with the state and the random numbers of the original."""
        if self.replayed is not None:
            return self.replayed(model_output)
        scheduler = copy.deepcopy(self.scheduler)
        options = dict(self.options)
        with forked_random(self.sample.device):
            torch.set_rng_state(self.random_state["cpu"])
            if "device" in self.random_state:
                torch_of(self.sample.device).set_rng_state(self.random_state["device"], self.sample.device)
            if "generator" in self.random_state:
                options["generator"] = cloned(self.random_state["generator"])
            return stepped(scheduler, model_output, self.timestep, self.sample, options)[0]


def several_as_one(steps: Sequence[Step], pack: Callable, unpack: Callable, **changes: Any) -> Step:
    """Several steps as one, like the first but for ``changes``.

    Args:
        pack: makes one tensor of a list of theirs.
        unpack: its inverse.
    """

    def replayed(model_output: Tensor) -> Tensor:
        return pack([step.replay(own) for step, own in zip(steps, unpack(model_output), strict=True)])

    whole = {name: pack([getattr(step, name) for step in steps]) for name in SAMPLES}
    return replace(steps[0], **whole, **changes, replayed=replayed)


@dataclass
class Recording:
    """A run of ``count`` images: its steps, the calls after the last step, the grid it set, and the denoiser's network
    at each step, where several take turns that are recorded as one (:mod:`stepdistill.pipeline.turns`).

    ``apart`` are the steps of a run whose scheduler makes none itself: the first copy's of each iteration, and those
    of other copies as its others. ``frames`` is the axis of their samples in one (:mod:`stepdistill.pipeline.frames`).
    """

    count: int
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    apart: list[Step] = field(default_factory=list)
    frames: int | None = None

    def each(self, change: Callable[[Step], Step]) -> "Recording":
        """The recording with every step changed."""
        return replace(self, steps=[*map(change, self.steps)])

    def only(self, component: str, helpers: Iterable[str] = ()) -> "Recording":
        """The recording as if ``component`` had been its only network, see :func:`calls_of`."""
        return self.each(lambda step: replace(step, calls=calls_of(step.calls, component, helpers)))

    def with_calls(self, component: str, change: Callable[[Call, Step], Call]) -> "Recording":
        """The recording with every call of a component changed."""

        def changed(step: Step) -> Step:
            calls = [change(call, step) if call.component == component else call for call in step.calls]
            return replace(step, calls=calls)

        return self.each(changed)

    def ended(self, stop: int | None, copies: int) -> bool:
        """Whether ``stop`` steps are whole: the scheduler's, and those of its copies."""
        return len(self.steps) == stop and len(self.steps[-1].others) >= copies

    def add_copys(self, seen: Step) -> bool:
        """Add a step of a copy of the scheduler; whether it belongs to one of the scheduler's own."""
        if not self.steps and self.calls:
            seen.calls, self.calls = self.calls, []
            self.apart.append(seen)
        elif not self.steps and self.apart:
            self.apart[-1].others.append(seen)
        elif self.steps and not self.calls:  # no network was called in between
            self.steps[-1].others.append(seen)
            return True
        return False


class Runs(NamedTuple):
    """A run of three images without guidance, and one of two with it: what follows those numbers has rows for each."""

    off: Recording
    on: Recording

    @property
    def steps(self) -> list[Step]:
        """Those of both."""
        return [*self.off.steps, *self.on.steps]

    def each(self, change: Callable[[Recording], Recording]) -> "Runs":
        """Both changed."""
        return Runs(*map(change, self))

    def only(self, component: str, helpers: Iterable[str] = ()) -> "Runs":
        """Both as :meth:`Recording.only`."""
        return self.each(lambda run: run.only(component, helpers))


def calls_of(calls: Sequence[Call], component: str, helpers: Iterable[str] = ()) -> list[Call]:
    """The calls of ``component``; the arguments of its helpers' calls are among theirs, named "helper/argument"."""
    joined = [call for call in calls if call.component == component]
    for helper in helpers:
        beside = [call.arguments for call in calls if call.component == helper]
        beside *= len(joined) // max(len(beside), 1)  # one call may feed both passes
        extra = [{f"{helper}/{name}": value for name, value in arguments.items()} for arguments in beside]
        joined = [replace(call, arguments=call.arguments | more) for call, more in zip(joined, extra, strict=True)]
    return joined


CARRIED = ("old_pred_original_sample", "timestep_back")
"""Arguments of a step that come from the step before."""


def stepped(
    scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """The next sample of a scheduler's step, and the options of the step after.

    CogVideoX's DPM scheduler has no memory of its own: it takes its last x_0 and timestep back as arguments.
    """
    named = {"model_output": model_output, "timestep": timestep, "sample": sample}
    result = scheduler.step(**named, **options)
    if CARRIED[0] not in options:
        return first_tensor(result), options
    return result[0], {**options, **dict(zip(CARRIED, (result[1], timestep), strict=True))}


def forked_random(device: torch.device) -> Any:
    """A block whose random numbers leave the global generators as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def cloned(generator: Any) -> Any:
    """A generator, or each of a list, that draws the same and leaves the original alone."""
    return [*map(cloned, generator)] if isinstance(generator, list) else generator.clone_state()
