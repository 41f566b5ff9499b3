"""Negative prompts inside the cross-attention, against NASA's equation written out."""

import dataclasses
import functools

import pytest
import torch

import stepdistill
from pipeline import tiny
from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate, noise
from stepdistill.sampling.rules.nasa import _steered, away_from
from stepdistill.sampling.rules.steps import Step, classifier_free

PROMPTS = ["a red shoe", "rain"]
NAMES = ["sd", "sdxl", "pixart-sigma", "sana", "wan"]


@functools.cache
def traced(name):
    return trace(ZOO[name].build(), ZOO[name].arguments)


@functools.cache
def conditions(name):
    return encode(traced(name), PROMPTS)


def step(name):
    found, rows = traced(name), torch.arange(2)
    cond, null = conditions(name).batch(rows)
    t = torch.full((2,), 0.5)
    x_t = noise(found.latent_shape, 0, range(2))
    return Step(0, x_t, t, torch.zeros(2), cond, null, conditions(name), rows, list, 0)


def output(name, scale=None):
    """Of the network itself, or away from a prompt."""
    found = traced(name)
    rule = classifier_free(1.0) if scale is None else away_from(found, "snow and ice", scale)
    with torch.no_grad():
        return rule(found.denoiser, step(name)).raw


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_nothing_is_the_network_itself(name):
    plain, before = output(name), traced(name).denoiser.evaluations
    torch.testing.assert_close(output(name, 0.0), plain, rtol=1e-4, atol=1e-5)
    assert (output(name, 0.5) - plain).abs().max() > 1e-3
    assert traced(name).denoiser.evaluations - before == 4  # two rows each, as ever
    torch.testing.assert_close(output(name), plain)


@torch.no_grad()
def test_an_attention_gives_the_difference_of_the_two():
    found, text = traced("sd"), conditions("sd").cond["encoder_hidden_states"]
    attention = found.denoiser.network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    hidden = torch.randn(2, 9, attention.query_dim, generator=torch.Generator().manual_seed(0))
    away = encode(found, ["snow"]).cond["encoder_hidden_states"].expand(2, -1, -1)

    def attended(tokens):
        def heads(x):
            return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        q, k, v = heads(attention.to_q(hidden)), heads(attention.to_k(tokens)), heads(attention.to_v(tokens))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    expected = attention.to_out[0](attended(text) - 0.3 * attended(away))
    result = _steered(attention, (text.shape[1], away.shape[1]), 0.3)(hidden, torch.cat([text, away], 1))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masked_tokens_of_either_prompt_are_not_seen():
    """PixArt is told which tokens are padding, in one mask."""
    found, told = traced("pixart-sigma"), step("pixart-sigma")
    rule, before = away_from(found, "snow and ice", 0.5), output("pixart-sigma", 0.5)
    text, mask = told.cond["encoder_hidden_states"], told.cond["encoder_attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    other = dataclasses.replace(told, cond={**told.cond, "encoder_hidden_states": text + (mask == 0)[..., None]})
    torch.testing.assert_close(rule(found.denoiser, other).raw, before)
    all_kept = dataclasses.replace(told, cond={**told.cond, "encoder_attention_mask": torch.ones_like(mask)})
    assert (rule(found.denoiser, all_kept).raw - before).abs().max() > 1e-3


@pytest.mark.parametrize("build", [tiny.tiny_sd3, tiny.tiny_flux])
def test_a_network_without_cross_attention_is_refused(build):
    with pytest.raises(InputError, match="negative: expected a network with cross-attention to a prompt, found"):
        away_from(trace(build()), "snow", 0.5)


def test_sampling_away_from_a_prompt(tmp_path):
    tiny.save_pipeline(tiny.tiny_sd(), tmp_path / "sd")
    tiny.save_pipeline(tiny.tiny_dit(), tmp_path / "dit")
    settings = {"steps": 1, "count": 2, "conditions": PROMPTS, "negative": "snow"}
    away = stepdistill.sample(tmp_path / "sd", **settings, negative_scale=0.5)
    assert away.nfe == 1
    index, found = torch.arange(2), traced("sd")
    rule, scheduler = away_from(found, "snow", 0.5), found.pipeline.scheduler
    common = {"steps": 1, "guidance": 1.0, "seed": 0, "rule": lambda: rule}
    both = [generate(found, scheduler, conditions("sd"), index, batch=n, **common) for n in (1, 2)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert (away.images.int() - decode(found, both[0]).int()).abs().max() <= 1
    with pytest.raises(InputError, match="guidance: expected 1 with a negative prompt, found 3"):
        stepdistill.sample(tmp_path / "sd", **settings, guidance=3.0)
    with pytest.raises(InputError, match="negative: expected a network with cross-attention to a prompt"):
        stepdistill.sample(tmp_path / "dit", **settings | {"conditions": [3]})
