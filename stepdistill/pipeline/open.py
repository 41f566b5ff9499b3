"""Open a teacher: load its pipeline, trace it, and set its guidance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import InputError
from stepdistill.pipeline.exports import ExportFacts, is_lora, put_scheduler
from stepdistill.pipeline.load import as_teacher, load_pipeline
from stepdistill.pipeline.observe import modules
from stepdistill.pipeline.sizes import trace_small
from stepdistill.pipeline.students import base_of, student_folders, with_students
from stepdistill.pipeline.trace import Trace
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

    Raises:
        InputError: no such pipeline, it cannot be loaded that way, or it takes no such arguments or rule.
        TraceError: it cannot be traced; the message names the failed check.
    """
    students = student_folders(as_teacher(name).pipeline)
    pipeline = load_pipeline(base_of(students) if students else name, dtype, frozen.quantize, ip_adapter)
    if students and is_lora(students["0"]):
        put_scheduler(pipeline, students["0"])
    if frozen:
        for network in _denoisers(pipeline, frozen):
            store(network, frozen, device or torch.device("cpu"))
    if device is not None and device.type != "cpu":
        pipeline.to(device)
    if arguments is None:
        facts = ExportFacts.read(as_teacher(name).pipeline)
        arguments = {} if facts is None else facts.arguments
    traced = trace_small(pipeline, arguments)
    if students:
        traced = with_students(traced, Path(as_teacher(name).pipeline))
    ruled = with_rule(with_guidance(traced, guidance.scale), guidance.combination)
    return with_guider(ruled, guidance.guider)


def _denoisers(pipeline: Any, frozen: Frozen) -> list[torch.nn.Module]:
    """The networks that are stored, before a trace shows which one denoises: diffusers has two names for it.

    Others of its class may take turns with it.
    """
    for name in ("transformer", "unet"):
        if isinstance(network := pipeline.components.get(name), torch.nn.Module):
            return [one for one in modules(pipeline).values() if type(one) is type(network)]
    key, value = ("storage", frozen.storage) if frozen.storage else ("offload", frozen.offload)
    kind = type(pipeline).__name__
    raise InputError(f"teacher.{key}: expected null for {kind}, which has no transformer and no unet, found {value}")
