"""Imagine Flash against closed forms: the pull to the mean, where samples are renoised to, noise correction."""

import math

import pytest
import torch

from stepdistill.diffusion.samplers import DDIM
from stepdistill.methods import METHODS, Roles
from stepdistill.sampling.rules.steps import Step, noise_correction
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    SCHEDULES,
    OnGrid,
    Spy,
    WithFeatures,
    at,
    batch,
    column,
    ddim_path,
    gradients,
    player,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
GRID = [0.95, 0.7, 0.4, 0.2]


def method_of(schedule, kind, times=GRID, student=None, **config):
    implementation = METHODS["imagine-flash"]
    student = student or player(lambda x, t, labels: x, schedule, kind)
    roles = Roles(teacher=Spy(GaussianDenoiser(*G1, schedule, kind)), student=student)
    times = schedule.snap(torch.tensor(times, dtype=torch.float64)).tolist()
    return implementation(implementation.Config(**config), roles, OnGrid(schedule, times, DDIM))


@pytest.mark.parametrize(
    ("time", "pulls", "exact"),
    [
        (0.5, (0.8, 0.676923, 0.617764, 0.586277), 0.552786),
        (0.8, (0.984615, 0.935385, 0.907692, 0.892717), 0.875965),
        (0.2, (0.2, 0.152941, 0.129437, 0.117568), 0.105573),
    ],
)
def test_the_pull_to_the_mean(time, pulls, exact):
    """Flow, G1: E[x - y | x] = beta (x - m); two opposite noises give the mean over all."""
    for steps, pull in zip((1, 2, 4, 8), pulls, strict=True):
        method = method_of(SCHEDULES["flow"], "flow", shift_low=time, shift_high=time, teacher_steps=steps)
        rows = batch(2)
        rows.noise = lambda name: column(1.0, -1.0)
        x = column(1.9, 1.9)
        y = method.reconstructed(x, method.sampler.grid()[0], rows)
        assert ((x - y).mean() / (1.9 - G1[0])).item() == pytest.approx(pull, abs=1e-6)
    # More steps weaken it, down to 1 - alpha q/sqrt(V).
    alpha = 1 - time
    assert 1 - alpha * G1[1] / math.sqrt(alpha**2 * G1[1] ** 2 + time**2) == pytest.approx(exact, abs=1e-6)
    assert exact < pulls[-1]


@pytest.mark.parametrize("name,kind", ALL)
def test_the_target_is_the_end_of_the_teachers_path(name, kind):
    schedule = SCHEDULES[name]
    method = method_of(schedule, kind, shift_low=0.4, shift_high=0.4, teacher_steps=2)
    rows = batch(3)
    x = column(0.3, 0.9, -0.5)
    start = schedule.snap(at(0.4))
    times = [start.item(), schedule.snap(start / 2).item()]
    x_s = schedule.add_noise(x, rows.noise("renoise"), start.expand(3))
    exact = GaussianDenoiser(*G1, schedule, kind)
    halfway = ddim_path(exact.posterior_mean, x_s, times, schedule)
    expected = exact.posterior_mean(halfway, at(times[1], 3))
    torch.testing.assert_close(method.reconstructed(x, method.sampler.grid()[0], rows), expected)
    assert [t.unique().tolist() for _, t in method.roles.teacher.calls] == [[time] for time in times]


@pytest.mark.parametrize("name,kind", ALL)
def test_a_loss_at_the_students_own_points(name, kind):
    """A student that is the exact map to the clean end: what is left at its own points is the pull to the mean."""
    schedule = SCHEDULES[name]
    exact = GaussianDenoiser(*G1, schedule, kind)
    student = player(lambda x, t, labels: exact.flow_map(x, t, torch.zeros_like(t)), schedule, kind)
    method = method_of(schedule, kind, student=student, teacher_steps=1)
    size = 64
    for k, step in enumerate(method.sampler.grid()):
        rows = batch(size)
        rows.integer = lambda *_, k=k: k
        loss = method.losses("student", rows)["reconstruction"]
        x_s, s = method.roles.teacher.calls[-1]
        low, high = method.config.shift_low, method.config.shift_high
        assert s.min() >= low + (high - low) * (step.r or 0) - 1e-3 and s.max() <= low + (high - low) * step.t + 1e-3
        alpha, sigma = (c[:, None] for c in schedule.coefficients(s))
        x = (x_s - sigma * rows.noise("renoise")) / alpha
        apart = x - exact.posterior_mean(x_s, s)
        assert loss.item() == pytest.approx(apart.square().mean().item(), rel=1e-6)
        # x = scale f + shift at (1, 0): the target carries no graph.
        slopes = (2 * apart * x).mean().item(), 2 * apart.mean().item()
        assert gradients(loss, student) == pytest.approx(slopes, rel=1e-6)


def test_without_a_gan_it_sees_no_data_and_moves_the_student_alone():
    implementation = METHODS["imagine-flash"]
    needs = implementation.data_needs(implementation.Config())
    assert (needs.images, needs.paths, needs.made) == (False, None, None)
    assert implementation.data_needs(implementation.Config(gan_weight=0.1)).images
    for weight, turns in ((0.0, ("student",)), (0.1, ("student", "discriminator"))):
        method = method_of(SCHEDULES["vp"], "v", gan_weight=weight)
        assert method.turns(0) == turns


def test_the_gan_sees_the_students_own_samples():
    schedule = SCHEDULES["vp"]
    method = method_of(schedule, "v", gan_weight=0.1)
    teacher = method.gan.denoiser = WithFeatures(GaussianDenoiser(*G1, schedule, "v"))
    method.gan.heads = lambda states, condition: states[0]
    rows = batch(8)
    rows = rows.but(latents=rows.noise("real"))
    losses = method.losses("student", rows)
    x_t, t = teacher.calls[0]
    torch.testing.assert_close(x_t, schedule.add_noise(rows.state["x"], rows.noise("gan"), t))
    assert losses["gan"].item() == pytest.approx(-0.1 * x_t.mean().item())
    assert gradients(losses["gan"], method.roles.student)[1] == pytest.approx(-0.1 * schedule.alpha(t).mean().item())
    method.losses("discriminator", rows)
    assert [x.shape for x, _ in teacher.calls] == [(8, 1)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_noise_correction_against_golden_numbers(kind):
    """SD's table, G1, x_T = 1: D .716308; at 749 DDIM is at 1.096392, corrected 1.141726."""
    schedule = SCHEDULES["vp"]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    one, r = column(1.0), at(749 / 999)

    def lands(number):
        now = Step(number, one, at(1.0), r, {}, None, None, torch.arange(1), list, 0)
        found = noise_correction(1.0)(teacher, now)
        found = getattr(found, "prediction", found)
        return schedule.add_noise(found.x0, found.eps, r).item()

    assert teacher(one, at(1.0)).x0.item() == pytest.approx(0.716308, abs=1e-6)
    assert (lands(1), lands(0)) == pytest.approx((1.096392, 1.141726), abs=1e-6)
