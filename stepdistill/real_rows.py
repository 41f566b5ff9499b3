"""What real images score under a protocol that keeps rows of some whose captions are its prompts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.eval.networks import feature_pass
from stepdistill.eval.shards import Shards
from stepdistill.eval.shipped import read_entries
from stepdistill.eval.standard_measure import ALIGNMENT, RealSide, ViewRows, measure_standard
from stepdistill.generation.drawing import Sampler, digest
from stepdistill.generation.generate import decode
from stepdistill.generation.latents import encode_images
from stepdistill.standard_rows import StandardBench, opened

SHUFFLED = "real images, each with another one's caption"

Metrics = dict[str, float]


def real_images(bench: StandardBench, real: Mapping[str, RealSide]) -> tuple[Metrics, Metrics]:
    """Metrics of the unseen images, and the alignment that is left when each has the next one's caption.

    At most as many as there are samples, in the order of the prompts.
    """
    rows = {name: side.unseen for name, side in real.items()}
    own = measure_standard(bench.protocol, _views(bench, real, rows), bench.protocol.metrics, resamples=0)
    others = measure_standard(bench.protocol, _views(bench, real, rows, shift=1), tuple(ALIGNMENT), resamples=0)
    return own.metrics, others.metrics


def reconstructions(bench: StandardBench, sampler: Sampler, real: Mapping[str, RealSide]) -> Metrics:
    """Metrics of the unseen images after the autoencoder of a sampler's pipeline: what its denoiser can reach.

    Empty where the images are not below the data folder, or the pipeline has no autoencoder.
    """
    folder = bench.data / bench.protocol.reference.pictures
    if not folder.is_dir() or getattr(sampler.trace.pipeline, "vae", None) is None:
        return {}
    names = list(read_entries(bench.protocol.prompts.path(bench.data)))[: bench.samples]
    images = torch.stack([opened(folder / name) for name in names])
    seen = decode(sampler.trace, encode_images(sampler.trace, images), batch=bench.batch).cpu()
    rows = {name: feature_pass(bench.networks[name], seen, device=bench.device)["rows"] for name in real}
    return measure_standard(bench.protocol, _views(bench, real, rows), bench.protocol.metrics, resamples=0).metrics


def _views(
    bench: StandardBench, real: Mapping[str, RealSide], rows: Mapping[str, Tensor], shift: int = 0
) -> dict[str, ViewRows]:
    """Rows (N, d) as the views of a sampler; image i with the caption of image i + ``shift``."""
    views = {}
    for name, side in real.items():
        kept = rows[name][: bench.samples]
        key = digest(kept.tolist())
        shards = Shards(bench.cache / "references" / key[:32], len(kept))
        bench.fill(
            shards, lambda indices, kept=kept: {"rows": kept[indices.start : indices.stop]}, f"real rows: {name}"
        )
        views[name] = ViewRows(shards, real=side)
        if {*bench.protocol.views[name].metrics} & {*ALIGNMENT}:
            texts = bench.texts(bench.prompts, name)[: len(kept)]
            views[name].texts, views[name].splits = texts.roll(-shift, 0), bench.splits[: len(kept)]
    return views
