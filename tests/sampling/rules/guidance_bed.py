"""What the tests of guidance at inference share: a tiny class DiT, five samples of it, and DDIM written out."""

import functools
import itertools

import torch

from pipeline import tiny
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.generate import generate, noise
from stepdistill.sampling.rules.names import rule_for

N, STEPS, W = 5, 4, 3.0
ROWS = torch.tensor([0, 1, 2, 0, 1])


@functools.cache
def traced():
    return trace(tiny.tiny_dit())


@functools.cache
def conditions():
    return encode(traced(), [3, 0, 7], None)


def run(rule, batch=N, seed=1):
    """(latents, passes an image) under a rule's name or maker."""
    found, make = traced(), rule
    if isinstance(rule, str):
        make = rule_for(found, conditions(), rule, steps=STEPS, guidance=W, seed=seed)
    before = found.denoiser.evaluations
    latents = generate(
        found, found.pipeline.scheduler, conditions(), ROWS, steps=STEPS, guidance=W, seed=seed, batch=batch, rule=make
    )
    return latents, (found.denoiser.evaluations - before) / N


def by_hand(predict, start=0, x=None):
    """DDIM written out: ``predict(number, x, t)`` gives (x_0, the noise that stays); from step ``start`` at ``x``."""
    schedule, ready = traced().denoiser.schedule, traced().pipeline.scheduler
    ready.set_timesteps(STEPS)
    x = noise(traced().latent_shape, 1, range(N)) if x is None else x
    times = [*(schedule.time(t).expand(N) for t in ready.timesteps), torch.zeros(N)]
    for number, (t, r) in list(enumerate(itertools.pairwise(times)))[start:]:
        x0, eps = predict(number, x, t)
        alpha, sigma = (c.view(-1, 1, 1, 1).to(x.dtype) for c in schedule.coefficients(r))
        x = alpha * x0 + sigma * eps if number + 1 < STEPS else x0
    return x


def two(x, t):
    """The conditional and the unconditional prediction."""
    cond, null = conditions().batch(ROWS)
    return traced().denoiser(x, t, cond), traced().denoiser(x, t, null)
