"""Flash Diffusion against closed forms: ends of the teacher's path, stages, and its parts one by one."""

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.samplers import solver_grid
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.flash_diffusion import start_shares
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    SCHEDULES,
    OnGrid,
    WithFeatures,
    at,
    batch,
    column,
    ddim_path,
    gradients,
    player,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]


class Vote(nn.Module):
    def forward(self, states, condition=None):
        return states[0].flatten(1)


def method_of(schedule, kind, function=lambda x, t, labels: x, **config):
    implementation = METHODS["flash-diffusion"]
    # Two classes alike: guidance changes nothing.
    twice = [torch.tensor([number] * 2) for number in G1]
    teacher = WithFeatures(GaussianDenoiser(*twice, schedule, kind))
    roles = Roles(teacher=teacher, student=player(function, schedule, kind), scale=2.0)
    method = implementation(implementation.Config(**config), roles, OnGrid(schedule, [0.9]))
    method.gan.heads = Vote()
    return method


def rows(step=0, size=8):
    given = batch(size, step=step, labels=(0, 1))
    return given.but(latents=G1[0] + G1[1] * given.noise("real"))


@pytest.mark.parametrize(
    ("n", "k", "b"),
    [(0, 0.476349, 0.677237), (8, 0.485931, 0.619058), (16, 0.534335, 0.502905), (24, 0.676249, 0.310959)],
)
def test_golden_ends(n, k, b):
    """SD's table from index 999 in 32 steps: 999, 749, 499, 249 are its quarters."""
    schedule = SCHEDULES["vp"]
    method = method_of(schedule, "epsilon")
    grid = solver_grid(schedule, 32).flip(0).tolist()
    assert round(grid[n] * 999) == {0: 999, 8: 749, 16: 499, 24: 249}[n]
    ends = method.end(column(0.0, 1.0), grid[n:], rows(size=2))
    assert (ends[1] - ends[0]).item() == pytest.approx(k, abs=1e-6)
    assert ends[0].item() == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("name,kind", ALL)
def test_a_student_that_is_the_end_of_the_path_has_no_loss(name, kind):
    """Where it starts, from noise alone at n = 0 and from noised data elsewhere; beside it the student moves."""
    schedule = SCHEDULES[name]
    reached = []

    def end(x, t, labels):
        grid = solver_grid(schedule, 4).flip(0)
        n = int((grid - t[0]).abs().argmin())
        reached.append((n, x.detach()))
        return method.end(x, grid[n:].tolist(), rows(size=len(x)))

    method = method_of(schedule, kind, end, solver_steps=4)
    # Where alpha is 0 at the noise end, an epsilon says nothing of x_0.
    first = 1 if kind == "epsilon" and schedule.alpha(at(1.0)).item() == 0 else 0
    for n in range(first, 4):
        given = rows(n)
        given.pick = lambda name, shares, n=n: n
        loss = method.losses("student", given)["distill"]
        assert reached[-1][0] == n
        t = solver_grid(schedule, 4).flip(0)[n].expand(given.size)
        x_t = schedule.add_noise(given.latents, given.noise("start"), t) if n else given.noise("start")
        torch.testing.assert_close(reached[-1][1], x_t)
        assert loss.item() < 1e-18 and math.hypot(*gradients(loss, method.roles.student)) < 1e-7


def test_the_matching_part_pushes_the_ends_of_the_path_outwards():
    """At 499 D_fake - D_real of the end map is .367949 (x - alpha m): slope .534335 against .166386."""
    schedule = SCHEDULES["vp"]
    grid = solver_grid(schedule, 32).flip(0).tolist()
    method = method_of(
        schedule,
        "v",
        lambda x, t, labels: method.end(x, grid[16:], rows(size=len(x))),
        t_min=499 / 999,
        t_max=499 / 999,
    )
    given = rows(size=2)
    given.noise = lambda name: torch.zeros(2, 1, dtype=torch.float64)
    alpha = schedule.alpha(at(499 / 999)).item()
    x_t = column(0.0, 1.0)
    x = x_t / alpha
    gradient = method.gradient(x, given)
    real = GaussianDenoiser(*G1, schedule, "v").posterior_mean(x_t, at(499 / 999, 2))
    apart = gradient * (x - real).abs()
    assert (apart[1] - apart[0]).item() == pytest.approx(0.367949, abs=1e-6)
    centre = alpha * G1[0]
    assert apart[0].item() == pytest.approx(-0.367949 * centre, abs=2e-3)


def test_the_stages():
    method = method_of(SCHEDULES["vp"], "v", stage_steps=10)
    assert [method.stage(step) for step in (0, 9, 10, 20, 30, 99)] == [0, 0, 1, 2, 3, 3]
    assert [method.turns(step) for step in (0, 10)] == [("student",), ("student", "discriminator")]
    assert [*method.losses("student", rows(0))] == ["distill"]
    given = rows(35)
    losses = method.losses("student", given)
    assert [*losses] == ["distill", "dm", "gan"]
    method.config = method.config.model_copy(update={"dm_weights": [1.0] * 4, "gan_weights": [1.0] * 4})
    whole = method.losses("student", rows(35))
    assert losses["dm"].item() == pytest.approx(0.7 * whole["dm"].item())
    assert losses["gan"].item() == pytest.approx(0.3 * whole["gan"].item())
    assert method.losses("discriminator", given)["gan"].item() > 0
    times = method.gan_times(rows(size=400), "gan time")
    assert sorted({round(t * 999) for t in times.tolist()}) == [10, 250, 500, 749]


def test_where_the_student_starts():
    for stage, modes in enumerate(((0.5, 0.5, 0, 0), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4)):
        shares = torch.tensor(start_shares(stage, 32))
        assert shares.sum().item() == pytest.approx(1)
        near = [shares[max(0, 8 * i - 3) : 8 * i + 4].sum().item() for i in range(4)]
        assert near == pytest.approx(modes, abs=1e-3)
    # exp(-d^2), of variance 1/2
    assert shares[9].item() / shares[8].item() == pytest.approx(math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("name,kind", ALL)
def test_guidance_of_each_sample_reaches_the_path(name, kind):
    schedule = SCHEDULES[name]
    method = method_of(schedule, kind, guidance_range=[3.0, 13.0], solver_steps=4)
    method.roles.teacher = GaussianDenoiser(torch.tensor([0.7, 0.0]), torch.tensor([0.5, 1.5]), schedule, kind)
    given, grid = rows(), solver_grid(schedule, 4).flip(0).tolist()[2:]
    scale = given.uniform("path guidance", 3.0, 13.0)[:, None]
    assert scale.min() >= 3 and scale.max() < 13

    def guided(x, t):
        cond, null = (GaussianDenoiser(*one, schedule, kind).posterior_mean(x, t) for one in ((0.7, 0.5), (0.0, 1.5)))
        return null + scale * (cond - null)

    x = given.noise("x")
    # Two steps: the first of DPM-Solver++ is DDIM's, the last is x_0 itself, extrapolated by none.
    halfway = ddim_path(guided, x, grid[:2], schedule)
    torch.testing.assert_close(method.end(x, grid, given), guided(halfway, at(grid[1], len(x))))
