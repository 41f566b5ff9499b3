"""An export in the hands of someone who has diffusers and nothing else: run by a Python without stepdistill.

    python stock_call.py REQUEST.json RESULT.safetensors

It imports only torch, diffusers and safetensors, and drives the export as its model card says.
"""

import functools
import inspect
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["stepdistill"] = None  # an import of it is an error from here on

import diffusers
import torch
from safetensors.torch import save_file

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Endings of pictures' files, those of the samples' own."""


def main(request_path: str, result_path: str) -> None:
    """Load the pipeline, call it once, and save what :func:`record` returns.

    The request: ``pipeline`` (folder or hub id), ``revision``, ``variant``, ``lora`` (folder or null), ``scheduler``
    (class of the LoRA's own), ``ip_adapter`` (arguments of its loading, or null), ``ip_adapter_scale``, ``call``
    (keyword arguments of the pipeline).
    """
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        request["pipeline"], revision=request["revision"], variant=request["variant"], use_safetensors=True
    )
    if request["ip_adapter"]:
        pipeline.load_ip_adapter(**request["ip_adapter"])
        pipeline.set_ip_adapter_scale(request["ip_adapter_scale"])
    pipeline.to(torch.float32)
    if request["lora"]:
        pipeline.load_lora_weights(request["lora"])
        scheduler = getattr(diffusers, request["scheduler"])
        pipeline.scheduler = scheduler.from_pretrained(request["lora"], subfolder="scheduler")
    without_black_pictures(pipeline)
    save_file(record(pipeline, request["call"]), result_path)


def record(pipeline, call: dict) -> dict[str, torch.Tensor]:
    """Call a pipeline on fixed random numbers.

    Returns:
        ``noise``, the first sample its scheduler was given; ``random_state`` of torch on that sample's device at that
        moment; ``latents``, the last sample; ``images`` if they are a tensor.
    """
    result = {}
    pipeline.set_progress_bar_config(disable=True)
    stock_step = pipeline.scheduler.step

    @functools.wraps(stock_step)
    def step(model_output, timestep, sample, *args, **kwargs):
        if not result:
            state = torch.cuda.get_rng_state(sample.device) if sample.is_cuda else torch.get_rng_state()
            result.update(noise=sample.clone(), random_state=state)
        output = stock_step(model_output, timestep, sample, *args, **kwargs)
        result["latents"] = next(iter(output.values())) if isinstance(output, dict) else output[0]
        return output

    pipeline.scheduler.step = step
    torch.manual_seed(0)
    images = pipeline(**ready(pipeline, call))[0]
    if isinstance(images, torch.Tensor):
        result["images"] = images
    return {name: value.contiguous().cpu() for name, value in result.items()}


def ready(pipeline, call: dict) -> dict:
    """The arguments of a call: pictures where they name pictures' files, tuples where the pipeline declares tuples."""
    return {
        name: diffusers.utils.load_image(value) if is_picture(value) and Path(value).is_file() else value
        for name, value in declared(pipeline, call).items()
    }


def declared(pipeline, call: dict) -> dict:
    """The arguments of a call, with tuples for the lists of YAML and JSON where the pipeline declares tuples alone."""
    parameters = inspect.signature(pipeline.__call__).parameters

    def wants_tuple(name: str) -> bool:
        words = str(getattr(parameters.get(name), "annotation", "")).lower()
        return "tuple[" in words and "list[" not in words

    return {
        name: tuple(value) if isinstance(value, list) and wants_tuple(name) else value for name, value in call.items()
    }


def without_black_pictures(pipeline) -> None:
    """Switch off the checker that paints pictures black: what is measured and compared is what the network draws.

    Exports keep the checker of their teacher.
    """
    if hasattr(pipeline, "run_safety_checker") and pipeline.components.get("safety_checker") is not None:
        pipeline.register_modules(safety_checker=None)


def is_picture(value) -> bool:
    """Whether a value is the name of a picture's file."""
    return isinstance(value, str) and Path(value).suffix.lower() in PICTURES


if __name__ == "__main__":
    main(*sys.argv[1:])
