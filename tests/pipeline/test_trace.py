"""Tracing: what is learned about four stock pipelines and a made-up one, and what is refused by which check."""

import copy
import functools
import json
from types import MethodType

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch.nn import functional

from pipeline import tiny
from pipeline.tiny import INSPECT_KEYS, redraw
from pipeline.toy import Control, ControlledPipeline, ToyNetwork, ToyPipeline, toy
from pipeline.zoo import sdxl
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.row_layout import RowLayout
from stepdistill.errors import InputError
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.set_up import passes
from stepdistill.pipeline.trace import TraceError, load_pipeline, trace
from stepdistill.pipeline.variants import with_guidance

EXPECTED = {
    "tiny_dit": {
        "pipeline": "DiTPipeline",
        "denoiser": "DiTTransformer2DModel",
        "schedule": "vp_discrete",
        "prediction": "v",
        "timestep": {"argument": "timestep", "scale": 1.0, "offset": 0.0, "dtype": "float32"},
        "output": "identity",
        "guidance": "batched",
        "conditioning": {"class_labels": []},
        "latent_shape": [4, 8, 8],
    },
    "tiny_sd": {
        "pipeline": "StableDiffusionPipeline",
        "denoiser": "UNet2DConditionModel",
        "schedule": "vp_discrete",
        "prediction": "epsilon",
        "timestep": {"argument": "timestep", "scale": 1.0, "offset": 0.0, "dtype": "float32"},
        "output": "identity",
        "guidance": "batched",
        "conditioning": {"encoder_hidden_states": [tiny.TOKENS, 16]},
        "latent_shape": [4, 8, 8],
    },
    "tiny_sd3": {
        "pipeline": "StableDiffusion3Pipeline",
        "denoiser": "SD3Transformer2DModel",
        "schedule": "flow",
        "prediction": "flow",
        "timestep": {"argument": "timestep", "scale": 1.0, "offset": 0.0, "dtype": "float32"},
        "output": "identity",
        "guidance": "batched",
        "conditioning": {"encoder_hidden_states": [tiny.TOKENS + 256, 32], "pooled_projections": [32]},
        "latent_shape": [4, 8, 8],
    },
    "tiny_flux": {
        "pipeline": "FluxPipeline",
        "denoiser": "FluxTransformer2DModel",
        "schedule": "flow",
        "prediction": "flow",
        "timestep": {"argument": "timestep", "scale": 0.001, "offset": 0.0, "dtype": "float32"},
        "output": "identity",
        "guidance": "embedded",
        "conditioning": {"encoder_hidden_states": [512, 32], "pooled_projections": [16]},
        "latent_shape": [16, 16],
    },
}


def is_untouched(pipeline) -> bool:
    """Whether nothing is left of an observation."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules(pipeline).values())
    return not hooked and not {"step", "set_timesteps"} & pipeline.scheduler.__dict__.keys()


@functools.cache
def stock(name):
    return trace(getattr(tiny, name)())


@pytest.fixture(params=EXPECTED)
def traced(request):
    return request.param, stock(request.param)


def test_stock_pipelines_are_learned(traced):
    name, result = traced
    summary = result.summary()
    assert summary.keys() == INSPECT_KEYS
    assert {key: summary[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert summary["parameters"] == sum(p.numel() for p in result.denoiser.network.parameters())
    assert summary["self_test_error"] <= 1e-5
    assert json.loads(json.dumps(summary)) == summary
    assert is_untouched(result.pipeline)


def test_the_conditional_half_is_told_apart():
    assert stock("tiny_dit").guidance.cond_first
    assert not stock("tiny_sd").guidance.cond_first


def test_constants_and_embedded_guidance():
    spec = stock("tiny_flux").denoiser.spec
    assert spec.expanded == {"guidance"}
    assert spec.constants["guidance"].tolist() == [3.5]
    assert spec.constants["img_ids"].shape == (16, 3)
    assert spec.constants["return_dict"] is False
    assert trace(tiny.tiny_flux(guidance_embeds=False)).guidance.kind == "none"


def test_features_are_hidden_states_with_grad(traced):
    name, result = traced
    x = torch.randn(2, *result.latent_shape, requires_grad=True)
    cond = {key: torch.randn(2, *shape) for key, shape in result.conditioning.items()}
    if name == "tiny_dit":
        cond = {"class_labels": torch.tensor([1, 2])}
    features = result.denoiser.features(x, torch.tensor([0.5, 0.9]), cond)
    shapes = {
        "tiny_dit": [(2, 16, 16)] * 3,
        "tiny_sd": [(2, 8, 4, 4), (2, 16, 4, 4), (2, 16, 4, 4)],
        "tiny_sd3": [(2, 16, 16)] * 2,
        "tiny_flux": [(2, 16, 32)] * 3,
    }
    assert [tuple(f.shape) for f in features] == shapes[name]
    for feature in features:
        (gradient,) = torch.autograd.grad(feature.square().sum(), x, retain_graph=True)
        assert gradient.abs().max() > 0
    assert all(not m._forward_hooks for m in result.denoiser.network.modules())


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (EulerDiscreteScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (DPMSolverMultistepScheduler, {}),
        (UniPCMultistepScheduler, {}),
        (LCMScheduler, {}),
    ],
)
def test_any_scheduler_of_the_family_is_replayed(scheduler, options):
    pipeline = tiny.tiny_sd()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    result = trace(pipeline)
    assert result.denoiser.kind == "epsilon"
    assert result.guidance.kind == "batched"
    assert result.self_test_error <= 1e-5


@pytest.mark.parametrize(("scheduler", "kind"), [(EDMEulerScheduler, "edm"), (EDMDPMSolverMultistepScheduler, "edm")])
def test_a_teacher_of_edm_is_traced(scheduler, kind):
    pipeline = tiny.tiny_sd()
    pipeline.scheduler = scheduler()
    result = trace(pipeline)
    assert (result.denoiser.schedule.name, result.denoiser.kind) == ("edm", kind)
    assert result.self_test_error <= 1e-5


def test_embedded_guidance_at_another_scale():
    traced = stock("tiny_flux")
    other = with_guidance(traced, 1.5)
    assert other.denoiser.spec.constants["guidance"].tolist() == [1.5] and other.guidance.plain_scale == 1.5
    assert traced.denoiser.spec.constants["guidance"].tolist() == [3.5]


def test_arguments_of_the_call():
    pipeline = tiny.tiny_sd()
    assert trace(pipeline, {"height": 32, "width": 16}).latent_shape == (4, 16, 8)
    nulls = [
        encode(trace(pipeline, arguments), ["a red shoe"]).null["encoder_hidden_states"]
        for arguments in ({"negative_prompt": ""}, {"negative_prompt": "rain"}, {})
    ]
    assert torch.equal(nulls[0], nulls[2]) and not torch.equal(nulls[0], nulls[1])
    with pytest.raises(InputError, match="takes no argument 'heigth'; did you mean 'height'"):
        trace(pipeline, {"heigth": 32})


def test_a_one_step_pipeline_is_traced():
    pipeline = tiny.tiny_dit()
    pipeline.scheduler = LCMScheduler(prediction_type="v_prediction", original_inference_steps=1, clip_sample=False)
    assert trace(pipeline).denoiser.spec.timestep == "timestep"


def test_half_precision_is_compared_in_its_own_precision():
    assert trace(tiny.tiny_flux().to(torch.bfloat16)).denoiser.spec.timestep_scale == 0.001
    result = trace(tiny.tiny_dit().to(torch.bfloat16))
    assert result.denoiser(torch.randn(1, 4, 8, 8), torch.ones(1), {"class_labels": torch.tensor([1])}).x0.dtype == (
        torch.float32
    )


@pytest.mark.parametrize("two_calls", [True, False])
def test_a_pipeline_nobody_has_seen(two_calls):
    result = trace(toy(two_calls=two_calls))
    spec = result.denoiser.spec
    assert (result.component, spec.sample, spec.timestep) == ("network", "picture", "noise_level")
    assert (spec.timestep_scale, spec.timestep_offset) == (-0.001, 1.0)
    assert result.guidance.kind == ("two_calls" if two_calls else "batched")
    assert result.guidance.cond_first
    assert result.conditioning == {"extra.what": ()}
    assert spec.constants == {"extra.bias": 0.25}


@pytest.mark.parametrize(
    ("channels", "read", "output"),
    [
        (4, torch.neg, "negated"),
        (8, lambda raw: raw.chunk(2, 1)[0], "first_half"),
        (4, lambda raw: raw, "identity"),
        (8, lambda raw: -raw.chunk(2, 1)[0], "negated_first_half"),
    ],
)
def test_output_maps(channels, read, output):
    result = trace(toy(channels, read=read))
    assert result.denoiser.spec.output == output
    x, t, cond = torch.randn(1, 4, 8, 8), torch.ones(1), {"extra.what": torch.tensor([3])}
    raw = result.denoiser.network(x, torch.tensor([1 - 0.999]), {"what": cond["extra.what"], "bias": 0.25})[0]
    assert torch.allclose(result.denoiser(x, t, cond).raw, read(raw), atol=1e-6)


def rescaled(cond, uncond, scale):
    guided = uncond + scale * (cond - uncond)
    return guided * (cond.std() / guided.std())


def norm_kept(axis):
    def rule(cond, uncond, scale):
        guided = uncond + scale * (cond - uncond)
        return guided * (cond.norm(dim=axis, keepdim=True) / guided.norm(dim=axis, keepdim=True))

    return rule


@pytest.mark.parametrize(
    ("rule", "shift", "norm_axis"),
    [
        (norm_kept(-1), 0.0, -1),
        (norm_kept(1), 0.0, 1),
        (lambda c, u, w: c + w * (c - u), 1.0, None),
        (lambda c, u, w: u + w * (c - u), 0, None),
        (lambda c, u, w: torch.cat([u + w * (c - u), c], 1)[:, [0, 1, 2, 7]], 0, None),
    ],
)
def test_guidance_rules(rule, shift, norm_axis):
    """What the pipeline does at its scale is what the library does at w = scale + shift."""
    result = trace(toy(rule=rule))
    assert (result.guidance.shift, result.denoiser.spec.norm_axis) == (shift, norm_axis)
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    cond, null = ({"extra.what": torch.tensor(labels)} for labels in ([1, 2], [10, 10]))
    outputs = [result.denoiser(x, t, one).raw for one in (cond, null)]
    found = guided(result.denoiser, x, t, cond, null, 2.5).raw
    torch.testing.assert_close(found, rule(*outputs, 2.5 - shift), rtol=1e-5, atol=1e-5)


def test_a_mask_grows_with_its_rows():
    def growing(_step, count):
        return {"mask": torch.ones(count, 4 + count % 2), "rows": torch.full((count, 4 + count % 2, 4), 0.5)}

    result = trace(toy(bias=growing))
    assert result.denoiser.spec.masks == {"extra.bias.rows": ("extra.bias.mask", torch.float32)}
    assert result.conditioning["extra.bias.rows"] == (None, 4) and result.conditioning["extra.bias.mask"] == (None,)


@pytest.mark.parametrize(
    ("bias", "layout"),
    [
        (lambda rows: rows.expand(4, -1, 2).contiguous(), RowLayout(axis=1)),
        (lambda rows: rows.repeat_interleave(4, 0), RowLayout(each=4)),
        (lambda rows: rows.repeat(4, 1), RowLayout(each=4, outer=True)),
    ],
)
def test_rows_that_do_not_follow_the_first_axis(bias, layout):
    """Each image has 4 rows of 2 numbers; the toy's network takes the mean of what it is given in that layout."""
    network = redraw(ToyNetwork(), 9)
    inner = network.forward

    def forward(picture, noise_level, extra, flag=False):
        return inner(picture, noise_level, {**extra, "bias": layout.rows(extra["bias"])}, flag)

    network.forward = forward
    pipeline = toy(bias=lambda _step, count: bias(torch.arange(count)[:, None] / 10 + torch.zeros(count, 2)))
    pipeline.register_modules(network=network)
    result = trace(pipeline)
    assert result.denoiser.spec.layouts == {"extra.bias": layout} and result.self_test_error <= 1e-5
    assert encode(result, [1, 2]).cond["extra.bias"][1].flatten().tolist() == pytest.approx([0.1] * 8)


@pytest.mark.parametrize(
    ("padding", "read", "spans"),
    [
        ((0, 2), lambda raw: raw[..., :8], ((3, 0, 8, 2),)),
        ((2, 0), lambda raw: raw[..., 2:], ((3, 2, 8, 0),)),
        ((0, 2, 1, 0), lambda raw: raw[..., 1:, :8], ((2, 1, 8, 0), (3, 0, 8, 2))),
    ],
)
def test_an_output_as_long_as_the_sample_and_its_reference_is_cut(padding, read, spans):
    result = trace(toy(feed=lambda x: functional.pad(x, padding, value=0.5), read=read))
    spec = result.denoiser.spec
    assert (spec.window.spans, spec.output) == (spans, "identity") and result.self_test_error <= 1e-5
    cond = encode(result, [3]).cond
    assert all(cond[name].eq(0.5).all() for name in spec.beside)
    assert result.denoiser(torch.randn(1, 4, 8, 8), torch.ones(1), cond).raw.shape == (1, 4, 8, 8)


class Editing(ToyPipeline):
    """Three passes at a step: label and bias, the bias alone, and nothing; in one batch or in three calls."""

    combined = staticmethod(lambda c, i, u, w: u + w * (c - i) + 1.5 * (i - u))

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=3.0, generator=None, num_inference_steps=5):
        labels, null = torch.tensor(class_labels), torch.full((len(class_labels),), 10)
        bias = torch.arange(len(labels)) / 10 + 0.3
        x = torch.randn(len(labels), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            passes = [(labels, bias), (null, bias), (null, 0 * bias)][: 3 if guidance_scale > 1 else 1]
            if not self.two_calls:
                passes = [tuple(map(torch.cat, zip(*passes, strict=True)))]
            outputs = []
            for what, rows in passes:
                self.bias = lambda _step, _count, rows=rows: rows
                copies = len(what) // len(labels)
                outputs += self._network(torch.cat([x] * copies), t, what, step).chunk(copies)
            output = self.combined(*outputs, guidance_scale) if guidance_scale > 1 else outputs[0]
            x = self.scheduler.step(output, t, x).prev_sample
        return (x,)


def editing(**behaviour):
    pipeline = Editing(redraw(ToyNetwork(), 9), DDIMScheduler(clip_sample=False))
    for name, value in behaviour.items():
        setattr(pipeline, name, value)
    return pipeline


@pytest.mark.parametrize("two_calls", [True, False])
def test_two_unconditional_passes_are_weighed(two_calls):
    pipeline = editing(two_calls=two_calls)
    result = trace(pipeline)
    assert result.denoiser.spec.mix == ((1.5, -1.0), (-0.5, 0.0)) and result.self_test_error <= 1e-5
    cond, null = encode(result, [1, 2]).batch(torch.tensor([0, 1]))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.7])
    nothing = {name: null[f"pass 1/{name}"] for name in cond}
    outputs = [result.denoiser(x, t, one).raw for one in (cond, null, nothing)]
    assert not torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(guided(result.denoiser, x, t, cond, null, 2.5).raw, Editing.combined(*outputs, 2.5))
    rows = guided(result.denoiser, x, t, cond, null, torch.tensor([1.0, 2.5])).raw
    torch.testing.assert_close(rows, torch.stack([outputs[0][0], Editing.combined(*outputs, 2.5)[1]]))
    assert passes(result, pipeline.scheduler, 4, 2.0) == 12
    # Outputs in half precision are not rounded again before they are combined.
    result.denoiser.network.register_forward_hook(lambda _, __, output: (output[0].bfloat16(),))
    outputs = [result.denoiser(x, t, one).raw.float() for one in (cond, null, nothing)]
    found = guided(result.denoiser, x, t, cond, null, 25.0).raw
    torch.testing.assert_close(found, Editing.combined(*outputs, 25.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda c, i, u, w: u + w * (c - i).abs() + 1.5 * (i - u), "3 passes are not combined linearly"),
        (lambda c, i, u, w: u + 0.5 * w * (c - i) + 1.5 * (i - u), "none of which is the scale of a conditional pass"),
    ],
)
def test_other_rules_of_three_passes_are_refused(rule, reason):
    with pytest.raises(TraceError, match=reason):
        trace(editing(combined=rule))


def test_a_helper_that_works_once_for_two_passes():
    network = redraw(ToyNetwork(), 9)
    result = trace(ControlledPipeline(network, DDIMScheduler(clip_sample=False), Control()))
    (helper,) = result.denoiser.spec.helpers
    assert (helper.name, helper.feeds, result.guidance.kind) == ("control", {"extra.bias": 0}, "two_calls")


class TwoAtLeast(DDIMScheduler):
    """A grid of one step divides by zero."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps + 0 // (num_inference_steps - 1), device)


def test_encoding_takes_the_steps_that_the_call_takes():
    result = trace(toy(scheduler=TwoAtLeast(clip_sample=False)))
    assert result.fewest_steps == 2 and trace(toy()).fewest_steps == 1
    assert encode(result, [1, 2]).cond["extra.what"].tolist() == [1, 2]


def copying(pipeline):
    """The pipeline runs a step of a copy of its scheduler too."""

    def read(raw):
        copy.deepcopy(pipeline.scheduler).step(raw, pipeline.scheduler.timesteps[0], raw)
        return raw

    pipeline.read = read
    return pipeline


def test_steps_of_a_copied_scheduler_are_not_those_of_the_scheduler():
    assert trace(copying(toy())).self_test_error <= 1e-5
    call = {"class_labels": [1, 2], "num_inference_steps": 3}
    found, expected = (stock_call.record(one, call) for one in (copying(toy()), toy()))
    assert torch.equal(found["noise"], expected["noise"]) and torch.equal(found["latents"], expected["latents"])


def test_a_pipeline_that_begins_inside_its_grid_is_refused(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    pipeline = StableDiffusionXLImg2ImgPipeline(**sdxl().components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(TraceError, match=r"'schedule' failed: the pipeline begins at step 2 of its grid"):
        trace(pipeline, {"image": str(tmp_path / "a.png"), "strength": 1.0, "denoising_start": 0.4})


def test_a_third_pass_is_named_with_what_leaves_it_out():
    def perturbed():
        pipeline = StableDiffusionPAGPipeline(**tiny.tiny_sd().components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    with pytest.raises(TraceError, match=r"'guidance'.*teacher\.arguments\.pag_scale=0"):
        trace(perturbed())
    assert trace(perturbed(), {"pag_scale": 0}).guidance.kind == "batched"


class Doubling(DDIMScheduler):
    """A scheduler whose step does not do what its configuration says."""

    def step(self, model_output, timestep, sample, **options):
        return super().step(2 * model_output, timestep, sample, **options)


def altered_step():
    scheduler = DDIMScheduler(clip_sample=False)
    original = type(scheduler).step

    def step(self, model_output, timestep, sample, **options):
        return original(self, model_output * 1.7, timestep, sample, **options)

    scheduler.step = MethodType(step, scheduler)
    return scheduler


def silent(channels=4):
    pipeline = toy()
    torch.nn.init.zeros_(pipeline.network.blocks[1].weight)
    torch.nn.init.zeros_(pipeline.network.blocks[1].bias)
    return pipeline


BROKEN = {
    "output": lambda: toy(read=lambda raw: 1.7 * raw),
    "guidance": lambda: toy(rule=rescaled),
    "guidance ": lambda: toy(rule=lambda c, u, w: 1.1 * c + w * (c - u)),
    "guidance  ": silent,
    "self-test": lambda: toy(scheduler=altered_step()),
    "schedule": lambda: toy(scheduler=Doubling(clip_sample=False)),
    "sample": lambda: toy(feed=lambda x: x + 1),
    "timestep": lambda: toy(level=lambda t: (t.float() / 1000) ** 2),
    "timestep ": lambda: toy(level=lambda t: torch.tensor(0.5)),
    "denoiser": lambda: toy(calls=4),
    "constants": lambda: toy(bias=lambda step, count: 0.1 * step),
    "conditioning": lambda: toy(bias=lambda step, count: torch.zeros(count, count)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_explained_is_refused_by_name(case):
    pipeline = BROKEN[case]()
    replaced = pipeline.scheduler.__dict__.get("step")
    before = torch.get_rng_state()
    with pytest.raises(TraceError) as caught:
        trace(pipeline)
    assert caught.value.check == case.strip()
    assert f"'{case.strip()}'" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)
    assert pipeline.scheduler.__dict__.pop("step", None) is replaced
    assert is_untouched(pipeline)


def test_a_failing_pipeline_and_a_pipeline_of_another_kind_are_refused():
    def fail(*_args, **_options):
        raise RuntimeError("no more\nof this")

    with pytest.raises(TraceError, match=r"'call' failed.*no more$"):
        trace(toy(rule=fail))
    pipeline = toy()
    pipeline.register_modules(scheduler=None)
    with pytest.raises(TraceError, match="'components'"):
        trace(pipeline)


def test_loading_a_folder(tmp_path):
    tiny.save_dit(tiny.tiny_dit(), tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert trace(pipeline).summary() == stock("tiny_dit").summary()
    assert pipeline.labels["Sneaker"] == 7


def test_loading_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{}")
    (tmp_path / "one.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepdistill.assets.teachers", lambda: ["fashion-dit"])
    for path, reason in {
        tmp_path / "nothing": "found no such thing",
        tmp_path / "empty": "model_index.json",
        tmp_path / "broken": "cannot be loaded",
        "fashion-dot": "did you mean 'fashion-dit'",
        "nobody/nothing": "cannot be loaded",
        "empty/nothing": "there is a folder empty here, without nothing",
        tmp_path / "one.safetensors": "one.safetensors: not a whole file of safetensors",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            load_pipeline(path)
        assert "\n" not in str(caught.value)
