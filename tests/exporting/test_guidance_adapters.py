"""Guidance adapters: beside a network they change nothing but what they add; as files they travel with a pipeline."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import stepdistill
from pipeline.tiny import redraw, save_dit, tiny_dit, tiny_flux, tiny_sd, tiny_sd3
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.errors import InputError
from stepdistill.eval.row_cache import weights_digest
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import Trace, trace
from stepdistill.roles.guidance_adapters import (
    ADAPTERS,
    AttentionAdapter,
    OutputGuide,
    WithGuidanceAdapter,
    fasten,
    fastened,
)
from stepdistill.roles.views import FrozenView
from stepdistill.run import train

PIPELINES = {"dit": tiny_dit, "sd": tiny_sd, "sd3": tiny_sd3}
PROMPTS = ["a red shoe", "rain"]


@pytest.fixture(scope="module", params=[(name, kind) for name in PIPELINES for kind in ADAPTERS], ids=str)
def case(request) -> tuple[Trace, str]:
    name, kind = request.param
    return traced(name), kind


TRACED: dict[str, Trace] = {}


def traced(name: str) -> Trace:
    if name not in TRACED:
        TRACED[name] = trace(PIPELINES[name]())
    return TRACED[name]


def conditions(trace: Trace) -> tuple[dict, dict]:
    """(cond, null) of four rows."""
    wanted = "classes" if trace.entry == "class_labels" else PROMPTS
    return encode(trace, entries(trace, wanted)).batch(torch.tensor([0, 1, 1, 0]))


def student(trace: Trace, kind: str, scale: float = 1.5, random: bool = True) -> Denoiser:
    """The frozen denoiser with an adapter; ``random``: one that adds something."""
    network = FrozenView(trace.denoiser.network)
    adapter = ADAPTERS[kind](network, scale, 16)
    if random:
        redraw(adapter, 5)
    return trace.denoiser.on(WithGuidanceAdapter(network, adapter))


def points(trace: Trace) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(4, *trace.latent_shape, generator=draws), torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)


@torch.no_grad()
def test_it_starts_as_the_conditional_model_and_w_1_always_is(case):
    trace, kind = case
    (x_t, t), (cond, _) = points(trace), conditions(trace)
    base = trace.denoiser(x_t, t, cond).raw
    assert torch.equal(student(trace, kind, random=False)(x_t, t, cond).raw, base)
    moved = student(trace, kind)
    torch.testing.assert_close(moved(x_t, t, cond | {"guidance_scale": torch.ones(4)}).raw, base)
    assert not torch.allclose(moved(x_t, t, cond).raw, base, atol=1e-3)
    assert torch.equal(trace.denoiser(x_t, t, cond).raw, base)


@torch.no_grad()
def test_each_row_has_its_own_scale_time_and_condition(case):
    trace, kind = case
    (x_t, t), (cond, _) = points(trace), conditions(trace)
    denoiser, w = student(trace, kind), torch.tensor([1.0, 1.5, 2.5, 4.0])
    together = denoiser(x_t, t, cond | {"guidance_scale": w}).raw
    for i in range(4):
        row = {name: value[i : i + 1] for name, value in cond.items()} | {"guidance_scale": w[i : i + 1]}
        alone = denoiser(x_t[i : i + 1], t[i : i + 1], row).raw
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=0)
    told = student(trace, kind, scale=2.5)(x_t, t, cond).raw
    torch.testing.assert_close(told[2:3], together[2:3], atol=2e-5, rtol=0)


def test_the_adapter_alone_is_trained(case):
    trace, kind = case
    (x_t, t), (cond, _) = points(trace), conditions(trace)
    trace.denoiser.network.requires_grad_(False)
    denoiser = student(trace, kind)
    adapter = denoiser.network.adapter
    shown = list(denoiser.network.parameters())
    assert {id(p) for p in shown} == {id(p) for p in adapter.parameters()}
    denoiser(x_t, t, cond).raw.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shown)
    assert all(p.grad is None for p in trace.denoiser.network.parameters())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in trace.denoiser.network.modules()]
    assert not any(hooks) and not adapter.seen


@torch.no_grad()
def test_the_stock_network_with_the_adapter_is_the_student(case):
    trace, kind = case
    (x_t, t), (cond, _) = points(trace), conditions(trace)
    denoiser = student(trace, kind)
    expected = denoiser(x_t, t, cond).raw
    stock = denoiser.network.plain()
    assert type(stock) is type(trace.denoiser.network) and fastened(trace.denoiser.network) is None
    assert torch.equal(trace.denoiser.on(stock)(x_t, t, cond).raw, expected)
    twin = copy.deepcopy(stock)
    nn.init.zeros_(fastened(stock).time.weight)
    assert torch.equal(trace.denoiser.on(twin)(x_t, t, cond).raw, expected)
    assert not torch.equal(trace.denoiser.on(stock)(x_t, t, cond).raw, expected)
    fasten(twin, redraw(ADAPTERS[kind](denoiser.network.network, 1.5, 16), 6))
    assert sum(len(module._forward_hooks) for module in twin.modules()) == sum(
        len(module._forward_hooks) for module in stock.modules()
    )


def test_the_share_of_parameters_on_the_embedded_teacher():
    network = load_pipeline("fashion-dit").transformer
    whole = sum(p.numel() for p in network.parameters())
    for adapter in (AttentionAdapter(network, 1.5, 64), OutputGuide(network, 1.5, 48)):
        assert 0.01 < sum(p.numel() for p in adapter.parameters()) / whole < 0.05


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(InputError, match="no time embedding"):
        AttentionAdapter(nn.Sequential(nn.Linear(2, 2)), 1.5, 8)
    network = tiny_dit().transformer
    fasten(network, AttentionAdapter(network, 1.5, 8))
    with pytest.raises(InputError, match="has a guidance adapter already"):
        OutputGuide(FrozenView(network), 1.5, 8)
    packed = tiny_flux()
    fasten(packed.transformer, OutputGuide(packed.transformer, 1.5, 8))
    with pytest.raises(InputError, match=r"latents \(B, C, H, W\)"):
        packed("rain", num_inference_steps=1, output_type="latent")


def adapted(name: str, kind: str, folder: Path):
    """A pipeline with a random adapter, written to ``folder``."""
    pipeline = PIPELINES[name]()
    network = pipeline.transformer if name == "dit" else pipeline.unet
    fasten(network, redraw(ADAPTERS[kind](network, 2.0, 16), 5))
    fastened(network).scale.fill_(2.0)
    save_pipeline(pipeline, folder)
    return pipeline


def latents(pipeline, **options) -> torch.Tensor:
    asked = {"class_labels": [0, 1]} if isinstance(pipeline, DiTPipeline) else {"prompt": PROMPTS}
    wanted = {"output_type": "np", "generator": torch.Generator().manual_seed(0)} | asked | options
    return torch.as_tensor(pipeline(**wanted, num_inference_steps=3, guidance_scale=1.0).images)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["dit", "sd"])
def test_files_bring_the_adapter_back_and_plain_diffusers_ignores_them(tmp_path, name, kind):
    original = adapted(name, kind, tmp_path)
    expected, bare = latents(original), latents(PIPELINES[name]())
    assert not torch.allclose(expected, bare, atol=1e-3)
    component = "transformer" if name == "dit" else "unet"
    stored = load_file(tmp_path / component / "diffusion_pytorch_model.safetensors")
    assert not any("adapter" in key for key in stored)
    assert fastened(getattr(original, component)) is not None

    plain = (DiTPipeline if name == "dit" else StableDiffusionPipeline).from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(plain), bare, atol=1e-6)
    loaded = load_pipeline(tmp_path)
    assert torch.allclose(latents(loaded), expected, atol=1e-6)
    assert torch.allclose(latents(stepdistill.attach(plain, tmp_path)), expected, atol=1e-6)
    assert torch.allclose(latents(stepdistill.attach(plain, tmp_path, scale=1.0)), bare, atol=1e-6)

    # A report must not take the one for the other.
    digests = {weights_digest(pipeline) for pipeline in (plain, loaded, PIPELINES[name]())}
    assert len(digests) == 3
    learned = trace(loaded)
    assert learned.guidance.kind == "batched" and learned.self_test_error < 1e-5


def test_wrong_adapters_are_one_line(tmp_path):
    adapted("dit", "attention", tmp_path)
    with pytest.raises(InputError, match=r"found no guidance_adapter\.json"):
        stepdistill.attach(tiny_dit(), tmp_path / "transformer")
    with pytest.raises(InputError, match=r"expected the DiTTransformer2DModel it was made for.*found NoneType"):
        stepdistill.attach(tiny_sd(), tmp_path)
    config = json.loads((tmp_path / "guidance_adapter.json").read_text())
    assert config == {
        "schema": 1, "kind": "attention", "component": "transformer", "denoiser": "DiTTransformer2DModel", "width": 16
    }  # fmt: skip
    (tmp_path / "guidance_adapter.json").write_text(json.dumps(config | {"width": 8}))
    with pytest.raises(InputError, match=r"guidance_adapter\.safetensors: does not fit"):
        load_pipeline(tmp_path)
    (tmp_path / "guidance_adapter.json").write_text(json.dumps(config | {"kind": "magic"}))
    with pytest.raises(InputError, match=r"guidance_adapter\.json: not the configuration"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_guides_a_fine_tune_it_has_not_seen(kind):
    """Trained on one network, its addition points along the guided direction of another with perturbed weights."""
    torch.manual_seed(0)
    trace = traced("dit")
    trace.denoiser.network.requires_grad_(False)
    denoiser = student(trace, kind, random=False)
    cond, null = conditions(trace)
    cond, null = ({name: rows.repeat(4) for name, rows in part.items()} for part in (cond, null))
    optimizer = torch.optim.Adam(denoiser.network.parameters(), lr=1e-2)

    def case(seed: int):
        draws = torch.Generator().manual_seed(seed)
        x_t = torch.randn(16, *trace.latent_shape, generator=draws)
        return x_t, torch.rand(16, generator=draws, dtype=torch.float64), 1 + 3 * torch.rand(16, generator=draws)

    for step in range(100):
        x_t, t, w = case(step)
        with torch.no_grad():
            target = guided(trace.denoiser, x_t, t, cond, null, w).raw
        optimizer.zero_grad()
        (denoiser(x_t, t, cond | {"guidance_scale": w}).raw - target).square().mean().backward()
        optimizer.step()

    tuned = copy.deepcopy(trace.denoiser.network)
    with torch.no_grad():
        draws = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            parameter += 0.05 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=draws)
        other = trace.denoiser.on(tuned)
        x_t, t, w = case(999)
        before, target = other(x_t, t, cond).raw, guided(other, x_t, t, cond, null, w).raw
        adapter = copy.deepcopy(denoiser.network.adapter)
        after = trace.denoiser.on(WithGuidanceAdapter(tuned, adapter))(x_t, t, cond | {"guidance_scale": w}).raw
    assert not torch.allclose(before, trace.denoiser(x_t, t, cond).raw, atol=1e-2)
    along = torch.cosine_similarity((after - before).flatten(), (target - before).flatten(), dim=0)
    assert along > 0.5
    assert (after - target).square().mean() < 0.75 * (before - target).square().mean()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Grey pictures of two classes, named by caption files."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, name in enumerate(["Trouser", "Bag"] * 2):
        Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(name)
    return folder


def run(folder: Path, teacher: Path, method: dict, images: Path | None = None, scale: float = 1.5, **changes) -> Path:
    """A run of two steps of training; returns its export."""
    recipe = {
        "teacher": {"pipeline": str(teacher), "guidance": {"scale": scale}},
        "student": {"steps": 4, "ema": 0.5} | changes.get("student", {}),
        "data": {"images": str(images) if images else None, "conditions": changes.get("conditions", "classes")},
        "method": method,
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder),
    }
    train(recipe)
    return folder / "export"


METHODS = {
    "agd": {"name": "agd", "width": 8, "paths": 4, "path_steps": 3},
    "guide": {"name": "guide", "width": 8, "paths": 4, "path_steps": 3},
    "w-embed": {"name": "w-embed"},
    "lora-guidance": {"name": "lora-guidance"},
    "gft": {"name": "gft"},
    "model-guidance": {"name": "model-guidance"},
}
NEED_IMAGES = {"w-embed", "lora-guidance", "gft", "model-guidance"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_export_is_the_next_teacher(tmp_path, pictures, method):
    """export() itself compares the reloaded pipeline with the training-time sampler."""
    save_dit(tiny_dit(), tmp_path / "teacher")
    export = run(tmp_path / "run", tmp_path / "teacher", METHODS[method], pictures if method in NEED_IMAGES else None)
    card, loaded = (export / "README.md").read_text(), load_pipeline(export)
    moved = [
        name
        for name, value in tiny_dit().transformer.named_parameters()
        if not torch.equal(value, dict(loaded.transformer.named_parameters())[name])
    ]
    if method in ("agd", "guide"):
        assert not moved and "stepdistill.attach(pipe" in card and fastened(loaded.transformer).scale == 1.5
        assert fastened(loaded.transformer).kind == {"agd": "attention", "guide": "output"}[method]
    else:
        assert moved and "attach" not in card and not (export / "guidance_adapter.json").exists()
    # Guidance is inside now: a step distillation of it needs no second pass.
    few = run(tmp_path / "few", export, {"name": "sfd", "substeps": 1}, scale=1.0, student={"steps": 2})
    assert (few / "guidance_adapter.json").exists() == (method in ("agd", "guide"))


def test_text_pipelines_get_adapters_too(tmp_path):
    save_pipeline(tiny_sd(), tmp_path / "teacher")
    for method in ("agd", "guide"):
        export = run(tmp_path / method, tmp_path / "teacher", METHODS[method], conditions=PROMPTS)
        assert fastened(load_pipeline(export).unet) is not None


def test_an_export_is_where_a_step_distillation_can_start(tmp_path, pictures):
    save_dit(tiny_dit(), tmp_path / "teacher")
    export = run(tmp_path / "run", tmp_path / "teacher", METHODS["w-embed"], pictures)
    start = {"steps": 2, "init": str(export)}
    run(tmp_path / "few", tmp_path / "teacher", {"name": "dmd2"}, student=start)
    beside = run(tmp_path / "agd", tmp_path / "teacher", METHODS["agd"])
    with pytest.raises(InputError, match=r"student\.init: .* does not fit the teacher's network"):
        run(tmp_path / "other", tmp_path / "teacher", {"name": "dmd2"}, student={"init": str(beside)})
