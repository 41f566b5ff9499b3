"""A workflow that runs a student in ComfyUI, in its API format, which its page opens as well.

It states the student's grid as noise levels, so it needs no scheduler and no shift of ComfyUI's; what ComfyUI has no
sampler for gets no workflow, and a reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import Schedule
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.stock_call import parameters
from stepdistill.pipeline.trace import Trace

SAMPLERS = {"renoise": "lcm", "ddim": "euler"}
"""ComfyUI's samplers that take our steps; it has none for tcd."""
VIDEO_FPS = 16.0


@dataclass(frozen=True)
class Place:
    """How ComfyUI loads a family.

    Args:
        latent: the node of empty latents.
        whole: whether the one file holds the autoencoder as well, for the node of checkpoints.
        loader: the node of the text encoders; "": they are in the file.
        encoders: its inputs.
        vae: the autoencoder's file; "": it is in the file.
    """

    latent: str
    whole: bool = False
    loader: str = ""
    encoders: Mapping[str, str] | None = None
    vae: str = ""


_T5 = "t5xxl_fp16.safetensors"
FAMILIES = {
    "StableDiffusionPipeline": Place("EmptyLatentImage", whole=True),
    "StableDiffusionXLPipeline": Place("EmptyLatentImage", whole=True),
    "StableDiffusion3Pipeline": Place(
        "EmptySD3LatentImage",
        True,
        "TripleCLIPLoader",
        {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_g.safetensors", "clip_name3": _T5},
    ),
    "FluxPipeline": Place(
        "EmptySD3LatentImage",
        False,
        "DualCLIPLoader",
        {"clip_name1": "clip_l.safetensors", "clip_name2": _T5, "type": "flux"},
        "ae.safetensors",
    ),
    "QwenImagePipeline": Place(
        "EmptySD3LatentImage",
        False,
        "CLIPLoader",
        {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"},
        "qwen_image_vae.safetensors",
    ),
    "ZImagePipeline": Place(
        "EmptySD3LatentImage",
        False,
        "CLIPLoader",
        {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"},
        "ae.safetensors",
    ),
    "WanPipeline": Place(
        "EmptyHunyuanLatentVideo",
        False,
        "CLIPLoader",
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"},
        "wan_2.1_vae.safetensors",
    ),
}
"""By the pipeline's class. Files are named as ComfyUI's own examples name them."""


def no_workflow(trace: Trace, facts: ExportFacts, sampler: Sampler) -> str | None:
    """Why ComfyUI has no nodes that take the student's steps; None where it has."""
    if sampler.name not in SAMPLERS:
        return f"ComfyUI has no sampler like {sampler.name}"
    if sampler.schedule.name not in ("vp_discrete", "flow"):
        return "its nodes are for the noise tables of SD and for flow matching"
    if sampler.start is not None:
        return "ComfyUI scales the first noise of a run that starts below the noise end"
    if sampler.schedule.name == "vp_discrete" and _is_zero_snr(sampler.schedule) is None:
        return "its noise table is not ComfyUI's"
    grid = sampler.grid()
    if any(step.r != after for step, after in zip(grid, [*(step.t for step in grid[1:]), None], strict=True)):
        return f"{facts.steps} steps do not divide the noise table: a step ends beside the start of the next one"
    teacher = facts.recipe.get("teacher", {})
    if facts.form == "lora" and (parts := [key for key in ("loras", "vae") if teacher.get(key)]):
        return f"the LoRA is for a teacher with teacher.{parts[0]} in it, which ComfyUI would have to load as well"
    if trace.pictures or facts.ip_adapter is not None:
        return "the call takes pictures"
    if getattr(trace.pipeline.vae.config, "z_dim", None) == 48:
        return "its latents have 48 channels"
    return None


def _is_zero_snr(schedule: Any) -> bool | None:
    """Whether the table ends without signal; None of a table that is not Stable Diffusion's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table, found = (1 - betas).cumprod(0), schedule.alphas_cumprod.double()
    if len(found) != len(table):
        return None
    if torch.allclose(found, table, rtol=1e-4, atol=1e-9):
        return False
    root = table.sqrt()
    shifted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return True if torch.allclose(found, shifted, rtol=1e-3, atol=1e-6) else None


def base_name(facts: ExportFacts) -> str:
    """The last part of the teacher's name, without the ending of a checkpoint file."""
    name = facts.teacher.rstrip("/").rpartition("/")[2]
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def sigmas(sampler: Sampler) -> list[float]:
    """ComfyUI's noise levels of the student's grid, from the noise end to 0: sigma / alpha on SD's table."""
    schedule: Schedule = sampler.schedule
    times = torch.tensor([step.t for step in sampler.grid()], dtype=torch.float64)
    alpha, sigma = schedule.coefficients(times)
    if schedule.name == "vp_discrete":
        # A table without signal at its end has this signal there in ComfyUI.
        alpha = alpha.clamp_min(4.8973451890853435e-08**0.5)
        sigma = (1 - alpha**2).sqrt() / alpha
    return [*sigma.tolist(), 0.0]


def workflow(trace: Trace, facts: ExportFacts, sampler: Sampler, file: str) -> dict[str, Any]:
    """The nodes by number, as ComfyUI's API takes them."""
    nodes: dict[str, Any] = {}

    def add(kind: str, **inputs: Any) -> str:
        nodes[number := str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return number

    place = FAMILIES[type(trace.pipeline).__name__]
    weights = f"{base_name(facts)}.safetensors" if facts.form == "lora" else file
    if place.whole:
        loader = add("CheckpointLoaderSimple", ckpt_name=weights)
    else:
        loader = add("UNETLoader", unet_name=weights, weight_dtype="default")
    model = [loader, 0]
    clip = [add(place.loader, **place.encoders), 0] if place.loader else [loader, 1]
    vae = [add("VAELoader", vae_name=place.vae), 0] if place.vae else [loader, 2]
    if facts.form == "lora":
        model = [add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0), 0]
    if sampling := _sampling(trace, sampler):
        model = [add("ModelSamplingDiscrete", model=model, **sampling), 0]
    positive = [add("CLIPTextEncode", clip=clip, text="a photo of a cat"), 0]
    negative = [add("CLIPTextEncode", clip=clip, text=""), 0]
    if trace.guidance.kind == "embedded":
        positive = [add("FluxGuidance", conditioning=positive, guidance=facts.call_guidance), 0]
    chosen = add("KSamplerSelect", sampler_name=SAMPLERS[sampler.name])
    levels = add("ManualSigmas", sigmas=", ".join(f"{level:.10f}" for level in sigmas(sampler)))
    latent = add(place.latent, **_size(trace, video := place.latent == "EmptyHunyuanLatentVideo"), batch_size=1)
    run = {"positive": positive, "negative": negative, "sampler": [chosen, 0], "sigmas": [levels, 0]}
    run |= {"add_noise": True, "noise_seed": 0, "cfg": 1.0, "latent_image": [latent, 0]}
    images = [add("VAEDecode", samples=[add("SamplerCustom", model=model, **run), 0], vae=vae), 0]
    prefix = file.removesuffix(".safetensors")
    if video:
        form = {"fps": VIDEO_FPS, "lossless": False, "quality": 90, "method": "default"}
        add("SaveAnimatedWEBP", images=images, filename_prefix=prefix, **form)
    else:
        add("SaveImage", images=images, filename_prefix=prefix)
    return nodes


def _sampling(trace: Trace, sampler: Sampler) -> dict[str, Any]:
    """The settings that ComfyUI needs of an SD network that predicts something else than the noise."""
    if sampler.schedule.name != "vp_discrete":
        return {}
    zero = bool(_is_zero_snr(sampler.schedule))
    kind = {"epsilon": "eps", "v": "v_prediction", "sample": "x0"}[trace.denoiser.kind]
    return {} if kind == "eps" and not zero else {"sampling": kind, "zsnr": zero}


def _size(trace: Trace, video: bool) -> dict[str, int]:
    """Width and height in pixels, and a video's frames, of a plain call."""
    pipeline, declared = trace.pipeline, parameters(trace.pipeline)
    side = getattr(pipeline, "default_sample_size", None) or getattr(trace.network.config, "sample_size", None)
    square = side * pipeline.vae_scale_factor if isinstance(side, int) else 1024

    def stated(name: str, otherwise: int) -> int:
        return int(trace.arguments.get(name) or declared[name].default or otherwise)

    size = {name: stated(name, square) for name in ("width", "height")}
    return size | ({"length": stated("num_frames", 81)} if video else {})
