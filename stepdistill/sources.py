"""What a user may name to be measured, and the facts about this machine that a report states."""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stepdistill.errors import InputError
from stepdistill.eval.pictures import training_plot
from stepdistill.pipeline.load import is_export
from stepdistill.text_files import read_json

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, images done, images in all)."""


@dataclass(frozen=True)
class Source:
    """What the user named: a run, an export or a plain pipeline. ``facts`` is the export's stepdistill.json."""

    label: str
    pipeline: str
    facts: dict[str, Any] | None = None
    run: Path | None = None


def read_source(path: str | Path) -> Source:
    """A run folder, an exported pipeline or any pipeline, as the user named it.

    Raises:
        InputError: it is a run without an export, or an export with a damaged stepdistill.json.
    """
    folder = Path(path)
    run = folder if (folder / "recipe.yaml").is_file() else None
    pipeline = folder / "export" if run else folder
    if run and not is_export(pipeline):
        raise InputError(f"{run}: the run has no export/ yet; finish it, or run stepdistill export {run} {pipeline}")
    facts = _facts(pipeline / "stepdistill.json")
    label = folder.name if folder.name != "export" else folder.resolve().parent.name
    if facts is not None:
        label = f"{label} ({facts['method']})"
    return Source(label, str(pipeline if run else path), facts, run)


def _facts(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    facts, kinds = read_json(path), {"teacher": str, "guidance": int | float, "method": str, "steps": int}
    missing = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    if missing:
        raise InputError(
            f"{path}: expected the keys teacher, guidance, method and steps, {', '.join(missing)} missing or wrong"
        )
    return facts


def read_all(sources: Sequence[str | Path]) -> list[Source]:
    """All sources; those of one label are numbered."""
    found = [read_source(path) for path in sources]
    labels = [source.label for source in found]
    return [
        replace(source, label=f"{source.label} [{index + 1}]") if labels.count(source.label) > 1 else source
        for index, source in enumerate(found)
    ]


def check_numbers(sources: Sequence[str | Path], steps: Sequence[int], samples: int | None) -> None:
    """Raises InputError unless there is a source and every number is in range."""
    if not sources:
        raise InputError("bench: expected at least one run or pipeline, found none")
    if not steps or min(steps) < 1:
        raise InputError(f"steps: expected numbers of at least 1, found {list(steps)}")
    if samples is not None and samples < 2:
        raise InputError(f"samples: expected at least 2, found {samples}")


def training_curves(sources: Sequence[Source]) -> list[tuple[str, Image.Image]]:
    """(label, losses, gradient norms and drift) of every run, from its metrics.jsonl."""
    curves = []
    for source in sources:
        path = source.run / "metrics.jsonl" if source.run else None
        if path and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            # A kill may have cut the last one short.
            picture = training_plot([json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")])
            curves += [(source.label, picture)] if picture else []
    return curves


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a number may depend on."""
    names = ("stepdistill", "torch", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def command_line() -> str:
    """What was run, without the place of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def device_name(device: torch.device) -> str:
    """A device as people name it: the GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
