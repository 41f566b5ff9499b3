"""The rows of a report: of every sampler its metrics, from this benchmark, stored, or measured now, and its cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stepdistill import assets
from stepdistill.diffusion.devices import best_device, on_cpu
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, digest
from stepdistill.eval.bench.extras import Extras
from stepdistill.eval.bench.samples import BATCH, Alone, Samples
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.bench.sources import device_name
from stepdistill.eval.files import obtain
from stepdistill.eval.measure import FRECHET, NEEDS_REAL_ROWS, ViewRows, load_view, measure
from stepdistill.eval.names import DIVERSITY
from stepdistill.eval.perceptual import also_files, check_also, load_also
from stepdistill.eval.protocol import FileSpec, Protocol, ShippedSpec, load_protocol
from stepdistill.eval.references import RealSide
from stepdistill.eval.report import Row
from stepdistill.eval.row_cache import RowCache
from stepdistill.eval.shards import SHARD
from stepdistill.files import cache_folder
from stepdistill.pipeline.conditioning import encode
from stepdistill.sampling.cost import sampling_cost, throughput


@dataclass
class Bench(Samples):
    """One benchmark: its samples, the rows that were measured before, and the rows so far by their keys."""

    stored: RowCache
    extras: Extras
    rows: dict[tuple[str, Path | None], Row] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """What a row's cost is measured on: the device, and how many of them share the samples."""
        several = self.processes.num_processes
        return device_name(self.device) + (f" × {several}" if several > 1 else "")

    def row(self, sampler: Sampler, real: dict[str, RealSide] | None, teacher: Path | None = None) -> Row:
        """The row of a sampler: from this benchmark, stored, or measured now; all processes together.

        Args:
            real: what the views are compared with; None: it is the teacher that others are compared with.
            teacher: the folder of the teacher's samples; None: the sampler is the teacher.
        """
        key = self.key(sampler, teacher)
        known = key, teacher if self.settings.also else None  # LPIPS is to the teacher's samples
        if known in self.rows:
            return self.rows[known]
        self.extras.check(sampler)
        stored = self.agreed(self.known(self.stored.get(key)))
        # Rows of classes come with the package, without their samples.
        views = self.views(sampler, real) if stored is None or not self.protocol.classes else {}
        if stored is None:
            row = self.measured(sampler, views)
            if self.first:
                self.stored.put(key, asdict(row))
        else:
            row = replace(_header(sampler, self.samples), **stored, cached=True)
        more, errors = self.extras.measure(self, sampler, teacher)
        self.rows[known] = replace(row, metrics=row.metrics | more, diagnostics=row.diagnostics | errors)
        return self.rows[known]

    def key(self, sampler: Sampler, teacher: Path | None = None) -> str:
        """The cache key of a row: without real images, the metrics of a student depend on its teacher's."""
        if self.protocol.classes:
            settings, its = sampler.trace.call_settings, self.protocol.digest
            return sampler.key(self.seed, self.samples, digest(its, settings) if settings else its)
        against = "" if self.protocol.reference else "teacher" if teacher is None else teacher.name
        views = () if self.settings.networks is None else sorted(self.protocol.views)  # a part of a row is no row
        return sampler.key(self.seed, self.samples, sampler.requests(digest(self.digest, against, *views)))

    def known(self, stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The stored row of a sampler; None if there is none, or it lacks a metric of its protocol."""
        if stored is None:
            return None
        values = {name: stored[name] for name in ("metrics", "diagnostics", "cost", "machine") if name in stored}
        if self.protocol.classes:
            metrics = self.protocol.metrics
            if {*metrics} - {*values["metrics"]} - (set() if self.settings.complete else {*DIVERSITY}):
                return None
            values["metrics"] = {metric: values["metrics"][metric] for metric in metrics if metric in values["metrics"]}
        return values

    def agreed(self, value: Any) -> Any:
        """Rank 0's value on every rank: another rank may read a newer one a moment later."""
        if self.processes.num_processes > 1:
            (value,) = broadcast_object_list([value])
        return value

    def measured(self, sampler: Sampler, views: Mapping[str, ViewRows]) -> Row:
        """The row of a sampler, measured now whatever is stored; on rank 0 only."""
        row = _header(sampler, self.samples)
        if not self.first:
            return row
        compared = any(view.real.moments or view.real.rows for view in views.values())
        metrics = [one for one in self.protocol.metrics if compared or one not in (*FRECHET, *NEEDS_REAL_ROWS)]
        measured = measure(self.protocol, views, metrics)
        row.metrics, row.diagnostics = measured.metrics, measured.diagnostics
        return self.timed(row, sampler)

    def timed(self, row: Row, sampler: Sampler) -> Row:
        """The row with what it costs on this device, now."""
        row.cost, row.machine = self.cost(sampler), self.machine
        return row

    def cost(self, sampler: Sampler) -> dict[str, float]:
        """See :mod:`stepdistill.sampling.cost`; on the protocol's first conditions."""
        whole = self.settings.cost or not self.protocol.classes
        return self._cost(sampler, sampling_cost if whole else throughput, steps=sampler.steps)

    def seconds_per_pass(self, sampler: Sampler) -> float:
        """Of one image through the network once, decoding included, by a batch: of a teacher in two steps."""
        few = sampler if sampler.role == "student" else replace(sampler, steps=min(2, sampler.steps))
        cost = self._cost(few, throughput, steps=few.steps, repeats=1)
        return cost["seconds_per_image"] / few.nfe

    def _cost(self, sampler: Sampler, meter: Callable[..., dict[str, float]], **options: int) -> dict[str, float]:
        conditioning = encode(sampler.trace, [sampler.entry(i) for i in range(min(self.batch, len(sampler.entries)))])
        return meter(
            sampler.trace,
            conditioning.to(self.device),
            sampler.scheduler,
            guidance=sampler.guidance,
            batch=self.batch,
            **options,
        )


def open_bench(settings: Settings, samples: int | None = None, seed: int | None = None) -> Bench:
    """A benchmark with its protocol's files and networks; ``samples`` and ``seed`` None are the protocol's.

    Raises:
        InputError: a setting is out of range, or a file or package is missing or not the pinned one.
    """
    protocol = load_protocol(settings.protocol)
    protocol = protocol.only(None if settings.networks is None else tuple(settings.networks))
    check_also(settings.also)
    if settings.also and protocol.classes:
        raise InputError(
            f"also: expected a protocol without classes, like teacher-fid-5k-v1; found {settings.protocol}"
        )
    if not 1 <= (settings.batch or BATCH) <= SHARD:
        raise InputError(f"batch: expected a number from 1 to {SHARD}, found {settings.batch}")
    # One process measures while the others wait.
    processes = Alone() if settings.alone else PartialState(cpu=on_cpu(), timeout=timedelta(days=1))
    with processes.main_process_first():
        hashes = obtain(needed(protocol, settings.also), Path(settings.data), offline=settings.offline)
    default = best_device() if settings.alone else processes.device
    device, data = torch.device(settings.device or default), Path(settings.data)
    cache = Path(settings.cache) if settings.cache else cache_folder()
    shipped = assets.root() / "assets" / protocol.measurements if protocol.measurements else None
    return Bench(
        protocol=protocol,
        settings=settings,
        samples=samples or protocol.samples,
        seed=protocol.seed if seed is None else seed,
        processes=processes,
        device=device,
        cache=cache,
        stored=RowCache(cache, shipped, protocol.digest),
        hashes=hashes,
        networks={name: load_view(view, data, device) for name, view in protocol.views.items()},
        extras=Extras({name: load_also(name, data, device) for name in settings.also}),
    )


def needed(protocol: Protocol, also: Sequence[str] = ()) -> list[FileSpec | ShippedSpec]:
    """The files that are needed whatever the pipelines are."""
    prompts = [protocol.prompts] if protocol.prompts and protocol.conditions == "prompts" else []
    views = [file for view in protocol.views.values() for file in view.files]
    return [*prompts, *([protocol.reference] if protocol.reference else []), *views, *also_files(also)]


def _header(sampler: Sampler, samples: int) -> Row:
    return Row(
        name=sampler.name,
        role=sampler.role,
        steps=sampler.steps,
        nfe=sampler.nfe,
        guidance=sampler.guidance,
        samples=samples,
        metrics={},
        cost={},
    )
