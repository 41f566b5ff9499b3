"""The folder of a run: made, found again, moved aside; which checkpoint a run starts from."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill import checkpoint
from stepdistill.errors import InputError
from stepdistill.progress import say
from stepdistill.recipe import Recipe, load
from stepdistill.text_files import read_json, write_text

GRID = "grid.json"

# Keys that may differ between a run and its resumption without making it another run.
_FREE_KEYS = {
    "train": {
        *("steps", "checkpoint_every", "keep_checkpoints", "preview_every", "log_every", "tracker", "watchdog_minutes"),
        # The same numbers in less memory: what a run that ran out of it goes on with.
        *("accumulation", "gradient_checkpointing"),
    },
    "report": {"samples", "steps", "networks", "solvers"},
    "evaluation": {"every", "keep_best", "patience"},
}


def prepare_folder(folder: Path, recipe: Recipe, safe: bool) -> Path | None:
    """Make the run folder; returns the checkpoint to start from. ``safe``: run no Python code of the run that is there.

    Raises:
        InputError: the folder holds a run of another recipe, or ``resume`` names nothing usable.
    """
    written = folder / "recipe.yaml"
    start = None
    if recipe.resume == "never":
        if _holds_a_run(folder):
            _set_aside(folder)
    elif recipe.resume != "auto":
        start = checkpoint.adopt(_checkpoint_in(Path(recipe.resume)), folder / "checkpoints")
    elif _holds_a_run(folder):
        if different := _difference(load(written, safe=safe), recipe):
            raise InputError(
                f"output: {folder} holds a run of another recipe ({different}); "
                "choose another output, or resume=never to move that run aside"
            )
        start = checkpoint.latest(folder / "checkpoints", say)
    if newer := checkpoint.set_aside(folder / "checkpoints", after=start):
        told = ", ".join(path.name for path in newer)
        say(f"{folder / 'checkpoints'}: newer or damaged ones have other names now, delete them when you like: {told}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Who starts this one again wants it to go on from where it stopped, not from where it started.
        write_text(written, recipe.model_copy(update={"resume": "auto"}).to_yaml())
    except OSError as error:
        raise InputError(f"output: {folder} cannot be written: {error.strerror}") from None
    return start


def check_grid(folder: Path, times: Sequence[float], scheduler: Any, resumes: bool) -> None:
    """Keep the student's times with its run, and hold a resumed or exported run to them.

    Args:
        folder: of the run.
        times: of the student's steps, from noise to data.
        scheduler: the stock scheduler that they are read off.
        resumes: whether the run has taken steps.

    Raises:
        InputError: the run was trained at other times, by an earlier version.
    """
    file, same = folder / GRID, True
    if resumes and file.is_file():
        kept = read_json(file)["times"]
        same = len(kept) == len(times) and all(abs(a - b) < 1e-6 for a, b in zip(kept, times, strict=True))
    elif resumes and (folder / "metrics.jsonl").exists():
        # Versions before this file knew no grid that is stretched to a last time.
        same = not scheduler.config.get("shift_terminal")
    if not same:
        raise InputError(
            f"{folder}: this run was trained by another version of stepdistill, at other times than this version has "
            f"for its recipe ({', '.join(f'{t:.3g}' for t in times)}); finish and export it with that version"
        )
    write_text(file, json.dumps({"times": list(times)}) + "\n")


def _holds_a_run(folder: Path) -> bool:
    """Whether a run took steps there; what a start that failed leaves behind is no run."""
    steps = (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("*"))
    return steps and (folder / "recipe.yaml").exists()


def _set_aside(folder: Path) -> None:
    number = 1
    while (other := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    shutil.move(folder, other)
    say(f"moved the run in {folder} to {other}")


def _checkpoint_in(path: Path) -> Path:
    if (path / checkpoint.MANIFEST).is_file():
        return path
    if found := checkpoint.latest(path / "checkpoints", say):
        return found
    raise InputError(f"resume: expected auto, never, a checkpoint or a run folder with one, found {path}")


def _difference(old: Recipe, new: Recipe) -> str | None:
    """The first key, other than the free ones, in which two recipes differ."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in (name for name in before if name not in ("output", "resume", "distributed", "published")):
        for key in {**before[section], **after[section]}:
            a, b = before[section].get(key), after[section].get(key)
            if a != b and key not in _FREE_KEYS.get(section, ()):
                return f"{section}.{key} is {a!r} there and {b!r} here"
    return None


def keep_lines_before(path: Path, step: int) -> int:
    """Drop the metrics of steps that will be run again, and a line that a kill cut short.

    Returns the evaluations that the last kept line counts.
    """
    if not path.exists():
        return 0
    kept, evaluations = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                kept.append(line)
                evaluations = int(values.get("evaluations", evaluations))
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
    return evaluations
