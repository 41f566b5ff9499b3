"""LinearAG: the unconditional output as a sum of earlier outputs, against its definition written out."""

import pytest
import torch
from guidance_bed import STEPS, N, W, by_hand, conditions, run, traced, two

from stepdistill.diffusion.schedule import Prediction
from stepdistill.errors import InputError
from stepdistill.sampling.rules.linear import FITS_SEED, LinearAdaptive, fit_linear
from stepdistill.sampling.rules.names import rule_for


@torch.no_grad()
def test_every_second_guess_is_the_sum_of_the_outputs_so_far():
    """c0 u0 c1 at step 1, and c0 u0 c1 c2 u2 c3 at step 3."""
    coefficients = {1: torch.tensor([-0.5, 1.0, 0.4]), 3: torch.tensor([0.1, -0.2, 0.3, 0.0, 0.6, 0.2])}
    outputs = {}

    def predict(number, x, t):
        cond, uncond = (one.raw for one in two(x, t))
        outputs[number] = cond, uncond
        if number == 1:
            uncond = -0.5 * outputs[0][0] + outputs[0][1] + 0.4 * cond
        if number == 3:
            before = 0.1 * outputs[0][0] - 0.2 * outputs[0][1] + 0.3 * outputs[1][0]
            uncond = before + 0.6 * outputs[2][1] + 0.2 * cond
        guided = Prediction(uncond + W * (cond - uncond), x, t, traced().denoiser.schedule, traced().denoiser.kind)
        return guided.x0, guided.eps

    found, passes = run(lambda: LinearAdaptive(W, coefficients))
    assert passes == 2 * STEPS - 2
    torch.testing.assert_close(found, by_hand(predict), rtol=1e-4, atol=1e-4)
    parts, _ = run(lambda: LinearAdaptive(W, coefficients), batch=2)
    torch.testing.assert_close(found, parts, rtol=1e-4, atol=1e-4)
    always, _ = run(lambda: LinearAdaptive(W, {}))
    torch.testing.assert_close(always, run("cfg")[0], rtol=1e-4, atol=1e-5)


def test_the_coefficients_are_those_of_least_squares():
    told = fit_linear(traced(), conditions(), steps=STEPS, guidance=W, seed=1, count=N)
    assert {number: len(one) for number, one in told.items()} == {1: 3, 3: 6}
    watched = LinearAdaptive(W, {})
    run(lambda: watched, seed=1 + FITS_SEED)
    c0, u0, c1, u1, c2, u2, c3, u3 = (output.double().flatten() for output in watched.seen)
    for number, regressors, target in ((1, [c0, u0, c1], u1), (3, [c0, u0, c1, c2, u2, c3], u3)):
        seen = torch.stack(regressors, 1)
        residual = target - seen @ told[number]
        assert (seen.T @ residual).abs().max() < 1e-5 * target.square().sum()
        assert residual.square().sum() < 0.9 * (target - regressors[-1]).square().sum()


def test_the_rule_by_its_name():
    settings = {"steps": STEPS, "guidance": W, "seed": 1}
    coefficients = fit_linear(traced(), conditions(), **settings, count=4)
    named, passes = run(rule_for(traced(), conditions(), "linear:4", **settings))
    torch.testing.assert_close(named, run(lambda: LinearAdaptive(W, coefficients))[0])
    assert passes == 2 * STEPS - 2
    assert run(rule_for(traced(), conditions(), "linear:4", **settings, interval=(0.6, 1)))[1] == STEPS + 1
    # Without the first step it is fitted on the steps that are left, of which every second is guessed.
    assert run(rule_for(traced(), conditions(), "linear:4", **settings, interval=(0.2, 0.8)))[1] == STEPS + 2
    for text, interval, problem in [
        ("linear:0", None, "expected a number of samples after linear:, found '0'"),
        ("cfg", (0.8, 0.2), "interval: expected low, high with 0 <= low < high <= 1"),
    ]:
        with pytest.raises(InputError, match=problem):
            rule_for(traced(), conditions(), text, **settings, interval=interval)
