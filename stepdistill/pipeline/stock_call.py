"""Run an export with diffusers alone, in a Python that cannot import stepdistill.

    python stock_call.py REQUEST.json RESULT.safetensors

It imports only NumPy, torch, diffusers and safetensors, and drives the export as its model card says.
"""

import dataclasses
import functools
import inspect
import json
import sys
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.modules["stepdistill"] = None  # an import of it is an error from here on

import diffusers
import numpy
import torch
from safetensors.torch import save_file

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".npy")
"""Endings of pictures' files, those of the samples' own; and of a tensor's, such as a picture's embedding."""
RESULTS = ("images", "videos", "image", "video")
"""What blocks call the output that they draw."""


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
    pipeline = loaded(request["pipeline"], request["revision"], request["variant"], dtype)
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
        guider = getattr(pipeline, name)
        setattr(pipeline, name, guider.new(**off(guider)))
    without_black_pictures(pipeline)
    if request["device"] != "cpu":
        if getattr(pipeline, "model_cpu_offload_seq", None) is None:
            pipeline.to(request["device"])
        else:
            pipeline.enable_model_cpu_offload(device=request["device"])
    save_file(record(pipeline, request["call"]), result_path)


def loaded(place: str, revision: str | None, variant: str | None, dtype: torch.dtype):
    """The pipeline of a folder or hub id; a modular one with its components."""
    modular = Path(place, "modular_model_index.json").is_file() and not Path(place, "model_index.json").is_file()
    with warnings.catch_warnings():
        # Newer versions call the argument dtype, and warn; older ones know only this name.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        if modular:
            pipeline = diffusers.ModularPipeline.from_pretrained(place, use_safetensors=True)
            options = {"variant": variant} if variant else {}
            pipeline.load_components(torch_dtype=dtype, use_safetensors=True, **options)
            return pipeline
        return diffusers.DiffusionPipeline.from_pretrained(
            place, revision=revision, variant=variant, use_safetensors=True, torch_dtype=dtype
        )


def record(pipeline, call: dict) -> dict[str, torch.Tensor]:
    """Call a pipeline on fixed random numbers.

    Returns:
        ``noise``, the first sample its scheduler was given; ``random_state`` of torch on that sample's device at that
        moment; ``latents``, the last sample; ``images`` if they are a tensor. Copies of the scheduler step further
        samples (a video's sound): ``noise 1`` and ``latents 1``, in the order of their first steps.
    """
    result = {}
    pipeline.set_progress_bar_config(disable=True)

    def recorded(stock_step, number_of):
        @functools.wraps(stock_step)
        def step(model_output, timestep, sample, *args, **kwargs):
            if "random_state" not in result:
                here = sample.device
                state = (
                    torch.get_rng_state() if here.type == "cpu" else torch.get_device_module(here).get_rng_state(here)
                )
                result["random_state"] = state
            suffix = f" {number}" if (number := number_of()) else ""
            if f"noise{suffix}" not in result:
                result[f"noise{suffix}"] = sample.clone()
            output = stock_step(model_output, timestep, sample, *args, **kwargs)
            result[f"latents{suffix}"] = next(iter(output.values())) if isinstance(output, dict) else output[0]
            return output

        return step

    pipeline.scheduler.step = in_each(pipeline.scheduler, recorded)
    torch.manual_seed(0)
    try:
        made = called(pipeline, ready(pipeline, call), lambda: bool(result))
    except NotImplementedError as error:
        if not tiled(pipeline, error):
            raise
        result.clear()
        torch.manual_seed(0)
        made = called(pipeline, ready(pipeline, call), lambda: bool(result))
    images = made if isinstance(made, torch.Tensor) else made[0]  # no tuple: Stable Video Diffusion's frames
    images = next(iter(images.values())) if isinstance(images, dict) else images  # of a pipeline inside it
    if isinstance(images, numpy.ndarray) and images.ndim < 4:  # a sound
        images = torch.from_numpy(images)
    if isinstance(images, torch.Tensor):
        result["images"] = images
    # Copies: the images of a pipeline without an autoencoder are its latents, and files hold no shared memory.
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in result.items()}


def is_modular(pipeline) -> bool:
    """Whether a pipeline is made of blocks: it has no signature, and returns one of its blocks' outputs by name."""
    return isinstance(pipeline, getattr(diffusers, "ModularPipeline", ()))


def parameters(pipeline) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline's call, by name.

    Of a modular one the inputs of its blocks. Defaults are those of the blocks that a prompt alone would run.
    """
    if not is_modular(pipeline):
        return inspect.signature(pipeline.__call__).parameters
    defaults = {one.name: one.default for one in _blocks_run(pipeline).inputs}
    return {
        one.name: inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(one.name), annotation=one.type_hint
        )
        for one in pipeline.blocks.inputs
        if one.name
    }


def result_name(pipeline) -> str:
    """The output of a modular pipeline that holds what it draws: the last of its blocks'."""
    names = _blocks_run(pipeline).output_names
    return next((name for name in RESULTS if name in names), names[-1])


def _blocks_run(pipeline):
    """The blocks that run on a prompt alone: others wait for a picture, a mask, ..."""
    blocks = pipeline.blocks
    try:
        return blocks.get_execution_blocks(prompt="")
    except NotImplementedError:  # it has no choice
        return blocks


def off(guider) -> dict:
    """Settings of a guider for one pass per step, its scales among them: some blocks enable it anew."""
    neutral = {name: 0.0 for name in guider.config if name.endswith("guidance_scale")}
    if "guidance_scale" in neutral and not guider.config.get("use_original_formulation"):
        neutral["guidance_scale"] = 1.0
    return {"enabled": False, **neutral}


def called(pipeline, call: dict, sampled=lambda: False):
    """What a call of the pipeline returns; without ``output_type`` if it refuses that one (Marigold has no latents).

    Some calls fail without a generator (VisualCloze): such a pipeline gets one of seed 0, and ``needs_generator``.

    Where ``sampled()`` is true by then, it refuses after its last step (Kandinsky's prior): nothing is drawn again, and
    what is returned is (None,).
    """
    if is_modular(pipeline):
        return _called_in_blocks(pipeline, call)
    if getattr(pipeline, "needs_generator", False) and call.get("generator") is None:
        call = {**call, "generator": torch.Generator().manual_seed(0)}
    try:
        return pipeline(**call)
    except TypeError as error:
        if "'NoneType'" not in str(error) or call.get("generator") or "generator" not in parameters(pipeline):
            raise
        pipeline.needs_generator = True
        try:
            return called(pipeline, call, sampled)
        except TypeError:
            pipeline.needs_generator = False
            raise error from None
    except ValueError as error:
        if "output_type" not in call or "output_type" not in str(error):
            raise
        if sampled():
            return (None,)
        return pipeline(**{name: value for name, value in call.items() if name != "output_type"})


def _called_in_blocks(pipeline, call: dict) -> tuple:
    """What a modular pipeline draws, alone in a tuple; its blocks take no latents as the type of their output."""
    wanted, accepted = result_name(pipeline), parameters(pipeline)
    if call.get("output_type") == "latent":
        wanted, call = "latents", call | {"output_type": "pt"}
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # it reports each exception at each level
    try:
        return (pipeline(**{name: value for name, value in call.items() if name in accepted}, output=wanted),)
    finally:
        diffusers.utils.logging.set_verbosity(before)


def ready(pipeline, call: dict) -> dict:
    """The arguments of a call: what they name files of, pictures or tensors, and what it declares for tuples and dicts.

    A dict with files becomes the dataclass that the call declares (a condition of LTX).
    """

    def shown(value, kind):
        if isinstance(value, (list, tuple)):
            return [shown(one, kind) for one in value]
        if isinstance(value, dict) and kind is not None:
            return kind(**{key: shown(one, None) for key, one in value.items()})
        return opened(value) if isinstance(value, str) and Path(value).is_file() else value

    call = declared(pipeline, call)
    return {
        name: shown(value, dataclass_of(pipeline, name)) if pictures_in(value) else value
        for name, value in call.items()
    }


def dataclass_of(pipeline, name: str):
    """The dataclass that a pipeline's call declares for an argument, alone or in lists; None: none."""
    found = [getattr(parameters(pipeline).get(name), "annotation", None)]
    while found:
        kind = found.pop()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
        found += typing.get_args(kind)
    return None


def opened(file: str):
    """A picture, or the tensor of a .npy."""
    if Path(file).suffix.lower() == ".npy":
        return torch.from_numpy(numpy.load(file))
    return diffusers.utils.load_image(file)


def declared(pipeline, call: dict) -> dict:
    """The arguments of a call, with tuples for the lists of YAML and JSON where the pipeline declares tuples alone."""
    accepted = parameters(pipeline)

    def wants_tuple(name: str) -> bool:
        words = str(getattr(accepted.get(name), "annotation", "")).lower()
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


def tiled(pipeline, error) -> bool:
    """Switch on the tiling of an autoencoder that failed for want of it (Allegro's); False where that is not why."""
    vae = getattr(pipeline, "vae", None)
    off = getattr(vae, "use_tiling", True) is False
    if not off or not isinstance(error, NotImplementedError) or "tiling" not in str(error):
        return False
    vae.enable_tiling()
    return True


def pictures_in(value) -> list:
    """The names of files with endings of PICTURES that a value is: one, or lists of nothing else and of None.

    Those of a dict are its entries'.
    """
    if isinstance(value, dict):
        return [name for one in value.values() for name in pictures_in(one)]
    if isinstance(value, (list, tuple)):
        parts = [pictures_in(one) for one in value]
        complete = all(part or one is None for part, one in zip(parts, value, strict=True))
        return [name for part in parts for name in part] if complete else []
    return [value] if isinstance(value, str) and Path(value).suffix.lower() in PICTURES else []


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


def in_each(scheduler, made) -> Replaced:
    """A step() for a scheduler and for its copies: ``made`` of the own step() and of what counts them.

    The count is a function without arguments: 0 for the scheduler, and for copies 1, 2, ... in the order in which they
    first call it.
    """
    numbers, copies = {id(scheduler): 0}, []

    def of(one, own_step):
        return made(own_step, lambda: numbers.setdefault(id(one), len(numbers)))

    def of_copy(copied):
        copies.append(copied)  # it stays alive, so that its id is its own
        return of(copied, type(copied).step.__get__(copied))

    return Replaced(scheduler, of(scheduler, scheduler.step), of_copy)


if __name__ == "__main__":
    main(*sys.argv[1:])
