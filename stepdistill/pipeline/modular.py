"""Modular pipelines of diffusers: loaded from a folder and written into one; their call is in :mod:`.stock_call`.

Such a pipeline is made of blocks, and its index, ``modular_model_index.json``, says where each component lies. Here
that is always a folder beside the index that has the component's name. What the blocks would make on their own (a
guider, FLUX.3's scheduler) is listed as well where it is a student's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import nn

from stepdistill.errors import InputError
from stepdistill.files import INDEXES, index_of, read_json, weight_file, write_json
from stepdistill.pipeline.complete import is_foreign
from stepdistill.pipeline.stock_call import is_modular

INDEX = INDEXES[1]


def holds_modular(folder: Path) -> bool:
    """Whether the pipeline in ``folder`` is a modular one."""
    return (index := index_of(folder)) is not None and index.name == INDEX


def loads_modular() -> bool:
    """Whether diffusers loads components from beside an index, whatever place the index names: since 0.42."""
    return [int(number) for number in diffusers.__version__.split(".")[:2]] >= [0, 42]


def load_modular(
    folder: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> Any:
    """The pipeline in a folder with all components that its index lists; no code but the libraries' own.

    Args:
        folder: with modular_model_index.json.
        dtype: of all its networks.
        variant: of the weights' files.
        quantization: configuration by component.
        networks: those that are not read from their files.

    Raises:
        InputError: a component is not in the folder, has no such variant, or is no class of diffusers or transformers.
    """
    if not loads_modular():
        found = diffusers.__version__
        raise InputError(f"pipeline {folder}: a modular pipeline needs diffusers 0.42 or later, found {found}")
    _check_index(folder)
    pipeline = diffusers.ModularPipeline.from_pretrained(str(folder), use_safetensors=True)
    made = dict(networks or {})
    for name in pipeline.pretrained_component_names:
        spec = pipeline.get_component_spec(name)
        if name in made or not (folder / name).is_dir():  # one that it could have: a ControlNet perhaps
            continue
        options: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "subfolder": name, "revision": None}
        options["variant"] = None
        if spec.type_hint is None or issubclass(spec.type_hint, nn.Module):
            weights = [weight_file(path.name) for path in (folder / name).iterdir()]
            if variant is not None and ("safetensors", variant) not in weights:
                raise InputError(f"teacher.variant: expected weights of {variant!r} in all components, {name} has none")
            options["variant"] = variant
            options |= {"torch_dtype": dtype, "use_safetensors": True}
            options |= {"quantization_config": config} if (config := (quantization or {}).get(name)) else {}
        made[name] = spec.load(**options)
    pipeline.register_components(**made)
    return pipeline


def save_modular(pipeline: Any, folder: Path) -> None:
    """Write a modular pipeline whole, with an index that holds wherever the folder is."""
    pipeline.save_pretrained(str(folder), safe_serialization=True, overwrite_modular_index=True)
    # Those that its blocks made on their own it leaves out.
    own = {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance | SchedulerMixin)}
    for name, part in own.items():
        part.save_pretrained(folder / name)
    write_index(folder, folder, own)


def write_index(folder: Path, teacher: Path, components: dict[str, Any]) -> None:
    """Write the index of ``teacher`` into ``folder``, with ``components`` and no place but the folder itself."""
    index = read_json(teacher / INDEX)
    for name, part in components.items():
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__, {"subfolder": name}]
    for name, entry in _placed(index).items():
        kind = entry[:2] if name in components else entry[2].get("type_hint") or entry[:2]
        here = {"pretrained_model_name_or_path": None, "subfolder": name, "variant": None, "revision": None}
        index[name] = [*entry[:2], here | {"type_hint": kind}]
    write_json(folder / INDEX, index)


def name_repository(folder: Path, repository: str) -> None:
    """Have the index of a modular pipeline in ``folder`` say where its components lie once it is uploaded."""
    index = read_json(folder / INDEX)
    for name, entry in _placed(index).items():
        if (folder / name).is_dir():
            entry[2]["pretrained_model_name_or_path"] = repository
    write_json(folder / INDEX, index)


def free_hooks(pipeline: Any) -> None:
    """Send networks that wait on another device back, after a call that was ended; modular pipelines have no such."""
    if not is_modular(pipeline):
        pipeline.maybe_free_model_hooks()


def _check_index(folder: Path) -> None:
    """Every component of the index must be a class of the libraries, and lie in the folder of its name."""
    for name, entry in _placed(read_json(folder / INDEX)).items():
        library = (entry[2].get("type_hint") or entry)[0]
        if is_foreign(library):
            raise InputError(f"{folder / INDEX}: {name}: cannot be loaded: code of {json.dumps(library)}")
        place, below = entry[2].get("pretrained_model_name_or_path"), entry[2].get("subfolder")
        needed = entry[1] is not None or place is not None
        if needed and (below != name or not (folder / name).is_dir()):
            found = "/".join(filter(None, (place, below))) or "nothing"
            raise InputError(f"{folder / INDEX}: {name}: expected the folder {name} beside it, found {found}")


def _placed(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The entries of an index that say where a component lies: (library, class, place)."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 3}
    return {name: entry for name, entry in entries.items() if isinstance(entry[2], dict)}
