"""Stable Diffusion 1.5 and XL as one-file checkpoints: UNet, autoencoder and text encoders in the names of LDM."""

import re
from typing import Any

from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.exporting.original import Rules, fused, rename

_RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_OPEN_CLIP: Rules = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight", "text_projection"),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(\w+)", r".attn.in_proj#\1_\2"),
)
_UNET = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")


def checkpoint(pipeline: Any, network: nn.Module) -> dict[str, Tensor]:
    """The one-file checkpoint of a pipeline of SD 1.5 or SDXL with ``network`` as its UNet.

    Raises:
        InputError: a part of the pipeline has no place in such a file.
    """
    big = getattr(pipeline, "text_encoder_2", None) is not None
    weights = {f"model.diffusion_model.{name}": value for name, value in unet_weights(network).items()}
    weights |= {f"first_stage_model.{name}": value for name, value in vae_weights(pipeline.vae).items()}
    first = "conditioner.embedders.0.transformer." if big else "cond_stage_model.transformer."
    weights |= {f"{first}{name}": value for name, value in clip_weights(pipeline.text_encoder).items()}
    if big:
        second = fused(
            (rename(name, _OPEN_CLIP), value) for name, value in clip_weights(pipeline.text_encoder_2).items()
        )
        second["text_projection"] = second["text_projection"].T
        weights |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return weights


def clip_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder's weights; not all versions of transformers begin their names with ``text_model``."""
    return {
        name if name.startswith("text_") else f"text_model.{name}": value
        for name, value in encoder.state_dict().items()
    }


def unet_weights(network: nn.Module) -> dict[str, Tensor]:
    """A UNet's weights in LDM's names; layers of a LoRA are left out.

    Raises:
        InputError: it has others than LDM's UNet has.
    """
    rules = _unet_rules(network)
    weights = {}
    for name, value in network.state_dict().items():
        if ".lora_" in name:
            continue
        renamed = rename(name.replace(".base_layer.", "."), rules)
        if renamed.partition(".")[0] not in _UNET:
            raise InputError(f"the published layout of {type(network).__name__} has no place for {name}")
        weights[renamed] = value
    return weights


def _unet_rules(network: Any) -> Rules:
    per = network.config.layers_per_block + 1  # of the upper half, where LDM counts a block's layers through

    def place(block: str, layer: str, extra: int = 0) -> int:
        return int(block) * per + int(layer) + extra

    def upsampler(found: re.Match[str]) -> str:
        slot = 2 if hasattr(network.up_blocks[int(found[1])], "attentions") else 1
        return f"output_blocks.{place(found[1], '0', per - 1)}.{slot}.conv."

    return (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: f"input_blocks.{place(m[1], m[2], 1)}.1."),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", lambda m: f"output_blocks.{place(m[1], m[2])}.1."),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{place(m[1], '0', per)}.0.op."),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", upsampler),
        (r"^(\w+)\.(.*)resnets\.(\d+)\.(.*)", lambda m: f"{m[1]}.{m[2]}resnets.{m[3]}{rename('.' + m[4], _RESNET)}"),
        (r"^mid_block\.resnets\.(\d+)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"input_blocks.{place(m[1], m[2], 1)}.0."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"output_blocks.{place(m[1], m[2])}.0."),
    )


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """An AutoencoderKL's weights in LDM's names; its attention is made of 1x1 convolutions there."""
    last = len(vae.config.up_block_types) - 1
    rules: Rules = (
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d+)\.resnets\.", lambda m: f".up.{last - int(m[1])}.block."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{last - int(m[1])}.upsample."),
        (r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
        (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
        (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )
    weights = {rename(name, rules): value for name, value in vae.state_dict().items()}
    linear = [name for name, value in weights.items() if ".attn_1." in name and value.ndim == 2]
    return weights | {name: weights[name][:, :, None, None] for name in linear}
