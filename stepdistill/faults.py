"""What a machine does to a run, said in one line: memory, disk, and numbers that are none."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from stepdistill import checkpoint, yaml_lines
from stepdistill.errors import InputError, RunError
from stepdistill.finite import NonFiniteError
from stepdistill.memory import savings
from stepdistill.recipe import Recipe

# Of torch on CUDA, of its CPU allocator, and of cuBLAS.
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_NUMBER = re.compile(r"os error (\d+)")


@contextmanager
def explained(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Inside, what stops the run in ``folder`` says what was in the way, what is kept, and how to go on.

    Raises:
        RunError: in the place of errors of memory and disk.
        NonFiniteError: with the newest checkpoint in its message.
    """
    try:
        yield
    except (InputError, RunError) as error:
        if isinstance(error, NonFiniteError):
            raise NonFiniteError(f"{error}; {_kept(folder)}") from error
        raise
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(str(error)):
            raise RunError(f"out of memory; {_kept(folder)}; {_advice(folder, recipe)}") from error
        if problem := _disk_problem(error, folder):
            raise RunError(f"{problem}; {_kept(folder)}") from error
        raise


def _disk_problem(error: Exception, folder: Path) -> str | None:
    """ "No space left on device: PATH"; None where it is something else. safetensors has the number in its text."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"{error.strerror}: {error.filename or folder}"
    if isinstance(error, SafetensorError) and _NUMBER.search(str(error)):
        return f"{error}: {folder}"
    return None


def _kept(folder: Path) -> str:
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        return "no checkpoint had been written"
    return f"what was saved is whole: stepdistill train {folder / 'recipe.yaml'} goes on from {newest.name}"


def _advice(folder: Path, recipe: Recipe) -> str:
    """What ``stepdistill plan --fit`` would change, in the order in which it would."""
    changes = [f"{key}={yaml_lines.scalar(value)} ({effect})" for key, value, effect in savings(recipe)]
    if not changes:
        return "nothing in the recipe would take less: it needs a larger device or a smaller train.batch_size"
    gib = torch.cuda.get_device_properties(0).total_memory // 2**30 if torch.cuda.is_available() else "GIB"
    command = f"stepdistill plan {folder / 'recipe.yaml'} --gpu {gib} --fit"
    return f"{command} would take as many of these as it needs: {', '.join(changes)}"
