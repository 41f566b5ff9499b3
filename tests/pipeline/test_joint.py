"""Two samples at once, a video and its sound: a copy of the scheduler steps the second one (LTX-2)."""

import copy

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image

from pipeline.no_preview import NoPreview
from pipeline.tiny import redraw, t5_tokenizer
from pipeline.zoo import gemma, ready
from stepdistill.exporting.check import ExportError
from stepdistill.exporting.export import export
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.layout import layout
from stepdistill.pipeline.sizes import at_size
from stepdistill.pipeline.trace import TraceError, trace
from stepdistill.run import train
from stock_here import call_here

PROMPTS = ["a red shoe", "two birds on a wire"]
SMALL = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16}
# Plain guidance, with one scale for both.
PLAIN = {"stg_scale": 0, "modality_scale": 1, "guidance_rescale": 0}
PLAIN |= {f"audio_{name}": None for name in ("guidance_scale", *PLAIN)}


def ltx2(kind=diffusers.LTX2Pipeline, **more):
    tokenizer = t5_tokenizer()
    encoder = gemma(tokenizer)
    width, depth = encoder.config.hidden_size, encoder.config.num_hidden_layers
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=width,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=width,
        text_proj_in_factor=depth + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": redraw(vae, 1),
        "audio_vae": redraw(audio_vae, 2),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "connectors": redraw(connectors, 3),
        "transformer": redraw(transformer, 5),
        "vocoder": redraw(vocoder, 6),
    }
    return ready(kind(**parts, **more))


KINDS = {"text": diffusers.LTX2Pipeline, "frame": diffusers.LTX2ImageToVideoPipeline}
# One video, with and without its first frame, and its sound.
SHAPES = {"text": [(48, 4), (5, 4)], "frame": [(4, 2, 4, 4), (5, 4)]}


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("pictures") / "first.png"
    Image.new("RGB", (32, 32), (200, 80, 40)).save(file)
    return {"text": SMALL | PLAIN, "frame": SMALL | PLAIN | {"image": str(file), "image_crf": 0}}


@pytest.fixture(scope="module")
def traces(calls) -> dict:
    return {name: trace(ltx2(kind), calls[name]) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_both_samples_are_one_for_the_denoiser(name, traces):
    traced = traces[name]
    joint, count = traced.denoiser.spec.joint, sum(torch.Size(shape).numel() for shape in SHAPES[name])
    assert [part.shape for part in joint.parts] == SHAPES[name]
    assert traced.latent_shape == (count,) and traced.self_test_error <= 1e-5
    cond, _ = encode(traced, PROMPTS).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, count), torch.tensor([0.9, 0.4], dtype=torch.float64)
    video, audio = (
        one.reshape(2, *shape) for one, shape in zip(x.split([count - 20, 20], 1), SHAPES[name], strict=True)
    )
    told = {key: value for key, value in cond.items() if not key.startswith("beside")}
    times, kept = traced.denoiser.schedule.timestep(t).float(), torch.zeros(2, 0, 4)
    told |= {"timestep": times, "sigma": times}
    if name == "frame":
        kept, video = cond["beside hidden_states on axis 1"], video.flatten(2).transpose(1, 2)
        told |= {"timestep": times[:, None] * torch.tensor([0.0] * 16 + [1.0] * 32), "audio_timestep": times}
    told |= traced.denoiser.spec.constants | {
        "hidden_states": torch.cat([kept, video], 1),
        "audio_hidden_states": audio,
    }
    with torch.no_grad():
        velocity, sound = traced.network(**told)
        velocity = velocity[:, kept.shape[1] :]
        if name == "frame":
            velocity = velocity.transpose(1, 2)
        expected = torch.cat([velocity.flatten(1), sound.flatten(1)], 1)
        torch.testing.assert_close(traced.denoiser(x, t, cond).raw, expected)


def test_guidance_of_its_own_for_the_sound_is_named_with_what_leaves_it_out():
    with pytest.raises(TraceError, match=r"other guidance.*stg_scale=0.*audio_guidance_scale=null") as refused:
        trace(ltx2(), SMALL)
    assert "\n" not in str(refused.value)
    with pytest.raises(TraceError, match=r"the pipeline's rule is not.*audio_guidance_scale=null guides all samples"):
        trace(ltx2(), SMALL | PLAIN | {"audio_guidance_scale": 1.0})


@pytest.mark.parametrize("name", KINDS)
def test_at_another_size_only_the_video_grows(name, traces):
    small, large = (one.denoiser.spec.joint.parts for one in (traces[name], at_size(traces[name], (32, 64))))
    sizes = [[torch.Size(part.shape).numel() for part in parts] for parts in (small, large)]
    assert sizes[1] == [2 * sizes[0][0], sizes[0][1]]


def test_real_images_are_no_such_samples(traces):
    with pytest.raises(TraceError, match=r"'decode'.*hidden_states and audio_hidden_states"):
        layout(traces["text"])


class TwoInOne(torch.nn.Module):
    """Returns what it makes of its second argument first."""

    def __init__(self):
        super().__init__()
        self.picture, self.sound, self.label = torch.nn.Linear(16, 16), torch.nn.Linear(3, 3), torch.nn.Embedding(11, 1)

    def forward(self, picture, sound, level, what):
        shift = self.label(what) + level[:, None] / 1000
        seen, heard = picture.flatten(1) + sound.mean(1, keepdim=True), sound + picture.mean((1, 2, 3))[:, None]
        return self.sound(torch.tanh(heard + shift)), self.picture(torch.tanh(seen + shift)).view_as(picture)


class ToyOfTwo(diffusers.DiffusionPipeline):
    """Guides with two calls; the sound is stepped where ``hears`` says so, by ``given`` of its prediction."""

    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.hears, self.given = lambda _step: True, lambda output: output

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=3.0, generator=None, num_inference_steps=5):
        what = torch.tensor(class_labels)
        x, y = (torch.randn(len(what), *shape, generator=generator) for shape in ((1, 4, 4), (3,)))
        self.scheduler.set_timesteps(num_inference_steps)
        other = copy.deepcopy(self.scheduler)
        for step, t in enumerate(self.scheduler.timesteps):
            made = self.network(picture=x, sound=y, level=t.expand(len(x)), what=what)
            if guidance_scale > 1:
                without = self.network(picture=x, sound=y, level=t.expand(len(x)), what=torch.full_like(what, 10))
                made = [u + guidance_scale * (c - u) for c, u in zip(made, without, strict=True)]
            x = self.scheduler.step(made[1], t, x).prev_sample
            if self.hears(step):
                y = other.step(self.given(made[0]), t, y).prev_sample
        return (x,)


def toy_of_two(**behaviour):
    pipeline = ToyOfTwo(redraw(TwoInOne(), 9), diffusers.DDIMScheduler(clip_sample=False))
    vars(pipeline).update(behaviour)
    return pipeline


def test_which_output_belongs_to_which_sample_is_found():
    traced = trace(toy_of_two())
    parts = traced.denoiser.spec.joint.parts
    assert [(part.argument, part.output) for part in parts] == [("picture", 1), ("sound", 0)]
    assert traced.latent_shape == (19,) and traced.self_test_error <= 1e-5 and traced.guidance.kind == "two_calls"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"hears": lambda step: step != 1}, "'components'.*at some of its steps only"),
        ({"given": lambda output: output.exp()}, "'output'.*reaches the scheduler neither as it is"),
    ],
)
def test_a_sound_that_is_made_otherwise_is_refused(behaviour, message):
    with pytest.raises(TraceError, match=message):
        trace(toy_of_two(**behaviour))


def test_a_sound_that_is_only_drawn_is_refused():
    pipeline = toy_of_two(given=torch.zeros_like)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TraceError, match=r"'sample'.*second sample \[3\] and leaves it as it is"):
        trace(pipeline)


def recipe(folder, call, method):
    return {
        "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 2.0}, "arguments": call},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": PROMPTS},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / "run"),
    }


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", 2)
    monkeypatch.setattr("stepdistill.exporting.check.call_elsewhere", call_here)


@pytest.mark.parametrize(
    ("name", "method"),
    # The second one's sampler draws noise between its steps, in turn for the video and for the sound.
    [("text", {"name": "sfd", "substeps": 2}), ("frame", {"name": "dmd2", "critic_steps": 1})],
)
def test_it_is_distilled_and_exported(name, method, calls, tmp_path, quick, monkeypatch):
    save_pipeline(ltx2(KINDS[name]), tmp_path / "teacher")
    run = train(recipe(tmp_path, calls[name], method)).folder
    assert (run / "export" / "stepdistill.json").is_file()

    def off_key(request):
        made = call_here(request)
        return made | {"latents 1": made["latents 1"] * 1.01}

    if name == "text":  # the sound is compared too
        monkeypatch.setattr("stepdistill.exporting.check.call_elsewhere", off_key)
        with pytest.raises(ExportError, match="differs from the training-time sampler"):
            export(run, tmp_path / "again")
