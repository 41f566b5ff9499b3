"""Networks under the names of the code they were published with, as one-file checkpoints hold them.

Sources of the names: the public checkpoints, and diffusers' ``from_single_file``, which reads them and is the test of
these tables: what it makes of a file is the network that was written, to the bit. A name with ``#q`` is a part of a
fused weight; parts are stacked along the outputs in the order of ``PARTS``.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from stepdistill.errors import InputError

PARTS = "qkvm"
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_FLUX: Rules = (
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"^(\w+_in)\.linear_1\.", r"\1.in_layer."),
    (r"^(\w+_in)\.linear_2\.", r"\1.out_layer."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^(single_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.linear1#\2."),
    (r"^(single_blocks\.\d+)\.proj_mlp\.", r"\1.linear1#m."),
    (r"^(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    (r"^(single_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
    (r"^(single_blocks\.\d+)\.attn\.norm_", r"\1.norm_"),
    (r"\.attn\.to_([qkv])\.", r".img_attn.qkv#\1."),
    (r"\.attn\.add_([qkv])_proj\.", r".txt_attn.qkv#\1."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.norm_added_", ".txt_attn.norm_"),
    (r"\.attn\.norm_", ".img_attn.norm_"),
    (r"\.norm_q\.weight", ".norm.query_norm.scale"),
    (r"\.norm_k\.weight", ".norm.key_norm.scale"),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
)
_SD3: Rules = (
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"\.(attn2?)\.to_([qkv])\.", r".x_block.\1.qkv#\2."),
    (r"\.attn\.add_([qkv])_proj\.", r".context_block.attn.qkv#\1."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
)
_Z_IMAGE: Rules = (
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"\.attention\.to_([qkv])\.", r".attention.qkv#\1."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
)
_WAN: Rules = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
)
TRANSFORMERS: dict[str, tuple[Rules, str]] = {
    "FluxTransformer2DModel": (
        _FLUX,
        "double_blocks single_blocks img_in txt_in time_in guidance_in vector_in final_layer",
    ),
    "SD3Transformer2DModel": (
        _SD3,
        "joint_blocks pos_embed x_embedder t_embedder y_embedder context_embedder final_layer",
    ),
    "QwenImageTransformer2DModel": ((), "transformer_blocks img_in txt_in txt_norm time_text_embed norm_out proj_out"),
    "ZImageTransformer2DModel": (
        _Z_IMAGE,
        "layers noise_refiner context_refiner final_layer x_embedder t_embedder cap_embedder cap_pad_token x_pad_token",
    ),
    "WanTransformer3DModel": (
        _WAN,
        "blocks patch_embedding time_embedding text_embedding time_projection img_emb head",
    ),
}
"""By diffusers' class: the rules, and how the names of every weight begin."""
SWAPPED = ("FluxTransformer2DModel", "SD3Transformer2DModel")
"""Their original code has shift before scale in its last norms, diffusers has scale before shift."""


def original_name(network: nn.Module, name: str) -> str:
    """What the original code calls a parameter of ``network``, with its part of a fused weight.

    Raises:
        InputError: the layout has no such parameter.
    """
    rules, tops = TRANSFORMERS[type(network).__name__]
    renamed = rename(name, rules)
    if renamed.partition(".")[0] not in tops.split():
        raise InputError(f"the published layout of {type(network).__name__} has no place for {name}")
    return renamed


def check_names(network: nn.Module) -> None:
    """Raises InputError unless the layout has a place for every weight of ``network``, LoRA layers left out."""
    for name in network.state_dict():
        if ".lora_" not in name:
            original_name(network, name.replace(".base_layer.", "."))


def original_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``network``'s ``weights`` under the original code's names, fused and in its order of shift and scale.

    Raises:
        InputError: the layout has no place for one.
    """
    swapped = set(swapped_layers(network))
    pairs = (
        (original_name(network, name), swap(value) if name.rpartition(".")[0] in swapped else value)
        for name, value in weights.items()
    )
    return fused(pairs)


def swapped_layers(network: nn.Module) -> list[str]:
    """The linear layers whose two halves of outputs the original code has the other way round."""
    if type(network).__name__ not in SWAPPED:
        return []
    return [f"{name}.linear" for name, layer in network.named_modules() if isinstance(layer, AdaLayerNormContinuous)]


def swap(weight: Tensor) -> Tensor:
    """The two halves of the outputs (2n, ...) in the other order."""
    return torch.cat(weight.chunk(2)[::-1])


def rename(name: str, rules: Rules) -> str:
    """The name after all rules, each at most once."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def part(name: str) -> tuple[str, str]:
    """(name of the fused weight, its part); the part is empty for a weight of its own."""
    found = re.search(r"#(\w)", name)
    return (name.replace(found[0], ""), found[1]) if found else (name, "")


def fused(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """(name, weight) with parts stacked along the outputs."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in pairs:
        whole, one = part(name)
        parts[whole][one] = value
    return {name: _stacked(values) for name, values in parts.items()}


def _stacked(values: Mapping[str, Tensor]) -> Tensor:
    ordered = [values[one] for one in sorted(values, key=PARTS.find)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


def lora_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA in the names of kohya's scripts: ``lora_unet_``, the original layer with underscores, and an alpha.

    A fused layer's LoRA is block diagonal, so that it is the same function: rank 3r for q, k and v of rank r.

    Args:
        network: with or without the LoRA's layers in it.
        weights: ``LAYER.lora_A.weight`` (r, in) and ``LAYER.lora_B.weight`` (out, r), at scale 1.

    Raises:
        InputError: the layout has no place for a layer.
    """
    outputs: dict[str, dict[str, int]] = defaultdict(dict)
    for name, value in network.state_dict().items():
        name = name.replace(".base_layer.", ".")
        if name.endswith(".weight") and ".lora_" not in name:
            whole, one = part(original_name(network, name))
            outputs[whole][one] = len(value)
    swapped = set(swapped_layers(network))
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            up = weights[f"{layer}.lora_B.weight"]
            whole, one = part(original_name(network, f"{layer}.weight"))
            pairs[whole][one] = (down, swap(up) if layer in swapped else up)
    result = {}
    for whole, parts in pairs.items():
        down, up = _block_diagonal(parts, outputs[whole])
        layer = "lora_unet_" + whole.removesuffix(".weight").replace(".", "_")
        result[f"{layer}.lora_down.weight"], result[f"{layer}.lora_up.weight"] = down, up
        result[f"{layer}.alpha"] = torch.tensor(float(len(down)))
    return result


def _block_diagonal(parts: Mapping[str, tuple[Tensor, Tensor]], outputs: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer made of parts, some of which may have no LoRA.

    Args:
        outputs: of each part of the layer, in any order.
    """
    if "" in parts:
        return parts[""]
    order = sorted(outputs, key=PARTS.find)
    down = torch.cat([parts[one][0] for one in order if one in parts])
    up = down.new_zeros(sum(outputs.values()), len(down))
    row = column = 0
    for one in order:
        if one in parts:
            block = parts[one][1]
            up[row : row + len(block), column : column + block.shape[1]] = block
            column += block.shape[1]
        row += outputs[one]
    return down, up
