"""Tensors that take time to make, kept in a file for the next run that wants the same ones."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def cached(file: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in ``file``; where there are none, or damaged ones, those that ``make`` returns, and the file holds.

    Args:
        file: its name says everything that the tensors depend on; None: keep nothing.
    """
    if file is None:
        return make()
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        tensors = {name: value.cpu().contiguous() for name, value in make().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may make the same file at once.
    draft = file.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, draft)
    draft.replace(file)
    # The file's pages are read when they are needed, and need no memory of the process's own.
    return load_file(file)
