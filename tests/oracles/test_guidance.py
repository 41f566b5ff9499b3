"""Guided predictions and their updates on a teacher with a known answer, in float64."""

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.guidance import guided, outputs, rule_of, rule_text
from stepdistill.kernels import Rule
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.recipe.section import Guidance
from stepdistill.sampling.rules.steps import Projected, Step, cfg_plus_plus
from stepdistill.sampling.trajectories import first_order_table
from stepdistill.testing.analytic import LABELS, MixtureDenoiser
from stepdistill.testing.bed import KINDS, M1, SCHEDULES, Spy, at

COND, NULL = ({LABELS: torch.full((4,), label)} for label in (1, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_guidance_and_the_step_after_it_are_one_sum(name, kind):
    """DDIM (Euler on a flow) to a later time and to the clean end, and CFG++'s step by its share of guidance."""
    schedule, x_t = SCHEDULES[name], torch.randn(4, 3, dtype=torch.float64)
    teacher, t, w = MixtureDenoiser(*M1, schedule, kind), at(0.8, 4), torch.tensor([0.0, 1.0, 2.5, 7.0]).double()
    said = outputs(teacher, x_t, t, COND, NULL, w)
    (a, b), (last_a, last_b) = first_order_table(schedule, kind, torch.tensor([0.8, 0.3, 0.0], dtype=torch.float64))[
        [0, 1]
    ]
    guided_there, r = said.prediction, at(0.3, 4)
    expected = schedule.add_noise(guided_there.x0, guided_there.eps, r)
    torch.testing.assert_close(said.step(x_t, a, b), expected, rtol=1e-9, atol=1e-9)
    end = outputs(teacher, x_t, r, COND, NULL, w)
    torch.testing.assert_close(end.step(x_t, last_a, last_b), end.prediction.x0, rtol=1e-9, atol=1e-9)
    now = Step(0, x_t, t, r, COND, NULL, None, None, None, 0)
    kept = schedule.to_eps(said.uncond, x_t, t, kind)
    x0 = outputs(teacher, x_t, t, COND, NULL, 2.5).prediction.x0
    found = cfg_plus_plus(2.5)(teacher, now)
    for made in (found.step(x_t, a, b), a * x_t + b * found.raw):
        torch.testing.assert_close(made, schedule.add_noise(x0, kept, r), rtol=1e-9, atol=1e-9)


def apg(x0: Tensor, other: Tensor, w: float, eta: float, norm: float, momentum: float, before: Tensor):
    """(guided x_0, running difference) of Sadat et al. 2024, sample by sample as the paper has it."""
    guided, running = [], []
    for one, away, last in zip(x0, other, before, strict=True):
        difference = one - away + momentum * last
        running.append(difference)
        if norm > 0:
            difference = min(1.0, norm / float(difference.norm())) * difference
        along = (difference @ one) / (one @ one) * one
        guided.append(one + (w - 1) * (difference - along + eta * along))
    return torch.stack(guided), torch.stack(running)


@pytest.mark.parametrize("numbers", [(0.0, 0.0, 0.0), (0.3, 1.5, 0.0), (1.0, 0.7, 0.0), (0.0, 2.0, -0.5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_apg_is_its_definition_in_x0(name, kind, numbers):
    """Over three steps of a path, whatever the network emits; with momentum the running difference goes along."""
    schedule = SCHEDULES[name]
    teacher, rule, before = MixtureDenoiser(*M1, schedule, kind), Projected(5.0, *numbers), torch.zeros(4, 3).double()
    for number, t in enumerate((0.9, 0.6, 0.3)):
        x_t, times = torch.randn(4, 3, dtype=torch.float64), at(t, 4)
        both = (teacher(x_t, times, told).x0 for told in (COND, NULL))
        expected, before = apg(*both, 5.0, *numbers, before)
        found = rule(teacher, Step(number, x_t, times, times / 2, COND, NULL, None, None, None, 0))
        tolerance = 1e-9 if not numbers[2] else 1e-6  # the running difference is kept in float32
        torch.testing.assert_close(found.prediction.x0, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCHEDULES)
def test_apg_that_changes_nothing_is_classifier_free_guidance(name):
    """eta 1, any norm, no momentum; exactly, in a recipe's rule and in a sampling rule."""
    teacher = MixtureDenoiser(*M1, SCHEDULES[name], "v")
    x_t, t = torch.randn(4, 3, dtype=torch.float64), torch.linspace(0.3, 0.9, 4, dtype=torch.float64)
    plain = guided(teacher, x_t, t, COND, NULL, 5.0).raw
    stated = rule_of({"rule": "apg", "eta": 1.0, "norm": 0.0})
    assert torch.equal(guided(teacher, x_t, t, COND, NULL, 5.0, stated).raw, plain)
    assert torch.equal(Projected(5.0, 1.0)(teacher, Step(0, x_t, t, t / 2, COND, NULL, None, None, None, 0)).raw, plain)
    off = guided(teacher, x_t, t, COND, NULL, torch.ones(4).double(), rule_of({"rule": "apg"}))
    torch.testing.assert_close(off.raw, teacher(x_t, t, COND).raw)


def test_a_recipe_and_an_export_state_the_same_rule():
    stated = {"rule": "apg", "eta": 0.2, "norm": 5.0, "interval": [0.1, 0.9], "scale": 4.0}
    export = ExportFacts("teacher", 4.0, "dmd2", 4, recipe={"teacher": {"guidance": stated}})
    rule = export.teacher_guidance.combination
    assert rule == Guidance(**stated).combination == Rule(parallel=0.2, max_norm=5.0, interval=(0.1, 0.9))
    assert "APG with eta 0.2 and norm 5" in rule_text(rule)
    assert ExportFacts("teacher", 1.0, "dmd2", 4).teacher_guidance.combination == Guidance().combination == Rule()


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
