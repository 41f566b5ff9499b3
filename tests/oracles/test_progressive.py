"""Progressive distillation against closed forms: the target, the phases, and the fine solver they end at."""

import itertools

import diffusers
import pytest
import torch
from torch import nn

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.methods import Roles
from stepdistill.methods.progressive import ProgressiveConfig, ProgressiveDistillation
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    SCHEDULES,
    OnGrid,
    Spy,
    at,
    batch,
    column,
    ddim_path,
    generator,
    gradients,
    player,
)

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every student starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]
GRID = [1.0, 749 / 999, 499 / 999, 249 / 999]


def method_of(teacher, student, target=None, scale=1.0, times=GRID, **config) -> ProgressiveDistillation:
    roles = Roles(teacher=teacher, student=student, target=target, scale=scale)
    settings = {"start_steps": 2 * len(times)} | config
    return ProgressiveDistillation(ProgressiveConfig(**settings), roles, OnGrid(student.schedule, times, DDIM))


def images(size: int = 64, step: int = 0):
    mean, std = G1
    return batch(size, step, latents=mean + std * torch.randn(size, 1, dtype=torch.float64))


def test_the_target_has_the_golden_values():
    flow, edm = SCHEDULES["flow"], SCHEDULES["edm"]
    t, m, r = edm.time(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).log() / 4).tolist()
    cases = [(flow, 0.8, (0.8, 0.6, 0.4), 0.801538, 0.800769), (edm, 3.0, (t, m, r), 0.757587, 1.318190)]
    for schedule, x, times, expected, end in cases:
        teacher = GaussianDenoiser(*G1, schedule, "flow")
        method = method_of(teacher, generator(schedule, "flow", 1.0, 0.0))
        target = method.target(column(x), torch.tensor([[*times, 0.0]], dtype=torch.float64), 0, batch(1))
        assert round(target.item(), 6) == expected
        (alpha, sigma), (alpha_r, sigma_r) = (schedule.coefficients(at(time)) for time in times[::2])
        arrived = alpha_r * target + sigma_r * (column(x) - alpha * target) / sigma
        assert round(arrived.item(), 6) == end


@pytest.mark.parametrize("name,kind", ALL)
def test_one_student_step_is_two_of_the_teacher(name, kind):
    """And the last, which ends clean, is the teacher's x_0 half a step further."""
    schedule, x = SCHEDULES[name], column(-0.4, 1.3)
    teacher = GaussianDenoiser(*G1, schedule, kind)
    method = method_of(teacher, generator(schedule, kind, 1.0, 0.0))
    for k, step in enumerate(method.grids[0]):
        halves = method.halves(0, torch.full((2,), k))
        t, m, r = halves[0, :3].tolist()
        target = method.target(x, halves, 0, batch(2))
        if step.r is None:
            half_way = ddim_path(teacher.posterior_mean, x, [t, m], schedule)
            torch.testing.assert_close(target, teacher.posterior_mean(half_way, at(m, 2)))
        else:
            expected = ddim_path(teacher.posterior_mean, x, [t, m, r], schedule)
            found = ddim_path(lambda x, t, target=target: target, x, [t, r], schedule)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def exact_student(teacher, schedule, kind, times=GRID):
    """The student that does two teacher steps in one; on a Gaussian its x_0 is affine in x."""
    method = method_of(teacher, generator(schedule, kind, 1.0, 0.0), times=times)

    def function(x, t, labels):
        nearest = (torch.tensor(times, dtype=torch.float64) - t[:, None]).abs().argmin(1)
        halves = method.halves(0, nearest)
        at_zero, at_one = (method.target(torch.full_like(x, v), halves, 0, batch(len(x))) for v in (0.0, 1.0))
        return at_zero + x * (at_one - at_zero)

    return player(function, schedule, kind)


@pytest.mark.parametrize("inputs", ["images", "rollout"])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_closed_form_is_the_optimum(name, kind, inputs):
    """Beside it, an x_0 that is off by d costs max(SNR, 1) d^2, with twice that over d as slope."""
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = Spy(exact_student(teacher, schedule, kind))
    method, rows = method_of(teacher, student, inputs=inputs), images()
    for turn, mover in enumerate(method.turns(0)):
        rows.turn = turn
        loss = method.losses(mover, rows)["progressive"]
        assert loss.item() < 1e-10 and max(map(abs, gradients(loss, student.denoiser))) < 1e-6
    shift = student.denoiser.network.shift
    shift.data += 0.1
    rows = images()
    for turn, mover in enumerate(method.turns(0)):
        rows.turn = turn
        loss = method.losses(mover, rows)["progressive"]
        alpha, sigma = schedule.coefficients(student.calls[-1][1])
        weight = (alpha / sigma).square().clamp_min(1).mean().item()
        assert loss.item() == pytest.approx(weight * 0.01, rel=1e-4)
        assert gradients(loss, student.denoiser)[1] == pytest.approx(weight * 0.2, rel=1e-4)


def test_every_step_of_the_grid_is_trained_on_noised_images():
    schedule = SCHEDULES["vp"]
    student = Spy(generator(schedule, "v", 1.0, 0.0))
    method = method_of(GaussianDenoiser(*G1, schedule, "v"), student)
    rows = images(400)
    method.losses("student", rows)
    ((x_t, t),) = student.calls
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == sorted(GRID) and counts.min() > 70
    torch.testing.assert_close(x_t, schedule.add_noise(rows.latents, rows.noise("forward"), t))


def test_a_rollout_visits_the_students_own_points():
    schedule = SCHEDULES["flow"]
    student = Spy(generator(schedule, "flow", 0.6, 0.1))
    method, rows = method_of(GaussianDenoiser(*G1, schedule, "flow"), student, inputs="rollout"), batch(8)
    for turn in range(len(method.turns(0))):
        rows.turn = turn
        method.losses("student", rows)
        assert not rows.state["x"].requires_grad
    assert [t[0].item() for _, t in student.calls] == GRID
    rows.turn = 0
    for k, (x, _) in enumerate(student.calls):
        expected = ddim_path(lambda x, t: 0.6 * x + 0.1, rows.noise("start"), GRID[: k + 1], schedule)
        torch.testing.assert_close(x, expected)


STOCK = {
    "vp": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("name", STOCK)
def test_the_phases_end_at_the_exported_grid_and_refine_it(name, steps):
    source = STOCK[name]()
    schedule, kind = from_scheduler(source)
    any_player, sampler = generator(schedule, kind, 1.0, 0.0), DDIM(schedule, source, steps)
    config = ProgressiveConfig(start_steps=16 * steps)
    grids = ProgressiveDistillation(config, Roles(teacher=any_player, student=any_player), sampler).grids
    assert grids[-1] == sampler.grid() and [len(grid) for grid in grids] == [8 * steps, 4 * steps, 2 * steps, steps]
    for fine, coarse in itertools.pairwise(grids):
        assert [step.t for step in fine[::2]] == [step.t for step in coarse]
        assert [step.r for step in fine[1::2]] == [step.r for step in coarse]
        assert all(a.t > a.r == b.t for a, b in zip(fine[::2], fine[1::2], strict=True))
    if name == "vp":
        for grid in grids:
            stock = DDIM(schedule, source, len(grid)).grid()
            apart = max(abs(a.t - b.t) * 999 for a, b in zip(grid, stock, strict=True))
            assert apart < (1.001 if 1000 % len(grid) else 1e-9)


@pytest.mark.parametrize("start", [2, 4, 12, 24])
def test_a_start_that_is_no_power_of_two_times_the_steps_is_refused(start):
    problems = ProgressiveDistillation.problems(ProgressiveConfig(start_steps=start), 4, 10_000)
    assert list(problems) == [
        ("method.start_steps", f"expected student.steps times 2, 4, 8, ..., found {start} for 4 steps")
    ]


def test_a_run_that_never_reaches_the_students_own_phase_is_refused():
    config = ProgressiveConfig(start_steps=16, phase_steps=100)  # 8 steps for 100 updates, then 4
    assert not list(ProgressiveDistillation.problems(config, 4, 101))
    ((key, problem),) = ProgressiveDistillation.problems(config, 4, 100)
    assert key == "train.steps" and "expected more than 100" in problem and "found 100" in problem


class Table(nn.Module):
    """x_0 = a_i x + b_i at the i-th of given times: any student of a Gaussian teacher."""

    def __init__(self, times: list[float], schedule, kind):
        super().__init__()
        self.times, self.schedule, self.kind = torch.tensor(times, dtype=torch.float64), schedule, kind
        self.a, self.b = (nn.Parameter(torch.zeros(len(times), dtype=torch.float64)) for _ in range(2))

    def forward(self, x, timestep):
        t = self.schedule.time(timestep)
        i = (self.times - t[:, None]).abs().argmin(1)
        return self.schedule.from_x0(self.a[i, None] * x + self.b[i, None], x, t, self.kind)


def table_method(teacher, name, kind, steps=2, start=16, **config):
    """Students that can be anything at each time of the finest grid, and the times of the fine solver."""
    schedule = SCHEDULES[name]
    times = [k / steps for k in range(steps, 0, -1)]
    grids = method_of(teacher, generator(schedule, kind, 1.0, 0.0), times=times, start_steps=2 * start).grids
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    fine = [step.t for step in grids[0]]
    student, target = (Denoiser(Table(fine, schedule, kind), spec, schedule, kind) for _ in range(2))
    method = method_of(teacher, student, target, times=times, start_steps=start, **config)
    return method, fine


def fine_endpoint(teacher, x, fine, schedule):
    x = ddim_path(teacher.posterior_mean, x, fine, schedule)
    return teacher.posterior_mean(x, at(fine[-1], len(x)))


def coarse_endpoint(method, x):
    for step in method.grids[-1]:
        prediction = method.roles.student(x, at(step.t, len(x)), {})
        x = method.sampler.advance(prediction, step, None)
    return x.detach()


@pytest.mark.parametrize("name,kind", [(name, kind) for name, kind in ALL if kind in ("v", "sample")])
def test_the_phases_compose_to_the_fine_solver(name, kind):
    """16 -> 8 -> 4 -> 2, each student set to its exact target: two of its steps are sixteen of the teacher's."""
    teacher = GaussianDenoiser(*G1, SCHEDULES[name], kind)
    method, fine = table_method(teacher, name, kind, phase_steps=5, average=0.0)
    network = method.roles.student.network
    for phase, grid in enumerate(method.grids):
        # The phase's first step takes over the last phase's student as teacher, before that moves.
        method.losses("student", images(4, step=5 * phase))
        for k, step in enumerate(grid):
            halves = method.halves(phase, torch.tensor([k]))
            at_zero, at_one = (method.target(column(v), halves, phase, batch(1)) for v in (0.0, 1.0))
            i = (network.times - step.t).abs().argmin()
            network.a.data[i], network.b.data[i] = (at_one - at_zero).item(), at_zero.item()
        method.after_update("student")
    x = column(-1.0, 0.2, 1.1)
    expected = fine_endpoint(teacher, x, fine, SCHEDULES[name])
    torch.testing.assert_close(coarse_endpoint(method, x), expected, rtol=1e-7, atol=1e-7)
    exact = teacher.flow_map(x, at(1.0, 3), at(0.0, 3))
    two_steps = fine_endpoint(teacher, x, [step.t for step in method.grids[-1]], SCHEDULES[name])
    assert (expected - exact).abs().max() < 0.5 * (two_steps - exact).abs().max()


def test_the_teacher_is_replaced_at_the_first_step_of_a_phase_alone():
    schedule = SCHEDULES["flow"]
    student, target = generator(schedule, "flow", 0.5, 0.1), Spy(generator(schedule, "flow", 0.9, 0.2))
    teacher = Spy(GaussianDenoiser(*G1, schedule, "flow"))
    method = method_of(teacher, student, target, start_steps=16, phase_steps=3, average=0.5)
    assert [method.phase(step) for step in (0, 2, 3, 5, 6, 100)] == [0, 0, 1, 1, 1, 1]
    kept = [p.item() for p in target.network.parameters()]
    for step in (0, 2, 4, 6):
        method.losses("student", images(step=step))
        assert [p.item() for p in target.network.parameters()] == kept
        assert (len(teacher.calls), len(target.calls)) == ((2, 0) if step < 3 else (0, 2))
        teacher.calls, target.calls = [], []
    student.network.scale.data.fill_(0.7)
    method.after_update("student")
    student.network.scale.data.fill_(0.8)
    method.losses("student", images(step=3))
    for network in (target.network, student.network):
        assert [p.item() for p in network.parameters()] == pytest.approx([0.6, 0.1])
    assert all(p.grad is None for p in target.network.parameters())


def test_the_first_phase_takes_the_guidance_in():
    schedule, w = SCHEDULES["flow"], 3.0
    teacher = GaussianDenoiser(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5]), schedule, "flow")
    method = method_of(teacher, generator(schedule, "flow", 1.0, 0.0), scale=w, times=[1.0])
    x, rows = column(-0.4, 1.3), batch(2, labels=(0, 1))

    def guided(x, t):
        cond, null = (teacher.posterior_mean(x, t, labels) for labels in (rows.cond, rows.null))
        return null + w * (cond - null)

    expected = guided(ddim_path(guided, x, [1.0, 0.5], schedule), at(0.5, 2))
    torch.testing.assert_close(method.target(x, method.halves(0, torch.zeros(2).long()), 0, rows), expected)


@pytest.mark.parametrize("inputs", ["images", "rollout"])
def test_training_arrives_at_the_fine_solver(inputs):
    """8 -> 4 -> 2 by gradient descent alone."""
    schedule = SCHEDULES["vp"]
    teacher = GaussianDenoiser(*G1, schedule, "v")
    steps = 200 if inputs == "images" else 80
    method, fine = table_method(teacher, "vp", "v", steps=2, start=8, phase_steps=steps, inputs=inputs, average=0.9)
    optimizer = torch.optim.Adam(method.roles.student.network.parameters(), lr=0.05, betas=(0.9, 0.95))
    for step in range(2 * steps):
        done = step % steps / steps
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - done) ** 2
        rows = images(32, step)
        for turn, mover in enumerate(method.turns(step)):
            rows.turn = turn
            optimizer.zero_grad()
            sum(method.losses(mover, rows).values()).backward()
            optimizer.step()
            method.after_update(mover)
    x = column(-1.0, 0.2, 1.1)
    expected = fine_endpoint(teacher, x, fine, schedule)
    assert (coarse_endpoint(method, x) - expected).abs().max() < 0.01
