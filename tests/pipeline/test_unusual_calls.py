"""What tracing finds about calls that few pipelines make, each by a made-up pipeline."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.tiny import redraw
from pipeline.toy import Control, ControlledPipeline, PicturedPipeline, ToyNetwork, ToyPipeline, toy
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.errors import InputError
from stepdistill.pipeline.components import put
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.decode import as_pictures, decode
from stepdistill.pipeline.set_up import set_up
from stepdistill.pipeline.sizes import at_size
from stepdistill.pipeline.stock_call import pictures_in, ready, record
from stepdistill.pipeline.trace import TraceError, trace


class Counted(ToyPipeline):
    """Makes several images of one colour, and no list of anything; always guided unless its own scale is 1."""

    several = True

    @torch.no_grad()
    def __call__(
        self,
        colour: Tensor,
        num_images_per_prompt: int = 1,
        max_guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        if num_images_per_prompt > 1 and not self.several:
            raise ValueError("makes one image")
        self.bias = lambda _step, count: colour.mean().expand(count)
        return super().__call__([3] * num_images_per_prompt, max_guidance_scale, generator, num_inference_steps)


@pytest.mark.parametrize("several", [True, False])
def test_a_call_that_takes_a_number_of_images_alone(several):
    def counted() -> Any:
        pipeline = Counted(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
        pipeline.several = several
        return pipeline

    arguments = {"colour": torch.tensor([0.1, 0.3])}
    with pytest.raises(TraceError, match=r"'guidance'.*teacher\.arguments\.max_guidance_scale=1"):
        trace(counted(), arguments)
    result = trace(counted(), arguments | {"max_guidance_scale": 1.0})
    assert (result.entry, result.alone) == ("num_images_per_prompt", not several)
    assert result.self_test_error <= 1e-5
    (colour,) = encode(result, entries(result, "classes")).cond["extra.bias"]
    assert colour == pytest.approx(0.2)


def test_a_learned_variance_is_left_to_the_pipeline():
    pipeline = toy(8, DDPMScheduler(variance_type="learned_range", clip_sample=False))
    pipeline.read = lambda raw: raw if "learned" in pipeline.scheduler.config.variance_type else raw[:, :4]
    result = trace(pipeline)
    assert result.denoiser.spec.output == "first_half" and result.self_test_error <= 1e-5


class Tiling(nn.Module):
    use_tiling = False

    def enable_tiling(self):
        self.use_tiling = True


def test_an_autoencoder_that_knows_tiles_alone():
    class Tiled(ToyPipeline):
        def __call__(self, class_labels: list[int], num_inference_steps: int = 5) -> tuple[Tensor]:
            made = super().__call__(class_labels, 1.0, None, num_inference_steps)
            if not self.vae.use_tiling:
                raise NotImplementedError("Decoding without tiling has not been implemented yet.")
            return made

    pipeline = Tiled(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    pipeline.vae = Tiling()
    made = record(pipeline, {"class_labels": [1], "num_inference_steps": 2})
    again = record(pipeline, {"class_labels": [1], "num_inference_steps": 2})
    assert pipeline.vae.use_tiling and torch.equal(made["noise"], again["noise"])


def test_a_stock_call_whose_images_are_its_latents_is_stored(tmp_path):
    found = record(toy(), {"class_labels": [1], "num_inference_steps": 3})
    save_file(found, tmp_path / "result.safetensors")
    assert torch.equal(found["images"], found["latents"])


class TwiceTold(ToyPipeline):
    """Tells its network the time in two arguments."""

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        self.bias = lambda _step, count: self.level(t).expand(count)
        return super()._network(x, t, labels, step)


def test_a_time_in_two_arguments():
    result = trace(TwiceTold(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)))
    assert result.denoiser.spec.times == {"extra.bias"} and result.self_test_error <= 1e-5


class Beside(ToyNetwork):
    """Takes more channels before those of the sample."""

    def forward(self, picture: Tensor, noise_level: Tensor, extra: dict[str, Any], flag: bool = False) -> Any:
        return super().forward(picture[:, -4:] + picture[:, :3].mean(1, keepdim=True), noise_level, extra, flag)


class Estimator(ToyPipeline):
    """Makes a map of each picture, which comes before the sample, and returns no latents."""

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
        output_type: str = "np",
    ) -> tuple[Tensor]:
        if output_type != "np":
            raise ValueError("`output_type` must be `np`.")
        pictures = [np.asarray(one, np.float32) / 255 for one in (image if isinstance(image, list) else [image])]
        seen = torch.stack([torch.tensor(picture[:8, :8]).movedim(2, 0) for picture in pictures])
        self.feed = lambda x: torch.cat([seen, x], 1)
        return super().__call__([3] * len(pictures), 1.0, generator, num_inference_steps)


def test_a_picture_before_the_sample_and_no_latents_to_return(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noisy).save(tmp_path / "picture.png")
    arguments = {"image": str(tmp_path / "picture.png")}
    result = trace(Estimator(redraw(Beside(), 9), DDIMScheduler(clip_sample=False)), arguments)
    assert result.denoiser.spec.window.spans == ((1, 3, 4, 0),) and result.self_test_error <= 1e-5
    assert result.arguments == {"image": [arguments["image"]]}  # one for each: all others would be left out


class OnePicture(PicturedPipeline):
    """Takes a list of a single picture, however many images are made."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        image: Any,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
    ) -> tuple[Tensor]:
        if not isinstance(image, list) or len(image) != 1:
            raise ValueError("takes one picture for each of its networks")
        return super().__call__(class_labels, image * len(class_labels), guidance_scale, generator, num_inference_steps)


def test_a_list_of_one_picture_may_be_what_the_call_takes(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    result = trace(
        OnePicture(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)),
        {"image": [str(tmp_path / "picture.png")]},
    )
    assert result.arguments == {"image": (str(tmp_path / "picture.png"),)} and not result.alone


def test_lists_of_lists_of_pictures_are_opened(tmp_path):
    file = str(tmp_path / "picture.png")
    Image.new("RGB", (8, 8), "red").save(file)
    grid = [[file, None], [file, file]]
    assert pictures_in(grid) == [file] * 3 and pictures_in([[file, 1]]) == []
    (opened,) = ready(toy(), {"image": grid}).values()
    assert [[one and one.size for one in row] for row in opened] == [[(8, 8), None], [(8, 8), (8, 8)]]


def test_several_pictures_of_a_sample_are_beside_each_other():
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2) / 255
    assert as_pictures(images, 2)[:, 0, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


class Prior(ToyPipeline):
    """Looks at the output's type when it has sampled, as Kandinsky's priors do."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
        output_type: str = "pt",
    ) -> tuple[Tensor]:
        made = super().__call__(class_labels, guidance_scale, generator, num_inference_steps)
        if output_type != "pt":
            raise ValueError(f"Only the output type `pt` is supported not output_type={output_type}")
        return made


def test_a_call_that_refuses_latents_after_its_last_step_is_not_made_again():
    pipeline = Prior(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    assert trace(pipeline).self_test_error <= 1e-5
    call = {"class_labels": [1], "num_inference_steps": 2}
    drawn, refused = (record(pipeline, call | {"output_type": kind}) for kind in ("pt", "latent"))
    assert torch.equal(drawn["latents"], refused["latents"])


class Outer(ToyPipeline):
    """Samples with a pipeline inside it, which was given the same scheduler."""

    def __init__(self, network: nn.Module, scheduler: Any):
        super().__init__(network, scheduler)
        self.inner = ToyPipeline(network, scheduler)

    @functools.wraps(ToyPipeline.__call__)
    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor]:
        return self.inner(*given, **named)


def test_a_component_is_put_into_a_pipeline_inside():
    result = trace(Outer(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)))
    grid, _ = set_up(result, DDPMScheduler(clip_sample=False), 4)
    assert grid == {"num_inference_steps": 4}
    # As for an export, whose call is proven.
    put(result.pipeline, "scheduler", DDPMScheduler(clip_sample=False))
    put(result.pipeline, "network", redraw(ToyNetwork(), 3))
    assert "noise" in record(result.pipeline, {"class_labels": [1], "num_inference_steps": 2})
    assert result.pipeline.inner.network is result.pipeline.network


def test_an_argument_is_a_tensor_in_a_file(tmp_path):
    np.save(tmp_path / "colour.npy", np.array([0.1, 0.3], np.float32))
    arguments = {"colour": str(tmp_path / "colour.npy"), "max_guidance_scale": 1.0}
    result = trace(Counted(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)), arguments)
    (colour,) = encode(result, entries(result, "classes")).cond["extra.bias"]
    assert colour == pytest.approx(0.2)
    with pytest.raises(InputError, match=r"colour: expected a tensor, found no file .*none\.npy"):
        trace(result.pipeline, arguments | {"colour": str(tmp_path / "none.npy")})


class Framed(ToyNetwork):
    """Takes a time for each of two frames, and no other form of it."""

    def forward(self, picture: Tensor, noise_level: Tensor, extra: dict[str, Any], flag: bool = False) -> Any:
        first, second = noise_level.unbind(1)
        return super().forward(picture, (first + second) / 2, extra, flag)


class TimePerFrame(ToyPipeline):
    """Tells its network a time for each frame of each image."""

    frames = 2

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        level = self.level(t).expand(len(x), self.frames)
        return self.network(x, level, extra={"what": labels, "bias": self.bias(step, len(x))})[0]


def test_a_time_for_each_frame():
    result = trace(TimePerFrame(redraw(Framed(), 9), DDIMScheduler(clip_sample=False)))
    assert result.denoiser.spec.timestep_mask.tolist() == [[1, 1]] and result.self_test_error <= 1e-5
    pipeline = TimePerFrame(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    pipeline.frames = 1
    assert trace(pipeline).denoiser.spec.timestep_mask is None  # one for each image does too


class Lines(nn.Module):
    """Sees every line of the noisy sample as a row of its own, and returns a number for each."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, line: Tensor, noise_level: Tensor) -> tuple[Tensor]:
        return (self.scale * line.std((1, 2)) + noise_level,)


class LineByLine(ControlledPipeline):
    """A second network feeds the first, line by line; as ControlNets of a video do frame by frame."""

    several = True

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        if len(x) > 1 and not self.several:
            raise ValueError("makes one image")
        (made,) = self.control(x.movedim(2, 1).flatten(0, 1), self.level(t).expand(self.side * len(x)))
        self.bias = lambda _step, _count: made
        return ToyPipeline._network(self, x, t, labels, step)


@pytest.mark.parametrize("several", [True, False])
def test_a_helper_that_sees_the_parts_of_a_sample_as_rows(several):
    pipeline = LineByLine(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False), Lines())
    pipeline.several = several
    result = trace(pipeline)
    (helper,) = result.denoiser.spec.helpers
    assert helper.denoiser.spec.window.frames == RowLayout(each=8, place=2)
    assert helper.feeds == {"extra.bias": 0} and result.self_test_error <= 1e-5


class SquareByLine(LineByLine):
    """At a size that is an argument."""

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 5,
        height: int = 8,
        width: int = 8,
    ) -> tuple[Tensor]:
        assert height == width
        self.side = height
        return super().__call__(class_labels, guidance_scale, generator, num_inference_steps)


def test_a_helper_sees_other_rows_at_another_size(monkeypatch):
    monkeypatch.setattr("stepdistill.pipeline.sizes.picture_size", lambda trace: trace.latent_shape[1:])
    result = trace(SquareByLine(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False), Lines()))
    (helper,) = at_size(result, (12, 12)).denoiser.spec.helpers
    assert helper.denoiser.spec.window.frames.each == 12 and helper.denoiser.spec.timestep_mask.shape == (1, 12)


class ToldSigma(ToyPipeline):
    """Tells its network the sigma of a step, whose timestep its scheduler cuts off to an integer."""

    def _network(self, x: Tensor, t: Tensor, labels: Tensor, step: int) -> Tensor:
        self.level = lambda _: self.scheduler.sigmas[step]
        return super()._network(x, t, labels, step)


def test_a_time_that_is_the_exact_sigma():
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    result = trace(ToldSigma(redraw(ToyNetwork(), 9), flow))
    assert result.denoiser.spec.timestep_scale == 0.001 and result.self_test_error <= 1e-5


class PartByPart(ToyPipeline):
    """Runs its grid once for each of two parts of an image, as pipelines of long videos do."""

    @functools.wraps(ToyPipeline.__call__)
    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor]:
        parts = [super().__call__(*given, **named)[0]]
        parts += super().__call__(*given, **named)
        return (torch.cat(parts, 3),)


def test_a_grid_that_is_run_again_is_refused():
    with pytest.raises(TraceError, match="PartByPart runs its grid again"):
        trace(PartByPart(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False)))


class ShiftedSigmas(FlowMatchEulerDiscreteScheduler):
    """Its shift is in the sigmas of a grid, not in the timesteps."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        even = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(sigmas=even, timesteps=[1000 * sigma for sigma in even], device=device)


def test_timesteps_that_are_not_shifted_with_their_sigmas():
    schedule = trace(toy(scheduler=ShiftedSigmas(shift=3.0))).denoiser.schedule
    half = torch.tensor([500.0])
    torch.testing.assert_close(schedule.time(half), torch.tensor([0.75]).double())
    torch.testing.assert_close(schedule.timestep(schedule.time(half)), half.double())


class Tokens(ToyNetwork):
    """Takes tokens, and returns a learned variance beside each."""

    def forward(self, picture: Tensor, noise_level: Tensor, extra: dict[str, Any], flag: bool = False) -> Any:
        side = round(picture.shape[1] ** 0.5)
        (raw,) = super().forward(picture.transpose(1, 2).unflatten(2, (side, side)), noise_level, extra, flag)
        return (torch.cat([raw, 2 * raw], 1).flatten(2).transpose(1, 2),)


def test_the_first_half_of_an_odd_number_of_tokens_is_of_their_channels():
    pipeline = toy(
        feed=lambda x: x.flatten(2).transpose(1, 2), read=lambda raw: raw.transpose(1, 2).unflatten(2, (3, 3))[:, :4]
    )
    pipeline.network, pipeline.side = redraw(Tokens(), 9), 3
    result = trace(pipeline)
    assert (result.denoiser.spec.window.grid, result.denoiser.spec.output) == ((3, 3), "first_half")
    assert result.self_test_error <= 1e-5


def test_a_helper_that_sees_another_part_of_the_sample_is_refused():
    """A line that the denoiser keeps at zero is part of what its helper sees."""
    pipeline = ControlledPipeline(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False), Control())
    pipeline.feed = lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2)
    with pytest.raises(TraceError, match="control sees another part of the sample than network"):
        trace(pipeline)


@dataclass
class Predicted(BaseOutput):
    predicted: Tensor


class OfTokens(nn.Module):
    """Returns the output of tokens (B, N, C), and a learned variance behind each, by a name of its own."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, time: Tensor, labels: Tensor) -> Predicted:
        raw = self.layer((tokens + (time + labels)[:, None, None]).tanh())
        return Predicted(torch.cat([raw, 2 * raw], 2))


class TokenPipeline(DiffusionPipeline):
    def __init__(self, network: nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], generator: torch.Generator | None = None, num_inference_steps: int = 5
    ) -> tuple[Tensor]:
        labels = torch.tensor(class_labels) / 10
        x = torch.randn(len(labels), 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            raw = self.network(x, t.expand(len(x)) / 1000, labels).predicted
            x = self.scheduler.step(raw.chunk(2, 2)[0], t, x).prev_sample
        return (x[:, None],)


def test_the_first_half_of_a_sample_of_tokens_is_of_the_last_axis():
    result = trace(TokenPipeline(redraw(OfTokens(), 9), DDIMScheduler(clip_sample=False)))
    assert result.denoiser.spec.output == "first_half_of_last_axis" and result.self_test_error <= 1e-5
    assert decode(result, torch.ones(1, 6, 4)).eq(255).all()
