"""LoRA students as files that a stock ``load_lora_weights`` takes, and pipelines with such a student in them."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from stepdistill.diffusion.experts import Experts
from stepdistill.errors import InputError
from stepdistill.pipeline.components import shared_inside
from stepdistill.pipeline.exports import WEIGHTS, lora_files
from stepdistill.pipeline.trace import Trace
from stepdistill.roles.views import AdapterView, adapter_layers

KOHYA = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
"""Layers of SDXL that diffusers reads only under the names of kohya's own UNet, which ComfyUI knows as well."""

Keys = Literal["diffusers", "kohya"]


def why_not_lora(trace: Trace, student: nn.Module) -> str | None:
    """Why the student cannot be written as LoRA weights for this class of pipeline; None where it can."""
    pipeline = trace.pipeline
    if not isinstance(student, AdapterView):
        return "it is more than a LoRA on the teacher's weights"
    if len(trace.components) > 1 and not isinstance(student.backbone, Experts):
        return f"one network is all of {', '.join(trace.components)}, which have weights of their own"
    loadable = getattr(pipeline, "_lora_loadable_modules", ())
    if lacking := [name for name in trace.components if name not in loadable]:
        return f"{type(pipeline).__name__} loads no LoRA for its {lacking[0]}"
    if shared_inside(pipeline, "scheduler"):
        return f"a pipeline inside {type(pipeline).__name__} keeps its scheduler when another is put beside a LoRA"
    networks = [getattr(pipeline, name) for name in trace.components]
    if bare := [type(one).__name__ for one in networks if not hasattr(one, "load_lora_adapter")]:
        return f"{bare[0]} of diffusers takes no LoRA"
    return None


def save_lora(
    trace: Trace,
    student: AdapterView,
    folder: Path,
    keys: Keys = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the student's adapter and the pipeline's scheduler into ``folder``; of experts a file for each.

    The adapter's scale is 1 (:func:`fold_scale`): alpha is the rank in the file, which is what a reader that finds no
    alpha takes.

    Raises:
        InputError: kohya's key names for a network that is no UNet; ComfyUI reads diffusers' names of those.
    """
    pipeline, components = trace.pipeline, trace.components
    weights = adapter_weights(student, dtype)
    if keys == "diffusers":
        for name, file in lora_files(components).items():
            # Each file names the first component, which is how diffusers reads one for another.
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            layers = {f"{components[0]}_lora_layers": own if len(components) > 1 else weights}
            type(pipeline).save_lora_weights(folder, weight_name=file, **layers)
    elif components == ("unet",):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kohya_keys(weights), folder / WEIGHTS)
    else:
        network = type(trace.network).__name__
        raise InputError(
            f"export.keys: expected 'diffusers' for {network}, found 'kohya', which names UNets' layers only"
        )
    pipeline.scheduler.save_pretrained(folder / "scheduler")


def adapter_weights(student: AdapterView, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """peft's state dict of the student's adapter, on the CPU."""
    weights = get_peft_model_state_dict(student.backbone, adapter_name=student.adapter)
    return {name: value.detach().cpu().to(dtype).contiguous() for name, value in weights.items()}


def kohya_keys(weights: dict[str, Any]) -> dict[str, Any]:
    """peft's state dict of a UNet's LoRA under the names of kohya's scripts, with an alpha per layer."""
    renamed = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in weights.items()})
    for ours, theirs in KOHYA.items():
        renamed = {name.replace(f"lora_unet_{ours}.", f"lora_unet_{theirs}."): value for name, value in renamed.items()}
    # diffusers counts an integer alpha, which readers that scale by alpha / rank expect as a float.
    return {name: value.float() if name.endswith(".alpha") else value for name, value in renamed.items()}


@torch.no_grad()
def fold_scale(student: AdapterView) -> None:
    """Move alpha / rank of the student's adapter into its B, in place: the same function, at scale 1."""
    for layer in adapter_layers(student):
        layer.lora_B[student.adapter].weight.mul_(layer.scaling[student.adapter])
        layer.scaling[student.adapter] = 1.0
