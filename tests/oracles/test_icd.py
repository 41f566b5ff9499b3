"""iCD against closed forms: both directions' losses, their optima, and that the encoder inverts the student."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.schedule import Schedule
from stepdistill.methods import Roles
from stepdistill.methods.icd import ICD, ICDConfig
from stepdistill.methods.pcm import segment_points
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, KINDS, SCHEDULES, EvenGrid, Spy, at, batch, column, gradients, player

# Epsilon has no x_0 at flow's t = 1, where alpha is 0 and every solver starts.
ALL = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]
PLAYERS = ("student", "encoder")


def method_of(teacher, student, encoder, steps=4, **config) -> ICD:
    roles = Roles(teacher=teacher, student=student, encoder=encoder)
    return ICD(ICDConfig(**config), roles, EvenGrid(student.schedule, steps))


def data(size: int = 64) -> Tensor:
    noise = torch.Generator().manual_seed(3)
    return GaussianDenoiser(*G1, SCHEDULES["flow"], "flow").sample(size, (1,), generator=noise)


def segments(schedule: Schedule, steps: int, solver_steps: int) -> Tensor:
    """The method's times; flow's clean end has no noise, so its lowest is 0.001."""
    lowest = 0.001 if schedule.name == "flow" else 0.0
    return segment_points(EvenGrid(schedule, steps), steps, solver_steps).clamp_min(lowest)


def moved(x0: Tensor, x: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The DDIM step from ``t`` to ``s``, up or down, from the formula."""
    (alpha, sigma), (alpha_s, sigma_s) = ([c[:, None] for c in schedule.coefficients(v)] for v in (t, s))
    return alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma


def mapped(ends, schedule: Schedule, points: Tensor, up: bool):
    """The x_0 whose jump to the end of t's segment is ``ends(x, t, row)``; ``up`` is the noisy end."""

    def function(x, t, labels):
        found = x
        for row in points.tolist():
            inside = (t > row[0] - 1e-9) & (t < row[-1] - 1e-9) if up else (t > row[0] + 1e-9) & (t < row[-1] + 1e-9)
            (alpha, sigma), (alpha_s, sigma_s) = (
                [c[:, None] for c in schedule.coefficients(v)] for v in (t, at(row[-1 if up else 0], len(x)))
            )
            x0 = (sigma * ends(x, t, row) - sigma_s * x) / (sigma * alpha_s - sigma_s * alpha)
            found = torch.where(inside[:, None], x0, found)
        return found

    return function


def solver(teacher, schedule: Schedule, up: bool):
    """All remaining DDIM steps of the teacher in the segment."""

    def ends(x, t, row):
        for time, after in itertools.pairwise(row if up else row[::-1]):
            active = t > time - 1e-9 if not up else t < time + 1e-9
            here, there = at(time, len(x)), at(after, len(x))
            x = torch.where(active[:, None], moved(teacher.posterior_mean(x, here), x, here, there, schedule), x)
        return x

    return ends


def flow(teacher, up: bool):
    """The exact trajectory to the segment's end."""
    return lambda x, t, row: teacher.flow_map(x, t, at(row[-1 if up else 0], len(x)))


def pair(teacher, schedule, kind, points, of) -> tuple:
    """Student and encoder whose jumps are ``of(up)``."""
    return tuple(player(mapped(of(up), schedule, points, up), schedule, kind) for up in (False, True))


@pytest.mark.parametrize("role", PLAYERS)
@pytest.mark.parametrize("name,kind", ALL)
def test_the_losses_are_the_closed_form(name, kind, role):
    schedule, (mean, std) = SCHEDULES[name], G1
    teacher = Spy(GaussianDenoiser(mean, std, schedule, kind))
    student, encoder = (
        Spy(player(lambda x, t, labels: x, schedule, kind, *numbers)) for numbers in ((0.8, 0.3), (0.7, 0.1))
    )
    method = method_of(teacher, student, encoder, solver_steps=12, preservation=1.5)
    losses = method.losses(role, batch(64, latents=data()))
    mine, other = (student, encoder) if role == "student" else (encoder, student)
    (a, b), (c, d) = ((0.8, 0.3), (0.7, 0.1)) if role == "student" else ((0.7, 0.1), (0.8, 0.3))
    (x_r, r), (x_t, t), (away, start) = mine.calls
    ((x_aim, aim),) = other.calls
    assert torch.equal(x_t, teacher.calls[0][0])

    down = role == "student"
    points = segments(schedule, 4, 12)
    for here, after, end, begin in zip(*(v.tolist() for v in (t, r, aim, start)), strict=True):
        low, high = (end, begin) if down else (begin, end)
        (row,) = [p for p in points.tolist() if p[0] == low and p[-1] == high]
        assert row.index(here) - row.index(after) == (1 if down else -1)
    assert 0 < (r == aim).sum() < 64

    (alpha, sigma), _ = ([v[:, None] for v in schedule.coefficients(time)] for time in (t, r))
    real = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    torch.testing.assert_close(x_r, moved(real, x_t, t, r, schedule), rtol=1e-8, atol=1e-8)
    further = torch.where((r == aim)[:, None], x_r, moved(a * x_r + b, x_r, r, aim, schedule))
    huber = lambda e: ((e**2 + 1e-6).sqrt() - 1e-3).mean().item()  # noqa: E731
    expected = huber(moved(a * x_t + b, x_t, t, aim, schedule) - further)
    assert losses["consistency"].item() == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(away, moved(c * x_aim + d, x_aim, aim, start, schedule), rtol=1e-8, atol=1e-8)
    expected = 1.5 * huber(moved(a * away + b, away, start, aim, schedule) - x_aim)
    assert losses["preservation"].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("role", PLAYERS)
@pytest.mark.parametrize("name,kind", ALL)
def test_the_fixed_points_are_the_solver_composed_in_both_directions(name, kind, role):
    schedule = SCHEDULES[name]
    teacher, points = GaussianDenoiser(*G1, schedule, kind), segments(schedule, 4, 12)
    networks = pair(teacher, schedule, kind, points, lambda up: solver(teacher, schedule, up))
    method = method_of(teacher, *networks, solver_steps=12, preservation=0.0)
    (loss,) = method.losses(role, batch(64, latents=data())).values()
    moving = networks[PLAYERS.index(role)]
    assert loss.item() < 1e-11 and math.hypot(*gradients(loss, moving)) < 1e-5
    moving.network.shift.data += 0.01
    assert method.losses(role, batch(64, latents=data()))["consistency"].item() > 1e-8


@pytest.mark.parametrize("role", PLAYERS)
@pytest.mark.parametrize("name,kind", ALL)
def test_all_losses_vanish_where_trajectories_are_straight(name, kind, role):
    """A point mass: every jump is exact, so that encoder and student are inverses."""
    schedule, mean = SCHEDULES[name], G1[0]
    teacher = GaussianDenoiser(mean, 0.0, schedule, kind)
    networks = [player(lambda x, t, labels: torch.full_like(x, mean), schedule, kind) for _ in PLAYERS]
    method = method_of(teacher, *networks, solver_steps=12)
    losses = method.losses(role, batch(64, latents=torch.full((64, 1), mean, dtype=torch.float64)))
    assert losses.keys() == {"consistency", "preservation"} and sum(losses.values()).item() < 1e-12
    assert math.hypot(*gradients(sum(losses.values()), networks[PLAYERS.index(role)])) < 1e-6
    z = column(-1.0, 0.0, 1.0)
    torch.testing.assert_close(method.encode(method.decode(z, batch(3)), batch(3)), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name,kind", ALL)
def test_at_the_exact_maps_the_encoder_inverts_the_student(name, kind):
    """Both are the probability flow: encoder o decoder is the identity, and preservation costs nothing."""
    schedule = SCHEDULES[name]
    teacher, points = GaussianDenoiser(*G1, schedule, kind), segments(schedule, 4, 12)
    networks = pair(teacher, schedule, kind, points, lambda up: flow(teacher, up))
    method = method_of(teacher, *networks, solver_steps=12)
    z = column(-1.0, 0.0, 1.0) * (80 if name == "edm" else 1)
    x0 = method.decode(z, batch(3))
    lowest = at(points.min().item(), 3)
    torch.testing.assert_close(x0, teacher.flow_map(z, at(1.0, 3), lowest), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(method.encode(x0, batch(3)), z, rtol=1e-6, atol=1e-6)
    real = data(3)
    torch.testing.assert_close(method.decode(method.encode(real, batch(3)), batch(3)), real, rtol=1e-6, atol=1e-6)
    for role, network in zip(PLAYERS, networks, strict=True):
        loss = method.losses(role, batch(64, latents=data()))["preservation"]
        assert loss.item() < 1e-11 and math.hypot(*gradients(loss, network)) < 1e-5


def test_the_composed_solvers_are_inverses_at_first_order():
    """What the consistency terms alone converge to: twice the solver's steps, half the round trip's error."""
    schedule, errors = SCHEDULES["vp"], []
    teacher = GaussianDenoiser(*G1, schedule, "v")
    for steps in (40, 80, 160):
        points = segments(schedule, 4, steps)
        networks = pair(teacher, schedule, "v", points, lambda up: solver(teacher, schedule, up))
        method = method_of(teacher, *networks, solver_steps=steps)
        z = column(-1.0, 0.0, 1.0)
        errors.append((method.encode(method.decode(z, batch(3)), batch(3)) - z).abs().max().item())
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.2)


@pytest.mark.parametrize("role", PLAYERS)
def test_only_the_moving_network_receives_gradients(role):
    schedule = SCHEDULES["vp"]
    teacher, student, encoder = (player(lambda x, t, labels: x, schedule, "v", 1.0, 0.1 * i) for i in range(3))
    method = method_of(teacher, student, encoder, solver_steps=8)
    sum(method.losses(role, batch(latents=data(6))).values()).backward()
    moving, other = (student, encoder) if role == "student" else (encoder, student)
    assert all(p.grad is not None for p in moving.network.parameters())
    assert all(p.grad is None for still in (teacher, other) for p in still.network.parameters())
    assert method.modules(role) == [moving.network]


def test_preservation_trains_a_pair_into_inverses():
    """Starting beside each other, the two affine maps of one segment become inverses within some updates."""
    schedule = SCHEDULES["flow"]
    teacher = GaussianDenoiser(*G1, schedule, "flow")
    points = segments(schedule, 1, 8)
    networks = pair(teacher, schedule, "flow", points, lambda up: flow(teacher, up))
    networks[1].network.scale.data.fill_(0.8)
    method = method_of(teacher, *networks, steps=1, solver_steps=8)
    z, still = column(-1.0, 0.0, 1.0), batch(3)

    def error() -> float:
        return (method.encode(method.decode(z, still), still) - z).abs().max().item()

    before = error()
    optimizer = torch.optim.Adam(networks[1].network.parameters(), 0.01)
    for step in range(150):
        optimizer.zero_grad()
        sum(method.losses("encoder", batch(32, step=step, latents=data(32))).values()).backward()
        optimizer.step()
    assert error() < 0.2 * before


class Informed(Spy):
    """A stand-in that remembers the w it got."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.w: list[Tensor | None] = []

    def __call__(self, x_t, t, cond):
        self.w.append(cond.get("guidance_scale"))
        return self.denoiser(x_t, t, {name: value for name, value in cond.items() if name != "guidance_scale"})


@pytest.mark.parametrize("role", PLAYERS)
def test_with_w_as_an_input_the_encoder_has_no_guidance_and_both_are_inverses_without(role):
    schedule = SCHEDULES["vp"]
    means, stds = torch.tensor([0.7, -0.4]), torch.tensor([0.5, 1.2])
    teacher = Informed(GaussianDenoiser(means, stds, schedule, "epsilon"))
    student, encoder = (Informed(player(lambda x, t, labels: x, schedule, "epsilon", 0.8, 0.3)) for _ in PLAYERS)
    method = method_of(teacher, student, encoder, solver_steps=12, w_min=1.0, w_max=5.0)
    assert ICD.adapt(method.config, "encoder", encoder.network, 5.0) is encoder.network, "no input for w"
    method.losses(role, batch(64, latents=data(), labels=(0, 1)))
    calls = (student if role == "student" else encoder).w
    other = (encoder if role == "student" else student).w
    if role == "encoder":
        assert calls == [None] * 3 and len(teacher.w) == 1, "one pass of the teacher: no guidance"
        (scales,) = other
        assert torch.equal(scales, torch.ones(64))
    else:
        assert torch.equal(calls[0], calls[1]) and 1 <= calls[0].min() < 2 < 4 < calls[0].max() <= 5
        assert torch.equal(calls[2], torch.ones(64)) and other == [None]


def test_w_has_to_start_at_no_guidance():
    with pytest.raises(ValueError, match="expected w_min of at most 1"):
        ICDConfig(w_min=2.0, w_max=5.0)
