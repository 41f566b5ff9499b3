"""Generation repeats the pipeline's own, and a sample depends on its seed and index alone."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
)

from pipeline import tiny
from stepdistill.errors import InputError
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.set_up import passes
from stepdistill.pipeline.trace import trace
from stepdistill.sampling import stepping
from stepdistill.sampling.generate import generate, noise, sample_generator
from training.test_host_copies import HostCopies

ENTRIES = {"tiny_dit": [3, 0, 7], "tiny_sd": ["a red shoe", "rain", ""]}
ENTRIES |= {"tiny_sd3": ENTRIES["tiny_sd"], "tiny_flux": ENTRIES["tiny_sd"]}


@functools.cache
def traced(name):
    return trace(getattr(tiny, name)())


@functools.cache
def conditions(name):
    return encode(traced(name), ENTRIES[name], None)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def own_run(name, scheduler, guidance, steps):
    """(initial, final) latents of the pipeline's own call."""
    result = traced(name)
    before, result.pipeline.scheduler = result.pipeline.scheduler, scheduler
    try:
        record = observe(result.pipeline, ENTRIES[name], {}, steps=steps, guidance=guidance)
    finally:
        result.pipeline.scheduler = before
    return record.steps[0].sample[:3] / getattr(scheduler, "init_noise_sigma", 1.0), record.steps[-1].previous[:3]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ENTRIES)
def test_generate_repeats_the_pipeline(name, guidance):
    result = traced(name)
    if result.guidance.kind == "embedded":
        guidance = result.guidance.scale
    scheduler = result.pipeline.scheduler
    initial, final = own_run(name, type(scheduler).from_config(scheduler.config), guidance, steps=4)
    ours = generate(
        result,
        scheduler,
        conditions(name),
        torch.arange(3),
        steps=4,
        guidance=1.0 if result.guidance.kind == "embedded" else guidance,
        seed=0,
        initial=initial,
    )
    assert relative(ours, final) < 1e-5


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_generate_repeats_the_pipeline_under_other_solvers(scheduler):
    solver = scheduler.from_config(traced("tiny_sd").pipeline.scheduler.config)
    initial, final = own_run("tiny_sd", solver, 3.0, steps=5)
    solver = scheduler.from_config(solver.config)
    ours = generate(
        traced("tiny_sd"),
        solver,
        conditions("tiny_sd"),
        torch.arange(3),
        steps=5,
        guidance=3.0,
        seed=0,
        initial=initial,
    )
    assert relative(ours, final) < 1e-5
    assert solver.num_inference_steps is None


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_noise_is_put_onto_latents_as_the_stock_pipeline_of_images_does(scheduler):
    result = traced("tiny_sd")
    solver = scheduler.from_config(result.pipeline.scheduler.config)
    parts = result.pipeline.components | {"scheduler": copy.deepcopy(solver)}
    stock = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    onto = noise(result.latent_shape, 9, range(2))
    settings = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0, "output_type": "latent"}
    expected = stock(["a", "b"], image=onto, generator=[sample_generator(0, i) for i in (7, 2)], **settings).images
    ours = generate(
        result,
        solver,
        encode(result, ["a", "b"]),
        torch.arange(2),
        steps=4,
        guidance=3.0,
        seed=0,
        indices=[7, 2],
        onto=onto,
        start=2,
    )
    assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_a_sample_depends_on_seed_and_index_alone(scheduler):
    result = traced("tiny_dit")
    stochastic = scheduler.from_config(result.pipeline.scheduler.config, original_inference_steps=4)
    index = torch.arange(7) % 3

    def run(index, **options):
        options = {"steps": 4, "guidance": 1.0, "seed": 5} | options
        return generate(result, stochastic, conditions("tiny_dit"), index, **options)

    whole = run(index)
    assert relative(run(index, batch=3), whole) < 1e-5
    assert relative(run(index[4:], indices=[4, 5, 6]), whole[4:]) < 1e-5
    assert relative(run(index, seed=6), whole) > 0.1
    assert relative(whole[3], whole[0]) > 0.1


AFFINE = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler, zero signal": (EulerDiscreteScheduler, {"rescale_betas_zero_snr": True}),
}
OTHERS = {
    "noise": (LCMScheduler, {"original_inference_steps": 8}),
    "noise of a part": (TCDScheduler, {}),
    "memory": (DPMSolverMultistepScheduler, {}),
    "two stages": (HeunDiscreteScheduler, {}),
    "clipping": (DDIMScheduler, {"clip_sample": True}),
    "thresholds": (DDIMScheduler, {"thresholding": True}),
}


@pytest.mark.parametrize("name", [*AFFINE, *OTHERS])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_that_are_sums_give_what_the_scheduler_gives(monkeypatch, name, guidance):
    """Within float32's rounding over 8 steps; which schedulers' steps are sums is found by trying them."""
    result = traced("tiny_dit")
    kind, settings = (AFFINE | OTHERS)[name]
    scheduler = kind.from_config(result.pipeline.scheduler.config, **{"clip_sample": False} | settings)
    arguments = (result, scheduler, conditions("tiny_dit"), torch.arange(3))
    stock = []
    monkeypatch.setattr(stepping.StockSteps, "step", counting(stock, stepping.StockSteps.step))
    found = generate(*arguments, steps=8, guidance=guidance, seed=0)
    assert (len(stock) == 0) == (name in AFFINE)
    monkeypatch.setattr("stepdistill.sampling.generate.coefficients", lambda *_: None)
    expected = generate(*arguments, steps=8, guidance=guidance, seed=0)
    assert stock and relative(found, expected) < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_half_precision_outputs_are_stepped_in_float32(monkeypatch, guidance):
    result = copy.deepcopy(traced("tiny_dit"))
    result.denoiser.network.bfloat16()
    arguments = (result, result.pipeline.scheduler, conditions("tiny_dit"), torch.arange(3))
    steps = []
    monkeypatch.setattr(stepping.AffineSteps, "step", counting(steps, stepping.AffineSteps.step))
    generate(*arguments, steps=1, guidance=guidance, seed=0)
    ((table, said, x, number),) = steps
    _, a, b = table.table[number].double()
    exact = a * x.double() + b * said.raw.double()
    assert said.cond.raw.dtype == torch.bfloat16 and relative(table.step(said, x, number), exact) < 1e-6


def counting(calls, original):
    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    return counted


@pytest.mark.parametrize("name", ["tiny_dit", "tiny_sd3"])
def test_no_step_copies_anything_between_host_and_device(monkeypatch, name):
    """The noise goes to the device once a batch, the grid and its coefficients once."""
    result = copy.deepcopy(traced(name))
    scheduler, told = result.pipeline.scheduler, conditions(name).to("meta")
    generate(result, scheduler, conditions(name), torch.arange(2), steps=2, guidance=3.0, seed=0)
    generate(result, scheduler, conditions(name), torch.arange(2), steps=5, guidance=3.0, seed=0)
    result.denoiser.network.to("meta")
    found = {}
    for steps in (2, 5):
        with HostCopies() as mode:
            generate(result, scheduler, told, torch.arange(2), steps=steps, guidance=3.0, seed=0)
        found[steps] = len(mode.found)
    assert found[2] == found[5] > 0


def test_another_denoiser_of_the_same_call():
    result = traced("tiny_dit")
    other = replace(result, denoiser=result.denoiser.on(tiny.redraw(tiny.tiny_dit().transformer, 77)))
    options = {"steps": 2, "guidance": 1.0, "seed": 0}
    arguments = (result.pipeline.scheduler, conditions("tiny_dit"), torch.arange(3))
    assert relative(generate(other, *arguments, **options), generate(result, *arguments, **options)) > 0.1


def test_a_scheduler_of_another_prediction_is_refused():
    result = traced("tiny_dit")
    scheduler = LCMScheduler(prediction_type="epsilon")
    with pytest.raises(InputError, match=r"expected prediction type v .* found epsilon in LCMScheduler"):
        generate(result, scheduler, conditions("tiny_dit"), torch.arange(1), steps=4, guidance=1.0, seed=0)


@pytest.mark.parametrize("name", ENTRIES)
def test_decode_is_the_pipelines_own(name):
    result = traced(name)
    entry = {result.entry: ENTRIES[name]}
    scheduler, last = result.pipeline.scheduler, []

    @functools.wraps(scheduler.step)
    def step(*args, stock=scheduler.step, **kwargs):
        output = stock(*args, **kwargs)
        last[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    with patched(scheduler, "step", step):
        images = result.pipeline(**entry, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    latents = last[0]
    own = torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    ours = decode(result, latents, batch=2)
    assert ours.dtype == torch.uint8 and torch.equal(ours, own)
    assert "step" not in scheduler.__dict__ and "forward" not in result.denoiser.network.__dict__


def test_noise_rows_are_their_own():
    whole = noise((4, 8, 8), 3, range(5))
    assert whole.shape == (5, 4, 8, 8) and whole.dtype == torch.float32
    assert torch.equal(noise((4, 8, 8), 3, [4, 1]), whole[[4, 1]])
    assert not torch.equal(noise((4, 8, 8), 3, [0], stream=1), whole[:1])
    assert not torch.equal(noise((4, 8, 8), 4, [0]), whole[:1])
    many = noise((8,), 0, range(2000))
    assert abs(many.mean().item()) < 0.03 and abs(many.std().item() - 1) < 0.03
    assert len(many.unique(dim=0)) == 2000


@pytest.mark.parametrize(("kind", "count"), [(DDIMScheduler, 6), (HeunDiscreteScheduler, 11), (PNDMScheduler, 7)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_passes_are_those_that_are_made(kind, count, guidance):
    """More than the steps under schedulers of second order, and under Stable Diffusion 1.5's own."""
    result, told = traced("tiny_sd"), conditions("tiny_sd")
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    scheduler = kind.from_config(result.pipeline.scheduler.config, **options)
    before = result.denoiser.evaluations
    generate(result, scheduler, told, torch.arange(3), steps=6, guidance=guidance, seed=0)
    made = (result.denoiser.evaluations - before) / 3
    assert passes(result, scheduler, 6, guidance) == made == count * (1 if guidance == 1 else 2)
