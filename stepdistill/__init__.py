"""Distil a diffusers pipeline to 1-8 steps without guidance, in stock format, with numbers that prove it.

    import stepdistill
    run = stepdistill.train("recipes/quickstart.yaml", ["output=runs/mine"])
    stepdistill.export(run.folder, "my-pipeline")
    stepdistill.sample("my-pipeline", steps=4, out="grid.png")

The verbs are those of the command line: train, encode, export, join, sample, edit, bench, inspect. ``attach`` puts a
guidance adapter, what some methods export, onto any pipeline with the denoiser it was trained for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use: each needs torch and diffusers, which take seconds that `stepdistill --help` should not.
_VERBS = {
    "train": "stepdistill.run",
    "encode": "stepdistill.run",
    "export": "stepdistill.exporting.export",
    "join": "stepdistill.exporting.join",
    "sample": "stepdistill.sampling.sample",
    "bench": "stepdistill.eval.bench.run",
    "inspect": "stepdistill.sampling.sample",
    "attach": "stepdistill.roles.attach",
    "edit": "stepdistill.sampling.editing",
}

__all__ = ["attach", "bench", "edit", "encode", "export", "inspect", "join", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'stepdistill' has no attribute '{name}'")
    return getattr(importlib.import_module(_VERBS[name]), name)
