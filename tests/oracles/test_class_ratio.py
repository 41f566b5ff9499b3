"""DiffRatio against closed forms: the exact ratio gives the divergence's gradient; the teacher is never called."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from stepdistill.diffusion.schedule import VPSchedule
from stepdistill.methods import METHODS, Roles
from stepdistill.testing.analytic import GaussianDenoiser, affine_critic
from stepdistill.testing.bed import (
    G1,
    KINDS,
    SCHEDULES,
    OnGrid,
    OptimalHeads,
    Spy,
    WithFeatures,
    at,
    batch,
    generator,
    gradients,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
GOLDEN = VPSchedule(torch.tensor([0.99, 0.64, 0.01]))


def method_of(schedule, kind, data=G1, a=0.9, b=0.2, time=None, **config):
    """DiffRatio whose heads are the exact log ratio of data and samples of x = a z + b."""
    implementation = METHODS["diff-ratio"]
    student, fake = generator(schedule, kind, a, b), affine_critic(a, b, schedule, kind)
    real = GaussianDenoiser(*data, schedule, kind)
    roles = Roles(teacher=Spy(real), student=student, critic=WithFeatures(fake))
    method = implementation(implementation.Config(**config), roles, OnGrid(schedule, [0.9]))
    method.ratio.heads = OptimalHeads(real, fake)
    if time is not None:
        method.ratio.times = lambda rows, name: at(time, rows.size)
    return method


@pytest.mark.parametrize("name,kind", ALL)
def test_the_reverse_kl_is_the_difference_of_scores(name, kind):
    """Without a pass of the teacher: d(-l)/dx = alpha (s_fake - s_real) at times of the matching range."""
    schedule = SCHEDULES[name]
    method, rows = method_of(schedule, kind), batch(32)
    found = gradients(method.losses("student", rows)["ratio"], method.roles.student)
    ((x_t, t),) = method.roles.critic.calls
    assert t.min() >= 0.0195 and t.max() <= 0.9805 and len(t.unique()) > 20
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    real = -(x_t - alpha * G1[0]) / (alpha**2 * G1[1] ** 2 + sigma**2)
    fake = -(x_t - alpha * 0.2) / (alpha**2 * 0.9**2 + sigma**2)
    slope = alpha * (fake - real)
    assert found == pytest.approx(((slope * rows.noise("start")).mean().item(), slope.mean().item()), rel=1e-7)
    assert method.roles.teacher.calls == []


def test_golden_logit():
    """EDM sigma = 1, data N(.7, .5^2), samples N(.2, .7^2), x = .8: logit .204622, slope .322685."""
    schedule = SCHEDULES["edm"]
    time = schedule.time(torch.zeros(1, dtype=torch.float64)).item()  # ln(1)/4
    method = method_of(schedule, "v", a=0.7, b=0.2, time=time)
    rows = batch(1)
    z = 0.3
    rows.noise = lambda name: torch.tensor([[z if name == "start" else 0.8 - (0.7 * z + 0.2)]], dtype=torch.float64)
    loss = method.losses("student", rows)["ratio"]
    assert loss.item() == pytest.approx(-0.204622, abs=1e-6)
    assert gradients(loss, method.roles.student)[1] == pytest.approx(-0.322685, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [("forward-kl", (-0.166320, -0.116182)), ("reverse-kl", None), ("squared-hellinger", None)],
)
def test_the_potential_gives_the_gradient_of_the_divergence(divergence, golden):
    """Data N(.3, .9^2), a = .8, b = .1, alpha = .8, sigma = .6: quadrature over z, eps against finite differences."""
    method = method_of(GOLDEN, "v", (0.3, 0.9), 0.8, 0.1, 0.5, divergence=divergence)
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(60))
    z, eps = (grid.flatten()[:, None] for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    measure = (weights[:, None] * weights).flatten() / (2 * math.pi)
    rows = batch(len(z))
    rows.noise = lambda name: z if name == "start" else eps
    # The loss is a mean over rows; with rows weighted it is the mean over z and eps.
    method.ratio.heads = Weighted(method.ratio.heads, measure * len(z))
    a, b = gradients(method.losses("student", rows)["ratio"], method.roles.student)

    f = {
        "forward-kl": lambda r: r * r.log(),
        "reverse-kl": lambda r: -r.log(),
        "squared-hellinger": lambda r: 4 * (1 - r.sqrt()),
    }[divergence]
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    half = at(0.5, len(x))
    real = GaussianDenoiser(0.3, 0.9, GOLDEN, "v").log_density(x, half)

    def value(a, b):
        fake = affine_critic(a, b, GOLDEN, "v").log_density(x, half)
        return (fake.exp() * f((real - fake).exp())).sum().item() * 18 / 20000

    h = 1e-5
    exact = (value(0.8 + h, 0.1) - value(0.8 - h, 0.1)) / (2 * h), (value(0.8, 0.1 + h) - value(0.8, 0.1 - h)) / (2 * h)
    assert (a, b) == pytest.approx(exact, abs=1e-6)
    if golden:
        assert (b, a) == pytest.approx(golden, abs=1e-6)


class Weighted(nn.Module):
    """The exact logit with each row's slope weighted."""

    def __init__(self, heads, weight):
        super().__init__()
        self.heads, self.weight = heads, weight

    def forward(self, states, condition=None):
        logit = self.heads(states)
        return logit.detach() + self.weight[:, None] * (logit - logit.detach())


@pytest.mark.parametrize("name", SCHEDULES)
def test_at_the_data_the_student_stays_and_the_classifier_is_blind(name):
    schedule = SCHEDULES[name]
    method = method_of(schedule, "v", a=G1[1], b=G1[0])
    rows = batch(16)
    rows = rows.but(latents=G1[0] + G1[1] * rows.noise("real"))
    assert math.hypot(*gradients(method.losses("student", rows)["ratio"], method.roles.student)) < 1e-9
    assert method.losses("critic", rows)["ratio"].item() == pytest.approx(2 * math.log(2), abs=1e-9)
    (x_t, t), (fake_x, fake_t) = method.roles.critic.calls[-2:]
    assert torch.equal(t, fake_t)
    alpha, _ = schedule.coefficients(t)
    torch.testing.assert_close(x_t - fake_x, alpha[:, None] * (rows.latents - rows.state["x"]))


def test_the_critic_is_trained_whole_and_alone():
    implementation = METHODS["diff-ratio"]
    assert implementation.role_training(implementation.Config()) == {"critic": "full"}
    schedule = SCHEDULES["flow"]
    method = method_of(schedule, "v")
    critic = generator(schedule, "v", 1.1, -0.4)
    method.roles.critic = critic
    method.ratio.denoiser = critic
    critic.features = lambda x_t, t, cond, depths: [critic(x_t, t, cond).x0]
    method.ratio.heads = nn.Linear(1, 1, dtype=torch.float64)
    method.ratio.heads.forward = lambda states, condition=None, layer=method.ratio.heads: nn.functional.linear(
        states[0], layer.weight, layer.bias
    )
    assert method.modules("critic") == [critic.network, method.ratio.heads]
    rows = batch(8)
    rows = rows.but(latents=rows.noise("real"))
    loss = method.losses("critic", rows)["ratio"]
    everyone = [*method.roles.student.network.parameters(), *critic.network.parameters()]
    slopes = torch.autograd.grad(loss, everyone, allow_unused=True)
    assert slopes[:2] == (None, None) and all(slope.abs() > 0 for slope in slopes[2:])
