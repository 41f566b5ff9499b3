"""A start time below 1: pure noise at the timestep of a lower noise level, also in cut tables of stock schedulers."""

import json

import diffusers
import pytest
import torch

from pipeline.tiny import tiny_sd
from pipeline.zoo import ZOO
from stepdistill.data.batch import PathRows
from stepdistill.diffusion.samplers import DDIM, SAMPLERS, TCD, Renoise
from stepdistill.diffusion.schedule import Prediction, from_scheduler
from stepdistill.errors import InputError
from stepdistill.exporting.export import export
from stepdistill.methods import DMD, DMD2, METHODS
from stepdistill.methods.dmd import DMDConfig
from stepdistill.methods.dmd2 import DMD2Config
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.recipe import load
from stepdistill.roles import Roles
from stepdistill.run import train
from stepdistill.testing.analytic import GaussianDenoiser
from stepdistill.testing.bed import G1, at, batch, player

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sampler_of(kind, start, steps=1, source=None):
    source = source or diffusers.DDIMScheduler(**SD)
    return kind(from_scheduler(source)[0], source, steps, start=start)


@pytest.mark.parametrize("start,expected", [(625, 1.404821), (399, 0.877405)])
@pytest.mark.parametrize("kind", [Renoise, DDIM])
def test_one_step_of_the_stock_scheduler_is_the_full_tables(kind, start, expected):
    """x_0 = (x - sigma eps)/alpha at the start, from x = .8 and eps = .3; the cut table is the full one's bits."""
    sampler = sampler_of(kind, start)
    stock = type(sampler.scheduler).from_config(json.loads(sampler.scheduler.to_json_string()))
    stock.set_timesteps(1)
    assert stock.timesteps.tolist() == [start] and float(stock.init_noise_sigma) == 1
    x = stock.step(torch.tensor([[0.3]]), stock.timesteps[0], torch.tensor([[0.8]]), return_dict=False)[0]
    assert x.item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(stock.alphas_cumprod, diffusers.DDIMScheduler(**SD).alphas_cumprod[: start + 1])
    (step,) = sampler.grid()
    assert step.r is None and step.t == start / 999
    prediction = Prediction(torch.tensor([[0.3]]), torch.tensor([[0.8]]), at(step.t, 1), sampler.schedule, "epsilon")
    assert sampler.advance(prediction, step, None).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("start,expected", [(399, [399, 299, 199, 99]), (625, [625, 469, 312, 156])])
def test_several_steps_start_there_too(start, expected):
    found = [round(step.t * 999) for step in sampler_of(Renoise, start, 4).grid()]
    assert found == expected


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("start", [399, 625, 343, 998])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [Renoise, DDIM, TCD])
def test_every_sampler_repeats_its_stock_scheduler(kind, steps, start, zero_snr):
    source = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    sampler = sampler_of(kind, start, steps, source)
    schedule = sampler.schedule
    stock = type(sampler.scheduler).from_config(sampler.scheduler.config)
    stock.set_timesteps(steps)
    assert stock.timesteps[0] == start

    def network(x, timestep):
        return torch.tanh(1.3 * x + 0.001 * timestep.reshape(-1, 1)) - 0.2 * x

    noise = torch.randn(5, 6)
    torch.manual_seed(3)
    ours = sampler.sample(lambda x, t: Prediction(network(x, schedule.timestep(t)), x, t, schedule, "v"), noise)
    torch.manual_seed(3)
    x = noise
    for timestep in stock.timesteps:
        x = stock.step(network(x, timestep.expand(len(x))), timestep, x, return_dict=False)[0]
    assert (ours - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize(
    "start,mean,std,divergence",
    [(None, 0.699182, 0.017126, 2.874593), (625, 0.673112, 0.103486, 1.098036), (399, 0.590416, 0.239829, 0.373735)],
)
def test_a_student_that_is_the_teacher_starts_closer_to_the_data(start, mean, std, divergence):
    """teacher(z, t*) of z ~ N(0, 1) is a Gaussian; its KL divergence to the data falls with the start."""
    sampler = sampler_of(Renoise, start)
    teacher = GaussianDenoiser(*G1, sampler.schedule, "epsilon")
    student = player(lambda x, t, _labels: teacher.posterior_mean(x, t), sampler.schedule, "epsilon")
    method = DMD2(DMD2Config(), Roles(teacher=teacher, student=student, critic=student), sampler)
    rows = batch(2)
    rows.noise = lambda _name: torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    middle, right = method.generate(rows).flatten().tolist()
    assert (middle, right - middle) == pytest.approx((mean, std), abs=2e-5)
    found = torch.distributions.kl_divergence(
        torch.distributions.Normal(middle, right - middle), torch.distributions.Normal(*G1)
    )
    assert found.item() == pytest.approx(divergence, abs=2e-3)


def test_dmds_pairs_begin_at_the_noise_end_and_the_student_gets_its_start():
    sampler = sampler_of(Renoise, 399)
    given_times = []

    def seen(x, t, _labels):
        given_times.append(t.tolist())
        return 0.5 * x

    student = player(seen, sampler.schedule, "epsilon")
    method = DMD(DMDConfig(), Roles(teacher=None, student=student, critic=student), sampler)
    rows, z = batch(2), torch.tensor([[0.4], [-1.0]], dtype=torch.float64)
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows.path = PathRows(torch.stack([z, 0.5 * z], 1), ends, rows.cond, None, torch.ones(2))
    assert method.pair_loss(rows).item() == pytest.approx(0, abs=1e-9)
    assert given_times == [[pytest.approx(399 / 999)] * 2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "teacher"
    save_pipeline(tiny_sd(), folder)
    return folder


def recipe_of(teacher, method, steps=1, start=399):
    return {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": 2.0}},
        "student": {"steps": steps, "start": start},
        "data": {"conditions": ["a red shoe", "rain"]},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "tracker": "none"},
        "report": {"samples": 0},
    }


@pytest.mark.parametrize(
    "method,steps,start,zero_snr",
    [
        ({"name": "dmd2", "critic_steps": 1}, 1, 399, False),
        ({"name": "sid-lsg", "sampler": "ddim"}, 3, 625, False),
        ({"name": "ode-regression", "pairs": 2, "solver_steps": 2}, 1, 399, False),
        ({"name": "dmd2", "critic_steps": 1}, 4, 799, True),
    ],
)
def test_a_run_is_exported_with_its_start(method, steps, start, zero_snr, teacher, tmp_path, monkeypatch):
    """The export's own check, at the end of each run, compares a plain call with the training-time sampler."""
    monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)
    if zero_snr:
        teacher = tmp_path / "teacher"
        save_pipeline(ZOO["sd-v"].build(), teacher)
    run = train(recipe_of(teacher, method, steps, start) | {"output": str(tmp_path / "run")})
    folder = run.folder / "export"
    if steps == 3:  # and of a session that is built anew
        result = export(run.folder, tmp_path / "again")
        assert result.max_error <= 1e-5
        folder = result.folder
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["num_train_timesteps"] == len(config["trained_betas"]) == start + 1


FREE = {
    "dmd",
    "dmd2",
    "decoupled-dmd",
    "f-distill",
    "phased-dmd",
    "tdm",
    "dmdr",
    "flash-dmd",
    "disback",
    "diff-instruct",
    "emd",
    "diff-ratio",
    "imagine-flash",
    "vsd",
    "pg-sb",
    "sid",
    "sid-lsg",
    "sida",
    "ladd",
    "add",
}


@pytest.mark.parametrize("name", METHODS)
def test_what_learns_from_the_teachers_path_has_no_other_start(name):
    method = METHODS[name]
    assert method.may_start_lower(method.Config()) == (name in FREE | {"ode-regression"})


@pytest.mark.parametrize(
    "method,start,steps,expected",
    [
        ({"name": "lcm"}, 399, 1, "expected null for lcm with these settings"),
        ({"name": "dmd2", "regression_steps": 3}, 399, 1, "expected null for dmd2 with these settings"),
        ({"name": "dmd2"}, 2, 4, r"expected at least student.steps - 1 \(3\), found 2"),
    ],
)
def test_a_start_that_does_not_fit_is_a_problem_of_the_recipe(method, start, steps, expected, teacher):
    with pytest.raises(InputError, match=f"student.start: {expected}"):
        load(recipe_of(teacher, method, steps, start) | {"data": {"images": str(teacher), "conditions": "captions"}})


@pytest.mark.parametrize("kind", SAMPLERS.values())
def test_a_start_beyond_the_table_is_refused(kind):
    with pytest.raises(InputError, match=r"student.start: expected a timestep from 3 to 999, found 1000"):
        sampler_of(kind, 1000, 4)
