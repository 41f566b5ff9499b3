"""Measure students and their teacher under a standard protocol, in as many processes as ``accelerate launch`` starts.

Sample i depends on (seed, i) and its prompt alone. Samples and features are kept in shards, so a run that was killed
goes on where it was, and every process makes whole shards of its own.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.drawing import Sampler, digest, draw
from stepdistill.errors import InputError
from stepdistill.eval.metrics import Moments
from stepdistill.eval.networks import FeatureNetwork
from stepdistill.eval.pictures import image_grid
from stepdistill.eval.report import Report, Row, verdict
from stepdistill.eval.row_cache import RowCache, cache_folder, weights_digest
from stepdistill.eval.shards import SHARD, Shards, features_of
from stepdistill.eval.standard import FileSpec, StandardProtocol, load_standard, obtain, pin_commands, read_prompts
from stepdistill.eval.standard_measure import (
    FRECHET,
    NEEDS_REAL_ROWS,
    RealSide,
    ViewRows,
    load_view,
    measure_standard,
    stored_images,
    stored_moments,
)
from stepdistill.guidance import rule_text, stated_rule
from stepdistill.kernels import Rule
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.load import export_arguments, load_pipeline
from stepdistill.pipeline.trace import trace, under
from stepdistill.sampling_cost import sampling_cost
from stepdistill.sources import Progress, Source, device_name, library_versions, read_all, training_lines

REPEAT_OFFSET = 10**8
"""Index of the first further sample for diversity; no sample of a protocol reaches it."""
PICTURES, WORST = 24, 16


@dataclass
class StandardBench:
    """One benchmark under a standard protocol: where things lie, and who this process is."""

    protocol: StandardProtocol
    data: Path
    offline: bool
    cache: Path
    samples: int
    seed: int
    batch: int
    processes: PartialState
    device: torch.device
    progress: Progress | None
    hashes: dict[str, str]
    networks: dict[str, FeatureNetwork]

    @property
    def digest(self) -> str:
        """Of the protocol and of every file it stands on."""
        return digest(self.protocol.digest, self.hashes)

    def sampler(
        self,
        name: str,
        role: str,
        path: str,
        steps: int,
        guidance: float,
        revision: str | None = None,
        rule: Rule = Rule(),
    ) -> Sampler:
        """The pipeline at ``path``, traced, with the protocol's prompts or its own classes.

        Raises:
            InputError: it cannot be loaded or traced, or takes what the protocol does not have.
        """
        pipeline = load_pipeline(path, revision).to(self.device)
        traced = under(trace(pipeline, export_arguments(path)), rule)
        kind, protocol = ("prompts" if traced.entry == "prompt" else "classes"), self.protocol
        if protocol.conditions not in (kind, "any"):
            found = type(pipeline).__name__
            raise InputError(f"{path}: protocol {protocol.id} needs a pipeline of {protocol.conditions}, found {found}")
        if kind == "prompts":
            with self.processes.main_process_first():
                self.hashes |= obtain([protocol.prompts], self.data, offline=self.offline)
            wanted = read_prompts(self.data / protocol.prompts.file, protocol.prompts.count)
        else:
            wanted = entries(traced, "classes")
        return Sampler(name, role, traced, weights_digest(pipeline), tuple(wanted), steps, guidance)

    def images(self, sampler: Sampler, count: int) -> Shards:
        """The first ``count`` samples, made where they are not yet there; all processes together."""
        shards = Shards(self.folder(sampler) / "images", count)

        def make(indices: range) -> dict[str, Tensor]:
            return {"images": draw(sampler, indices, indices.start, seed=self.seed, batch=self.batch)}

        return self._fill(shards, make, f"{sampler.name}, {sampler.steps} steps")

    def repeats(self, sampler: Sampler) -> Shards:
        """Further samples: the first prompts, several images each, on noise of their own."""
        spread = self.protocol.diversity
        shards = Shards(self.folder(sampler) / f"repeats-{spread.prompts}", spread.prompts * spread.images)

        def make(indices: range) -> dict[str, Tensor]:
            numbers = [index % spread.prompts for index in indices]
            first = REPEAT_OFFSET + indices.start
            return {"images": draw(sampler, numbers, first, seed=self.seed, batch=self.batch)}

        return self._fill(shards, make, f"{sampler.name}, {sampler.steps} steps: repeats")

    def rows(self, images: Shards, view: str, folder: Path) -> Shards:
        """A view's rows of image shards, beside them in ``folder``."""
        network = self.networks[view]
        shards = Shards(folder / f"{view}-{self.view_digest(view)[:16]}", images.count)
        make = features_of(lambda indices: images.read(indices)["images"], network, self.device)
        return self._fill(shards, make, f"features: {view}")

    def reference(self, view: str) -> RealSide:
        """What the protocol's reference is to a view; its features are computed once.

        Raises:
            InputError: the reference does not hold what the protocol says.
        """
        spec, network = self.protocol.reference, self.networks[view]
        path = self.data / spec.file
        if spec.kind == "moments":
            moments = stored_moments(path, network.features)
            if not {*self.protocol.views[view].metrics} & {*NEEDS_REAL_ROWS}:
                return RealSide(moments)
            images = stored_images(path)
            count, read = len(images), lambda indices: images[indices.start : indices.stop]
        else:
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            moments, count, read = None, len(files), lambda indices: map(_opened, files[indices.start : indices.stop])
        if count != spec.count:
            raise InputError(f"{path}: protocol {self.protocol.id} expects {spec.count} images, found {count}")
        key = digest(self.hashes[spec.file], self.view_digest(view))
        shards = Shards(self.cache / "references" / key[:32], count)
        self._fill(shards, features_of(read, network, self.device), f"reference: {view}")
        return RealSide(moments or _kept_moments(shards), lambda: shards.all("rows"))

    def view_digest(self, view: str) -> str:
        """Of what decides a view's rows."""
        spec = self.protocol.views[view]
        return digest(spec.model_dump(mode="json", exclude={"metrics", "prefix"}), self.hashes[spec.weights.file])

    def folder(self, sampler: Sampler) -> Path:
        """Where a sampler's images and rows lie."""
        return self.cache / "samples" / sampler.key(self.seed, 0, "samples")[:32]

    def _fill(self, shards: Shards, make: Callable[[range], dict[str, Tensor]], title: str) -> Shards:
        tell = None if self.progress is None else lambda done, total: self.progress(title, done, total)
        who = {"rank": self.processes.process_index, "processes": self.processes.num_processes}
        shards.fill(make, **who, progress=tell)
        self.processes.wait_for_everyone()
        return shards

    def measured(self, sampler: Sampler, real: dict[str, RealSide] | None) -> tuple[Row, dict[str, ViewRows]]:
        """The row of a sampler, and its views' rows; ``real`` None: it is the teacher that others are compared with."""
        images, folder = self.images(sampler, self.samples), self.folder(sampler)
        repeated = self.repeats(sampler) if self.protocol.diversity else None
        views = {}
        for name, spec in self.protocol.views.items():
            view = ViewRows(self.rows(images, name, folder), real=real[name] if real else RealSide())
            if "clip_score" in spec.metrics:
                view.texts = self._texts(sampler, name)
            if repeated and "diversity" in spec.metrics:
                view.repeats = self.rows(repeated, name, folder / "repeats").all("rows")
                view.repeat_prompts = torch.arange(repeated.count) % self.protocol.diversity.prompts
            views[name] = view
        with_real = (*FRECHET, *NEEDS_REAL_ROWS)
        metrics = [metric for metric in self.protocol.metrics if real or metric not in with_real]
        key = sampler.key(self.seed, self.samples, self.digest + ("" if real else "teacher"))
        stored = (cache := RowCache(self.cache, None, self.digest)).get(key)
        named = {"name": sampler.name, "role": sampler.role, "steps": sampler.steps, "nfe": sampler.nfe}
        if stored is not None:
            return replace(Row(**stored), **named), views
        if not self.processes.is_main_process:
            return Row(**named, guidance=sampler.guidance, samples=self.samples, metrics={}, cost={}), views
        found = measure_standard(self.protocol, views, metrics)
        row = Row(
            **named,
            guidance=sampler.guidance,
            samples=self.samples,
            metrics=found.metrics,
            cost={},
            diagnostics=found.diagnostics,
        )
        cache.put(key, asdict(row))
        return row, views

    def cost(self, sampler: Sampler) -> dict[str, float]:
        """See :func:`stepdistill.sampling_cost.sampling_cost`; on the protocol's first conditions."""
        conditioning = encode(sampler.trace, [sampler.entry(i) for i in range(min(self.batch, len(sampler.wanted)))])
        return sampling_cost(
            sampler.trace,
            conditioning.to(self.device),
            sampler.scheduler,
            steps=sampler.steps,
            guidance=sampler.guidance,
            batch=self.batch,
        )

    def _texts(self, sampler: Sampler, view: str) -> Tensor:
        key = digest(sampler.wanted, self.view_digest(view), self.protocol.views[view].prefix)
        shards = Shards(self.cache / "texts" / key[:32], min(self.samples, len(sampler.wanted)))
        network = self.networks[view]
        self._fill(
            shards, lambda indices: {"rows": network.texts([sampler.entry(i) for i in indices])}, "features: prompts"
        )
        texts = shards.all("rows")
        return texts[torch.arange(self.samples) % len(texts)]


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
    guidance: float = 1.0,
    batch: int = 16,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """See :func:`stepdistill.bench.bench`; ``samples`` and ``seed`` None are the protocol's.

    Args:
        data: folder of prompts, reference images and network weights. offline: download nothing.
        batch: images at once, at most 64. guidance: of a plain pipeline where the protocol leaves it open.

    Raises:
        InputError: a file is missing or not the pinned one, or a source does not fit the protocol.
    """
    spec, data = load_standard(protocol), Path(data)
    if not 1 <= batch <= SHARD:
        raise InputError(f"batch: expected a number from 1 to {SHARD}, found {batch}")
    found = read_all([sources] if isinstance(sources, str | Path) else sources)
    processes = PartialState(timeout=timedelta(days=1))  # one process measures while the others wait
    files = _files(spec)
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
    )
    report = Report(
        protocol=spec.id,
        seed=state.seed,
        command=shlex.join(sys.argv),
        versions=library_versions(),
        device=f"{device_name(where)}{f' × {n}' if (n := processes.num_processes) > 1 else ''}",
        floor={},
        rows=[],
        labels=spec.labels(state.samples),
    )
    for source in found:
        _measure_source(state, report, source, sorted(set(steps)), guidance)
    prompts = [spec.prompts] if spec.prompts and spec.prompts.file in state.hashes else []
    report.files = dict(state.hashes)
    report.remarks = [f"To pin a file as it is: {line}" for line in pin_commands([*files, *prompts], hashes, data)]
    if out is not None and processes.is_main_process:
        report.training = training_lines(found)
        report.write(out)
    return report


def _files(spec: StandardProtocol) -> list[FileSpec]:
    """What is needed whatever the pipelines are."""
    prompts = [spec.prompts] if spec.prompts and spec.conditions == "prompts" else []
    return [*prompts, *([spec.reference] if spec.reference else []), *(view.weights for view in spec.views.values())]


def _measure_source(
    state: StandardBench, report: Report, source: Source, steps: Sequence[int], guidance: float
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
    title = f"{name} w={scale:g}{rule_text(rule)}"
    sampler = state.sampler(title, "teacher", path, protocol.teacher.steps, scale, revision, rule)
    teacher, views = _add(state, report, sampler, real)
    if facts is None:
        return
    if real is None:
        real = {
            name: RealSide(view.samples.moments(), lambda view=view: view.samples.all("rows"))
            for name, view in views.items()
        }
    del sampler  # the teacher's weights are not needed beside the student's
    trained = int(facts["steps"])
    student = state.sampler(source.label, "student", source.pipeline, trained, 1.0)
    for number in sorted({*steps, trained}):
        row, _ = _add(state, report, replace(student, steps=number), real)
        if number == trained and protocol.reference and (conclusion := verdict(row, teacher, [], report.labels)):
            report.verdict.append(conclusion)


def _add(
    state: StandardBench, report: Report, sampler: Sampler, real: dict[str, RealSide] | None
) -> tuple[Row, dict[str, ViewRows]]:
    row, views = state.measured(sampler, real)
    if not state.processes.is_main_process:
        return row, views
    row.cost = state.cost(sampler)
    if not any((kept.name, kept.steps) == (row.name, row.steps) for kept in report.rows):
        report.rows.append(row)
        first = Shards(state.folder(sampler) / "images", min(SHARD, state.samples))
        images = first.all("images")[:PICTURES]
        caption = f"{row.name} · {row.steps} steps, NFE {row.nfe}"
        report.pictures.append((caption, image_grid(images, columns=8)))
        if row.role == "student" or real is not None:
            report.worst += _worst(state, sampler, views, caption)
        if state.protocol.diversity:
            report.strips.append((caption, _strips(state, sampler)))
    return row, views


def _strips(state: StandardBench, sampler: Sampler) -> Image.Image:
    """Several images of each of the first prompts, a row a prompt."""
    spread = state.protocol.diversity
    images = state.repeats(sampler).all("images")
    shown = [
        prompt + repeat * spread.prompts for prompt in range(min(6, spread.prompts)) for repeat in range(spread.images)
    ]
    return image_grid(images[shown], columns=spread.images)


def _worst(
    state: StandardBench, sampler: Sampler, views: dict[str, ViewRows], caption: str
) -> list[tuple[str, Image.Image]]:
    """The images least like their prompts by CLIP, or else farthest from the mean of the real ones, worst first."""
    for view in views.values():
        rows = view.samples.all("rows")
        if view.texts is not None:
            badness, why = -torch.cosine_similarity(rows, view.texts), "least like their prompts"
        elif view.real.moments is not None:
            badness, why = (rows - view.real.moments.mean).square().sum(1), "farthest from the mean of the real ones"
        else:
            continue
        images = Shards(state.folder(sampler) / "images", state.samples)
        worst = badness.argsort(descending=True)[:WORST].tolist()
        shown = [images.read(images.ranges[i // SHARD])["images"][i % SHARD] for i in worst]
        return [(f"{caption} · {why}", image_grid(torch.stack(shown), columns=8))]
    return []


def _kept_moments(shards: Shards) -> Moments:
    path = shards.folder / "moments.safetensors"
    if not path.is_file():
        moments = shards.moments()
        save_file({"mean": moments.mean, "cov": moments.cov.contiguous()}, draft := path.with_suffix(".partial"))
        draft.replace(path)
    return Moments(**load_file(path))


def _opened(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
