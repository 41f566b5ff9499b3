"""Measure students, their teacher, and the teacher under stock fast solvers; one protocol, one report.

The noise of image i depends on (seed, i) alone, so every row of a report sees the same requests and the same noise.
``accelerate launch`` starts several processes; each makes whole shards of samples and features of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler
from stepdistill.eval.bench.real_rows import add_real_images
from stepdistill.eval.bench.rows import Bench, needed, open_bench
from stepdistill.eval.bench.settings import settings_of
from stepdistill.eval.bench.showing import show, side_by_side
from stepdistill.eval.bench.sources import (
    Source,
    check_numbers,
    command_line,
    library_versions,
    read_all,
    training_curves,
    training_facts,
)
from stepdistill.eval.files import PINS
from stepdistill.eval.perceptual import also_files, also_labels
from stepdistill.eval.references import RealSide
from stepdistill.eval.report import Report, Row
from stepdistill.eval.shards import Shards
from stepdistill.eval.verdict import verdict, verdict_metric
from stepdistill.pipeline.set_up import can_run, set_up
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say
from stepdistill.recipe.section import Guidance
from stepdistill.sampling.solvers import solver_runs


def bench(
    sources: Sequence[str | Path],
    steps: Sequence[int] = (1, 2, 4),
    samples: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Report:
    """Measure ``sources`` and write report.json, report.md, index.html and its pictures into ``out``.

    Args:
        sources: run folders, exported pipelines, or any pipeline (folder, embedded teacher, hub id). A student's
            teacher, guidance scale and trained number of steps are read from its export.
        steps: the numbers of steps that students run at; the trained one is always among them.
        samples: images per row; None: what the protocol says.
        options: the fields of :class:`stepdistill.eval.bench.settings.Settings`, such as ``protocol``.

    Raises:
        InputError: an argument is unknown or out of range, a file is missing or not the pinned one, or a source cannot
            be loaded or does not fit the protocol.
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    check_numbers(sources, steps, samples)
    found = read_all(sources)
    state = open_bench(settings_of(options), samples, seed)
    report = _empty_report(state)
    for source in found:
        _Measuring(state, report, source, sorted(set(steps)), pictured=out is not None).run()
    report.rows, report.trained = list(state.rows.values()), training_facts(found)
    report.files = {} if state.protocol.classes else state.hashes
    report.remarks += _open_files(state)
    if out is not None and state.first:
        report.training = training_curves(found)
        report.write(out, state.settings.single_file)
    return report


def _empty_report(state: Bench) -> Report:
    protocol = state.protocol
    labels = {} if protocol.classes else protocol.titles(state.samples) | also_labels(state.settings.also)
    return Report(
        protocol=protocol.id,
        seed=state.seed,
        command=command_line(),
        versions=library_versions(),
        device=state.machine,
        floor={},
        rows=[],
        labels=labels,
        remarks=list(state.settings.remarks),
    )


def _open_files(state: Bench) -> list[str]:
    """A remark on the files whose content nobody states."""
    prompts = state.protocol.prompts
    files = [*needed(state.protocol), *also_files(state.settings.also)]
    files += [prompts] if prompts and prompts.file in state.hashes else []
    if not (unstated := sorted({file.file for file in files if file.open})):
        return []
    return [
        f"No publisher states the SHA-256 of {', '.join(unstated)}: {state.data / PINS} keeps what the first run "
        "found. Compare with other people's numbers only where their report.json states the same."
    ]


@dataclass
class _Measuring:
    """The rows of one source: the teacher first, as students may be measured by it."""

    state: Bench
    report: Report
    source: Source
    steps: Sequence[int]
    pictured: bool
    announced: bool = False

    def run(self) -> None:
        """Add the source's rows, pictures and verdict to the report."""
        state, facts = self.state, self.source.facts
        teacher, name = self._teacher()
        trained = max(self.steps) if facts is None else facts.steps
        solvers = self._solvers(teacher, nfe=trained) if state.settings.solvers else []
        folder = state.folder(teacher)
        passes = 0 if facts is None else sum({*self.steps, trained})
        self._announce([(teacher, None), *((one, folder) for one in solvers)], passes)
        teacher_row = self._row(teacher, state.real)
        add_real_images(state, self.report, teacher, name)
        real = state.real or self._teachers_side(teacher)
        rows = [self._row(solver, real, folder) for solver in solvers]
        drawn = [(teacher_row, self._show(teacher, teacher_row, state.real))]
        if rows:
            metric = verdict_metric(self.report.labels)
            values = [row.metrics.get(metric, math.inf) for row in rows]
            best = state.agreed(values.index(min(values)))  # rows that were just measured are known to rank 0 alone
            drawn.append((rows[best], self._show(solvers[best], rows[best], real)))
        if facts is not None:
            del teacher, solvers  # the teacher's weights are not needed beside the student's
            self._students(folder, drawn, rows, real)

    def _teacher(self) -> tuple[Sampler, str]:
        """The teacher as its row is made, and its pipeline's name."""
        state, source, facts = self.state, self.source, self.source.facts
        stated = state.protocol.teacher.guidance
        if facts is None:
            name, path, revision, combined = source.label, source.pipeline, None, Guidance()
            scale = state.settings.guidance if stated is None else stated
        else:
            name, path, revision = Path(facts.teacher).name, facts.teacher, facts.revision
            scale = facts.guidance if stated is None else stated
            combined = facts.teacher_guidance if stated is None else Guidance()
        teacher = state.sampler(
            path,
            name=name,
            role="teacher",
            steps=state.protocol.teacher.steps,
            guidance=scale,
            revision=revision,
            combined=combined,
            like=None if facts is None else source.pipeline,
        )
        kind, guided = type(teacher.trace.pipeline).__name__, teacher.trace.guidance
        shown = teacher.guidance
        if guided.kind == "embedded":
            shown = guided.scale
            self._remark(f"{name}: {kind} takes its guidance as an input of its network, here {shown:g}.")
        elif teacher.guidance != scale:
            self._remark(f"{name}: {kind} has no guidance of w = {scale:g} outside its network; it runs without.")
        return replace(teacher, name=f"{name} w={shown:g}{combined.in_words}"), name

    def _solvers(self, teacher: Sampler, nfe: int) -> list[Sampler]:
        """The teacher under stock solvers; the report says which of them its pipeline cannot run under."""
        able = []
        for sampler in solver_samplers(teacher, nfe):
            try:
                set_up(teacher.trace, sampler.solver, sampler.steps)
            except InputError as error:
                kind, solver = type(teacher.trace.pipeline).__name__, type(sampler.solver).__name__
                self._remark(f"No row of {sampler.name}: {kind} does not run under {solver}: {error}")
                continue
            able.append(sampler)
        return able

    def _students(
        self,
        teacher: Path,
        drawn: Sequence[tuple[Row, Tensor | None]],
        solver_rows: Sequence[Row],
        real: dict[str, RealSide],
    ) -> None:
        """``drawn``: the rows of the teacher and of the best solver, with their first images."""
        state, source, facts = self.state, self.source, self.source.facts
        trained, scale = facts.steps, facts.guidance
        student = state.sampler(
            source.pipeline, name=source.label, role="student", steps=trained, guidance=1.0, inside=scale
        )
        steps, remarks = runnable(source.label, student.trace, sorted({*self.steps, trained}), trained)
        for remark in remarks:
            self._remark(remark)
        samplers = [replace(student, steps=number) for number in steps]
        self._announce([(one, teacher) for one in samplers])
        for sampler in samplers:
            row = self._row(sampler, real, teacher)
            images = self._show(sampler, row, real)
            if sampler.steps == trained:
                side_by_side(self.report, sampler, [drawn[0], (row, images), *drawn[1:]])
            if sampler.steps == trained and state.protocol.reference and state.first:
                conclusion = verdict(row, drawn[0][0], solver_rows, self.report.labels)
                self.report.verdict += [conclusion] if conclusion else []

    def _row(self, sampler: Sampler, real: dict[str, RealSide] | None, teacher: Path | None = None) -> Row:
        before = len(self.state.rows)
        row = self.state.row(sampler, real, teacher)
        if self.state.first and row.cached and len(self.state.rows) > before:  # not a row of an earlier source
            self.state.timed(row, sampler)
        return row

    def _teachers_side(self, teacher: Sampler) -> dict[str, RealSide]:
        """The teacher's samples in the place of real images."""
        views = self.state.views(teacher, None)
        return {
            name: RealSide(view.samples.moments(), lambda view=view: view.samples.all("rows"))
            for name, view in views.items()
        }

    def _announce(self, samplers: Sequence[tuple[Sampler, Path | None]], passes: int = 0) -> None:
        """Say about how long the samples take, once for a source, from a timed batch; nothing where all are there.

        Args:
            samplers: each with its teacher's folder.
            passes: further ones of a sample, of rows that are not known yet.
        """
        state = self.state
        waiting = sum(one.nfe * _to_make(state, one, teacher) for one, teacher in samplers)
        if self.announced or not waiting or not state.first:
            return
        self.announced, (first, _) = True, samplers[0]
        waiting += passes * (state.samples + state.further)
        seconds = waiting * state.seconds_per_pass(first) / state.processes.num_processes
        about = timedelta(seconds=round(seconds))
        say(f"report on {self.source.label}: the samples, {state.samples} a row, take about {about}")

    def _show(self, sampler: Sampler, row: Row, real: dict[str, RealSide] | None) -> Tensor | None:
        return show(self.state, self.report, sampler, row, real) if self.pictured else None

    def _remark(self, text: str) -> None:
        if text not in self.report.remarks:
            self.report.remarks.append(text)


def _to_make(state: Bench, sampler: Sampler, teacher: Path | None) -> int:
    """How many samples of a row are not there; 0 where its stored row is enough."""
    key = state.key(sampler, teacher)
    if state.protocol.classes and (key in state.rows or state.known(state.stored.get(key))):
        return 0
    missing = Shards(state.folder(sampler) / "images", state.samples, state.block).missing()
    missing += state.repeat_shards(sampler).missing() if state.protocol.diversity else []
    return sum(map(len, missing))


def solver_samplers(teacher: Sampler, nfe: int) -> list[Sampler]:
    """A teacher under stock solvers in ``nfe`` network passes: without guidance, and with it in half the steps."""
    return [
        replace(teacher, name=name, role="solver", solver=solver, steps=steps, guidance=scale)
        for name, solver, steps, scale in solver_runs(teacher.trace.pipeline.scheduler, teacher.guidance, nfe)
    ]


def runnable(label: str, trace: Trace, steps: Sequence[int], trained: int) -> tuple[list[int], list[str]]:
    """(the numbers of steps that a student can run, a remark on those that it cannot)."""
    able = [number for number in steps if number == trained or can_run(trace, number)]
    if not (rest := [str(number) for number in steps if number not in able]):
        return able, []
    made = f"its {type(trace.pipeline.scheduler).__name__} was made for {trained}"
    return able, [f"{label}: no row at {' and '.join(rest)} steps; {made} and takes no more."]
