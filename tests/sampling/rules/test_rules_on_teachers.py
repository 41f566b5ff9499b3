"""Guidance rules against their definitions on teachers of every kind: noise, velocity to zero signal, flow, guided
outputs that keep a norm or are rescaled."""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding

from pipeline.zoo import ZOO
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.schedule import FlowSchedule
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate, noise, sample_generator
from stepdistill.sampling.rules import steps
from stepdistill.sampling.rules.linear import LinearAdaptive
from stepdistill.sampling.rules.sag import attended, attention_weights, gaussian_blur, self_attention
from stepdistill.sampling.rules.steps import Adaptive, Step, cfg_plus_plus, noise_correction, time_step
from stepdistill.sampling.rules.teacher import teacher_refined

W, B = 3.0, 2
TEACHERS = {
    "noise": ("sd", Rule()),
    "velocity": ("dit", Rule()),
    "velocity, zero signal": ("sd-v", Rule()),
    "flow": ("sd3", Rule()),
    "keeps the norm": ("lumina2", Rule()),
    "keeps the norm, sequence": ("qwen-image", Rule()),
    "rescaled": ("sd", Rule(rescale=0.7)),
    "rescaled flow": ("sd3", Rule(rescale=0.7)),
}


@functools.cache
def pipeline(name):
    exhibit = ZOO[name]
    found = trace(exhibit.build(), exhibit.arguments)
    encoded = encode(found, entries(found, ["a red shoe", "rain"] if found.entry == "prompt" else [3, 7]))
    return found, encoded


@pytest.fixture(params=TEACHERS)
def teacher(request):
    """(denoiser, conditioning, its latents' shape)."""
    name, rule = TEACHERS[request.param]
    found, encoded = pipeline(name)
    one = found.denoiser
    return Denoiser(one.network, replace(one.spec, rule=rule), one.schedule, one.kind), encoded, found.latent_shape


def step(teacher, t, r, number=0):
    _, encoded, shape = teacher
    rows = torch.arange(B)

    def dice():
        return [sample_generator(1, i, 2 + number) for i in range(B)]

    times = (torch.full((B,), value) for value in (t, r))
    return Step(number, noise(shape, 0, range(B)), *times, *encoded.batch(rows), encoded, rows, dice, 1)


def combined(denoiser, cond, uncond):
    """uncond + w (cond - uncond) as the pipeline does it, written out."""
    raw = uncond + W * (cond - uncond)
    if phi := denoiser.rule.rescale:
        deviations = [one.flatten(1).std(1).view(-1, *[1] * (one.ndim - 1)) for one in (cond, raw)]
        raw = raw * (phi * deviations[0] / deviations[1] + 1 - phi)
    if denoiser.norm_axis:
        raw = raw * cond.norm(dim=-1, keepdim=True) / raw.norm(dim=-1, keepdim=True)
    return raw


def read(denoiser, raw, now):
    """(x_0, eps) of an output."""
    x_t = now.x_t.double()
    return [f(raw.double(), x_t, now.t, denoiser.kind) for f in (denoiser.schedule.to_x0, denoiser.schedule.to_eps)]


def two(denoiser, now):
    return denoiser(now.x_t, now.t, now.cond).raw, denoiser(now.x_t, now.t, now.null).raw


def close(found, expected, tolerance=1e-6):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("t, r", [(1.0, 0.6), (0.7, 0.2), (0.3, 0.0)])
def test_cfg_plus_plus_steps_with_the_guided_x0_and_the_unguided_noise(teacher, t, r):
    denoiser, now = teacher[0], step(teacher, t, r)
    cond, uncond = two(denoiser, now)
    (x0, _), (_, eps) = (read(denoiser, raw, now) for raw in (combined(denoiser, cond, uncond), uncond))
    found = cfg_plus_plus(W)(denoiser, now)
    a, b = torch.tensor(0.4), torch.tensor(-0.7)
    close(found.step(now.x_t, a, b), a * now.x_t + b * found.raw, 1e-5)
    if r == 0:
        return close(found.prediction.x0.double(), x0, 1e-5)
    schedule = denoiser.schedule
    stepped = schedule.add_noise(*read(denoiser, found.raw, now), now.r)
    return close(stepped, schedule.add_noise(x0, eps, now.r))


@torch.no_grad()
@pytest.mark.parametrize("number, r", [(0, 0.6), (1, 0.6), (0, 0.0)])
def test_noise_correction_keeps_the_sample_as_noise_in_the_first_step_alone(teacher, number, r):
    denoiser, now = teacher[0], step(teacher, 1.0, r, number)
    x0, eps = read(denoiser, combined(denoiser, *two(denoiser, now)), now)
    found = read(denoiser, noise_correction(W)(denoiser, now).raw, now)
    expected = denoiser.schedule.add_noise(x0, now.x_t.double() if number == 0 else eps, now.r)
    if r == 0:
        return close(found[0], x0, 1e-5)
    return close(denoiser.schedule.add_noise(*found, now.r), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("t", [1.0, 0.5])
def test_adaptive_guidance_compares_what_the_two_predict_of_the_picture(teacher, t):
    denoiser, now = teacher[0], step(teacher, t, 0.4)
    cond, uncond = two(denoiser, now)
    (first, _), (other, _) = (read(denoiser, raw, now) for raw in (cond, uncond))
    cosine = torch.cosine_similarity(first.flatten(1), other.flatten(1))
    gap = (1 - cosine).tolist()
    assert min(gap) > 1e-6
    for row in range(B):
        for part, left in ((0.8, True), (1.2, False)):
            rule = Adaptive(W, 1 - part * gap[row])
            close(rule(denoiser, now).raw, combined(denoiser, cond, uncond), 1e-4)
            assert (row in rule.open.tolist()) == left


@torch.no_grad()
def test_time_step_guidance_perturbs_the_time_embedding(teacher):
    """t_emb + s t^alpha std(t_emb) n in front of everything that reads it, the same n wherever the network embeds t."""
    denoiser, now = teacher[0], step(teacher, 0.7, 0.4)
    cond, _ = two(denoiser, now)
    modules = [one for one in denoiser.network.modules() if isinstance(one, TimestepEmbedding)]
    width = modules[0].linear_2.out_features
    noise = torch.stack([torch.randn(width, generator=dice) for dice in now.dice()])
    forwards = [one.forward for one in modules]

    def perturbed(forward, *arguments):
        embedded = forward(*arguments)
        return embedded + 1.5 * 0.7**0.5 * embedded.std(1, keepdim=True) * noise

    for one in modules:
        one.forward = functools.partial(perturbed, one.forward)
    worse = denoiser(now.x_t, now.t, now.cond).raw
    for one, forward in zip(modules, forwards, strict=True):
        one.forward = forward
    assert (worse - cond).abs().max() > 1e-4
    close(time_step(W, 1.5, 0.5)(denoiser, now).raw, combined(denoiser, cond, worse), 1e-5)
    close(time_step(W, 0.0)(denoiser, now).raw, cond)
    # Nothing of it stays.
    close(denoiser(now.x_t, now.t, now.cond).raw, cond)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ZOO if name != "z-image"])
def test_every_network_of_the_zoo_has_a_time_embedding_to_perturb(name):
    found = trace(ZOO[name].build(), ZOO[name].arguments)
    encoded = encode(found, entries(found, ["a red shoe", "rain"] if found.entry == "prompt" else "classes")[:2])
    now = step((found.denoiser, encoded, found.latent_shape), 0.7, 0.4)
    one = [value[:1] for value in (now.x_t, now.t)]
    weak = time_step(0.0)(found.denoiser, now)
    plain = found.denoiser(now.x_t, now.t, now.cond)
    assert weak.raw.isfinite().all() and (weak.raw - plain.raw).abs().flatten(1).amax(1).min() > 1e-5
    alone = replace(now, x_t=one[0], t=one[1], cond={key: value[:1] for key, value in now.cond.items()}, null=None)
    alone = replace(alone, dice=lambda: now.dice()[:1])
    torch.testing.assert_close(time_step(0.0)(found.denoiser, alone).raw, weak.raw[:1], rtol=1e-4, atol=1e-4)


def test_a_network_with_a_time_embedding_of_its_own_is_refused():
    found = trace(ZOO["z-image"].build(), ZOO["z-image"].arguments)
    encoded = encode(found, ["a red shoe", "rain"])
    with pytest.raises(InputError, match=r"tsg perturbs diffusers' TimestepEmbedding, and ZImageTransf.* has none"):
        time_step(W)(found.denoiser, step((found.denoiser, encoded, found.latent_shape), 0.7, 0.4))


@torch.no_grad()
def test_s2_guidance_moves_away_from_the_network_without_a_block(teacher, monkeypatch):
    """Added to what the pipeline's own guidance gives: in x_0, eps and v alike, as each is linear in the output."""
    denoiser, now = teacher[0], step(teacher, 0.7, 0.4)
    block = steps.equal_blocks(denoiser.network)[0]
    # These networks are too short to leave a block in the middle out.
    monkeypatch.setattr(steps, "equal_blocks", lambda _: [block] * 3)
    cond, uncond = two(denoiser, now)
    with steps.without([block]):
        less = denoiser(now.x_t, now.t, now.cond).raw
    assert (less - cond).abs().max() > 1e-4
    found = read(denoiser, steps.dropped_blocks(W, 0.4)(denoiser, now).raw, now)
    parts = [read(denoiser, raw, now) for raw in (combined(denoiser, cond, uncond), cond, less)]
    for one, (guided, full, short) in zip(found, zip(*parts, strict=True), strict=True):
        close(one, guided + 0.4 * (full - short), 1e-5)


@torch.no_grad()
def test_a_guessed_unconditional_output_is_combined_as_the_pipeline_does(teacher):
    denoiser = teacher[0]
    rule = LinearAdaptive(W, {1: torch.tensor([-0.5, 1.2, 0.3])})
    first, second = step(teacher, 1.0, 0.6), step(teacher, 0.6, 0.2, 1)
    cond, uncond = two(denoiser, first)
    close(rule(denoiser, first).raw, combined(denoiser, cond, uncond), 1e-5)
    then = denoiser(second.x_t, second.t, second.cond).raw
    guess = -0.5 * cond + 1.2 * uncond + 0.3 * then
    close(rule(denoiser, second).raw, combined(denoiser, then, guess), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("t", [1.0, 0.7])
def test_a_refined_x0_is_part_the_teachers(teacher, t):
    denoiser, now = teacher[0], step(teacher, t, 0.4)
    x0, _ = read(denoiser, denoiser(now.x_t, now.t, now.cond).raw, now)
    noise = torch.stack([torch.randn(now.x_t.shape[1:], generator=dice) for dice in now.dice()])
    later = replace(now, x_t=denoiser.schedule.add_noise(x0, noise.double(), now.r).float(), t=now.r)
    refined, _ = read(denoiser, combined(denoiser, *two(denoiser, later)), later)
    found = teacher_refined(denoiser, W, 0.3)(denoiser, now)
    close(found.x0.double(), 0.7 * x0 + 0.3 * refined, 1e-4)
    close(denoiser.schedule.add_noise(found.x0, found.eps, now.t), now.x_t, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("made", ["sd", "sd-v", "dit", "flow"])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_self_attention_guidance_in_the_noise(made, phi):
    """eps + s (eps - worse eps) on what the pipeline's guidance gives; joint attention is refused elsewhere."""
    found, encoded = pipeline("dit" if made == "flow" else made)
    one = found.denoiser
    schedule, kind = (FlowSchedule(), "flow") if made == "flow" else (one.schedule, one.kind)
    denoiser = Denoiser(one.network, replace(one.spec, rule=Rule(rescale=phi)), schedule, kind)
    now = step((denoiser, encoded, found.latent_shape), 0.7, 0.4)
    cond, uncond = two(denoiser, now)
    with attention_weights(denoiser.network) as seen:
        base = denoiser(now.x_t, now.t, now.null)
    blurred = torch.where(attended(seen, now.x_t) > 1, gaussian_blur(base.x0), base.x0)
    degraded = replace(now, x_t=schedule.add_noise(blurred, base.eps, now.t))
    worse = read(denoiser, denoiser(degraded.x_t, now.t, now.null).raw, degraded)[1]
    eps = read(denoiser, combined(denoiser, cond, uncond), now)[1]
    rule = self_attention(W, 0.6)
    close(rule(denoiser, now).eps.double(), eps + 0.6 * (base.eps - worse), 1e-4)
    if schedule.coefficients(torch.ones(1))[0] == 0:
        # At pure noise eps says nothing of the picture.
        assert rule(denoiser, step((denoiser, encoded, found.latent_shape), 1.0, 0.4)).x0.isfinite().all()


@torch.no_grad()
def test_a_teacher_refines_drafts_on_a_flow_from_the_middle_of_its_grid():
    """What collaboration does to weak drafts, by Euler written out."""
    found, encoded = pipeline("sd3")
    scheduler, index = found.pipeline.scheduler, torch.arange(B)
    drafts, fresh = (noise(found.latent_shape, seed, range(B)) for seed in (9, 3))
    settings = {"steps": 4, "guidance": W, "seed": 3, "onto": drafts, "start": 2}
    refined = generate(found, scheduler, encoded, index, **settings)
    scheduler.set_timesteps(4)
    s = scheduler.sigmas.tolist()
    x = (1 - s[2]) * drafts + s[2] * fresh
    for now, then in ((s[2], s[3]), (s[3], s[4])):
        times = torch.full((B,), now)
        cond, null = encoded.batch(index)
        outputs = found.denoiser(x, times, cond).raw, found.denoiser(x, times, null).raw
        x = x + (then - now) * combined(found.denoiser, *outputs)
    close(refined, x, 1e-4)
