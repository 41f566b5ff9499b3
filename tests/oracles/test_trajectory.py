"""Trajectory regression against closed forms: the teacher's solver, the fixed point, the stock deterministic steps."""

import itertools

import diffusers
import pytest
import torch
from bed import G1, M1, SCHEDULES, OnGrid, at, batch, column, ddim_path, generator, player

from stepdistill.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.methods import Roles
from stepdistill.methods.trajectory import TrajectoryConfig, TrajectoryRegression
from stepdistill.samplers import DDIM, dpm_solver_step
from stepdistill.schedule import KINDS, Prediction, from_scheduler

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
