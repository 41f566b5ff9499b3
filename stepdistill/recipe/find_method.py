"""A recipe's method by its name: one of the package's, or a class in a file of the user's."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError, found, suggest
from stepdistill.progress import say


def find_method(name: str, safe: bool = False) -> Any:
    """The method of that name, or the class in ``FILE.py:CLASS``, whose code is run; a log line says so first.

    Raises:
        InputError: there is none, or it is code and ``safe`` forbids that.
    """
    # Methods import torch: a recipe with a spelling error must not wait for it.
    from stepdistill.methods import METHODS
    from stepdistill.methods.base import DistillMethod

    if ".py:" not in name:
        if name not in METHODS:
            known = f"one of {', '.join(METHODS)} or FILE.py:CLASS"
            raise InputError(f"expected {known}, found {found(name)}{suggest(name, METHODS)}")
        return METHODS[name]
    if safe:
        raise InputError(f"expected a method of this package, found Python code ({found(name)}), which safe forbids")
    file, _, class_name = name.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"expected FILE.py:CLASS, found no file {file}")
    module = _module(Path(file).resolve(), Path(file).stat().st_mtime_ns)
    method = getattr(module, class_name, None)
    if not (isinstance(method, type) and issubclass(method, DistillMethod)):
        raise InputError(f"expected {class_name} in {file} to be a subclass of DistillMethod, found {found(method)}")
    return method


@cache
def _module(file: Path, changed: int) -> Any:
    """The user's file as a module, loaded once for each change, so that its classes keep their identity."""
    spec = importlib.util.spec_from_file_location(f"stepdistill_method_{file.stem}_{changed}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations there
    say(f"the recipe names Python code, which runs now: {file}")
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return module
