"""A plain folder in diffusers format: loaded whole or with an error, written whole; safetensors only."""

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

from stepdistill.errors import InputError, in_a_line
from stepdistill.pipeline.complete import all_weights_found, check_tokenizers
from stepdistill.pipeline.modular import holds_modular, load_modular, save_modular
from stepdistill.pipeline.stock_call import is_modular
from stepdistill.roles.attach import CONFIG, attach, write_adapter
from stepdistill.roles.guidance_adapters import NAME, fastened

REFUSED = (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, ImportError)
"""What the libraries raise of files that they do not take."""


def load_folder(
    path: str | Path,
    folder: Path,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Literal["nf4", "int8"] | None = None,
) -> DiffusionPipeline:
    """The pipeline in a folder; a guidance adapter there is attached to it.

    Args:
        path: its name in messages.
        folder: in diffusers format.
        variant: of its weights' files, such as "fp16"; None: those with plain names.
        dtype: of all its networks.
        quantize: the denoiser's linear layers.

    Raises:
        InputError: it cannot be loaded that way.
    """
    check_tokenizers(path, folder)
    quantization = None if quantize is None else _quantization(quantize, dtype)
    refusal = f"pipeline {path}: cannot be loaded as a diffusers pipeline"
    with loading(refusal), warnings.catch_warnings(), all_weights_found(path):
        # Newer versions call the argument dtype, and warn; older ones know only this name.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        if holds_modular(folder):
            pipeline = load_modular(folder, dtype, variant, quantization.quant_mapping if quantization else {})
        else:
            options: dict[str, Any] = {} if variant is None else {"variant": variant}
            options |= {} if quantization is None else {"quantization_config": quantization}
            pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **options)
        if quantize is None:
            pipeline.to(dtype)  # what the libraries keep in float32, and buffers
    pipeline.set_progress_bar_config(disable=True)
    pipeline.loaded_from = folder, variant
    return attach(pipeline, folder) if (folder / CONFIG).is_file() else pipeline


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
        reason = in_a_line(error)
        raise InputError(f"teacher.quantize: {how} needs {package} (pip install {package}): {reason}") from error
    # diffusers' two names for the denoiser, and the one for a second that takes turns with it.
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(("unet", "transformer", "transformer_2"), config))


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """A stock pipeline folder, with the class names (id2label) that ``save_pretrained`` forgets.

    A guidance adapter is written beside its network, which is the unguided one to plain diffusers.
    """
    with ExitStack() as stack:
        for name, network in pipeline.components.items():
            stack.enter_context(adapter_apart(name, network, folder))
        if is_modular(pipeline):
            save_modular(pipeline, folder)
        else:
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
def loading(refusal: str) -> Iterator[None]:
    """Inside, quietly, what the libraries raise of files that they do not take is a ``refusal``, with the reason."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except REFUSED as error:
        raise InputError(f"{refusal}: {in_a_line(error)}") from error


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
