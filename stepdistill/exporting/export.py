"""From a run to a stock few-step pipeline folder or LoRA, proven where this package cannot be imported, with a card."""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill import checkpoint
from stepdistill.adapters import AdapterView, plain_network
from stepdistill.denoiser import Denoiser
from stepdistill.errors import InputError, RunError
from stepdistill.eval.row_cache import cache_folder
from stepdistill.evaluation import best_checkpoint
from stepdistill.exporting import stock_call
from stepdistill.exporting.attach import CONFIG as ATTACHED
from stepdistill.exporting.card import model_card
from stepdistill.exporting.copied import holds_half, save_student
from stepdistill.exporting.guidance_embedding import write_embedding
from stepdistill.exporting.lora import Keys, fold_scale, save_lora, why_not_lora
from stepdistill.generation.generate import decode
from stepdistill.guidance_adapters import fastened
from stepdistill.pipeline import ip_adapter
from stepdistill.pipeline.compare import deviation
from stepdistill.pipeline.conditioning import plain_conditions
from stepdistill.pipeline.load import load_pipeline, quiet, source
from stepdistill.pipeline.observe import call_arguments, forked_random
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.recipe import Recipe, load
from stepdistill.run_folder import check_grid
from stepdistill.session import Session, build, newest_checkpoint

FACTS = "stepdistill.json"
TOLERANCE = 1e-5
LEVELS = 2
"""How many of 255 levels a picture may differ by: latents that agree, rounded."""
CHECKED = 4


class ExportError(RunError):
    """The reloaded pipeline does not repeat the training-time sampler; nothing was left behind."""


@dataclass(frozen=True)
class ExportResult:
    """The exported folder, the largest relative difference to the training-time sampler, and "pipeline" or "lora"."""

    folder: Path
    max_error: float
    form: str = "pipeline"


def export(
    run: str | Path,
    out: str | Path,
    fuse: bool | None = None,
    keys: Keys | None = None,
    half: bool | None = None,
    safe: bool = False,
) -> ExportResult:
    """Write the student of ``run`` as a stock pipeline into ``out``; a guidance adapter lies beside its network.

    A LoRA student becomes a folder for ``load_lora_weights`` with its scheduler, unless the pipeline's class loads no
    LoRAs. The folder appears whole or not at all: it is written beside ``out``, loaded by a process that has no
    stepdistill, run with ``num_inference_steps = n`` without guidance, compared with the training-time sampler, and
    renamed.

    Args:
        fuse: a LoRA student as a whole pipeline; None: as the recipe says. keys: names in a LoRA's file, likewise.
        half: the student's weights in float16; None: likewise. What is compared are the rounded weights.
        safe: refuse a run whose recipe names Python code.

    Raises:
        InputError: ``run`` has no checkpoint, ``out`` is something else than an earlier export, or a weight is too
            large for float16.
        ExportError: the reloaded pipeline differs by more than 1e-5.
    """
    run, out = Path(run), Path(out)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: expected a run folder with a recipe.yaml, found none")
    if out.exists() and not (out / FACTS).is_file():
        raise InputError(f"{out}: exists and is not an export of stepdistill; choose another folder")
    recipe = load(run / "recipe.yaml", safe=safe)
    path = best_checkpoint(run) or newest_checkpoint(run, say)
    # The stock pipeline is in float32, and so is what it is compared with.
    plain = {"precision": "fp32", "quantize": None}
    exact = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=plain)})
    session = build(exact, torch.device("cpu"), cache=cache_folder(), with_data=False, prompts=CHECKED)
    check_grid(run, [step.t for step in session.sampler.grid()], session.sampler.scheduler, resumes=True)
    step = load_student(session, path)
    fuse = recipe.export.fuse if fuse is None else fuse
    half = recipe.export.half if half is None else half
    pipeline, component, student = session.trace.pipeline, session.trace.component, session.method.roles.student.network
    pipeline.register_modules(scheduler=session.sampler.scheduler)
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    reason = why_not_lora(pipeline, component, student)
    form = "pipeline" if fuse or reason else "lora"
    if keys == "kohya" and form == "pipeline":
        raise InputError("export.keys: expected 'diffusers' for a student that is exported whole, found 'kohya'")
    adapter = recipe.teacher.ip_adapter
    if form == "lora":
        fold_scale(student)
    if half and (form == "lora" or not isinstance(student, AdapterView)):
        round_to_half(student)
    if form == "lora":
        dtype = torch.float16 if half else torch.float32
        save_lora(pipeline, component, student, draft, keys or recipe.export.keys, dtype)
    else:
        if reason and not fuse and recipe.student.train == "lora":
            say(f"the LoRA student is exported as a whole pipeline: {reason}")
        network = plain_network(student)
        if half and isinstance(student, AdapterView):
            round_to_half(network)
            session.method.roles.student = session.method.roles.student.on(network)
        # A copy: a buffer that is not stored is not to be rounded in what it is compared with.
        setattr(pipeline, component, copy.deepcopy(network).half() if half else network)
        if adapter is not None:
            pipeline.unload_ip_adapter()
        save_student(pipeline, component, draft)
        setattr(pipeline, component, network)
        if adapter is not None:
            ip_adapter.load_ip_adapter(pipeline, adapter)
    write_embedding(student, draft)
    for role in session.method.exported:
        with quiet():
            plain_network(getattr(session.method.roles, role).network).save_pretrained(draft / role)
    facts = _facts(recipe, session, step) | {"form": form}
    (draft / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    error, levels = verify(draft, session, form == "lora")
    allowed = TOLERANCE + session.sampler.rounding
    if not error <= allowed:
        shutil.rmtree(draft)
        raise ExportError(
            f"{out}: the reloaded pipeline differs from the training-time sampler by {error:.2e} "
            f"(allowed {allowed:.0e}); the stock call of this pipeline does not run sampler {session.sampler.name}"
        )
    if levels > LEVELS:
        shutil.rmtree(draft)
        raise ExportError(f"{out}: the reloaded pipeline's pictures differ by {levels} of 255 levels")
    card = model_card(facts, session.trace, error, form == "pipeline" and holds_half(draft))
    (draft / "README.md").write_text(card, encoding="utf-8")
    for path in (*draft.rglob("*"), draft):
        checkpoint.sync(path)
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():  # at no moment is there half of it under its name
        out.rename(replaced)
    draft.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
    return ExportResult(out, error, form)


def load_student(session: Session, path: Path) -> int:
    """Put the weights to be exported into the student: the moving average if the run kept one. Returns the step."""
    step = checkpoint.verify(path)
    average = path / "student.average.safetensors"
    source = average if checkpoint.holds(average) else path / "student.safetensors"
    roles = session.method.roles
    checkpoint.copy_parameters(source, dict(roles.student.network.named_parameters()))
    for name in session.method.exported:
        checkpoint.copy_parameters(path / f"{name}.safetensors", dict(getattr(roles, name).network.named_parameters()))
    return step


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Give every weight the value that float16 has for it, so that what is written is what is compared.

    Raises:
        InputError: one is too large.
    """
    for name, weight in network.named_parameters():
        rounded = weight.half()
        if not rounded.isfinite().all():
            raise InputError(f"export.half: {name} holds {weight.abs().max():.3g}, expected at most 65504")
        weight.copy_(rounded)


@torch.no_grad()
def verify(folder: Path, session: Session, lora: bool = False) -> tuple[float, int]:
    """How far a plain call of what is in ``folder`` is from the training-time sampler.

    Both start from the same noise and draw the same random numbers.

    Returns:
        The largest difference of the latents, relative to their largest value; and that of the pictures in levels of
        255 (0 for a pipeline whose pictures are no tensor).
    """
    traced, recipe, adapter = session.trace, session.recipe, session.recipe.teacher.ip_adapter
    rows = torch.arange(CHECKED) % len(session.conditioning)
    entries = [session.conditioning.entries[i] for i in rows.tolist()]
    request = {
        "pipeline": source(recipe.teacher.pipeline) if lora else str(folder),
        "revision": recipe.teacher.revision if lora else None,
        "variant": recipe.teacher.variant if lora else None,
        "lora": str(folder) if lora else None,
        "scheduler": type(session.sampler.scheduler).__name__,
        "ip_adapter": adapter and ip_adapter.stock_arguments(adapter),
        "ip_adapter_scale": adapter and adapter.scale,
        "call": stock_arguments(traced, entries, session.sampler.steps),
    }
    if (folder / ATTACHED).is_file():  # attaching it takes this package
        stock = stock_call.record(load_pipeline(folder), request["call"])
    else:
        stock = call_elsewhere(request)
    ours = repeated(session, session.method.roles.student, rows, stock)
    error = deviation(stock["latents"], ours)
    if "images" not in stock or not error <= TOLERANCE + session.sampler.rounding:
        return error, 0
    images = stock["images"]
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]  # as decode() does with a video
    pictures = (images.float().clamp(0, 1) * 255).round()
    return error, int((pictures - decode(traced, ours).float()).abs().max())


def stock_arguments(traced: Trace, entries: Sequence[str | int], steps: int, output_type: str = "pt") -> dict[str, Any]:
    """What the exported pipeline is called with."""
    wishes = {"steps": steps, "guidance": traced.guidance.plain_scale, "output_type": output_type}
    return call_arguments(traced.pipeline, entries, traced.arguments, **wishes)


def repeated(session: Session, student: Denoiser, rows: Tensor, stock: Mapping[str, Tensor]) -> Tensor:
    """The latents (len(rows), ...) that the training-time sampler makes of a recorded call's noise and random numbers.

    Args:
        rows: entries of the session's conditioning, those of the call.
        stock: what :func:`stock_call.record` returned.
    """
    traced, steps = session.trace, session.sampler.steps
    if traced.pictures:
        cond = plain_conditions(traced, [session.conditioning.entries[i] for i in rows.tolist()], steps)
    else:
        cond, _ = session.conditioning.batch(rows)
    noise = session.sampler.seen(stock["noise"].to(session.device))
    with forked_random(noise.device):
        (torch.cuda if noise.is_cuda else torch).set_rng_state(stock["random_state"])
        return session.sampler.sample(lambda x, t: student(x, t, cond), noise)


def call_elsewhere(request: dict[str, Any]) -> dict[str, Tensor]:
    """What :mod:`stepdistill.exporting.stock_call` reports, run by a Python that cannot import stepdistill.

    Raises:
        ExportError: the export cannot be loaded or called there.
    """
    # As a string, so that the folder of that file, whose names shadow the standard library's, is not on its path.
    program = Path(stock_call.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "request.json", Path(place) / "result.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-c", program, str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ExportError(f"plain diffusers cannot run the export: {reason}")
        return load_file(answered)


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
        "call_guidance": session.trace.guidance.plain_scale,
        "trained_steps": step,
        "adapter": fastened(getattr(session.trace.pipeline, session.trace.component)) is not None,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("stepdistill", "torch", "diffusers")},
    }
