"""Folders of safetensors: of a pipeline's pickled weights, read as tensors alone, and of a checkpoint in one file."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.files import atomic, weight_file
from stepdistill.pipeline.assemble import write_assembled
from stepdistill.pipeline.complete import classes
from stepdistill.pipeline.hub import asking
from stepdistill.pipeline.load import as_teacher
from stepdistill.pipeline.names import source

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def convert(path: str | Path, out: str | Path, revision: str | None = None, config: str | None = None) -> list[str]:
    """Write the pipeline at ``path`` into ``out`` with its pickled weights as safetensors, all else copied.

    Pickles that are no component's weights, or that lie beside safetensors of the same name, are left out.

    Args:
        path: a folder in diffusers format, a hub id, which is downloaded, or a checkpoint file.
        out: a new folder.
        revision: of a hub id.
        config: of a checkpoint file: the folder or hub id of a pipeline with the same configs.

    Returns:
        What was converted, and what was left out, in words.

    Raises:
        InputError: there is no such pipeline, ``out`` exists, or a file holds more than tensors.
    """
    out, place = Path(out), source(path)
    if out.exists():
        raise InputError(f"{out}: expected a folder that does not exist yet")
    if Path(place).is_file():
        with atomic(out) as draft:
            kind = write_assembled(as_teacher(path).model_copy(update={"config": config}), Path(place), draft)
        return [f"{path} -> {kind}"]
    folder = Path(place) if Path(place).is_dir() else _download(place, revision)
    with atomic(out) as draft:
        return _convert(folder, draft, [*classes(folder)])


def _convert(folder: Path, out: Path, names: Sequence[str]) -> list[str]:
    """Write the pipeline in ``folder`` into ``out``; ``names`` are its components. Returns what was done, in words."""
    log = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        pickled = weight_file(file.name) if len(name.parts) == 2 and name.parts[0] in names else None
        if pickled is not None and pickled[0] == "bin":
            if (file.with_name(_safe(file.name))).is_file():
                log.append(f"{name.as_posix()} left out: its safetensors lie beside it")
            elif file.suffix == ".json":
                _convert_index(file, target.with_name(_safe(file.name)))
            else:
                count = _convert_weights(file, target.with_name(_safe(file.name)))
                log.append(f"{name.as_posix()} -> {_safe(file.name)}, {count} tensors")
        elif file.suffix in PICKLES:
            log.append(f"{name.as_posix()} left out: not the weights of a component")
        else:
            shutil.copyfile(file, target)
    return log


def _download(name: str, revision: str | None) -> Path:
    patterns = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.bin", "*/*.safetensors"]
    unused = ["*.fp16*", "*.non_ema*", "*/openvino_*", "*/onnx/*"]
    with asking(name, revision) as cached:
        options = {"allow_patterns": patterns, "ignore_patterns": unused, "local_files_only": cached}
        return Path(snapshot_download(name, revision=revision, **options))


def _safe(name: str) -> str:
    """The name of a pickled file's safetensors: that of pytorch_model.bin is model.safetensors."""
    name = name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name
    return name.replace(".bin", ".safetensors", 1)


def _convert_index(file: Path, target: Path) -> None:
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["weight_map"] = {name: _safe(part) for name, part in facts["weight_map"].items()}
    target.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _convert_weights(file: Path, target: Path) -> int:
    """Returns how many tensors there are."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        problem = "expected pickled tensors alone, which torch.load(weights_only=True) reads"
        raise InputError(f"{file}: {problem}: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{file}: expected a dictionary of tensors, found {type(weights).__name__} with other values")
    stored, seen = {}, set()
    for name, value in weights.items():
        memory = value.untyped_storage()
        # A file of safetensors holds each tensor on its own.
        alone = value.is_contiguous() and memory.nbytes() == value.nbytes and memory.data_ptr() not in seen
        stored[name] = value if alone else value.clone(memory_format=torch.contiguous_format)
        seen.add(memory.data_ptr())
    save_file(stored, target, {"format": "pt"})
    return len(stored)
