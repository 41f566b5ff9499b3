"""Measure students, their teacher, and the teacher under stock fast solvers; one protocol, one report.

Image i is of class i modulo the number of classes and its noise depends on (seed, i) alone, so every row of a report
sees the same requests and no row depends on batch size or device count.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import assets
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.names import metric_name, metric_text
from stepdistill.eval.pictures import image_grid
from stepdistill.eval.protocol import DIVERSITY, NETWORKS, Instruments, Protocol, floor, load_instruments, measure
from stepdistill.eval.report import Report, Role, Row
from stepdistill.eval.row_cache import RowCache, cache_folder, row_key
from stepdistill.eval.standard import is_standard
from stepdistill.eval.verdict import VERDICT_METRIC, Verdict, verdict
from stepdistill.fitting import Model, fit
from stepdistill.generation.drawing import digest
from stepdistill.generation.generate import decode, generate, passes
from stepdistill.generation.sampling_cost import sampling_cost, throughput
from stepdistill.generation.solvers import solver_runs
from stepdistill.guidance import rule_text, stated_rule
from stepdistill.kernels import Rule
from stepdistill.pipeline.load import export_arguments, export_variant, load_pipeline
from stepdistill.pipeline.trace import trace, under
from stepdistill.sources import (
    Progress,
    Source,
    check_numbers,
    command_line,
    device_name,
    library_versions,
    read_all,
    training_curves,
)
from stepdistill.standard_bench import runnable, standard_bench

TEACHER_STEPS = 50
PICTURES_PER_CLASS = 4
WORST_OF, WORST_SHOWN = 200, 20
CHUNK = 500
TIMED = 16
"""Images of a batch whose seconds a row states."""


@dataclass(frozen=True)
class Sampling:
    """One row to be: a model under a scheduler."""

    name: str
    role: Role
    model: Model
    scheduler: Any
    steps: int
    guidance: float = 1.0

    @property
    def nfe(self) -> int:
        """Network passes per image."""
        return passes(self.model.trace, self.scheduler, self.steps, self.guidance)


@dataclass
class Bench:
    """The state of one benchmark: instruments, cache, and everything measured so far by key.

    ``complete``: measure stored rows again that lack metrics which are younger than they are.
    """

    instruments: Instruments
    cache: RowCache
    samples: int
    seed: int
    device: torch.device
    progress: Progress | None = None
    complete: bool = False
    remarks: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    samplings: dict[str, Sampling] = field(default_factory=dict)
    models: dict[tuple[str, Rule, str], Model] = field(default_factory=dict)

    @property
    def protocol(self) -> Protocol:
        return self.instruments.protocol

    def key(self, sampling: Sampling) -> str:
        """The cache key of a row."""
        told = sampling.model.trace.told
        return row_key(
            weights=sampling.model.weights,
            scheduler=sampling.scheduler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            seed=self.seed,
            samples=self.samples,
            protocol=digest(self.protocol.digest, told) if told else self.protocol.digest,
            rule=rule_text(sampling.model.trace.denoiser.rule) if sampling.guidance != 1 else "",
        )

    def model(self, path: str, revision: str | None = None, rule: Rule = Rule(), *, like: str | None = None) -> Model:
        """The pipeline at ``path``, traced once; under guidance's ``rule``.

        Args:
            like: an export whose recipe says with what arguments the pipeline is called; None: its own.

        Raises:
            InputError: it cannot be loaded or traced, or does not make what the protocol measures.
        """
        arguments = export_arguments(like or path)
        key = path, rule, json.dumps(arguments, sort_keys=True)
        if key not in self.models:
            pipeline = load_pipeline(path, revision, variant=export_variant(like))
            if self.device.type != "cpu":
                pipeline.to(self.device)
            traced = under(trace(pipeline, arguments), rule)
            self.models[key] = fit(traced, self.protocol, path, self.device)
        return self.models[key]

    def row(self, sampling: Sampling) -> Row:
        """The row of a sampling: from this benchmark, from the cache, or measured now."""
        key = self.key(sampling)
        if key in self.rows:
            return self.rows[key]
        stored = self.cache.get(key)
        if stored is not None and (metrics := self.known(stored["metrics"])):
            row = replace(Row(**stored), name=sampling.name, role=sampling.role, metrics=metrics, cached=True)
        else:
            row = self.measured(sampling)
            self.cache.put(key, asdict(row))
        self.rows[key], self.samplings[key] = row, sampling
        return row

    def known(self, stored: Mapping[str, float]) -> dict[str, float] | None:
        """The wanted metrics among ``stored`` ones; None when some of them have to be measured."""
        wanted = self.instruments.metric_names
        missing = set(wanted) - set(stored) - (set() if self.complete else set(DIVERSITY))
        return None if missing else {metric: stored[metric] for metric in wanted if metric in stored}

    def measured(self, sampling: Sampling) -> Row:
        """The row of a sampling, measured now whatever the cache holds."""
        title = f"{sampling.name}, {sampling.steps} steps"
        images, labels = sample(sampling, self.seed, self.samples, self._tell(title))
        found = measure(self.instruments, images, labels, self._tell(f"{title}: features"))
        return Row(
            name=sampling.name,
            role=sampling.role,
            steps=sampling.steps,
            nfe=sampling.nfe,
            guidance=sampling.guidance,
            samples=self.samples,
            metrics=found.metrics,
            cost=self._cost(sampling, throughput),
            diagnostics=found.diagnostics,
            machine=device_name(self.device),
        )

    def measure_costs(self, whole: bool, batch: int = TIMED) -> None:
        """Put costs measured now on this device in place of those of cached rows, or of all rows.

        Args:
            whole: of all rows, with latency and operations.
        """
        for key, sampling in self.samplings.items():
            row = self.rows[key]
            if whole or row.cached:
                row.cost = self._cost(sampling, sampling_cost if whole else throughput, batch)
                row.machine = device_name(self.device)

    def _cost(
        self, sampling: Sampling, measure: Callable[..., dict[str, float]], batch: int = TIMED
    ) -> dict[str, float]:
        model = sampling.model
        settings = {"steps": sampling.steps, "guidance": sampling.guidance, "batch": batch}
        return measure(model.trace, model.conditioning, sampling.scheduler, **settings)

    def _tell(self, title: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(title, done, total)

    def floor(self) -> dict[str, float]:
        """The metrics of real images at this number of samples; empty where the data set is not installed."""
        key = f"floor-{self.protocol.digest[:32]}-{self.samples}"
        for stored in (self.cache.floor(self.samples), self.cache.get(key)):
            if stored is not None and (metrics := self.known(stored)):
                return metrics
        real = real_images(self.protocol)
        if real is None or len(real[0]) < self.samples:
            return {}
        metrics = floor(self.instruments, *real, self.samples).metrics
        self.cache.put(key, metrics)
        return metrics


def bench(
    sources: Sequence[str | Path],
    steps: Sequence[int] = (1, 2, 4),
    samples: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    *,
    protocol: str | Path = "fashion-v1",
    networks: Sequence[str] = NETWORKS,
    solvers: bool = True,
    guidance: float = 1.0,
    cost: bool = False,
    also: Sequence[str] = (),
    data: str | Path = "data",
    offline: bool = False,
    batch: int = 16,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure ``sources`` and write report.json, report.md and index.html into ``out``.

    Args:
        sources: run folders, exported pipelines, or any pipeline (folder, embedded teacher, hub id). A student's
            teacher, guidance scale and trained number of steps are read from its export.
        steps: the numbers of steps that students run at; the trained one is always among them.
        samples: images per row; None: what a standard protocol says, 2000 of the embedded one.
        networks: of "classifier" and "enet", of the embedded protocol alone.
        solvers: also run the teacher under stock fast solvers at the student's NFE, with and without guidance.
        also: of "lpips", "imagereward", "hpsv2" and "pickscore", beside a standard protocol's metrics.
        cost: measure latency, throughput and operations of every row now, on this device, cached rows too.
        data, offline, batch: see :func:`stepdistill.standard_bench.standard_bench`; ``batch`` is also that of cost.
        guidance: w for a plain pipeline's own row and solvers.
        device: default cuda if there is one. cache: default $STEPDISTILL_CACHE or ~/.cache/stepdistill.

    Raises:
        InputError: a source cannot be loaded or does not fit the protocol, or an argument is out of range.
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    check_numbers(sources, steps, samples)
    if is_standard(protocol):
        settings = {"guidance": guidance, "device": device, "cache": cache, "progress": progress, "solvers": solvers}
        settings |= {"data": data, "offline": offline, "batch": batch, "also": also}
        return standard_bench(sources, steps, samples, seed, out, protocol=protocol, **settings)
    if also:
        raise InputError(f"also: expected a standard protocol such as teacher-fid-5k-v1, found {protocol}")
    samples = 2000 if samples is None else samples
    found = read_all(sources)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    instruments = load_instruments(protocol, networks, device)
    shipped = assets.root() / "assets" / instruments.protocol.measurements
    folder = Path(cache) if cache else cache_folder()
    state = Bench(
        instruments=instruments,
        cache=RowCache(folder, shipped, instruments.protocol.digest),
        samples=samples,
        seed=seed,
        device=device,
        progress=progress,
    )
    verdicts: list[Verdict] = []
    grids: dict[str, Sampling] = {}
    for source in found:
        shown, conclusion = _measure_source(state, source, sorted(set(steps)), guidance, solvers)
        grids |= {state.key(sampling): sampling for sampling in shown}
        verdicts += [conclusion] if conclusion else []
    state.measure_costs(cost, batch if cost else TIMED)
    report = Report(
        protocol=instruments.protocol.id,
        seed=seed,
        command=command_line(),
        versions=library_versions(),
        device=device_name(device),
        floor=state.floor(),
        rows=list(state.rows.values()),
        verdict=verdicts,
        remarks=state.remarks,
    )
    if out is not None:
        report.pictures = [_picture(state, sampling) for sampling in grids.values()]
        report.worst = [_worst(state, sampling) for sampling in grids.values() if _has_classes(state, sampling)]
        report.training = training_curves(found)
        report.write(out)
    return report


def _measure_source(
    state: Bench, source: Source, steps: Sequence[int], guidance: float, with_solvers: bool
) -> tuple[list[Sampling], Verdict | None]:
    """All rows of a source; what to picture, and the verdict where the source is a student."""
    model = state.model(source.pipeline)
    if source.facts is None:
        teacher = Sampling(f"{source.label} w={guidance:g}", "teacher", model, model.scheduler, TEACHER_STEPS, guidance)
        rows = [(teacher, state.row(teacher))]
        if with_solvers:
            rows += [(s, state.row(s)) for s in solver_samplings(model, guidance, nfe=max(steps))]
        return [teacher, *_best([pair for pair in rows if pair[0].role == "solver"])], None
    facts = source.facts
    rule = stated_rule(facts)
    original = state.model(facts["teacher"], facts.get("revision"), rule, like=source.pipeline)
    scale, trained = float(facts["guidance"]), int(facts["steps"])
    if trained not in steps:
        steps = sorted([*steps, trained])
    steps, remark = runnable(source.label, model.trace, steps, trained)
    state.remarks += remark
    students = [Sampling(source.label, "student", model, model.scheduler, n) for n in steps]
    measured = {sampling.steps: (sampling, state.row(sampling)) for sampling in students}
    name = f"{Path(facts['teacher']).name} w={scale:g}{rule_text(rule)}"
    teacher = Sampling(name, "teacher", original, original.scheduler, TEACHER_STEPS, scale)
    teacher_row = state.row(teacher)
    stock = solver_samplings(original, scale, nfe=trained) if with_solvers else []
    solver_rows = [(sampling, state.row(sampling)) for sampling in stock]
    student, student_row = measured[trained]
    conclusion = verdict(student_row, teacher_row, [row for _, row in solver_rows])
    return [teacher, student, *_best(solver_rows)], conclusion


def _best(rows: Sequence[tuple[Sampling, Row]]) -> list[Sampling]:
    """The sampling with the lowest FD, in a list that is empty when there is none to compare."""
    rows = [pair for pair in rows if VERDICT_METRIC in pair[1].metrics]
    return [min(rows, key=lambda pair: pair[1].metrics[VERDICT_METRIC])[0]] if rows else []


def solver_samplings(model: Model, guidance: float, nfe: int) -> list[Sampling]:
    """The model under stock solvers in ``nfe`` network passes: without guidance, and with it in half the steps."""
    runs = solver_runs(model.trace.pipeline.scheduler, guidance, nfe)
    return [Sampling(name, "solver", model, solver, steps, scale) for name, solver, steps, scale in runs]


def sample(
    sampling: Sampling, seed: int, count: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a sampling, uint8 (N, C, H, W) on the CPU, and their classes (N,)."""
    model = sampling.model
    labels = torch.arange(count) % len(model.conditioning)
    parts = []
    for first in range(0, count, CHUNK):
        index = labels[first : first + CHUNK]
        latents = generate(
            model.trace,
            sampling.scheduler,
            model.conditioning,
            index,
            steps=sampling.steps,
            guidance=sampling.guidance,
            seed=seed,
            indices=range(first, first + len(index)),
        )
        parts.append(decode(model.trace, latents).cpu())
        if progress:
            progress(first + len(index), count)
    return torch.cat(parts), labels


def real_images(protocol: Protocol) -> tuple[Tensor, Tensor] | None:
    """Test images uint8 (N, C, H, W) and labels of the protocol's data set; None where it is not installed."""
    if protocol.data != "fashion-mnist":
        return None
    try:
        return fashion_mnist.load("test")
    except FileNotFoundError:
        return None


def _has_classes(state: Bench, sampling: Sampling) -> bool:
    return sampling.role == "student" and "classifier" in state.instruments.networks


def _worst(state: Bench, sampling: Sampling) -> tuple[str, Any]:
    """The images whose class the classifier believes least, of the first ``WORST_OF``, worst first."""
    images, labels = sample(sampling, state.seed, min(WORST_OF, state.samples))
    classifier = state.instruments.networks["classifier"]
    logits = classifier.logits(images.to(state.device)).cpu()
    order = logits.log_softmax(1).gather(1, labels[:, None])[:, 0].argsort()[:WORST_SHOWN]
    caption = f"{sampling.name} · {sampling.steps} steps · least like their class, of the first {len(images)}"
    return caption, image_grid(images[order], columns=10)


def _picture(state: Bench, sampling: Sampling) -> tuple[str, Any]:
    classes = len(sampling.model.conditioning)
    images, _ = sample(sampling, state.seed, PICTURES_PER_CLASS * classes)
    metrics = state.row(sampling).metrics
    caption = f"{sampling.name} · {sampling.steps} steps, NFE {sampling.nfe}"
    if VERDICT_METRIC in metrics:
        value = metric_text(VERDICT_METRIC, metrics[VERDICT_METRIC])
        caption += f" · {metric_name(VERDICT_METRIC, state.samples)} {value}"
    caption += " · a class a column"
    return caption, image_grid(images, columns=classes)
