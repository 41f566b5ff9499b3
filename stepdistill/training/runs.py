"""The runs in a folder, and how each of them stands, read from what they wrote. Without torch."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from stepdistill.errors import InputError
from stepdistill.files import read_json, write_text
from stepdistill.training.layout import RunFolder

DEPTH = 3
"""How many folders down runs are looked for."""
SILENCE = 3600
"""Seconds after which a run on another machine counts as interrupted."""


def heartbeat(folder: Path, step: int | None, phase: str | None = None, doing: str = "") -> None:
    """Write heartbeat.json: the last finished step, what the run is doing, when and in which process.

    Args:
        folder: of the run.
        step: None: the step that the file has.
        phase: preparing, training, exporting, measuring, done, interrupted or failed; None: that of the file.
        doing: the line that the terminal shows.
    """
    file = RunFolder(folder).heartbeat
    if step is None or phase is None:
        before = _beat(RunFolder(folder))
        step, phase = before["step"] if step is None else step, phase or before["phase"]
    facts = {"step": step, "phase": phase, "doing": doing, "time": round(time.time(), 1)}
    write_text(file, json.dumps(facts | {"host": platform.node(), "pid": os.getpid()}) + "\n")


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Args:
        run: its folder.
        method: its name.
        state: running, finished, interrupted (stopped or killed) or failed.
        phase: the last one in heartbeat.json.
        step: the last finished one.
        steps: those of the recipe.
        metric: what ``best`` is: ``evaluation.metric``, or of a run with nothing but a report "ratio", the student's
            distance divided by its teacher's; lower is better.
        best: the best value; None where nothing was measured.
        seconds: since the run's last sign of life.
    """

    run: str
    method: str
    state: str
    phase: str
    step: int
    steps: int
    metric: str | None
    best: float | None
    seconds: float


def runs(folder: Path) -> list[Standing]:
    """Every run in ``folder``, the one with the latest sign of life first.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with runs, found no such folder")
    standings = []
    for path in _found(folder, DEPTH):
        with suppress(InputError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # not a run's recipe
            standings.append(standing(path))
    return sorted(standings, key=lambda one: one.seconds)


def _found(folder: Path, depth: int) -> Iterator[Path]:
    run = RunFolder(folder)
    if run.recipe.is_file() and (run.heartbeat.is_file() or run.has_run):
        yield folder
    elif depth:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            with suppress(OSError):
                yield from _found(inside, depth - 1)


def standing(folder: Path) -> Standing:
    """How the run in ``folder`` stands.

    Raises:
        OSError, ValueError, KeyError, TypeError, yaml.YAMLError: its recipe is none.
    """
    run = RunFolder(folder)
    # libyaml's loader where there is one: a folder may hold many runs.
    recipe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(run.recipe.read_text(encoding="utf-8")).get_single_data()
    beat = _beat(run)
    metric, best = _best(run, recipe)
    return Standing(
        str(folder),
        str(recipe["method"]["name"]),
        _state(beat),
        beat["phase"],
        beat["step"],
        int(recipe["train"]["steps"]),
        metric,
        best,
        round(max(0.0, time.time() - beat["time"]), 1),
    )


def _beat(run: RunFolder) -> dict[str, Any]:
    """The heartbeat; of a run without a readable one what metrics.jsonl says."""
    with suppress(InputError, KeyError, TypeError, ValueError):
        beat = read_json(run.heartbeat)
        return beat | {"step": int(beat["step"]), "phase": str(beat["phase"]), "time": float(beat["time"])}
    step, written = 0, run.recipe
    if run.metrics.is_file():
        written = run.metrics
        for line in reversed(run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
            with suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                step = int(json.loads(line)["step"])
                break
    return {"step": step, "phase": "training", "time": written.stat().st_mtime}


def _state(beat: dict[str, Any]) -> str:
    if beat["phase"] in ("interrupted", "failed"):
        return beat["phase"]
    if beat["phase"] == "done":
        return "finished"
    if beat.get("host") == platform.node():
        return "running" if _lives(beat) else "interrupted"
    return "running" if time.time() - beat["time"] < SILENCE else "interrupted"


def _lives(beat: dict[str, Any]) -> bool:
    """Whether the process of a heartbeat lives, and is not a later one with the same number."""
    try:
        return psutil.Process(beat["pid"]).create_time() <= beat["time"] + 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _best(run: RunFolder, recipe: dict[str, Any]) -> tuple[str | None, float | None]:
    with suppress(InputError, ValueError, TypeError, KeyError):
        return str(recipe["evaluation"]["metric"]), min(float(value) for value in read_json(run.best_values).values())
    with suppress(InputError, ValueError, TypeError, KeyError):
        return "ratio", min(float(entry["ratio"]) for entry in read_json(run.report / "report.json")["verdict"])
    return None, None
