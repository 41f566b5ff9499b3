"""What `stepdistill plan` expects of recipes at real sizes, without any download: a table in Markdown.

    python scripts/plan_sizes.py                       # SD 1.5, SDXL and SD 3.5 medium, the table of docs/plan.md
    python scripts/plan_sizes.py sdxl --gpu 24
    python scripts/plan_sizes.py sdxl sd35 train.gradient_checkpointing=elementwise
    python scripts/plan_sizes.py sd15 --measure train.precision=fp32 teacher.arguments='{height: 256, width: 256}'

Of each pipeline the configs are written; those of networks are the published ones of tests/published.py. With --measure
random weights are written too, and a real step's peak is set beside the expected one: on CUDA where there is a device,
else on the CPU.
"""

import argparse
import json
import runpy
import string
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTokenizer, Gemma2Config, T5Config, T5TokenizerFast

from stepdistill.pipeline import observe
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.planning import plan
from stepdistill.planning.fake_pipeline import from_configs
from stepdistill.recipe import load
from stepdistill.training.session import build
from stepdistill.training.trainer import Trainer

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
GEMMA2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
# Of dc-ae-f32c32-sana; what is left out is the class's default.
DC_AE = {
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
PUBLISHED = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "published.py"))
MODELS, BETAS = PUBLISHED["MODELS"], PUBLISHED["LATENT_BETAS"]
UNETS = {name: MODELS[name].network_config for name in ("sd15", "sdxl")}
SD35_MEDIUM = MODELS["sd35-medium"].network_config
RUNS = {
    "sd15": "sd15_dmd2",
    "sdxl": "sdxl_dmd2_lora_24gb",
    "sdxl-critic": "sdxl_dmd2_lora",
    "sd35": "sd35_medium_dmd2_lora",
}


def network(folder: Path, library: str, class_name: str, **config: Any) -> list[str]:
    """Write a diffusers network's config; returns its entry of model_index.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    return [library, class_name]


def clip(folder: Path, number: str, projected: bool, **config: Any) -> dict[str, list[str]]:
    """A CLIP text encoder's config and a tokenizer of letters with its length."""
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    letters = [token for letter in string.ascii_lowercase for token in (letter, f"{letter}</w>")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder / f"tokenizer{number}")
    text = CLIPTextConfig(**config, projection_dim=config["hidden_size"], eos_token_id=len(vocab) - 1)
    text.save_pretrained(folder / f"text_encoder{number}")
    return {f"text_encoder{number}": ["transformers", name], f"tokenizer{number}": ["transformers", "CLIPTokenizer"]}


def t5(folder: Path, number: str, model: tuple[str, Any] = ("T5EncoderModel", T5Config(**T5_XXL, d_kv=64))) -> dict:
    """The config of T5-XXL's encoder, or of another one, and a tokenizer of letters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((c, -3.0) for c in string.ascii_lowercase)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512).save_pretrained(
        folder / f"tokenizer{number}"
    )
    model[1].save_pretrained(folder / f"text_encoder{number}")
    return {
        f"text_encoder{number}": ["transformers", model[0]],
        f"tokenizer{number}": ["transformers", "T5TokenizerFast"],
    }


def write(folder: Path, size: str) -> Path:
    """The configs of the pipeline of that size."""
    index: dict[str, Any] = {}
    if size == "sd35":
        index |= {"_class_name": "StableDiffusion3Pipeline"}
        index |= clip(folder, "", True, **CLIP_L) | clip(folder, "_2", True, **CLIP_G) | t5(folder, "_3")
        index["transformer"] = network(folder / "transformer", "diffusers", "SD3Transformer2DModel", **SD35_MEDIUM)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        index["unet"] = network(folder / "unet", "diffusers", "UNet2DConditionModel", **UNETS[size])
        index |= clip(folder, "", False, **CLIP_L)
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
        if size == "sdxl":
            index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
            index |= clip(folder, "_2", True, **CLIP_G)
            scheduler = EulerDiscreteScheduler(**BETAS)
        else:
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    latents = 16 if size == "sd35" else 4
    index["vae"] = network(folder / "vae", "diffusers", "AutoencoderKL", **VAE, latent_channels=latents)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_published(folder: Path, name: str) -> Path:
    """The configs of a pipeline of tests/published.py: those of :func:`write`, and others for the table of recipes."""
    if size := {"sd15": "sd15", "sdxl": "sdxl", "sd35-medium": "sd35"}.get(name):
        return write(folder, size)
    facts = MODELS[name]
    index: dict[str, Any] = {"_class_name": facts.pipeline}
    index["transformer"] = network(folder / "transformer", "diffusers", facts.network, **facts.network_config)
    latents = 4
    if name == "flux-dev":
        index |= clip(folder, "", False, **CLIP_L) | t5(folder, "_2")
        latents = 16
    elif name == "pixart-sigma":
        index |= t5(folder, "")
    elif name == "sana-1600m":
        index |= t5(folder, "", ("Gemma2Model", Gemma2Config(**GEMMA2_2B)))
    else:
        index["id2label"] = {str(number): f"class {number}" for number in range(1000)}
    if name == "sana-1600m":
        index["vae"] = network(folder / "vae", "diffusers", "AutoencoderDC", **DC_AE)
    else:
        index["vae"] = network(folder / "vae", "diffusers", "AutoencoderKL", **VAE, latent_channels=latents)
    getattr(diffusers, facts.scheduler)(**facts.scheduler_config).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", facts.scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def cpu_peak(trainer: Trainer, step: int) -> int:
    """Bytes at the peak of a step: what stands, and the most that the allocator handed out on top of it.

    Without the encoders, which on an accelerator rest in the host's memory.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step(step)
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    traced = trainer.session.trace
    modules = [one for name, one in observe.modules(traced.pipeline).items() if name not in traced.encoders]
    roles = trainer.session.method.roles
    modules += [getattr(roles, name).network for name in ("student", *trainer.session.method.extra_roles)]
    standing = [t for module in modules for t in (*torch.nn.Module.parameters(module), *module.buffers())]
    standing += [t for one in trainer.optimizers.values() for state in one.state.values() for t in state.values()]
    standing += trainer.average.weights.values()
    return peak + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}.values())


def measured(recipe: str, overrides: list[str], folder: Path) -> int:
    """Bytes at the peak of a real step of the trainer, the weights and moments that stand among them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save_pipeline(from_configs(folder, torch.bfloat16, nullcontext()), folder)
    session = build(load(recipe, overrides), device)
    trainer = Trainer(session, Accelerator(cpu=device.type == "cpu"), folder)
    turns = [len(set(session.method.turns(step))) for step in range(20)]
    step = turns.index(max(turns))
    trainer.step(step)  # makes the optimizers' moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.step(step)
        return torch.cuda.max_memory_allocated()
    return cpu_peak(trainer, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = f"of {', '.join(RUNS)} (none: all), and changes to their recipes"
    parser.add_argument("what", nargs="*", metavar="SIZE|KEY=VALUE", help=about)
    parser.add_argument("--gpu", type=float, help="also what would make it fit so many GiB")
    parser.add_argument("--measure", action="store_true", help="run a step of the first one")
    options = parser.parse_intermixed_args()
    overrides = [one for one in options.what if "=" in one]
    sizes = [one for one in options.what if "=" not in one] or [*RUNS]
    if strangers := set(sizes) - set(RUNS):
        parser.error(f"sizes: expected some of {', '.join(RUNS)}, found {sorted(strangers)[0]}")
    print("| recipe | changed | teacher | peak GiB | in the turn of | weights | optimizer | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for size in sizes[:1] if options.measure else sizes:
            recipe, folder = RUNS[size], write(Path(place) / size, size.partition("-")[0])
            start = time.perf_counter()
            changed = [f"teacher.pipeline={folder}", *overrides]
            found = plan.plan(recipe, changed)
            seconds = time.perf_counter() - start
            teacher = next(line for line in found.lines if line.name == "teacher")
            weights, optimizer = (sum(getattr(line, name) for line in found.lines) for name in ("weights", "optimizer"))
            print(
                f"| `{recipe}` | {', '.join(overrides) or '-'} | {teacher.parameters / 1e6:.0f} M "
                f"| {found.peak / plan.GIB:.2f} | {found.player} | {weights / plan.GIB:.1f} "
                f"| {optimizer / plan.GIB:.1f} | {seconds:.0f} |",
                flush=True,
            )
            if options.gpu:
                print(plan.as_text(*plan.fit(recipe, changed, options.gpu), options.gpu), flush=True)
            if options.measure:
                print(f"measured {measured(recipe, changed, folder) / plan.GIB:.2f} GiB")


if __name__ == "__main__":
    main()
