"""What a trace has learned, kept on the disk: a later start takes it from there and holds it to one step of a run.

A file has the facts alone, and is found by a hash of what they depend on. It is read as tensors and as classes of this
library, never as code. What it says is confirmed by one unguided step of one entry, as a trace at a small size is.
"""

import importlib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

import stepdistill
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.experts import Experts
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.errors import InputError
from stepdistill.files import atomic, cache_folder, digest, sha256
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.identity import settings, some
from stepdistill.pipeline.observe import modules
from stepdistill.pipeline.sizes import recorded, trace_small
from stepdistill.pipeline.stock_call import pictures_in
from stepdistill.pipeline.trace import Trace, replace_scheduler

UNREADABLE = (OSError, RuntimeError, UnpicklingError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""What reading a file raises that was damaged, or written by an earlier version."""
OF_THE_RUN = {"pipeline", "denoiser", "set_ups"}
"""The parts of a trace that are no facts, or are kept in another form."""


def kept_trace(pipeline: Any, arguments: Mapping[str, Any] | None = None) -> Trace:
    """:func:`.trace_small`, or what it has found before for such a pipeline with these arguments.

    Raises:
        InputError, TraceError: as there.
    """
    arguments = dict(arguments or {})
    name = _name(pipeline, arguments)
    if name is None:
        return trace_small(pipeline, arguments)
    file = cache_folder() / f"traces-{name}.pt"
    if (found := _read(file, pipeline, arguments)) is not None:
        return found
    traced = trace_small(pipeline, arguments)
    _write(file, traced)
    return traced


def _name(pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
    """A hash of the code, the pipeline and the call; of the weights a few values of each tensor.

    None: the pipeline's weights are not there (a plan), or a value of the call has no name that lasts.
    """
    networks = modules(pipeline)
    tensors = [tensor for network in networks.values() for tensor in network.parameters()]
    if any(tensor.is_meta or type(tensor) not in (nn.Parameter, torch.Tensor) for tensor in tensors):
        return None
    if not all(_lasts(value) for value in arguments.values()):
        return None
    versions = (stepdistill.__version__, torch.__version__, diffusers.__version__, transformers.__version__, _code())
    pictures = [sha256(Path(file)) for value in arguments.values() for file in pictures_in(value)]
    parts = {name: settings(component) for name, component in pipeline.components.items()}
    weights = {key: {name: some(p) for name, p in one.named_parameters()} for key, one in networks.items()}
    places = sorted({f"{tensor.device} {tensor.dtype}" for tensor in tensors})
    of_pipeline = (type(pipeline).__name__, getattr(pipeline, "made_of", None), dict(getattr(pipeline, "config", {})))
    return digest(versions, of_pipeline, arguments, pictures, parts, weights, places)


def _lasts(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_lasts, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


@cache
def _code() -> str:
    """A hash of the code that traces."""
    root = Path(__file__).parents[1]
    return digest(
        *(file.read_bytes() for room in ("diffusion", "pipeline") for file in sorted((root / room).glob("*.py")))
    )


def _write(file: Path, traced: Trace) -> None:
    """Keep the facts; nothing, where they hold something that no file does."""
    network = traced.denoiser.network
    names = tuple(network) if isinstance(network, Experts) else (traced.component,)
    facts = {one.name: getattr(traced, one.name) for one in fields(traced) if one.name not in OF_THE_RUN}
    content = {"facts": facts, "networks": names, "spec": _without_networks(traced.denoiser.spec)}
    content["schedule"] = _numbers(traced.denoiser.schedule)
    try:
        with atomic(file) as draft:
            torch.save(content, draft)
    except (PicklingError, AttributeError, TypeError, OSError):
        return


def _numbers(schedule: Any) -> dict[str, Any]:
    """What a schedule is beside its scheduler's tables, such as whether its timesteps are cut off."""
    return {name: value for name, value in vars(schedule).items() if isinstance(value, bool | int | float)}


def _without_networks(spec: Any) -> Any:
    """The spec, with helpers whose denoisers have neither network nor schedule: those of the pipeline are put in."""
    return replace(
        spec, helpers=tuple(replace(one, denoiser=_without_networks(one.denoiser.spec)) for one in spec.helpers)
    )


def _read(file: Path, pipeline: Any, arguments: dict[str, Any]) -> Trace | None:
    """The kept trace, if it is there, whole, and what the pipeline's own step confirms."""
    if not file.is_file():
        return None
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([_own_class(name) for name in unknown]):
            content = torch.load(file, map_location=_device(pipeline), weights_only=True)
        replace_scheduler(pipeline, content["facts"]["entry"], arguments)
        with quiet():
            return recorded(_restored(content, pipeline), content["facts"]["arguments"])
    except (*UNREADABLE, InputError, TraceError):
        return None


def _own_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] != "stepdistill" and name != "builtins.frozenset":
        raise UnpicklingError(f"{name} is not a class of this library")
    return getattr(importlib.import_module(module), attribute)


def _device(pipeline: Any) -> torch.device:
    return next(tensor.device for network in modules(pipeline).values() for tensor in network.parameters())


def _restored(content: Mapping[str, Any], pipeline: Any) -> Trace:
    schedule, kind = from_scheduler(pipeline.scheduler, 0.0)
    vars(schedule).update(content["schedule"])

    def denoiser(network: nn.Module, spec: Any) -> Denoiser:
        helpers = [replace(one, denoiser=denoiser(getattr(pipeline, one.name), one.denoiser)) for one in spec.helpers]
        return Denoiser(network, replace(spec, helpers=tuple(helpers)), schedule, kind)

    networks = {name: getattr(pipeline, name) for name in content["networks"]}
    network = Experts(networks) if len(networks) > 1 else next(iter(networks.values()))
    return Trace(pipeline=pipeline, denoiser=denoiser(network, content["spec"]), **content["facts"])
