"""CogVideoX: a table with a shifted signal-to-noise ratio, and a scheduler that takes its memory back as arguments."""

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from pipeline.tiny import redraw, t5_encoder, t5_tokenizer
from stepdistill import export, train
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.recording import forked_random
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate

SIZE = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "snr_shift_scale": 3.0}
TABLE |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)


def tiny_cogvideox(scheduler: type) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    tokenizer = t5_tokenizer()
    pipeline = CogVideoXPipeline(
        transformer=redraw(transformer, 0),
        vae=redraw(vae, 1),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=scheduler(**TABLE),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_are_those_of_the_pipeline(scheduler):
    traced = trace(tiny_cogvideox(scheduler), SIZE)
    noise = torch.randn(1, *traced.latent_shape)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "use_dynamic_cfg": False, "output_type": "latent"}
    with forked_random(torch.device("cpu")):
        generator = [torch.Generator().manual_seed(7)]
        stock = traced.pipeline("a red shoe", latents=noise, generator=generator, return_dict=False, **settings, **SIZE)
    conditioning = encode(traced, ["a red shoe"])
    drawn = {"steps": 4, "guidance": 3.0, "seed": 0, "initial": noise}
    ours = generate(traced, traced.pipeline.scheduler, conditioning, torch.zeros(1, dtype=torch.long), **drawn)
    assert ours.shape == stock[0].shape
    if scheduler is CogVideoXDDIMScheduler:
        torch.testing.assert_close(ours, stock[0], rtol=1e-3, atol=1e-4)
    else:  # it draws noise at every step, from generators of our own
        assert 0.5 < ours.std() / stock[0].std() < 2


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
def test_a_student_keeps_the_shifted_table(sampler, tmp_path):
    pipeline = tiny_cogvideox(CogVideoXDPMScheduler)
    pipeline.save_pretrained(tmp_path / "teacher")
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "arguments": SIZE, "guidance": {"scale": 3.0}},
        "student": {"steps": 2},
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": {"name": "dmd2", "sampler": sampler},
        "train": {"steps": 1, "batch_size": 1, "lr": 1e-5, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(tmp_path / "run"),
    }
    train(recipe)
    result = export(tmp_path / "run", tmp_path / "again")
    assert result.max_error <= 1e-5
    student = CogVideoXPipeline.from_pretrained(result.folder)
    table = pipeline.scheduler.alphas_cumprod
    torch.testing.assert_close(student.scheduler.alphas_cumprod[:-1], table[:-1].float(), rtol=1e-4, atol=1e-7)
