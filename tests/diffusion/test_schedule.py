"""Schedules: conversions between predictions, golden numbers, and what is read from diffusers schedulers."""

import math

import diffusers
import pytest
import torch

from stepdistill.diffusion.samplers import DDIM, Renoise
from stepdistill.diffusion.schedule import (
    KINDS,
    EDMSchedule,
    FlowSchedule,
    Prediction,
    ScaledEDMSchedule,
    Schedule,
    VPSchedule,
    from_scheduler,
)
from stepdistill.errors import InputError
from stepdistill.testing.analytic import MixtureDenoiser

SD_TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
SCHEDULES: dict[str, Schedule] = {"vp": VPSchedule(SD_TABLE), "flow": FlowSchedule(), "edm": EDMSchedule()}
SCHEDULES["scaled edm"] = ScaledEDMSchedule(EDMSchedule(), data_std=0.5)
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def batch(count: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(count, 2, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return x0, eps, torch.linspace(0.05, 0.95, count, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_gives_back_what_was_noised(name, kind):
    schedule = SCHEDULES[name]
    x0, eps, t = batch()
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = (c.reshape(-1, 1, 1) for c in schedule.coefficients(t))
    v = schedule.data_std * alpha * eps - sigma * x0 / schedule.data_std
    emitted = {"epsilon": eps, "v": v, "edm": -v, "flow": eps - x0, "inverted flow": x0 - eps, "sample": x0}[kind]
    prediction = Prediction(emitted, x_t, t, schedule, kind)
    # The relative scale of the problem: x_0 from eps is divided by alpha, eps from x_0 by sigma.
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(prediction.x0 * alpha, x0 * alpha, **tolerance)
    torch.testing.assert_close(prediction.eps * sigma, eps * sigma, **tolerance)
    torch.testing.assert_close(prediction.score * sigma**2, -eps * sigma, **tolerance)
    torch.testing.assert_close(
        schedule.from_x0(prediction.x0, x_t, t, kind) * sigma * alpha, emitted * sigma * alpha, **tolerance
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_is_the_derivative_of_the_path(name):
    schedule = SCHEDULES[name]
    x0, eps, t = batch()
    alpha, sigma = schedule.coefficients(t)
    # The natural times of the docstring: the angle on VP (and on EDM scaled to it), t on flow, sigma on EDM.
    angle, sd = torch.atan2(sigma, alpha * schedule.data_std), schedule.data_std
    natural = {"vp": angle, "flow": t, "edm": sigma, "scaled edm": angle}[name].requires_grad_()
    path = {
        "vp": lambda s: (s.cos(), s.sin()),
        "flow": lambda s: (1 - s, s),
        "edm": lambda s: (torch.ones_like(s), s),
        "scaled edm": lambda s: (s.cos() / sd, s.sin()),
    }[name]

    def x_at(s):
        a, b = (c.reshape(-1, 1, 1) for c in path(s))
        return a * x0 + b * eps

    _, derivative = torch.func.jvp(x_at, (natural.detach(),), (torch.ones_like(natural),))
    torch.testing.assert_close(schedule.velocity(x0, eps, t), derivative, rtol=1e-12, atol=1e-12)


# The mixture .4 N(-1.5, .3^2) + .6 N(1, .5^2) at x = .8: D, score, eps, v, velocity.
GOLDEN = {
    "vp angle .6": (0.982625, 0.034487, -0.019473, -0.570903, -0.570903),
    "flow t = .5": (1.096502, -1.006995, 0.503498, -0.296502, -0.593005),
    "edm sigma = 1": (0.823288, 0.023288, -0.023288, -0.846576, -0.023288),
}
GOLDEN_AT = {
    "vp angle .6": (VPSchedule(torch.tensor([math.cos(0.6) ** 2], dtype=torch.float64)), 0.0),
    "flow t = .5": (FlowSchedule(), 0.5),
    "edm sigma = 1": (EDMSchedule(), EDMSchedule().time(torch.zeros(1)).item()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_the_mixture(name, kind):
    schedule, time = GOLDEN_AT[name]
    t = torch.tensor([time], dtype=torch.float64)
    x = torch.tensor([[0.8]], dtype=torch.float64)
    prediction = MixtureDenoiser([0.4, 0.6], [-1.5, 1.0], [0.3, 0.5], schedule, kind)(x, t)
    v = schedule.from_x0(prediction.x0, x, t, "v")
    found = (prediction.x0, prediction.score, prediction.eps, v, prediction.velocity)
    assert tuple(round(value.item(), 6) for value in found) == GOLDEN[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vp_times_on_the_grid_give_the_tables_own_values(dtype):
    steps = torch.arange(1000)
    schedule = VPSchedule(SD_TABLE)
    t = schedule.time(steps).to(dtype)
    alpha, sigma = schedule.coefficients(t)
    assert torch.equal(alpha, SD_TABLE.sqrt()) and torch.equal(sigma, (1 - SD_TABLE).sqrt())
    assert torch.equal(schedule.timestep(t), steps.double())


def test_vp_interpolates_the_table_between_grid_points():
    schedule = VPSchedule(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    alpha, sigma = schedule.coefficients(torch.tensor([0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(alpha**2, torch.tensor([0.7, 0.3], dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_timestep_are_inverse(name):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule.time(schedule.timestep(t)), t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_with_time(name):
    alpha, sigma = SCHEDULES[name].coefficients(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (sigma.diff() > 0).all() and (alpha.diff() <= 0).all()


def test_edm_ends():
    _, sigma = EDMSchedule().coefficients(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.002, 80.0], dtype=torch.float64))


def test_half_precision_predictions_are_read_in_float32():
    x0, eps, t = (value.bfloat16() for value in batch())
    assert Prediction(eps, x0, t.float(), SCHEDULES["vp"], "epsilon").x0.dtype == torch.float32


@pytest.mark.parametrize("scheduler", ["DDIM", "LCM", "TCD", "DDPM", "DPMSolverMultistep", "UniPCMultistep"])
@pytest.mark.parametrize("declared,kind", [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")])
def test_vp_schedulers_of_diffusers(scheduler, declared, kind):
    found, found_kind = from_scheduler(
        getattr(diffusers, f"{scheduler}Scheduler")(**SD_BETAS, prediction_type=declared)
    )
    assert isinstance(found, VPSchedule) and found_kind == kind
    torch.testing.assert_close(found.alphas_cumprod, SD_TABLE, rtol=1e-5, atol=1e-7)


def test_flow_schedulers_of_diffusers():
    found, kind = from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(found, FlowSchedule) and kind == "flow" and found.shift == 3.0
    found, kind = from_scheduler(diffusers.FlowMatchLCMScheduler(shift=2.0))
    assert isinstance(found, FlowSchedule) and kind == "flow" and found.shift == 2.0


def test_sigmas_that_rise_from_the_noise_end():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    schedule, kind = from_scheduler(scheduler)
    ours = DDIM(schedule, scheduler, 2)
    stock = ours.stock(2)
    stock.set_timesteps(2)
    t = schedule.time(stock.timesteps)
    assert kind == "inverted flow" and t.tolist() == pytest.approx([1.0, 0.75], abs=1e-6)
    x0, eps, _ = batch(2)
    emitted = schedule.from_x0(x0, eps, t[:1], kind)
    x_t = stock.step(emitted, stock.timesteps[0], eps).prev_sample
    torch.testing.assert_close(x_t, schedule.add_noise(x0, eps, t[1:]), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="expected ddim"):
        Renoise(schedule, scheduler, 2)


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "UniPCMultistep"])
def test_vp_schedulers_in_flow_mode(scheduler):
    found, kind = from_scheduler(
        getattr(diffusers, f"{scheduler}Scheduler")(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    )
    assert isinstance(found, FlowSchedule) and kind == "flow" and found.shift == 5.0
    with pytest.raises(InputError, match="prediction_type epsilon; a flow network's is flow_prediction"):
        from_scheduler(getattr(diffusers, f"{scheduler}Scheduler")(use_flow_sigmas=True))


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
EXACT = {
    "linear": ("DDIM", {"beta_schedule": "linear"}),
    "scaled linear": ("DDIM", SD_BETAS),
    "cosine": ("DDIM", {"beta_schedule": "squaredcos_cap_v2"}),
    "trained betas": ("DDIM", {"trained_betas": [0.01 + 1e-5 * i for i in range(1000)]}),
    "v": ("DDIM", SD_BETAS | {"prediction_type": "v_prediction"}),
    "sample": ("DDIM", SD_BETAS | {"prediction_type": "sample"}),
    "zero terminal SNR": ("DDIM", SD_BETAS | ZERO_SNR | {"timestep_spacing": "trailing"}),
    "Euler": ("EulerDiscrete", SD_BETAS | {"timestep_spacing": "trailing"}),
    "Euler, zero terminal SNR": ("EulerDiscrete", SD_BETAS | ZERO_SNR | {"timestep_spacing": "trailing"}),
    "Karras sigmas": ("EulerDiscrete", SD_BETAS | {"use_karras_sigmas": True}),
    "exponential sigmas": ("EulerDiscrete", SD_BETAS | {"use_exponential_sigmas": True}),
    "flow": ("FlowMatchEulerDiscrete", {}),
    "flow, shift": ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    "flow, dynamic shift": ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}),
    "flow, terminal": ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
    "flow, Karras sigmas": ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
    "flow, DPM-Solver": ("DPMSolverMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "EDM": ("EDMEuler", {}),
    "EDM, v": ("EDMEuler", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
    "EDM, exponential": ("EDMEuler", {"sigma_schedule": "exponential"}),
    "EDM, DPM-Solver": ("EDMDPMSolverMultistep", {"solver_order": 1}),
    "continuous Euler": (
        "EulerDiscrete",
        {
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_stock_step_agrees_with_our_conversion(name):
    """One deterministic step of the stock scheduler is alpha_r x_0 + sigma_r eps with our coefficients."""
    class_name, config = EXACT[name]
    scheduler = getattr(diffusers, f"{class_name}Scheduler")(**config)
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(4, **({"mu": 0.8} if config.get("use_dynamic_shifting") else {}))
    schedule, kind = from_scheduler(scheduler)
    x0, eps, _ = (value.float() for value in batch(2))
    scale = getattr(scheduler, "scale_model_input", lambda x, _timestep: x)
    now, after = (schedule.time(scheduler.timesteps[i]).expand(2) for i in (0, 1))
    x_t = schedule.add_noise(x0, eps, now)
    x = x_t / scale(torch.ones_like(x_t), scheduler.timesteps[0])
    stepped = scheduler.step(schedule.from_x0(x0, x_t, now, kind), scheduler.timesteps[0], x).prev_sample
    # Karras' times lie between table entries, where diffusers interpolates log sigma, and we abar; the timesteps of
    # DPM-Solver's flow are rounded to integers.
    rounded = name.endswith("sigmas") or name == "flow, DPM-Solver"
    # Euler's lifted table says alpha = 2**-12 where the students' schedulers, and we, say 0.
    tolerance = 5e-3 if rounded else 2e-4 + (2**-12 if name == "Euler, zero terminal SNR" else 0)
    found, expected = scale(stepped, scheduler.timesteps[1]), schedule.add_noise(x0, eps, after)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "UniPCMultistep", "DPMSolverMultistep"])
def test_epsilon_at_zero_terminal_snr_is_refused(scheduler):
    make = getattr(diffusers, f"{scheduler}Scheduler")
    with pytest.raises(InputError, match="zero terminal SNR"):
        from_scheduler(make(**SD_BETAS, rescale_betas_zero_snr=True, prediction_type="epsilon"))
    _, kind = from_scheduler(make(**SD_BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert kind == "v"


def test_unknown_schedulers_are_refused():
    with pytest.raises(InputError, match="CMStochasticIterativeScheduler has no alphas_cumprod"):
        from_scheduler(diffusers.CMStochasticIterativeScheduler())
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(InputError, match="'noise' is not one of"):
        from_scheduler(scheduler)
    with pytest.raises(ValueError, match="unknown prediction kind"):
        FlowSchedule().to_x0(*(torch.zeros(1, 1),) * 2, torch.zeros(1), "velocity")


@pytest.mark.parametrize("make", [diffusers.EulerDiscreteScheduler, diffusers.DDIMScheduler])
def test_a_rescaled_table_ends_in_zero_whatever_its_scheduler_lifts_it_to(make):
    """Euler's ends at 2**-24; the few-step schedulers that a student is exported with end at 0."""
    schedule, _ = from_scheduler(make(**SD_BETAS, **ZERO_SNR))
    exported = diffusers.LCMScheduler(**SD_BETAS, **ZERO_SNR)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), exported.alphas_cumprod.double(), atol=1e-9, rtol=1e-5)
    assert schedule.alphas_cumprod[-1] == 0


def test_a_scheduler_without_its_grid_is_read_as_well():
    assert from_scheduler(diffusers.PNDMScheduler(**SD_BETAS))[1] == "epsilon"
