"""What a trace has learned, kept on the disk: a later start takes it from there and holds it to one step of a run.

A file has the facts alone, and is found by a hash of what they depend on. It is read as tensors and as classes of this
library, never as code. What it says is confirmed by one unguided step of one entry, as a trace at a small size is.
"""

import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
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
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.identity import settings, some
from stepdistill.pipeline.probe_call import ProbeCall
from stepdistill.pipeline.schedulers import replace_scheduler
from stepdistill.pipeline.sizes import recorded, trace_small
from stepdistill.pipeline.stock_call import pictures_in
from stepdistill.pipeline.trace import Trace

UNREADABLE = (OSError, RuntimeError, UnpicklingError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""What reading a file raises that was damaged, or written by an earlier version."""
FACTS = ("stepdistill.diffusion.", "stepdistill.kernels.guide", "stepdistill.pipeline.explain")
"""The modules whose dataclasses and named tuples are what a trace consists of."""
PLAIN = {f"builtins.{kind.__name__}": kind for kind in (frozenset, list, tuple)}
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

    None: the pipeline's weights are not there (a plan), or a picture; or a value of the call has no name that lasts.
    """
    networks = modules(pipeline)
    tensors = [tensor for network in networks.values() for tensor in network.parameters()]
    if any(tensor.is_meta or type(tensor) not in (nn.Parameter, torch.Tensor) for tensor in tensors):
        return None
    files = [Path(file) for value in arguments.values() for file in pictures_in(value)]
    if not all(map(_lasts, arguments.values())) or not all(file.is_file() for file in files):
        return None
    versions = (stepdistill.__version__, torch.__version__, diffusers.__version__, transformers.__version__)
    components = pipeline.components
    parts = {name: (*settings(one), getattr(one, "padding_side", None)) for name, one in components.items()}
    weights = {key: {name: some(p) for name, p in one.named_parameters()} for key, one in networks.items()}
    places = sorted({f"{tensor.device.type} {tensor.dtype}" for tensor in tensors})
    config = {name: value for name, value in dict(getattr(pipeline, "config", {})).items() if name[0] != "_"}
    own = {
        name: value
        for name, value in vars(pipeline).items()
        if name[0] != "_" and isinstance(value, bool | int | float)
    }
    of_pipeline = (type(pipeline).__name__, getattr(pipeline, "made_of", None), config, own)
    kinds = {name: type(value).__name__ for name, value in arguments.items()}
    call = (arguments, kinds, [sha256(file) for file in files])
    code = (_code(), _code_of(pipeline, *components.values()))
    return digest(versions, code, of_pipeline, call, parts, weights, places)


def _lasts(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_lasts, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


@cache
def _code() -> str:
    """A hash of the code that traces."""
    root = Path(__file__).parents[1]
    files = [file for room in ("diffusion", "pipeline") for file in sorted((root / room).glob("*.py"))]
    return digest(*(file.read_bytes() for file in files))


def _code_of(*parts: Any) -> list[bytes]:
    """The code of a pipeline and its components: a library's may change between two of its versions."""
    files = set()
    for kind in {type(part) for part in parts if part is not None}:
        with suppress(OSError, TypeError):  # it has none: a built-in class, or one that was made in a console
            files.add(inspect.getsourcefile(kind))
    return [Path(file).read_bytes() for file in sorted(filter(None, files))]


def _write(file: Path, traced: Trace) -> None:
    """Keep the facts; nothing, where they hold something that no file does."""
    facts = {one.name: getattr(traced, one.name) for one in fields(traced) if one.name not in OF_THE_RUN}
    content = {"facts": facts, "networks": traced.components, "spec": _without_networks(traced.denoiser.spec)}
    content["schedule"] = _numbers(traced.denoiser.schedule)
    try:
        with atomic(file) as draft:
            torch.save(content, draft)
    except (PicklingError, AttributeError, TypeError, ValueError, RuntimeError, OSError):  # or the disk is full
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
        replace_scheduler(ProbeCall(pipeline, content["facts"]["entry"], arguments))
        with quiet():
            return recorded(_restored(content, pipeline), content["facts"]["arguments"])
    except (*UNREADABLE, InputError, TraceError):
        return None


def _own_class(name: str) -> type:
    """A class of facts by its name; nothing is imported, and no function is found."""
    if name in PLAIN:
        return PLAIN[name]
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None) if module.startswith(FACTS) else None
    if not isinstance(found, type) or not (is_dataclass(found) or hasattr(found, "_fields")):
        raise UnpicklingError(f"{name} is not a class of facts")
    return found


def _device(pipeline: Any) -> torch.device:
    return next(tensor.device for network in modules(pipeline).values() for tensor in network.parameters())


def _restored(content: Mapping[str, Any], pipeline: Any) -> Trace:
    schedule, kind = from_scheduler(pipeline.scheduler, 0.0)
    vars(schedule).update(content["schedule"])

    def denoiser(network: nn.Module, spec: Any) -> Denoiser:
        helpers = [replace(one, denoiser=denoiser(getattr(pipeline, one.name), one.denoiser)) for one in spec.helpers]
        return Denoiser(network, replace(spec, helpers=tuple(helpers)), schedule, kind)

    networks = {name: getattr(pipeline, name) for name in content["networks"]}
    network = Experts(networks) if len(networks) > 1 else networks[content["networks"][0]]
    return Trace(pipeline=pipeline, denoiser=denoiser(network, content["spec"]), **content["facts"])
