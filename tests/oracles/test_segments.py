"""PCM and TSCD against closed forms: segments, targets, fixed points, stages."""

import copy
import itertools
import math

import diffusers
import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.samplers import TCD as TCDSampler
from stepdistill.diffusion.schedule import Schedule, from_scheduler
from stepdistill.methods import Roles
from stepdistill.methods.pcm import PCM, TSCD, segment_points
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    SD_TABLE,
    EvenGrid,
    Spy,
    at,
    batch,
    column,
    descend,
    gradients,
    player,
    table,
)

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every solver starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]
STOCK = {"trained_betas": (1 - SD_TABLE / torch.cat([torch.ones(1), SD_TABLE[:-1]])).tolist()}


def method_of(cls, teacher, student, target=None, scale=1.0, steps=4, sampler=None, **config):
    roles = Roles(teacher=teacher, student=student, target=target or student, scale=scale)
    return cls(cls.Config(**config), roles, sampler or EvenGrid(student.schedule, steps))


def loss_of(method, rows) -> Tensor:
    return sum(method.losses("student", rows).values())


def data(size: int = 64, seed: int = 3) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return GaussianDenoiser(*G1, SCHEDULES["flow"], "flow").sample(size, (1,), generator=noise)


def coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), columns (B, 1); time 0 is the clean end, 1 and 0."""
    alpha, sigma = (value[:, None] for value in schedule.coefficients(t))
    return torch.where(t[:, None] > 0, alpha, 1.0), torch.where(t[:, None] > 0, sigma, 0.0)


def moved(x0: Tensor, x: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The DDIM step from ``t`` to ``s``, from the formula."""
    (alpha, sigma), (alpha_s, sigma_s) = coefficients(schedule, t), coefficients(schedule, s)
    return alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma


def composed(x0_of, x: Tensor, times: list[float], schedule: Schedule) -> Tensor:
    for t, r in itertools.pairwise(times):
        t, r = at(t, len(x)), at(r, len(x))
        x = moved(x0_of(x, t), x, t, r, schedule)
    return x


def segment_composite(x0_of, schedule: Schedule, points: Tensor):
    """The x_0 whose one jump to the end of t's segment is the teacher's remaining DDIM steps there."""

    def function(x, t, labels):
        found = x
        for row in points.tolist():
            end = x
            for time, after in itertools.pairwise(row[::-1]):
                active = (t > time - 1e-9)[:, None]
                end = torch.where(active, composed(x0_of, end, [time, after], schedule), end)
            (alpha, sigma), (alpha_s, sigma_s) = coefficients(schedule, t), coefficients(schedule, at(row[0], len(x)))
            x0 = (sigma * end - sigma_s * x) / (sigma * alpha_s - sigma_s * alpha)
            found = torch.where(((t > row[0] + 1e-9) & (t < row[-1] + 1e-9))[:, None], x0, found)
        return found

    return function


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", [DDIM, TCDSampler])
def test_segments_are_the_steps_of_the_sampler(name, steps):
    source = diffusers.DDIMScheduler(**STOCK)
    sampler = name(from_scheduler(source)[0], source, 4)
    points = segment_points(sampler, steps, 24)
    assert points.shape == (steps, 24 // steps + 1) and (points.diff(dim=1) > 0).all()
    assert [(row[-1], row[0] or None) for row in points.tolist()] == sampler.grid(steps)
    timesteps = sampler.schedule.timestep(points)
    assert torch.equal(timesteps, timesteps.round())
    if (name, steps) == (DDIM, 4):
        assert timesteps[:, [0, -1]].tolist() == [[749, 999], [499, 749], [249, 499], [0, 249]]


@pytest.mark.parametrize("cls", [PCM, TSCD])
@pytest.mark.parametrize("name,kind", ALL)
def test_the_loss_is_the_closed_form(cls, name, kind):
    """From the observed (x_t, t, s) alone: the teacher's step, both jumps, and no jump where the step ends at s."""
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = Spy(GaussianDenoiser(mean, std, schedule, kind))
    student, target = (
        Spy(player(lambda x, t, labels: x, schedule, kind, *numbers)) for numbers in ((0.8, 0.3), (0.7, 0.1))
    )
    method = method_of(cls, teacher, student, target, solver_steps=12)
    seen, jump = [], method.jump
    method.jump = lambda prediction, s: seen.append(s) or jump(prediction, s)
    loss = loss_of(method, batch(64, latents=data()))
    ((x_t, t),), ((x_r, r),), s = teacher.calls, target.calls, seen[-1]
    assert torch.equal(student.calls[0][0], x_t) and torch.equal(student.calls[0][1], t)
    points = segment_points(method.sampler, 4 if cls is PCM else 8, 12)
    for row in zip(s.tolist(), r.tolist(), t.tolist(), strict=True):
        (inside,) = [p for p in points.tolist() if p[0] <= row[0] and row[2] <= p[-1]]
        assert inside.index(row[1]) + 1 == inside.index(row[2])
        assert inside.index(row[0]) <= inside.index(row[1]) and (cls is TSCD or row[0] == inside[0])
    assert 0 < (r == s).sum() < 64

    alpha, sigma = coefficients(schedule, t)
    real = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    torch.testing.assert_close(x_r, moved(real, x_t, t, r, schedule), rtol=1e-9, atol=1e-9)
    # A jump of no length is the point itself, clean end included.
    further = torch.where((r == s)[:, None], x_r, moved(0.7 * x_r + 0.1, x_r, r.clamp_min(1e-6), s, schedule))
    d = moved(0.8 * x_t + 0.3, x_t, t, s, schedule) - further
    assert loss.item() == pytest.approx(((d**2 + 1e-6).sqrt() - 1e-3).mean().item(), rel=1e-8)


@pytest.mark.parametrize("name,kind", ALL)
def test_pcms_fixed_point_is_the_solver_composed_to_the_segments_end(name, kind):
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    points = segment_points(EvenGrid(schedule, 4), 4, 12)
    student = player(segment_composite(teacher.posterior_mean, schedule, points), schedule, kind)
    method = method_of(PCM, teacher, student, solver_steps=12)
    loss = loss_of(method, batch(64, latents=data()))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    student.network.shift.data += 0.01
    assert loss_of(method, batch(64, latents=data())).item() > 1e-7


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_pcm_trains_is_what_the_stock_sampler_runs(scale):
    """At the optimum, 4 steps of the exported sampler are the guided teacher's 24 DDIM steps, to the clean end."""
    source = diffusers.DDIMScheduler(**STOCK, prediction_type="v_prediction")
    schedule, kind = from_scheduler(source)
    sampler = DDIM(schedule, source, 4)
    teacher = MixtureDenoiser(*M1, schedule, kind)
    label, null = ({"class_labels": torch.tensor([value])} for value in (1, 2))

    def guided(x, t):
        plain = teacher.posterior_mean(x, t, null)
        return plain + scale * (teacher.posterior_mean(x, t, label) - plain)

    points = segment_points(sampler, 4, 24)
    student = player(segment_composite(guided, schedule, points), schedule, kind)
    method = method_of(PCM, teacher, student, scale=scale, sampler=sampler, solver_steps=24)
    loss = loss_of(method, batch(64, latents=data(), labels=(1, 2)))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    x = column(-1.0, 0.0, 1.0)
    every = points.flatten().unique().flip(0).tolist()
    assert len(every) == 25
    torch.testing.assert_close(sampler.sample(lambda x, t: student(x, t, {}), x), composed(guided, x, every, schedule))


@pytest.mark.parametrize("name,kind", ALL)
def test_tscds_fixed_point_where_trajectories_are_straight(name, kind):
    schedule, mean = SCHEDULES[name], G1[0]
    teacher = GaussianDenoiser(mean, 0.0, schedule, kind)
    student = player(lambda x, t, labels: torch.full_like(x, mean), schedule, kind)
    method = method_of(TSCD, teacher, student, solver_steps=12)
    loss = loss_of(method, batch(64, latents=torch.full((64, 1), mean, dtype=torch.float64)))
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6


def test_a_free_target_time_has_a_floor():
    """Where trajectories bend, one x_0 per time cannot serve every s: TSCD's loss is positive at PCM's optimum."""
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    points = segment_points(EvenGrid(schedule, 2), 2, 12)
    student = player(segment_composite(teacher.posterior_mean, schedule, points), schedule, "flow")
    losses = [
        loss_of(method_of(cls, teacher, student, steps=2, solver_steps=12, **config), batch(256, latents=data(256)))
        for cls, config in ((PCM, {}), (TSCD, {"segments": [2]}))
    ]
    assert losses[0].item() < 1e-12 and losses[1].item() > 1e-4


def test_tscd_visits_every_jump_inside_the_segments():
    schedule = SCHEDULES["vp"]
    teacher = Spy(GaussianDenoiser(*G1, schedule, "v"))
    method = method_of(TSCD, teacher, player(lambda x, t, labels: x, schedule, "v"), segments=[2], solver_steps=6)
    seen, jump = [], method.jump
    method.jump = lambda prediction, s: seen.append(s) or jump(prediction, s)
    loss_of(method, batch(2000, latents=data(2000)))
    found = {tuple(pair) for pair in torch.stack([teacher.calls[0][1], seen[-1]], 1).tolist()}
    rows = segment_points(method.sampler, 2, 6).tolist()
    assert found == {(row[i], row[j]) for row in rows for i in range(1, 4) for j in range(i)}


def test_the_stage_is_known_from_the_step_alone():
    """8, 4, 2, 1 segments; a method that never saw the earlier steps makes the same of a later one."""
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    student = player(lambda x, t, labels: x, schedule, "flow", 0.8, 0.3)
    method, resumed = (method_of(TSCD, teacher, student, stage_steps=10, solver_steps=16) for _ in range(2))
    assert not list(TSCD.problems(method.config, 4, 31))
    ((key, problem),) = TSCD.problems(method.config, 4, 30)
    assert key == "train.steps" and "expected more than 30" in problem and "found 30" in problem
    counts = [method.segments(step) for step in range(60)]
    assert counts == [8] * 10 + [4] * 10 + [2] * 10 + [1] * 30
    for step in (0, 10, 20, 30, 59):
        rows = batch(200, step=step, latents=data(200))
        draws = torch.stack(method.draw(rows))
        width = 1 / counts[step]
        assert (draws[0] - draws[2]).max() <= width + 1e-9 and (draws[0] - draws[2]).max() > 0.8 * width
    assert loss_of(method, batch(step=25, latents=data(6))) == loss_of(resumed, batch(step=25, latents=data(6)))


@pytest.mark.parametrize("cls", [PCM, TSCD])
def test_only_the_student_receives_gradients(cls):
    schedule = SCHEDULES["vp"]
    teacher, student, target = (player(lambda x, t, labels: x, schedule, "v", 1.0, 0.1 * i) for i in range(3))
    loss_of(method_of(cls, teacher, student, target), batch(latents=data(6))).backward()
    assert all(p.grad is not None for p in student.network.parameters())
    assert all(p.grad is None for role in (teacher, target) for p in role.network.parameters())


@pytest.mark.parametrize("name,kind", [("flow", "flow"), ("vp", "v")])
def test_a_pcm_student_converges_to_the_composed_solver(name, kind):
    schedule = SCHEDULES[name]
    teacher, points = GaussianDenoiser(*G1, schedule, kind), segment_points(EvenGrid(schedule, 2), 2, 6)
    student = table(points.flatten().unique(), G1, schedule, kind)
    method = method_of(PCM, teacher, student, copy.deepcopy(student), steps=2, solver_steps=6, target_ema=0.9)
    x, every = column(-1.0, 0.0, 1.0), points.flatten().unique().flip(0).tolist()
    wanted = composed(teacher.posterior_mean, x, every, schedule)

    def error() -> float:
        with torch.no_grad():
            return (method.sampler.sample(lambda x, t: student(x, t, {}), x) - wanted).abs().max().item()

    before = error()
    descend(method, lambda step: batch(48, step=step, latents=data(48, step)), steps=200, lr=0.03)
    assert error() < 5e-3 < 0.05 < before


def test_a_tscd_student_learns_to_sample_in_one_step():
    """Stages of 4, 2, 1 segments: the one-step endpoint approaches the solver's, though no jump is exact."""
    schedule = SCHEDULES["flow"]
    teacher, points = GaussianDenoiser(*G1, schedule, "flow"), segment_points(EvenGrid(schedule, 1), 1, 8)
    student = table(points.flatten(), G1, schedule, "flow")
    method = method_of(
        TSCD, teacher, student, copy.deepcopy(student), steps=1, solver_steps=8, target_ema=0.8, stage_steps=120,
        segments=[4, 2, 1],
    )  # fmt: skip
    x = column(-1.0, 0.0, 1.0)
    wanted = composed(teacher.posterior_mean, x, points[0].flip(0).tolist(), schedule)

    def spread() -> tuple[float, float]:
        with torch.no_grad():
            made = method.sampler.sample(lambda x, t: student(x, t, {}), x)
        return made.std().item(), (made - wanted).abs().max().item()

    assert spread()[0] < 1e-6  # the teacher's own first prediction from pure noise is the mean
    descend(method, lambda step: batch(48, step=step, latents=data(48, step)), steps=400, lr=0.03)
    assert spread()[1] < 0.15 and spread()[0] > 0.25
