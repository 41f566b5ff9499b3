"""From a run to a stock few-step pipeline folder or LoRA, proven where this package cannot be imported, with a card."""

import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from stepdistill.diffusion.devices import best_device
from stepdistill.diffusion.experts import Experts
from stepdistill.errors import InputError
from stepdistill.exporting import check as proof
from stepdistill.exporting import comfyui
from stepdistill.exporting.card import model_card
from stepdistill.exporting.copied import forget_places, holds_half, save_student
from stepdistill.exporting.lora import Keys, fold_scale, save_lora, why_not_lora
from stepdistill.files import atomic, cache_folder
from stepdistill.pipeline import ip_adapter
from stepdistill.pipeline.components import put
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.exports import FACTS, ExportFacts
from stepdistill.pipeline.folder import quiet
from stepdistill.progress import phase, say
from stepdistill.recipe import Recipe, load
from stepdistill.recipe.section import CheckedOn, Export
from stepdistill.roles.guidance_adapters import fastened
from stepdistill.roles.guidance_embedding import write_embedding
from stepdistill.roles.views import AdapterView, adapter_layers, plain_network
from stepdistill.training import checkpoint
from stepdistill.training.evaluation import best_checkpoint
from stepdistill.training.layout import RunFolder
from stepdistill.training.make_method import expert_of
from stepdistill.training.run_folder import check_grid, check_teacher, newest_checkpoint
from stepdistill.training.session import Session, build_without_data, exact_network

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportResult:
    """The exported folder, the largest relative difference to the training-time sampler, and "pipeline" or "lora".

    The difference is None where it was not measured.
    """

    folder: Path
    max_error: float | None
    form: str = "pipeline"


def export(
    run: str | Path,
    out: str | Path,
    fuse: bool | None = None,
    keys: Keys | None = None,
    half: bool | None = None,
    safe: bool = False,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    to: Literal["diffusers", "comfyui"] | None = None,
    check: CheckedOn | None = None,
) -> ExportResult:
    """Write the student of ``run`` as a stock pipeline into ``out``; a guidance adapter lies beside its network.

    A LoRA student becomes a folder for ``load_lora_weights`` with its scheduler, unless the pipeline's class loads no
    LoRAs. The folder appears whole or not at all: it is written beside ``out``, loaded by a process that has no
    stepdistill, run with ``num_inference_steps = n`` without guidance, compared with the training-time sampler, and
    renamed.

    Args:
        fuse: a LoRA student as a whole pipeline; None: as the recipe says.
        keys: names in a LoRA's file; None: as the recipe says.
        half: True is ``dtype="fp16"``.
        safe: refuse a run whose recipe names Python code.
        dtype: of the student's weights; None: as the recipe says. What is compared are the rounded weights.
        to: "comfyui" adds the folder comfyui/: one file for ComfyUI, Forge and kohya's scripts, and a workflow;
            None: as the recipe says.
        check: where the two are compared; None: as the recipe says.

    Raises:
        InputError: ``run`` has no checkpoint, ``out`` is something else than an earlier export, weights are too
            large for float16, or ``to`` is "comfyui" and there is no such file of this student.
        ExportError: the reloaded pipeline differs by more than 1e-5, or bfloat16's rounding on a device.
    """
    run, out = Path(run), Path(out)
    RunFolder(run).check()
    _check_out(out)
    recipe = load(RunFolder(run).recipe, safe=safe)
    path = _best_or_newest(run)
    if half is not None:
        dtype = dtype or ("fp16" if half else "fp32")
    stated = {"fuse": fuse, "keys": keys, "dtype": dtype, "to": to, "check": check}
    settings = recipe.export.model_copy(update={name: value for name, value in stated.items() if value is not None})
    if recipe.student.quantize is not None and settings.dtype != "fp32":
        raise InputError(
            f"export.dtype: expected fp32 for a student in {recipe.student.quantize}, found {settings.dtype}"
        )
    session = _session(recipe, settings)
    check_grid(run, [step.t for step in session.sampler.grid()], session.sampler.scheduler, resumes=True)
    check_teacher(run, session.trace.pipeline.made_of, resumes=True)
    if keys == "kohya" and _form(session, settings.fuse)[0] == "pipeline":
        raise InputError("export.keys: expected 'diffusers' for a student that is exported whole, found 'kohya'")
    if to == "comfyui" and (reason := comfyui.why_not(session.trace, recipe.teacher)):
        raise InputError(f"--to comfyui: {reason}")
    return _export(session, recipe, path, out, settings)


def export_trained(session: Session, run: Path) -> ExportResult:
    """:func:`export` of a run that has just ended, into its folder; in the run's own session where that is exact.

    That is one in float32 on the CPU, with networks that no compiler and no other process has changed.

    Args:
        session: the run's; it is without weights afterwards.

    Raises:
        ExportError: the reloaded pipeline differs by more than 1e-5.
    """
    # As it is written in the run's folder, whose data may be gone by now.
    recipe, out = session.recipe.model_copy(update={"resume": "auto"}), RunFolder(run).export
    teacher = recipe.teacher
    changed = teacher.precision != "fp32" or teacher.quantize or teacher.storage or teacher.offload
    changed = (
        changed
        or recipe.export.check != "cpu"
        or recipe.train.compile
        or recipe.distributed.shard
        or session.device.type != "cpu"
    )
    if changed or recipe.data.arguments:  # whose pictures the session does not keep
        proof.release(session)
        return export(run, out)
    _check_out(out)
    if session.trace.entry == "prompt":
        prompts = session.conditioning.entries[: proof.CHECKED]
        session = session.with_conditions(encode(session.trace, prompts, cache_folder()))
    return _export(session, recipe, _best_or_newest(run), out, recipe.export)


def _check_out(out: Path) -> None:
    if out.exists() and not (out / FACTS).is_file():
        raise InputError(f"{out}: exists and is not an export of stepdistill; choose another folder")


def _best_or_newest(run: Path) -> Path:
    return best_checkpoint(run) or newest_checkpoint(run, say)


def _session(recipe: Recipe, settings: Export) -> Session:
    """The recipe's session without data, with the student alone: what the stock pipeline is compared with.

    Where it is checked on the CPU it is in float32 there; on the device it is in the teacher's precision; without a
    check it is on the CPU in the teacher's precision, which is enough to write the student. Files for other programs
    hold more of the pipeline than the student, and take float32.
    """
    where = settings.check
    plain = {"quantize": None, "storage": None} | ({} if where == "device" else {"offload": None})
    plain |= {"precision": "fp32"} if where == "cpu" or settings.to == "comfyui" else {}
    exact = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=plain)})
    device = best_device() if where == "device" else torch.device("cpu")
    return build_without_data(exact, device, cache_folder(), 1 if where == "off" else proof.CHECKED)


def _export(session: Session, recipe: Recipe, path: Path, out: Path, settings: Export) -> ExportResult:
    """Write, verify, publish.

    Args:
        session: of :func:`_session`.
        recipe: of the run.
        path: the checkpoint.
        settings: the recipe's section ``export``, with the caller's changes.
    """
    phase(f"exporting {path.name}")
    step = load_student(session, path)
    put(session.trace.pipeline, "scheduler", session.sampler.scheduler)
    form, reason = _form(session, settings.fuse)
    if reason and not settings.fuse and recipe.student.train == "lora":
        say(f"the LoRA student is exported as a whole pipeline: {reason}")
    with atomic(out) as draft:
        if form == "lora":
            _write_lora(session, draft, settings)
        else:
            _write_pipeline(session, draft, DTYPES[settings.dtype])
        _write_extras(session, draft)
        forget_places(draft)
        facts = _facts(recipe, session, step, form)
        facts.write(draft)
        half = form == "pipeline" and holds_half(draft)
        others = comfyui.add(session, draft, DTYPES[settings.dtype], facts) if settings.to == "comfyui" else ""
        error = None
        if settings.check == "off":
            say("export.check is off: nobody has called this export yet")
        else:
            phase("checking the export: a process without stepdistill loads and calls it")
            error = proof.check(draft, out, session, form)
        card = model_card(facts, session.trace, error, half, others, proof.precision(session))
        (draft / "README.md").write_text(card, encoding="utf-8")
    return ExportResult(out, error, form)


def _form(session: Session, fuse: bool) -> tuple[Literal["pipeline", "lora"], str | None]:
    """What the student is exported as, and why it cannot be a LoRA."""
    reason = why_not_lora(session.trace, session.method.roles.student.network)
    if session.recipe.teacher.composed:
        reason = reason or "its teacher is in no folder that a LoRA could name, but made of several files or of one"
    return ("pipeline" if fuse or reason else "lora"), reason


def _write_lora(session: Session, folder: Path, settings: Export) -> None:
    student = session.method.roles.student.network
    fold_scale(student)
    dtype = DTYPES[settings.dtype]
    round_to(student, dtype)
    save_lora(session.trace, student, folder, settings.keys, dtype)


def _write_pipeline(session: Session, folder: Path, dtype: torch.dtype) -> None:
    """The student merged into stock networks; the session's student becomes what is written, rounding included.

    One network for all times is written for each of the experts that the pipeline calls.
    """
    pipeline, components, roles = session.trace.pipeline, session.trace.components, session.method.roles
    student, adapter = roles.student.network, session.recipe.teacher.ip_adapter
    merged = isinstance(student, AdapterView)
    if not merged:
        round_to(student, dtype)
    network = _whole(session)
    if merged and dtype != torch.float32:
        round_to(network, dtype)
    if merged and (dtype != torch.float32 or proof.precision(session) != torch.float32):
        roles.student = roles.student.on(network)
    networks = {name: network[name] if isinstance(network, Experts) else network for name in components}
    for name, one in networks.items():
        # A copy: a buffer that is not stored is not to be rounded in what it is compared with.
        with quiet():
            put(pipeline, name, one if dtype == torch.float32 else copy.deepcopy(one).to(dtype))
    if adapter is not None:
        pipeline.unload_ip_adapter()
    save_student(pipeline, components, folder)
    for name, one in networks.items():
        put(pipeline, name, one)
    if adapter is not None:
        ip_adapter.load_ip_adapter(pipeline, adapter)


def _whole(session: Session) -> nn.Module:
    """The student as one plain network; merged into exact weights where the session's backbone is rounded."""
    student = session.method.roles.student.network
    if not isinstance(student, AdapterView) or proof.precision(session) == torch.float32:
        return plain_network(student)
    exact = exact_network(session.recipe, session.trace).float()
    if (end := session.recipe.student.experts) != "each":
        exact = exact[expert_of(session.trace, end)]
    layers = set(adapter_layers(student))
    for name, layer in student.backbone.named_modules():
        if layer in layers:
            weight = exact.get_submodule(name).weight.data
            weight += layer.get_delta_weight(student.adapter).to(weight)
    return exact


def _write_extras(session: Session, folder: Path) -> None:
    """What some methods export beside the student: the embedding of w, an encoder."""
    write_embedding(session.method.roles.student.network, folder)
    for role in session.method.exported:
        with quiet():
            plain_network(getattr(session.method.roles, role).network).save_pretrained(folder / role)


def load_student(session: Session, path: Path) -> int:
    """Put the weights to be exported into the student: the moving average if the run kept one. Returns the step."""
    step = checkpoint.examine(path)  # its bytes were read when it was chosen
    average = path / "student.average.safetensors"
    source = average if checkpoint.holds(average) else path / "student.safetensors"
    roles = session.method.roles
    checkpoint.copy_parameters(source, dict(roles.student.network.named_parameters()))
    for name in session.method.exported:
        checkpoint.copy_parameters(path / f"{name}.safetensors", dict(getattr(roles, name).network.named_parameters()))
    return step


@torch.no_grad()
def round_to(network: nn.Module, dtype: torch.dtype) -> None:
    """Give every value that is written the one that ``dtype`` has for it, so that what is written is what is compared.

    Those are a network's parameters and stored tables; of an adapter's view the adapter's parameters.

    Raises:
        InputError: ``dtype`` has no number as large as some are; they are counted first.
    """
    if dtype == torch.float32:
        return
    values = dict(network.named_parameters())
    if not isinstance(network, AdapterView):
        values |= {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    lost = {name: int((~value.to(dtype).isfinite()).sum()) for name, value in values.items()}
    if total := sum(lost.values()):
        worst = max(lost, key=lambda name: values[name].abs().max() if lost[name] else 0)
        raise InputError(
            f"export.dtype: {total} of {sum(value.numel() for value in values.values())} values are beyond "
            f"{torch.finfo(dtype).max:.6g}, the largest of {dtype}; {worst} holds {values[worst].abs().max():.3g}. "
            "Nothing was written; bf16 has larger ones than fp16"
        )
    for value in values.values():
        value.copy_(value.to(dtype))


def _facts(recipe: Recipe, session: Session, step: int, form: Literal["pipeline", "lora"]) -> ExportFacts:
    """What a report or a later run needs to know about this student."""
    return ExportFacts(
        teacher=recipe.teacher.pipeline,
        revision=recipe.teacher.revision,
        guidance=recipe.teacher.guidance.scale,
        method=recipe.method.name,
        steps=recipe.student.steps,
        sampler=session.sampler.name,
        call_guidance=session.trace.guidance.plain_scale,
        trained_steps=step,
        adapter=fastened(getattr(session.trace.pipeline, session.trace.component)) is not None,
        form=form,
        made_of=session.trace.pipeline.made_of,
        recipe=recipe.model_dump(mode="json"),
        versions={name: version(name) for name in ("stepdistill", "torch", "diffusers")},
    )
