"""Self-attention guidance against its definition written out."""

import math

import pytest
import torch
from guidance_bed import ROWS, STEPS, W, by_hand, conditions, run, traced, two

from pipeline import tiny
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate, noise
from stepdistill.sampling.rules.sag import attention_weights, gaussian_blur, self_attention


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@torch.no_grad()
def test_the_prediction_moves_away_from_the_one_where_the_attended_is_blurred():
    denoiser = traced().denoiser
    attention = denoiser.network.transformer_blocks[1].attn1  # the middle one of three
    _, null = conditions().batch(ROWS)
    masked = []

    def predict(_, x, t):
        inputs = []
        handle = attention.register_forward_hook(lambda _, given, kw, out: inputs.append(given[0]), with_kwargs=True)
        cond, uncond = two(x, t)
        handle.remove()
        hidden = inputs[1]
        q, k = heads(attention.to_q(hidden), attention.heads), heads(attention.to_k(hidden), attention.heads)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mask = (weights.mean(1).sum(1) > 1).reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        masked.append(mask.float().mean())
        degraded = mask * gaussian_blur(uncond.x0) + ~mask * uncond.x0
        alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in denoiser.schedule.coefficients(t))
        worse = denoiser(alpha * degraded + sigma * uncond.eps, t, null)
        eps = uncond.eps + W * (cond.eps - uncond.eps) + 0.6 * (uncond.eps - worse.eps)
        return (x - sigma * eps) / alpha, eps

    found, passes = run(lambda: self_attention(W, 0.6))
    assert passes == 3 * STEPS
    torch.testing.assert_close(found, by_hand(predict), rtol=1e-3, atol=1e-3)
    assert all(0 < share < 1 for share in masked)
    assert run(lambda: self_attention(1.0, 0.6))[1] == 2 * STEPS
    torch.testing.assert_close(run("sag:0")[0], run("cfg")[0], rtol=1e-3, atol=1e-3)


def test_the_blur_is_a_normal_weighted_mean():
    x = torch.zeros(1, 2, 11, 11)
    x[0, 1, 5, 5] = 1
    weights = torch.exp(-0.5 * torch.arange(-4.0, 5.0) ** 2)
    weights = weights / weights.sum()
    blurred = gaussian_blur(x)
    torch.testing.assert_close(blurred[0, 1, 1:10, 1:10], weights[:, None] * weights)
    assert blurred[0, 0].abs().max() == 0
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@torch.no_grad()
def test_a_unet_is_read_in_its_middle():
    found = trace(tiny.tiny_sd())
    told = encode(found, ["a red shoe", "rain"])
    block = found.denoiser.network.mid_block.attentions[0].transformer_blocks[0].attn1
    shapes = []
    block.to_q.register_forward_hook(lambda _, given, out: shapes.append(out))
    cond, _ = told.batch(torch.arange(2))
    with attention_weights(found.denoiser.network) as seen:
        found.denoiser(noise(found.latent_shape, 0, range(2)), torch.full((2,), 0.5), cond)
    assert torch.equal(seen["q"], shapes[0]) and seen["heads"] == block.heads
    settings = {"steps": 2, "guidance": 1.0, "seed": 0, "rule": lambda: self_attention(W)}
    latents = generate(found, found.pipeline.scheduler, told, torch.arange(2), **settings)
    assert torch.isfinite(latents).all()


def test_a_network_whose_attention_is_joint_is_refused():
    network = tiny.tiny_sd3().transformer
    with (
        pytest.raises(InputError, match="sag reads the self-attention of an image, and SD3"),
        attention_weights(network),
    ):
        pass
