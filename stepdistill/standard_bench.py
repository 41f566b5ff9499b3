"""Measure students, their teacher and stock solvers under a standard protocol, in any number of processes.

``accelerate launch`` starts them; each makes whole shards of samples and features of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from stepdistill.distributed import on_cpu
from stepdistill.errors import InputError
from stepdistill.eval.also import also_files, also_labels, check_also, load_also
from stepdistill.eval.pictures import image_grid, shrunk
from stepdistill.eval.report import Report, Row
from stepdistill.eval.row_cache import cache_folder
from stepdistill.eval.shards import SHARD, Shards
from stepdistill.eval.shipped import ShippedReference, ShippedSpec
from stepdistill.eval.standard import (
    PINS,
    FileSpec,
    StandardProtocol,
    load_standard,
    obtain,
)
from stepdistill.eval.standard_measure import RealSide, ViewRows, load_view
from stepdistill.eval.verdict import verdict, verdict_metric
from stepdistill.extras import Extras
from stepdistill.generation.drawing import Sampler
from stepdistill.generation.generate import can_run, set_up
from stepdistill.generation.solvers import solver_runs
from stepdistill.guidance import rule_text, stated_rule
from stepdistill.kernels import Rule
from stepdistill.pipeline.trace import Trace
from stepdistill.real_rows import SHUFFLED, real_images, reconstructions
from stepdistill.sources import (
    Progress,
    Source,
    command_line,
    device_name,
    library_versions,
    read_all,
    training_curves,
)
from stepdistill.standard_rows import StandardBench

PICTURES, WORST = 24, 16


def standard_bench(
    sources: Sequence[str | Path],
    steps: Sequence[int],
    samples: int | None,
    seed: int | None,
    out: str | Path | None,
    *,
    protocol: str | Path,
    data: str | Path = "data",
    offline: bool = False,
    also: Sequence[str] = (),
    solvers: bool = True,
    guidance: float = 1.0,
    batch: int = 16,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """See :func:`stepdistill.bench.bench`; ``samples`` and ``seed`` None are the protocol's.

    Args:
        data: folder of prompts, reference images and network weights. offline: download nothing.
        also: names of :data:`stepdistill.eval.also.ALSO`. batch: images at once, at most 64.
        guidance: of a plain pipeline where the protocol leaves it open.

    Raises:
        InputError: a file is missing or not the pinned one, or a source does not fit the protocol.
    """
    spec, data = load_standard(protocol), Path(data)
    check_also(also)
    if not 1 <= batch <= SHARD:
        raise InputError(f"batch: expected a number from 1 to {SHARD}, found {batch}")
    found = read_all([sources] if isinstance(sources, str | Path) else sources)
    processes = PartialState(cpu=on_cpu(), timeout=timedelta(days=1))  # one process measures while the others wait
    files = [*_files(spec), *also_files(also)]
    with processes.main_process_first():
        hashes = obtain(files, data, offline=offline)
    where = torch.device(device or processes.device)
    state = StandardBench(
        protocol=spec,
        data=data,
        offline=offline,
        cache=Path(cache) if cache else cache_folder(),
        samples=samples or spec.samples,
        seed=spec.seed if seed is None else seed,
        batch=batch,
        processes=processes,
        device=where,
        progress=progress if processes.is_main_process else None,
        hashes=hashes,
        networks={name: load_view(view, data, where) for name, view in spec.views.items()},
        extras=Extras({name: load_also(name, data, where) for name in also}),
    )
    report = Report(
        protocol=spec.id,
        seed=state.seed,
        command=command_line(),
        versions=library_versions(),
        device=f"{device_name(where)}{f' × {n}' if (n := processes.num_processes) > 1 else ''}",
        floor={},
        rows=[],
        labels=spec.labels(state.samples) | also_labels(also),
        files=state.hashes,
    )
    for source in found:
        _measure_source(state, report, source, sorted(set(steps)), guidance, solvers)
    prompts = [spec.prompts] if spec.prompts and spec.prompts.file in state.hashes else []
    if unstated := sorted({file.file for file in (*files, *prompts) if file.open}):
        report.remarks.append(
            f"No publisher states the SHA-256 of {', '.join(unstated)}: {data / PINS} keeps what the first run found. "
            "Compare with other people's numbers only where their report.json states the same."
        )
    if out is not None and processes.is_main_process:
        report.training = training_curves(found)
        report.write(out)
    return report


def _files(spec: StandardProtocol) -> list[FileSpec | ShippedSpec]:
    """What is needed whatever the pipelines are."""
    prompts = [spec.prompts] if spec.prompts and spec.conditions == "prompts" else []
    views = [file for view in spec.views.values() for file in view.files]
    return [*prompts, *([spec.reference] if spec.reference else []), *views]


def _measure_source(
    state: StandardBench, report: Report, source: Source, steps: Sequence[int], guidance: float, with_solvers: bool
) -> None:
    """Add a source's rows, pictures and verdict to the report: the teacher first, as students may be measured by it."""
    facts, protocol = source.facts, state.protocol
    stated = protocol.teacher.guidance
    if facts is None:
        name, path, revision, rule = source.label, source.pipeline, None, Rule()
        scale = guidance if stated is None else stated
    else:
        name, path, revision = Path(facts["teacher"]).name, facts["teacher"], facts.get("revision")
        scale = float(facts["guidance"]) if stated is None else stated
        rule = stated_rule(facts) if stated is None else Rule()
    real = {view: state.reference(view) for view in protocol.views} if protocol.reference else None
    like = None if facts is None else source.pipeline
    teacher = state.sampler(name, "teacher", path, protocol.teacher.steps, scale, revision, rule, like=like)
    kind, guided = type(teacher.trace.pipeline).__name__, teacher.trace.guidance
    if guided.kind == "embedded":
        report.remarks.append(f"{name}: {kind} takes its guidance as an input of its network, here {guided.scale:g}.")
    elif teacher.guidance != scale:
        report.remarks.append(f"{name}: {kind} has no guidance of w = {scale:g} outside its network; it runs without.")
    stated = guided.scale if guided.kind == "embedded" else teacher.guidance
    teacher = replace(teacher, name=f"{name} w={stated:g}{rule_text(rule)}")
    if isinstance(protocol.reference, ShippedReference):
        _bounds(state, report, teacher, name, real)
    teacher_row, views = _add(state, report, teacher, real, None)
    _show(state, report, teacher, teacher_row, views)
    if real is None:
        real = {
            name: RealSide(view.samples.moments(), lambda view=view: view.samples.all("rows"))
            for name, view in views.items()
        }
    trained, folder = max(steps) if facts is None else int(facts["steps"]), state.folder(teacher)
    samplers = _solvers(report, teacher, nfe=trained) if with_solvers else []
    stock = [(sampler, *_add(state, report, sampler, real, folder)) for sampler in samplers]
    metric = verdict_metric(report.labels)
    if best := min(stock, key=lambda one: one[1].metrics.get(metric, math.inf), default=None):
        _show(state, report, *best)
    solver_rows = [row for _, row, _ in stock]
    if facts is None:
        return
    del teacher, samplers, stock, best  # the teacher's weights are not needed beside the student's
    scale = float(facts["guidance"])
    student = state.sampler(source.label, "student", source.pipeline, trained, 1.0, inside=scale)
    steps, remark = runnable(source.label, student.trace, sorted({*steps, trained}), trained)
    report.remarks += remark
    for number in steps:
        sampler = replace(student, steps=number)
        row, views = _add(state, report, sampler, real, folder)
        _show(state, report, sampler, row, views)
        if number == trained and protocol.reference:
            conclusion = verdict(row, teacher_row, solver_rows, report.labels)
            report.verdict += [conclusion] if conclusion else []


def runnable(label: str, trace: Trace, steps: Sequence[int], trained: int) -> tuple[list[int], list[str]]:
    """(the numbers of steps that a student can run, a remark on those that it cannot)."""
    able = [number for number in steps if number == trained or can_run(trace, number)]
    if not (rest := [str(number) for number in steps if number not in able]):
        return able, []
    made = f"its {type(trace.pipeline.scheduler).__name__} was made for {trained}"
    return able, [f"{label}: no row at {' and '.join(rest)} steps; {made} and takes no more."]


def _bounds(state: StandardBench, report: Report, teacher: Sampler, name: str, real: dict[str, RealSide]) -> None:
    """Put what real images score into the report, and what is left of them by the teacher's autoencoder."""
    report.floor, report.controls[SHUFFLED] = real_images(state, real)
    if seen := reconstructions(state, teacher, real):
        report.controls[f"real images through {name}'s autoencoder"] = seen


def _solvers(report: Report, teacher: Sampler, nfe: int) -> list[Sampler]:
    """The teacher under stock solvers; the report says which of them its pipeline cannot run under."""
    samplers = []
    for name, solver, steps, scale in solver_runs(teacher.scheduler, teacher.guidance, nfe):
        try:
            set_up(teacher.trace, solver, steps)
        except InputError as error:
            kind = type(teacher.trace.pipeline).__name__
            report.remarks.append(f"No row of {name}: {kind} does not run under {type(solver).__name__}: {error}")
            continue
        samplers.append(replace(teacher, name=name, role="solver", solver=solver, steps=steps, guidance=scale))
    return samplers


def _add(
    state: StandardBench, report: Report, sampler: Sampler, real: dict[str, RealSide] | None, teacher: Path | None
) -> tuple[Row, dict[str, ViewRows]]:
    """Measure a row, and put it into the report unless it is there."""
    row, views = state.measured(sampler, real, teacher)
    if state.processes.is_main_process:
        row.cost, row.machine = state.cost(sampler), report.device
        if not any((kept.name, kept.steps, kept.metrics) == (row.name, row.steps, row.metrics) for kept in report.rows):
            report.rows.append(row)
    return row, views


def _show(state: StandardBench, report: Report, sampler: Sampler, row: Row, views: dict[str, ViewRows]) -> None:
    """Put a row's pictures into the report unless they are there."""
    caption = f"{row.name} · {row.steps} steps, NFE {row.nfe}"
    spread, folder = state.protocol.diversity, state.folder(sampler)
    if not state.processes.is_main_process or any(caption == shown for shown, _ in report.pictures):
        return
    images = Shards(folder / "images", min(SHARD, state.samples)).all("images")[:PICTURES]
    report.pictures.append((caption, image_grid(shrunk(images), columns=8)))
    if row.role != "solver":
        report.worst += _worst(views, Shards(folder / "images", state.samples), caption)
    if spread:
        repeats = state.repeat_shards(sampler).all("images")  # made with the row: no other process is waiting here
        several = [p + k * spread.prompts for p in range(min(6, spread.prompts)) for k in range(spread.images)]
        report.strips.append((caption, image_grid(shrunk(repeats[several]), columns=spread.images)))


def _worst(views: dict[str, ViewRows], images: Shards, caption: str) -> list[tuple[str, Image.Image]]:
    """The images least like their prompts by CLIP, or else farthest from the mean of the real ones, worst first."""
    for view in views.values():
        blocks, mean = view.samples.blocks("rows"), view.real.moments and view.real.moments.mean
        if view.texts is not None:
            texts = view.texts.split(SHARD)
            badness = [-torch.cosine_similarity(*pair) for pair in zip(blocks, texts, strict=True)]
            why = "least like their prompts"
        elif mean is not None:
            badness = [(rows - mean).square().sum(1) for rows in blocks]
            why = "farthest from the mean of the real ones"
        else:
            continue
        worst = torch.cat(badness).argsort(descending=True)[:WORST].tolist()
        shown = [images.read(images.ranges[i // SHARD])["images"][i % SHARD] for i in worst]
        return [(f"{caption} · {why}", image_grid(shrunk(torch.stack(shown)), columns=8))]
    return []
