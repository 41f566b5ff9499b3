"""sCM and TBCM against closed forms: the tangent, its two computations, fixed points, and the teacher's route."""

import itertools
import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.schedule import Prediction, Schedule
from stepdistill.errors import InputError
from stepdistill.methods import Roles
from stepdistill.methods.continuous import SCM, TBCM, SCMConfig, TBCMConfig, TrigFlow
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import G1, KINDS, M1, SCHEDULES, OnGrid, Spy, at, batch, column, gradients, player

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and trajectories start.
FROM_NOISE = [pair for pair in ALL if pair != ("flow", "epsilon")]


def scm(teacher, student, scale=1.0, **config) -> SCM:
    return SCM(SCMConfig(**config), Roles(teacher, student, scale=scale), OnGrid(student.schedule, [1.0]))


def tbcm(teacher, student, scale=1.0, **config) -> TBCM:
    return TBCM(TBCMConfig(**config), Roles(teacher, student, scale=scale), OnGrid(student.schedule, [1.0]))


@torch.no_grad()
def tangent_of(method: SCM, teacher: Prediction, cond=None) -> torch.Tensor:
    """cos a df/da as ``method`` computes it."""
    trig, cond = TrigFlow(method.schedule, teacher.t, method.config.sigma_data), cond or {}
    student = method.roles.student(teacher.x_t, teacher.t, cond)
    return (method.forward_tangent if method.forward_mode else method.finite_tangent)(trig, teacher, student, cond)


def student_of(function, schedule: Schedule, kind, **parameters):
    return player(lambda x, t, labels: function(x, t), schedule, kind, **parameters)


def wavy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A consistency function that is wrong everywhere."""
    return (0.8 * x).sin() + 0.3 * (3 * t).cos().reshape(-1, *[1] * (x.ndim - 1)) * x


def time_at(schedule: Schedule, angle: float, sigma_data: float) -> float:
    """The time of a TrigFlow angle, by bisection: on VP between two table entries."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        alpha, sigma = schedule.coefficients(at(middle))
        low, high = (low, middle) if torch.atan2(sigma, alpha * sigma_data).item() > angle else (middle, high)
    return middle


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_slopes(name):
    """On table entries and at both ends too: forward-mode derivatives of alpha and sigma are secants."""
    schedule = SCHEDULES[name]
    inner = torch.cat([torch.arange(25, 999, 37).double() / 999, torch.linspace(0.03, 0.99, 50, dtype=torch.float64)])
    for t in (inner, inner.float().double(), torch.tensor([1.0], dtype=torch.float64)):
        trig, h = TrigFlow(schedule, t, 1.0), 1e-4 if name == "vp" else 1e-6
        for value, slope in ((schedule.alpha, trig.d_alpha), (schedule.sigma, trig.d_sigma)):
            left, right = (value(t) - value(t - h)) / h, (value(t + h) - value(t)) / h
            closest = torch.where((left - slope).abs() < (right - slope).abs(), left, right)
            torch.testing.assert_close(slope, closest, rtol=1e-2, atol=1e-3)
        assert (trig.dt > 0).all()


@pytest.mark.parametrize("jvp", ["forward", "finite"])
@pytest.mark.parametrize("name,kind", ALL)
def test_golden_numbers(name, kind, jvp):
    """Data N(0, .3^2), sd = .5, angle .7, x = .4, F = .2 x t, whatever the schedule calls this point."""
    schedule, sd, angle = SCHEDULES[name], 0.5, 0.7
    t = at(time_at(schedule, angle, sd))
    alpha = schedule.alpha(t)
    x_t = (alpha / math.cos(angle) * 0.4)[:, None]

    def wrong(x, time):
        alpha, sigma = (c[:, None] for c in schedule.coefficients(time))
        a = torch.atan2(sigma, alpha * sd)
        x = x * a.cos() / alpha
        return a.cos() * x - a.sin() * sd * (0.2 * x * a)

    teacher, student = GaussianDenoiser(0.0, 0.3, schedule, kind), student_of(wrong, schedule, kind)
    method = scm(teacher, student, sigma_data=sd, jvp=jvp, difference=1 / 999 if name == "vp" else 1e-6)
    prediction, trig = teacher(x_t, t), TrigFlow(schedule, t, sd)
    assert trig.angle.item() == pytest.approx(angle, abs=1e-12)
    assert trig.velocity(prediction).item() == pytest.approx(0.201623, abs=1e-6)
    assert trig.velocity(student(x_t, t, {})).item() == pytest.approx(sd * 0.2 * 0.4 * 0.7, abs=1e-12)
    assert student(x_t, t, {}).x0.item() == pytest.approx(0.287899, abs=1e-6)
    # A finite difference on VP goes to a table entry.
    tolerance = 1e-6 if jvp == "forward" else 2e-3 if name == "vp" else 1e-5
    assert tangent_of(method, prediction).item() == pytest.approx(-0.122186, abs=tolerance)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_tangent_is_the_derivative_along_the_teachers_flow(name, kind):
    """cos a df/da, from the flow map alone: f at two points of the same exact trajectory."""
    schedule, sd, h = SCHEDULES[name], 0.7, 1e-5
    for teacher in (GaussianDenoiser(*G1, schedule, kind), MixtureDenoiser(*M1, schedule, kind)):
        method = scm(teacher, student_of(wavy, schedule, kind), sigma_data=sd)
        # VP's slopes jump at table entries; the middle between two is smooth.
        t = (torch.tensor([20, 200, 500, 700, 950], dtype=torch.float64) + 0.5) / 999
        alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
        x_t = alpha * column(-1.4, 0.2, 0.9, 1.1, -0.3) + sigma * column(0.4, -1.0, 0.1, 2.0, -0.6)
        found = tangent_of(method, teacher(x_t, t))
        ends = [wavy(teacher.flow_map(x_t, t, t + d), t + d) for d in (h, -h)]
        angles = [torch.atan2(s, a * sd) for a, s in (schedule.coefficients(t + d) for d in (h, -h))]
        slope = (ends[0] - ends[1]) / (angles[0] - angles[1])[:, None]
        cosine = torch.atan2(sigma, alpha * sd).cos()
        torch.testing.assert_close(found, cosine * slope, rtol=1e-4, atol=1e-6)


def test_the_tangent_follows_the_guided_flow():
    """Not the data's path and not the unguided teacher's."""
    schedule, w, h = SCHEDULES["flow"], 3.0, 1e-6
    teacher = MixtureDenoiser(*M1, schedule, "flow")
    labels, null = ({"class_labels": torch.full((3,), value)} for value in (1, 2))
    t, x_t = at(0.5, 3), column(0.8, -0.2, 1.7)
    plain = teacher.posterior_mean(x_t, t, null)
    x0 = plain + w * (teacher.posterior_mean(x_t, t, labels) - plain)
    u = (x_t - x0) / 0.5
    method = scm(teacher, student_of(wavy, schedule, "v"), scale=w)
    rows = batch(3, labels=(1, 2))
    found = tangent_of(method, method.teacher(x_t, t, rows))
    slope = (wavy(x_t + h * u, t + h) - wavy(x_t - h * u, t - h)) / (2 * h)
    # da/dt = 1 / (t^2 + (1 - t)^2) = 2, and cos a = sin a here.
    torch.testing.assert_close(found, math.sqrt(0.5) * slope / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name,kind", ALL)
def test_forward_mode_and_finite_differences_agree_to_first_order(name, kind):
    schedule, teacher = SCHEDULES[name], MixtureDenoiser(*M1, SCHEDULES[name], kind)
    t = schedule.snap(torch.tensor([0.2, 0.35, 0.5, 0.65], dtype=torch.float64))
    x_t = schedule.add_noise(column(-1.4, 0.2, 0.9, 1.1), column(0.4, -1.0, 0.1, 2.0), t)

    def tangent(**config):
        return tangent_of(scm(teacher, student_of(wavy, schedule, kind), **config), teacher(x_t, t))

    exact = tangent(jvp="forward")
    steps = (4 / 999, 2 / 999) if name == "vp" else (4e-5, 2e-5)
    errors = [(tangent(jvp="finite", difference=d) - exact).abs().max() / exact.abs().max() for d in steps]
    assert errors[1] < 0.03 and errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def endpoint(schedule: Schedule):
    """f* of bed G1: where the flow ends, m + q (x - alpha m) / sqrt(V)."""
    mean, std = G1

    def function(x, t):
        alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
        return mean + std * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()

    return function


def data(size: int = 64) -> torch.Tensor:
    return GaussianDenoiser(*G1, SCHEDULES["flow"], "flow").sample(
        size, (1,), generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("cls", [scm, tbcm])
@pytest.mark.parametrize("name,kind", FROM_NOISE)
def test_the_end_of_the_flow_is_the_fixed_point(cls, name, kind):
    schedule, teacher = SCHEDULES[name], GaussianDenoiser(*G1, SCHEDULES[name], kind)
    f = endpoint(schedule)
    student = student_of(f, schedule, kind)
    method = cls(teacher, student, tangent_warmup=100)
    loss = method.losses("student", batch(64, step=100, latents=data()))["consistency"]
    assert abs(loss.item()) < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    # While the tangent warms up the student is still pulled to the teacher.
    early = method.losses("student", batch(64, step=50, latents=data()))["consistency"]
    assert math.hypot(*gradients(early, student)) > 1e-2
    other = student_of(lambda x, t: f(x, t) + 0.1 * t[:, None], schedule, kind)
    rows = batch(64, step=100, latents=data())
    loss = cls(teacher, other, tangent_warmup=100).losses("student", rows)["consistency"]
    assert math.hypot(*gradients(loss, other)) > 1e-2 and rows.signals["tangent"] > 1e-2


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_loss_and_its_gradient_are_the_closed_form(name, kind, r):
    """From the observed (x_t, t): g, its normalisation and the learned variance."""
    schedule, (mean, std), sd, v = SCHEDULES[name], G1, 0.5, 0.3
    teacher = Spy(GaussianDenoiser(mean, std, schedule, kind))
    student = student_of(lambda x, t: x.clone(), schedule, kind, scale=0.8, shift=0.3)
    method = scm(teacher, student, sigma_data=sd, tangent_warmup=10, time_mean=0.5, time_std=0.8)
    method.log_variance = nn.Module()
    method.log_variance.forward = lambda angle: torch.full_like(angle, v)
    loss = method.losses("student", batch(64, step=round(10 * r), latents=data()))["consistency"]
    found = gradients(loss, student)

    ((x_t, t),) = teacher.calls
    alpha, sigma = (c[:, None] for c in schedule.coefficients(t))
    a = torch.atan2(sigma, alpha * sd)
    x = x_t * a.cos() / alpha  # in TrigFlow's scale; f as a function of it is 0.8 (alpha / cos a) x + 0.3
    f, real = 0.8 * x_t + 0.3, mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    velocity, dx = ((a.cos() * x - x0) / a.sin() for x0 in (f, real))
    scale = alpha / a.cos()
    # d scale / da = (d scale / dt) / (da / dt), to the right of a table entry, but to the left of the last.
    low = t.clamp(max=1 - 1e-5)
    low, high = schedule.coefficients(low), schedule.coefficients(low + 1e-5)
    slope = (torch.hypot(high[0], high[1] / sd) - torch.hypot(low[0], low[1] / sd)) / (
        torch.atan2(high[1], high[0] * sd) - torch.atan2(low[1], low[0] * sd)
    )
    df = 0.8 * (slope[:, None] * x + scale * dx)
    g = (1 - r) * a.cos() ** 2 * (dx - velocity) + r * a.cos() * df
    g = g / (g.abs() + 0.1)
    weight = math.exp(-v)
    assert loss.item() == pytest.approx((weight * g**2 + v).mean().item(), rel=1e-3)
    # The student moves along g: F = (cos a x - f) / sin a.
    expected = [(2 * weight * g / a.sin() * change).mean().item() for change in (x_t, torch.ones_like(x_t))]
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_the_learned_variance_moves_with_the_student():
    schedule = SCHEDULES["flow"]
    method = scm(GaussianDenoiser(*G1, schedule, "v"), student_of(wavy, schedule, "v"))
    module = method.log_variance
    assert method.modules("student") == [method.roles.student.network, module]
    assert list(method.extra_modules().values()) == [module]
    assert (module(torch.linspace(0, 1.5, 9)) == 0).all()
    weight = module.linear.weight
    method.losses("student", batch(64, latents=data()))["consistency"].backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    values = module(torch.linspace(0.1, 1.5, 9, dtype=torch.float64))
    assert values.dtype == torch.float32 and values.std() > 1e-3


@pytest.mark.parametrize("cls", [scm, tbcm])
def test_only_the_student_receives_gradients(cls):
    schedule = SCHEDULES["vp"]
    teacher, student = (student_of(wavy, schedule, "v", shift=shift) for shift in (0.0, 0.2))
    method = cls(teacher, student)
    method.losses("student", batch(4, step=3, latents=data(4)))["consistency"].backward()
    assert all(p.grad is not None for module in method.modules("student") for p in module.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())


@pytest.mark.parametrize("jvp,calls", [("forward", 3), ("finite", 2)])
def test_the_cost_is_counted(jvp, calls):
    schedule = SCHEDULES["vp"]
    teacher, student = (student_of(wavy, schedule, "v") for _ in range(2))
    scm(teacher, student, jvp=jvp).losses("student", batch(4, latents=data(4)))
    assert (teacher.evaluations, student.evaluations) == (4, 4 * calls)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


@pytest.mark.parametrize("what", ["fused", "whole timesteps", "fine"])
def test_auto_falls_back_to_finite_differences(what, monkeypatch):
    schedule, said = SCHEDULES["vp"], []
    monkeypatch.setattr("stepdistill.progress.say", said.append)
    student = student_of((lambda x, t: NoForwardMode.apply(x)) if what == "fused" else wavy, schedule, "v")
    if what == "whole timesteps":
        student = Denoiser(student.network, CallSpec("x", "timestep", timestep_dtype=torch.int64), schedule, "v")
    teacher = GaussianDenoiser(*G1, schedule, "v")
    method = scm(teacher, student)
    method.prepare(batch(1))
    assert method.forward_mode == (what == "fine") and len(said) == (what != "fine")
    if what != "fine":
        assert "no forward-mode derivative" in said[0] and "finite" in said[0]
        with pytest.raises(InputError, match=r"method\.jvp"):
            scm(teacher, student, jvp="forward").prepare(batch(1))
    loss = method.losses("student", batch(4, step=2000, latents=data(4)))["consistency"]
    assert torch.isfinite(loss) and loss.item() > 0


@pytest.mark.parametrize("name,kind", FROM_NOISE)
def test_tbcms_points_are_ddim_steps_of_the_guided_teacher(name, kind):
    schedule, w, n = SCHEDULES[name], 2.0, 8
    teacher = MixtureDenoiser(*M1, schedule, kind)
    method = tbcm(teacher, student_of(wavy, schedule, kind), scale=w, route=n)
    rows = batch(5, labels=(1, 2))
    points = method.points(rows)
    assert len(points) == n and (points[0].t == 1).all()
    noise = torch.hypot(*schedule.coefficients(at(1.0))) * rows.noise("start")
    torch.testing.assert_close(points[0].x_t, noise)
    for before, after in itertools.pairwise(points):
        assert (after.t <= before.t).all() and len(after.t.unique()) > 1
        alpha, sigma, alpha_r, sigma_r = (c[:, None] for p in (before, after) for c in schedule.coefficients(p.t))
        plain = teacher.posterior_mean(before.x_t, before.t, rows.null)
        x0 = plain + w * (teacher.posterior_mean(before.x_t, before.t, rows.cond) - plain)
        torch.testing.assert_close(before.x0, x0, rtol=1e-8, atol=1e-8)
        expected = alpha_r * x0 + sigma_r * (before.x_t - alpha * x0) / sigma
        torch.testing.assert_close(after.x_t, expected, rtol=1e-6, atol=1e-6)


def test_tbcm_trains_all_points_but_the_first_with_their_conditions():
    schedule, n = SCHEDULES["flow"], 4
    student = Spy(student_of(wavy, schedule, "v"))
    method = tbcm(MixtureDenoiser(*M1, schedule, "v"), student, route=n, jvp="finite")
    rows = batch(3)
    rows.cond = {"class_labels": torch.tensor([0, 1, 2])}
    seen = []
    student.denoiser = lambda x, t, cond, inner=student.denoiser: seen.append(cond) or inner(x, t, cond)
    loss = method.losses("student", rows)["consistency"]
    x_t, t = student.calls[0]
    points = method.points(rows)[1:]
    assert torch.equal(x_t, torch.cat([p.x_t for p in points])) and torch.equal(t, torch.cat([p.t for p in points]))
    assert seen[0]["class_labels"].tolist() == [0, 1, 2] * (n - 1) and torch.isfinite(loss)


def test_tbcms_route_draws_once_in_each_interval():
    """Uniform in the angle, between the angles of the shifted line: tan a = shift s / (1 - s)."""
    schedule, n, shift, sd = SCHEDULES["flow"], 4, 2.5, 0.5
    method = tbcm(None, student_of(wavy, schedule, "v"), route=n, shift=shift, sigma_data=sd)
    times = method.route(batch(2000))
    low = 0.001 / (0.001 + shift * sd * 0.999)
    edges = [math.pi / 2, *(math.atan(shift * s / (1 - s)) for s in (2 / 3 + low / 3, 1 / 3 + low * 2 / 3, low))]
    for i, t in enumerate(times[1:]):
        angle = torch.atan(t / (1 - t) / sd)
        low, high = edges[i + 1], edges[i]
        assert angle.min() >= low - 1e-9 and angle.max() <= high + 1e-9
        assert angle.mean().item() == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 2000))
        assert angle.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tbcms_points_approach_the_flow(name):
    """Without guidance x_i is Phi(x_T) up to the first order of the route's steps."""
    schedule, errors = SCHEDULES[name], []
    teacher = GaussianDenoiser(*G1, schedule, "sample")
    for n in (33, 65, 129):
        points = tbcm(teacher, student_of(wavy, schedule, "sample"), route=n).points(batch(200))
        start = points[0].x_t
        exact = [teacher.flow_map(start, points[0].t, p.t) for p in points]
        scales = [torch.hypot(*schedule.coefficients(p.t))[:, None] for p in points]
        pairs = zip(points, exact, scales, strict=True)
        errors.append(torch.cat([(p.x_t - phi) / scale for p, phi, scale in pairs]).square().mean().sqrt().item())
    assert errors[-1] < 0.02
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.2)


class Small(nn.Module):
    """An MLP that predicts v on flow from (x, t)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )  # fmt: skip

    def forward(self, x, timestep):
        t = (timestep / 1000).to(x)[:, None]
        return self.layers(torch.cat([x, t, (3 * t).sin(), (3 * t).cos()], 1))


@pytest.mark.parametrize("cls", [scm, tbcm])
def test_a_small_network_converges_to_the_end_of_the_flow(cls):
    torch.manual_seed(0)
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float32)
    student = Denoiser(Small(), spec, schedule, "flow")
    method = cls(teacher, student, tangent_warmup=80, **({"route": 5} if cls is tbcm else {}))
    parameters = [p for module in method.modules("student") for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3, betas=(0.9, 0.99))
    steps, size = 300, 128 if cls is scm else 96
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    @torch.no_grad()
    def error() -> float:
        t = torch.linspace(0.05, 1, 64, dtype=torch.float64)
        worst = []
        for z in (-1.0, 0.0, 1.0):
            x0 = torch.full((64, 1), G1[0] + G1[1] * z)
            x_t = teacher.flow_map(x0, torch.zeros_like(t), t)
            worst.append((student(x_t, t, {}).x0 - x0).abs().max().item())
        return max(worst)

    before = error()
    for step in range(steps):
        optimizer.zero_grad()
        rows = batch(size, step=step, latents=data(size).float())
        rows.dtype = torch.float32
        if cls is scm:
            rows.latents = teacher.sample(size, (1,), generator=torch.Generator().manual_seed(step)).float()
        method.losses("student", rows)["consistency"].backward()
        optimizer.step()
        rate.step()
    # The teacher itself, which predicts the mean at t = 1, is off by 0.5.
    assert before > 1 and error() < 0.15
