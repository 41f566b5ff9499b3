"""LCM and TCD against closed forms: targets, losses, fixed points and the stock schedulers they are exported as."""

import copy
import math

import diffusers
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.tiny import tiny_dit
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.samplers import TCD as TCDSampler
from stepdistill.diffusion.samplers import Renoise, Step, renoise_up
from stepdistill.diffusion.schedule import Prediction, Schedule, from_scheduler
from stepdistill.errors import InputError
from stepdistill.methods import Roles
from stepdistill.methods.consistency import LCM, TCD, ConsistencyConfig, boundary, solver_grid
from stepdistill.methods.parts.losses import pseudo_huber
from stepdistill.roles.added import GuidanceEmbedded
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    Map,
    OnGrid,
    Spy,
    at,
    batch,
    column,
    corners,
    ddim_path,
    descend,
    gradients,
    player,
    table,
)

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every solver starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]


def method_of(cls, teacher, student, target=None, scale=1.0, **config):
    roles = Roles(teacher=teacher, student=student, target=target or student, scale=scale)
    return cls(ConsistencyConfig(**config), roles, OnGrid(student.schedule, [1.0]))


def loss_of(method, rows) -> torch.Tensor:
    return sum(method.losses("student", rows).values())


def data(size: int = 64) -> torch.Tensor:
    return GaussianDenoiser(*G1, SCHEDULES["flow"], "flow").sample(
        size, (1,), generator=torch.Generator().manual_seed(3)
    )


def test_the_pseudo_huber_loss():
    d = torch.tensor([3e-3, -4e-3], dtype=torch.float64, requires_grad=True)
    loss = pseudo_huber(d, 1e-3)
    assert loss.item() == pytest.approx((math.sqrt(10) + math.sqrt(17) - 2) * 1e-3 / 2)
    (gradient,) = torch.autograd.grad(loss, d)
    assert gradient.tolist() == pytest.approx([3 / math.sqrt(10) / 2, -4 / math.sqrt(17) / 2])


def test_the_solver_grid_is_lcms():
    timesteps = SCHEDULES["vp"].timestep(solver_grid(SCHEDULES["vp"], 50))
    assert timesteps.tolist() == [0, *range(19, 1000, 20)]
    stock = diffusers.LCMScheduler(original_inference_steps=50)
    stock.set_timesteps(50)
    assert stock.timesteps.tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_boundary_condition(name):
    c_skip, c_out = boundary(SCHEDULES[name], torch.tensor([0.0, 19 / 999, 1.0], dtype=torch.float64))
    assert (c_skip[0].item(), c_out[0].item()) == pytest.approx((1, 0), abs=1e-15)
    assert (c_skip.diff() < 0).all() and (c_out.diff() > 0).all()
    if name == "vp":
        stock = diffusers.LCMScheduler()
        for step, skip, out in zip((0, 19, 999), c_skip, c_out, strict=True):
            assert (skip.item(), out.item()) == pytest.approx(
                stock.get_scalings_for_boundary_condition_discrete(step), rel=1e-6
            )
        assert c_skip[1].item() == pytest.approx(6.9e-6, rel=1e-2)


def test_the_boundary_condition_of_a_pipelines_edm_schedule():
    """x_t is c_in times the sample; from_scheduler's schedule is not the plain one."""
    schedule, _ = from_scheduler(diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    c_skip, c_out = boundary(schedule, t)
    skip = c_skip * schedule.alpha(t)
    assert (skip[0].item(), c_out[0].item()) == pytest.approx((1, 0), abs=1e-6)
    assert (skip.diff() < 0).all() and (c_out.diff() > 0).all() and c_out[-1].item() == pytest.approx(1, abs=1e-3)


def affine_student(schedule: Schedule, kind, scale=0.8, shift=0.3):
    return player(lambda x, t, labels: x, schedule, kind, scale, shift)


@pytest.mark.parametrize("cls", [LCM, TCD])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_loss_is_the_closed_form(cls, name, kind):
    """From the observed (x_t, t) alone: the teacher's DDIM step, the target's and the student's jump, the loss."""
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = Spy(GaussianDenoiser(mean, std, schedule, kind))
    student, target = Spy(affine_student(schedule, kind)), Spy(affine_student(schedule, kind, 0.7, 0.1))
    method = method_of(cls, teacher, student, target)
    jumps = []
    inner = method.jump
    method.jump = lambda prediction, s: jumps.append(s) or inner(prediction, s)
    loss = loss_of(method, batch(64, latents=data()))
    ((x_t, t),), ((x_r, r),), ((x_student, t_student),) = teacher.calls, target.calls, student.calls
    assert torch.equal(x_t, x_student) and torch.equal(t, t_student) and (r < t).all()

    alpha, sigma, alpha_r, sigma_r = (c[:, None] for time in (t, r) for c in schedule.coefficients(time))
    grid = solver_grid(schedule, 50)
    n = torch.searchsorted(grid, t)
    assert torch.equal(grid[n], t) and torch.equal(grid[n - 1], r)
    real = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    torch.testing.assert_close(x_r, alpha_r * real + sigma_r * (x_t - alpha * real) / sigma, rtol=1e-9, atol=1e-9)

    s, s_target = jumps
    assert torch.equal(s, s_target) and (s <= r).all()

    def jump(x, x0, time):
        if cls is LCM:
            if name == "edm":
                beyond = schedule.sigma(time)[:, None] - schedule.sigma_min
                return 1 / (beyond**2 + 1) * x + beyond / (beyond**2 + 1).sqrt() * x0
            index = 10 * schedule.timestep(time)[:, None]
            return 0.25 / (index**2 + 0.25) * x + index / (index**2 + 0.25).sqrt() * x0
        (a, b), (a_s, b_s) = ([c[:, None] for c in schedule.coefficients(v)] for v in (time, s))
        return a_s * x0 + b_s * (x - a * x0) / b

    x_clean = torch.where(sigma_r > 0, 0.7 * x_r + 0.1, x_r)
    d = jump(x_t, 0.8 * x_t + 0.3, t) - jump(x_r, x_clean, r)
    expected = ((d**2 + 1e-6).sqrt() - 1e-3).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)


def solver_composite(x0_of, schedule: Schedule, steps: int):
    """What LCM converges to: all remaining steps of the teacher's solver, then the boundary condition undone."""
    grid = solver_grid(schedule, steps).tolist()

    def function(x, t, labels):
        end = x
        for time, after in zip(grid[:0:-1], grid[-2::-1], strict=True):
            active = (t > time - 1e-9)[:, None]
            end = torch.where(active, ddim_path(x0_of, end, [time, after], schedule), end)
        c_skip, c_out = (c[:, None] for c in boundary(schedule, t))
        return torch.where(c_out > 0, (end - c_skip * x) / c_out, x)

    return function


def one_jump(method, x: torch.Tensor, cond) -> list[float]:
    found = method.jump(method.roles.student(x, at(1.0, len(x)), cond), at(0.0, len(x)))
    return [round(value, 6) for value in found.flatten().tolist()]


@pytest.mark.parametrize("name,kind", ALL)
def test_lcms_fixed_point_is_the_composed_solver(name, kind):
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = player(solver_composite(teacher.posterior_mean, schedule, 10), schedule, kind)
    method = method_of(LCM, teacher, student, solver_steps=10)
    loss = loss_of(method, batch(64, latents=data()))
    assert loss.item() < 1e-12
    assert math.hypot(*gradients(loss, student)) < 1e-6
    student.network.shift.data += 0.01
    assert loss_of(method, batch(64, latents=data())).item() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_lcms_golden_fixed_points(kind):
    """50 DDIM steps on the Stable Diffusion table, not the exact flow (.501514; 1.313868 at z = 1)."""
    schedule = SCHEDULES["vp"]
    x = column(-1.0, 0.0, 1.0)
    for teacher, expected in (
        (GaussianDenoiser(0.0, 0.5, schedule, kind), [-0.477035, 0.0, 0.477035]),
        (MixtureDenoiser(*M1, schedule, kind), [-1.562043, 0.520039, 1.291536]),
    ):
        student = player(solver_composite(teacher.posterior_mean, schedule, 50), schedule, kind)
        method = method_of(LCM, teacher, student)
        loss = loss_of(method, batch(32, latents=teacher.sample(32, (1,), generator=torch.Generator().manual_seed(0))))
        assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
        assert one_jump(method, x, {}) == pytest.approx(expected, abs=1e-6)


def test_lcms_guided_fixed_point():
    """With guidance it is the solver on D_w: class 2 of M1 at w = 2 (w = 1 in LCM's own convention)."""
    schedule = SCHEDULES["vp"]
    teacher = MixtureDenoiser(*M1, schedule, "v")
    label, null = ({"class_labels": torch.tensor([value])} for value in (1, 2))

    def x0_of(x, t):
        plain = teacher.posterior_mean(x, t, null)
        return plain + 2.0 * (teacher.posterior_mean(x, t, label) - plain)

    student = player(solver_composite(x0_of, schedule, 50), schedule, "v")
    method = method_of(LCM, teacher, student, scale=2.0)
    loss = loss_of(method, batch(32, latents=data(32), labels=(1, 2)))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    unguided = method_of(LCM, teacher, student, scale=1.0)
    assert loss_of(unguided, batch(32, latents=data(32), labels=(1, 2))).item() > 1e-3


class TellingMap(Map):
    """A :class:`bed.Map` of (x_t, t, guidance_scale): a student that is told w."""

    def forward(self, x, timestep, class_labels=None, guidance_scale=None):
        return super().forward(x, timestep, guidance_scale)


def telling_player(function, schedule: Schedule, kind) -> Denoiser:
    spec = CallSpec("x", "timestep", timestep_dtype=torch.float64)
    return Denoiser(TellingMap(function, schedule, kind), spec, schedule, kind)


def guided_mixture(teacher):
    """D_w of class 2 of M1, from the formula; w (B,)."""
    label, null = ({"class_labels": torch.tensor([value])} for value in (1, 2))

    def x0_of(x, t, w):
        plain = teacher.posterior_mean(x, t, null)
        return plain + w[:, None] * (teacher.posterior_mean(x, t, label) - plain)

    return x0_of


@pytest.mark.parametrize("name,kind", ALL)
def test_a_range_of_w_has_the_guided_fixed_point_at_every_w(name, kind):
    """Told w, the student is the solver on D_w for each row's own w; told another w, it is not."""
    schedule = SCHEDULES[name]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    x0_of = guided_mixture(teacher)

    def composite(bias: float):
        def function(x, t, w):
            return solver_composite(lambda y, time: x0_of(y, time, w + bias), schedule, 10)(x, t, None)

        return function

    student, wrong = (telling_player(composite(bias), schedule, kind) for bias in (0.0, 0.2))
    method = method_of(LCM, teacher, student, scale=2.0, solver_steps=10, w_min=1.0, w_max=3.0)
    loss = loss_of(method, batch(64, latents=data(), labels=(1, 2)))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    other = method_of(LCM, teacher, wrong, scale=2.0, solver_steps=10, w_min=1.0, w_max=3.0)
    assert loss_of(other, batch(64, latents=data(), labels=(1, 2))).item() > 1e-4


@pytest.mark.parametrize("cls", [LCM, TCD])
def test_every_network_is_told_the_w_that_the_teacher_is_guided_with(cls):
    schedule, told = SCHEDULES["vp"], []
    teacher = Spy(MixtureDenoiser(*M1, schedule, "v"))

    def listen(x, t, w):
        told.append(w)
        return x

    student = telling_player(listen, schedule, "v")
    target = Spy(student)
    method = method_of(cls, teacher, student, target, scale=2.0, w_min=1.5, w_max=4.0)
    loss_of(method, batch(2000, latents=data(2000), labels=(1, 2)))
    assert torch.equal(told[0], told[1])
    w = told[0]
    assert w.min().item() == pytest.approx(1.5, abs=0.01) and w.max().item() == pytest.approx(4, abs=0.01)
    assert w.mean().item() == pytest.approx(2.75, abs=0.06)
    (x_t, t), (x_r, r) = teacher.calls[0], target.calls[0]
    x_t, t = x_t[:2000], t[:2000]
    real = guided_mixture(teacher.denoiser)(x_t, t, w)
    (alpha, sigma), (alpha_r, sigma_r) = ([c[:, None] for c in schedule.coefficients(time)] for time in (t, r))
    torch.testing.assert_close(x_r, alpha_r * real + sigma_r * (x_t - alpha * real) / sigma, rtol=1e-8, atol=1e-8)


def test_a_fixed_w_is_told_to_nobody():
    schedule = SCHEDULES["vp"]
    method = method_of(LCM, MixtureDenoiser(*M1, schedule, "v"), affine_student(schedule, "v"), scale=2.0)
    assert method.guidance(batch(labels=(1, 2)))[1].keys() == {"class_labels"}
    network = nn.Linear(2, 2)
    assert LCM.adapt(ConsistencyConfig(), "student", network, 2.0) is network


def test_the_range_of_w_is_checked():
    for keys in ({"w_min": 1.0}, {"w_max": 2.0}, {"w_min": 2.0, "w_max": 1.0}):
        with pytest.raises(ValidationError, match="expected w_min below w_max or neither"):
            ConsistencyConfig(**keys)
    config = ConsistencyConfig(w_min=1.0, w_max=2.0)
    with pytest.raises(InputError, match=r"teacher.guidance.scale: expected from method.w_min \(1.0\) .*, found 3.0"):
        LCM.adapt(config, "student", nn.Linear(2, 2), 3.0)
    config = ConsistencyConfig(w_min=1.5, w_max=2.0)
    with pytest.raises(InputError, match=r"found 1\.0; a teacher that takes guidance as an input needs method\."):
        LCM.adapt(config, "student", nn.Linear(2, 2), 1.0)
    schedule = SCHEDULES["vp"]
    method = method_of(LCM, None, affine_student(schedule, "v"), w_min=1.0, w_max=2.0)
    with pytest.raises(InputError, match=r"method.w_min: expected null for a pipeline without guidance"):
        method.prepare(batch())
    method.prepare(batch(labels=(1, 2)))


def test_the_told_student_is_the_network_of_the_embedding():
    network = LCM.adapt(ConsistencyConfig(w_min=1.0, w_max=3.0), "student", tiny_dit().transformer, 2.0)
    assert isinstance(network, GuidanceEmbedded) and network.number == 2.0


def test_an_lcm_student_converges_to_the_composed_solver():
    schedule = SCHEDULES["flow"]
    teacher, grid = GaussianDenoiser(*G1, schedule, "flow"), solver_grid(schedule, 5)
    student = table(grid, G1, schedule, "flow")
    method = method_of(LCM, teacher, student, copy.deepcopy(student), solver_steps=5, target_ema=0.8)
    x = column(-1.0, 0.0, 1.0)
    wanted = ddim_path(teacher.posterior_mean, x, grid.flip(0).tolist(), schedule)

    def error() -> float:
        with torch.no_grad():
            return (student(x, at(1.0, 3), {}).x0 - wanted).abs().max().item()

    before = error()
    descend(method, lambda step: batch(48, step=step, latents=data(48)), steps=300, lr=0.03)
    assert error() < 2e-2 < 0.2 < before


def test_the_composed_solver_approaches_the_exact_map_at_first_order():
    schedule = SCHEDULES["edm"]
    teacher = GaussianDenoiser(*G1, schedule, "epsilon")
    start, errors = column(30.0, -60.0), []
    exact = teacher.flow_map(start, at(1.0, 2), at(0.0, 2))
    for steps in (100, 200, 400):
        times = solver_grid(schedule, steps).flip(0).tolist()
        errors.append((ddim_path(teacher.posterior_mean, start, times, schedule) - exact).abs().max().item())
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.1)


@pytest.mark.parametrize("name,kind", ALL)
def test_tcds_fixed_point_where_trajectories_are_straight(name, kind):
    """A point mass has x_s = alpha_s m + sigma_s eps on every trajectory, which the first-order jump can express."""
    schedule, mean = SCHEDULES[name], G1[0]
    teacher = GaussianDenoiser(mean, 0.0, schedule, kind)
    student = player(lambda x, t, labels: torch.full_like(x, mean), schedule, kind)
    method = method_of(TCD, teacher, student)
    loss = loss_of(method, batch(64, latents=torch.full((64, 1), mean, dtype=torch.float64)))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6


def test_tcd_has_a_floor_where_trajectories_bend():
    """One x_0 per time cannot serve every s: even LCM's optimum, exact at s = 0, leaves TCD a loss."""
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    student = player(solver_composite(teacher.posterior_mean, schedule, 10), schedule, "flow")
    lcm, tcd = (method_of(cls, teacher, student, solver_steps=10) for cls in (LCM, TCD))
    rows = batch(256, latents=data(256))
    assert loss_of(lcm, rows).item() < 1e-12 and loss_of(tcd, rows).item() > 1e-4


@pytest.mark.parametrize("name,kind", ALL)
def test_tcd_to_the_next_time_is_regression_on_the_teachers_step(name, kind):
    """At s = r the jump of any target is x_r itself, so the teacher is the optimum."""
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = player(lambda x, t, labels: teacher.posterior_mean(x, t), schedule, kind)
    method = method_of(TCD, teacher, student, target=affine_student(schedule, kind))
    rows, jump = batch(64, latents=data()), method.jump
    target = method.roles.target = Spy(method.roles.target)
    # The student jumps second; by then the target has seen r.
    method.jump = lambda prediction, s: jump(prediction, target.calls[-1][1])
    loss = loss_of(method, rows)
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6


def test_tcd_visits_every_start_and_every_target_time():
    schedule = SCHEDULES["vp"]
    teacher = Spy(GaussianDenoiser(*G1, schedule, "v"))
    method = method_of(TCD, teacher, affine_student(schedule, "v"))
    seen, jump = [], method.jump
    method.jump = lambda prediction, s: seen.append(s) or jump(prediction, s)
    loss_of(method, batch(5000, latents=data(5000)))
    starts, targets = (schedule.timestep(v).round().unique().int().tolist() for v in (teacher.calls[0][1], seen[0]))
    assert starts == list(range(39, 1000, 20)) and targets == [0, *range(19, 980, 20)]


@pytest.mark.parametrize("cls", [LCM, TCD])
def test_only_the_student_receives_gradients(cls):
    schedule = SCHEDULES["vp"]
    teacher, student, target = (affine_student(schedule, "v", 1.0, 0.1 * i) for i in range(3))
    method = method_of(cls, teacher, student, target)
    loss_of(method, batch(latents=data(6))).backward()
    assert all(p.grad is not None for p in student.network.parameters())
    assert all(p.grad is None for role in (teacher, target) for p in role.network.parameters())
    assert method.modules("student") == [student.network]


def test_the_target_is_a_moving_average():
    schedule = SCHEDULES["vp"]
    student, target = affine_student(schedule, "v", 1.0, 0.0), affine_student(schedule, "v", 0.0, 1.0)
    method = method_of(LCM, None, student, target, target_ema=0.75)
    method.after_update("student")
    assert (target.network.scale.item(), target.network.shift.item()) == pytest.approx((0.25, 0.75))
    assert (student.network.scale.item(), student.network.shift.item()) == (1.0, 0.0)


STOCK = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_tcd_step_is_the_stock_schedulers(gamma, steps, monkeypatch):
    """gamma = 0 is DDIM on the 50-grid's subset, gamma = 1 noises afresh from table entry 0."""
    monkeypatch.setattr(TCDSampler, "gamma", gamma)
    source = diffusers.DDIMScheduler(**STOCK)
    schedule, kind = from_scheduler(source)
    sampler = TCDSampler(schedule, source, steps)
    stock = diffusers.TCDScheduler.from_config(sampler.scheduler.config)
    stock.set_timesteps(steps)
    grid = sampler.grid()
    assert [round(step.t * 999) for step in grid] == stock.timesteps.tolist()
    x, raw = torch.randn(2, 3, 1)
    for timestep, step in zip(stock.timesteps, grid, strict=True):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(timestep)))
        prediction = Prediction(raw, x, at(step.t, 3), schedule, kind)
        found = sampler.advance(prediction, step, lambda noise=noise: noise)
        generator = torch.Generator().manual_seed(int(timestep))
        x = stock.step(raw, timestep, x, eta=gamma, generator=generator).prev_sample
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
        if gamma == 0 and step.r is not None:
            alpha, sigma = schedule.coefficients(at(step.r))
            torch.testing.assert_close(found, (alpha * prediction.x0 + sigma * prediction.eps).float())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_an_exact_jump_keeps_the_marginal_for_any_gamma(name, gamma):
    """x_s = Phi(x_t), then noise up to r: mean alpha_r m and variance V_r, whatever gamma."""
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = GaussianDenoiser(mean, std, schedule, "v")
    z, noise = corners()
    t, r, s = at(0.8, 4), at(0.5, 4), at(0.5 * (1 - gamma), 4)
    (alpha_t, sigma_t), (alpha_r, sigma_r) = (schedule.coefficients(v[:1]) for v in (t, r))
    x_t = alpha_t * mean + (alpha_t**2 * std**2 + sigma_t**2).sqrt() * z
    x_r = renoise_up(schedule, teacher.flow_map(x_t, t, s), s, r, noise)
    torch.testing.assert_close(x_r.mean(), (alpha_r * mean)[0])
    torch.testing.assert_close(x_r.var(correction=0), (alpha_r**2 * std**2 + sigma_r**2)[0])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_renoising_step_is_the_stock_lcm_schedulers(steps):
    """LCMScheduler with original_inference_steps = n: 999, 749, 499, 249 for n = 4, clean at the end."""
    source = diffusers.DDIMScheduler(**STOCK)
    schedule, kind = from_scheduler(source)
    sampler = Renoise(schedule, source, steps)
    stock = diffusers.LCMScheduler.from_config(sampler.scheduler.config)
    stock.set_timesteps(steps)
    assert stock.timesteps.tolist() == [1000 * (steps - i) // steps - 1 for i in range(steps)]
    x, raw = torch.randn(2, 3, 1)
    for timestep, step in zip(stock.timesteps, sampler.grid(), strict=True):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(timestep)))
        prediction = Prediction(raw, x, at(step.t, 3), schedule, kind)
        found = sampler.advance(prediction, Step(step.t, step.r), lambda noise=noise: noise)
        x = stock.step(raw, timestep, x, generator=torch.Generator().manual_seed(int(timestep))).prev_sample
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
