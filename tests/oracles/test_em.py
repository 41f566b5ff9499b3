"""EM distillation against closed forms: the chain's law, the iterates of exact EM, Diff-Instruct, mode coverage."""

import math

import pytest
import torch
from test_distribution_matching import given, one_step

from stepdistill.diffusion.schedule import VPSchedule
from stepdistill.methods import METHODS
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import G1, KINDS, M1, SCHEDULES, Spy, at, batch, column, generator, gradients

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
# alpha .8 and sigma .6 at t = .5.
GOLDEN = VPSchedule(torch.tensor([0.99, 0.64, 0.01]))


def emd(schedule, kind, a, b, time=None, teacher=None, **config):
    """EMD for x = a z + b with the exact critic, at one noise level where ``time`` is given."""
    student, teacher = generator(schedule, kind, a, b), Spy(teacher or GaussianDenoiser(*G1, schedule, kind))
    critic = Spy(affine_critic(a, b, schedule, kind))
    method = one_step("emd", student, teacher, critic, **config)
    if time is not None:
        method.matching_times = lambda rows: at(time, rows.size)
    return method


def drift(method, z, eps) -> torch.Tensor:
    """(d eps, d z) of a chain of unit length (B, 2): where its second pass stands after a step without noise."""
    still = torch.zeros_like(z)
    rows = given(batch(len(z)), start=z, dm=eps, **{"eps 0": still, "z 0": still})
    student = method.roles.student = Spy(method.roles.student)
    method.losses("student", rows)
    (x_t, t), (moved, _) = method.roles.teacher.calls[-1], student.calls[-1]
    alpha, sigma = (c[:, None] for c in method.schedule.coefficients(t))
    scale, shift = method.roles.student.network.parameters()
    now = (x_t - alpha * (scale * moved + shift)) / sigma
    steps = method.config.noise_step, method.config.latent_step
    return torch.cat([(now - eps) / steps[0], (moved - z) / steps[1]], 1).detach()


def test_golden_drift():
    method = emd(GOLDEN, "epsilon", 1.5, 0.0, 0.5, langevin_steps=2)
    found = drift(method, column(0.5), column(0.2 / 0.6))
    assert found[0].tolist() == pytest.approx([-0.343590, -0.520513], abs=1e-6)


def posterior(method) -> dict[str, float]:
    """Moments of the chain's stationary law in z and x, from its linear drift -P (u - m) in u = (eps, z)."""
    z, eps = column(0.0, 0.0, 1.0), column(0.0, 1.0, 0.0)
    zero, *others = drift(method, z, eps)
    precision = -torch.stack([other - zero for other in others], 1)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ zero
    alpha, sigma = (c.item() for c in method.schedule.coefficients(method.matching_times(batch(1))))
    a, b = (p.item() for p in method.roles.student.network.parameters())
    of_x = torch.tensor([sigma, alpha * a], dtype=torch.float64)
    return {
        "z": mean[1].item(),
        "zz": covariance[1, 1].item(),
        "xz": (of_x @ covariance)[1].item(),
        "x": (of_x @ mean).item() + alpha * b,
        "xx": (of_x @ covariance @ of_x).item(),
    }


@pytest.mark.parametrize("name,kind", ALL)
def test_the_chain_is_drawn_to_the_exact_posterior(name, kind):
    """q_T(x) p(z | x): z given x is N(alpha a (x - alpha b)/A, sigma^2/A) for samples N(b, a^2), A of their noisy x."""
    schedule, (mean, std), (a, b) = SCHEDULES[name], G1, (0.9, 0.2)
    time = schedule.snap(at(0.5)).item()
    alpha, sigma = (c.item() for c in schedule.coefficients(at(time)))
    v, spread = alpha**2 * std**2 + sigma**2, alpha**2 * a**2 + sigma**2
    gain = alpha * a / spread
    found = posterior(emd(schedule, kind, a, b, time, langevin_steps=2, latent_step=0.01))
    exact = {
        "z": gain * alpha * (mean - b),
        "zz": gain**2 * v + sigma**2 / spread,
        "xz": gain * v,
        "x": alpha * mean,
        "xx": v,
    }
    assert found == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("a", [1.5, 0.1])
def test_exact_em_goes_to_the_teacher(a):
    b, iterates = 0.0, []
    for _ in range(20):
        law = posterior(emd(GOLDEN, "v", a, b, 0.5, langevin_steps=2, latent_step=0.01))
        if not iterates and a == 1.5:
            golden = {"z": 0.373333, "zz": 0.431111, "xz": 0.346667, "x": 0.56, "xx": 0.52}
            assert law == pytest.approx(golden, abs=1e-6)
        a = law["xz"] / law["zz"] / 0.8
        b = law["x"] / 0.8 - a * law["z"]
        iterates.append((a, b))
    if iterates[0][0] > 1:
        for number, golden in ((1, (1.005155, 0.324742)), (2, (0.753109, 0.519392)), (5, (0.538476, 0.690172))):
            assert iterates[number - 1] == pytest.approx(golden, abs=1e-6)
        assert iterates[9] == pytest.approx((0.502271, 0.699968), abs=1e-6)
    assert iterates[-1] == pytest.approx((0.5, 0.7), abs=1e-4)


@pytest.mark.parametrize("name,kind", ALL)
def test_one_step_is_diff_instruct(name, kind):
    schedule = SCHEDULES[name]
    slopes = []
    for method, config in (("emd", {"langevin_steps": 1, "noise_step": 0.25}), ("diff-instruct", {})):
        student = generator(schedule, kind, 0.9, 0.2)
        teacher, critic = GaussianDenoiser(*G1, schedule, kind), affine_critic(0.9, 0.2, schedule, kind)
        loss = one_step(method, student, teacher, critic, **config).losses("student", batch(16))["dm"]
        slopes.append(gradients(loss, student))
    assert slopes[0] == pytest.approx([0.25 * slope for slope in slopes[1]], rel=1e-9)
    assert math.hypot(*slopes[0]) > 1e-3


def test_one_step_moves_by_the_difference_of_the_scores():
    """x = .8: s_T = -.461538, s_f = -.444444; x_clean - alpha g = gamma sigma^2 (s_T - s_f)."""
    method = emd(GOLDEN, "flow", 1.5, 0.0, 0.5, langevin_steps=1)
    rows = given(batch(1), start=column(0.5), dm=column(0.2 / 0.6))
    loss = method.losses("student", rows)["dm"]
    moved = 0.8 * -gradients(loss, method.roles.student)[1]
    assert moved == pytest.approx(0.16 * 0.36 * (-0.461538 + 0.444444), abs=1e-7)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_teachers_distribution_is_a_fixed_point(name, kind):
    method = emd(SCHEDULES[name], kind, G1[1], G1[0], langevin_steps=3)
    loss = method.losses("student", batch(16))["dm"]
    assert loss.item() < 1e-16 and math.hypot(*gradients(loss, method.roles.student)) < 1e-8


def test_both_modes_are_covered_from_one():
    """M1 in flow at t = .2, a student on the mode N(1, .5^2): Diff-Instruct stays, EMD spreads."""
    schedule, ends = SCHEDULES["flow"], {}
    teacher = MixtureDenoiser(*M1, schedule, "flow")
    for steps in (1, 16):
        a, b = 0.5, 1.0
        for update in range(10):
            method = emd(schedule, "flow", a, b, 0.2, teacher, langevin_steps=steps, latent_step=0.01)
            loss = method.losses("student", batch(128, step=update))["dm"]
            slopes, rate = gradients(loss, method.roles.student), 1 / (1 - 0.84**steps)
            a, b = a - rate * slopes[0], b - rate * slopes[1]
        ends[steps] = a, b
    assert ends[1][0] < 0.58 and ends[1][1] > 0.95
    assert ends[16][0] > 0.62 and ends[16][1] < 0.94


def test_who_learns_what():
    schedule = SCHEDULES["flow"]
    student, critic = generator(schedule, "v", 0.9, 0.2), generator(schedule, "v", 1.1, -0.4)
    teacher = Spy(GaussianDenoiser(torch.tensor([0.7] * 2), torch.tensor([0.5] * 2), schedule, "v"))
    method = one_step("emd", student, teacher, critic, scale=2.0, langevin_steps=4)
    rows = batch(8, labels=(0, 1))
    loss = method.losses("student", rows)["dm"]
    assert torch.autograd.grad(loss, list(critic.network.parameters()), allow_unused=True) == (None,) * 2
    # Guidance doubles the teacher's rows alone.
    assert (student.evaluations, critic.evaluations) == (32, 32)
    assert [len(x_t) for x_t, _ in teacher.calls] == [16] * 4
    torch.testing.assert_close(rows.state["x"], 0.9 * rows.noise("start") + 0.2)
    loss = method.losses("critic", rows)["denoising"]
    assert math.hypot(*gradients(loss, critic)) > 0
    assert student.evaluations == 32


def test_only_students_of_one_step():
    config = METHODS["emd"].Config()
    assert [*METHODS["emd"].problems(config, 1, 10)] == []
    assert [key for key, _ in METHODS["emd"].problems(config, 2, 10)] == ["student.steps"]
