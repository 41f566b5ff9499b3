"""What SenseFlow, DMDR, Flash-DMD and DisBack add to distribution matching, against closed forms; off, it is DMD2."""

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.samplers import DDIM
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, Roles
from stepdistill.methods.dmdr import beta
from stepdistill.roles.views import AdapterView
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, KINDS, SCHEDULES, OnGrid, at, batch, column, player

GRID = [0.9, 0.7, 0.4, 0.2]


def affine(schedule, kind, scale=0.9, shift=0.2):
    return player(lambda x, t, labels: x, schedule, kind, scale, shift)


def method_of(name, schedule=SCHEDULES["flow"], kind="flow", times=GRID, student=None, critic=None, **config):
    """The method of that name on G1, its two classes alike, so that guidance changes nothing."""
    implementation = METHODS[name]
    teacher = GaussianDenoiser(torch.tensor([G1[0]] * 2), torch.tensor([G1[1]] * 2), schedule, kind)
    others = {role: critic or affine(schedule, kind, 1.1, -0.4) for role in implementation.extra_roles}
    roles = Roles(teacher=teacher, student=student or affine(schedule, kind), scale=2.0, **others)
    return implementation(implementation.Config(**config), roles, OnGrid(schedule, list(times), DDIM))


def rows(step=0, size=8):
    return batch(size, step=step, labels=(0, 1))


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("senseflow", {"critic_pull": 0.0, "segment_weight": 0.0}),
        ("dmdr", {"dynamic_guidance": 0.0, "dynamic_renoising": False}),
        ("dmdr", {"dynamic_steps": 1}),
        ("disback", {"snapshots": 1, "critic_warmup": 1}),
    ],
)
def test_with_its_switches_off_it_is_dmd2(name, off):
    losses = []
    for method in (method_of(name, **off), method_of("dmd2")):
        given = rows(step=5)
        losses.append((method.losses("student", given)["dm"], method.losses("critic", given)["denoising"]))
    assert losses[0] == losses[1]


def test_the_critic_is_pulled_to_the_student():
    method = method_of("senseflow", critic_pull=0.02)
    before = [p.detach().clone() for p in method.roles.critic.network.parameters()]
    method.after_update("critic")
    assert [*method.roles.critic.network.parameters()] == before
    method.after_update("student")
    for new, old, student in zip(
        method.roles.critic.network.parameters(), before, method.roles.student.network.parameters(), strict=True
    ):
        assert new.item() == pytest.approx((old + 0.02 * (student - old)).item(), abs=1e-15)
    # .98^n = 1/2
    assert math.log(0.5) / math.log(0.98) == pytest.approx(34.309618, abs=1e-6)


def test_no_adapter_is_pulled():
    schedule = SCHEDULES["flow"]
    student = affine(schedule, "flow")
    view = student.on(AdapterView(nn.Linear(1, 1), None))
    with pytest.raises(InputError, match=r"method\.critic_pull.*0"):
        method_of("senseflow", student=view)
    method_of("senseflow", student=view, critic_pull=0.0)


def maps_to(r: float, schedule, kind):
    """The student whose deterministic step from any time to ``r`` is G1's exact map."""
    exact = GaussianDenoiser(*G1, schedule, kind)

    def x0(x, t, labels):
        (alpha, sigma), (alpha_r, sigma_r) = (schedule.coefficients(one) for one in (t, torch.full_like(t, r)))
        alpha, sigma, alpha_r, sigma_r = (c[:, None] for c in (alpha, sigma, alpha_r, sigma_r))
        landed = exact.flow_map(x, t, torch.full_like(t, r))
        return (landed - sigma_r / sigma * x) / (alpha_r - sigma_r * alpha / sigma)

    return player(x0, schedule, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_inside_a_step_against_golden_numbers(kind, monkeypatch):
    """Flow, .8 -> .6 -> .4 from x = .8: what is left of the exact map is the error of the teacher's one step."""
    schedule = SCHEDULES["flow"]
    method = method_of("senseflow", schedule, kind, [0.8, 0.4], maps_to(0.4, schedule, kind))
    given, step = batch(1, labels=(0, 1)), method.sampler.grid()[0]
    monkeypatch.setattr(type(given), "uniform", lambda self, name, low, high: at({"segment time": 0.6}.get(name, 3.0)))
    prediction = method.student(column(0.8), at(0.8), given)
    target, direct = method.two_steps(column(0.8), step, given), method.lands(prediction, 0.4)
    assert (target.item(), direct.item()) == pytest.approx((0.821366, 0.829315), abs=1e-6)
    distance = math.hypot(direct.item() - target.item(), 1e-3) - 1e-3
    assert distance == pytest.approx(0.007011, abs=1e-6)
    monkeypatch.setattr(method, "backward_simulation", lambda *_: column(0.8))
    monkeypatch.setattr(type(given), "integer", lambda *_: 0)
    assert method.losses("student", given)["segment"].item() == pytest.approx(0.5 * distance, rel=1e-9)


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_guidance_inside_a_step_vanishes_as_the_teachers_part_does(name, monkeypatch):
    schedule = SCHEDULES[name]
    times = schedule.snap(torch.tensor([0.8, 0.4], dtype=torch.float64)).tolist()
    method = method_of("senseflow", schedule, "epsilon", times, maps_to(times[1], schedule, "epsilon"))
    x, step, given = column(0.8), method.sampler.grid()[0], batch(1, labels=(0, 1))
    direct = method.lands(method.student(x, at(times[0]), given), step.r)
    errors = []
    for part in (0.5, 0.9, 1.0):
        middle = schedule.snap(at(times[1] + part * (times[0] - times[1])))
        monkeypatch.setattr(
            type(given), "uniform", lambda self, name, *_, m=middle: m if name == "segment time" else at(1.0)
        )
        errors.append((method.two_steps(x, step, given) - direct).abs().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


@pytest.mark.parametrize(
    ("d", "mean", "std", "median", "below_half"),
    [
        (1.0, 0.727273, 0.174685, 0.756136, 0.118879),
        (0.5, 0.666667, 0.216295, 0.698631, 0.231848),
        (0.0, 0.5, 12**-0.5, 0.5, 0.5),
    ],
)
def test_early_times_are_those_of_beta(d, mean, std, median, below_half):
    uniform = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    t = beta(uniform, 1 + 3 * d, 1 + d / 2)
    assert (t.mean().item(), t.std().item(), t.median().item()) == pytest.approx((mean, std, median), abs=2e-5)
    assert (t < 0.5).double().mean().item() == pytest.approx(below_half, abs=2e-5)


def test_the_real_score_begins_near_the_critics():
    """D_f .780328, D_T .88, x_0 = .9: shares .375 and .75."""
    x, real, fake = column(0.9), column(0.88), column(0.780328)
    for share, expected in ((0.375, -1.085714), (0.75, -0.262976), (0.0, -4.983607)):
        method = method_of("dmdr", dynamic_guidance=share)
        assert method.difference(x, real, fake, rows()).item() == pytest.approx(expected, rel=1e-4)
    method = method_of("dmdr", dynamic_steps=10000)
    left = [0.375 * method.rest(step) for step in (0, 2500, 5000, 7500, 10000, 20000)]
    assert left == pytest.approx([0.375, 0.320083, 0.1875, 0.054917, 0, 0], abs=1e-6)


def test_early_times_reach_both_players():
    method = method_of("dmdr", SCHEDULES["vp"], "v", dynamic_steps=1000)
    given = rows(size=4000)
    for times in (method.matching_times(given), method.critic_times(given)):
        assert times.mean().item() == pytest.approx(0.727, abs=0.01)
    assert method.matching_times(given).max() <= 0.9805
    late = rows(step=1000, size=4000)
    assert method.critic_times(late).mean().item() == pytest.approx(0.5, abs=0.02)


class Vote(nn.Module):
    def forward(self, states, condition=None):
        return states[0].flatten(1)


@pytest.mark.parametrize(("tau", "names"), [(0.5, ["dm", "dm", "gan", "gan"]), (0.0, ["dm"] * 4), (1.1, ["gan"] * 4)])
def test_each_term_keeps_to_its_steps(tau, names, monkeypatch):
    method = method_of("flash-dmd", dm_from=tau)
    method.gan.heads = Vote()
    method.gan.network = lambda images: [images]
    calls = []
    monkeypatch.setattr(method, "teacher", lambda *a, f=method.teacher: calls.append(1) or f(*a))
    for k, name in enumerate(names):
        given = rows().but(latents=rows().noise("real"))
        given.integer = lambda *_, k=k: k
        calls.clear()
        assert [*method.losses("student", given)] == [name] and len(calls) == (name == "dm")
        terms = method.losses("critic", given)
        assert [*terms] == ["denoising"] + ["gan"] * (name == "gan")


def test_the_real_score_walks_back_over_the_snapshots():
    schedule = SCHEDULES["flow"]
    critic, guide = affine(schedule, "flow", 1.0, 0.0), affine(schedule, "flow", 1.0, 0.0)
    implementation = METHODS["disback"]
    teacher = GaussianDenoiser(torch.tensor([G1[0]] * 2), torch.tensor([G1[1]] * 2), schedule, "flow")
    roles = Roles(teacher=teacher, student=affine(schedule, "flow"), scale=2.0, critic=critic, guide=guide)
    config = implementation.Config(critic_warmup=9, snapshots=3, snapshot_updates=2, critic_steps=2)
    method = implementation(config, roles, OnGrid(schedule, [0.9]))
    assert [method.turns(step) for step in (0, 8, 9, 10)] == [("critic",)] * 2 + [("student", "critic"), ("critic",)]
    for step in range(9):
        critic.network.shift.data.fill_(float(step))  # what has been learnt before the step
        for _ in range(2):  # micro-batches
            method.losses("critic", rows(step))
    assert [snapshot[1].item() for snapshot in method.snapshots] == [3.0, 6.0]
    assert [method.target(step) for step in range(9, 19, 2)] == [1, 1, 0, 0, None]
    t, x = at(0.5, 8), rows().noise("x")
    for step, shift in ((9, 6.0), (11, 6.0), (13, 3.0), (15, 3.0)):
        given = rows(step)
        method.losses("student", given)
        assert guide.network.shift.item() == shift
        assert torch.equal(method.real(x, t, given, 2.0), guide(x, t, {}).x0)
    assert torch.equal(method.real(x, t, rows(17), 2.0), method.teacher(x, t, rows(17), 2.0).x0)
    assert not any(p.requires_grad for p in method.extra_modules()["snapshots"].parameters())
