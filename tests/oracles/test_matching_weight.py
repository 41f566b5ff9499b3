"""The two halves of guided distribution matching apart: Decoupled DMD's weight of matching, DMD2's of its term."""

import math

import pytest
import torch
from pydantic import ValidationError
from test_distribution_matching import given

from stepdistill.methods import METHODS, Roles
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import KINDS, M1, SCHEDULES, OnGrid, Spy, WithFeatures, at, batch, column, generator

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
# Class 0 is N(1, .5^2), class 1 stands for the empty condition, N(0, 1.5^2).
PAIR = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5])


def decoupled(schedule, kind, teacher, critic, scale, time, **config):
    implementation = METHODS["decoupled-dmd"]
    student = generator(schedule, kind, 0.9, 0.2)
    roles = Roles(teacher=Spy(teacher), student=student, critic=Spy(critic), scale=scale)
    only = {"t_min": time, "t_max": time} if time else {}
    return implementation(implementation.Config(**only, **config), roles, OnGrid(schedule, [0.98]))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_gradient_of_guidance_alone(kind):
    """M1, flow t = .5, x_t = .8 of x = .9, class 2, w = 3: g = 2 (D_u - D_c)/|x - D_c| = -.213614, and no critic."""
    schedule = SCHEDULES["flow"]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    method = decoupled(schedule, kind, teacher, teacher, 3.0, 0.5, matching_weight=0)
    rows = given(batch(1, labels=(1, 2)), augmentation=column(0.7))
    assert method.gradient(column(0.9), rows).item() == pytest.approx(-0.213614, abs=1e-5)
    assert method.roles.critic.calls == [] and len(method.roles.teacher.calls) == 2
    assert [method.turns(step) for step in range(3)] == [("student",)] * 3


def noise_level(name: str, sigma_per_alpha: float) -> float:
    """A time of EDM at which sigma has this value."""
    return SCHEDULES[name].time(torch.tensor([math.log(sigma_per_alpha) / 4], dtype=torch.float64)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sigma", "mean"), [(0.2, 1.145), (1.0, 1.625)])
def test_guidance_alone_drives_to_where_both_classes_agree(kind, sigma, mean):
    schedule, time = SCHEDULES["edm"], noise_level("edm", sigma)
    teacher = GaussianDenoiser(*PAIR, schedule, kind)
    method = decoupled(schedule, kind, teacher, teacher, 2.0, time, matching_weight=0)
    for x, side in ((mean, 0), (mean + 0.1, 1), (mean - 0.1, -1)):
        rows = given(batch(1, labels=(0, 1)), augmentation=column(0.0))
        found = method.gradient(column(x), rows).item()
        assert (abs(found) < 1e-9) if side == 0 else (found * side > 1e-3)
    if sigma == 0.2:
        cond, uncond = (
            method.roles.teacher.denoiser(column(0.0, 1.0), at(time, 2), {"class_labels": torch.full((2,), one)})
            for one in (0, 1)
        )
        rate = (uncond.x0 - cond.x0).diff(dim=0).item()
        assert rate == pytest.approx(0.120464, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weight", "mean", "variance"), [(1.0, 1.067599, 0.114802), (0.5, 1.092210, 0.065580)])
def test_less_matching_leaves_less_variance(kind, weight, mean, variance):
    """Pair P at sigma .2, w = 2: the gradient vanishes at every sample where the critic knows N(mean, variance)."""
    schedule, time = SCHEDULES["edm"], noise_level("edm", 0.2)
    # D_fake = D_c - (D_u - D_c)/mu, of slope k and of (1 - k) b at 0.
    of_cond, of_null = 0.25 / 0.29, 2.25 / 2.29
    slope = of_cond - (of_null - of_cond) / weight
    exact = (1 - of_cond) * (1 + 1 / weight) / (1 - slope), 0.04 * slope / (1 - slope)
    assert exact == pytest.approx((mean, variance), abs=1e-6)
    critic = affine_critic(math.sqrt(exact[1]), exact[0], schedule, kind)
    teacher = GaussianDenoiser(*PAIR, schedule, kind)
    method = decoupled(schedule, kind, teacher, critic, 2.0, time, matching_weight=weight)
    x = column(0.3, 0.9, 1.8)
    noise = column(-0.7, 0.4, 1.1)
    rows = given(batch(3, labels=(0, 1)), dm=noise, augmentation=noise)
    # Both parts have the normaliser mean|x - D_cond|, and one noise and time here.
    assert method.gradient(x, rows).abs().max().item() < 1e-9
    half = decoupled(schedule, kind, teacher, critic, 2.0, time, matching_weight=weight / 2)
    assert half.gradient(x, rows).abs().max().item() > 1e-3


@pytest.mark.parametrize("name,kind", ALL)
def test_the_weight_scales_matching_alone(name, kind):
    schedule = SCHEDULES[name]
    teacher, critic = GaussianDenoiser(*PAIR, schedule, kind), affine_critic(0.8, 0.1, schedule, kind)
    x = column(0.3, 0.9, 1.8)

    def gradient(**config):
        return decoupled(schedule, kind, teacher, critic, 2.0, None, **config).gradient(x, batch(3, labels=(0, 1)))

    alone, whole = gradient(matching_weight=0), gradient()
    torch.testing.assert_close(gradient(matching_weight=0.25), alone + 0.25 * (whole - alone))


def test_a_term_of_no_weight_costs_no_pass_of_the_teacher():
    schedule, implementation = SCHEDULES["flow"], METHODS["dmd2"]
    teacher = Spy(GaussianDenoiser(*PAIR, schedule, "v"))
    critic = WithFeatures(affine_critic(0.9, 0.2, schedule, "v"))
    roles = Roles(teacher=teacher, student=generator(schedule, "v", 0.9, 0.2), critic=critic, scale=2.0)
    method = implementation(implementation.Config(dm_weight=0, gan_weight=0.5), roles, OnGrid(schedule, [0.9]))
    method.gan.heads = lambda states: states[0]
    assert [*method.losses("student", batch(4, labels=(0, 1)))] == ["gan"]
    assert teacher.calls == []
    with pytest.raises(ValidationError, match="dm_weight or gan_weight"):
        implementation.Config(dm_weight=0)
