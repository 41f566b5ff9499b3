"""LoRA students as files that a stock ``load_lora_weights`` takes, and pipelines with such a student in them."""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from stepdistill.adapters import AdapterView
from stepdistill.errors import InputError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""diffusers' own name: ``load_lora_weights(folder)`` finds it."""

KOHYA = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
"""Layers of SDXL that diffusers reads only under the names of kohya's own UNet, which ComfyUI knows as well."""

Keys = Literal["diffusers", "kohya"]


def why_not_lora(pipeline: Any, component: str, student: nn.Module) -> str | None:
    """Why the student cannot be written as LoRA weights for this class of pipeline; None where it can."""
    if not isinstance(student, AdapterView):
        return "it is more than a LoRA on the teacher's weights"
    if component not in getattr(pipeline, "_lora_loadable_modules", ()):
        return f"{type(pipeline).__name__} loads no LoRA for its {component}"
    return None


def save_lora(
    pipeline: Any,
    component: str,
    student: AdapterView,
    folder: Path,
    keys: Keys = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the student's adapter and the pipeline's scheduler into ``folder``.

    The adapter's scale is 1 (:func:`fold_scale`): alpha is the rank in the file, which is what a reader that finds no
    alpha takes.

    Raises:
        InputError: kohya's key names for a network that is no UNet; ComfyUI reads diffusers' names of those.
    """
    weights = get_peft_model_state_dict(student.backbone, adapter_name=student.adapter)
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in weights.items()}
    if keys == "diffusers":
        type(pipeline).save_lora_weights(folder, **{f"{component}_lora_layers": weights})
    elif component == "unet":
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kohya_keys(weights), folder / WEIGHTS)
    else:
        network = type(student.backbone).__name__
        raise InputError(
            f"export.keys: expected 'diffusers' for {network}, found 'kohya', which names UNets' layers only"
        )
    pipeline.scheduler.save_pretrained(folder / "scheduler")


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
    for layer in _layers(student):
        layer.lora_B[student.adapter].weight.mul_(layer.scaling[student.adapter])
        layer.scaling[student.adapter] = 1.0


def _layers(student: AdapterView) -> list[BaseTunerLayer]:
    """The layers that have the student's adapter."""
    layers = (module for module in student.backbone.modules() if isinstance(module, BaseTunerLayer))
    return [layer for layer in layers if student.adapter in layer.scaling]


def load_adapter(pipeline: Any, component: str, folder: Path, student: AdapterView) -> None:
    """Copy the LoRA in ``folder`` into the student's adapter: its delta, whatever the student's alpha.

    Raises:
        InputError: its layers or ranks are not the student's.
    """
    state = type(pipeline).lora_state_dict(folder, use_safetensors=True)
    state = state[0] if isinstance(state, tuple) else state
    # Of kohya's names diffusers makes its own of earlier years.
    state = convert_unet_state_dict_to_peft(state)
    weights = {name.removeprefix(f"{component}."): value for name, value in state.items()}
    expected = get_peft_model_state_dict(student.backbone, adapter_name=student.adapter)
    different = sorted(weights.keys() ^ expected.keys())
    different += [name for name, value in expected.items() if name in weights and weights[name].shape != value.shape]
    if different:
        raise InputError(f"student.init: the LoRA in {folder} has other layers or another rank: {different[0]}")
    set_peft_model_state_dict(student.backbone, weights, adapter_name=student.adapter)
    with torch.no_grad():
        for layer in _layers(student):
            layer.lora_B[student.adapter].weight.div_(layer.scaling[student.adapter])


def is_lora(folder: Path) -> bool:
    """Whether ``folder`` is a LoRA that this package has exported."""
    return (folder / WEIGHTS).is_file() and (folder / "stepdistill.json").is_file()


def teacher_of(folder: Path) -> dict[str, Any]:
    """``path``, ``revision`` and ``variant`` of the pipeline that the LoRA in ``folder`` belongs to."""
    facts = json.loads((folder / "stepdistill.json").read_text(encoding="utf-8"))
    variant = facts.get("recipe", {}).get("teacher", {}).get("variant")
    return {"path": facts["teacher"], "revision": facts.get("revision"), "variant": variant}


def fuse(pipeline: Any, folder: Path) -> Any:
    """The pipeline with the LoRA in ``folder`` in its weights, and the scheduler that lies beside it."""
    pipeline.load_lora_weights(folder, use_safetensors=True)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    pipeline.register_modules(scheduler=getattr(diffusers, config["_class_name"]).from_config(config))
    return pipeline
