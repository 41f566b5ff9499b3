"""Measure students, their teacher, and the teacher under stock fast solvers; one protocol, one report.

Image i is of class i modulo the number of classes and its noise depends on (seed, i) alone, so every row of a report
sees the same requests and no row depends on batch size or device count.
"""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stepdistill import assets
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.cost import metered
from stepdistill.eval.pictures import image_grid
from stepdistill.eval.protocol import DIVERSITY, NETWORKS, Instruments, Protocol, floor, load_instruments, measure
from stepdistill.eval.report import VERDICT_METRIC, Report, Role, Row, Verdict, metric_name, metric_text, verdict
from stepdistill.eval.row_cache import RowCache, cache_folder, row_key, weights_digest
from stepdistill.pipeline.conditioning import Conditioning, class_count, encode
from stepdistill.pipeline.generate import decode, generate
from stepdistill.pipeline.load import is_export, load_pipeline
from stepdistill.pipeline.trace import Trace, trace
from stepdistill.schedule import from_scheduler

TEACHER_STEPS = 50
PICTURES_PER_CLASS = 4
CHUNK = 500

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, images done, images in all)."""


@dataclass(frozen=True)
class Source:
    """What the user named: a run, an export or a plain pipeline. ``facts`` is the export's stepdistill.json."""

    label: str
    pipeline: str
    facts: dict[str, Any] | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Model:
    """A traced pipeline with the protocol's classes encoded."""

    trace: Trace
    conditioning: Conditioning
    weights: str

    @property
    def scheduler(self) -> Any:
        """A fresh copy of the pipeline's own scheduler."""
        own = self.trace.pipeline.scheduler
        return type(own).from_config(own.config)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trace.denoiser.network.parameters())


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
        """Network passes per image: guidance costs a second one per step."""
        return self.steps * (1 if self.guidance == 1 else 2)


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
    rows: dict[str, Row] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)

    @property
    def protocol(self) -> Protocol:
        return self.instruments.protocol

    def key(self, sampling: Sampling) -> str:
        """The cache key of a row."""
        return row_key(
            weights=sampling.model.weights,
            scheduler=sampling.scheduler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            seed=self.seed,
            samples=self.samples,
            protocol=self.protocol.digest,
        )

    def model(self, path: str, revision: str | None = None) -> Model:
        """The pipeline at ``path``, traced once.

        Raises:
            InputError: it cannot be loaded or traced, or does not make what the protocol measures.
        """
        if path not in self.models:
            pipeline = load_pipeline(path, revision)
            if self.device.type != "cpu":
                pipeline.to(self.device)
            self.models[path] = fit(trace(pipeline), self.protocol, path, self.device)
        return self.models[path]

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
        self.rows[key] = row
        return row

    def known(self, stored: Mapping[str, float]) -> dict[str, float] | None:
        """The wanted metrics among ``stored`` ones; None when some of them have to be measured."""
        wanted = self.instruments.metric_names
        missing = set(wanted) - set(stored) - (set() if self.complete else set(DIVERSITY))
        return None if missing else {metric: stored[metric] for metric in wanted if metric in stored}

    def measured(self, sampling: Sampling) -> Row:
        """The row of a sampling, measured now whatever the cache holds."""
        title = f"{sampling.name}, {sampling.steps} steps"
        with metered(self.device) as cost:
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
            cost={
                "seconds_per_image": cost.seconds / self.samples,
                "peak_memory_mib": cost.peak_memory_mib,
                "parameters": sampling.model.parameters,
            },
            diagnostics=found.diagnostics,
        )

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
    samples: int = 2000,
    seed: int = 0,
    out: str | Path | None = None,
    *,
    protocol: str | Path = "fashion-v1",
    networks: Sequence[str] = NETWORKS,
    solvers: bool = True,
    guidance: float = 1.0,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure ``sources`` and write report.json, report.md and index.html into ``out``.

    Args:
        sources: run folders, exported pipelines, or any pipeline (folder, embedded teacher, hub id). A student's
            teacher, guidance scale and trained number of steps are read from its export.
        steps: the numbers of steps that students run at; the trained one is always among them.
        samples: images per row. networks: of "classifier" and "enet". solvers: also run the teacher under
            stock fast solvers at the student's NFE, with and without guidance.
        guidance: w for a plain pipeline's own row and solvers.
        device: default cuda if there is one. cache: default $STEPDISTILL_CACHE or ~/.cache/stepdistill.

    Raises:
        InputError: a source cannot be loaded or does not fit the protocol, or an argument is out of range.
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    _check(sources, steps, samples)
    found = _read_all(sources)
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
    report = Report(
        protocol=instruments.protocol.id,
        seed=seed,
        command=shlex.join(sys.argv),
        versions=library_versions(),
        device=device_name(device),
        floor=state.floor(),
        rows=list(state.rows.values()),
        verdict=verdicts,
    )
    if out is not None:
        report.pictures = [_picture(state, sampling) for sampling in grids.values()]
        report.training = _training(found)
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
    original = state.model(facts["teacher"], facts.get("revision"))
    scale, trained = float(facts["guidance"]), int(facts["steps"])
    if trained not in steps:
        steps = sorted([*steps, trained])
    _check_steps(source, model, steps)
    students = [Sampling(source.label, "student", model, model.scheduler, n) for n in steps]
    measured = {sampling.steps: (sampling, state.row(sampling)) for sampling in students}
    name = f"{Path(facts['teacher']).name} w={scale:g}"
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
    samplings = []
    for name, scheduler in stock_solvers(model.trace.pipeline.scheduler).items():
        samplings.append(Sampling(name, "solver", model, scheduler, nfe))
        if guidance != 1 and nfe >= 2:
            samplings.append(Sampling(f"{name} w={guidance:g}", "solver", model, scheduler, nfe // 2, guidance))
    return samplings


def stock_solvers(scheduler: Any) -> dict[str, Any]:
    """diffusers' fast solvers for a model that was trained with ``scheduler``, by display name.

    All run on trailing time steps: the first is pure noise, which a few steps cannot do without.
    """
    config = dict(scheduler.config)
    schedule, _ = from_scheduler(scheduler)
    if schedule.name == "flow":
        common = {"num_train_timesteps": schedule.train_timesteps}
        flow = {**common, "use_flow_sigmas": True, "flow_shift": schedule.shift, "prediction_type": "flow_prediction"}
        return {
            "Euler": FlowMatchEulerDiscreteScheduler(**common, shift=schedule.shift),
            "DPM-Solver++": DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++", solver_order=2),
            "UniPC": UniPCMultistepScheduler(**flow, solver_order=2),
        }
    trailing = {"timestep_spacing": "trailing", "thresholding": False}
    solver = {**trailing, "solver_order": 2, "lower_order_final": True}
    return {
        "DDIM": DDIMScheduler.from_config(config, **trailing, clip_sample=False, set_alpha_to_one=True),
        "DPM-Solver++": DPMSolverMultistepScheduler.from_config(config, **solver, algorithm_type="dpmsolver++"),
        "UniPC": UniPCMultistepScheduler.from_config(config, **solver),
    }


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
            first_index=first,
        )
        parts.append(decode(model.trace, latents).cpu())
        if progress:
            progress(first + len(index), count)
    return torch.cat(parts), labels


def fit(traced: Trace, protocol: Protocol, path: str, device: torch.device) -> Model:
    """The model with the protocol's classes as conditions.

    Raises:
        InputError: the pipeline is not conditioned on the protocol's classes, or makes images of another shape.
    """
    # Not "exactly": a stock DiT folder may have lost its labels, and then counts the classes it could embed.
    if (found := class_count(traced)) < len(protocol.labels):
        kind = type(traced.pipeline).__name__
        raise InputError(f"{path}: protocol {protocol.id} expects {len(protocol.labels)} classes, {kind} has {found}")
    conditioning = encode(traced, range(len(protocol.labels)), None).to(device)
    probe = decode(traced, torch.zeros(1, *traced.latent_shape, device=device))
    if tuple(probe.shape[1:]) != protocol.image:
        found = tuple(probe.shape[1:])
        raise InputError(f"{path}: protocol {protocol.id} expects images of shape {protocol.image}, found {found}")
    return Model(traced, conditioning, weights_digest(traced.pipeline))


def real_images(protocol: Protocol) -> tuple[Tensor, Tensor] | None:
    """Test images uint8 (N, C, H, W) and labels of the protocol's data set; None where it is not installed."""
    if protocol.data != "fashion-mnist":
        return None
    try:
        return fashion_mnist.load("test")
    except FileNotFoundError:
        return None


def read_source(path: str | Path) -> Source:
    """A run folder, an exported pipeline or any pipeline, as the user named it.

    Raises:
        InputError: it is a run without an export, or an export with a damaged stepdistill.json.
    """
    folder = Path(path)
    run = folder if (folder / "recipe.yaml").is_file() else None
    pipeline = folder / "export" if run else folder
    if run and not is_export(pipeline):
        raise InputError(f"{run}: the run has no export/ yet; finish it, or run stepdistill export {run} {pipeline}")
    facts = _facts(pipeline / "stepdistill.json")
    label = folder.name if folder.name != "export" else folder.resolve().parent.name
    if facts is not None:
        label = f"{label} ({facts['method']})"
    return Source(label, str(pipeline if run else path), facts, run)


def _facts(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: expected JSON, found {error.msg}") from error
    missing = [key for key in ("teacher", "guidance", "method", "steps") if key not in facts]
    if missing:
        raise InputError(f"{path}: expected the keys teacher, guidance, method and steps, {', '.join(missing)} missing")
    return facts


def _read_all(sources: Sequence[str | Path]) -> list[Source]:
    found = [read_source(path) for path in sources]
    labels = [source.label for source in found]
    return [
        replace(source, label=f"{source.label} [{index + 1}]") if labels.count(source.label) > 1 else source
        for index, source in enumerate(found)
    ]


def _check(sources: Sequence[str | Path], steps: Sequence[int], samples: int) -> None:
    if not sources:
        raise InputError("bench: expected at least one run or pipeline, found none")
    if not steps or min(steps) < 1:
        raise InputError(f"steps: expected numbers of at least 1, found {list(steps)}")
    if samples < 2:
        raise InputError(f"samples: expected at least 2, found {samples}")


def _check_steps(source: Source, model: Model, steps: Sequence[int]) -> None:
    """Few-step schedulers refuse more steps than they were made for; say so before anything is measured."""
    for number in steps:
        try:
            model.scheduler.set_timesteps(number)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"steps: {source.pipeline} cannot run {number} steps: {reason}") from error


def _picture(state: Bench, sampling: Sampling) -> tuple[str, Any]:
    classes = len(sampling.model.conditioning)
    images, _ = sample(sampling, state.seed, PICTURES_PER_CLASS * classes)
    metrics = state.row(sampling).metrics
    caption = f"{sampling.name} · {sampling.steps} steps, NFE {sampling.nfe}"
    if VERDICT_METRIC in metrics:
        value = metric_text(VERDICT_METRIC, metrics[VERDICT_METRIC])
        caption += f" · {metric_name(VERDICT_METRIC, state.samples)} {value}"
    return caption, image_grid(images, columns=classes)


def _training(sources: Sequence[Source]) -> list[dict[str, float]]:
    """The lines of the first run's metrics.jsonl; a last line cut short by a kill is left out."""
    for source in sources:
        path = source.run / "metrics.jsonl" if source.run else None
        if path and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return []


def library_versions() -> dict[str, str]:
    names = ("stepdistill", "torch", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
