"""Samples of pipelines and their features under a protocol: shards on disk, made by all processes together.

Sample i depends on (seed, i) and its prompt or class alone. A killed run resumes where it stopped.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, digest, draw
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.files import obtain, read_entries, read_prompts
from stepdistill.eval.measure import ALIGNMENT, CLASS_BATCH, NEEDS_REAL_ROWS, ViewRows
from stepdistill.eval.metrics import Moments
from stepdistill.eval.networks import FeatureNetwork
from stepdistill.eval.protocol import ClassReference, Protocol, ShippedPrompts, ShippedReference
from stepdistill.eval.references import RealSide, class_statistics, stored_images, stored_moments, stored_rows
from stepdistill.eval.row_cache import weights_digest
from stepdistill.eval.shards import SHARD, Shards, features_of
from stepdistill.pipeline.conditioning import class_count, entries
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.exports import ExportFacts
from stepdistill.pipeline.latents import image_shape, medium
from stepdistill.pipeline.load import as_teacher
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.trace import Trace
from stepdistill.pipeline.variants import with_guider, with_rule
from stepdistill.progress import counted
from stepdistill.recipe.section import Guidance

REPEAT_OFFSET = 10**8
"""Index of the first further sample for diversity; no sample of a protocol reaches it."""
BATCH = 16
CLASS_BLOCK = 500
"""Samples in a shard under a protocol of classes. Fixed: what is computed together decides the last digits."""


class Alone:
    """Replaces accelerate's process state in a single process, whatever launcher started it."""

    is_main_process, process_index, num_processes = True, 0, 1
    main_process_first = staticmethod(nullcontext)

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""


@dataclass
class Samples:
    """Where the samples of a benchmark and their features lie, how they are made, and who this process is."""

    protocol: Protocol
    settings: Settings
    samples: int
    seed: int
    processes: PartialState | Alone
    device: torch.device
    cache: Path
    hashes: dict[str, str]
    networks: dict[str, FeatureNetwork]

    @property
    def data(self) -> Path:
        """The folder of the protocol's files."""
        return Path(self.settings.data)

    @property
    def digest(self) -> str:
        """Of the protocol and of every file it stands on."""
        return digest(self.protocol.digest, self.hashes)

    @property
    def batch(self) -> int:
        """Images at once, where the protocol does not fix it."""
        return self.settings.batch or BATCH

    @property
    def block(self) -> int:
        """Samples in a shard."""
        return CLASS_BLOCK if self.protocol.classes else SHARD

    @property
    def first(self) -> bool:
        """Whether this process writes what one process alone writes."""
        return self.processes.is_main_process

    def sampler(
        self,
        path: str,
        *,
        name: str,
        role: str,
        steps: int,
        guidance: float,
        revision: str | None = None,
        combined: Guidance = Guidance(),
        like: str | None = None,
        inside: float | None = None,
    ) -> Sampler:
        """The pipeline at ``path``, traced, with the protocol's prompts or its own classes.

        One whose guidance is inside its network, or that has none, runs at ``guidance`` 1.

        Args:
            combined: how the passes are combined; its scale does not count.
            like: an export whose recipe says with what arguments and IP-Adapter the pipeline is called; None: its own.
            inside: the scale of guidance inside the network; None: ``guidance``.

        Raises:
            InputError: it cannot be loaded or traced, or takes or makes what the protocol does not.
        """
        facts = ExportFacts.read(like or path)
        adapter = None if facts is None else facts.ip_adapter
        named = facts.origin if like and facts else as_teacher(path)
        traced = open_teacher(
            named.model_copy(update={"pipeline": path, "revision": revision}),
            arguments=facts.arguments if facts else {},
            ip_adapter=adapter,
            guidance=Guidance(scale=guidance if inside is None else inside),
            device=self.device,
            dtype=self.settings.dtype,
        )
        traced = with_guider(with_rule(traced, combined.combination), combined.guider)
        requested = self.requests(traced, path)
        scale = guidance if traced.guidance.kind in ("batched", "two_calls") else 1.0
        weights = weights_digest(traced.pipeline)
        if adapter is not None:  # no state dict holds its weights
            weights = digest(weights, adapter.model_dump())
        if made_of := getattr(traced.pipeline, "made_of", None):  # the words for textual inversions are no weights
            weights = digest(weights, made_of)
        return Sampler(name, role, traced, weights, tuple(requested), steps, scale)

    def requests(self, traced: Trace, path: str) -> Sequence[str | int]:
        """The entries of a pipeline's samples, in turn; raises InputError where the protocol does not fit it."""
        protocol = self.protocol
        if protocol.classes:
            check_classes(traced, protocol, path)
            return range(len(protocol.classes))
        kind = "prompts" if traced.entry == "prompt" else "classes"
        if protocol.conditions not in (kind, "any"):
            cls = type(traced.pipeline).__name__
            raise InputError(f"{path}: protocol {protocol.id} needs a pipeline of {protocol.conditions}, found {cls}")
        check_pictures(traced, path)
        if isinstance(protocol.reference, ShippedReference):
            actual, size = image_shape(traced), protocol.reference.size
            if actual != (3, size):
                raise InputError(f"{path}: protocol {protocol.id} measures RGB images of {size} px, found {actual}")
        if kind == "classes":
            return entries(traced, "classes")
        with self.processes.main_process_first():
            self.hashes |= obtain([protocol.prompts], self.data, offline=self.settings.offline)
        return self.prompts

    @property
    def prompts(self) -> list[str]:
        """The protocol's."""
        return read_prompts(self.protocol.prompts.path(self.data), self.protocol.prompts.count)

    def images(self, sampler: Sampler, count: int) -> Shards:
        """The first ``count`` samples, made where they are not yet there; all processes together."""
        shards = Shards(self.folder(sampler) / "images", count, self.block)
        batch = None if self.protocol.classes else self.batch

        def make(indices: range) -> dict[str, Tensor]:
            return {"images": draw(sampler, indices, indices.start, seed=self.seed, batch=batch)}

        return self.fill(shards, make, f"{sampler.name}, {counted(sampler.steps, 'step')}")

    def repeats(self, sampler: Sampler) -> Shards:
        """Further samples: the first prompts, several images each, on noise of their own."""
        shards, spread = self.repeat_shards(sampler), self.protocol.diversity

        def make(indices: range) -> dict[str, Tensor]:
            numbers = [index % spread.prompts for index in indices]
            first = REPEAT_OFFSET + indices.start
            return {"images": draw(sampler, numbers, first, seed=self.seed, batch=self.batch)}

        return self.fill(shards, make, f"{sampler.name}, {counted(sampler.steps, 'step')}: repeats")

    def repeat_shards(self, sampler: Sampler) -> Shards:
        """Where :meth:`repeats` lie."""
        return Shards(self.folder(sampler) / f"repeats-{self.protocol.diversity.prompts}", self.further)

    @property
    def further(self) -> int:
        """How many samples a row has beside its own, for diversity."""
        spread = self.protocol.diversity
        return spread.prompts * spread.images if spread else 0

    def features(self, images: Shards, view: str, folder: Path) -> Shards:
        """A view's rows of image shards, beside them in ``folder``."""
        shards = Shards(folder / f"{view}-{self.view_digest(view)[:16]}", images.count, images.size)
        batch = CLASS_BATCH if self.protocol.classes else SHARD
        network, read = self.networks[view], lambda indices: images.read(indices)["images"]
        return self.fill(shards, features_of(read, network, self.device, batch=batch), f"features: {view}")

    @cached_property
    def real(self) -> dict[str, RealSide] | None:
        """What the protocol's reference is to every view; None: the reference is the teacher."""
        return {view: self._reference(view) for view in self.protocol.views} if self.protocol.reference else None

    def _reference(self, view: str) -> RealSide:
        """Of one view; features of images are computed once.

        Raises:
            InputError: the reference does not hold what the protocol says.
        """
        spec, network = self.protocol.reference, self.networks[view]
        path = spec.path(self.data)
        if isinstance(spec, ClassReference):
            return class_statistics(spec, view)
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
            moments = moments or _cached_moments(shards)
        return RealSide(moments, lambda: shards.all("rows"))

    def view_digest(self, view: str) -> str:
        """Of what decides a view's rows."""
        spec = self.protocol.views[view]
        files = (self.hashes[file.file] for file in spec.files)
        return digest(spec.model_dump(mode="json", exclude={"metrics", "prefix"}), *files)

    def folder(self, sampler: Sampler) -> Path:
        """Where a sampler's images and rows lie."""
        return self.cache / "samples" / sampler.key(self.seed, 0, sampler.requests("samples"))[:32]

    def fill(self, shards: Shards, make: Callable[[range], dict[str, Tensor]], title: str) -> Shards:
        """The shards, whole; every process makes its share of them and waits for the others."""
        progress = self.settings.progress if self.first else None
        tell = None if progress is None else lambda done, total: progress(title, done, total)
        who = {"rank": self.processes.process_index, "processes": self.processes.num_processes}
        shards.fill(make, **who, progress=tell)
        self.processes.wait_for_everyone()
        return shards

    def views(
        self, sampler: Sampler, real: dict[str, RealSide] | None, count: int | None = None
    ) -> dict[str, ViewRows]:
        """What every network of the protocol sees in a sampler's first images; all processes together."""
        count, protocol = count or self.samples, self.protocol
        images, folder = self.images(sampler, count), self.folder(sampler)
        repeated = self.repeats(sampler) if protocol.diversity else None
        views = {}
        for name, spec in protocol.views.items():
            view = ViewRows(self.features(images, name, folder), real=real[name] if real else RealSide())
            if {*spec.metrics} & {*ALIGNMENT}:
                view.texts, view.splits = self.texts(sampler.entries, name), self.splits
            if repeated and "diversity" in spec.metrics:
                view.repeats = self.features(repeated, name, folder / "repeats").all("rows")
                view.repeat_prompts = torch.arange(repeated.count) % protocol.diversity.prompts
            if protocol.classes:
                view.labels = torch.arange(count) % len(protocol.classes)
            views[name] = view
        return views

    @property
    def splits(self) -> list[str]:
        """Of every sample's prompt; empty where a protocol has none."""
        if not isinstance(self.protocol.prompts, ShippedPrompts):
            return []
        known = [one["split"] for one in read_entries(self.protocol.prompts.path(self.data)).values()]
        return [known[i % len(known)] for i in range(self.samples)]

    def texts(self, prompts: Sequence[str], view: str) -> Tensor:
        """A view's rows of every sample's prompt (samples, d)."""
        key = digest(prompts, self.view_digest(view), self.protocol.views[view].prefix)
        shards = Shards(self.cache / "texts" / key[:32], min(self.samples, len(prompts)))
        network = self.networks[view]
        self.fill(shards, lambda indices: {"rows": network.texts([prompts[i] for i in indices])}, "features: prompts")
        texts = shards.all("rows")
        return texts[torch.arange(self.samples) % len(texts)]


def check_classes(traced: Trace, protocol: Protocol, path: str) -> None:
    """Raises InputError unless the pipeline at ``path`` makes images of the protocol's shape and of its classes."""
    # Not "exactly": a stock DiT folder may have lost its labels, and then counts the classes it could embed.
    if (count := class_count(traced)) < len(protocol.classes):
        kind = type(traced.pipeline).__name__
        expected = f"protocol {protocol.id} expects {len(protocol.classes)} classes, {kind} has {count}"
        raise InputError(f"{path}: {expected}; --protocol teacher-fid-5k-v1 measures any pipeline")
    device = next(traced.denoiser.network.parameters()).device
    probe = decode(traced, torch.zeros(1, *traced.latent_shape, device=device))
    if tuple(probe.shape[1:]) != protocol.image:
        shape = tuple(probe.shape[1:])
        raise InputError(f"{path}: protocol {protocol.id} expects images of shape {protocol.image}, found {shape}")


def check_pictures(traced: Trace, path: str) -> None:
    """Raises InputError unless the pipeline at ``path`` makes pictures or videos, which there are metrics for."""
    made = medium(traced)
    if made.name == "sound" or made.shape[-3] not in (1, 3):
        kind = type(traced.pipeline).__name__
        raise InputError(f"{path}: expected a pipeline of pictures, {kind} makes {made.shape} numbers; no metric fits")


def _cached_moments(shards: Shards) -> Moments:
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
