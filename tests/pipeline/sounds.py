"""Stable Audio in small, whose samples are sounds."""

from typing import Any

import diffusers

from pipeline.tiny import redraw, t5_encoder, t5_tokenizer
from pipeline.zoo import ready

RATE, LENGTH = 400, 160
"""Samples a second, and how many a sound has."""
TITLED = {"audio_end_in_s": LENGTH / RATE}


def stable_audio() -> Any:
    """Two channels; 8 latents of 20 samples each."""
    tokenizer = t5_tokenizer()
    encoder = t5_encoder(tokenizer)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=LENGTH // 20,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[4, 5],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=RATE,
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(  # the published one needs torchsde
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=encoder.config.d_model, conditioning_dim=4, min_value=0, max_value=32
    )
    return ready(
        diffusers.StableAudioPipeline(
            vae=redraw(vae, 1),
            text_encoder=encoder,
            projection_model=redraw(projection, 2),
            tokenizer=tokenizer,
            transformer=redraw(transformer, 5),
            scheduler=scheduler,
        )
    )
