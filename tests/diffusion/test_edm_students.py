"""Students of EDM teachers: Euler is DDIM's step there, and stock schedulers run it."""

import diffusers
import pytest
import torch

from pipeline.zoo import ZOO
from stepdistill.diffusion.samplers import DDIM, TCD, Renoise
from stepdistill.diffusion.schedule import Prediction, from_scheduler
from stepdistill.errors import InputError
from stepdistill.exporting.export import export
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load
from stepdistill.run import train
from stepdistill.training.session import build

# Playground v2.5's; CosXL's; SDXL's under Euler on continuous time.
SOURCES = {
    "playground": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "cosxl": lambda: diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    ),
    "continuous": lambda: diffusers.EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=120.0,
    ),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", SOURCES)
def test_ddim_on_edm_is_the_stock_euler(name, steps):
    source = SOURCES[name]()
    schedule, kind = from_scheduler(source)
    sampler = DDIM(schedule, source, steps)
    times = [step.t for step in sampler.grid()]
    assert times == pytest.approx([1 - k / steps for k in range(steps)], abs=1e-5)

    def network(x, timestep):
        return torch.tanh(1.3 * x + 0.1 * timestep.reshape(-1, 1)) - 0.2 * x

    stock = type(sampler.scheduler).from_config(sampler.scheduler.config)
    stock.set_timesteps(steps)
    x = start = torch.randn(5, 6) * stock.init_noise_sigma
    for timestep in stock.timesteps:
        timesteps = timestep.expand(len(x))
        x = stock.step(network(stock.scale_model_input(x, timestep), timesteps), timestep, x, return_dict=False)[0]
    ours = sampler.sample(
        lambda x, t: Prediction(network(x, schedule.timestep(t).float()), x, t, schedule, kind), sampler.seen(start)
    )
    assert (ours - x).abs().max() <= (1e-5 + sampler.rounding) * x.abs().max()
    # What training starts from is noise of the same deviation.
    assert sampler.seen(start).std().item() == pytest.approx((start / stock.init_noise_sigma).std().item(), rel=1e-3)


@pytest.mark.parametrize("kind", [Renoise, TCD])
def test_what_noises_afresh_has_no_stock_scheduler_there(kind):
    source = SOURCES["playground"]()
    with pytest.raises(InputError, match=rf"sampler {kind.name}: expected ddim for an EDM schedule.*sfd"):
        kind(from_scheduler(source)[0], source, 4)


def recipe_of(teacher, method, out):
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": ["a red shoe", "two birds on a wire"]},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(out),
    }


METHODS = {
    "playground": {"name": "dmd2", "sampler": "ddim", "critic_steps": 1},
    "cosxl": {"name": "sfd", "substeps": 1},
    "continuous": {"name": "sfd", "substeps": 1},
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_student_of_an_edm_pipeline_is_exported(name, tmp_path):
    """Also by a method that noises afresh by default; that is refused before anything is encoded."""
    pipeline = ZOO["sdxl"].build()
    pipeline.register_modules(scheduler=SOURCES[name]())
    save_pipeline(pipeline, tmp_path / "teacher")
    run = train(recipe_of(tmp_path / "teacher", METHODS[name], tmp_path / "a"))
    assert export(run.folder, tmp_path / "again").max_error <= 1e-4  # as the end of the run has checked
    with pytest.raises(InputError, match=r"expected ddim for an EDM schedule.*method.sampler: ddim"):
        build(load(recipe_of(tmp_path / "teacher", {"name": "dmd2"}, tmp_path / "none")), torch.device("cpu"))
