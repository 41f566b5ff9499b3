"""What ``bench --also`` measures of a row under a protocol of prompts, in shards like the protocol's own features."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, digest
from stepdistill.eval.metrics import standard_error
from stepdistill.eval.perceptual import ALSO, DISTANCE, DIVERSITY, Lpips, Preference, also_files, lpips_diversity
from stepdistill.eval.shards import Shards

if TYPE_CHECKING:
    from stepdistill.eval.bench.rows import Bench


@dataclass(frozen=True)
class Extras:
    """The networks of ``--also`` by name."""

    networks: Mapping[str, Lpips | Preference]

    def check(self, sampler: Sampler) -> None:
        """Raises InputError where a score needs prompts and the pipeline takes none."""
        for name in self.networks:
            if ALSO[name].wants_prompts and isinstance(sampler.entry(0), int):
                raise InputError(f"also: {name} needs a pipeline of prompts, found classes in {sampler.name}")

    def measure(
        self, bench: "Bench", sampler: Sampler, teacher: Path | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, their standard errors ``<metric>_error``) of a sampler; all processes together.

        Args:
            teacher: folder of the images, of the same prompts and noise, that it is compared with; None: it is the
                teacher.
        """
        values: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            tag = f"{name}-{digest([bench.hashes[spec.file] for spec in also_files([name])])[:16]}"
            if name == "lpips":
                values |= _lpips(bench, sampler, teacher, network, tag)
            else:
                (metric,) = ALSO[name].labels
                values[metric] = _preference(bench, sampler, network, tag)
        errors = {
            f"{metric}_error": standard_error(lambda index, all_=all_: float(all_[index].mean()), len(all_))
            for metric, all_ in values.items()
            if len(all_) > 1
        }
        return {metric: float(all_.mean()) for metric, all_ in values.items()}, errors


def _preference(bench: "Bench", sampler: Sampler, score: Preference, tag: str) -> Tensor:
    images, shards = bench.images(sampler, bench.samples), Shards(bench.folder(sampler) / tag, bench.samples)

    def make(indices: range) -> dict[str, Tensor]:
        parts = zip(images.read(indices)["images"].split(bench.batch), _cut(indices, bench.batch), strict=True)
        return {"values": torch.cat([score(part, [sampler.entry(i) for i in some]) for part, some in parts])}

    return bench.fill(shards, make, tag).all("values").double()


def _lpips(bench: "Bench", sampler: Sampler, teacher: Path | None, distance: Lpips, tag: str) -> dict[str, Tensor]:
    folder, values = bench.folder(sampler), {}
    if spread := bench.protocol.diversity:
        repeated = bench.repeats(sampler).all("images")

        def spreads(prompts: range) -> dict[str, Tensor]:
            return {"values": torch.stack([lpips_diversity(distance, repeated[p :: spread.prompts]) for p in prompts])}

        shards = Shards(folder / "repeats" / tag, spread.prompts)
        values[DIVERSITY] = bench.fill(shards, spreads, f"{tag}: diversity").all("values")
    if teacher is not None:
        ours, theirs = bench.images(sampler, bench.samples), Shards(teacher / "images", bench.samples)

        def distances(indices: range) -> dict[str, Tensor]:
            pairs = zip(*(side.read(indices)["images"].split(bench.batch) for side in (ours, theirs)), strict=True)
            return {"values": torch.cat([distance(a, b) for a, b in pairs])}

        shards = Shards(folder / f"{tag}-to-{teacher.name[:16]}", bench.samples)
        values[DISTANCE] = bench.fill(shards, distances, f"{tag}: to the teacher").all("values").double()
    return values


def _cut(indices: range, size: int) -> list[range]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]
