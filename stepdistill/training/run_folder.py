"""How the run folder is created, reopened or moved aside, and which checkpoint a run starts from."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.diffusion.routing import Router
from stepdistill.errors import InputError
from stepdistill.files import read_json, write_json, write_text
from stepdistill.progress import say
from stepdistill.recipe import Recipe, load
from stepdistill.training import checkpoint
from stepdistill.training.layout import RunFolder

# Keys that may differ between a run and its resumption without making it another run.
_FREE_KEYS = {
    "data": {"encode"},
    "train": {
        *(
            "steps",
            "checkpoint_every",
            "keep_checkpoints",
            "preview_every",
            "preview_prompts",
            "log_every",
            "tracker",
            "watchdog_minutes",
        ),
        # These change memory and no numbers: a run that ran out of memory may resume with them.
        *("accumulation", "gradient_checkpointing"),
    },
    "report": {"samples", "steps", "networks", "solvers"},
    "evaluation": {"every", "keep_best", "patience"},
}


def newest_checkpoint(run: Path, report: Callable[[str], None] | None = None) -> Path:
    """The newest whole checkpoint of a run, every byte of it read.

    Args:
        report: called with a message for each damaged one that is skipped.

    Raises:
        InputError: the run has none.
    """
    path = checkpoint.latest(RunFolder(run).checkpoints, report, checkpoint.verify)
    if path is None:
        raise InputError(f"{run}: expected a run folder with a checkpoint, found no whole one in checkpoints/")
    return path


def prepare_folder(folder: Path, recipe: Recipe, safe: bool) -> Path | None:
    """Make the run folder; returns the checkpoint to start from. ``safe``: run no Python code of the run that is there.

    Raises:
        InputError: the folder holds a run of another recipe, or ``resume`` names nothing usable.
    """
    run, start = RunFolder(folder), None
    if recipe.resume == "never":
        if run.has_run:
            _set_aside(folder)
    elif recipe.resume != "auto":
        start = checkpoint.adopt(_checkpoint_in(Path(recipe.resume)), run.checkpoints)
    elif run.has_run:
        if different := _difference(load(run.recipe, safe=safe), recipe):
            raise InputError(
                f"output: {folder} holds a run of another recipe ({different}); "
                "choose another output, or resume=never to move that run aside"
            )
        start = checkpoint.latest(run.checkpoints, say, checkpoint.verify)
    if newer := checkpoint.set_aside(run.checkpoints, after=start):
        names = ", ".join(path.name for path in newer)
        say(f"{run.checkpoints}: newer or damaged checkpoints were renamed and can be deleted: {names}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The next start of this recipe resumes where the run stopped, not where it started.
        write_text(run.recipe, recipe.model_copy(update={"resume": "auto"}).to_yaml())
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
    run, same = RunFolder(folder), True
    if resumes and run.grid.is_file():
        stored = read_json(run.grid)["times"]
        same = len(stored) == len(times) and all(abs(a - b) < 1e-6 for a, b in zip(stored, times, strict=True))
    elif resumes and run.metrics.exists():
        # Versions before this file knew no grid that is stretched to a last time.
        same = not scheduler.config.get("shift_terminal")
    if not same:
        raise InputError(
            f"{folder}: this run was trained by another version of stepdistill, at other times than this version has "
            f"for its recipe ({', '.join(f'{t:.3g}' for t in times)}); finish and export it with that version"
        )
    write_text(run.grid, json.dumps({"times": list(times)}) + "\n")


def check_teacher(folder: Path, made_of: Mapping[str, Any], resumes: bool) -> None:
    """Keep what the teacher is made of with its run, and hold a resumed or exported run to it.

    Args:
        folder: of the run.
        made_of: the pipeline's, see :func:`stepdistill.pipeline.assemble.made_of`; empty for a teacher in one folder.
        resumes: whether the run has taken steps.

    Raises:
        InputError: a file has another content than the run's teacher had.
    """
    kept = RunFolder(folder).teacher
    if resumes and kept.is_file():
        before, now = read_json(kept).get("sha256", {}), made_of.get("sha256", {})
        if different := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise InputError(
                f"teacher.{different[0]}: expected the file that the run in {folder} was trained with, found another "
                "content under its name; put the file back, or choose another output"
            )
    if made_of:
        write_json(kept, made_of)


def check_groups(folder: Path, router: Router, resumes: bool) -> None:
    """Keep the groups of ``data.groups`` with their run, and hold a resumed run to them.

    Args:
        folder: of the run.
        router: of the groups as they are now.
        resumes: whether the run has taken steps.

    Raises:
        InputError: they are other ones than the run began with.
    """
    if resumes and RunFolder(folder).router.is_file() and not Router.read(folder).alike(router):
        raise InputError(
            f"data.groups: expected the groups that the run in {folder} began with, found others, as of other "
            "conditions or encoders; put these back, or choose another output"
        )
    router.write(folder)


def _set_aside(folder: Path) -> None:
    number = 1
    while (other := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    shutil.move(folder, other)
    say(f"moved the run in {folder} to {other}")


def _checkpoint_in(path: Path) -> Path:
    if (path / checkpoint.MANIFEST).is_file():
        return path
    if newest := checkpoint.latest(RunFolder(path).checkpoints, say, checkpoint.verify):
        return newest
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
    lines, evaluations = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step:
                lines.append(line)
                evaluations = int(values.get("evaluations", evaluations))
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(f"{line}\n" for line in lines))
    return evaluations
