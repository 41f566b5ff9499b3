"""The fused guider in a stock diffusers modular pipeline, beside diffusers' own."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

from pipeline.tiny import redraw
from stepdistill.kernels.guider import FusedGuidance


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return redraw(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=16,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        0,
    )


def denoise(unet: UNet2DConditionModel, guider: ClassifierFreeGuidance) -> torch.Tensor:
    """Three steps of SDXL's denoising block on fixed inputs."""
    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    pipe.update_components(unet=unet, scheduler=scheduler, guider=guider)
    random = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = {name: torch.randn(2, 5, 16, generator=random) for name in names}
    pooled = {name.replace("prompt", "pooled_prompt"): torch.randn(2, 8, generator=random) for name in names}
    times = {name: torch.full((2, 6), 8.0) for name in ("add_time_ids", "negative_add_time_ids")}
    latents = torch.randn(2, 4, 8, 8, generator=random)
    return pipe(
        latents=latents,
        timesteps=scheduler.timesteps,
        num_inference_steps=3,
        denoiser_input_fields=texts | pooled | times,
        output="latents",
    )


@pytest.mark.parametrize(
    "settings",
    [{"guidance_scale": 5.0}, {"guidance_scale": 4.0, "guidance_rescale": 0.7}, {"use_original_formulation": True}],
)
def test_the_fused_guider_gives_the_latents_of_the_stock_one(unet, settings):
    expected = denoise(unet, ClassifierFreeGuidance(**settings))
    torch.testing.assert_close(denoise(unet, FusedGuidance(**settings)), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, denoise(unet, ClassifierFreeGuidance(guidance_scale=1.0)), atol=1e-2)
