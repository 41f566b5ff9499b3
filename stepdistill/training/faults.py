"""Turn out-of-memory, disk and non-finite errors into one-line messages that say what was saved."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from stepdistill.diffusion.devices import best_device, torch_of
from stepdistill.errors import InputError, RunError
from stepdistill.recipe import Recipe, yaml_lines
from stepdistill.recipe.memory import savings
from stepdistill.training import checkpoint
from stepdistill.training.finite import NonFiniteError
from stepdistill.training.layout import RunFolder

# Of torch on CUDA, of its CPU allocator, and of cuBLAS.
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_NUMBER = re.compile(r"os error (\d+)")


@contextmanager
def explained(folder: Path, recipe: Recipe, saved: str | None = None) -> Iterator[None]:
    """Inside, an error that stops the run in ``folder`` says its cause, what was saved, and how to resume.

    Args:
        saved: what was saved; None: the last checkpoint.

    Raises:
        RunError: in the place of errors of memory and disk.
        NonFiniteError: with the newest checkpoint in its message.
    """
    try:
        yield
    except (InputError, RunError) as error:
        if isinstance(error, NonFiniteError):
            raise NonFiniteError(f"{error}; {_saved(folder)}") from error
        raise
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(str(error)):
            raise RunError(f"out of memory; {saved or _saved(folder)}; {_advice(folder, recipe)}") from error
        if problem := _disk_problem(error, folder):
            raise RunError(f"{problem}; {saved or _saved(folder)}") from error
        raise


def _disk_problem(error: Exception, folder: Path) -> str | None:
    """ "No space left on device: PATH"; None where it is something else. safetensors has the number in its text."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"{error.strerror}: {error.filename or folder}"
    if isinstance(error, SafetensorError) and _NUMBER.search(str(error)):
        return f"{error}: {folder}"
    return None


def _saved(folder: Path) -> str:
    run = RunFolder(folder)
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        return "no checkpoint was saved"
    return f"the last checkpoint is whole: stepdistill train {run.recipe} resumes from {newest.name}"


def _advice(folder: Path, recipe: Recipe) -> str:
    """What ``stepdistill plan --fit`` would change, in the order in which it would."""
    changes = [f"{key}={yaml_lines.scalar(value)} ({effect})" for key, value, effect in savings(recipe)]
    if not changes:
        return "the recipe has no option left that saves memory: use a larger device or a smaller train.batch_size"
    device = best_device()
    gib = torch_of(device).get_device_properties(0).total_memory // 2**30 if device.type != "cpu" else "GIB"
    command = f"stepdistill plan {RunFolder(folder).recipe} --gpu {gib} --fit"
    return f"{command} sets as many of these as needed: {', '.join(changes)}"
