"""Builders of tiny pipelines with random weights: a class DiT like the embedded teacher, SD, SD3 and Flux.

Weights are redrawn as small normals: stock initialisation zeroes the output layers, and a network that
emits zeros passes every comparison.
"""

import math
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from stepdistill.pipeline.folder import save_pipeline

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

TOKENS = 40


# What `stepdistill inspect --json` promises (docs/contracts.md).
INSPECT_KEYS = {
    "pipeline",
    "denoiser",
    "parameters",
    "schedule",
    "prediction",
    "timestep",
    "output",
    "guidance",
    "conditioning",
    "latent_shape",
    "self_test_error",
}


def redraw(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight a normal of deviation 1/sqrt(fan in), norms near one, biases small; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(fresh / math.sqrt(parameter[0].numel()))
            elif parameter.mean() == 1:
                parameter.copy_(1 + 0.1 * fresh)
            else:
                parameter.copy_(0.1 * fresh)
    return module.eval()


def tiny_vae(channels: int = 3, levels: int = 3, latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **options,
    )
    return redraw(vae, 1)


def _ready(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_dit(**scheduler: Any) -> DiTPipeline:
    """The embedded teacher in small: 4x8x8 latents of 1x32x32 images, 10 of 1000 classes, v prediction."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False} | scheduler
    return _ready(
        DiTPipeline(
            transformer=redraw(transformer, 0),
            vae=tiny_vae(1, sample_size=32, scaling_factor=1.0),
            scheduler=DDIMScheduler(**options),
            id2label=dict(enumerate(CLASSES)),
        )
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, no files and no network."""
    symbols = [s for letter in string.ascii_lowercase for s in (letter, f"{letter}</w>")]
    vocab = {token: i for i, token in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    """Letters as tokens, with the end token that T5 appends."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, projected: bool = False, seed: int = 2, hidden_size: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return redraw((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return redraw(T5EncoderModel(config), 3)


def tiny_sd(scheduler: Any = None) -> StableDiffusionPipeline:
    """SD in small: UNet on 4x8x8 latents, CLIP, DDIM on the scaled-linear schedule, epsilon."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    stock = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokenizer = clip_tokenizer()
    return _ready(
        StableDiffusionPipeline(
            unet=redraw(unet, 4),
            vae=tiny_vae(levels=2, sample_size=16),
            text_encoder=clip_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=scheduler or stock,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    """SD3 in small: flow matching, two pooled CLIP encoders and T5."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return _ready(
        StableDiffusion3Pipeline(
            transformer=redraw(transformer, 5),
            vae=tiny_vae(levels=2, sample_size=16, shift_factor=0.1),
            text_encoder=clip_encoder(clip, projected=True, seed=6),
            text_encoder_2=clip_encoder(clip, projected=True, seed=7),
            text_encoder_3=t5_encoder(t5),
            tokenizer=clip,
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=t5,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """Flux in small: packed latents (16 tokens), dynamic shifting, guidance as an input."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipeline = FluxPipeline(
        transformer=redraw(transformer, 8),
        vae=tiny_vae(levels=2, sample_size=16, shift_factor=0.1),
        text_encoder=clip_encoder(clip),
        text_encoder_2=t5_encoder(t5),
        tokenizer=clip,
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    # The pipeline's class fixes 128 latents a side; the tiny network is meant for 8.
    pipeline.default_sample_size = 8
    return _ready(pipeline)


def save_dit(pipeline: DiTPipeline, folder: Path) -> None:
    """A folder like the embedded teacher's."""
    save_pipeline(pipeline, folder)
