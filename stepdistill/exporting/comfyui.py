"""Files for other programs beside an export: one checkpoint or LoRA that ComfyUI, Forge and kohya's scripts read."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.exporting import ldm, original
from stepdistill.exporting.lora import adapter_weights, kohya_keys
from stepdistill.exporting.workflow import FAMILIES, SAMPLERS, base_name, no_workflow, workflow
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.recipe import Teacher
from stepdistill.roles.guidance_adapters import fastened
from stepdistill.roles.views import plain_network
from stepdistill.training.session import Session

FOLDER, WORKFLOW = "comfyui", "workflow.json"


def why_not(trace: Trace, teacher: Teacher) -> str | None:
    """Why there is no file for other programs; None where there is one.

    Args:
        teacher: the recipe's.
    """
    name = type(trace.pipeline).__name__
    if fastened(trace.network) is not None:
        return "the student is a guidance adapter, which takes stepdistill.attach"
    if name not in FAMILIES:
        return f"{name} is none of {', '.join(FAMILIES)}"
    if teacher.embeddings:
        return "a text encoder with textual inversions in it has no place in a one-file checkpoint"
    if getattr(trace.pipeline, "transformer_2", None) is not None:
        return f"this {name} has two networks"
    if name == "StableDiffusionPipeline" and trace.pipeline.text_encoder.config.hidden_act == "gelu":
        return "Stable Diffusion 2 has another layout than 1.5"
    try:
        (ldm.unet_weights if trace.component == "unet" else original.check_names)(trace.network)
    except InputError as error:
        return str(error)
    return None


def add(session: Session, folder: Path, dtype: torch.dtype, facts: ExportFacts) -> str:
    """Write ``folder``/comfyui: the student in one file, and a workflow. Lines say what there is none of, and why.

    Returns:
        The card's section about them, in Markdown; "" where there is no file.

    Raises:
        InputError: a weight has no place in such a file, or is too large for ``dtype``.
    """
    trace, student = session.trace, session.method.roles.student.network
    if reason := why_not(trace, session.recipe.teacher):
        say(f"no file for ComfyUI: {reason}")
        return ""
    if facts.form == "lora":
        weights = lora(trace, student.backbone, adapter_weights(student))
    else:
        weights = checkpoint(trace, plain_network(student))
    place, file = folder / FOLDER, file_name(facts)
    place.mkdir(parents=True)
    # An alpha stays float32.
    stored = {
        name: value.cpu() if name.endswith(".alpha") else value.cpu().to(dtype) for name, value in weights.items()
    }
    stored = {name: value.detach().contiguous() for name, value in stored.items()}
    if lost := [name for name, value in stored.items() if not value.isfinite().all()]:
        raise InputError(
            f"export.dtype: {lost[0]} holds values beyond {torch.finfo(dtype).max:.6g}, the largest of {dtype}"
        )
    save_file(stored, place / file, metadata={"format": "pt"})
    if reason := no_workflow(trace, facts, session.sampler):
        say(f"no workflow for ComfyUI: {reason}")
    else:
        nodes = workflow(trace, facts, session.sampler, file)
        (place / WORKFLOW).write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return section(trace, facts, reason)


def checkpoint(trace: Trace, network: nn.Module) -> dict[str, Tensor]:
    """The one file of a pipeline with ``network`` as its denoiser: all of SD and SDXL, SD3 without its text encoders.

    Raises:
        InputError: a weight has no place in it.
    """
    pipeline = trace.pipeline
    if trace.component == "unet":
        return ldm.checkpoint(pipeline, network)
    weights = original.original_weights(network, network.state_dict())
    if not FAMILIES[type(pipeline).__name__].whole:
        return weights
    vae = {f"first_stage_model.{name}": value for name, value in ldm.vae_weights(pipeline.vae).items()}
    return {f"model.diffusion_model.{name}": value for name, value in weights.items()} | vae


def lora(trace: Trace, network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA under kohya's names.

    Args:
        network: the teacher's.
        weights: peft's, at scale 1.

    Raises:
        InputError: a layer has no place in it.
    """
    if trace.component == "unet":
        return kohya_keys(dict(weights))
    return original.lora_weights(network, weights)


def file_name(facts: ExportFacts) -> str:
    """TEACHER_METHOD_Nstep.safetensors, with ``_lora`` of a LoRA."""
    form = "_lora" if facts.form == "lora" else ""
    return f"{base_name(facts)}_{facts.method}_{facts.steps}step{form}.safetensors"


def section(trace: Trace, facts: ExportFacts, reason: str | None) -> str:
    """The card's section, in Markdown.

    Args:
        reason: why there is no workflow; None where there is one.
    """
    family, file = FAMILIES[type(trace.pipeline).__name__], f"{FOLDER}/{file_name(facts)}"
    if facts.form == "lora":
        what = "the LoRA, for `models/loras` (Forge, A1111: `models/Lora`); strength 1.0"
    elif family.whole:
        alone = " with its autoencoder, without text encoders" if family.loader else ", complete"
        what = f"the checkpoint{alone}, for `models/checkpoints` (Forge, A1111: `models/Stable-diffusion`)"
    else:
        what = "the diffusion model alone, for `models/diffusion_models` (Forge: `models/Stable-diffusion`)"
    lines = [f"- `{file}`: {what}."]
    if reason:
        lines.append(f"- There is no workflow: {reason}.")
        return "\n".join(lines)
    lines.append(
        f"- `{FOLDER}/{WORKFLOW}`: open it in ComfyUI, and choose your own files for the names in its loaders. It "
        "takes the trained noise levels at CFG 1.0."
    )
    sampler = {"lcm": "LCM", "euler": "Euler"}[SAMPLERS[facts.sampler]]
    settings = f"sampler {sampler}, schedule type Simple, {facts.steps} steps, CFG scale 1"
    if trace.guidance.kind == "embedded":
        settings += f", distilled CFG scale {facts.call_guidance:g}"
    schedule = trace.denoiser.schedule
    if schedule.name == "flow" and not schedule.dynamic:
        settings += f", shift {schedule.shift:g}"
    lines.append(f"- In Forge{' and A1111' if trace.component == 'unet' else ''}: {settings}.")
    return "\n".join(lines)
