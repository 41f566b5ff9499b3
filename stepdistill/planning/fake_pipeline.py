"""A pipeline whose weights take no memory: built from its configs alone, and driven as far as shapes go.

Its networks hold torch's fake tensors: shapes, dtypes and storages without data. Operations on them compute the same
of their results, so a run can be gone through, and its memory counted, before any weight is loaded.
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from stepdistill.diffusion.denoiser import CallSpec, Conditions, Denoiser, Helper
from stepdistill.diffusion.experts import Experts, Turn
from stepdistill.diffusion.nested import tensors_in
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.diffusion.window import Window
from stepdistill.errors import InputError, first_line
from stepdistill.pipeline.call import TraceError, entry_argument, fewest_steps, in_any_way
from stepdistill.pipeline.complete import classes
from stepdistill.pipeline.components import modules, patched, scheduled
from stepdistill.pipeline.explain import encoders
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.hub import configs
from stepdistill.pipeline.ip_adapter import load_ip_adapter
from stepdistill.pipeline.modular import holds_modular, load_modular
from stepdistill.pipeline.names import source
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.places import cut_by, windows
from stepdistill.pipeline.recording import Call, Recording, Step, calls_of
from stepdistill.pipeline.single_file import config_folder
from stepdistill.pipeline.trace import PROBES, Guidance, Trace
from stepdistill.recipe import Teacher

SCALES = ("guidance", "timestep_cond")
"""Arguments of diffusers' networks that hold a guidance scale."""


@dataclass(frozen=True)
class Blueprint:
    """What a plan needs of a pipeline: its trace, one row of its conditions, and the mode that its weights live in."""

    trace: Trace
    condition: Conditions
    mode: FakeTensorMode


def blueprint(teacher: Teacher, dtype: torch.dtype) -> Blueprint:
    """The recipe's teacher without its weights; of an IP-Adapter the files are read.

    Raises:
        InputError: its configs cannot be had, or its call depends on more than shapes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pipeline = from_configs(_configs(teacher), dtype, mode)
    if teacher.ip_adapter is not None:
        with quiet(), without_data(nullcontext()):  # files can be read only as data
            load_ip_adapter(pipeline, teacher.ip_adapter)
    entry = entry_argument(pipeline)
    try:
        observed = partial(_observed, pipeline, PROBES[entry], stop_steps=1)
        whole, arguments, _ = in_any_way(lambda given, _: observed(given), teacher.arguments, alone=False)
        three = whole.steps[0]
        component = three.calls[-1].component
        two = _observed(pipeline, PROBES[entry][:2], arguments, stop_calls=(component, 1)).calls
    except Exception as error:
        if isinstance(error, InputError) and not isinstance(error, TraceError):
            raise  # the arguments are not the pipeline's
        reason = first_line(error)
        raise InputError(f"plan: {type(pipeline).__name__} cannot be run on shapes alone: {reason}") from error
    schedule, kind = from_scheduler(pipeline.scheduler, whole.grid.get("mu"))
    networks = modules(pipeline)
    helpers, helper_conditions = [], []
    for name, feeds in _feeding(three, component).items():
        spec, conditions = _spec(three, two, name, feeds={})
        helpers.append(Helper(name, Denoiser(networks[name], spec, schedule, kind), feeds))
        helper_conditions += [helpers[-1].prefix + condition for condition in conditions]
    spec, names = _spec(three, two, component, {name: None for helper in helpers for name in helper.feeds})
    spec, network = replace(spec, helpers=tuple(helpers)), networks[component]
    if len(experts := [name for name, other in networks.items() if type(other) is type(network)]) > 1:
        # When each is called takes data to find out; a pass through one takes what a pass through any does.
        spec, network = (
            replace(spec, experts={component: Turn(0.0)}),
            Experts({name: networks[name] for name in experts}),
        )
    (call,), (other,) = (calls_of(calls, component, [one.name for one in helpers]) for calls in (three.calls, two))
    embedded = any(isinstance(call.arguments.get(name), Tensor) for name in SCALES)
    rows, fewer = (spec.conditions(one.arguments, [*names, *helper_conditions]) for one in (call, other))
    # What grows with the prompt: the longest is not among the two.
    grows = {name for name, value in rows.items() if value.shape[1:] != fewer[name].shape[1:]}
    shapes = {name: tuple(value.shape[1:]) for name, value in rows.items()}
    return Blueprint(
        Trace(
            pipeline=pipeline,
            component=component,
            entry=entry,
            denoiser=Denoiser(network, spec, schedule, kind),
            guidance=Guidance("embedded" if embedded else "none"),
            latent_shape=tuple(three.sample.shape[1:]),
            conditioning={name: (None, *shape[1:]) if name in grows else shape for name, shape in shapes.items()},
            self_test_error=0.0,
            arguments=arguments,
            encoders=encoders(three, component, [helper.name for helper in helpers]),
            fewest_steps=fewest_steps(pipeline),
        ),
        {name: value[:1] for name, value in rows.items()},
        mode,
    )


def set_up(traced: Trace, scheduler: Any, steps: int) -> dict[str, Any]:
    """As :func:`stepdistill.pipeline.set_up.set_up`: what the blueprint's pipeline gives ``set_timesteps``."""
    key = f"{type(scheduler).__name__} {steps}"
    if key not in traced.set_ups:
        pipeline = traced.pipeline
        with scheduled(pipeline, copy.deepcopy(scheduler)):
            recording = _observed(pipeline, PROBES[traced.entry][:1], traced.arguments, steps, stop_steps=1)
        traced.set_ups[key] = recording.grid
    return traced.set_ups[key]


@contextmanager
def without_data(mode: AbstractContextManager) -> Iterator[None]:
    """Inside, what is made has no data (in a fake ``mode``), a module's ``to`` gives it new parameters instead of
    swapping tensors, and a copy of a module has copies of its tensors (torch's would copy the mode with them, which
    corrupts memory)."""

    def copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone()
        memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo[id(self)]

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(function)
        for name, value in self._parameters.items():
            if value is not None:
                self._parameters[name] = nn.Parameter(function(value.detach()), value.requires_grad)
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = function(value)
        return self

    original = nn.Module._apply
    nn.Module._apply, FakeTensor.__deepcopy__ = apply, copied
    try:
        with mode:
            yield
    finally:
        nn.Module._apply = original
        del FakeTensor.__deepcopy__


def _configs(teacher: Teacher) -> Path:
    """A folder with the configs of the teacher's pipeline; LoRAs and the like, which add no memory, are left out."""
    place = source(teacher.pipeline)
    if Path(place).is_file():
        return config_folder(Path(place), teacher.config)
    return Path(place) if Path(place).is_dir() else configs(place, teacher.revision)


def from_configs(folder: Path, dtype: torch.dtype, mode: AbstractContextManager) -> Any:
    """The pipeline that the configs in ``folder`` describe, with fresh weights; without data in a fake ``mode``."""
    networks = {}
    for name, (library, class_name) in classes(folder).items():
        if not (folder / name).is_dir():  # a modular pipeline lists what it could have as well
            continue
        module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
        kind = getattr(importlib.import_module(module), class_name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        with without_data(mode):
            if hasattr(kind, "load_config"):
                network = kind.from_config(kind.load_config(folder / name))
            else:
                network = kind(kind.config_class.from_pretrained(folder / name))
            with quiet():  # of parts that are better kept in float32
                networks[name] = network.to(dtype).eval()
    with quiet():
        if holds_modular(folder):
            pipeline = load_modular(folder, dtype, networks=networks)
        else:
            pipeline = DiffusionPipeline.from_pretrained(folder, **networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _observed(
    pipeline: Any, entries: tuple[Any, ...], arguments: Mapping[str, Any], steps: int | None = None, **stop: Any
) -> Recording:
    """The first of ``steps`` steps (None: as few as can be), guidance off; the denoiser's call is its last."""

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        return (sample,)

    with quiet(), patched(pipeline.scheduler, "step", step):
        return observe(pipeline, entries, arguments, steps=steps or fewest_steps(pipeline), guidance=1.0, **stop)


def _feeding(step: Step, component: str) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """The networks that take the sample and produce arguments of the denoiser, judged by shapes."""
    (call,) = calls_of(step.calls, component)
    feeding = {}
    for other in step.calls:
        if other is call or not any(_place(value, step.sample) for value in other.arguments.values()):
            continue
        feeds, free = {}, dict(enumerate(other.outputs))
        for name, value in call.arguments.items():
            index = []
            for tensor in tensors_in(value):
                index += [next((i for i, one in free.items() if one.shape == tensor.shape), None)]
                free.pop(index[-1], None)
            if index and None not in index:
                feeds[name] = index[0] if isinstance(value, Tensor) else tuple(index)
        if feeds:
            feeding[other.component] = feeds
    return feeding


def _place(value: Any, sample: Tensor) -> Window | None:
    """Where an argument may hold the sample, as far as shapes tell."""
    ways = (window for argument, window in windows(value, sample) if len(argument) == len(sample))
    return next((one for one in ways if one.frames is None and not (one.grid and len(one.spans) > 1)), None)


def _spec(three: Step, two: Sequence[Call], component: str, feeds: Iterable[str]) -> tuple[CallSpec, list[str]]:
    """How the network is called, as far as shapes tell, and which arguments are conditions; ``feeds`` are others'."""
    (call,), (other,) = (calls_of(calls, component) for calls in (three.calls, two))
    sample = three.sample
    places = {name: place for name, value in call.arguments.items() if (place := _place(value, sample))}
    # One that is the sample as it is goes before one that holds more.
    x = min(places, key=lambda name: len(places[name].spans), default=None)
    time = next((name for name in call.arguments if name in ("timestep", "timesteps", "t")), None)
    if x is None or time is None or isinstance(call.arguments[x], list):
        raise InputError(f"plan: the arguments of {component} do not show what is the sample and what the time")
    rest = {name: value for name, value in call.arguments.items() if name not in (x, time, *feeds)}
    names = [
        name
        for name, value in rest.items()
        if isinstance(value, Tensor) and value.ndim and (len(value), len(other.arguments[name])) == (3, 2)
    ]
    constants = {name: value for name, value in rest.items() if name not in names}
    doubled = call.outputs[0].shape[1] == 2 * sample.shape[1]
    output = "first_half" if doubled else "identity"
    window = cut_by(places[x], call.arguments[x], call.outputs[0])
    spec = CallSpec(x, time, output=output, constants=constants, window=window)
    return spec, [*names, *spec.beside]
