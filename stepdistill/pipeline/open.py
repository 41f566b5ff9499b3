"""Open a teacher: load its pipeline, trace it, and set its guidance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import InputError
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.exports import ExportFacts, is_lora, put_scheduler
from stepdistill.pipeline.kept_traces import kept_trace
from stepdistill.pipeline.load import as_teacher, load_pipeline
from stepdistill.pipeline.resting import place, rest, stay
from stepdistill.pipeline.students import base_of, student_folders, with_students
from stepdistill.pipeline.trace import Trace, TraceError
from stepdistill.pipeline.variants import with_guidance, with_guider, with_rule
from stepdistill.recipe import IPAdapter, Teacher
from stepdistill.recipe.section import Guidance
from stepdistill.roles.stored_weights import Frozen, store


def open_teacher(
    name: str | Path | Teacher,
    *,
    arguments: Mapping[str, Any] | None = None,
    ip_adapter: IPAdapter | None = None,
    guidance: Guidance = Guidance(),
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    frozen: Frozen = Frozen(),
    resting: bool = False,
) -> Trace:
    """Load a pipeline and trace it; any pipeline, exports included, and several students with a router.

    Args:
        name: of an embedded teacher, a local folder, a checkpoint file or a hub id; or the teacher of a recipe, for its
            name and all that says what is loaded.
        arguments: further arguments of the pipeline's call; None: those that an export was trained for.
        ip_adapter: loaded into the pipeline; None: the one that an export was trained with.
        guidance: the scale of guidance inside the network, and the rule of guidance outside.
        device: where the pipeline is traced and stays; None: the CPU.
        dtype: of all networks.
        frozen: how the denoiser's weights are kept.
        resting: networks that make conditions, and with ``frozen.offload`` the autoencoder, stay in the host's memory:
            they come to the device when they are called, and go with :func:`stepdistill.pipeline.resting.rest`.

    Raises:
        InputError: no such pipeline, it cannot be loaded that way, or it takes no such arguments or rule.
        TraceError: it cannot be traced; the message names the failed check.
    """
    students = student_folders(as_teacher(name).pipeline)
    pipeline = load_pipeline(base_of(students) if students else name, dtype, frozen.quantize, ip_adapter)
    if students and is_lora(students["0"]):
        put_scheduler(pipeline, students["0"])
    if frozen:
        for network in _stored(pipeline, frozen):
            store(network, frozen, device or torch.device("cpu"))
    if arguments is None:
        facts = ExportFacts.read(as_teacher(name).pipeline)
        arguments = {} if facts is None else facts.arguments
    if device is None or device.type == "cpu":
        traced = kept_trace(pipeline, arguments)
    else:
        traced = _traced_on(device, pipeline, arguments, resting, autoencoder_rests=frozen.offload is not None)
    if students:
        traced = with_students(traced, Path(as_teacher(name).pipeline))
    ruled = with_rule(with_guidance(traced, guidance.scale), guidance.combination)
    return with_guider(ruled, guidance.guider)


def _traced_on(
    device: torch.device, pipeline: Any, arguments: Mapping[str, Any], resting: bool, autoencoder_rests: bool
) -> Trace:
    """The trace of a pipeline on a device. Until it shows which networks make conditions, all others may rest."""
    home = {*_denoisers(pipeline), *(() if autoencoder_rests else ("vae",))}
    at_rest = [name for name in modules(pipeline) if name not in home] if resting else []
    place(pipeline, device, at_rest)
    try:
        traced = kept_trace(pipeline, arguments)
    except TraceError:
        if not at_rest:
            raise
        # It may take its networks by other ways than their calls.
        for network in modules(pipeline).values():
            stay(network)
        return kept_trace(pipeline, arguments)
    for name, network in modules(pipeline).items():
        if name not in traced.encoders and name != "vae":
            stay(network)
    rest(pipeline)
    return traced


def _denoisers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The networks that denoise, before a trace shows which they are: diffusers has two names for the first.

    Others of its class may take turns with it.
    """
    for name in ("transformer", "unet"):
        if isinstance(network := pipeline.components.get(name), torch.nn.Module):
            return {key: one for key, one in modules(pipeline).items() if type(one) is type(network)}
    return {}


def _stored(pipeline: Any, frozen: Frozen) -> list[torch.nn.Module]:
    if networks := _denoisers(pipeline):
        return [*networks.values()]
    key, value = ("storage", frozen.storage) if frozen.storage else ("offload", frozen.offload)
    kind = type(pipeline).__name__
    raise InputError(f"teacher.{key}: expected null for {kind}, which has no transformer and no unet, found {value}")
