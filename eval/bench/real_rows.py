"""What real images score: of the data set's test split, or those whose captions are the protocol's prompts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.data import fashion_mnist
from stepdistill.eval.bench.drawing import Sampler
from stepdistill.eval.bench.rows import Bench
from stepdistill.eval.bench.samples import opened
from stepdistill.eval.files import read_entries
from stepdistill.eval.measure import ALIGNMENT, ViewRows, measure, measure_classes
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.protocol import Protocol, ShippedReference
from stepdistill.eval.report import Report
from stepdistill.eval.shards import HeldRows
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.latents import encode_images

SHUFFLED = "real images, each with another one's caption"

Metrics = dict[str, float]


def add_real_images(bench: Bench, report: Report, teacher: Sampler, name: str) -> None:
    """Put what real images score into the report, and what the teacher's autoencoder leaves of them.

    Args:
        name: of the teacher's pipeline.
    """
    if bench.protocol.classes and bench.first:
        report.floor = floor(bench)
    if isinstance(bench.protocol.reference, ShippedReference):
        report.floor, report.controls[SHUFFLED] = unseen_images(bench)
        if seen := reconstructions(bench, teacher):
            report.controls[f"real images through {name}'s autoencoder"] = seen


def floor(bench: Bench) -> Metrics:
    """The metrics of a data set's test images; empty where it is not installed or has fewer than there are samples.

    No sampler can be expected to do better.
    """
    protocol, samples = bench.protocol, bench.samples
    key = f"floor-{protocol.digest[:32]}-{samples}"
    for stored in (bench.stored.floor(samples), bench.stored.get(key)):
        if known := bench.known({"metrics": stored} if stored else None):
            return known["metrics"]
    real = test_images(protocol)
    if real is None or len(real[0]) < samples:
        return {}
    measured = measure_classes(protocol, bench.networks, bench.real, *(part[:samples] for part in real), errors=False)
    bench.stored.put(key, measured.metrics)
    return measured.metrics


def test_images(protocol: Protocol) -> tuple[Tensor, Tensor] | None:
    """Test images uint8 (N, C, H, W) and classes of the protocol's data set; None where it is not installed."""
    if protocol.images != "fashion-mnist":
        return None
    try:
        return fashion_mnist.load("test")
    except FileNotFoundError:
        return None


def unseen_images(bench: Bench) -> tuple[Metrics, Metrics]:
    """Metrics of the unseen images, and the alignment that is left when each has the next one's caption.

    At most as many as there are samples, in the order of the prompts.
    """
    rows = {name: side.unseen for name, side in bench.real.items()}
    own = measure(bench.protocol, _views(bench, rows), bench.protocol.metrics, errors=False)
    others = measure(bench.protocol, _views(bench, rows, shift=1), tuple(ALIGNMENT), errors=False)
    return own.metrics, others.metrics


def reconstructions(bench: Bench, sampler: Sampler) -> Metrics:
    """Metrics of the unseen images after the autoencoder of a sampler's pipeline: what its denoiser can reach.

    Empty where the images are not below the data folder, or the pipeline has no autoencoder.
    """
    folder = bench.data / bench.protocol.reference.pictures
    if not folder.is_dir() or getattr(sampler.trace.pipeline, "vae", None) is None:
        return {}
    names = list(read_entries(bench.protocol.prompts.path(bench.data)))[: bench.samples]
    images = torch.stack([opened(folder / name) for name in names])
    seen = decode(sampler.trace, encode_images(sampler.trace, images), batch=bench.batch).cpu()
    rows = {name: feature_pass(bench.networks[name], seen, device=bench.device)["rows"] for name in bench.real}
    return measure(bench.protocol, _views(bench, rows), bench.protocol.metrics, errors=False).metrics


def _views(bench: Bench, rows: Mapping[str, Tensor], shift: int = 0) -> dict[str, ViewRows]:
    """Rows (N, d) as the views of a sampler; image i with the caption of image i + ``shift``."""
    views = {}
    for name, side in bench.real.items():
        own = rows[name][: bench.samples]
        views[name] = ViewRows(HeldRows({"rows": own}), real=side)
        if {*bench.protocol.views[name].metrics} & {*ALIGNMENT}:
            texts = bench.texts(bench.prompts, name)[: len(own)]
            views[name].texts, views[name].splits = texts.roll(-shift, 0), bench.splits[: len(own)]
    return views
