"""Tiny pipelines as checkpoint files: the names of tensors that the original code of Stable Diffusion has."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from pipeline.tiny import clip_encoder, clip_tokenizer, redraw, tiny_vae

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_names(unet: Any) -> dict[str, Tensor]:
    """A UNet's weights under the names of the original code."""
    layers, held = unet.config.layers_per_block, {}
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    for name, value in unet.state_dict().items():
        stem, _, end = name.rpartition(".")
        if stem in _TOP:
            held[f"{_TOP[stem]}.{end}"] = value
            continue
        place, kind, rest = re.fullmatch(
            r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(\w+\.\d+)\.(.+)", name
        ).groups()
        part, number = kind.split(".")[0], int(kind.split(".")[1])
        inner = {"resnets": 0, "attentions": 1}.get(part)
        for ours, theirs in _RESNET.items() if part == "resnets" else ():
            rest = rest.replace(f"{ours}.", f"{theirs}.") if rest.startswith(f"{ours}.") else rest
        block = int(place.rpartition(".")[2]) if place != "mid_block" else 0
        if place == "mid_block":
            held[f"middle_block.{1 if part == 'attentions' else 2 * number}.{rest}"] = value
        elif place.startswith("down"):
            if part == "downsamplers":
                held[f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{end}"] = value
            else:
                held[f"input_blocks.{1 + block * (layers + 1) + number}.{inner}.{rest}"] = value
        elif part == "upsamplers":
            held[f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.conv.{end}"] = value
        else:
            held[f"output_blocks.{block * (layers + 1) + number}.{inner}.{rest}"] = value
    return {f"model.diffusion_model.{name}": value for name, value in held.items()}


def vae_names(vae: Any) -> dict[str, Tensor]:
    """An autoencoder's weights under the names of the original code; without attention."""
    levels, held = len(vae.config.block_out_channels), {}
    for name, value in vae.state_dict().items():
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d)", name)
        if up:
            level = levels - 1 - int(up[1])
            name = re.sub(r"up_blocks\.\d\.resnets\.", f"up.{level}.block.", name)
            name = re.sub(r"up_blocks\.\d\.upsamplers\.0", f"up.{level}.upsample", name)
        held[name] = value
    return held


def save_sd(pipeline: Any, file: Path, without: str = "-") -> Path:
    """A Stable Diffusion 1 checkpoint file of the pipeline; ``without`` are first letters of names to leave out."""
    held = unet_names(pipeline.unet) | {f"first_stage_model.{k}": v for k, v in vae_names(pipeline.vae).items()}
    for name, value in pipeline.text_encoder.state_dict().items():
        held[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return save(held, file, without)


def save(held: dict[str, Tensor], file: Path, without: str = "-") -> Path:
    """Write tensors as a file of safetensors."""
    kept = {name: value.contiguous().clone() for name, value in held.items() if not name.startswith(without)}
    save_file(kept, file)
    return file


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """SDXL in small: two CLIP encoders, sizes and a pooled prompt beside the time."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
        cross_attention_dim=40,
    )
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        unet=redraw(unet, 4),
        vae=tiny_vae(levels=2, sample_size=16),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=clip_encoder(tokenizer, projected=True, seed=9, hidden_size=24),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def save_sdxl(pipeline: Any, file: Path) -> Path:
    """An SDXL checkpoint file of the pipeline."""
    held = unet_names(pipeline.unet) | {f"first_stage_model.{k}": v for k, v in vae_names(pipeline.vae).items()}
    for name, value in pipeline.text_encoder.state_dict().items():
        held[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    held |= open_clip_names(pipeline.text_encoder_2)
    return save(held, file)


def open_clip_names(encoder: Any) -> dict[str, Tensor]:
    """The second encoder's weights under OpenCLIP's names."""
    held, layers = {}, "text_model.encoder.layers."
    state = {name: value for name, value in encoder.state_dict().items() if not name.endswith("position_ids")}
    table = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner["self_attn.out_proj"] = "attn.out_proj"
    for name, value in state.items():
        if name in table:
            held[table[name]] = value.T if name == "text_projection.weight" else value
            continue
        number, _, rest = name.removeprefix(layers).partition(".")
        stem, _, end = rest.rpartition(".")
        if stem in inner:
            held[f"transformer.resblocks.{number}.{inner[stem]}.{end}"] = value
        elif stem == "self_attn.q_proj":
            parts = [state[f"{layers}{number}.self_attn.{one}_proj.{end}"] for one in "qkv"]
            held[f"transformer.resblocks.{number}.attn.in_proj_{end}"] = torch.cat(parts)
    return {f"conditioner.embedders.1.model.{name}": value for name, value in held.items()}
