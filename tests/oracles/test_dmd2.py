"""DMD2 against closed forms: gradients, optima, backward simulation, the two clocks and the discriminator."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.samplers import Renoise
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.methods import Roles
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.parts.losses import denoising_loss, dmd_gradient, surrogate
from stepdistill.methods.trajectory import TrajectoryConfig, TrajectoryRegression
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
    column,
    corners,
    generator,
    gradients,
    player,
)

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
SCALE, SHIFT = 0.9, 0.2
# Where the one-step generator sits: epsilon has no x_0 at flow's t = 1, where alpha is 0.
START = 0.9


def one_step(student, teacher, critic, scale=1.0, **config) -> DMD2:
    """DMD2 of a one-step student."""
    roles = Roles(teacher=teacher, student=student, critic=critic, scale=scale)
    return DMD2(DMD2Config(**config), roles, OnGrid(student.schedule, [START]))


def test_the_surrogate_has_the_gradient():
    x, real, fake = torch.randn(3, 4, 2, 5, dtype=torch.float64).unbind()
    x.requires_grad_()
    gradient = dmd_gradient(x.detach(), real, fake)
    for row in range(4):
        expected = (fake[row] - real[row]) / (x[row] - real[row]).abs().mean()
        torch.testing.assert_close(gradient[row], expected.detach())
    (found,) = torch.autograd.grad(surrogate(x, gradient), x)
    torch.testing.assert_close(found, gradient / x.numel())


@pytest.mark.parametrize("name,kind", ALL)
def test_the_students_gradient_is_the_closed_form(name, kind):
    """d loss / d(a, b) = mean of (D_fake - D_real) / |x - D_real| times (z, 1), whatever the networks emit."""
    schedule = SCHEDULES[name]
    teacher = Spy(GaussianDenoiser(*G1, schedule, kind))
    student = generator(schedule, kind, SCALE, SHIFT)
    method = one_step(student, teacher, affine_critic(SCALE, SHIFT, schedule, kind))
    rows = batch(32)
    found = gradients(sum(method.losses("student", rows).values()), student)

    ((x_t, t),) = teacher.calls
    z = batch(32).noise("start")
    x = SCALE * z + SHIFT
    assert torch.equal(rows.state["x"], student(z, at(START, 32), {}).x0)
    mean, std = G1
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    real = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    fake = SHIFT + alpha * SCALE**2 / (alpha**2 * SCALE**2 + sigma**2) * (x_t - alpha * SHIFT)
    gradient = (fake - real) / (x - real).abs()
    expected = ((gradient * z).mean().item(), gradient.mean().item())
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_times_stay_in_range_and_differ_between_samples():
    schedule = SCHEDULES["vp"]
    teacher = Spy(GaussianDenoiser(*G1, schedule, "v"))
    method = one_step(generator(schedule, "v", 1.0, 0.0), teacher, affine_critic(1.0, 0.0, schedule, "v"))
    method.losses("student", batch(500))
    times = teacher.calls[0][1]
    assert times.min() >= 0.0195 and times.max() <= 0.9805 and len(times.unique()) > 300
    assert times.max() - times.min() > 0.9


@pytest.mark.parametrize("name,kind", ALL)
def test_without_normaliser_the_gradient_is_that_of_the_divergence(name, kind):
    """d KL / db = alpha^2 (b - m) / V and d KL / da = alpha^2 a (1/V - 1/A), up to the factor sigma^2 / alpha^2."""
    schedule, (mean, std) = SCHEDULES[name], G1
    student = generator(schedule, kind, SCALE, SHIFT)
    z, eps = corners()
    x, t = student(z, at(START, 4), {}).x0, at(0.55, 4)
    x_t = schedule.add_noise(x.detach(), eps, t)
    real, fake = GaussianDenoiser(mean, std, schedule, kind), affine_critic(SCALE, SHIFT, schedule, kind)
    found = gradients(surrogate(x, fake(x_t, t, {}).x0 - real(x_t, t, {}).x0), student)
    alpha, sigma = (c[0].item() for c in schedule.coefficients(t))
    v, a = alpha**2 * std**2 + sigma**2, alpha**2 * SCALE**2 + sigma**2
    divergence = (alpha**2 * SCALE * (1 / v - 1 / a), alpha**2 * (SHIFT - mean) / v)
    assert [g * alpha**2 / sigma**2 for g in found] == pytest.approx(divergence, rel=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_data_distribution_is_a_fixed_point(name, kind, sign):
    schedule, (mean, std) = SCHEDULES[name], G1
    student = generator(schedule, kind, sign * std, mean)
    method = one_step(
        student, GaussianDenoiser(mean, std, schedule, kind), affine_critic(sign * std, mean, schedule, kind)
    )
    loss = method.losses("student", batch(64))["dm"]
    assert loss.item() < 1e-12
    assert math.hypot(*gradients(loss, student)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_guided_optimum_is_stationary(kind):
    """Guidance moves the mean outward and shrinks the spread: N(1, .5^2) against N(0, 1.5^2), w = 2, sigma = .2."""
    schedule, w, sigma = SCHEDULES["edm"], 2.0, 0.2
    wide, narrow = 1.5**2 + sigma**2, 0.5**2 + sigma**2
    precision = (1 - w) / wide + w / narrow
    shift, variance = w / narrow / precision, 1 / precision - sigma**2
    assert (round(shift, 6), round(variance, 6)) == (1.067599, 0.114802)

    teacher = GaussianDenoiser(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5]), schedule, kind)
    time = schedule.time(torch.tensor(math.log(sigma) / 4)).item()

    def slope(scale: float, shift: float, guidance: float) -> tuple[float, float]:
        student, critic = generator(schedule, kind, scale, shift), affine_critic(scale, shift, schedule, kind)
        method = one_step(student, teacher, critic, scale=guidance, t_min=time, t_max=time)
        return gradients(method.losses("student", batch(2000, labels=(0, 1)))["dm"], student)

    assert math.hypot(*slope(variance**0.5, shift, w)) < 1e-6
    assert slope(variance**0.5, shift + 0.1, w)[1] > 1e-2 > -1e-2 > slope(variance**0.5, shift - 0.1, w)[1]
    assert slope(variance**0.5 + 0.1, shift, w)[0] > 1e-2 > -1e-2 > slope(variance**0.5 - 0.1, shift, w)[0]
    assert math.hypot(*slope(0.5, 1.0, 1.0)) < 1e-6


@pytest.mark.parametrize("source", ["vp", "flow"])
def test_backward_simulation_stays_on_the_marginals(source):
    """The exact one-step map brings p_t to p_0, so the rollout's x at t_k has the teacher's marginal there."""
    scheduler = {
        "vp": DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
    }[source]
    schedule, kind = from_scheduler(scheduler)
    mean, std = G1

    def exact(x, t, labels):
        alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
        return mean + std * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()

    student = player(exact, schedule, kind)
    sampler = Renoise(schedule, scheduler, 4)
    teacher = GaussianDenoiser(mean, std, schedule, kind)
    method = DMD2(DMD2Config(), Roles(teacher=teacher, student=student, critic=teacher), sampler)
    grid = sampler.grid()
    assert len(grid) == 4 and grid[0].t == 1.0 and [step.r for step in grid[:-1]] == [step.t for step in grid[1:]]
    if source == "vp":
        assert [round(step.t * 999) for step in grid] == [999, 749, 499, 249]
    size = 50_000
    for k, step in enumerate(grid):
        x = method.backward_simulation(batch(size), k)
        alpha, sigma = (c.item() for c in schedule.coefficients(at(step.t)))
        variance = alpha**2 * std**2 + sigma**2
        assert not x.requires_grad
        assert abs(x.mean().item() - alpha * mean) < 3 * math.sqrt(variance / size)
        assert abs(x.var().item() - variance) < 3 * variance * math.sqrt(2 / size)


def test_every_grid_position_is_trained_on_the_students_own_rollout():
    schedule = SCHEDULES["vp"]
    student = Spy(generator(schedule, "v", 0.5, 0.4))
    times = [1.0, 749 / 999, 499 / 999, 249 / 999]
    roles = Roles(teacher=None, student=student, critic=None)
    method = DMD2(DMD2Config(), roles, OnGrid(schedule, times))
    visits = [0] * 4
    for step in range(60):
        x0 = method.generate(batch(2, step))
        x_t, t = student.calls[-1]
        k = times.index(t[0].item())
        visits[k] += 1
        assert torch.equal(x_t, method.backward_simulation(batch(2, step), k))
        torch.testing.assert_close(x0, 0.5 * x_t + 0.4)
    assert min(visits) > 5


@pytest.mark.parametrize("ratio", [1, 5])
def test_the_student_moves_every_ratio_th_step(ratio):
    schedule = SCHEDULES["flow"]
    any_player = generator(schedule, "flow", 1.0, 0.0)
    method = one_step(any_player, any_player, any_player, critic_steps=ratio)
    for steps in (1, 4, 5, 6, 23):
        turns = [turn for step in range(steps) for turn in method.turns(step)]
        assert turns.count("student") == math.ceil(steps / ratio) and turns.count("critic") == steps
    warm = one_step(any_player, any_player, any_player, critic_steps=ratio, critic_warmup=3, regression_steps=2)
    turns = [tuple(warm.turns(step)) for step in range(6)]
    assert turns[:2] == [("student",)] * 2 and turns[2:5] == [("critic",)] * 3 and "student" in turns[5]


@pytest.mark.parametrize("name,kind", ALL)
def test_the_perfect_critic_has_the_lowest_denoising_loss(name, kind):
    """The floor is the posterior variance a^2 sigma^2 / A, in the unit of what the network emits; no gradient there."""
    schedule = SCHEDULES[name]
    z, eps = corners()
    t = at(0.55, 4)
    perfect = affine_critic(SCALE, SHIFT, schedule, kind)
    critic = player(lambda x, t, labels: perfect.posterior_mean(x, t), schedule, kind)
    loss = denoising_loss(critic, SCALE * z + SHIFT, t, eps, {})
    alpha, sigma = (c[0].item() for c in schedule.coefficients(t))
    unit = {
        "epsilon": alpha / sigma,
        "v": (alpha**2 + sigma**2) / sigma,
        "edm": (alpha**2 + sigma**2) / sigma,
        "flow": (alpha + sigma) / sigma,
        "sample": 1.0,
    }[kind]
    floor = SCALE**2 * sigma**2 / (alpha**2 * SCALE**2 + sigma**2)
    assert loss.item() == pytest.approx(unit**2 * floor, rel=1e-10)
    assert math.hypot(*gradients(loss, critic)) < 1e-6


def test_only_the_moving_player_receives_gradients():
    schedule = SCHEDULES["vp"]
    teacher, student, critic = (generator(schedule, "v", 1.0, 0.1 * i) for i in range(3))
    method = one_step(student, teacher, critic)
    networks = {"teacher": teacher.network, "student": student.network, "critic": critic.network}

    def moved() -> set[str]:
        found = {name for name, net in networks.items() if any(p.grad is not None for p in net.parameters())}
        for net in networks.values():
            net.zero_grad(set_to_none=True)
        return found

    rows = batch()
    for mover in method.players:
        sum(method.losses(mover, rows).values()).backward()
        assert moved() == {mover}
        assert {id(module) for module in method.modules(mover)} == {id(networks[mover])}
    # The critic's turn without a preceding student's turn.
    sum(method.losses("critic", batch()).values()).backward()
    assert moved() == {"critic"}


def test_the_critic_learns_from_the_sample_the_student_was_judged_by():
    schedule = SCHEDULES["flow"]
    student, critic = generator(schedule, "flow", 1.0, 0.0), Spy(generator(schedule, "flow", 1.0, 0.3))
    method = one_step(student, GaussianDenoiser(*G1, schedule, "flow"), critic)
    rows = batch()
    method.losses("student", rows)
    x = rows.state["x"]
    method.losses("critic", rows)
    assert torch.equal(rows.state["x"], x) and not x.requires_grad
    (x_dm, t_dm), (x_critic, t_critic) = critic.calls
    assert not torch.equal(t_dm, t_critic) and not torch.equal(x_dm, x_critic)


# Data and generator, EDM at sigma = 1.
REAL, FAKE = G1, (0.2, 0.7)


def test_the_optimal_logit_and_its_gradient():
    schedule = SCHEDULES["edm"]
    real, fake = (GaussianDenoiser(*moments, schedule, "epsilon") for moments in (REAL, FAKE))
    x, t = column(0.8).requires_grad_(), schedule.time(torch.zeros(1))
    logit = OptimalHeads(real, fake)([x, t])
    (gradient,) = torch.autograd.grad(logit.sum(), x)
    assert round(logit.item(), 6) == 0.204622 and round(gradient.item(), 6) == 0.322685
    torch.testing.assert_close(gradient, real.score(x, t) - fake.score(x, t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gan_term_pulls_along_the_score_difference(name):
    """d/dx softplus(-l(x_t)) = -sigmoid(-l) alpha (s_real - s_fake) with the optimal logit l."""
    schedule = SCHEDULES[name]
    real, fake = (GaussianDenoiser(*moments, schedule, "v") for moments in (REAL, FAKE))
    student, critic = generator(schedule, "v", FAKE[1], FAKE[0]), WithFeatures(fake)
    method = one_step(student, real, critic, gan_weight=0.3)
    method.gan.heads = OptimalHeads(real, fake)
    found = gradients(method.losses("student", batch(32))["gan"], student)
    x_t, t = critic.calls[-1]
    logit = (real.log_density(x_t, t) - fake.log_density(x_t, t))[:, None]
    alpha = schedule.alpha(t)[:, None]
    slope = -0.3 * torch.sigmoid(-logit) * alpha * (real.score(x_t, t) - fake.score(x_t, t))
    expected = ((slope * batch(32).noise("start")).mean().item(), slope.mean().item())
    assert found == pytest.approx(expected, rel=1e-8)


def test_the_discriminator_cannot_tell_equal_distributions_apart():
    schedule = SCHEDULES["flow"]
    real = GaussianDenoiser(*REAL, schedule, "flow")
    critic = WithFeatures(real)
    method = one_step(
        generator(schedule, "flow", REAL[1], REAL[0]), real, critic, gan_weight=1.0, gan_critic_weight=0.01
    )
    method.gan.heads = OptimalHeads(real, real)
    loss = method.losses("critic", batch(16, latents=torch.randn(16, 1, dtype=torch.float64)))["gan"]
    assert loss.item() == pytest.approx(0.01 * 2 * math.log(2))


def test_the_warm_up_is_trajectory_regression():
    schedule, rows = SCHEDULES["vp"], batch(8)
    student, teacher = generator(schedule, "v", 0.9, 0.2), Spy(GaussianDenoiser(*G1, schedule, "v"))
    method = one_step(student, teacher, None, regression_steps=1, regression_substeps=5)
    sfd = TrajectoryRegression(TrajectoryConfig(substeps=5), method.roles, method.sampler)
    found = method.losses("student", rows)["regression"]
    assert len(teacher.calls) == 5
    assert torch.equal(found, sfd.losses("student", batch(8))["regression"])
    method.roles.critic = generator(schedule, "v", 1.0, 0.0)
    assert set(method.losses("student", batch(8, step=1))) == {"dm"}
