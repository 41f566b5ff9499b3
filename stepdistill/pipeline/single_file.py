"""One checkpoint file, as Civitai and most trainers write it, read by diffusers with configs from elsewhere."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from safetensors import SafetensorError, safe_open

from stepdistill import assets
from stepdistill.errors import InputError, in_a_line
from stepdistill.files import files_in, lacking, read_json
from stepdistill.pipeline.complete import (
    all_weights_found,
    check_filled,
    check_tokenizers,
    is_foreign,
    some,
    whole_before_moved,
)
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.folder import loading
from stepdistill.pipeline.hub import FILES, configs
from stepdistill.progress import say

_SCALED = ("scale_weight", "weight_scale", "scaled_fp8")
"""Ends of the names of tensors that fp8 checkpoints hold beside weights that are to be multiplied by them."""


def read_checkpoint(file: Path, config: str | None) -> DiffusionPipeline:
    """The pipeline in a checkpoint file.

    Args:
        config: folder or hub id of a pipeline with the same configs; None: the one that diffusers detects.

    Raises:
        InputError: diffusers does not know what it is, its configs are not at hand, or weights are missing.
    """
    folder = config_folder(file, config)
    kind = _pipeline_class(file, folder)
    check_tokenizers(file, folder)
    if scaled := [name for name in shapes(file) if name.endswith(_SCALED)]:
        raise InputError(
            f"pipeline {file}: expected plain weights, found fp8 with factors beside them ({some(scaled)}), which "
            "diffusers does not read; take the fp16 or bf16 file of the same model"
        )
    refusal = f"pipeline {file}: cannot be read as a {kind.__name__} of {folder}"
    with loading(refusal), all_weights_found(file), whole_before_moved(f"pipeline {file}"):
        pipeline = _read(file, kind, folder, config)
    for name, network in modules(pipeline).items():
        check_filled(f"pipeline {file}", name, network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _read(file: Path, kind: Any, folder: Path, config: str | None) -> Any:
    """``from_single_file``, with components that the file lacks from the folder of the configs."""
    parts: dict[str, Any] = {}
    while True:
        try:
            return kind.from_single_file(str(file), config=str(folder), local_files_only=True, **parts)
        except SingleFileComponentError as error:
            missing = re.search(r"(\w+) = (\w+)\.from_pretrained", str(error))
            if missing is None or missing[1] in parts:
                raise InputError(f"pipeline {file}: {in_a_line(error)}") from error
            name, place = missing[1], folder / missing[1]
            if not any(place.glob("*.safetensors")) and not (config is not None and Path(config).is_dir()):
                say(f"{file}: has no {name}, which is loaded from the hub")
                configs(config or detected(file), patterns=[f"{name}/*.safetensors", f"{name}/*.json"])
            if not any(place.glob("*.safetensors")):
                raise InputError(
                    f"pipeline {file}: has no {name} ({missing[2]}), and there are no weights of it in {place}; name "
                    "the folder of a whole pipeline, with weights, as teacher.config (--config)"
                ) from error
            library, class_name = read_json(folder / "model_index.json")[name]
            loader = getattr(importlib.import_module(library), class_name)
            parts[name] = loader.from_pretrained(place, use_safetensors=True).float()


def config_folder(file: Path, config: str | None) -> Path:
    """The folder of the pipeline whose configs a checkpoint file is read with.

    Raises:
        InputError: there is none, or it cannot be had.
    """
    if config in assets.teachers():
        return assets.find(f"teachers/{config}")
    if config is not None and Path(config).is_dir():
        if not (Path(config) / "model_index.json").is_file():
            raise InputError(f"teacher.config: expected a folder with model_index.json, found none in {config}")
        return Path(config)
    if config is not None:
        if config.count("/") != 1 or config.startswith((".", "/", "~")):
            raise InputError(f"teacher.config: expected the folder of a pipeline or a hub id, found {config}")
        return configs(config)
    name = detected(file)
    try:
        return configs(name)
    except InputError as error:
        patterns = " ".join(f"'{pattern}'" for pattern in FILES)
        raise InputError(
            f"pipeline {file}: diffusers reads it with the configs of {name}, which cannot be had here; name a folder "
            f"of such a pipeline, its .json and .txt files suffice: teacher.config=FOLDER (--config FOLDER), or with a "
            f"network, once: hf download {name} --include {patterns} ({error})"
        ) from error


def detected(file: Path) -> str:
    """The hub id of the pipeline that diffusers takes a checkpoint file for, by the names and shapes of its tensors.

    Raises:
        InputError: it is none that diffusers knows.
    """
    held = {name: torch.empty(shape, device="meta") for name, shape in shapes(file).items()}
    try:
        name = fetch_diffusers_config(held)["pretrained_model_name_or_path"]
    except (UnboundLocalError, KeyError, IndexError):
        name = ""
    # What it does not know it takes for Stable Diffusion 1.
    if not name or (
        name.endswith("/stable-diffusion-v1-5") and not any(key.startswith("model.diffusion_model.") for key in held)
    ):
        raise InputError(
            f"pipeline {file}: expected the checkpoint of a model that diffusers knows, found {len(held)} tensors such "
            f"as {some(sorted(held))}; of another model name its pipeline: teacher.config=FOLDER (--config FOLDER)"
        )
    return name


def shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a file of safetensors, by name; nothing else is read.

    Raises:
        InputError: it is no such file, or is cut short.
    """
    try:
        with safe_open(file, "pt") as held:
            return {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole file of safetensors: {in_a_line(error)}") from None


def _pipeline_class(file: Path, folder: Path) -> Any:
    """The class of the pipeline in ``folder``, whose components are of diffusers and transformers alone."""
    facts = read_json(folder / "model_index.json")
    name = facts.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not hasattr(kind, "from_single_file"):
        raise InputError(f"pipeline {file}: diffusers reads no single files of a {name}, the pipeline in {folder}")
    for part, entry in facts.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if is_foreign(library):
            raise InputError(f"{folder / 'model_index.json'}: {part}: cannot be loaded: code of {json.dumps(library)}")
    if (fault := lacking(files_in(folder))) is not None and fault[0] == "pipeline":
        raise InputError(f"teacher.config: {folder}: {fault[1]}")
    return kind
