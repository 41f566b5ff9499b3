"""TDD against closed forms: which target times it draws, whose conditions are empty, its loss and gradient."""

import copy
import math

import diffusers
import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.samplers import TCD as TCDSampler
from stepdistill.diffusion.samplers import solver_grid
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.methods import Roles
from stepdistill.methods.tdd import TDD, TDDConfig, schedule_times
from stepdistill.testing.analytic import GaussianDenoiser, MixtureDenoiser
from stepdistill.testing.bed import (
    G1,
    KINDS,
    M1,
    SCHEDULES,
    SD_TABLE,
    EvenGrid,
    Spy,
    batch,
    column,
    ddim_path,
    descend,
    gradients,
    player,
    table,
)

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every solver starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]
PLAIN = {"null_share": 0.0, "solver_steps": 25}


def method_of(teacher, student, scale=1.0, sampler=None, **config) -> TDD:
    roles = Roles(teacher=teacher, student=student, scale=scale)
    return TDD(TDDConfig(**config), roles, sampler or EvenGrid(student.schedule, 4))


def stock_sampler() -> TCDSampler:
    betas = 1 - SD_TABLE / torch.cat([torch.ones(1), SD_TABLE[:-1]])
    source = diffusers.DDIMScheduler(trained_betas=betas.tolist(), prediction_type="v_prediction")
    return TCDSampler(from_scheduler(source)[0], source, 4)


def data(size: int = 64, seed: int = 3) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return GaussianDenoiser(*G1, SCHEDULES["flow"], "flow").sample(size, (1,), generator=noise)


def loss_of(method, rows) -> Tensor:
    return sum(method.losses("student", rows).values())


def affine(schedule, kind, scale=0.8, shift=0.3):
    return player(lambda x, t, labels: x, schedule, kind, scale, shift)


def test_the_candidates_are_the_times_of_the_stock_schedules():
    """4 steps: 999 759 499 259 -> 0; the window of 260 timesteps always holds one of its times."""
    times, longest = schedule_times(stock_sampler(), 4, 8)
    stock = diffusers.TCDScheduler(original_inference_steps=50)
    expected = {0}
    for n in range(4, 9):
        stock.set_timesteps(n)
        expected |= set(stock.timesteps.tolist()) - {999}
    assert [round(t * 999) for t in times.tolist()] == sorted(expected)
    assert round(longest * 999) == 260


@pytest.mark.parametrize("solver_steps", [10, 25, 50, 250])
def test_targets_are_candidates_in_the_window_undershot(solver_steps):
    sampler = stock_sampler()
    student = affine(sampler.schedule, "v")
    times, longest = schedule_times(sampler, 4, 8)
    exact = method_of(None, student, sampler=sampler, undershoot=0.0, solver_steps=solver_steps)
    short = method_of(None, student, sampler=sampler, undershoot=0.3, solver_steps=solver_steps)
    t, r, aim = exact.draw(batch(20_000, latents=data(20_000)))
    t_again, r_again, s = short.draw(batch(20_000, latents=data(20_000)))
    assert torch.equal(t, t_again) and torch.equal(r, r_again) and (r < t).all()
    assert set(aim.tolist()) <= set(times.tolist()) and (aim <= r).all()
    nearest_below = times[torch.searchsorted(times, r + 1e-9) - 1]
    assert ((aim >= t - longest - 1e-9) | (aim == nearest_below)).all()
    landing = aim > 0
    share = s[landing] / aim[landing]
    # Rounding to a table entry may add half a timestep.
    assert ((s - 0.7 * aim) * 999 >= -0.5).all() and (s <= aim).all() and torch.equal(s, sampler.schedule.snap(s))
    assert share.min() < 0.75 and share.max() > 0.95
    if solver_steps >= 25:
        # Every candidate that a start has below it, and at the top all those of the window, are visited.
        top = aim[t == 1.0]
        assert set(top.tolist()) == set(times[(times >= 1 - longest - 1e-9) & (times <= r[t == 1.0][0])].tolist())


@pytest.mark.parametrize("name,kind", ALL)
def test_the_loss_and_its_gradient_are_the_closed_form(name, kind):
    """The student is its own target, without gradient: a frozen copy as the target gives the same numbers."""
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher, inner = Spy(GaussianDenoiser(mean, std, schedule, kind)), affine(schedule, kind)
    student = Spy(inner)
    method = method_of(teacher, student, **PLAIN)
    seen, jump = [], method.jump
    method.jump = lambda prediction, s: seen.append(s) or jump(prediction, s)
    loss = loss_of(method, batch(64, latents=data()))
    (x_r, r), (x_t, t) = student.calls
    s, s_target = seen
    assert torch.equal(s, s_target) and (s <= r).all() and torch.equal(t, teacher.calls[0][1])
    (alpha, sigma), (alpha_r, sigma_r), (alpha_s, sigma_s) = (
        [c[:, None] for c in schedule.coefficients(time)] for time in (t, r, s)
    )
    real = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    torch.testing.assert_close(x_r, alpha_r * real + sigma_r * (x_t - alpha * real) / sigma, rtol=1e-9, atol=1e-9)
    scale, shift = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.3))
    x0, x0_r = scale * x_t + shift, 0.8 * x_r + 0.3
    d = alpha_s * x0 + sigma_s * (x_t - alpha * x0) / sigma
    d = d - (alpha_s * x0_r + sigma_s * (x_r - alpha_r * x0_r) / sigma_r)
    expected = ((d**2 + 1e-6).sqrt() - 1e-3).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    wanted = [g.item() for g in torch.autograd.grad(expected, (scale, shift))]
    assert gradients(loss, inner) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("name,kind", ALL)
def test_the_fixed_point_where_trajectories_are_straight(name, kind):
    schedule, mean = SCHEDULES[name], G1[0]
    teacher = GaussianDenoiser(mean, 0.0, schedule, kind)
    student = player(lambda x, t, labels: torch.full_like(x, mean), schedule, kind)
    rows = batch(64, latents=torch.full((64, 1), mean, dtype=torch.float64))
    loss = loss_of(method_of(teacher, student, **PLAIN), rows)
    assert loss.item() < 1e-12 and math.hypot(*gradients(loss, student)) < 1e-6
    student.network.shift.data += 0.01
    assert loss_of(method_of(teacher, student, **PLAIN), rows).item() > 1e-7


class Listener:
    """A denoiser that remembers which classes it was asked for."""

    norm_axis, rule = None, Rule()

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.kind = denoiser, denoiser.schedule, denoiser.kind
        self.heard: list[Tensor] = []

    def __call__(self, x_t, t, cond):
        self.heard.append(cond["class_labels"])
        return self.denoiser(x_t, t, cond)


def test_a_share_of_the_prompts_is_empty_for_teacher_and_student_alike():
    schedule = SCHEDULES["vp"]
    teacher, student = Listener(MixtureDenoiser(*M1, schedule, "v")), Listener(affine(schedule, "v"))
    method = method_of(teacher, student, scale=3.0, null_share=0.2)
    loss_of(method, batch(2000, latents=data(2000), labels=(1, 2)))
    (conditional, unconditional), told = teacher.heard[0].chunk(2), student.heard[0]
    assert (unconditional == 2).all() and torch.equal(conditional, told) and torch.equal(told, student.heard[1])
    assert (told == 2).double().mean().item() == pytest.approx(0.2, abs=0.03)
    assert set(told.tolist()) == {1, 2}


def test_without_an_empty_prompt_none_is_drawn():
    schedule = SCHEDULES["vp"]
    teacher, student = MixtureDenoiser(*M1, schedule, "v"), affine(schedule, "v")
    with pytest.raises(InputError, match="null_share: expected 0 without an empty prompt, found"):
        method_of(teacher, student).prepare(batch())
    method_of(teacher, student, null_share=0.0).prepare(batch())


def test_only_the_student_receives_gradients():
    schedule = SCHEDULES["vp"]
    teacher, student = affine(schedule, "v", 1.0, 0.0), affine(schedule, "v")
    method = method_of(teacher, student, **PLAIN)
    loss_of(method, batch(latents=data(6))).backward()
    assert all(p.grad is not None for p in student.network.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())
    before = copy.deepcopy(student.network.state_dict())
    method.after_update("student")
    assert all(torch.equal(value, before[key]) for key, value in student.network.state_dict().items())


def test_a_student_converges_to_the_composed_solver():
    """Steps of one schedule without undershoot leave one target per start: then the loss can vanish, as PCM's."""
    schedule = SCHEDULES["flow"]
    teacher, grid = GaussianDenoiser(*G1, schedule, "flow"), solver_grid(schedule, 8)
    student = table(grid, G1, schedule, "flow")
    sampler = EvenGrid(schedule, 2)
    one = {"n_min": 2, "n_max": 2, "undershoot": 0.0, "null_share": 0.0, "solver_steps": 8}
    method = method_of(teacher, student, sampler=sampler, **one)
    x = column(-1.0, 0.0, 1.0)
    wanted = ddim_path(teacher.posterior_mean, x, grid.flip(0).tolist(), schedule)

    def error() -> float:
        with torch.no_grad():
            return (sampler.sample(lambda x, t: student(x, t, {}), x) - wanted).abs().max().item()

    before = error()
    descend(method, lambda step: batch(48, step=step, latents=data(48, step)), steps=300, lr=0.03)
    assert error() < 1e-2 < 0.1 < before
