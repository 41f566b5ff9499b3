"""Training-time samplers against the stock diffusers schedulers they are exported as."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from stepdistill.diffusion.samplers import DDIM, SAMPLERS, Renoise, dpm_solver_step, renoise_up
from stepdistill.diffusion.schedule import KINDS, FlowSchedule, Prediction, VPSchedule, from_scheduler
from stepdistill.errors import InputError


def vp_scheduler(prediction: str = "v_prediction", **options) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02, prediction_type=prediction, **options
    )


def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some nonlinear function of sample and time."""
    return torch.tanh(1.3 * x + 0.001 * timestep.reshape(-1, 1)) - 0.2 * x


def run_stock(scheduler, x: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.expand(len(x))), timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", SAMPLERS)
def test_vp_sampler_equals_its_stock_scheduler(name, steps, prediction):
    source = vp_scheduler(prediction)
    schedule, kind = from_scheduler(source)
    sampler = SAMPLERS[name](schedule, source, steps)
    torch.manual_seed(3)
    noise = torch.randn(5, 6)
    ours = sampler.sample(lambda x, t: Prediction(network(x, schedule.timestep(t)), x, t, schedule, kind), noise)
    torch.manual_seed(3)
    stock = run_stock(type(sampler.scheduler).from_config(sampler.scheduler.config), torch.randn(5, 6), steps)
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["renoise", "ddim"])
def test_flow_sampler_equals_its_stock_scheduler(name, shift, steps):
    source = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule, kind = from_scheduler(source)
    sampler = SAMPLERS[name](schedule, source, steps)
    torch.manual_seed(3)
    noise = torch.randn(5, 6)
    ours = sampler.sample(lambda x, t: Prediction(network(x, schedule.timestep(t)), x, t, schedule, kind), noise)
    torch.manual_seed(3)
    stock = run_stock(type(sampler.scheduler).from_config(sampler.scheduler.config), torch.randn(5, 6), steps)
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


def test_four_step_grids_are_the_published_ones():
    source = vp_scheduler()
    schedule, _ = from_scheduler(source)
    timesteps = {
        name: [round(step.t * 999) for step in sampler(schedule, source, 4).grid()]
        for name, sampler in SAMPLERS.items()
    }
    assert timesteps == {
        "renoise": [999, 749, 499, 249],
        "ddim": [999, 749, 499, 249],
        "tcd": [999, 759, 499, 259],
    }


def test_tcd_has_no_flow_form():
    with pytest.raises(InputError, match="flow"):
        SAMPLERS["tcd"](FlowSchedule(), FlowMatchEulerDiscreteScheduler(), 4)


def test_renoise_up_keeps_the_marginal():
    schedule, _ = from_scheduler(vp_scheduler())
    s, t = torch.tensor([0.3]).double(), torch.tensor([0.7]).double()
    x_s = schedule.add_noise(torch.tensor([[2.0]]).double(), torch.zeros(1, 1).double(), s)
    mean = renoise_up(schedule, x_s, s, t, torch.zeros(1, 1).double())
    assert torch.allclose(mean, 2.0 * schedule.alpha(t))
    spread = renoise_up(schedule, x_s, s, t, torch.ones(1, 1).double()) - mean
    expected = (schedule.sigma(t) ** 2 - (schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s)) ** 2).sqrt()
    assert torch.allclose(spread, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver_is_second_order(kind):
    """On a Gaussian the flow map is closed form; halving the step divides the error by about four, not two."""
    schedule = VPSchedule(vp_scheduler().alphas_cumprod)
    mean, std = 0.7, 0.5

    def predict(x, t):
        alpha, sigma = schedule.coefficients(t)
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return Prediction(schedule.from_x0(x0, x, t, kind), x, t, schedule, kind)

    def solve(steps):
        x, previous = torch.tensor([0.8]).double(), None
        times = torch.linspace(0.9, 0.3, steps + 1).double()
        for t, r in itertools.pairwise(times):
            current = predict(x, t.reshape(1))
            x, previous = dpm_solver_step(current, previous, r.reshape(1)), current
        return x

    def exact(x, t, r):
        (a_t, s_t), (a_r, s_r) = schedule.coefficients(t), schedule.coefficients(r)
        v_t, v_r = a_t**2 * std**2 + s_t**2, a_r**2 * std**2 + s_r**2
        return a_r * mean + (v_r / v_t).sqrt() * (x - a_t * mean)

    truth = exact(torch.tensor([0.8]).double(), torch.tensor(0.9).double(), torch.tensor(0.3).double())
    coarse, fine = (solve(20) - truth).abs().item(), (solve(40) - truth).abs().item()
    assert fine < coarse / 3


def test_a_table_that_only_its_own_scheduler_can_make():
    source = HeunDiscreteScheduler(num_train_timesteps=1024, beta_schedule="exp", prediction_type="sample")
    schedule, _ = from_scheduler(source)
    for kind in (Renoise, DDIM):
        made = kind(schedule, source, 2).scheduler
        torch.testing.assert_close(made.alphas_cumprod, source.alphas_cumprod, rtol=1e-5, atol=1e-9)
