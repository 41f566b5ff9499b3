"""From a run to a stock few-step pipeline folder, verified by reloading it, with a model card."""

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import checkpoint
from stepdistill.adapters import plain_network
from stepdistill.errors import InputError
from stepdistill.eval.row_cache import cache_folder
from stepdistill.guidance_adapters import fastened
from stepdistill.pipeline.card import model_card
from stepdistill.pipeline.generate import call_pipeline, last_latents
from stepdistill.pipeline.load import load_pipeline, save_pipeline
from stepdistill.progress import say
from stepdistill.recipe import Recipe, load
from stepdistill.session import Session, build, newest_checkpoint

FACTS = "stepdistill.json"
TOLERANCE = 1e-5
CHECKED = 4


class ExportError(RuntimeError):
    """The reloaded pipeline does not repeat the training-time sampler; nothing was left behind."""


@dataclass(frozen=True)
class ExportResult:
    """The exported folder, and the largest relative difference to the training-time sampler."""

    folder: Path
    max_error: float


def export(run: str | Path, out: str | Path) -> ExportResult:
    """Write the student of ``run`` as a stock pipeline into ``out``; a guidance adapter lies beside its network.

    The folder appears whole or not at all: it is written beside ``out``, reloaded with plain diffusers, run
    with ``num_inference_steps = n`` without guidance, compared with the training-time sampler, and renamed.

    Raises:
        InputError: ``run`` has no checkpoint, or ``out`` is something else than an earlier export.
        ExportError: the reloaded pipeline differs by more than 1e-5.
    """
    run, out = Path(run), Path(out)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: expected a run folder with a recipe.yaml, found none")
    if out.exists() and not (out / FACTS).is_file():
        raise InputError(f"{out}: exists and is not an export of stepdistill; choose another folder")
    recipe = load(run / "recipe.yaml")
    path = newest_checkpoint(run, say)
    session = build(recipe, torch.device("cpu"), cache=cache_folder(), with_data=False)
    step = load_student(session, path)
    pipeline = session.trace.pipeline
    setattr(pipeline, session.trace.component, plain_network(session.method.roles.student.network))
    pipeline.register_modules(scheduler=session.sampler.scheduler)
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    save_pipeline(pipeline, draft)
    for role in session.method.exported:
        plain_network(getattr(session.method.roles, role).network).save_pretrained(draft / role)
    facts = _facts(recipe, session, step)
    (draft / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    error = verify(draft, session)
    if not error <= TOLERANCE:
        shutil.rmtree(draft)
        raise ExportError(
            f"{out}: the reloaded pipeline differs from the training-time sampler by {error:.2e} "
            f"(allowed {TOLERANCE:.0e}); the stock call of this pipeline does not run sampler {session.sampler.name}"
        )
    (draft / "README.md").write_text(model_card(facts, session.trace, error), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.replace(draft, out)
    return ExportResult(out, error)


def load_student(session: Session, path: Path) -> int:
    """Put the weights to be exported into the student: the moving average if the run kept one. Returns the step."""
    step = checkpoint.verify(path)
    average = path / "student.average.safetensors"
    source = average if average.is_file() else path / "student.safetensors"
    roles = session.method.roles
    checkpoint.copy_parameters(source, dict(roles.student.network.named_parameters()))
    for name in session.method.exported:
        checkpoint.copy_parameters(path / f"{name}.safetensors", dict(getattr(roles, name).network.named_parameters()))
    return step


@torch.no_grad()
def verify(folder: Path, session: Session) -> float:
    """Largest difference between a plain call of the pipeline in ``folder`` and the training-time sampler.

    Relative to the largest value of the samples; both sides draw from the same global random numbers.
    """
    pipeline = load_pipeline(folder)
    rows = torch.arange(CHECKED) % len(session.conditioning)
    entries = [session.conditioning.entries[i] for i in rows.tolist()]
    torch.manual_seed(0)
    stock = last_latents(pipeline, lambda: call_pipeline(pipeline, entries, steps=session.sampler.steps, guidance=1.0))
    cond, _ = session.conditioning.batch(rows)
    student = session.method.roles.student
    torch.manual_seed(0)
    noise = torch.randn(CHECKED, *session.trace.latent_shape)
    ours = session.sampler.sample(lambda x, t: student(x, t, cond), noise)
    return _relative(stock, ours)


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


def _facts(recipe: Recipe, session: Session, step: int) -> dict[str, Any]:
    """What a report or a later run needs to know about this student."""
    return {
        "schema": 1,
        "teacher": recipe.teacher.pipeline,
        "revision": recipe.teacher.revision,
        "guidance": recipe.teacher.guidance.scale,
        "method": recipe.method.name,
        "steps": recipe.student.steps,
        "sampler": session.sampler.name,
        "trained_steps": step,
        "adapter": fastened(getattr(session.trace.pipeline, session.trace.component)) is not None,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("stepdistill", "torch", "diffusers")},
    }
