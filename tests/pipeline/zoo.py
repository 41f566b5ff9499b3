"""Tiny random pipelines of many families, built offline: one entry of ZOO for each row of docs/pipelines.md.

Every pipeline is complete (tokenizers and text encoders included), so that its own ``encode_prompt`` runs. Weights are
redrawn, see :mod:`pipeline.tiny`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from pipeline import tiny
from pipeline.tiny import clip_encoder, clip_tokenizer, redraw, t5_encoder, t5_tokenizer, tiny_vae


@dataclass(frozen=True)
class Exhibit:
    """A pipeline to be traced and distilled.

    Args:
        title: its row in the documentation. build: makes the pipeline.
        arguments: what its call needs to stay small. guidance: the recipe's scale.
        only_renoise: its call tells the scheduler what only LCM's understands.
    """

    title: str
    build: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    guidance: float = 2.0
    only_renoise: bool = False


SMALL = {"height": 16, "width": 16}


def ready(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unet(**options: Any) -> Any:
    """A conditional UNet of two levels on 4x8x8 latents."""
    settings = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    return redraw(diffusers.UNet2DConditionModel(**settings | options), 4)


def sd_v() -> Any:
    """SD 2.x: v prediction, zero terminal SNR."""
    return tiny.tiny_sd(
        diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )
    )


def sdxl() -> Any:
    tokenizer = clip_tokenizer()
    return ready(
        diffusers.StableDiffusionXLPipeline(
            vae=tiny_vae(levels=2, sample_size=16),
            text_encoder=clip_encoder(tokenizer),
            text_encoder_2=clip_encoder(tokenizer, projected=True, seed=6),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            unet=unet(
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=40,
                cross_attention_dim=32,
                use_linear_projection=True,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    )


def lcm() -> Any:
    tokenizer = clip_tokenizer()
    return ready(
        diffusers.LatentConsistencyModelPipeline(
            vae=tiny_vae(levels=2, sample_size=16),
            text_encoder=clip_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet(time_cond_proj_dim=8),
            scheduler=diffusers.LCMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def ddpm() -> Any:
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return ready(diffusers.DDPMPipeline(unet=redraw(network, 4), scheduler=diffusers.DDPMScheduler(clip_sample=False)))


def pixart(sigma: bool) -> Any:
    """Sigma, or Alpha of 1024 px, whose network embeds height, width and aspect beside the time."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        # Alpha gives a third of the width to each of height, width and aspect.
        attention_head_dim=8 if sigma else 12,
        num_layers=1,
        cross_attention_dim=16 if sigma else 24,
        caption_channels=32,
        # By this size its pipeline knows whether the network takes them.
        sample_size=8 if sigma else 128,
        use_additional_conditions=not sigma,
    )
    tokenizer = t5_tokenizer()
    pipeline = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    return ready(
        pipeline(
            tokenizer=tokenizer,
            text_encoder=t5_encoder(tokenizer),
            vae=tiny_vae(levels=2, sample_size=16),
            transformer=redraw(transformer, 5),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )


def gemma(tokenizer: T5TokenizerFast) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return redraw(Gemma2Model(config), 3)


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=gemma(tokenizer),
            vae=redraw(vae, 1),
            transformer=redraw(transformer, 5),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def umt5(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return redraw(UMT5EncoderModel(config), 3)


def auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=umt5(tokenizer),
            vae=tiny_vae(levels=2, sample_size=16),
            transformer=redraw(transformer, 5),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.Lumina2Pipeline(
            transformer=redraw(transformer, 5),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(levels=4, sample_size=64, shift_factor=0.1),
            text_encoder=gemma(tokenizer),
            tokenizer=tokenizer,
        )
    )


def video_statistics(channels: int = 4) -> dict[str, Any]:
    return {"z_dim": channels, "latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **video_statistics()
    )
    tokenizer = t5_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return ready(
        diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=redraw(vae, 1),
            text_encoder=redraw(Qwen2_5_VLForConditionalGeneration(config), 3),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
        )
    )


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}user {{ message['content'] }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return ready(
        diffusers.ZImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(levels=2, sample_size=16, shift_factor=0.1),
            text_encoder=redraw(Qwen3Model(config), 3),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
        )
    )


def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=8,
    )
    tokenizer = t5_tokenizer()
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return ready(
        diffusers.HunyuanDiTPipeline(
            vae=tiny_vae(levels=4, sample_size=64),
            text_encoder=redraw(BertModel(bert), 2),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
            scheduler=diffusers.DDPMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction"
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5_encoder(tokenizer),
            tokenizer_2=t5_tokenizer(),
        )
    )


def wan(boundary_ratio: float | None = None) -> Any:
    """Wan 2.1; with ``boundary_ratio`` a second denoiser for the low noise, as Wan 2.2 has."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **video_statistics(),
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.WanPipeline(
            tokenizer=tokenizer,
            text_encoder=umt5(tokenizer),
            vae=redraw(vae, 1),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=redraw(transformer, 5),
            transformer_2=redraw(copy.deepcopy(transformer), 6) if boundary_ratio else None,
            boundary_ratio=boundary_ratio,
        )
    )


def wan_from_a_frame() -> Any:
    """Wan 2.2 5B, image to video: the first frame is kept in the network's input, at time 0 among times per token."""
    parts = wan().components | {"image_encoder": None, "image_processor": None}
    return ready(diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True))


def ltx_from_a_frame() -> Any:
    """LTX, image to video: packed for the network, and unpacked for the scheduler without the first frame's tokens."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.LTXImageToVideoPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=redraw(vae, 1),
            text_encoder=t5_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
        )
    )


def ltx_with_conditions() -> Any:
    """LTX Condition: its scheduler steps all tokens, by minus the prediction, and is told the time of each."""
    return ready(diffusers.LTXConditionPipeline(**ltx_from_a_frame().components))


def vace() -> Any:
    """Wan with a control video (none: an empty one); its call takes one prompt."""
    base = wan()
    config = {name: value for name, value in base.transformer.config.items() if name[0] != "_"}
    # The latents of what changes and of what stays, and a mask of 8 x 8 pixels for each of theirs.
    transformer = diffusers.WanVACETransformer3DModel(**config, vace_layers=[0], vace_in_channels=2 * 4 + 64)
    parts = base.components | {"transformer": redraw(transformer, 5)}
    return ready(diffusers.WanVACEPipeline(**parts))


def motif() -> Any:
    """Its guidance is a component, APG by default."""
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 2, 2),
    )
    tokenizer = t5_tokenizer()
    return ready(
        diffusers.MotifVideoPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=wan().vae,
            text_encoder=t5_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
            guider=diffusers.AdaptiveProjectedGuidance(),
            feature_extractor=None,
        )
    )


def inpainting() -> Any:
    """SD's UNet with five more channels: the mask and the masked image's latents."""
    base = tiny.tiny_sd()
    parts = base.components | {"unet": unet(in_channels=9), "image_encoder": None}
    return ready(diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def pix2pix() -> Any:
    """SD that edits a picture, with two unconditional passes: without the text, and without text and picture."""
    parts = tiny.tiny_sd().components | {"unet": unet(in_channels=8)}
    return ready(diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def controlnet() -> Any:
    """SD and a ControlNet of its UNet's shape, with residuals that are not zero."""
    base = tiny.tiny_sd()
    control = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    parts = base.components | {"controlnet": redraw(control, 11), "image_encoder": None}
    return ready(diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))


def controlnets() -> Any:
    """The same with two ControlNets, each with a picture of its own."""
    base = controlnet()
    second = redraw(diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)), 12)
    parts = base.components | {"controlnet": [base.controlnet, second]}
    return ready(diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))


def ip_adapter(unet: Any, folder: Path) -> dict[str, Any]:
    """An IP-Adapter for a UNet of cross-attention width 16, on disk with its picture encoder; the recipe's section."""
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    redraw(CLIPVisionModelWithProjection(config), 12).save_pretrained(folder / "models" / "image_encoder")
    shapes = {"proj.weight": (4 * 16, 6), "proj.bias": (64,), "norm.weight": (16,), "norm.bias": (16,)}
    weights = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    crossed = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for number, attention in enumerate(crossed):
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * number + 1}.{part}.weight"] = (attention.inner_dim, 16)
    generator = torch.Generator().manual_seed(13)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    save_file(drawn, folder / "models" / "ip.safetensors")
    return {"source": str(folder), "weights": "models/ip.safetensors"}


NO_BINS = {"use_resolution_binning": False}
SMALLER = {"height": 32, "width": 32}
ZOO = {
    "sd": Exhibit("Stable Diffusion, epsilon", tiny.tiny_sd),
    "sd-v": Exhibit("Stable Diffusion, v", sd_v),
    "sdxl": Exhibit("Stable Diffusion XL", sdxl),
    "sd3": Exhibit("Stable Diffusion 3", tiny.tiny_sd3, {"max_sequence_length": 16}),
    "flux": Exhibit("Flux", tiny.tiny_flux, SMALL | {"max_sequence_length": 16}, 1.0),
    "pixart-alpha": Exhibit("PixArt-Alpha", lambda: pixart(sigma=False), SMALL | NO_BINS),
    "pixart-sigma": Exhibit("PixArt-Sigma", lambda: pixart(sigma=True), SMALL | NO_BINS),
    "sana": Exhibit("Sana", sana, SMALLER | NO_BINS | {"complex_human_instruction": ["paint: "]}),
    "dit": Exhibit("DiT", tiny.tiny_dit),
    "ddpm": Exhibit("DDPM, unconditional", ddpm, guidance=1.0),
    "lcm": Exhibit("Latent Consistency Model", lcm, guidance=1.0, only_renoise=True),
    "auraflow": Exhibit("AuraFlow", auraflow, SMALL),
    "lumina2": Exhibit("Lumina 2", lumina2, SMALLER | {"system_prompt": "draw"}),
    "qwen-image": Exhibit("QwenImage", qwen_image, SMALL),
    "z-image": Exhibit("Z-Image", z_image, SMALL | {"max_sequence_length": 48}),
    "hunyuan-dit": Exhibit("HunyuanDiT", hunyuan_dit, SMALLER | NO_BINS),
    "wan": Exhibit("Wan, text to video", wan, SMALLER | {"num_frames": 5, "max_sequence_length": 16}),
}
