"""LoRAs fused into a teacher's weights, in whatever format diffusers reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from diffusers.utils.peft_utils import get_peft_kwargs
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from stepdistill.errors import InputError, suggest
from stepdistill.pipeline.complete import some
from stepdistill.pipeline.components import patched, put
from stepdistill.pipeline.folder import loading, quiet
from stepdistill.pipeline.single_file import shapes
from stepdistill.recipe.section import Lora

NAME = "fused"


def fuse_lora(pipeline: Any, lora: Lora, key: str) -> None:
    """Add a LoRA to the pipeline's weights; networks that may have one become float32. Messages name ``key``.

    Raises:
        InputError: the pipeline takes none, has no such component, or the file has something that finds no layer.
    """
    if not hasattr(pipeline, "fuse_lora"):
        raise InputError(f"{key}: {type(pipeline).__name__} takes no LoRA")
    with _for_component(pipeline, lora.component, key):
        _fuse(pipeline, lora, key)


@contextmanager
def _for_component(pipeline: Any, component: str | None, key: str) -> Iterator[None]:
    """Inside, ``component`` is where diffusers puts LoRAs: in the place of the first network of its class."""
    if component is None:
        yield
        return
    parts = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    kinds = {type(part) for part in parts.values() if isinstance(part, nn.Module)}
    taking = [name for name, part in networks.items() if type(part) in kinds]
    if component not in taking:
        raise InputError(
            f"{key}.component: expected {' or '.join(taking)}, found '{component}'{suggest(component, taking)}"
        )
    first = next(name for name, part in parts.items() if type(part) is type(networks[component]))
    put(pipeline, first, networks[component])
    try:
        yield
    finally:
        put(pipeline, first, networks[first])


def _fuse(pipeline: Any, lora: Lora, key: str) -> None:
    name, file = type(pipeline).__name__, Path(lora.file)
    held = shapes(file)
    found = {part: getattr(pipeline, part, None) for part in pipeline._lora_loadable_modules}
    # Each network once: it may stand in two places.
    parts = {id(network): part for part, network in reversed(found.items()) if isinstance(network, nn.Module)}.values()
    for part in parts:
        getattr(pipeline, part).float()
    # As a file and not its tensors: its metadata may say how its ranks are scaled.
    place = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    place |= {"use_safetensors": True, "local_files_only": True}
    refusal = f"{key}: {file} cannot be loaded into {name}"
    with loading(refusal), patched(pipeline, "load_lora_into_text_encoder", _into_text_encoder):
        state = type(pipeline).lora_state_dict(**place)
        pipeline.load_lora_weights(**place, adapter_name=NAME)
    state = state[0] if isinstance(state, tuple) else state
    given = [one for one in state if not one.endswith(".alpha")]
    taken = {part: sum(f".{NAME}." in one for one in getattr(pipeline, part).state_dict()) for part in parts}
    if not given or sum(taken.values()) < len(given):
        raise InputError(
            f"{key}: expected a LoRA of {name}, found {file} with {len(given)} tensors, of which {sum(taken.values())} "
            f"belong to a layer of it ({some(given or sorted(held))})"
        )
    with quiet():
        changed = [part for part, number in taken.items() if number]
        pipeline.fuse_lora(components=changed, lora_scale=lora.scale, adapter_names=[NAME])
        pipeline.unload_lora_weights()


def _into_text_encoder(
    state_dict: Mapping[str, Tensor],
    network_alphas: Mapping[str, float] | None = None,
    text_encoder: Any = None,
    prefix: str | None = "text_encoder",
    metadata: Mapping[str, Any] | None = None,
    **_: Any,
) -> None:
    """As the pipelines' ``load_lora_into_text_encoder``, by peft alone.

    The loading of transformers behind it takes only the versions of peft that it was released beside.
    """

    # Newer versions of transformers have no text_model in CLIP's names.
    dropped = "" if hasattr(text_encoder, "text_model") else "text_model."

    def own(values: Mapping[str, Any] | None) -> dict[str, Any]:
        inner = {
            name.partition(".")[2]: value for name, value in (values or {}).items() if name.startswith(f"{prefix}.")
        }
        return {name.removeprefix(dropped): value for name, value in inner.items()}

    state = own(state_dict)
    if not state or text_encoder is None:
        return
    if not all(".lora_" in name and "lora_linear_layer" not in name for name in state):
        state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    ranks = {name: value.shape[1] for name, value in state.items() if name.endswith(".lora_B.weight")}
    settings = own(metadata) or get_peft_kwargs(ranks, own(network_alphas), state, is_unet=False)
    inject_adapter_in_model(LoraConfig(**settings), text_encoder, NAME)
    set_peft_model_state_dict(text_encoder, state, NAME)
