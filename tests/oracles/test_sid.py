"""SiD against closed forms: the score identity, its golden numbers, fixed points with and without guidance."""

import math

import pytest
import torch
from torch import nn

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.parts.losses import denoising_loss, identity_loss
from stepdistill.methods.sid import SiD
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    OnGrid,
    OptimalHeads,
    Spy,
    WithFeatures,
    at,
    batch,
    corners,
    generator,
    gradients,
    player,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
SCALE, SHIFT, TIME = 0.9, 0.2, 0.55
# Where the one-step generator sits: epsilon has no x_0 at flow's t = 1, where alpha is 0.
START = 0.9


def one_step(student, teacher, critic, scale=1.0, name="sid", **config) -> SiD:
    """SiD, SiD-LSG or SiDA of a one-step student."""
    method = METHODS[name]
    roles = Roles(teacher=teacher, student=student, critic=critic, scale=scale)
    return method(method.Config(**config), roles, OnGrid(student.schedule, [START]))


class Corners(Batch):
    """A batch whose noises are the four corners and whose times are all the same: exact means of quadratics."""

    def noise(self, name):
        z, eps = corners()
        return z if name == "start" else eps

    def uniform(self, name, low=0.0, high=1.0):
        return at(TIME, 4) if "time" in name else at(0.5, 4)


def exact_batch(labels=None) -> Corners:
    rows = batch(4, labels=labels)
    return Corners(7, 0, 0, 4, (1,), rows.cond, rows.null, dtype=torch.float64)


def moments(mean, std, critic, alpha, sigma) -> tuple[float, float, float, float]:
    """k and V of data and critic: D = m + k (x - alpha m), V = alpha^2 q^2 + sigma^2."""
    v, v_fake = alpha**2 * std**2 + sigma**2, alpha**2 * critic**2 + sigma**2
    return alpha * std**2 / v, alpha * critic**2 / v_fake, v, v_fake


def test_golden_numbers():
    """Data N(0, .5^2), generator N(0, 1.5^2), EDM at sigma = 1, A = 1.2; at a = .5 both are 0."""
    schedule = SCHEDULES["edm"]
    z, eps = corners()
    t = schedule.time(torch.zeros(4))
    teacher = GaussianDenoiser(0.0, 0.5, schedule, "epsilon")

    def at_scale(value: float) -> tuple[float, float]:
        a = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        x_t = schedule.add_noise(a * z, eps, t)
        critic = affine_critic(a, 0.0, schedule, "epsilon")
        loss = identity_loss(a * z, teacher(x_t, t).x0, critic(x_t, t).x0, 1.2).mean()
        return loss.item(), torch.autograd.grad(loss, a)[0].item()

    assert [round(value, 6) for value in at_scale(1.5)] == [-0.157538, 0.309018]
    assert at_scale(0.5) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_identity_and_its_gradient(name, kind, alpha):
    """E L = (1 - A) E |r - f|^2, and d E L / da by hand, for N(0, q^2) data and a generator x = a z."""
    schedule, std = SCHEDULES[name], 0.5
    z, eps = corners()
    t = at(TIME, 4)
    student = generator(schedule, kind, SCALE, 0.0)
    x = student(z, at(START, 4), {}).x0
    x_t = schedule.add_noise(x, eps, t)
    real = GaussianDenoiser(0.0, std, schedule, kind)(x_t, t).x0
    fake = affine_critic(SCALE, 0.0, schedule, kind)(x_t, t).x0
    loss = identity_loss(x, real, fake, alpha).mean()
    assert loss.item() == pytest.approx((1 - alpha) * (real - fake).square().mean().item(), rel=1e-9, abs=1e-12)

    a, s = (c[0].item() for c in schedule.coefficients(t))
    k, k_fake, v, v_fake = moments(0.0, std, SCALE, a, s)
    assert loss.item() == pytest.approx((1 - alpha) * (k - k_fake) ** 2 * v_fake, rel=1e-9, abs=1e-12)
    inner = -1 - (alpha - 1) * a**2 * (std**2 - SCALE**2) / v
    assert gradients(loss, student)[0] == pytest.approx(2 * SCALE * a * (k - k_fake) * s**2 / v_fake * inner, rel=1e-8)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_students_gradient_is_the_closed_form(name, kind):
    """Through the input of both networks, with the weight 1 / |x - r| held fixed, whatever the networks emit."""
    schedule, (mean, std), alpha = SCHEDULES[name], G1, 1.2
    teacher = Spy(GaussianDenoiser(mean, std, schedule, kind))
    student = generator(schedule, kind, SCALE, SHIFT)
    method = one_step(student, teacher, affine_critic(SCALE, SHIFT, schedule, kind), alpha=alpha)
    found = gradients(method.losses("student", batch(32))["identity"], student)

    ((x_t, t),) = teacher.calls
    x_t = x_t.detach()
    z = batch(32).noise("start")
    x = SCALE * z + SHIFT
    a, s = (c[:, None] for c in schedule.coefficients(t))
    k, k_fake, _, _ = moments(mean, std, SCALE, a, s)
    real, fake = mean + k * (x_t - a * mean), SHIFT + k_fake * (x_t - a * SHIFT)
    outer, inner = real - fake, real - x - alpha * (real - fake)
    slope = a * (k - k_fake) * inner + outer * (a * k - 1 - alpha * a * (k - k_fake))
    slope = slope / (x - real).abs().clamp_min(1e-5)
    assert found == pytest.approx(((slope * z).mean().item(), slope.mean().item()), rel=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_data_distribution_is_a_fixed_point(name, kind, sign):
    schedule, (mean, std) = SCHEDULES[name], G1
    student = generator(schedule, kind, sign * std, mean)
    method = one_step(
        student, GaussianDenoiser(mean, std, schedule, kind), affine_critic(sign * std, mean, schedule, kind)
    )
    loss = method.losses("student", batch(64))["identity"]
    assert abs(loss.item()) < 1e-10
    assert math.hypot(*gradients(loss, student)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.5])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_data_is_a_fixed_point_at_equal_scales(name, kind, scale):
    """Class mixture: a critic that has become the teacher leaves no gradient, if both are guided alike ..."""
    schedule = SCHEDULES[name]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    student = generator(schedule, kind, M1[2][1], M1[1][1])
    rows = batch(64, labels=(1, 2))
    method = one_step(student, teacher, MixtureDenoiser(*M1, schedule, kind), scale, "sid-lsg")
    loss = method.losses("student", rows)["identity"]
    assert abs(loss.item()) < 1e-10 and math.hypot(*gradients(loss, student)) < 1e-6
    unequal = one_step(student, teacher, teacher, scale, "sid-lsg", critic_scale=3.0)
    assert math.hypot(*gradients(unequal.losses("student", rows)["identity"], student)) > 1e-3


@pytest.mark.parametrize("name,kind", ALL)
def test_an_unguided_critic_becomes_the_teacher_on_data(name, kind):
    """... and it does become the teacher where its own training is unguided."""
    schedule = SCHEDULES[name]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    student = generator(schedule, kind, M1[2][1], M1[1][1])
    rows = exact_batch(labels=(1, 2))

    def slope(train_scale: float) -> float:
        critic = player(lambda x, t, k: teacher.posterior_mean(x, t, {"class_labels": k}), schedule, kind)
        method = one_step(student, teacher, critic, 2.0, "sid-lsg", critic_train_scale=train_scale, null_dropout=0)
        return math.hypot(*gradients(method.losses("critic", rows)["denoising"], critic))

    assert slope(1.0) < 1e-6 and slope(2.0) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_trained_under_guidance_brings_the_student_to_the_guided_teacher(kind):
    """With every scale at w, u + w (c - u) learns the student's denoiser: the optimum of guided DMD, not the data.

    Data N(1, .5^2) against N(0, 1.5^2), w = 2, sigma = .2: mean 1.067599, variance .114802 (see test_dmd2).
    """
    schedule, w, sigma = SCHEDULES["edm"], 2.0, 0.2
    time = schedule.time(torch.tensor(math.log(sigma) / 4)).item()
    teacher = GaussianDenoiser(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5]), schedule, kind)
    rows = batch(2000, labels=(0, 1))

    def slopes(scale: float, shift: float) -> tuple[float, float]:
        own = affine_critic(scale, shift, schedule, kind)

        def guided_learns_own(x, t, labels):
            null = teacher.posterior_mean(x, t, {"class_labels": torch.ones_like(labels)})
            learnt = null + (own.posterior_mean(x, t) - null) / w
            return torch.where((labels == 0)[:, None], learnt, null)

        student, critic = generator(schedule, kind, scale, shift), player(guided_learns_own, schedule, kind)
        method = one_step(student, teacher, critic, w, "sid-lsg", t_min=time, t_max=time, null_dropout=0)
        trained = gradients(method.losses("critic", exact_batch(labels=(0, 1)))["denoising"], critic)
        moved = gradients(method.losses("student", rows)["identity"], student)
        return math.hypot(*trained), math.hypot(*moved)

    assert slopes(0.114802**0.5, 1.067599) == pytest.approx((0.0, 0.0), abs=1e-4)
    trained, moved = slopes(0.5, 1.0)
    assert trained < 1e-6 and moved > 1e-2


def test_conditions_are_dropped_for_the_critic_alone():
    schedule = SCHEDULES["flow"]
    labelled = generator(schedule, "flow", 1.0, 0.0)
    method = one_step(labelled, labelled, labelled, 2.0, "sid-lsg")
    rows = batch(4000, labels=(3, 9))
    asked = Conditioned(labelled)
    method = one_step(asked, labelled, labelled, 2.0, "sid-lsg")
    method.losses("student", rows)
    assert set(asked.seen) == {3}
    asked = Conditioned(labelled)
    method = one_step(labelled, labelled, asked, 2.0, "sid-lsg", critic_train_scale=1.0)
    method.losses("critic", rows)
    assert set(asked.seen) == {3, 9} and asked.seen.count(9) / 4000 == pytest.approx(0.1, abs=0.02)
    method.losses("critic", rows)
    assert set(asked.seen) == {3, 9}


class Conditioned(Spy):
    """Remembers the classes it was asked for."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.seen = []

    def __call__(self, x_t, t, cond):
        self.seen += cond["class_labels"].tolist()
        return super().__call__(x_t, t, cond)


def test_critic_and_student_see_samples_of_their_own():
    schedule = SCHEDULES["vp"]
    student = Spy(generator(schedule, "v", SCALE, SHIFT))
    critic = Spy(generator(schedule, "v", 1.0, 0.0))
    method = one_step(student, GaussianDenoiser(*G1, schedule, "v"), critic, critic_steps=2)
    assert method.turns(0) == method.turns(7) == ("critic", "critic", "student")
    rows = batch()
    for turn, player_name in enumerate(method.turns(0)):
        rows.turn = turn
        method.losses(player_name, rows)
    starts = [x_t for x_t, _ in student.calls]
    assert len(starts) == 3 and not torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    times = [t for _, t in critic.calls]
    assert len({tuple(t.tolist()) for t in times}) == 3


def test_the_unguided_critic_learns_as_in_every_other_method():
    schedule = SCHEDULES["vp"]
    student, critic = generator(schedule, "v", SCALE, SHIFT), Spy(generator(schedule, "v", 0.7, 0.1))
    method = one_step(student, GaussianDenoiser(*G1, schedule, "v"), critic)
    found = method.losses("critic", batch(16))["denoising"]
    x, t = SCALE * batch(16).noise("start") + SHIFT, critic.calls[0][1]
    expected = denoising_loss(critic, x, t, batch(16).noise("critic"), {})
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["sid", "sid-lsg"])
def test_only_the_moving_player_receives_gradients(name):
    schedule = SCHEDULES["vp"]
    teacher, student, critic = (generator(schedule, "v", 1.0, 0.1 * i) for i in range(3))
    method = one_step(student, teacher, critic, 1.5, name)
    networks = {"teacher": teacher.network, "student": student.network, "critic": critic.network}
    for mover in method.players:
        for role, network in networks.items():
            network.zero_grad(set_to_none=True)
            network.requires_grad_(role == mover)  # as the trainer does: the others still carry the graph
        sum(method.losses(mover, batch(labels=(0, 1))).values()).backward()
        assert {role for role, net in networks.items() if any(p.grad is not None for p in net.parameters())} == {mover}
        assert {id(module) for module in method.modules(mover)} == {id(networks[mover])}


def test_the_adversarial_term():
    """SiDA's logit on the critic's features: ln 2 and 2 ln 2 at equal distributions, times the weights."""
    schedule = SCHEDULES["flow"]
    real, fake = GaussianDenoiser(*G1, schedule, "flow"), GaussianDenoiser(SHIFT, SCALE, schedule, "flow")
    student, critic = generator(schedule, "flow", SCALE, SHIFT), WithFeatures(fake)
    critic.network = nn.Identity()
    method = one_step(student, real, critic, name="sida", gan_weight=0.3, gan_critic_weight=0.02)
    assert method.data_needs(method.config).images and not SiD.data_needs(SiD.Config()).images
    method.gan.heads = OptimalHeads(real, fake)
    found = gradients(method.losses("student", batch(32))["gan"], student)
    x_t, t = critic.calls[-1]
    logit = (real.log_density(x_t, t) - fake.log_density(x_t, t))[:, None]
    slope = -0.3 * torch.sigmoid(-logit) * schedule.alpha(t)[:, None] * (real.score(x_t, t) - fake.score(x_t, t))
    expected = ((slope * batch(32).noise("start")).mean().item(), slope.mean().item())
    assert found == pytest.approx(expected, rel=1e-8)

    method.gan.heads = OptimalHeads(real, real)
    images = torch.randn(16, 1, dtype=torch.float64)
    assert method.losses("student", batch(16))["gan"].item() == pytest.approx(0.3 * math.log(2))
    assert method.losses("critic", batch(16, latents=images))["gan"].item() == pytest.approx(0.04 * math.log(2))
    assert method.modules("critic") == [critic.network, method.gan.heads]
    assert method.modules("student") == [student.network] and method.extra_modules() == {"heads": method.gan.heads}


class LearntGaussian(nn.Module):
    """A critic with two parameters: the denoiser of N(mean, std^2)."""

    def __init__(self, schedule, mean, std):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(math.log(std), dtype=torch.float64))

    def forward(self, x, timestep):
        t = self.schedule.time(timestep)
        alpha, sigma = (c[:, None] for c in self.schedule.coefficients(t))
        variance = self.log_std.exp() ** 2
        x0 = self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * self.mean)
        return self.schedule.from_x0(x0, x, t, "v")


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_a_student_with_a_learning_critic_finds_the_data(alpha):
    schedule, (mean, std) = SCHEDULES["vp"], G1
    student = generator(schedule, "v", 1.0, 0.0)
    network = LearntGaussian(schedule, 0.0, 1.0)
    critic = Denoiser(network, CallSpec("x", "timestep", timestep_dtype=torch.float64), schedule, "v")
    method = one_step(student, GaussianDenoiser(mean, std, schedule, "v"), critic, alpha=alpha)
    optimizers = {
        "critic": torch.optim.Adam(network.parameters(), 0.05, betas=(0.0, 0.999)),
        "student": torch.optim.Adam(student.network.parameters(), 0.03, betas=(0.0, 0.999)),
    }
    visited = []
    for step in range(120):
        # With one element a sample, 1 / |x - r| would follow that element's noise, and the identity would not hold.
        rows = batch(32, step).but(shape=(16,))
        for turn, mover in enumerate(method.turns(step)):
            rows.turn = turn
            optimizers[mover].zero_grad()
            sum(method.losses(mover, rows).values()).backward()
            optimizers[mover].step()
        visited.append((student.network.scale.item(), student.network.shift.item()))
    scale, shift = torch.tensor(visited[-40:]).mean(0).tolist()
    assert scale == pytest.approx(std, abs=0.03) and shift == pytest.approx(mean, abs=0.03)
