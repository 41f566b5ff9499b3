"""Phased DMD and TDM against closed forms: the kernel above a noisy sample, its target, fixed points."""

import math

import pytest
import torch

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.experts import Turn
from stepdistill.diffusion.samplers import DDIM
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, Roles
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import G1, KINDS, M1, SCHEDULES, OnGrid, at, batch, column, gradients, player, table

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
GRID = [0.95, 0.7, 0.5, 0.25]


def method_of(name, student, teacher, critic, times=GRID, **config):
    implementation = METHODS[name]
    roles = Roles(teacher=teacher, student=student, critic=critic)
    return implementation(implementation.Config(**config), roles, OnGrid(student.schedule, list(times), DDIM))


def identity(schedule, kind):
    return player(lambda x, t, labels: x, schedule, kind)


def landed(method, x_s: float, end: float | None, t: float, eps: float, monkeypatch):
    """x_t and D* of one sample, from given numbers."""
    rows = batch(1)
    rows.state["landed"] = column(x_s), (end, t, t)
    monkeypatch.setattr(type(rows), "noise", lambda self, name: column(eps))
    x_t, _, target = method.noised(rows, "critic")
    return x_t.item(), target.item()


@pytest.mark.parametrize(
    ("name", "s", "t", "x_t", "target"),
    [
        ("flow", 0.5, 0.7, 0.429737, 0.657698),
        ("flow", 0.875, 0.95, 0.424953, 2.367776),
        ("vp", 499 / 999, 749 / 999, 0.448301, 0.550957),
    ],
)
def test_golden_numbers(name, s, t, x_t, target, monkeypatch):
    schedule = SCHEDULES[name]
    student = identity(schedule, "v")
    method = method_of("phased-dmd", student, student, student)
    assert landed(method, 0.4, s, t, 0.3, monkeypatch) == pytest.approx((x_t, target), abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_means_the_posterior_mean_of_clean_samples(name):
    """On M1 noised to s, E[D* | x_t] is E[x_0 | x_t]: by quadrature over x_s."""
    schedule, x_t = SCHEDULES[name], 0.3
    teacher = MixtureDenoiser(*M1, schedule, "sample")
    method = method_of("phased-dmd", identity(schedule, "sample"), teacher, teacher, [0.95, 0.5])
    s, t = method.phase(0).end, schedule.snap(at(0.7)).item()
    (alpha_s, sigma_s), (alpha, sigma) = (schedule.coefficients(at(time)) for time in (s, t))
    a = (alpha / alpha_s).item()
    b = (sigma**2 - (a * sigma_s) ** 2).sqrt().item()
    reach = 12 * max(1.0, sigma_s.item())
    x_s = torch.linspace(-reach, reach, 40001, dtype=torch.float64)[:, None]
    eps = (x_t - a * x_s) / b
    weight = (teacher.log_density(x_s, at(s, len(x_s))) - eps[:, 0] ** 2 / 2).softmax(0)
    target = (x_t - sigma**2 / b * eps[:, 0]) / alpha
    expected = teacher.posterior_mean(column(x_t), at(t)).item()
    assert (weight * target).sum().item() == pytest.approx(expected, abs=1e-6)
    if name == "flow":
        assert expected == pytest.approx(0.317021, abs=1e-6)


@pytest.mark.parametrize(
    ("phases", "ends"), [(2, [0.5, 0.5, None, None]), (1, [None] * 4), (4, [0.7, 0.5, 0.25, None])]
)
def test_each_phase_keeps_to_its_times(phases, ends):
    student = identity(SCHEDULES["flow"], "v")
    method = method_of("phased-dmd", student, student, student, phases=phases, margin=0.1)
    for k, end in enumerate(ends):
        phase = method.phase(k)
        first = GRID[k - k % (4 // phases)]
        assert phase.end == end
        assert phase.low == pytest.approx(0.02 if end is None else end + 0.1)
        assert phase.high == (0.98 if first == GRID[0] else first)
    assert [method_of("tdm", student, student, student).phase(k).end for k in range(4)] == [0.7, 0.5, 0.25, None]
    with pytest.raises(InputError, match=r"method\.margin.* step 2 "):
        method_of("tdm", student, student, student, margin=0.25)
    config = METHODS["phased-dmd"].Config(phases=3)
    assert [key for key, _ in METHODS["phased-dmd"].problems(config, 4, 10)] == ["method.phases"]


def test_a_phase_for_each_expert():
    """Steps of networks that take turns at .3: three of the first and one of the second, no equal parts."""
    schedule = SCHEDULES["flow"]
    student = identity(schedule, "flow")
    spec = CallSpec("x", "t", experts={"high": Turn(float(schedule.timestep(at(0.3)))), "low": Turn(0.0)})
    teacher = Denoiser(torch.nn.Linear(1, 1), spec, schedule, "flow")
    method = method_of("phased-dmd", student, teacher, student, phases="experts")
    phases = [method.phase(k) for k in range(4)]
    assert [phase.end for phase in phases] == [0.25, 0.25, 0.25, None] and phases[3].high == 0.25
    with pytest.raises(InputError, match=r"method\.phases: expected a number for a teacher with one denoiser"):
        method_of("phased-dmd", student, student, student, phases="experts")


def gaussian(mean: float, std: float, s: float | None, schedule, kind) -> GaussianDenoiser:
    """The perfect critic of samples N(mean, std^2) at time s, by the clean distribution that is noised to them."""
    if s is None:
        return GaussianDenoiser(mean, std, schedule, kind)
    alpha, sigma = (c.item() for c in schedule.coefficients(at(s)))
    return GaussianDenoiser(mean / alpha, math.sqrt(std**2 - sigma**2) / alpha, schedule, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_phase_ends_at_the_noisy_data_whatever_comes_later(kind):
    """Flow, s = .5, one step from t = .9: x_0 = p z + c lands on G1's own marginal N(.35, .559017^2)."""
    schedule, (mean, std) = SCHEDULES["flow"], G1
    start, s = 0.9, 0.5
    teacher = GaussianDenoiser(mean, std, schedule, kind)
    # x_s = .5 x_0 + .5 eps with eps = (z - .1 x_0)/.9, so x_s = (4/9) x_0 + (5/9) z.
    spread = math.sqrt(0.25 * std**2 + 0.25)
    p, c = (spread - 5 / 9) * 9 / 4, 0.5 * mean * 9 / 4

    def slopes(p: float, c: float):
        landing = (4 * p + 5) / 9, 4 * c / 9
        critic = gaussian(landing[1], abs(landing[0]), s, schedule, kind)
        student = player(lambda x, t, labels: x, schedule, kind, p, c)
        method = method_of("phased-dmd", student, teacher, critic, [start, s])
        rows = batch(2000)
        x = method.generate(rows, 0)
        rows.state["x"] = x.detach()
        return gradients(method.sample_losses(x, rows)["dm"], student)

    assert math.hypot(*slopes(p, c)) < 1e-6
    assert slopes(p + 0.1, c)[0] > 1e-3 > -1e-3 > slopes(p - 0.05, c)[0]
    assert slopes(p, c + 0.1)[1] > 1e-3 > -1e-3 > slopes(p, c - 0.1)[1]


@pytest.mark.parametrize("name,kind", ALL)
def test_the_exact_map_is_a_fixed_point_of_every_segment(name, kind):
    """TDM of G1: a student whose every step lands on the teacher's marginal, with the critic of that marginal."""
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = GaussianDenoiser(mean, std, schedule, kind)
    times = schedule.snap(torch.tensor(GRID, dtype=torch.float64)).tolist()
    student = table(torch.tensor(times, dtype=torch.float64), G1, schedule, kind)
    sampler = OnGrid(schedule, times, DDIM)
    spreads = []
    for t in times:
        alpha, sigma = (c.item() for c in schedule.coefficients(at(t)))
        spreads.append((alpha, sigma, math.sqrt(alpha**2 * std**2 + sigma**2)))
    for k, step in enumerate(sampler.grid()):
        alpha, sigma, now = spreads[k]
        alpha_r, sigma_r, then = (1.0, 0.0, std) if step.r is None else spreads[k + 1]
        # x_r = alpha_r x_0 + sigma_r (x - alpha x_0)/sigma has to be alpha_r m + then/now (x - alpha m).
        gain = (then / now - sigma_r / sigma) / (alpha_r - sigma_r * alpha / sigma)
        student.network.scale.data[k], student.network.shift.data[k] = gain, mean * (1 - alpha * gain)
    method = method_of("tdm", student, teacher, teacher, times)
    first = spreads[0]
    for k in range(len(times)):
        rows = batch(64)
        # The rollout starts from the marginal at the grid's first time, not from pure noise.
        noise = rows.noise("start")
        rows.noise = lambda name, rows=rows, z=noise: (
            first[0] * mean + first[2] * z if name == "start" else type(rows).noise(rows, name)
        )
        x = method.generate(rows, k)
        rows.state["x"] = x.detach()
        loss = method.sample_losses(x, rows)["dm"]
        assert loss.item() < 1e-12
        slope = torch.autograd.grad(loss, list(student.network.parameters()))
        assert max(one.abs().max().item() for one in slope) < 1e-6
        x_s, phase = rows.state["landed"]
        _, _, then = (1.0, 0.0, std) if phase.end is None else spreads[k + 1]
        assert x_s.std().item() == pytest.approx(then * noise.std().item(), rel=1e-6)


def test_the_critic_learns_and_the_student_does_not():
    schedule = SCHEDULES["flow"]
    student, critic = identity(schedule, "v"), identity(schedule, "v")
    method = method_of("phased-dmd", student, GaussianDenoiser(*G1, schedule, "v"), critic)
    rows = batch(8)
    assert method.turns(0) == ("student", "critic") and method.turns(1) == ("critic",)
    loss = method.losses("critic", rows)["denoising"]
    assert (
        torch.autograd.grad(loss, list(student.network.parameters()), allow_unused=True, retain_graph=True)
        == (None,) * 2
    )
    assert math.hypot(*gradients(loss, critic)) > 0
