"""The teachers with a known answer against golden numbers that were computed independently, in float64."""

import itertools
import math

import pytest
import torch

from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.schedule import EDMSchedule, FlowSchedule, VPSchedule
from stepdistill.testing.analytic import LABELS, AnalyticDenoiser, GaussianDenoiser, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import G1, KINDS, M1, SCHEDULES, SD_TABLE, at, column, corners, ddim_path

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
# Sigma small enough for the clean end to be reached to seven digits.
EDM_TO_ZERO = EDMSchedule(sigma_min=1e-7)


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def labelled(label: int, size: int = 1) -> dict[str, torch.Tensor]:
    return {LABELS: torch.full((size,), label)}


def distributions(schedule, kind="epsilon") -> list[AnalyticDenoiser]:
    return [GaussianDenoiser(*G1, schedule, kind), MixtureDenoiser(*M1, schedule, kind)]


# D of class 2 and of guidance w = 3 at x = .8.
GUIDED = {
    "vp angle .6": (VPSchedule(torch.tensor([math.cos(0.6) ** 2], dtype=torch.float64)), 0.0, 0.989312, 1.002687),
    "flow t = .5": (FlowSchedule(), 0.5, 1.120000, 1.166995),
    "edm sigma = 1": (EDMSchedule(), EDMSchedule().time(torch.zeros(1)).item(), 0.960000, 1.233424),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GUIDED)
def test_class_and_guided_posterior_means(name, kind):
    schedule, time, of_class, of_guidance = GUIDED[name]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    x, t = column(0.8), at(time)
    assert rounded(teacher(x, t, labelled(1)).x0) == [of_class]
    prediction = guided(teacher, x, t, labelled(1), labelled(2), 3.0)
    assert rounded(prediction.x0) == [of_guidance]
    if name == "flow t = .5":
        assert rounded(prediction.eps) == [0.433005] and rounded(prediction.velocity) == [-0.733990]


@pytest.mark.parametrize("name,kind", ALL)
def test_the_call_means_the_posterior_mean(name, kind):
    schedule = SCHEDULES[name]
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for teacher in distributions(schedule, kind):
        prediction = teacher(x, t)
        assert prediction.raw.dtype == torch.float64
        torch.testing.assert_close(prediction.x0, teacher.posterior_mean(x, t), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.score, teacher.score(x, t), rtol=1e-8, atol=1e-8)
        assert teacher(x.float(), t).raw.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 4)])
def test_score_is_the_gradient_of_the_log_density(name, shape):
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    for teacher in distributions(SCHEDULES[name]):
        (gradient,) = torch.autograd.grad(teacher.log_density(x, t).sum(), x)
        torch.testing.assert_close(teacher.score(x, t), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_mean_is_the_integral(name):
    """E[x_0 | x_t] and p(x_t) by quadrature over x_0."""
    schedule = SCHEDULES[name]
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    x, t = column(-0.9, 0.3, 1.4), torch.tensor([0.3, 0.5, 0.6], dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    likelihood = torch.exp(-((x - alpha * grid) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    weights, means, stds = (torch.tensor(v, dtype=torch.float64)[:, None] for v in M1)
    prior = (weights * torch.exp(-(((grid - means) / stds) ** 2) / 2) / (stds * math.sqrt(2 * math.pi))).sum(0)
    density = torch.trapezoid(likelihood * prior, grid)
    mean = torch.trapezoid(likelihood * prior * grid, grid) / density
    teacher = MixtureDenoiser(*M1, schedule, "v")
    torch.testing.assert_close(teacher.posterior_mean(x, t)[:, 0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(teacher.log_density(x, t).exp(), density, rtol=1e-8, atol=1e-8)


def test_responsibilities_are_those_of_the_whole_sample():
    """In d dimensions with means on an axis: the first coordinate is 1-D, the others are a Gaussian's."""
    schedule, t = SCHEDULES["flow"], at(0.5, 4)
    means = torch.tensor([[-1.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64)
    plane = MixtureDenoiser([0.4, 0.6], means, [0.5, 0.5], schedule, "flow").posterior_mean(x, t)
    line = MixtureDenoiser([0.4, 0.6], [-1.5, 1.0], [0.5, 0.5], schedule, "flow").posterior_mean(x[:, :1], t)
    other = GaussianDenoiser(0.0, 0.5, schedule, "flow").posterior_mean(x[:, 1:], t)
    torch.testing.assert_close(plane, torch.cat([line, other], 1))


def test_labels_select_components_and_the_null_label_the_mixture():
    schedule = SCHEDULES["flow"]
    mixture, x, t = MixtureDenoiser(*M1, schedule, "flow"), column(0.2, 0.2, 0.2, 0.2), at(0.4, 4)
    found = mixture.posterior_mean(x, t, {LABELS: torch.tensor([0, 1, 2, 2])})
    for row, (mean, std) in enumerate(zip(*M1[1:], strict=True)):
        expected = GaussianDenoiser(mean, std, schedule, "flow").posterior_mean(x, t)
        torch.testing.assert_close(found[row], expected[row])
    torch.testing.assert_close(found[2:], mixture.posterior_mean(x, t)[2:])
    table = GaussianDenoiser(torch.tensor(M1[1]), torch.tensor(M1[2]), schedule, "flow")
    rows = table.posterior_mean(x, t, {LABELS: torch.tensor([0, 1, 0, 1])})
    torch.testing.assert_close(rows[:2], found[:2], rtol=1e-6, atol=1e-6)


ENDPOINTS = {
    "flow": (FlowSchedule(), 1.0, [-1.578618, 0.516289, 1.314881]),
    "edm": (EDM_TO_ZERO, 80.0, [-1.578556, 0.516289, 1.314799]),
    "vp": (SCHEDULES["vp"], 1.0, [-1.577559, 0.515215, 1.313868]),
}


@pytest.mark.parametrize("name", ENDPOINTS)
def test_flow_endpoints_of_the_mixture(name):
    schedule, scale, expected = ENDPOINTS[name]
    teacher = MixtureDenoiser(*M1, schedule, "epsilon")
    x = column(-scale, 0.0, scale)
    clean = teacher.flow_map(x, at(1.0, 3), at(0.0, 3))
    assert rounded(clean) == expected
    torch.testing.assert_close(teacher.flow_map(clean, at(0.0, 3), at(1.0, 3)), x, rtol=1e-9, atol=1e-9)


def test_the_flow_map_holds_in_both_tails_and_for_one_component():
    schedule = SCHEDULES["flow"]
    x = column(-9.0, -5.0, 5.0, 9.0)
    mixture, gaussian = MixtureDenoiser([1.0], [0.7], [0.5], schedule, "flow"), GaussianDenoiser(*G1, schedule, "flow")
    torch.testing.assert_close(
        mixture.flow_map(x, at(1.0, 4), at(0.2, 4)), gaussian.flow_map(x, at(1.0, 4), at(0.2, 4))
    )
    labels = labelled(1, 4)
    of_class = GaussianDenoiser(M1[1][1], M1[2][1], schedule, "flow").flow_map(x, at(1.0, 4), at(0.2, 4))
    found = MixtureDenoiser(*M1, schedule, "flow").flow_map(x, at(1.0, 4), at(0.2, 4), labels)
    torch.testing.assert_close(found, of_class)
    with pytest.raises(ValueError, match="one element per sample, not 2"):
        mixture.flow_map(torch.zeros(1, 2), at(1.0), at(0.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_map_follows_the_velocity(name):
    """d Phi / d natural time = E[dx/dtime | x_t], by central differences along the path."""
    schedule = SCHEDULES[name]
    t, step = at(0.6, 3), 1e-5
    x = column(-0.7, 0.1, 1.1)
    natural = {"vp": lambda a, s: torch.atan2(s, a), "flow": lambda a, s: s, "edm": lambda a, s: s}[name]
    rise = natural(*schedule.coefficients(t + step)) - natural(*schedule.coefficients(t - step))
    for teacher in distributions(schedule):
        slope = (teacher.flow_map(x, t, t + step) - teacher.flow_map(x, t, t - step)) / rise[:, None]
        torch.testing.assert_close(slope, teacher(x, t).velocity, rtol=1e-5, atol=1e-5)


def test_gaussian_golden_numbers():
    edm, flow = GaussianDenoiser(*G1, EDM_TO_ZERO, "epsilon"), GaussianDenoiser(*G1, FlowSchedule(), "flow")
    four = EDM_TO_ZERO.time(torch.tensor([math.log(4) / 4], dtype=torch.float64))
    assert rounded(edm.flow_map(column(3.0), four, at(0.0))) == [0.985280]
    average = (column(0.8) - flow.flow_map(column(0.8), at(0.8), at(0.2))) / 0.6
    assert rounded(average) == [-0.210170]
    assert rounded(ddim_path(flow.posterior_mean, column(0.8), [0.8, 0.6, 0.4], flow.schedule)) == [0.800769]


DDIM_50 = [*range(999, 0, -20), 0]


def test_fifty_ddim_steps_on_the_stable_diffusion_table():
    """The trajectory of a discrete solver, which is what consistency distillation learns, is not the exact flow."""
    schedule = VPSchedule(SD_TABLE)
    times = [step / 999 for step in DDIM_50]
    assert len(times) == 51
    gaussian = GaussianDenoiser(0.0, 0.5, schedule, "epsilon")
    assert rounded(ddim_path(gaussian.posterior_mean, column(1.0), times, schedule)) == [0.477035]
    assert rounded(gaussian.flow_map(column(1.0), at(1.0), at(0.0))) == [0.501514]
    mixture = MixtureDenoiser(*M1, schedule, "epsilon")
    found = ddim_path(mixture.posterior_mean, column(-1.0, 0.0, 1.0), times, schedule)
    assert rounded(found) == [-1.562043, 0.520039, 1.291536]


GUIDED_ENDPOINTS = {
    ("edm", 1.0): [0.493760, 0.993750, 1.493740],
    ("edm", 2.0): [0.882638, 1.220676, 1.633930],
    ("edm", 4.0): [1.255746, 1.515526, 1.854776],
    ("flow", 1.0): [0.500000, 1.000000, 1.500000],
    ("flow", 2.0): [0.889969, 1.230238, 1.644869],
    ("flow", 4.0): [1.266826, 1.530704, 1.873386],
}


@pytest.mark.parametrize("name,w", GUIDED_ENDPOINTS)
def test_guided_endpoints(name, w):
    """The guided flow of class 2 has no closed form: Runge-Kutta in the schedule's natural time."""
    schedule = {"edm": EDM_TO_ZERO, "flow": FlowSchedule()}[name]
    teacher = MixtureDenoiser(*M1, schedule, "epsilon" if name == "edm" else "flow")
    x = column(-1.0, 0.0, 1.0) * (80 if name == "edm" else 1)
    times = torch.linspace(1.0, 1e-4, 201, dtype=torch.float64).tolist()

    def slope(x, time):
        velocity = guided(teacher, x, at(time, 3), labelled(1, 3), labelled(2, 3), w).velocity
        if name == "flow":
            return velocity
        # d sigma / d t of the rho-grid.
        low, high = schedule.sigma_min ** (1 / 7), schedule.sigma_max ** (1 / 7)
        return velocity * 7 * (low + time * (high - low)) ** 6 * (high - low)

    for now, after in itertools.pairwise(times):
        h = after - now
        k1 = slope(x, now)
        k2 = slope(x + h / 2 * k1, now + h / 2)
        k3 = slope(x + h / 2 * k2, now + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, after))
    end = guided(teacher, x, at(1e-4, 3), labelled(1, 3), labelled(2, 3), w).x0
    torch.testing.assert_close(end.flatten().tolist(), GUIDED_ENDPOINTS[name, w], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name,kind", ALL)
def test_distribution_matching_gradient_is_the_gradient_of_the_divergence(name, kind):
    """E[alpha (s_fake - s_real) dx/d(a, b)] = dKL/d(a, b), in score form and in x_0 form."""
    schedule, (mean, std), (scale, shift) = SCHEDULES[name], G1, (0.9, 0.2)
    z, eps = corners()
    t = at(0.55, 4)
    alpha, sigma = (c[0] for c in schedule.coefficients(t))
    x_t = schedule.add_noise(scale * z + shift, eps, t)
    real, fake = (
        GaussianDenoiser(mean, std, schedule, kind)(x_t, t),
        affine_critic(scale, shift, schedule, kind)(x_t, t),
    )
    difference = fake.score - real.score
    torch.testing.assert_close((fake.x0 - real.x0) * alpha / sigma**2, difference, rtol=1e-8, atol=1e-8)

    a, b = torch.tensor([scale, shift], dtype=torch.float64).requires_grad_()
    variance, fake_variance = alpha**2 * std**2 + sigma**2, alpha**2 * a**2 + sigma**2
    divergence = (variance / fake_variance).log() / 2
    divergence = divergence + (fake_variance + alpha**2 * (b - mean) ** 2) / (2 * variance)
    grad_a, grad_b = torch.autograd.grad(divergence, (a, b))
    torch.testing.assert_close((alpha * difference * z).mean(), grad_a, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((alpha * difference).mean(), grad_b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(grad_b, alpha**2 * (shift - mean) / variance)
    torch.testing.assert_close(grad_a, alpha**2 * scale * (1 / variance - 1 / (alpha**2 * scale**2 + sigma**2)))


def test_samples_have_the_moments():
    generator = torch.Generator().manual_seed(0)
    gaussian = GaussianDenoiser(*G1, FlowSchedule(), "flow").sample(100_000, (1,), generator=generator)
    mixture = MixtureDenoiser(*M1, FlowSchedule(), "flow").sample(100_000, (1,), generator=generator)
    weights, means, stds = (torch.tensor(v) for v in M1)
    mean = (weights * means).sum().item()
    variance = (weights * (stds**2 + means**2)).sum().item() - mean**2
    for x, m, v in ((gaussian, G1[0], G1[1] ** 2), (mixture, mean, variance)):
        assert abs(x.mean().item() - m) < 3 * math.sqrt(v / len(x))
        assert abs(x.var().item() - v) < 3 * v * math.sqrt(2 / len(x))
    only = MixtureDenoiser(*M1, FlowSchedule(), "flow").sample(1000, (2,), labelled(0, 1000), generator)
    assert abs(only.mean().item() + 1.5) < 0.05 and only.shape == (1000, 2)
