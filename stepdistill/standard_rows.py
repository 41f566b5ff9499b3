"""The rows of a standard protocol: samples and features in shards on disk, made by all processes together.

Sample i depends on (seed, i) and its prompt alone. A run that was killed goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.metrics import Moments
from stepdistill.eval.networks import FeatureNetwork
from stepdistill.eval.report import Row
from stepdistill.eval.row_cache import RowCache, weights_digest
from stepdistill.eval.shards import Shards, features_of
from stepdistill.eval.shipped import ShippedPrompts, ShippedReference, read_entries
from stepdistill.eval.standard import StandardProtocol, obtain, read_prompts
from stepdistill.eval.standard_measure import (
    ALIGNMENT,
    FRECHET,
    NEEDS_REAL_ROWS,
    RealSide,
    ViewRows,
    measure_standard,
    stored_images,
    stored_moments,
    stored_rows,
)
from stepdistill.extras import Extras
from stepdistill.generation.drawing import Sampler, digest, draw
from stepdistill.generation.latents import image_shape
from stepdistill.generation.sampling_cost import sampling_cost
from stepdistill.kernels import Rule
from stepdistill.pipeline.conditioning import encode, entries
from stepdistill.pipeline.load import export_adapter, export_arguments, export_variant, load_pipeline
from stepdistill.pipeline.trace import asked_for, trace, under
from stepdistill.sources import Progress

REPEAT_OFFSET = 10**8
"""Index of the first further sample for diversity; no sample of a protocol reaches it."""


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
    extras: Extras

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
        *,
        like: str | None = None,
        inside: float | None = None,
    ) -> Sampler:
        """The pipeline at ``path``, traced, with the protocol's prompts or its own classes.

        One whose guidance is inside its network, or that has none, runs at ``guidance`` 1.

        Args:
            like: an export whose recipe says with what arguments and IP-Adapter the pipeline is called; None: its own.
            inside: the scale of guidance inside the network; None: ``guidance``.

        Raises:
            InputError: it cannot be loaded or traced, or takes what the protocol or a metric does not.
        """
        adapter = export_adapter(like or path)
        variant = export_variant(like)
        pipeline = load_pipeline(path, revision, ip_adapter=adapter, variant=variant).to(self.device)
        traced = trace(pipeline, export_arguments(like or path))
        traced = under(asked_for(traced, guidance if inside is None else inside), rule)
        kind, protocol = ("prompts" if traced.entry == "prompt" else "classes"), self.protocol
        if protocol.conditions not in (kind, "any"):
            found = type(pipeline).__name__
            raise InputError(f"{path}: protocol {protocol.id} needs a pipeline of {protocol.conditions}, found {found}")
        if kind == "prompts":
            with self.processes.main_process_first():
                self.hashes |= obtain([protocol.prompts], self.data, offline=self.offline)
            wanted = self.prompts
        else:
            wanted = entries(traced, "classes")
        if isinstance(protocol.reference, ShippedReference):
            found, size = image_shape(traced), protocol.reference.size
            if found != (3, size):
                raise InputError(f"{path}: protocol {protocol.id} measures RGB images of {size} px, found {found}")
        guides = traced.guidance.kind in ("batched", "two_calls")
        scale = guidance if guides else 1.0
        weights = weights_digest(pipeline)
        if adapter is not None:  # no state dict holds its weights
            weights = digest(weights, adapter.model_dump())
        sampler = Sampler(name, role, traced, weights, tuple(wanted), steps, scale)
        self.extras.check(sampler)
        return sampler

    @property
    def prompts(self) -> list[str]:
        """The protocol's."""
        return read_prompts(self.protocol.prompts.path(self.data), self.protocol.prompts.count)

    def images(self, sampler: Sampler, count: int) -> Shards:
        """The first ``count`` samples, made where they are not yet there; all processes together."""
        shards = Shards(self.folder(sampler) / "images", count)

        def make(indices: range) -> dict[str, Tensor]:
            return {"images": draw(sampler, indices, indices.start, seed=self.seed, batch=self.batch)}

        return self.fill(shards, make, f"{sampler.name}, {sampler.steps} steps")

    def repeats(self, sampler: Sampler) -> Shards:
        """Further samples: the first prompts, several images each, on noise of their own."""
        shards, spread = self.repeat_shards(sampler), self.protocol.diversity

        def make(indices: range) -> dict[str, Tensor]:
            numbers = [index % spread.prompts for index in indices]
            first = REPEAT_OFFSET + indices.start
            return {"images": draw(sampler, numbers, first, seed=self.seed, batch=self.batch)}

        return self.fill(shards, make, f"{sampler.name}, {sampler.steps} steps: repeats")

    def repeat_shards(self, sampler: Sampler) -> Shards:
        """Where :meth:`repeats` lie."""
        spread = self.protocol.diversity
        return Shards(self.folder(sampler) / f"repeats-{spread.prompts}", spread.prompts * spread.images)

    def rows(self, images: Shards, view: str, folder: Path) -> Shards:
        """A view's rows of image shards, beside them in ``folder``."""
        network = self.networks[view]
        shards = Shards(folder / f"{view}-{self.view_digest(view)[:16]}", images.count)
        make = features_of(lambda indices: images.read(indices)["images"], network, self.device)
        return self.fill(shards, make, f"features: {view}")

    def reference(self, view: str) -> RealSide:
        """What the protocol's reference is to a view; its features are computed once.

        Raises:
            InputError: the reference does not hold what the protocol says.
        """
        spec, network = self.protocol.reference, self.networks[view]
        path = spec.path(self.data)
        if isinstance(spec, ShippedReference):
            return stored_rows(path, view)
        if spec.kind == "moments":
            moments = stored_moments(path, network.features)
            if not {*self.protocol.views[view].metrics} & {*NEEDS_REAL_ROWS}:
                return RealSide(moments)
            images = stored_images(path)
            count, read, load = len(images), lambda indices: images[indices.start : indices.stop], None
        else:
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            moments, count, load = None, len(files), opened
            read = lambda indices: files[indices.start : indices.stop]  # noqa: E731
        if count != spec.count:
            raise InputError(f"{path}: protocol {self.protocol.id} expects {spec.count} images, found {count}")
        key = digest(self.hashes[spec.file], self.view_digest(view))
        shards = Shards(self.cache / "references" / key[:32], count)
        self.fill(shards, features_of(read, network, self.device, load), f"reference: {view}")
        with self.processes.main_process_first():  # it writes them, the others read them
            moments = moments or _kept_moments(shards)
        return RealSide(moments, lambda: shards.all("rows"))

    def view_digest(self, view: str) -> str:
        """Of what decides a view's rows."""
        spec = self.protocol.views[view]
        files = (self.hashes[file.file] for file in spec.files)
        return digest(spec.model_dump(mode="json", exclude={"metrics", "prefix"}), *files)

    def folder(self, sampler: Sampler) -> Path:
        """Where a sampler's images and rows lie."""
        return self.cache / "samples" / sampler.key(self.seed, 0, "samples")[:32]

    def fill(self, shards: Shards, make: Callable[[range], dict[str, Tensor]], title: str) -> Shards:
        """The shards, whole; every process makes its share of them and waits for the others."""
        tell = None if self.progress is None else lambda done, total: self.progress(title, done, total)
        who = {"rank": self.processes.process_index, "processes": self.processes.num_processes}
        shards.fill(make, **who, progress=tell)
        self.processes.wait_for_everyone()
        return shards

    def measured(
        self, sampler: Sampler, real: dict[str, RealSide] | None, teacher: Path | None
    ) -> tuple[Row, dict[str, ViewRows]]:
        """The row of a sampler, and its views' rows.

        Args:
            real: what the views are compared with; None: it is the teacher that others are compared with.
            teacher: the folder of the teacher of a student or solver; None: it is the teacher.
        """
        views = self.views(sampler, real)
        more, errors = self.extras.measure(self, sampler, teacher)
        row = Row(
            name=sampler.name,
            role=sampler.role,
            steps=sampler.steps,
            nfe=sampler.nfe,
            guidance=sampler.guidance,
            samples=self.samples,
            metrics={},
            cost={},
        )
        if not self.processes.is_main_process:
            return row, views
        cache, key = RowCache(self.cache, None, self.digest), self._key(sampler, teacher)
        stored = cache.get(key)
        if stored is None:
            metrics = [one for one in self.protocol.metrics if real or one not in (*FRECHET, *NEEDS_REAL_ROWS)]
            found = measure_standard(self.protocol, views, metrics)
            stored = {"metrics": found.metrics, "diagnostics": found.diagnostics}
            cache.put(key, stored)
        row.metrics, row.diagnostics = stored["metrics"] | more, stored["diagnostics"] | errors
        return row, views

    def views(self, sampler: Sampler, real: dict[str, RealSide] | None) -> dict[str, ViewRows]:
        """What every network of the protocol sees in a sampler's images; all processes together."""
        images, folder = self.images(sampler, self.samples), self.folder(sampler)
        repeated = self.repeats(sampler) if self.protocol.diversity else None
        views = {}
        for name, spec in self.protocol.views.items():
            view = ViewRows(self.rows(images, name, folder), real=real[name] if real else RealSide())
            if {*spec.metrics} & {*ALIGNMENT}:
                view.texts, view.splits = self.texts(sampler.wanted, name), self.splits
            if repeated and "diversity" in spec.metrics:
                view.repeats = self.rows(repeated, name, folder / "repeats").all("rows")
                view.repeat_prompts = torch.arange(repeated.count) % self.protocol.diversity.prompts
            views[name] = view
        return views

    def _key(self, sampler: Sampler, teacher: Path | None) -> str:
        """Of a row's metrics: without real images, those of a student depend on its teacher's."""
        against = "" if self.protocol.reference else "teacher" if teacher is None else teacher.name
        return sampler.key(self.seed, self.samples, digest(self.digest, against))

    def cost(self, sampler: Sampler) -> dict[str, float]:
        """See :func:`stepdistill.generation.sampling_cost.sampling_cost`; on the protocol's first conditions."""
        conditioning = encode(sampler.trace, [sampler.entry(i) for i in range(min(self.batch, len(sampler.wanted)))])
        return sampling_cost(
            sampler.trace,
            conditioning.to(self.device),
            sampler.scheduler,
            steps=sampler.steps,
            guidance=sampler.guidance,
            batch=self.batch,
        )

    @property
    def splits(self) -> list[str]:
        """Of every sample's prompt; empty where a protocol has none."""
        if not isinstance(self.protocol.prompts, ShippedPrompts):
            return []
        known = [one["split"] for one in read_entries(self.protocol.prompts.path(self.data)).values()]
        return [known[i % len(known)] for i in range(self.samples)]

    def texts(self, wanted: Sequence[str], view: str) -> Tensor:
        """A view's rows of every sample's prompt (samples, d)."""
        key = digest(wanted, self.view_digest(view), self.protocol.views[view].prefix)
        shards = Shards(self.cache / "texts" / key[:32], min(self.samples, len(wanted)))
        network = self.networks[view]
        self.fill(shards, lambda indices: {"rows": network.texts([wanted[i] for i in indices])}, "features: prompts")
        texts = shards.all("rows")
        return texts[torch.arange(self.samples) % len(texts)]


def _kept_moments(shards: Shards) -> Moments:
    path = shards.folder / "moments.safetensors"
    if not path.is_file():
        moments = shards.moments()
        save_file({"mean": moments.mean, "cov": moments.cov.contiguous()}, draft := path.with_suffix(".partial"))
        draft.replace(path)
    return Moments(**load_file(path))


def opened(path: Path) -> Tensor:
    """A picture file as uint8 (3, H, W)."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
