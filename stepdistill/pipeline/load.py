"""Pipelines from embedded teachers, folders and the hub: safetensors only, no code but diffusers' own."""

import difflib
import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, TorchAoConfig
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.exporting.attach import CONFIG, attach, write_adapter
from stepdistill.exporting.lora import fuse, is_lora, teacher_of
from stepdistill.exporting.stock_call import without_black_pictures
from stepdistill.guidance_adapters import NAME, fastened
from stepdistill.pipeline.complete import all_weights_found, check_tokenizers
from stepdistill.pipeline.hub import download
from stepdistill.pipeline.ip_adapter import load_ip_adapter
from stepdistill.recipe import IPAdapter
from stepdistill.weight_files import SINGLE_FILE, files_in, lacking


def load_pipeline(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Literal["nf4", "int8"] | None = None,
    ip_adapter: IPAdapter | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """A pipeline by the name of an embedded teacher, a local folder or a hub id; safetensors only, no remote code.

    A guidance adapter in a local folder is attached to it, and so is the IP-Adapter that an export was trained with. An
    exported LoRA gives its teacher with the LoRA in the weights and the student's scheduler.

    Args:
        revision: of a hub id.
        dtype: of all its networks.
        quantize: the denoiser's linear layers.
        ip_adapter: loaded into it.
        variant: of its weights' files, such as "fp16"; None: those with plain names.

    Raises:
        InputError: there is none, or it cannot be loaded that way.
    """
    if is_lora(Path(path)):
        if quantize is not None:
            raise InputError("teacher.quantize: expected null for a teacher that is an exported LoRA")
        pipeline = load_pipeline(dtype=dtype, **teacher_of(Path(path)))
        with quiet():
            pipeline = fuse(pipeline, Path(path))
    else:
        pipeline = _stock(path, folder_of(path, revision, variant), variant, dtype, quantize)
    if (ip_adapter := ip_adapter or export_adapter(path)) is not None:
        with quiet():
            load_ip_adapter(pipeline, ip_adapter)
    return pipeline


def folder_of(path: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of the pipeline that :func:`load_pipeline` loads, in the hub's cache for a hub id.

    Raises:
        InputError: there is none, or its weights are not as they should be.
    """
    place = source(path)
    if not Path(place).is_dir():
        with quiet():
            return download(place, revision, variant)
    if (found := lacking(files_in(Path(place)), variant)) is not None:
        key, problem = found
        raise InputError(f"pipeline {path}: {'' if key == 'pipeline' else f'teacher.{key}: '}{problem}")
    return Path(place)


def _stock(
    path: str | Path, folder: Path, variant: str | None, dtype: torch.dtype, quantize: str | None
) -> DiffusionPipeline:
    """The pipeline in ``folder``, whose name is ``path``."""
    check_tokenizers(path, folder)
    options: dict[str, Any] = {} if variant is None else {"variant": variant}
    if quantize is not None:
        options |= {"quantization_config": _quantization(quantize, dtype), "torch_dtype": dtype}
    try:
        with quiet(), warnings.catch_warnings(), all_weights_found(path):
            # Newer versions call the argument dtype, and warn; older ones know only this name.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
            if quantize is None:
                # Not by an argument: its name depends on the version, and half-precision files would come as they are.
                pipeline.to(dtype)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"pipeline {path}: cannot be loaded as a diffusers pipeline: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.loaded_from = folder, variant
    without_black_pictures(pipeline)
    return attach(pipeline, folder) if (folder / CONFIG).is_file() else pipeline


def load_network(kind: type, folder: Path) -> Any:
    """A network of a diffusers class from a folder beside a pipeline's, in float32.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with quiet(), all_weights_found(folder):
            return kind.from_pretrained(folder, use_safetensors=True).float().eval()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be loaded as a {kind.__name__}: {' '.join(str(error).split())}") from error


def _quantization(how: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """diffusers' configuration for the network of any pipeline that generates.

    Raises:
        InputError: the package is missing, or does not work here.
    """
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[how]
    try:
        if how == "nf4":
            importlib.import_module(package)
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            config = TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"teacher.quantize: {how} needs {package} (pip install {package}): {reason}") from error
    # diffusers' two names for what is asked at every step.
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(("unet", "transformer"), config))


def source(path: str | Path) -> str:
    """What diffusers loads for the name of an embedded teacher, a folder or a hub id.

    Raises:
        InputError: it is none of them.
    """
    name = str(path)
    if (Path(name) / "model_index.json").is_file():
        return name
    if name in assets.teachers():
        return str(assets.find(f"teachers/{name}"))
    if Path(name).is_file():
        raise InputError(f"pipeline {name}: {SINGLE_FILE}")
    if Path(name).exists():
        raise InputError(f"pipeline {name}: expected a diffusers folder with model_index.json, found none in it")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        close = difflib.get_close_matches(name, assets.teachers(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        known = ", ".join(assets.teachers()) or "none"
        raise InputError(
            f"pipeline {name}: expected a folder, a hub id or an embedded teacher ({known}), found no such thing{hint}"
        )
    return name


def is_export(folder: Path) -> bool:
    """Whether :func:`load_pipeline` takes ``folder``: a pipeline, or an exported LoRA."""
    return (folder / "model_index.json").is_file() or is_lora(folder)


def export_arguments(folder: str | Path) -> dict[str, Any]:
    """What the student in ``folder`` was trained for: its recipe's teacher.arguments; nothing for other pipelines."""
    return _teacher_section(folder).get("arguments", {})


def export_adapter(folder: str | Path) -> IPAdapter | None:
    """The IP-Adapter that the student in ``folder`` was trained with; None for other pipelines."""
    earlier = _teacher_section(folder).get("ip_adapter")
    return IPAdapter(**earlier) if earlier else None


def export_variant(folder: str | Path | None) -> str | None:
    """The variant of the weights that the teacher of the student in ``folder`` was loaded from; None: plain names."""
    return _teacher_section(folder).get("variant") if folder is not None else None


def _teacher_section(folder: str | Path) -> dict[str, Any]:
    """``teacher`` of the recipe of the export in ``folder``; nothing for other pipelines."""
    facts = Path(folder) / "stepdistill.json"
    if not facts.is_file():
        return {}
    return json.loads(facts.read_text(encoding="utf-8")).get("recipe", {}).get("teacher", {})


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """A stock pipeline folder, with the class names (id2label) that ``save_pretrained`` forgets.

    A guidance adapter is written beside its network, which is the unguided one to plain diffusers.
    """
    with ExitStack() as stack:
        for name, network in pipeline.components.items():
            stack.enter_context(adapter_apart(name, network, folder))
        pipeline.save_pretrained(folder, safe_serialization=True)
    if labels := getattr(pipeline, "labels", None):
        names: dict[str, str] = {}
        for name, number in labels.items():
            names.setdefault(str(number), name)
        index = folder / "model_index.json"
        facts = json.loads(index.read_text(encoding="utf-8")) | {"id2label": names}
        index.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@contextmanager
def adapter_apart(component: str, network: Any, folder: Path) -> Iterator[None]:
    """Inside the block the network is without its guidance adapter, which is written into ``folder``."""
    if (adapter := fastened(network)) is None:
        yield
        return
    del network._modules[NAME]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(adapter, component, network, folder)
        yield
    finally:
        network.add_module(NAME, adapter)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of diffusers and transformers inside the block."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
