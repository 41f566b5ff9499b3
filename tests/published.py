"""Facts of published pipelines: scheduler and network configs, and the latents' shape at the native size.

Data alone, so that grids, plans and audits are tested at the numbers of real models without any download. Read from the
configs beside the weights (or public copies of them), October 2026; keys that are left out have diffusers' defaults.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published pipeline.

    Args:
        hub: its id.
        pipeline: class name.
        scheduler: class name.
        scheduler_config: its arguments.
        component: the pipeline's attribute that denoises.
        network: its class name.
        network_config: its arguments.
        latent_shape: one sample as the scheduler sees it, without batch, at the native size.
        sigmas: whether the pipeline's call hands the scheduler sigmas of its own, 1 .. 1/n.
        mu: the dynamic shift that the pipeline computes at the native size; None where its scheduler takes none.
    """

    hub: str
    pipeline: str
    scheduler: str
    scheduler_config: dict[str, Any]
    component: str
    network: str
    network_config: dict[str, Any]
    latent_shape: tuple[int, ...]
    sigmas: bool = False
    mu: float | None = None


LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
# Stable Diffusion's networks leave the rest to the class's defaults, which are SD 1.5's.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21_UNET = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
DIT_BLOCKS = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "patch_size": 2}

MODELS: dict[str, Published] = {
    "sd15": Published(
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline="StableDiffusionPipeline",
        scheduler="PNDMScheduler",
        scheduler_config=LATENT_BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True},
        component="unet",
        network="UNet2DConditionModel",
        network_config=SD15_UNET,
        latent_shape=(4, 64, 64),
    ),
    "sd21-v": Published(
        hub="stabilityai/stable-diffusion-2-1",
        pipeline="StableDiffusionPipeline",
        scheduler="DDIMScheduler",
        scheduler_config=LATENT_BETAS
        | {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"},
        component="unet",
        network="UNet2DConditionModel",
        network_config=SD21_UNET,
        latent_shape=(4, 96, 96),
    ),
    "sdxl": Published(
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        scheduler="EulerDiscreteScheduler",
        scheduler_config=LATENT_BETAS | {"timestep_spacing": "leading", "interpolation_type": "linear"},
        component="unet",
        network="UNet2DConditionModel",
        network_config=SDXL_UNET,
        latent_shape=(4, 128, 128),
    ),
    "sd35-medium": Published(
        hub="stabilityai/stable-diffusion-3.5-medium",
        pipeline="StableDiffusion3Pipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"num_train_timesteps": 1000, "shift": 3.0},
        component="transformer",
        network="SD3Transformer2DModel",
        network_config=SD3_TRANSFORMER
        | {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
        },
        latent_shape=(16, 128, 128),
    ),
    "sd35-large": Published(
        hub="stabilityai/stable-diffusion-3.5-large",
        pipeline="StableDiffusion3Pipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"num_train_timesteps": 1000, "shift": 3.0},
        component="transformer",
        network="SD3Transformer2DModel",
        network_config=SD3_TRANSFORMER
        | {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "dual_attention_layers": [],
        },
        latent_shape=(16, 128, 128),
    ),
    "flux-dev": Published(
        hub="black-forest-labs/FLUX.1-dev",
        pipeline="FluxPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        component="transformer",
        network="FluxTransformer2DModel",
        network_config={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        latent_shape=(4096, 64),
        sigmas=True,
        mu=1.15,
    ),
    "pixart-sigma": Published(
        hub="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        pipeline="PixArtSigmaPipeline",
        scheduler="DPMSolverMultistepScheduler",
        scheduler_config=LINEAR_BETAS | {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        component="transformer",
        network="PixArtTransformer2DModel",
        network_config=DIT_BLOCKS
        | {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        latent_shape=(4, 128, 128),
    ),
    "sana-1600m": Published(
        hub="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        pipeline="SanaPipeline",
        scheduler="DPMSolverMultistepScheduler",
        scheduler_config=LINEAR_BETAS
        | {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
        component="transformer",
        network="SanaTransformer2DModel",
        network_config={
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
        latent_shape=(32, 32, 32),
    ),
    "dit-xl-256": Published(
        hub="facebook/DiT-XL-2-256",
        pipeline="DiTPipeline",
        scheduler="DDIMScheduler",
        scheduler_config=LINEAR_BETAS | {"clip_sample": False, "set_alpha_to_one": True},
        component="transformer",
        network="DiTTransformer2DModel",
        network_config=DIT_BLOCKS | {"sample_size": 32, "in_channels": 4, "out_channels": 8},
        latent_shape=(4, 32, 32),
    ),
    "wan21-1.3b": Published(
        hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        pipeline="WanPipeline",
        scheduler="UniPCMultistepScheduler",
        scheduler_config={
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "solver_order": 2,
            "solver_type": "bh2",
        },
        component="transformer",
        network="WanTransformer3DModel",
        network_config={
            "patch_size": [1, 2, 2],
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 30,
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "ffn_dim": 8960,
            "freq_dim": 256,
            "text_dim": 4096,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        },
        latent_shape=(16, 21, 60, 104),  # 81 frames of 480 x 832
    ),
    "qwen-image": Published(
        hub="Qwen/Qwen-Image",
        pipeline="QwenImagePipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "time_shift_type": "exponential",
        },
        component="transformer",
        network="QwenImageTransformer2DModel",
        network_config={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
        },
        latent_shape=(4096, 64),
        sigmas=True,
        mu=0.5 + 0.4 * (4096 - 256) / (8192 - 256),
    ),
    "z-image": Published(
        hub="Tongyi-MAI/Z-Image",
        pipeline="ZImagePipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False},
        component="transformer",
        network="ZImageTransformer2DModel",
        network_config={
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "qk_norm": True,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        latent_shape=(16, 128, 128),
        sigmas=True,
    ),
    "auraflow": Published(
        hub="fal/AuraFlow-v0.3",
        pipeline="AuraFlowPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"num_train_timesteps": 1000, "shift": 1.73},
        component="transformer",
        network="AuraFlowTransformer2DModel",
        network_config={
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 4,
            "num_single_dit_layers": 32,
            "num_attention_heads": 12,
            "attention_head_dim": 256,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 3072,
            "pos_embed_max_size": 9216,
        },
        latent_shape=(4, 128, 128),  # 1024 pixels, which its call is given; its own default is 512
    ),
    "lumina2": Published(
        hub="Alpha-VLLM/Lumina-Image-2.0",
        pipeline="Lumina2Pipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False},
        component="transformer",
        network="Lumina2Transformer2DModel",
        network_config={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "cap_feat_dim": 2304,
            "axes_dim_rope": [32, 32, 32],
            "axes_lens": [300, 512, 512],
        },
        latent_shape=(16, 128, 128),
        sigmas=True,
    ),
}
