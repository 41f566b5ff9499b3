"""Tracing: what is learned about four stock pipelines and a made-up one, and what is refused by which check."""

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
    UniPCMultistepScheduler,
)

from pipeline import tiny
from pipeline.tiny import INSPECT_KEYS
from pipeline.toy import toy
from pipeline.zoo import wan
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.observe import modules
from stepdistill.pipeline.trace import TraceError, at_guidance, load_pipeline, trace

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
    other = at_guidance(traced, 1.5)
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


@pytest.mark.parametrize("boundary", [0.9, 0.3])
def test_denoisers_that_take_turns_are_refused(boundary):
    with pytest.raises(TraceError, match=r"transformer_2 .*take turns are not supported"):
        trace(wan(boundary_ratio=boundary), {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16})


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
    [(4, torch.neg, "negated"), (8, lambda raw: raw.chunk(2, 1)[0], "first_half"), (4, lambda raw: raw, "identity")],
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


def norm_kept(cond, uncond, scale):
    guided = uncond + scale * (cond - uncond)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("rule", "shift", "keeps_norm"),
    [
        (norm_kept, 0.0, True),
        (lambda c, u, w: c + w * (c - u), 1.0, False),
        (lambda c, u, w: u + w * (c - u), 0, False),
    ],
)
def test_guidance_rules(rule, shift, keeps_norm):
    """What the pipeline does at its scale is what the library does at w = scale + shift."""
    result = trace(toy(rule=rule))
    assert (result.guidance.shift, result.denoiser.spec.keeps_norm) == (shift, keeps_norm)
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    cond, null = ({"extra.what": torch.tensor(labels)} for labels in ([1, 2], [10, 10]))
    outputs = [result.denoiser(x, t, one).raw for one in (cond, null)]
    found = guided(result.denoiser, x, t, cond, null, 2.5).raw
    torch.testing.assert_close(found, rule(*outputs, 2.5 - shift), rtol=1e-5, atol=1e-5)


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
    "denoiser": lambda: toy(calls=3),
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
        tmp_path / "one.safetensors": r"expected a folder in diffusers format, found a file; .*from_single_file",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            load_pipeline(path)
        assert "\n" not in str(caught.value)
