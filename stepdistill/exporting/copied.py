"""The export of a whole pipeline: what was trained is written, all else is copied from the teacher's folder.

Copied files are the teacher's to the bit, so whatever could load the teacher can load them. What ``save_pretrained``
writes again is in the format of the libraries that are installed here, and earlier ones may not read it. The one thing
that is taken out is where on this machine a component was loaded from.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stepdistill.files import weight_file
from stepdistill.pipeline.complete import classes
from stepdistill.pipeline.folder import adapter_apart, save_pipeline
from stepdistill.pipeline.guiders import guiders, switched_off
from stepdistill.pipeline.modular import holds_modular, write_index

INDEX = "model_index.json"
FOREIGN = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pt", ".pth", ".xml")
"""Endings of weights for other programs and of pickles."""


def save_student(pipeline: Any, trained: Sequence[str], out: Path) -> None:
    """A stock pipeline folder: the trained components, the scheduler and guiders are written, the others copied.

    A pipeline that was not loaded from a folder is written whole.

    Args:
        pipeline: with the trained networks, and the student's scheduler.
        trained: names of these networks.
    """
    loaded_from = getattr(pipeline, "loaded_from", None)
    if loaded_from is None:
        save_pipeline(pipeline, out)
        _switch_off(pipeline, out)
        return
    folder, variant = loaded_from
    out.mkdir(parents=True, exist_ok=True)
    for name in classes(folder):
        if name in (*trained, "scheduler"):
            continue
        # diffusers keeps the further networks of several that are one component (ControlNets) beside the first.
        for place in (folder / name, *folder.glob(f"{name}_[0-9]*")):
            if place.is_dir():
                _copy(place, out / place.name, variant)
    scheduler = pipeline.scheduler
    for name in trained:
        network = getattr(pipeline, name)
        with adapter_apart(name, network, out):
            network.save_pretrained(out / name, safe_serialization=True)
    scheduler.save_pretrained(out / "scheduler")
    _switch_off(pipeline, out)
    if holds_modular(folder):
        write_index(out, folder, {"scheduler": scheduler} | guiders(pipeline))
        return
    shutil.copyfile(folder / INDEX, out / INDEX)
    facts = json.loads((out / INDEX).read_text(encoding="utf-8"))
    if facts["scheduler"] != (entry := ["diffusers", type(scheduler).__name__]):
        text = json.dumps(facts | {"scheduler": entry}, indent=2, ensure_ascii=False)
        (out / INDEX).write_text(text + "\n", encoding="utf-8")


def _switch_off(pipeline: Any, out: Path) -> None:
    """Write the pipeline's guiders anew, for one pass per step."""
    for name, guider in guiders(pipeline).items():
        switched_off(guider).save_pretrained(out / name)


def holds_half(folder: Path) -> bool:
    """Whether some file of a pipeline's folder holds weights in half precision."""
    for path in folder.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(file.get_slice(name).get_dtype() in ("F16", "BF16") for name in file.keys()):  # noqa: SIM118
                return True
    return False


def forget_places(folder: Path) -> None:
    """Take the folders of this machine out of configurations in ``folder``: libraries note where they loaded."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        if "name_or_path" not in text:
            continue
        facts = json.loads(text)
        if (kept := _without_places(facts)) != facts:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(facts: Any) -> Any:
    """A configuration, and those inside it, without names that are folders of some machine and not of the hub."""
    if isinstance(facts, list):
        return [_without_places(one) for one in facts]
    if not isinstance(facts, dict):
        return facts

    def is_place(key: str, value: Any) -> bool:
        absolute = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
        return absolute and key.endswith("name_or_path")

    return {key: _without_places(value) for key, value in facts.items() if not is_place(key, value)}


def _copy(folder: Path, out: Path, variant: str | None) -> None:
    """Copy a component's folder: of its weights those that were loaded, under their plain names."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    kinds = {path: weight_file(path.name) for path in files}
    loaded = ("safetensors", variant if ("safetensors", variant) in kinds.values() else None)
    for path in files:
        if kinds[path] not in (None, loaded) or path.suffix in FOREIGN:
            continue
        place = out / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        if kinds[path] is None or loaded[1] is None:
            shutil.copyfile(path, place)
            continue
        place = place.with_name(_plain(path.name, loaded[1]))
        if path.suffix == ".json":  # it names the files
            facts = json.loads(path.read_text(encoding="utf-8"))
            facts["weight_map"] = {name: _plain(file, loaded[1]) for name, file in facts["weight_map"].items()}
            place.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, place)


def _plain(name: str, variant: str) -> str:
    return name.replace(f".{variant}", "", 1)
