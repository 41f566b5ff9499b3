"""Pipelines that do something between their network and their scheduler: convert, step frame by frame, put back."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from pipeline.tiny import redraw
from pipeline.toy import ToyNetwork, ToyPipeline
from stepdistill.diffusion.path import Path
from stepdistill.diffusion.samplers import DDIM, Renoise
from stepdistill.diffusion.stock_schedulers import noise_scale
from stepdistill.diffusion.window import Span
from stepdistill.errors import InputError
from stepdistill.exporting.check import free_part, stepped_in
from stepdistill.pipeline.compare import deviation
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.stock_call import record
from stepdistill.pipeline.trace import trace
from stepdistill.recipe import load
from stepdistill.training.make_method import make_sampler


def made(kind: type, scheduler: Any = None) -> Any:
    return kind(redraw(ToyNetwork(), 9), scheduler or DDIMScheduler(clip_sample=False))


class OfImages(ToyPipeline):
    """Its network predicts x_0, of which it makes velocities, dividing by .05 at least."""

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        return (x - super()._network(x, t, labels, step)) / max(float(t) / 1000, 0.05)


def test_x0_that_the_pipeline_makes_velocities_of():
    found = trace(made(OfImages, FlowMatchEulerDiscreteScheduler()))
    assert found.denoiser.spec.path == Path("sample", floor=0.05)
    assert found.self_test_error <= 1e-5
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    prediction = found.denoiser(x, t, {"extra.what": torch.tensor([3])})
    raw = found.network(x, 1 - t, extra={"what": torch.tensor([3]), "bias": 0.25})[0]
    torch.testing.assert_close(prediction.x0, raw)


class OnFlow(ToyPipeline):
    """Under TrigFlow's angles; its network is one of rectified flow, which sees what is kept of its first lines."""

    own_deviation: float | None = None
    kept = 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        generator: torch.Generator | None = None,
        num_inference_steps: int = 2,
        intermediate_timesteps: float | None = 1.3,
    ) -> tuple[Tensor]:
        labels, deviation = torch.tensor(class_labels), self.own_deviation or self.scheduler.config.sigma_data
        x = torch.randn(len(labels), 4, 8, 8, generator=generator) * deviation
        self.scheduler.set_timesteps(num_inference_steps, intermediate_timesteps=intermediate_timesteps)
        self.scheduler.set_begin_index(0)
        for angle in self.scheduler.timesteps[:-1]:
            s = angle.sin() / (angle.sin() + angle.cos())
            norm = (s**2 + (1 - s) ** 2).sqrt()
            seen = x / deviation * norm
            seen[:, :, : self.kept] = 0.5
            raw = self.network(seen, s.expand(len(x)), extra={"what": labels, "bias": 0.25})[0]
            given = ((1 - 2 * s) * seen + (1 - 2 * s + 2 * s**2) * raw) / norm * deviation
            given[:, :, : self.kept] = 1
            x, clean = self.scheduler.step(given, angle.expand(len(x)), x, generator, return_dict=False)
        return (clean / deviation,)


def test_a_network_on_another_path_than_its_scheduler():
    found = trace(made(OnFlow, SCMScheduler()))
    assert found.denoiser.spec.path == Path("flow", flow=True)
    assert found.denoiser.schedule.name == "angle" and found.self_test_error <= 1e-5
    # The student's sampler is the scheduler's, of unit data.
    sampler, call = Renoise(found.denoiser.schedule, found.pipeline.scheduler, 2), {"class_labels": [1, 2]}
    assert sampler.scheduler.config.sigma_data == 1
    stock = record(found.pipeline, call | {"num_inference_steps": 2})
    with torch.random.fork_rng(), torch.no_grad():
        torch.set_rng_state(stock["random_state"])
        cond = {"extra.what": torch.tensor([1, 2])}
        made_here = sampler.sample(lambda x, t: found.denoiser(x, t, cond), stock["noise"])
    torch.testing.assert_close(made_here, stock["latents"])
    with pytest.raises(InputError, match="sampler ddim: expected renoise"):
        DDIM(found.denoiser.schedule, found.pipeline.scheduler, 2)


def test_an_argument_that_a_student_of_other_steps_leaves_out_is_named():
    recipe = {"teacher": {"pipeline": "fashion-dit"}, "student": {"steps": 4}, "data": {"conditions": "classes"}}
    recipe = load(recipe | {"method": {"name": "dmd2"}, "train": {"steps": 1, "batch_size": 2, "lr": 1e-3}})
    named = r"sampler renoise: .*; teacher\.arguments\.intermediate_timesteps: null leaves it out"
    with pytest.raises(InputError, match=named):
        make_sampler(recipe, trace(made(OnFlow, SCMScheduler()))).grid()
    found = trace(made(OnFlow, SCMScheduler()), {"intermediate_timesteps": None})
    assert [step.r is None for step in make_sampler(recipe, found).grid()] == [False, False, False, True]


def test_a_pipeline_that_does_not_read_the_deviation_off_its_scheduler_has_no_student():
    pipeline = made(OnFlow, SCMScheduler())
    pipeline.own_deviation = 0.5
    found = trace(pipeline)
    assert found.pipeline.scheduler.config.sigma_data == found.denoiser.schedule.data_std == 0.5
    with pytest.raises(InputError, match="found SCMScheduler"):
        Renoise(found.denoiser.schedule, found.pipeline.scheduler, 2)


def test_lines_that_are_kept_on_another_path():
    pipeline = made(OnFlow, SCMScheduler())
    pipeline.kept = 2
    found = trace(pipeline)
    assert found.denoiser.spec.path == Path("flow", flow=True) and found.free == Span(2, 2, 6, 0)
    assert found.self_test_error <= 1e-5
    found.network.dtype = torch.float32  # as networks of diffusers have it
    pictures = decode(found, torch.zeros(1, 4, 6, 8), left=torch.full((1, 4, 8, 8), 0.6))
    assert pictures[:, :, :2].eq(153).all() and not pictures[:, :, 2:].any()


class Preconditioned(ToyPipeline):
    """Its network is EDM's: it takes noise levels, and its last channel is left off. Its scheduler takes x_0."""

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        sigma = self.scheduler.sigmas[step]
        seen = self.scheduler.scale_model_input(x, t)
        self.level = lambda _: sigma.log() * 0.25
        raw = super()._network(seen, t, labels, step)[:, :4]
        return x / (sigma**2 + 1) + raw * sigma / (sigma**2 + 1).sqrt()


def test_a_network_of_edm_under_another_scheduler():
    pipeline = Preconditioned(redraw(ToyNetwork(5), 9), EulerDiscreteScheduler(prediction_type="sample"))
    found = trace(pipeline)
    assert found.denoiser.spec.path == Path("edm", levels=True) and found.denoiser.spec.timestep == "noise_level"
    assert found.self_test_error <= 1e-5


class FrameByFrame(ToyPipeline):
    """A copy of the scheduler steps each of the sample's lines."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        labels = torch.tensor(class_labels)
        x = torch.randn(len(labels), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        copies = [copy.deepcopy(self.scheduler) for _ in range(8)]
        for step, t in enumerate(self.scheduler.timesteps):
            output = self._network(x, t, labels, step)
            each = zip(copies, output.unbind(2), x.unbind(2), strict=True)
            x = torch.stack([one.step(raw, t, line).prev_sample for one, raw, line in each], 2)
        return (x,)


def test_frames_that_copies_of_the_scheduler_step():
    found = trace(made(FrameByFrame))
    assert (found.frames, found.latent_shape) == (2, (4, 8, 8)) and found.self_test_error <= 1e-5
    stock = record(found.pipeline, {"class_labels": [1, 2], "num_inference_steps": 3})
    torch.testing.assert_close(free_part(found, stepped_in(found, stock, "latents")), stock["images"])


class PutBack(ToyPipeline):
    """Puts the same two lines in the place of its sample's first at each step."""

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        x[:, :, :2] = torch.linspace(-1, 1, 8)
        return super()._network(x, t, labels, step)


def test_what_is_put_back_at_each_step_is_beside_the_sample():
    found = trace(made(PutBack))
    assert found.free == Span(2, 2, 6, 0) and found.latent_shape == (4, 6, 8)
    assert found.self_test_error <= 1e-5


class UnderSigmas(ToyPipeline):
    """Under a scheduler of flow whose sigmas exceed 1; its network is one of rectified flow."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        labels = torch.tensor(class_labels)
        x = torch.randn(len(labels), 4, 8, 8, generator=generator) * self.scheduler.config.sigma_max
        self.scheduler.set_timesteps(sigmas=torch.linspace(0, 1, num_inference_steps, dtype=torch.float64))
        self.scheduler.sigmas[-1] = self.scheduler.sigmas[-2]
        for t, sigma in zip(self.scheduler.timesteps, self.scheduler.sigmas, strict=False):
            s = sigma / (sigma + 1)
            raw = self.network(x * (1 - s), s.expand(len(x)), extra={"what": labels, "bias": 0.25})[0]
            x0 = (1 - s) * x - s * raw
            x = self.scheduler.step((x - x0) / sigma, t, x).prev_sample
        return (x,)


def test_sigmas_above_one_are_those_of_data_and_noise():
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, final_sigmas_type="sigma_min")
    found = trace(made(UnderSigmas, scheduler))
    schedule = found.denoiser.schedule
    assert (schedule.name, found.denoiser.kind) == ("edm", "epsilon") and noise_scale(scheduler) == 80
    assert found.denoiser.spec.path == Path("flow", flow=True)
    scheduler.set_timesteps(sigmas=[0.0, 0.5, 1.0])
    times = schedule.time(scheduler.timesteps)
    torch.testing.assert_close(schedule.timestep(times), scheduler.timesteps.double())
    torch.testing.assert_close(schedule.levels.sigma(times).float(), scheduler.sigmas[:-1])
    # The student's sampler is the scheduler's, whose last step changes nothing.
    sampler = DDIM(schedule, scheduler, 3, lambda one, steps: set_up(found, one, steps)[0])
    stock, cond = record(found.pipeline, {"class_labels": [1, 2], "num_inference_steps": 3}), torch.tensor([1, 2])
    with torch.no_grad():
        own = sampler.sample(lambda x, t: found.denoiser(x, t, {"extra.what": cond}), sampler.seen(stock["noise"]))
    assert deviation(own, stock["latents"]) <= 1e-5 + sampler.rounding
    with pytest.raises(InputError, match=r"student\.steps: expected at least 2 under FlowMatchEuler"):
        DDIM(schedule, scheduler, 1)
