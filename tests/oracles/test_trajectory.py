"""Regression on trajectories and on their ends against closed forms: the solver, the optima, the stock steps."""

import itertools
import math

import diffusers
import pytest
import torch

from stepdistill.data.batch import Batch, PathRows
from stepdistill.diffusion.samplers import DDIM, dpm_solver_step
from stepdistill.diffusion.schedule import Prediction, from_scheduler
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.parts.losses import feature_distance
from stepdistill.methods.trajectory import OdeConfig, OdeRegression, TrajectoryConfig, TrajectoryRegression
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.sampling.trajectories import teacher_paths
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    OnGrid,
    at,
    batch,
    column,
    ddim_path,
    generator,
    gradients,
    player,
)

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every solver starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]
GRID = [1.0, 749 / 999, 499 / 999, 249 / 999]


def method_of(teacher, student, scale=1.0, times=GRID, **config) -> TrajectoryRegression:
    roles = Roles(teacher=teacher, student=student, scale=scale)
    return TrajectoryRegression(TrajectoryConfig(**config), roles, OnGrid(student.schedule, times, DDIM))


def solve(teacher, x, times: list[float]) -> torch.Tensor:
    previous = None
    for t, r in itertools.pairwise(times):
        current = teacher(x, at(t, len(x)), {})
        x, previous = dpm_solver_step(current, previous, at(r, len(x))), current
    return x


@pytest.mark.parametrize("name,kind", ALL)
def test_the_solvers_first_step_is_ddim_and_its_last_is_x0(name, kind):
    schedule, x = SCHEDULES[name], column(-0.4, 1.3)
    teacher = GaussianDenoiser(*G1, schedule, kind)
    current = teacher(x, at(1.0, 2))
    expected = ddim_path(teacher.posterior_mean, x, [1.0, 0.4], schedule)
    torch.testing.assert_close(dpm_solver_step(current, None, at(0.4, 2)), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(dpm_solver_step(current, None, None), current.x0)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_solver_is_of_second_order(name):
    schedule, x = SCHEDULES[name], column(-0.4, 1.3)
    teacher = GaussianDenoiser(*G1, schedule, "epsilon")
    exact, errors = teacher.flow_map(x, at(0.8, 2), at(0.2, 2)), []
    for steps in (200, 400):
        times = torch.linspace(0.8, 0.2, steps + 1, dtype=torch.float64).tolist()
        errors.append((solve(teacher, x, times) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_the_solver_is_the_stock_one():
    stock = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    schedule, kind = from_scheduler(stock)
    stock.set_timesteps(10)
    teacher = MixtureDenoiser(*M1, schedule, kind)
    times = schedule.time(stock.timesteps).tolist()
    x = found = column(-1.0, 0.2, 1.1)
    for timestep, t in zip(stock.timesteps[:7], times, strict=False):
        x = stock.step(teacher(x, at(t, 3)).raw, timestep, x).prev_sample
    torch.testing.assert_close(solve(teacher, found, times[:8]), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_the_teachers_points_approach_its_exact_trajectory(name):
    """Also from flow's t = 1, where the log signal-to-noise ratio is minus infinity."""
    schedule, errors = SCHEDULES[name], []
    teacher = GaussianDenoiser(*G1, schedule, "v")
    for substeps in (3, 48):
        points = method_of(teacher, generator(schedule, "v", 1.0, 0.0), substeps=substeps).teacher_points(batch(16))
        assert len(points) == len(GRID) + 1 and torch.equal(points[0], batch(16).noise("start"))
        exact = [teacher.flow_map(points[0], at(1.0, 16), at(t, 16)) for t in (*GRID[1:], 0.0)]
        errors.append(max((a - b).abs().max().item() for a, b in zip(points[1:], exact, strict=True)))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 4


def exact_student(teacher, schedule, kind, substeps: int):
    """The student whose DDIM step hits the teacher's next point; on a Gaussian every point is affine in the noise."""
    method = method_of(teacher, generator(schedule, kind, 1.0, 0.0), substeps=substeps)
    rows = batch(2)
    rows.noise = lambda name: column(0.0, 1.0)
    points = method.teacher_points(rows)

    def function(x, t, labels):
        k = min(range(len(GRID)), key=lambda i: abs(GRID[i] - t[0].item()))
        (at_zero, at_one), (next_zero, next_one) = points[k][:, 0], points[k + 1][:, 0]
        end = next_zero + (x - at_zero) / (at_one - at_zero) * (next_one - next_zero)
        if k == len(GRID) - 1:
            return end
        (alpha, sigma), (alpha_r, sigma_r) = (schedule.coefficients(at(time)) for time in GRID[k : k + 2])
        return (end - sigma_r / sigma * x) / (alpha_r - sigma_r * alpha / sigma)

    return player(function, schedule, kind)


def walk(method, rows) -> list[float]:
    losses = []
    for turn, mover in enumerate(method.turns(0)):
        rows.turn = turn
        losses.append(sum(method.losses(mover, rows).values()).item())
    return losses


@pytest.mark.parametrize("name,kind", ALL)
def test_hitting_every_teacher_point_is_the_optimum(name, kind):
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = exact_student(teacher, schedule, kind, substeps=3)
    method = method_of(teacher, student, substeps=3)
    assert walk(method, batch(32)) == pytest.approx([0.0] * 4, abs=1e-9)
    student.network.shift.data += 0.1
    assert min(walk(method, batch(32))) > 1e-3


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_stored_trajectories_are_those_it_would_make(name):
    """Twelve stored steps hold the student's four, and are three of the teacher's for each."""
    schedule, grid = SCHEDULES[name], GRID if name == "vp" else [1.0, 0.75, 0.5, 0.25]
    teacher = GaussianDenoiser(*G1, schedule, "v")
    network = player(lambda x, t, labels: teacher.posterior_mean(x, t), schedule, "v")
    needs = TrajectoryRegression.data_needs(TrajectoryConfig(paths=8)).paths
    conditions = Conditioning(("a",), {"class_labels": torch.tensor([0])}, None)
    paths = teacher_paths(network, conditions, needs, 1.0, (1,), seed=0, grid=grid)
    rows = batch(8)
    rows.path = paths.rows(torch.arange(8), conditions, "cpu")
    method = method_of(teacher, generator(schedule, "v", 1.0, 0.0), times=grid, paths=8)
    stored = method.stored_points(rows.path)
    rows.noise = lambda name: rows.path.points[:, 0].double()
    made = method.teacher_points(rows)
    # A table's entry between the student's may be rounded the other way.
    tolerance = 3e-3 if name == "vp" else 1e-4
    for a, b in zip(stored, made, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)
    assert paths.times[::3].tolist() == pytest.approx([*grid, 0.0])
    walk(method, rows)
    assert torch.equal(rows.state["points"][-1], rows.path.points[:, -1])


def test_the_number_of_stored_steps_is_a_multiple_of_the_students():
    """A recipe's problem, with a number that works."""
    problems = list(TrajectoryRegression.problems(TrajectoryConfig(paths=8, path_steps=10), 4, 100))
    assert problems == [
        ("method.path_steps", "expected a multiple of student.steps (4), such as 12, found 10"),
    ]
    assert not list(TrajectoryRegression.problems(TrajectoryConfig(paths=8, path_steps=12), 4, 100))
    assert not list(TrajectoryRegression.problems(TrajectoryConfig(path_steps=10), 4, 100))


def test_needs_trajectories_only_where_it_stores_them():
    assert TrajectoryRegression.data_needs(TrajectoryConfig()).paths is None


def test_earlier_errors_are_corrected_not_passed_on():
    """The target is the teacher's own point, so a student that is wrong at the first step still has it as target."""
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    method = method_of(teacher, generator(schedule, "flow", 0.5, 0.2))
    rows = batch(8)
    walk(method, rows)
    torch.testing.assert_close(rows.state["points"], method.teacher_points(batch(8)))
    assert not torch.allclose(rows.state["x"], rows.state["points"][-1], atol=1e-2)


def test_each_turn_moves_the_student_alone_and_from_a_detached_point():
    schedule = SCHEDULES["vp"]
    teacher, student = generator(schedule, "v", 0.6, 0.1), generator(schedule, "v", 0.5, 0.2)
    method, rows = method_of(teacher, student), batch(8)
    assert method.turns(0) == ("student",) * 4 and method.modules("student") == [student.network]
    for turn in range(4):
        rows.turn = turn
        method.losses("student", rows)["regression"].backward()
        assert all(p.grad is not None for p in student.network.parameters())
        assert not rows.state["x"].requires_grad
        student.network.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in teacher.network.parameters())


def test_the_targets_are_the_guided_teachers():
    schedule, w = SCHEDULES["flow"], 3.0
    teacher = GaussianDenoiser(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5]), schedule, "flow")
    method = method_of(teacher, generator(schedule, "flow", 1.0, 0.0), scale=w, times=[1.0], substeps=1)
    end = method.teacher_points(batch(4, labels=(0, 1)))[-1]
    # At t = 1 nothing of x_0 is left: D is the mean, and guidance extrapolates it.
    torch.testing.assert_close(end, torch.full_like(end, 0 + w * (1 - 0)))


STOCK = {
    "vp": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("name", STOCK)
def test_the_deterministic_step_is_the_stock_schedulers(name, steps):
    """Also for step counts that do not divide the table."""
    source = STOCK[name]()
    schedule, kind = from_scheduler(source)
    sampler = DDIM(schedule, source, steps)
    stock = type(sampler.scheduler).from_config(sampler.scheduler.config)
    stock.set_timesteps(steps)
    x, raw = torch.randn(2, 3, 1)
    for timestep, step in zip(stock.timesteps, sampler.grid(), strict=True):
        prediction = Prediction(raw, x, at(step.t, 3), schedule, kind)
        found = sampler.advance(prediction, step)
        x = stock.step(raw, timestep, x).prev_sample
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def pairs(teacher, start: torch.Tensor, labels: torch.Tensor | None = None, step: int = 0) -> Batch:
    """A batch of exact ODE pairs: ``start`` (B, 1) at t = 1 and where the teacher's flow takes it."""
    size = len(start)
    cond = {} if labels is None else {"class_labels": labels}
    end = teacher.flow_map(start, at(1.0, size), at(0.0, size), cond)
    rows, times = batch(size, step), torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows.path = PathRows(torch.stack([start, end], 1), times, cond, None, torch.ones(size, dtype=torch.float64))
    return rows


def ode_of(student, steps: int = 1, **config) -> OdeRegression:
    roles = Roles(teacher=None, student=student)
    return OdeRegression(OdeConfig(**config), roles, OnGrid(student.schedule, GRID[:steps], DDIM))


METRICS = {
    "l1": (lambda d: abs(d), lambda d: math.copysign(1, d)),
    "l2": (lambda d: d * d, lambda d: 2 * d),
    "huber": (lambda d: math.hypot(d, 0.1) - 0.1, lambda d: d / math.hypot(d, 0.1)),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name,kind", ALL)
def test_the_endpoint_map_is_the_optimum_of_regression_on_pairs(name, kind, metric):
    """Beside it, a sample that is off by d costs d's metric, and moves back along the metric's slope."""
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = player(lambda x, t, labels: teacher.flow_map(x, t, torch.zeros_like(t)), schedule, kind)
    method, rows = ode_of(student, metric=metric), pairs(teacher, batch(32).noise("x"))
    loss = method.losses("student", rows)["regression"]
    assert loss.item() < 1e-8
    value, slope = METRICS[metric]
    for shift in (0.3, -0.2):
        student.network.shift.data.fill_(shift)
        loss = method.losses("student", rows)["regression"]
        assert loss.item() == pytest.approx(value(shift), rel=1e-6)
        assert gradients(loss, student)[1] == pytest.approx(slope(shift), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_student_of_several_steps_answers_for_its_last_point_with_all_of_them(name):
    """Every step moves the sample: with x_0 = b everywhere DDIM ends at b, whatever the steps before."""
    schedule = SCHEDULES[name]
    teacher, student = GaussianDenoiser(*G1, schedule, "v"), generator(schedule, "v", 0.4, 0.3)
    method, rows = ode_of(student, steps=3, metric="l2"), pairs(teacher, batch(16).noise("x"))
    loss = method.losses("student", rows)["regression"]
    scale, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.3))
    x = ddim_path(lambda x, t: scale * x + shift, rows.path.points[:, 0], GRID[:3], schedule)
    expected = (scale * x + shift - rows.path.points[:, 1]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    wanted = torch.autograd.grad(expected, [scale, shift])
    assert gradients(loss, student) == pytest.approx([g.item() for g in wanted], rel=1e-6)


def test_pairs_bring_their_own_conditions():
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.3]), schedule, "flow")
    labels = torch.tensor([0, 1] * 8)
    student = player(lambda x, t, y: teacher.flow_map(x, t, 0 * t, {"class_labels": y}), schedule, "flow")
    rows = pairs(teacher, batch(16).noise("x"), labels)
    rows.cond = {"class_labels": 1 - labels}
    assert ode_of(student).losses("student", rows)["regression"].item() < 1e-10


@pytest.mark.parametrize("metric", METRICS)
def test_regression_on_pairs_converges_to_the_mixtures_quantile_map(metric):
    """A network of 64 units learns the endpoint map of bed M1, two modes from one Gaussian."""
    schedule = SCHEDULES["flow"]
    teacher = MixtureDenoiser(*M1, schedule, "sample")
    body = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).double()
    student = player(lambda x, t, labels: body(2 * x), schedule, "sample")
    method = ode_of(student, metric=metric)
    whole = pairs(teacher, torch.randn(2000, 1, dtype=torch.float64)).path.points
    optimizer, steps = torch.optim.Adam(body.parameters(), lr=0.02), 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        rows = batch(64, step)
        rows.path = PathRows(whole[rows.integers("path row", 2000)], torch.tensor([1.0, 0.0]), {}, None, torch.ones(64))
        optimizer.zero_grad()
        sum(method.losses("student", rows).values()).backward()
        optimizer.step()
    x = column(-1.0, 0.0, 1.0)
    assert (student(x, at(1.0, 3), {}).x0 - teacher.flow_map(x, at(1.0, 3), at(0.0, 3))).abs().max() < 0.1


class Rotated:
    """A denoiser with two layers: of tokens, and of pixels with channels; each sees x_t along its own axis."""

    def __init__(self, schedule):
        self.schedule, self.calls = schedule, []

    def features(self, x_t, t, cond):
        self.calls.append((x_t, t))
        tokens = torch.stack([x_t, torch.ones_like(x_t)], -1)
        return [tokens, torch.stack([torch.ones_like(x_t), 2 * x_t], 1)[..., None]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_teachers_layers_compare_directions_under_one_noise(name):
    """States (x_t, 1) and (1, 2 x_t): the squared distance of unit vectors is 2 - 2 cos."""
    schedule, t = SCHEDULES[name], at(0.2, 3)
    teacher, x, y = Rotated(schedule), column(0.3, -0.4, 1.2).requires_grad_(), column(0.5, 0.1, -0.7).requires_grad_()
    eps = column(0.1, -0.3, 0.2)
    found = feature_distance(teacher, x, y, t, eps, {})
    (y_t, _), (x_t, _) = teacher.calls
    torch.testing.assert_close(x_t - y_t, schedule.alpha(t)[:, None] * (x - y))
    angles = [(f(x_t) - f(y_t)).detach() for f in (torch.atan, lambda v: torch.atan(2 * v))]
    expected = torch.stack([2 - 2 * angle.cos() for angle in angles]).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = torch.autograd.grad(found, (x, y), allow_unused=True)
    assert slopes[0].abs().min() > 0 and slopes[1] is None
    assert feature_distance(teacher, x, x.detach(), t, eps, {}).item() < 1e-12


class Layered(Rotated):
    """A Gaussian teacher with such layers."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.denoiser = GaussianDenoiser(*G1, schedule, "v")
        self.norm_axis, self.rule, self.takes_r = None, self.denoiser.rule, False

    def __call__(self, x_t, t, cond):
        return self.denoiser(x_t, t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_dmd_and_flash_diffusion_compare_under_the_teachers_layers(name):
    """Both terms vanish at the end of the path, which is held; beside it the layers add what they find."""
    schedule, noise = SCHEDULES[name], column(-0.5, 0.2, 1.0)
    flash = METHODS["flash-diffusion"]
    method = flash(
        flash.Config(metric="features", gan_weights=[0.0] * 4),
        Roles(Layered(schedule), generator(schedule, "v", 0.9, 0.2)),
        OnGrid(schedule, [1.0]),
    )
    rows = batch(3, latents=noise)
    found = method.losses("student", rows)
    moved = [*method.roles.student.network.parameters()]
    slopes = [torch.autograd.grad(loss, moved, retain_graph=True) for loss in found.values()]
    assert [*found] == ["distill", "features"] and all(one.abs() > 1e-6 for slope in slopes for one in slope)
    end = method.roles.student(noise, at(1.0, 3), {}).x0.detach()
    method.end = lambda *_: end
    method.student = lambda *_: method.roles.student(noise, at(1.0, 3), {})
    assert max(loss.item() for loss in method.losses("student", rows).values()) < 1e-9
    path = PathRows(torch.stack([noise, end], 1), torch.tensor([1.0, 0.0]), {}, None, torch.ones(3))
    dmd = METHODS["dmd"]
    roles = Roles(Layered(schedule), generator(schedule, "v", 0.9, 0.2), critic=None)
    plain, layered = (dmd(dmd.Config(metric=one), roles, OnGrid(schedule, [1.0])) for one in ("l2", "features"))
    assert layered.pair_loss(batch(3).but(path=path)).item() < 1e-9
    roles.student.network.shift.data += 0.2
    apart = [one.pair_loss(batch(3).but(path=path)).item() for one in (plain, layered)]
    assert apart[0] == pytest.approx(0.04) and apart[1] > apart[0] + 1e-4


def test_regression_under_the_teachers_layers():
    schedule = SCHEDULES["vp"]
    student = generator(schedule, "v", 0.9, 0.2)
    noise = column(-0.5, 0.2, 1.0)
    path = PathRows(torch.stack([noise, 0.9 * noise + 0.2], 1), torch.tensor([1.0, 0.0]), {}, None, torch.ones(3))
    method = OdeRegression(OdeConfig(metric="features"), Roles(Rotated(schedule), student), OnGrid(schedule, [1.0]))
    losses = method.losses("student", batch(3).but(path=path))
    assert [*losses] == ["regression", "features"] and max(loss.item() for loss in losses.values()) < 1e-6
    times = torch.cat([t for _, t in method.roles.teacher.calls])
    assert times.min() >= 0.0195 and times.max() <= 0.3005
