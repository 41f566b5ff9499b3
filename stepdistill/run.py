"""The verb train: a recipe becomes a run folder with checkpoints, an export and a report; and encode, ahead of it."""

import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.data.store import Store
from stepdistill.diffusion.devices import empty_cache
from stepdistill.errors import InputError
from stepdistill.eval.bench.end_of_run import ANY, protocol_of, spread
from stepdistill.eval.bench.run import bench
from stepdistill.eval.protocol import Protocol
from stepdistill.exporting.afterwards import as_html
from stepdistill.exporting.card import fill_in_quality
from stepdistill.exporting.export import export_trained
from stepdistill.exporting.first_call import check_stock_call
from stepdistill.files import cache_folder, write_text
from stepdistill.planning.audit import rehearse
from stepdistill.progress import WorkProgress, phase, quiet, reporting, say
from stepdistill.recipe import Recipe, load
from stepdistill.training.distributed import Processes, join
from stepdistill.training.faults import explained
from stepdistill.training.layout import RunFolder
from stepdistill.training.optimizer import check_optimizers
from stepdistill.training.run_folder import check_grid, check_groups, check_teacher, prepare_folder
from stepdistill.training.runs import heartbeat
from stepdistill.training.selfcheck import check_conventions
from stepdistill.training.session import Session, build, encode_ahead
from stepdistill.training.shard import Shards, share_out
from stepdistill.training.tracking import check_trackers
from stepdistill.training.trainer import Trainer


@dataclass(frozen=True)
class RunResult:
    """What :func:`train` leaves: the run folder, the last finished step, and the report's path if one was made."""

    folder: Path
    step: int
    interrupted: bool = False
    report: Path | None = None

    def _repr_html_(self) -> str:
        return as_html(self.folder)


def train(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), safe: bool = False) -> RunResult:
    """Distil as the recipe says; afterwards export the student and write the report.

    Args:
        recipe: a file, a shipped recipe's name, nested dicts, or a loaded Recipe.
        overrides: ``dotted.key=value``.
        safe: refuse a recipe that names Python code.

    Raises:
        InputError: the recipe, the teacher or the data are not usable; the same folder takes the corrected recipe.
        stepdistill.training.finite.NonFiniteError: training diverged; the last checkpoint is intact.
        RunError: memory or disk ran out; so is it then.
    """
    recipe = load(recipe, overrides, safe)
    folder = Path(recipe.output)
    with explained(folder, recipe), reporting(lambda doing: heartbeat(folder, None, doing=doing)):
        return _train(recipe, safe)


def _train(recipe: Recipe, safe: bool) -> RunResult:
    folder = Path(recipe.output)
    accelerator = join()
    processes = Processes(accelerator)
    if not processes.first:
        quiet()
    processes.share(recipe.train.batch_size, recipe.train.accumulation)
    check_optimizers(recipe.train)
    check_trackers(recipe.train.trackers)
    start = processes.once(lambda: prepare_folder(folder, recipe, safe))
    if processes.first:
        heartbeat(folder, None, "preparing")
    step, report = 0, None
    try:
        shared, shards = recipe.distributed.shard and processes.count > 1, Shards()
        session = build(recipe, accelerator.device, cache_folder(), shared, processes.encoders)
        times = [step.t for step in session.sampler.grid()]
        processes.once(lambda: check_grid(folder, times, session.sampler.scheduler, resumes=start is not None))
        processes.once(lambda: check_teacher(folder, session.trace.pipeline.made_of, resumes=start is not None))
        if (group := session.conditioning.group) is not None:
            processes.once(lambda: check_groups(folder, group.router, resumes=start is not None))
        if start is None:
            phase("checking the pipeline's plain call and the settings")
            # Before networks are sharded: the pipeline's own is called, and weights are measured.
            processes.once(lambda: check_stock_call(session))
            rehearse(recipe, session.method, session.trace.denoiser.kind, len(session.conditioning))
        if shared:
            with session.at(session.size_of(0)):
                shards = share_out(session.method, session.batch(0, 0, 1), accelerator.device)
            session.prepare()
        if start is None:
            phase("checking the teacher's conventions")
            check_conventions(session)
        measured = processes.first and can_report(session)
        step, interrupted = Trainer(session, accelerator, folder, shards).run(start)
        if not interrupted and processes.first:
            heartbeat(folder, step, "exporting")
            export_trained(session, folder)
            entries = session.conditioning.entries
            session = shards = None  # the report needs their memory
            if measured:
                heartbeat(folder, step, "measuring")
                phase("measuring the student beside its teacher")
                report = write_report(folder, recipe, measured, entries)
            heartbeat(folder, step, "done")
    except KeyboardInterrupt:  # outside the loop, which takes signals itself: nothing half done is kept
        interrupted = True
    except BaseException:
        if processes.first:
            with suppress(OSError):  # on a full disk
                heartbeat(folder, None, "failed")
        raise
    if interrupted:
        if processes.first:
            heartbeat(folder, step or None, "interrupted")
        say(f"stopped after step {step}; go on with: stepdistill train {RunFolder(folder).recipe}")
    return RunResult(folder, step, interrupted, report)


def encode(
    recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), safe: bool = False
) -> dict[str, Store]:
    """Fill the stores of conditions and latents that a run of the recipe reads; what is there is verified and kept.

    Args:
        recipe: as for :func:`train`.
        overrides: as for :func:`train`.
        safe: as for :func:`train`.

    Raises:
        InputError: the recipe, the teacher or the data are not usable.
        RunError: memory or disk ran out; all shards so far are whole, and the same call goes on.
    """
    recipe = load(recipe, overrides, safe)
    accelerator = join()
    processes = Processes(accelerator)
    if not processes.first:
        quiet()
    with explained(cache_folder(), recipe, "the shards so far are kept, the same command goes on"):
        return encode_ahead(recipe, accelerator.device, cache_folder(), processes.encoders)


def can_report(session: Session) -> Protocol | None:
    """The protocol of the report at the end; None where none is wanted, or a package is missing: a line says which."""
    recipe = session.recipe
    if not recipe.report.samples:
        return None
    if recipe.data.groups > 1:
        say("no report at the end: the student draws one group of conditions; bench the folder that join writes")
        return None
    try:
        return protocol_of(session.trace, recipe.teacher.pipeline, recipe.report.networks)
    except InputError as error:
        say(f"no report at the end: {error}")
        return None


def write_report(folder: Path, recipe: Recipe, protocol: Protocol, entries: Sequence[str | int]) -> Path | None:
    """Measure the exported student, and put the table on its card; None where that was not possible: a line says why.

    Args:
        protocol: of :func:`can_report`.
        entries: what the run was trained with: prompts or class ids.
    """
    out, settings = RunFolder(folder).report, recipe.report
    samples, remarks = settings.samples, []
    if samples == type(settings).model_fields["samples"].default:
        samples = min(samples, protocol.samples)
    options: dict[str, Any] = {"protocol": protocol.id, "solvers": settings.solvers, "offline": True, "alone": True}
    options["precision"] = recipe.teacher.precision
    if protocol.classes:
        options["networks"] = settings.networks
    if protocol.id == ANY:
        options["data"] = out
        if protocol.conditions == "prompts":
            prompts = [" ".join(str(entry).split()) for entry in entries if str(entry).strip()]
            chosen = spread(prompts, samples)
            write_text(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in chosen))
            remarks.append(
                f"Prompts: {len(chosen)} of the {len(prompts)} that the student was trained with, from all over their "
                "list (prompts.txt beside this report)."
            )
    gc.collect()
    empty_cache()
    try:
        with WorkProgress() as progress:
            report = bench([folder], settings.steps, samples, out=out, remarks=remarks, progress=progress, **options)
    except (InputError, torch.OutOfMemoryError) as error:
        again = f"stepdistill bench {folder} --protocol {protocol.id} --samples {samples} --out {out} --data {out}"
        again += f" --steps {','.join(map(str, settings.steps))}" + ("" if settings.solvers else " --no-solvers")
        say(f"no report: {str(error).splitlines()[0]}; to make it later: {again}")
        return None
    fill_in_quality(RunFolder(folder).export / "README.md", report.to_markdown())
    return out
