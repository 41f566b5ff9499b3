"""A pipeline whose weights take no memory: built from its configs alone, and driven as far as shapes go.

Its networks hold torch's fake tensors: shapes, dtypes and storages without data. Operations on them compute the same
of their results, so a run can be gone through, and its memory counted, before any weight is loaded.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from stepdistill.errors import InputError
from stepdistill.pipeline.denoiser import CallSpec, Conditions, Denoiser, first_tensor
from stepdistill.pipeline.load import quiet, source
from stepdistill.pipeline.observe import Call, entry_argument, observe, patched
from stepdistill.pipeline.trace import PROBES, Guidance, Trace
from stepdistill.schedule import from_scheduler

# All that a pipeline is, but its weights.
FILES = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class Blueprint:
    """What a plan needs of a pipeline: its trace, one row of its conditions, and the mode that its weights live in."""

    trace: Trace
    condition: Conditions
    mode: FakeTensorMode


def blueprint(path: str | Path, revision: str | None, dtype: torch.dtype) -> Blueprint:
    """The pipeline at ``path`` (folder, embedded teacher or hub id) without its weights.

    Raises:
        InputError: its configs cannot be had, or its call depends on more than shapes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pipeline = _without_weights(_configs(path, revision), dtype, mode)
    entry = entry_argument(pipeline)
    try:
        (three, sample), (two, _) = (_first_step(pipeline, PROBES[entry][:count]) for count in (3, 2))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"plan: {type(pipeline).__name__} cannot be run on shapes alone: {reason}") from error
    spec, names = _spec(three, two, sample)
    schedule, kind = from_scheduler(pipeline.scheduler)
    network = pipeline.components[three.component]
    return Blueprint(
        Trace(
            pipeline=pipeline,
            component=three.component,
            entry=entry,
            denoiser=Denoiser(network, spec, schedule, kind),
            guidance=Guidance("none"),
            latent_shape=tuple(sample.shape[1:]),
            conditioning={name: tuple(three.arguments[name].shape[1:]) for name in names},
            self_test_error=0.0,
        ),
        {name: three.arguments[name][:1] for name in names},
        mode,
    )


@contextmanager
def without_data(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, what is made has no data, a module's ``to`` gives it new parameters instead of swapping tensors, and a
    copy of a module has copies of its tensors (torch's would copy the mode with them, which corrupts memory)."""

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


def _configs(path: str | Path, revision: str | None) -> Path:
    place = source(path)
    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"pipeline {path}: its configs cannot be downloaded: {str(error).splitlines()[0]}") from error


def _without_weights(folder: Path, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    networks = {}
    for name, entry in DiffusionPipeline.load_config(folder).items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        library, class_name = entry
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
        pipeline = DiffusionPipeline.from_pretrained(folder, **networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _first_step(pipeline: Any, entries: tuple[Any, ...]) -> tuple[Call, Tensor]:
    """The denoiser's call in the first step, guidance off, and the scheduler's sample."""

    def step(model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        return (sample,)

    with quiet(), patched(pipeline.scheduler, "step", step):
        recording = observe(pipeline, entries, steps=1, guidance=1.0, stop_steps=1)
    return recording.steps[0].calls[-1], recording.steps[0].sample


def _spec(three: Call, two: Call, sample: Tensor) -> tuple[CallSpec, list[str]]:
    """How the denoiser is called, as far as shapes tell, and which arguments are conditions."""
    tensors = {name: value for name, value in three.arguments.items() if isinstance(value, Tensor)}
    x = next((name for name, value in tensors.items() if value.shape == sample.shape), None)
    time = next((name for name in three.arguments if name in ("timestep", "timesteps", "t")), None)
    if x is None or time is None:
        raise InputError(f"plan: the arguments of {three.component} do not show what is the sample and what the time")
    rest = {name: value for name, value in three.arguments.items() if name not in (x, time)}
    names = [
        name
        for name, value in rest.items()
        if name in tensors and value.ndim and (len(value), len(two.arguments[name])) == (3, 2)
    ]
    doubled = first_tensor(three.output).shape[1] == 2 * sample.shape[1]
    constants = {name: value for name, value in rest.items() if name not in names}
    output = "first_half" if doubled else "identity"
    return CallSpec(x, time, output=output, constants=constants), names
