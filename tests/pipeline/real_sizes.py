"""Stand-ins of real teachers with the shapes of their real latents: tiny networks, real height, width and channels.

Entry by entry what :mod:`pipeline.zoo` has for small latents, by the teacher's hub id.
"""

from typing import Any

import diffusers

from pipeline import tiny, zoo
from pipeline.tiny import redraw, tiny_vae
from pipeline.zoo import Exhibit


def _with(pipeline: Any, **parts: Any) -> Any:
    """The pipeline's class on its components and these."""
    return zoo.ready(type(pipeline)(**pipeline.components | parts))


def _unet(**options: Any) -> Any:
    """Three levels with attention on the lowest, where it is cheap; weights need nothing of the latents' size."""
    return zoo.unet(
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 8),
        attention_head_dim=1,
        **options,
    )


def sd() -> Any:
    """4x64x64 latents."""
    return _with(tiny.tiny_sd(), unet=_unet())


def sdxl() -> Any:
    """4x128x128 latents."""
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = _unet(**times, projection_class_embeddings_input_dim=40, cross_attention_dim=32)
    return _with(zoo.sdxl(), unet=unet)


def dit() -> Any:
    """4x32x32 latents."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    base = tiny.tiny_dit(prediction_type="epsilon")
    parts = {"transformer": redraw(transformer, 5), "vae": tiny_vae(levels=2)}
    return zoo.ready(diffusers.DiTPipeline(**parts, scheduler=base.scheduler, id2label=dict(enumerate(tiny.CLASSES))))


def sd3() -> Any:
    """16x128x128 latents, 4096 tokens."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=8,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
    )
    vae = tiny_vae(levels=2, latent_channels=16, shift_factor=0.1)
    return _with(tiny.tiny_sd3(), transformer=redraw(transformer, 5), vae=vae)


def flux() -> Any:
    """16x128x128 latents, packed into 4096 tokens of 64 numbers."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    vae = tiny_vae(levels=2, latent_channels=16, shift_factor=0.1)
    return _with(tiny.tiny_flux(), transformer=redraw(transformer, 8), vae=vae)


def pixart_sigma() -> Any:
    """4x128x128 latents, 4096 tokens, a learned variance beside the prediction."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=8,
        caption_channels=32,
        sample_size=128,
        use_additional_conditions=False,
    )
    return _with(zoo.pixart(sigma=True), transformer=redraw(transformer, 5))


def sana() -> Any:
    """32x32x32 latents."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        num_cross_attention_heads=1,
        cross_attention_head_dim=8,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        patch_size=1,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 32),
        decoder_block_out_channels=(8, 8, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    return _with(zoo.sana(), transformer=redraw(transformer, 5), vae=redraw(vae, 1))


_SHORT = {"max_sequence_length": 16}
_PAINT = {"complex_human_instruction": ["paint: "]}
REAL_SIZES = {
    "facebook/DiT-XL-2-256": Exhibit("4x32x32", dit),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Exhibit("4x64x64", sd, {"height": 128, "width": 128}),
    "stabilityai/stable-diffusion-xl-base-1.0": Exhibit("4x128x128", sdxl, {"height": 256, "width": 256}),
    "stabilityai/stable-diffusion-3.5-medium": Exhibit("16x128x128", sd3, _SHORT),
    "black-forest-labs/FLUX.1-dev": Exhibit("4096x64", flux, _SHORT | {"height": 256, "width": 256}),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Exhibit(
        "4x128x128", pixart_sigma, {"height": 256, "width": 256} | zoo.NO_BINS
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Exhibit(
        "32x32x32", sana, {"height": 128, "width": 128} | zoo.NO_BINS | _PAINT
    ),
}
