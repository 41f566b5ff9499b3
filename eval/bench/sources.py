"""Sources that a user can measure, and the facts about this machine in a report."""

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from stepdistill.diffusion.devices import torch_of
from stepdistill.errors import InputError
from stepdistill.eval.pictures import training_plot
from stepdistill.files import json_lines
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.load import is_export


@dataclass(frozen=True)
class Source:
    """What the user named: a run, an export or a plain pipeline. ``facts`` are the export's."""

    label: str
    pipeline: str
    facts: ExportFacts | None = None
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
    facts = ExportFacts.read(pipeline)
    label = folder.name if folder.name != "export" else folder.resolve().parent.name
    if facts is not None:
        label = f"{label} ({facts.method})"
    return Source(label, str(pipeline if run else path), facts, run)


def read_all(sources: Sequence[str | Path]) -> list[Source]:
    """All sources; those of one label are numbered."""
    all_sources = [read_source(path) for path in sources]
    labels = [source.label for source in all_sources]
    return [
        replace(source, label=f"{source.label} [{index + 1}]") if labels.count(source.label) > 1 else source
        for index, source in enumerate(all_sources)
    ]


def check_numbers(sources: Sequence[str | Path], steps: Sequence[int], samples: int | None) -> None:
    """Raises InputError unless there is a source and every number is in range."""
    if not sources:
        raise InputError("bench: expected at least one run or pipeline, found none")
    if not steps or min(steps) < 1:
        raise InputError(f"steps: expected numbers of at least 1, found {list(steps)}")
    if samples is not None and samples < 2:
        raise InputError(f"samples: expected at least 2, found {samples}")


def training_facts(sources: Sequence[Source]) -> dict[str, dict[str, float]]:
    """What the training of every run took, by the run's label: see :class:`stepdistill.eval.report.Report`."""
    facts = {}
    for source in sources:
        if source.facts is not None and (lines := _metrics(source)):
            seconds = [line["seconds"] for line in lines if "seconds" in line]
            steps = source.facts.trained_steps
            facts[source.label] = {"student_steps": source.facts.steps, "steps": steps}
            if seconds:
                facts[source.label]["seconds"] = round(steps * sum(seconds) / len(seconds), 1)
            facts[source.label]["evaluations"] = max(line.get("evaluations", 0) for line in lines)
    return facts


def training_curves(sources: Sequence[Source]) -> list[tuple[str, Image.Image]]:
    """(label, losses, gradient norms and drift) of every run, from its metrics.jsonl."""
    curves = []
    for source in sources:
        picture = training_plot(_metrics(source))
        curves += [(source.label, picture)] if picture else []
    return curves


def _metrics(source: Source) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    path = source.run / "metrics.jsonl" if source.run else None
    return [] if path is None else json_lines(path)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a number may depend on."""
    names = ("stepdistill", "torch", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def command_line() -> str:
    """What was run, without the place of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def device_name(device: torch.device) -> str:
    """A device as people name it: the GPU's name, or the CPU with its threads."""
    if device.type != "cpu":
        return torch_of(device).get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
