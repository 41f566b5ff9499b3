"""The tests of diffusers that build a tiny pipeline, and their inputs as stepdistill's arguments."""

import ast
import dataclasses
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

# Set by the tracing itself.
SET_BY_TRACING = {"prompt", "class_labels", "batch_size", "generator", "num_inference_steps", "guidance_scale"}
SET_BY_TRACING |= {"true_cfg_scale", "output_type", "return_dict"}
PICTURES = ("image", "mask", "control", "pose", "face", "background", "reference", "frame", "depth", "person")
CONDITIONS = (*PICTURES, "video", "embeds", "latents")

AUDIO = {"audioldm2", "stable_audio", "stable_audio_3", "ace_step", "longcat_audio_dit"}
OTHER = {"shap_e", "diffusion_gemma", "llada2"}
EDITING = {"visualcloze", "marigold"}
VIDEO = {"allegro", "animatediff", "anyflow", "chronoedit", "cogvideo", "consisid", "cosmos", "easyanimate", "helios"}
VIDEO |= {"hunyuan_video", "hunyuan_video1_5", "kandinsky5", "latte", "ltx", "ltx2", "mochi", "motif_video"}
VIDEO |= {"sana_video", "skyreels_v2", "stable_video_diffusion", "wan"}


def listed(root: Path) -> list[tuple[str, str]]:
    """(module, class) of every test class that makes a pipeline's components, read from the sources, not imported.

    Args:
        root: A folder that holds diffusers' ``tests``.
    """
    found = []
    for file in sorted((root / "tests" / "pipelines").glob("*/test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name != "Dummies":
                functions = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
                if any(name.startswith("get_dummy_components") for name in functions):
                    found.append((f"tests.pipelines.{file.parent.name}.{file.stem}", node.name))
    return found


def instance(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)()


def dummy_inputs(test: Any) -> dict[str, Any]:
    takes_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
    return test.get_dummy_inputs("cpu") if takes_device else test.get_dummy_inputs()


def dummy_components(test: Any) -> dict[str, Any]:
    """The pipeline's parts; what the function has no default for is a switch, left off."""
    parameters = inspect.signature(test.get_dummy_components).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.default is one.empty and one.kind in kinds]
    return test.get_dummy_components(*[False] * len(needed))


def picture(value: Any) -> PIL.Image.Image | None:
    """A picture of a tensor or array (1, 3, H, W), (3, H, W) or (H, W, 3), of 1 channel too; None where it is none."""
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        return None
    if value.ndim == 4 and len(value) == 1:
        value = value[0]
    if value.ndim == 3 and value.shape[-1] in (1, 3) and value.shape[0] not in (1, 3):
        value = value.permute(2, 0, 1)
    if value.ndim != 3 or value.shape[0] not in (1, 3):
        return None
    value = value.float()
    if value.min() < 0:
        value = value / 2 + 0.5
    pixels = (value.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def plain(value: Any) -> bool:
    """Whether a recipe can state a value."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def worded(inputs: Mapping[str, Any], words: str) -> str:
    """A prompt of ``words``; where the test's own is an object of JSON, such a one with them for each of its texts."""
    try:
        form = json.loads(str(inputs.get("prompt")))
    except ValueError:
        return words
    if not isinstance(form, dict):
        return words
    return json.dumps({name: words if isinstance(value, str) else value for name, value in form.items()})


def arguments_of(inputs: Mapping[str, Any], folder: Path, lists: bool = False) -> dict[str, Any]:
    """A test's inputs as the arguments that a user of stepdistill would state: pictures are files.

    Args:
        inputs: What the test calls its pipeline with.
        folder: Where the files of pictures are written.
        lists: Lists of one picture stay as they are, for pipelines with several adapters.
    """
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in SET_BY_TRACING or (value is None and "prompt" in name):
            continue
        single = value[0] if not lists and isinstance(value, (list, tuple)) and len(value) == 1 else value
        image = picture(single) if any(word in name for word in PICTURES) else None
        if image is not None:
            arguments[name] = str(folder / f"{name}.png")
            (image if min(image.size) > 1 else image.resize((16, 16))).save(arguments[name])
        else:
            arguments[name] = list(value) if isinstance(value, tuple) and plain(value) else value
    return arguments


def as_files(arguments: Mapping[str, Any], folder: Path, pictures: bool = True) -> dict[str, Any]:
    """Arguments as a recipe states them: pictures, tensors and lists of them are files.

    Args:
        arguments: Of :func:`arguments_of`.
        folder: Where the files are written.
        pictures: Tensors of pictures are pictures, not tensors.
    """

    def stated(value: Any, name: str) -> Any:
        if dataclasses.is_dataclass(value):
            return {
                one.name: stated(getattr(value, one.name), f"{name}_{one.name}") for one in dataclasses.fields(value)
            }
        if plain(value):
            return list(value) if isinstance(value, tuple) else value
        if isinstance(value, (list, tuple)):
            return [stated(one, f"{name}_{place}") for place, one in enumerate(value)]
        flat = value[..., None] if isinstance(value, np.ndarray) and value.ndim == 2 else value
        image = picture(flat) if pictures and any(word in name for word in (*PICTURES, "video")) else None
        if image is None:
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                return value
            file = folder / f"{name}.npy"
            np.save(file, np.asarray(value))
            return str(file)
        file = folder / f"{name}.png"
        image.save(file)
        return str(file)

    return {name: stated(value, name) for name, value in arguments.items()}


def kind_of(folder: str, pipeline: str, inputs: Mapping[str, Any]) -> str:
    """What a pipeline makes of what, as the page groups them.

    Args:
        folder: The folder of its tests.
        pipeline: Its class.
        inputs: What its test calls it with.
    """
    if folder in AUDIO:
        return "audio"
    if folder in OTHER:
        return "other"
    if folder in EDITING:
        return "image-conditioned"
    video = folder in VIDEO or "Video" in pipeline
    if folder == "kandinsky5" and not {"num_frames", "video"} & set(inputs):
        video = False
    if any(conditions(name, value) for name, value in inputs.items()):
        return "image-to-video" if video else "image-conditioned"
    if video:
        return "text-to-video"
    return "text-to-image" if "prompt" in inputs else "classes or none"


def conditions(name: str, value: Any) -> bool:
    """Whether an input is a picture, or a tensor or array that stands for one."""
    first = value[0] if isinstance(value, (list, tuple)) and len(value) else value
    if picture(first) is not None:
        return True
    named = any(word in name for word in CONDITIONS)
    return named and isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 1
