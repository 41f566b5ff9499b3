"""IP-Adapters on a teacher: their weights stay as they are, in every role and in every export."""

from pathlib import PurePosixPath
from typing import Any

import torch
from transformers import CLIPVisionModelWithProjection

from stepdistill.errors import InputError, in_a_line
from stepdistill.pipeline.complete import all_weights_found
from stepdistill.pipeline.components import modules, put
from stepdistill.recipe import IPAdapter


def stock_arguments(adapter: IPAdapter) -> dict[str, Any]:
    """What a stock pipeline's ``load_ip_adapter`` is called with."""
    file = PurePosixPath(adapter.weights)
    return {
        "pretrained_model_name_or_path_or_dict": adapter.source,
        "subfolder": "" if file.parent == PurePosixPath(".") else str(file.parent),
        "weight_name": file.name,
        "image_encoder_folder": adapter.image_encoder,
    }


def load_ip_adapter(pipeline: Any, adapter: IPAdapter) -> None:
    """Load an IP-Adapter and its image encoder into the pipeline; safetensors only.

    Its weights become buffers that no state dict holds: no role trains them, no LoRA is put on them, and what is saved
    of the network is what a stock pipeline has before it loads the adapter itself.

    Raises:
        InputError: the pipeline takes none, or it cannot be loaded.
    """
    if not hasattr(pipeline, "load_ip_adapter"):
        raise InputError(f"teacher.ip_adapter: {type(pipeline).__name__} takes none")
    arguments = stock_arguments(adapter)
    networks = [*modules(pipeline).values()]
    before = [{name for name, _ in network.named_parameters()} for network in networks]
    # An encoder in a folder without a slash lies beside the weights, as diffusers has it.
    own = adapter.image_encoder
    folder = own if "/" in own else f"{arguments['subfolder']}/{own}"
    try:
        with all_weights_found(adapter.source):
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                adapter.source, subfolder=folder.strip("/"), use_safetensors=True
            )
        put(pipeline, "image_encoder", encoder.to(pipeline.device, pipeline.dtype).eval())
        pipeline.load_ip_adapter(**arguments | {"image_encoder_folder": None})
        pipeline.set_ip_adapter_scale(adapter.scale)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = in_a_line(error)
        raise InputError(f"teacher.ip_adapter: cannot be loaded into {type(pipeline).__name__}: {reason}") from error
    for network, known in zip(networks, before, strict=True):
        fresh = [(name, value) for name, value in network.named_parameters() if name not in known]
        for name, value in fresh:
            module, own = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            delattr(module, own)
            module.register_buffer(own, value.detach(), persistent=False)
        if fresh:
            # For whatever asks what the network's outputs depend on.
            network.register_buffer("ip_adapter_scale", torch.tensor(adapter.scale), persistent=False)
