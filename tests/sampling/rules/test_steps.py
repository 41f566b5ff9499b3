"""Guidance rules at inference: each against its definition written out, and no sample knows its batch."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from guidance_bed import ROWS, STEPS, N, W, by_hand, conditions, run, traced, two
from typer.testing import CliRunner

import stepdistill
from pipeline import tiny
from pipeline.zoo import ZOO
from stepdistill.cli import app
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate, noise, sample_generator
from stepdistill.sampling.rules.names import NAMES, PROMPTS, RULES, condition_pool, rule_for, rule_named
from stepdistill.sampling.rules.steps import Adaptive, equal_blocks, limited, without


# What this network predicts of the picture with and without a condition is less alike than 0.99.
@pytest.mark.parametrize("rule", ["adaptive:0.95" if name == "adaptive" else name for name in NAMES])
def test_a_sample_does_not_depend_on_its_batch(rule):
    whole, passes = run(rule)
    parts, same = run(rule, batch=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert passes == same and torch.isfinite(whole).all()
    if rule != "cfg":
        assert (whole - run("cfg")[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_keeps_the_noise_of_the_unguided_prediction(scale):
    def predict(_, x, t):
        cond, uncond = two(x, t)
        return uncond.x0 + scale * (cond.x0 - uncond.x0), uncond.eps

    found, _ = run(lambda: RULES["cfg++"](scale))
    torch.testing.assert_close(found, by_hand(predict), rtol=1e-4, atol=1e-4)


def test_a_limited_interval_saves_the_passes_outside_it():
    whole, _ = run(lambda: limited(rule_named("cfg", W)(), 0, 1))
    torch.testing.assert_close(whole, run("cfg")[0])
    low, high = traced().denoiser.schedule.time(torch.tensor([499, 749])).tolist()

    def predict(number, x, t):
        with torch.no_grad():
            cond, uncond = two(x, t)
        w = W if number in (1, 2) else 1.0
        return uncond.x0 + w * (cond.x0 - uncond.x0), uncond.eps + w * (cond.eps - uncond.eps)

    # Both ends are inside.
    middle, passes = run(lambda: limited(rule_named("cfg", W)(), low, high))
    assert passes == STEPS + 2
    torch.testing.assert_close(middle, by_hand(predict), rtol=1e-4, atol=1e-4)
    assert run(lambda: limited(rule_named("s2", W)(), 0.4, 0.8))[1] == STEPS + 2 * 2


def test_adaptive_guidance_stops_where_the_predictions_agree():
    always, full = run(lambda: Adaptive(W, threshold=1.01))
    torch.testing.assert_close(always, run("cfg")[0])
    assert full == 2 * STEPS
    once, least = run("adaptive:-1.01")
    assert least == STEPS + 1

    def predict(number, x, t):
        with torch.no_grad():
            cond, uncond = two(x, t)
        w = W if number == 0 else 1.0
        return uncond.x0 + w * (cond.x0 - uncond.x0), uncond.eps + w * (cond.eps - uncond.eps)

    torch.testing.assert_close(once, by_hand(predict), rtol=1e-4, atol=1e-4)
    middle = Adaptive(W, 0.95)
    rows = []

    def watched(denoiser, step):
        result = middle(denoiser, step)
        rows.append(len(middle.open))
        return result

    run(lambda: watched)
    assert rows == sorted(rows, reverse=True) and 0 < rows[0] < N


@torch.no_grad()
def test_independent_conditions_are_any_class_of_the_pipeline_and_new_at_every_step():
    """Not of the call, and the sample's own as often as another: uniform, whatever the own one is."""
    cond, _ = conditions().batch(ROWS)
    classes = encode(traced(), range(10), None)
    drawn = []

    def predict(number, x, t):
        one = [torch.randint(10, (1,), generator=sample_generator(1, i, 2 + number)) for i in range(N)]
        drawn.append(torch.cat(one))
        result = guided(traced().denoiser, x, t, cond, classes.batch(drawn[-1])[0], W)
        return result.x0, result.eps

    expected = by_hand(predict)
    found, passes = run("icg")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert passes == 2 * STEPS
    assert len({tuple(one.tolist()) for one in drawn}) == STEPS
    assert {int(one) for one in torch.cat(drawn)} - {0, 3, 7}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart-alpha", "lumina2"])
def test_one_prompt_is_guided_away_from_shipped_ones(name):
    """Of one prompt or two: never from the other one alone. Prompts that are padded to other lengths are no trouble."""
    found = trace(ZOO[name].build(), ZOO[name].arguments)
    alone = encode(found, ["a red shoe"])
    pool = condition_pool(found, alone)
    assert len(pool) == PROMPTS and "a red shoe" not in pool.labels
    settings = {"steps": 2, "guidance": W, "seed": 0}
    make = rule_for(found, alone, "icg", **settings)
    index = torch.zeros(3, dtype=torch.long)
    latents = generate(found, found.pipeline.scheduler, alone, index, **settings, rule=make)
    assert torch.isfinite(latents).all()
    plain = generate(found, found.pipeline.scheduler, alone, index, **settings | {"guidance": 1.0})
    assert (latents - plain).abs().flatten(1).amax(1).min() > 1e-6


def test_many_prompts_are_a_pool_of_their_own():
    found = trace(tiny.tiny_sd())
    encoded = encode(found, [f"prompt {number}" for number in range(PROMPTS)])
    assert condition_pool(found, encoded) is encoded
    twice = encode(found, ["rain"] * PROMPTS)
    assert set(condition_pool(found, twice).labels).isdisjoint({"rain"})
    without = trace(ZOO["ddpm"].build())
    with pytest.raises(InputError, match="icg needs prompts or a second class, found DDPMPipeline without"):
        condition_pool(without, encode(without, [0]))


def test_time_step_guidance_is_none_without_an_error_in_time():
    cond_only = run(lambda: RULES["cfg"](1.0))[0]
    torch.testing.assert_close(run("tsg:0")[0], cond_only, rtol=1e-4, atol=1e-5)
    assert run("tsg")[1] == 2 * STEPS


@torch.no_grad()
def test_dropped_blocks_let_their_hidden_states_through():
    found = traced()
    blocks = equal_blocks(found.denoiser.network)
    x, t = noise(found.latent_shape, 0, range(N)), torch.full((N,), 0.5)
    cond, _ = conditions().batch(ROWS)
    before = found.denoiser(x, t, cond).raw
    kept = list(found.denoiser.network.transformer_blocks)
    with without([blocks[1]]):
        less = found.denoiser(x, t, cond).raw
    found.denoiser.network.transformer_blocks = torch.nn.ModuleList([kept[0], kept[2]])
    shorter = found.denoiser(x, t, cond).raw
    found.denoiser.network.transformer_blocks = torch.nn.ModuleList(kept)
    torch.testing.assert_close(less, shorter)
    torch.testing.assert_close(found.denoiser(x, t, cond).raw, before)
    torch.testing.assert_close(run("s2:0")[0], run("cfg")[0])
    assert run("s2")[1] == 3 * STEPS


@pytest.mark.parametrize("xl, count", [(False, 16), (True, 70)])
def test_of_a_unet_the_transformer_blocks_are_dropped(xl, count):
    """Its resnets are more, and change the width."""
    larger = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": [1, 2, 10],
    }
    with torch.device("meta"):
        network = UNet2DConditionModel(**larger if xl else {})
    assert [type(block).__name__ for block in equal_blocks(network)] == ["BasicTransformerBlock"] * count


def test_networks_of_two_blocks_are_too_short_for_it():
    found = trace(tiny.tiny_sd3())
    conditioning = encode(found, ["a red shoe"])
    settings = {"steps": 1, "guidance": W, "seed": 0, "rule": rule_named("s2", W)}
    with pytest.raises(InputError, match=r"rule: s2 leaves out one of at least 3 .* found 2 in SD3Transformer2DModel"):
        generate(found, found.pipeline.scheduler, conditioning, torch.tensor([0]), **settings)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "ddpm", "sana", "z-image", "wan"])
def test_a_network_without_a_block_still_answers(name):
    found = trace(ZOO[name].build(), ZOO[name].arguments)
    conditioning = encode(found, entries(found, ["a red shoe", "rain"] if found.entry == "prompt" else "classes"))
    x, t = noise(found.latent_shape, 0, range(1)), torch.full((1,), 0.5)
    cond, _ = conditioning.batch(torch.zeros(1, dtype=torch.long))
    whole = found.denoiser(x, t, cond).raw
    with without(equal_blocks(found.denoiser.network)[:1]):
        less = found.denoiser(x, t, cond).raw
    assert less.shape == whole.shape and (less - whole).abs().max() > 1e-3


@torch.no_grad()
def test_some_classes_answer_with_the_image_first():
    class Joint(torch.nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, temb):
            return hidden_states + temb, encoder_hidden_states + temb

    block, image, text = Joint(), torch.ones(1, 4, 2), torch.ones(1, 3, 2)
    with without([block]):
        assert torch.equal(block(image, text, 1)[0], image) and torch.equal(block(image, text, temb=1)[1], text)


@torch.no_grad()
def test_joint_blocks_are_dropped_in_both_streams():
    found = trace(tiny.tiny_sd3())
    conditioning = encode(found, ["a red shoe", "rain"], None)
    x, t = noise(found.latent_shape, 0, range(2)), torch.full((2,), 0.5)
    cond, _ = conditioning.batch(torch.arange(2))
    network = found.denoiser.network
    whole = found.denoiser(x, t, cond).raw
    with without([network.transformer_blocks[0]]):
        less = found.denoiser(x, t, cond).raw
    network.transformer_blocks = network.transformer_blocks[1:]
    torch.testing.assert_close(less, found.denoiser(x, t, cond).raw)
    assert (less - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"rule": "adaptive"}, "expected 1 for a pipeline without guidance, and rule cfg, found adaptive"),
        ({"rule": "cfg++", "guidance": 0.6}, "expected 1 for a pipeline without guidance, found 0.6"),
    ],
)
def test_a_pipeline_without_an_empty_condition_takes_what_needs_none(tmp_path, settings, problem):
    tiny.save_pipeline(tiny.tiny_flux(), tmp_path / "flux")
    common = {"steps": 1, "count": 2, "conditions": ["a red shoe", "rain"]}
    with pytest.raises(InputError, match=problem):
        stepdistill.sample(tmp_path / "flux", **common, **settings)
    if settings["rule"] == "adaptive":
        assert stepdistill.sample(tmp_path / "flux", **common, rule="icg", guidance=2.0).nfe == 2


@pytest.mark.parametrize(
    "text, problem",
    [
        ("adaptve", "expected one of cfg, .* found 'adaptve'; did you mean 'adaptive'"),
        ("cfg:2", "cfg takes no number"),
        ("icg:2", "icg takes no number"),
        ("s2:much", "expected a number after s2:, found 'much'"),
        ("apg:0,15,-0.5,1", "expected at most 3 numbers after apg:, found '0,15,-0.5,1'"),
    ],
)
def test_a_wrong_rule_is_one_line(text, problem):
    with pytest.raises(InputError, match=problem):
        rule_for(traced(), conditions(), text, steps=STEPS, guidance=W, seed=0)


def test_the_command_line_says_the_passes(tmp_path):
    tiny.save_pipeline(tiny.tiny_dit(), tmp_path / "teacher")
    command = [
        "sample",
        str(tmp_path / "teacher"),
        "--steps",
        "3",
        "--guidance",
        "2",
        "--count",
        "2",
        "--rule",
        "tsg:0.1",
    ]
    out = ["--out", str(tmp_path / "grid.png"), "--json"]
    done = CliRunner().invoke(app, [*command, *out])
    assert done.exit_code == 0 and '"nfe": 6' in done.output and (tmp_path / "grid.png").is_file()
    limited_to = CliRunner().invoke(app, [*command, *out, "--interval", "0.5,1"])
    assert limited_to.exit_code == 0 and '"nfe": 5' in limited_to.output
    wrong = CliRunner().invoke(app, [*command, *out, "--interval", "0.5"])
    assert isinstance(wrong.exception, InputError) and "expected LOW,HIGH, found '0.5'" in str(wrong.exception)
