"""Run an export with diffusers alone, in a Python that cannot import stepdistill.

    python stock_call.py REQUEST.json RESULT.safetensors

It imports only torch, diffusers and safetensors, and drives the export as its model card says.
"""

import functools
import inspect
import json
import sys
import warnings
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

    The request: ``pipeline`` (folder or hub id), ``revision``, ``variant``, ``lora`` (folder or null),
    ``further_loras`` (the file in it for each further network), ``scheduler`` (class of the LoRA's own),
    ``ip_adapter`` (arguments of its loading, or null), ``ip_adapter_scale``, ``guiders`` (components that combine
    passes, to be switched off), ``call`` (keyword arguments of the pipeline), ``device`` ("cpu", or one that gets one
    network at a time), ``dtype``.
    """
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, request["dtype"])
    with warnings.catch_warnings():
        # Newer versions call the argument dtype, and warn; older ones know only this name.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            request["pipeline"],
            revision=request["revision"],
            variant=request["variant"],
            use_safetensors=True,
            torch_dtype=dtype,
        )
    if request["ip_adapter"]:
        pipeline.load_ip_adapter(**request["ip_adapter"])
        pipeline.set_ip_adapter_scale(request["ip_adapter_scale"])
    pipeline.to(dtype)
    if request["lora"]:
        pipeline.load_lora_weights(request["lora"])
        for name, file in request["further_loras"].items():
            pipeline.load_lora_weights(request["lora"], weight_name=file, **{f"load_into_{name}": True})
        scheduler = getattr(diffusers, request["scheduler"])
        pipeline.scheduler = scheduler.from_pretrained(request["lora"], subfolder="scheduler")
    for name in request["guiders"]:
        setattr(pipeline, name, getattr(pipeline, name).new(enabled=False))
    without_black_pictures(pipeline)
    if request["device"] != "cpu":
        if pipeline.model_cpu_offload_seq is None:
            pipeline.to(request["device"])
        else:
            pipeline.enable_model_cpu_offload(device=request["device"])
    save_file(record(pipeline, request["call"]), result_path)


def record(pipeline, call: dict) -> dict[str, torch.Tensor]:
    """Call a pipeline on fixed random numbers.

    Returns:
        ``noise``, the first sample its scheduler was given; ``random_state`` of torch on that sample's device at that
        moment; ``latents``, the last sample; ``images`` if they are a tensor. Copies of the scheduler step further
        samples (a video's sound): ``noise 1`` and ``latents 1``, in the order of their first steps.
    """
    own, result = pipeline.scheduler, {}
    numbers, copies = {id(own): 0}, []
    pipeline.set_progress_bar_config(disable=True)

    def recorded(scheduler, stock_step):
        @functools.wraps(stock_step)
        def step(model_output, timestep, sample, *args, **kwargs):
            if "random_state" not in result:
                here = sample.device
                state = (
                    torch.get_rng_state() if here.type == "cpu" else torch.get_device_module(here).get_rng_state(here)
                )
                result["random_state"] = state
            number = numbers.setdefault(id(scheduler), len(numbers))
            suffix = f" {number}" if number else ""
            result.setdefault(f"noise{suffix}", sample.clone())
            output = stock_step(model_output, timestep, sample, *args, **kwargs)
            result[f"latents{suffix}"] = next(iter(output.values())) if isinstance(output, dict) else output[0]
            return output

        return step

    def of_copy(copied):
        copies.append(copied)  # it is alive until the end, so that its id is its own
        return recorded(copied, type(copied).step.__get__(copied))

    own.step = Replaced(own, recorded(own, own.step), of_copy)
    torch.manual_seed(0)
    images = called(pipeline, ready(pipeline, call))[0]
    if isinstance(images, torch.Tensor):
        result["images"] = images
    # Copies: the images of a pipeline without an autoencoder are its latents, and files hold no shared memory.
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in result.items()}


def called(pipeline, call: dict):
    """What a call of the pipeline returns; without ``output_type`` if it refuses that one (Marigold has no latents)."""
    try:
        return pipeline(**call)
    except ValueError as error:
        if "output_type" not in call or "output_type" not in str(error):
            raise
        return pipeline(**{name: value for name, value in call.items() if name != "output_type"})


def ready(pipeline, call: dict) -> dict:
    """The arguments of a call: pictures where they name pictures' files, tuples where the pipeline declares tuples."""

    def opened(value):
        if files := pictures_in(value):
            shown = [diffusers.utils.load_image(file) if Path(file).is_file() else file for file in files]
            return shown if isinstance(value, list) else shown[0]
        return value

    return {name: opened(value) for name, value in declared(pipeline, call).items()}


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


def pictures_in(value) -> list:
    """The names of pictures' files that a value is: one, or a list of nothing else."""
    names = value if isinstance(value, list) else [value]
    pictured = all(isinstance(name, str) and Path(name).suffix.lower() in PICTURES for name in names)
    return names if pictured else []


class Replaced:
    """A method of one object, replaced on it alone: a deep copy of the object has its class's own.

    Pipelines copy their scheduler for a second sample (a video's sound), and the copy's steps are not the original's:
    ``of_copy`` makes what replaces the method of a copy, given the copy.
    """

    def __init__(self, owner, function, of_copy=None):
        functools.update_wrapper(self, function)
        self.owner, self.function, self.of_copy = owner, function, of_copy

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo):
        copied = memo.get(id(self.owner), self.owner)
        if self.of_copy:
            return Replaced(copied, self.of_copy(copied), self.of_copy)
        return getattr(type(self.owner), self.function.__name__).__get__(copied)


if __name__ == "__main__":
    main(*sys.argv[1:])
