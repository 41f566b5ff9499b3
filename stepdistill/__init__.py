"""Distil a diffusers pipeline to 1-8 steps without guidance, in stock format, with numbers that prove it.

    import stepdistill
    run = stepdistill.train("recipes/quickstart.yaml", ["output=runs/mine"])
    stepdistill.export(run.folder, "my-pipeline")
    stepdistill.sample("my-pipeline", steps=4, out="grid.png")

The verbs are those of the command line: train, export, sample, edit, bench, inspect. ``attach`` puts a guidance
adapter, what some methods export, onto any pipeline with the denoiser it was trained for.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Imported on first use: each needs torch and diffusers, which take seconds that `stepdistill --help` should not.
_VERBS = {
    "train": "stepdistill.trainer",
    "export": "stepdistill.exporting.export",
    "sample": "stepdistill.generation.sampling",
    "bench": "stepdistill.bench",
    "inspect": "stepdistill.generation.sampling",
    "attach": "stepdistill.exporting.attach",
    "edit": "stepdistill.generation.editing",
}

__all__ = ["attach", "bench", "edit", "export", "inspect", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'stepdistill' has no attribute '{name}'")
    return getattr(importlib.import_module(_VERBS[name]), name)


class _Package(ModuleType):
    """This package. Importing the module ``stepdistill.bench`` leaves the name to the verb of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
