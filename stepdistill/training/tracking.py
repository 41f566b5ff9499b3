"""Experiment trackers, through accelerate's classes: metrics, preview pictures, and the recipe as configuration.

metrics.jsonl has everything without them, so a tracker that fails in the middle of a run costs a line and not the run.
"""

import importlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from stepdistill.errors import InputError
from stepdistill.files import read_json, write_json
from stepdistill.progress import say
from stepdistill.recipe import Recipe
from stepdistill.training.layout import RunFolder

PROJECT = "stepdistill"
"""The project of every run, where a tracker's own variable (WANDB_PROJECT, ...) names no other."""


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        InputError: what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            package = name.replace("_", "-")
            raise InputError(f"train.tracker: {name} needs its package (pip install {package}), found none")


class Tracking:
    """The trackers of a run, in the process that logs; the end of a ``with`` closes them.

    Args:
        recipe: with the names in ``train.tracker``.
        folder: of the run. TensorBoard's files are in it, and the id under which wandb goes on with a resumed run.
        first: the step at which the run starts or goes on.

    Raises:
        InputError: a tracker does not start: no key, no server.
    """

    def __init__(self, recipe: Recipe, folder: Path, first: int):
        self.trackers: dict[str, GeneralTracker] = {}
        for name in recipe.train.trackers:
            try:
                with redirect_stdout(sys.stderr):  # what they print; stdout is for --json
                    self.trackers[name] = tracker = _tracker(name, RunFolder(folder), resumed=first > 0)
                    tracker.start()
                    if first == 0 or name != "tensorboard":  # which would show it as one more run
                        tracker.store_init_configuration(configuration(recipe))
            except Exception as error:  # a service says what is wrong in exceptions of its own
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise InputError(f"train.tracker: {name} does not start here: {reason}") from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the numbers of a step."""
        self._each("log", step, lambda name, tracker: tracker.log(metrics, step=step))

    def draw(self, picture: Path, step: int) -> None:
        """Log a preview."""

        def draw(name: str, tracker: GeneralTracker) -> None:
            with Image.open(picture) as opened:
                _draw(name, tracker, opened.convert("RGB"), step)

        self._each("draw", step, draw)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each("finish", None, lambda name, tracker: tracker.finish())

    def _each(self, what: str, step: int | None, work: Callable[[str, GeneralTracker], None]) -> None:
        for name, tracker in [*self.trackers.items()]:
            try:
                with redirect_stdout(sys.stderr):
                    work(name, tracker)
            except Exception as error:  # whatever a service raises when it cannot be reached
                del self.trackers[name]
                at = "" if step is None else f" at step {step}"
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                say(f"train.tracker: {name} failed to {what}{at} and gets nothing more: {reason}")


def configuration(recipe: Recipe) -> dict[str, bool | str | float | int | None]:
    """The recipe as one level of dotted keys, lists as JSON: what every tracker takes."""
    flat: dict[str, Any] = {}

    def put(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                put(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = json.dumps(value) if isinstance(value, list) else value

    put("", recipe.model_dump(mode="json"))
    return flat


def _tracker(name: str, run: RunFolder, resumed: bool) -> GeneralTracker:
    kind: Any = LOGGER_TYPE_TO_CLASS[name]  # whose arguments differ
    title = run.path.name
    if name == "tensorboard":
        return kind("tensorboard", run.path)
    if name == "aim":  # one repository for all runs beside each other
        return kind(title, run.path.parent)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return kind(project, name=title, dir=str(run.path), id=_own_id(run), resume="allow")
    if name == "dvclive":
        return kind(dir=str(run.path / "dvclive"))
    titled = {"trackio": {"name": title, "resume": "allow" if resumed else "never"}, "mlflow": {"run_name": title}}
    titled |= {
        "swanlab": {"experiment_name": title, "logdir": str(run.path / "swanlog")},
        "clearml": {"task_name": title},
    }
    return kind(PROJECT, **titled.get(name, {}))


def _draw(name: str, tracker: Any, image: Image.Image, step: int) -> None:
    """Log a picture; where accelerate has no word for it, by the tracker's own."""
    match name:
        case "tensorboard":
            tracker.log_images({"preview": np.asarray(image)[None]}, step=step, dataformats="NHWC")
        case "aim" | "clearml":
            tracker.log_images({"preview": image}, step=step)
        case "mlflow":
            importlib.import_module(name).log_image(image, key="preview", step=step)
        case "trackio":
            tracker.log({"preview": importlib.import_module(name).Image(image)}, step=step)
        case "comet_ml":
            tracker.tracker.log_image(image, name="preview", step=step)
        case "dvclive":  # whose step is that of the metrics before
            tracker.tracker.log_image("preview.png", image)
        case _:
            tracker.log_images({"preview": [image]}, step=step)


def _own_id(run: RunFolder) -> str:
    """The same for each start of a run in this folder."""
    if not run.tracker_id.is_file():
        write_json(run.tracker_id, {"id": uuid.uuid4().hex[:8]})
    return str(read_json(run.tracker_id)["id"])
