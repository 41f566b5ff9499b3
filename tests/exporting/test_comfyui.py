"""The workflow for ComfyUI: its nodes take the student's own steps; and what has no workflow has a reason."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor

from pipeline.tiny import tiny_flux, tiny_sd, tiny_sd3
from pipeline.zoo import qwen_image, sdxl, wan, z_image
from stepdistill.diffusion.samplers import SAMPLERS, Sampler
from stepdistill.diffusion.schedule import Prediction, from_scheduler
from stepdistill.exporting import comfyui, workflow
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.recipe import Teacher

MAKERS = {"sd": tiny_sd, "sdxl": sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
MAKERS |= {"qwen": qwen_image, "z_image": z_image, "wan": wan}


PLAIN = Teacher(pipeline="base")


def sd_scheduler(**options: Any) -> DDIMScheduler:
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**table | options)


def sampler_of(name: str, source: Any, steps: int = 4, start: int | None = None) -> Sampler:
    return SAMPLERS[name](from_scheduler(source)[0], source, steps, start=start)


def facts_of(**changes: Any) -> ExportFacts:
    return ExportFacts(**{"teacher": "base/model", "guidance": 3.5, "method": "dmd2", "steps": 4} | changes)


def trace_of(pipeline: Any, kind: str = "epsilon", **arguments: Any) -> Any:
    """What is asked of a trace, without tracing."""
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = getattr(pipeline, component)
    guidance = "embedded" if network.config.get("guidance_embeds") else "batched"
    return SimpleNamespace(
        pipeline=pipeline,
        component=component,
        network=network,
        arguments=arguments,
        pictures=[],
        guidance=SimpleNamespace(kind=guidance),
        denoiser=SimpleNamespace(kind=kind),
    )


def network(x: Tensor, time: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + time.reshape(-1, 1)) - 0.2 * x


def in_comfyui(sampler: Sampler, kind: str, noise: Tensor) -> Tensor:
    """ComfyUI's lcm and euler on its noise levels: sigma / alpha on SD's table, where x is x_t / alpha."""
    schedule, levels = sampler.schedule, torch.tensor(workflow.sigmas(sampler), dtype=noise.dtype)
    flow = schedule.name == "flow"
    x = noise if flow else noise * (1 + levels[0] ** 2).sqrt()
    for level, after in itertools.pairwise(levels):
        if flow:
            seen, t = x, level
        else:
            seen, t = x / (1 + level**2).sqrt(), nearest_entry(schedule, level)
        times = torch.full((len(x),), float(t), dtype=x.dtype)
        x0 = Prediction(network(seen, times), seen, times, schedule, kind).x0
        if workflow.SAMPLERS[sampler.name] == "euler":
            x = x + (x - x0) / level * (after - level)
        elif after > 0:
            x = after * torch.randn_like(x) + x0 * (1 - after if flow else 1)
        else:
            x = x0
    return x


def nearest_entry(schedule: Any, level: Tensor) -> float:
    table = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod.clamp_min(4.9e-8)).sqrt()
    return float((table.log() - level.log()).abs().argmin()) / (len(table) - 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "zero_snr", "flow"])
@pytest.mark.parametrize("name", workflow.SAMPLERS)
def test_comfyuis_sampler_on_the_stated_levels_is_the_students(name, kind):
    prediction = {"prediction_type": "epsilon" if kind == "epsilon" else "v_prediction"}
    source = sd_scheduler(**prediction, rescale_betas_zero_snr=kind == "zero_snr")
    source = FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "flow" else source
    sampler, emitted = sampler_of(name, source), from_scheduler(source)[1]
    noise = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(3)
    ours = sampler.sample(lambda x, t: Prediction(network(x, t.to(x)), x, t.to(x), sampler.schedule, emitted), noise)
    torch.manual_seed(3)
    assert (in_comfyui(sampler, emitted, noise) - ours).abs().max() < 1e-3 * ours.abs().max()
    assert workflow.no_workflow(trace_of(tiny_sd()), facts_of(), sampler) is None


@pytest.mark.parametrize("form", ["pipeline", "lora"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_family_has_nodes_whose_links_hold(name, form):
    trace, facts = trace_of(MAKERS[name](), width=512), facts_of(form=form, call_guidance=2.5)
    source = FlowMatchEulerDiscreteScheduler(shift=3.0) if "transformer" in trace.component else sd_scheduler()
    nodes = workflow.workflow(trace, facts, sampler_of("renoise", source), comfyui.file_name(facts))
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    for node in nodes.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or (value[0] in nodes and isinstance(value[1], int))
    assert kinds["SamplerCustom"]["cfg"] == 1.0 and kinds["KSamplerSelect"]["sampler_name"] == "lcm"
    levels = [float(one) for one in kinds["ManualSigmas"]["sigmas"].split(", ")]
    assert len(levels) == 5 and levels[-1] == 0 and "e" not in kinds["ManualSigmas"]["sigmas"]
    assert levels[0] == (pytest.approx(14.6146, abs=1e-3) if trace.component == "unet" else 1.0)
    loader = kinds.get("CheckpointLoaderSimple") or kinds["UNETLoader"]
    loaded = loader.get("ckpt_name") or loader["unet_name"]
    student = "model_dmd2_4step" + ("_lora" if form == "lora" else "") + ".safetensors"
    assert loaded == ("model.safetensors" if form == "lora" else student)
    assert ("LoraLoaderModelOnly" in kinds) == (form == "lora")
    assert (kinds["FluxGuidance"]["guidance"] == 2.5) if name == "flux" else "FluxGuidance" not in kinds
    assert ("SaveAnimatedWEBP" in kinds) == (name == "wan")
    latent = next(inputs for kind, inputs in kinds.items() if kind.startswith("Empty"))
    assert latent["width"] == 512 and latent["height"] > 0 and ("length" in latent) == (name == "wan")


def test_a_network_that_predicts_v_is_said_to():
    for zero in (False, True):
        source = sd_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero)
        nodes = workflow.workflow(trace_of(tiny_sd(), "v"), facts_of(), sampler_of("ddim", source), "x.safetensors")
        said = next(node["inputs"] for node in nodes.values() if node["class_type"] == "ModelSamplingDiscrete")
        assert (said["sampling"], said["zsnr"]) == ("v_prediction", zero)


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (sampler_of("tcd", sd_scheduler()), "no sampler like tcd"),
        (sampler_of("renoise", sd_scheduler(), 1, start=343), "below the noise end"),
        (sampler_of("renoise", sd_scheduler(beta_end=0.02)), "noise table is not ComfyUI's"),
        (sampler_of("ddim", sd_scheduler(), 3), "3 steps do not divide the noise table"),
        (sampler_of("ddim", EDMEulerScheduler()), "noise tables of SD and for flow"),
    ],
)
def test_what_comfyui_cannot_run_has_no_workflow_and_a_reason(sampler, reason):
    assert reason in workflow.no_workflow(trace_of(tiny_sd()), facts_of(steps=sampler.steps), sampler)


def test_the_documentation_has_a_row_for_every_family():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| [\w .-]+ \| `(\w+Pipeline)` \|", page, re.MULTILINE) == list(workflow.FAMILIES)


@pytest.mark.parametrize("name", MAKERS)
def test_the_card_says_where_the_files_go_and_what_to_set(name):
    trace, small = trace_of(MAKERS[name]()), name in ("sd", "sdxl")
    source = sd_scheduler() if small else FlowMatchEulerDiscreteScheduler(shift=3.0)
    trace.denoiser.schedule = from_scheduler(source)[0]
    whole = comfyui.section(trace, facts_of(sampler="renoise", call_guidance=2.5), None)
    folder = "models/checkpoints" if small or name == "sd3" else "models/diffusion_models"
    assert f"`{folder}`" in whole and "sampler LCM, schedule type Simple, 4 steps, CFG scale 1" in whole
    assert ("shift 3" in whole) != small and ("A1111: sampler" in whole) == small
    assert ("distilled CFG scale 2.5" in whole) == (name == "flux")
    lora = comfyui.section(trace, facts_of(sampler="tcd", form="lora"), "no sampler like tcd")
    assert "`models/loras`" in lora and "There is no workflow: no sampler like tcd" in lora and "CFG" not in lora


def test_a_lora_on_a_teacher_of_several_files_has_no_workflow():
    facts = facts_of(form="lora", recipe={"teacher": {"loras": ["style.safetensors"]}}, teacher="file.safetensors")
    sampler = sampler_of("ddim", sd_scheduler())
    assert "teacher.loras" in workflow.no_workflow(trace_of(tiny_sd()), facts, sampler)
    assert workflow.no_workflow(trace_of(tiny_sd()), replace(facts, form="pipeline"), sampler) is None
    assert comfyui.file_name(facts) == "file_dmd2_4step_lora.safetensors"


def test_what_has_no_file_has_a_reason():
    assert comfyui.why_not(trace_of(tiny_sd()), PLAIN) is None
    assert "two networks" in comfyui.why_not(trace_of(wan(boundary_ratio=0.5)), PLAIN)
    inverted = PLAIN.model_copy(update={"embeddings": ["cat.safetensors"]})
    assert "textual inversions" in comfyui.why_not(trace_of(tiny_sd()), inverted)
    odd = tiny_flux()
    odd.transformer.heads = torch.nn.Linear(1, 1)
    assert "FluxTransformer2DModel has no place for heads.weight" in comfyui.why_not(trace_of(odd), PLAIN)
    second = tiny_sd()
    second.text_encoder.config.hidden_act = "gelu"
    assert "Stable Diffusion 2" in comfyui.why_not(trace_of(second), PLAIN)


def test_the_file_of_sd3_holds_its_autoencoder(tmp_path):
    pipeline = tiny_sd3()
    weights = comfyui.checkpoint(trace_of(pipeline), pipeline.transformer)
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "one.safetensors")
    for part in (pipeline.transformer, pipeline.vae):
        part.save_config(tmp_path / "config")
        again = type(part).from_single_file(tmp_path / "one.safetensors", config=str(tmp_path / "config")).state_dict()
        assert all(torch.equal(again[name], value) for name, value in part.state_dict().items())
