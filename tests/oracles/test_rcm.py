"""rCM against closed forms: its own annealing of the tangent, and that it is sCM and DMD2 at either end."""

import math

import pytest
import torch

from stepdistill.methods import METHODS, Roles
from stepdistill.methods.continuous import TrigFlow
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, KINDS, SCHEDULES, OnGrid, at, batch, column, gradients, player

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
FROM = 0.95


def method_of(name, teacher, student, critic=None, scale=1.0, **config):
    implementation, start = METHODS[name], student.schedule.snap(at(FROM)).item()
    roles = Roles(teacher, student, scale=scale, **({"critic": critic} if critic else {}))
    return implementation(implementation.Config(**config), roles, OnGrid(student.schedule, [start]))


@pytest.mark.parametrize(("r", "expected"), [(0.0, 0.106131), (0.5, 0.000509), (1.0, -0.122186)])
def test_golden_numbers(r, expected):
    """Data N(0, .3^2), sd = .5, angle .7, x = .4, F = .2 x t: sCM's bed, of which r = 1 has the number."""
    schedule, angle, sd = SCHEDULES["edm"], 0.7, 0.5
    t = schedule.time(torch.tensor([math.log(math.tan(angle) * sd) / 4], dtype=torch.float64))
    x = 0.4 / math.cos(angle)

    def wrong(x, time, labels):
        a = torch.atan2(schedule.sigma(time), torch.full_like(time, sd))[:, None]
        x = x * a.cos()
        return a.cos() * x - a.sin() * sd * (0.2 * x * a)

    teacher, student = GaussianDenoiser(0.0, 0.3, schedule, "edm"), player(wrong, schedule, "edm")
    method = method_of("rcm", teacher, student, student, sigma_data=sd)
    prediction, trig = teacher(column(x), t), TrigFlow(schedule, t, sd)
    with torch.no_grad():
        now = student(column(x), t, {})
        tangent = method.forward_tangent(trig, prediction, now, {})
        g = method.direction(trig, prediction, trig.velocity(now), tangent, r)
    assert g.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name,kind", ALL)
def test_without_matching_it_is_scm_and_its_matching_is_dmd2(name, kind):
    schedule = SCHEDULES[name]
    teacher = GaussianDenoiser(*G1, schedule, kind)
    student = player(lambda x, t, labels: (0.8 * x).sin(), schedule, kind)
    critic = player(lambda x, t, labels: 0.7 * x, schedule, kind)
    rows = batch(16, step=40)
    rows = rows.but(latents=G1[0] + G1[1] * rows.noise("real"))
    slopes = []
    for method in (
        method_of("rcm", teacher, student, critic, dm_weight=0, tangent_warmup=40),
        method_of("scm", teacher, student, tangent_warmup=40),
    ):
        losses = method.losses("student", rows)
        assert [*losses] == ["consistency"]
        slopes.append(gradients(losses["consistency"], student))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)
    rcm = method_of("rcm", teacher, student, critic, dm_weight=1.0, tangent_warmup=40, rollout_steps=1)
    dmd2 = method_of("dmd2", teacher, student, critic)
    # Samples of one element: the sum over a sample is its mean.
    assert rcm.losses("student", rows)["dm"] == dmd2.losses("student", batch(16, step=40))["dm"]
    assert rcm.losses("critic", rows)["denoising"] == dmd2.losses("critic", batch(16, step=40))["denoising"]


def test_who_moves_when():
    schedule = SCHEDULES["flow"]
    one = player(lambda x, t, labels: x, schedule, "v")
    method = method_of("rcm", GaussianDenoiser(*G1, schedule, "v"), one, one, tangent_warmup=3, critic_steps=2)
    assert [method.turns(step) for step in range(6)] == [("student",)] * 4 + [("critic",), ("student",)]
    rows = batch(4, step=2)
    assert [*method.losses("student", rows.but(latents=rows.noise("real")))] == ["consistency"]


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_samples_of_several_steps_carry_the_graph_of_the_last_alone(kind, monkeypatch):
    """The exact one-step map stays on the data after any number of steps; times descend and end above the clean end."""
    schedule = SCHEDULES["flow"]
    mean, std = G1
    student = player(lambda x, t, labels: mean + std * x, schedule, kind)
    method = method_of("rcm", GaussianDenoiser(*G1, schedule, kind), student, student, rollout_steps=4)
    seen, counts = [], set()
    call = method.matching.student
    monkeypatch.setattr(
        method.matching, "student", lambda x, t, b: seen.append((t, torch.is_grad_enabled())) or call(x, t, b)
    )
    for step in range(24):
        seen.clear()
        x = method.matching.generate(batch(4, step=step))
        times = [t[0].item() for t, _ in seen]
        assert times == sorted(times, reverse=True) and times[0] == pytest.approx(FROM) and times[-1] > 0
        assert [graph for _, graph in seen] == [False] * (len(seen) - 1) + [True] and x.requires_grad
        counts.add(len(seen))
    assert counts == {1, 2, 3, 4}
