"""Guided predictions and their updates on a teacher with a known answer, in float64."""

import pytest
import torch
from bed import M1, SCHEDULES, Spy, at

from stepdistill.analytic import LABELS, MixtureDenoiser
from stepdistill.guidance import ddim_update, guided, renoise_update, x0_update
from stepdistill.kernels import Rule, guide
from stepdistill.schedule import KINDS

COND, NULL = ({LABELS: torch.full((4,), label)} for label in (1, 2))


def pair(name: str, kind: str):
    """(schedule, x_t, t, w, cond's prediction, uncond's, the guided one)."""
    schedule = SCHEDULES[name]
    teacher = MixtureDenoiser(*M1, schedule, kind)
    x_t, t = torch.randn(4, 3, dtype=torch.float64), torch.linspace(0.3, 0.9, 4, dtype=torch.float64)
    w = torch.tensor([0.0, 1.0, 2.5, 7.0], dtype=torch.float64)
    both = teacher(x_t, t, COND).raw, teacher(x_t, t, NULL).raw
    return schedule, x_t, t, w, both, guided(teacher, x_t, t, COND, NULL, w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_updates_are_the_conversions_and_steps_of_the_schedule(name, kind):
    schedule, x_t, t, w, both, prediction = pair(name, kind)
    unguided, r, noise = schedule.to_eps(both[1], x_t, t, kind), t / 2, torch.randn_like(x_t)
    expected = {
        "x0": (x0_update(schedule, kind, x_t, t), prediction.x0),
        "ddim": (ddim_update(schedule, kind, x_t, t, r), schedule.add_noise(prediction.x0, prediction.eps, r)),
        "cfg++": (ddim_update(schedule, kind, x_t, t, r, True), schedule.add_noise(prediction.x0, unguided, r)),
        "renoise": (
            renoise_update(schedule, kind, x_t, t, r, noise),
            schedule.add_noise(prediction.x0, noise, r),
        ),
    }
    for update, wanted in expected.values():
        torch.testing.assert_close(guide(*both, w, update=update), wanted, rtol=1e-9, atol=1e-9)


def test_ddim_on_a_flow_is_an_euler_step():
    schedule, x_t, t, w, both, prediction = pair("flow", "flow")
    r = t - 0.1
    found = guide(*both, w, update=ddim_update(schedule, "flow", x_t, t, r))
    torch.testing.assert_close(found, x_t - 0.1 * prediction.raw)


@pytest.mark.parametrize("times,rows", [((0.1, 0.3, 0.6, 0.9), 6), ((0.1, 0.2, 0.8, 0.9), 4), ((0.4,) * 4, 8)])
def test_rows_outside_the_interval_cost_one_pass(times, rows):
    teacher = MixtureDenoiser(*M1, SCHEDULES["flow"], "flow")
    spy, x_t, t = Spy(teacher), torch.randn(4, 3, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    found = guided(spy, x_t, t, COND, NULL, 3.0, Rule(interval=(0.3, 0.6))).raw
    w = torch.where((t.float() >= 0.3) & (t.float() <= 0.6), 3.0, 1.0)
    torch.testing.assert_close(found, guided(teacher, x_t, t, COND, NULL, w).raw)
    assert sum(len(call[0]) for call in spy.calls) == rows


def test_the_denoisers_own_rule_is_the_default():
    teacher = MixtureDenoiser(*M1, SCHEDULES["flow"], "flow")
    x_t, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    rule = Rule(rescale=0.7, interval=(0.3, 0.6))
    stated = guided(teacher, x_t, t, COND, NULL, 3.0, rule).raw
    assert (stated - guided(teacher, x_t, t, COND, NULL, 3.0).raw).abs().max() > 0.01
    teacher.rule = rule
    assert torch.equal(guided(teacher, x_t, t, COND, NULL, 3.0).raw, stated)


def test_without_a_null_condition_there_is_no_guidance():
    teacher = MixtureDenoiser(*M1, SCHEDULES["flow"], "flow")
    with pytest.raises(ValueError, match=r"guidance scale 2\.0 needs a null condition"):
        guided(teacher, torch.zeros(1, 3), at(0.5), COND, None, 2.0)
