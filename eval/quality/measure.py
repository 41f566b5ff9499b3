"""A protocol's metrics from feature rows; every network has looked at every image once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.features import Classifier
from stepdistill.eval.lite import Thumbnail, lit_scorer, lite, projected_lite
from stepdistill.eval.metrics import (
    Moments,
    MomentSum,
    class_accuracy,
    class_variance,
    clip_score,
    cmmd,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    memorised,
    precision_recall,
    prompt_diversity,
    standard_error,
    variance_ratio,
)
from stepdistill.eval.networks import FeatureNetwork, clip, dino, feature_pass, inception
from stepdistill.eval.protocol import Protocol, ShippedView, ViewSpec
from stepdistill.eval.references import RealSide
from stepdistill.eval.shards import Blocks, HeldRows

FRECHET = ("fid", "patch_fid", "fd_dinov2", "fd_enet", "fd_classifier")
KID = ("kid", "kid_enet", "kid_classifier")
NEEDS_REAL_ROWS = (*KID, "precision", "recall", "density", "coverage", "cmmd", "memorised")
ALIGNMENT = {"clip_score": None, "lit_score": None, "lit_score_styles": "styles", "lit_score_concepts": "concepts"}
"""Metrics of a picture and its prompt: of which split's prompts, None: of all."""
CLASS_BATCH = 250
"""Images of a data set of classes that a network sees at once. Fixed: it decides the last digits."""

FRECHET_RESAMPLES = 10
"""Of each a distance between moments of all samples is computed, which takes a second."""


@dataclass(frozen=True)
class Measurement:
    """``metrics`` are the report's; ``diagnostics`` explain them: standard errors ``<metric>_error``; of classes also
    the spread of the kernel distance over its subsets, ``<metric>_std``, and the features' variance within classes
    relative to that of real images."""

    metrics: dict[str, float]
    diagnostics: dict[str, float]


@dataclass
class ViewRows:
    """One view's rows of one row of the report.

    Args:
        texts: rows of the prompts (N, d), for CLIP and LiT.
        splits: each prompt's.
        repeats: rows of the further samples, for diversity.
        repeat_prompts: the number of each further sample's prompt.
        labels: the samples' classes (N,), under a protocol of classes.
    """

    samples: Blocks
    texts: Tensor | None = None
    splits: Sequence[str] = ()
    repeats: Tensor | None = None
    repeat_prompts: Tensor | None = None
    labels: Tensor | None = None
    real: RealSide = field(default_factory=RealSide)


def load_view(view: ViewSpec | ShippedView, folder: Path, device: str | torch.device) -> FeatureNetwork:
    """The network of a view, on ``device``, with its weights from the data folder or a package.

    Raises:
        InputError: a package or a file is absent, or does not hold the network.
    """
    if isinstance(view, ShippedView):
        loaders = {"enet": projected_lite, "lit": lit_scorer, "thumbnail": Thumbnail, "classifier": Classifier.load}
        load = lite if view.network == "enet" and view.weights is None else loaders[view.network]
        return load(*([view.weights.path(folder)] if view.weights else [])).to(device)
    weights = view.weights.path(folder)
    if view.network == "inception":
        return inception(weights, crop=view.crop, resize=view.resize).to(device)
    if view.network == "clip":
        return clip(view.arch, weights, prefix=view.prefix, crop=view.crop).to(device)
    return dino(weights, crop=view.crop).to(device)


def measure(
    protocol: Protocol, views: Mapping[str, ViewRows], metrics: Sequence[str], *, errors: bool = True
) -> Measurement:
    """The protocol's metrics, of ``metrics`` alone; with ``errors`` their standard errors by bootstrap."""
    values: dict[str, float] = {}
    diagnostics: dict[str, float] = {}
    for name, spec in protocol.views.items():
        requested = [metric for metric in spec.metrics if metric in metrics]
        measured = _measure_view(protocol, views[name], requested, errors)
        values |= measured.metrics
        diagnostics |= measured.diagnostics
    return Measurement(values, diagnostics)


def measure_classes(
    protocol: Protocol,
    networks: Mapping[str, FeatureNetwork],
    real: Mapping[str, RealSide],
    images: Tensor,
    labels: Tensor,
    *,
    errors: bool = True,
) -> Measurement:
    """The metrics of images uint8 (N, C, H, W) in memory that are to be of classes ``labels`` (N,).

    Raises:
        InputError: the images are not of the protocol's shape, or fewer than its neighbours need.
    """
    if tuple(images.shape[1:]) != protocol.image:
        shape = tuple(images.shape[1:])
        raise InputError(f"protocol {protocol.id} measures images of shape {protocol.image}, found {shape}")
    views = {}
    for name, network in networks.items():
        device = next(network.parameters()).device
        rows = HeldRows(feature_pass(network, images, device=device, batch=CLASS_BATCH))
        views[name] = ViewRows(rows, labels=labels, real=real[name])
    return measure(protocol.only(tuple(networks)), views, protocol.metrics, errors=errors)


def _measure_view(protocol: Protocol, view: ViewRows, requested: Sequence[str], errors: bool) -> Measurement:
    result = Measurement({}, {})
    for metric in set(requested) & set(FRECHET):
        _frechet(metric, view, errors, result)
    if set(requested) & set(NEEDS_REAL_ROWS):
        _against_rows(protocol, view, requested, result)
    if "inception_score" in requested:
        result.metrics["inception_score"], spread = inception_score(view.samples.all("logits"))
        # Of the splits' mean, as KID's is of its subsets'.
        result.diagnostics["inception_score_error"] = spread / min(10, view.samples.count) ** 0.5
    for metric in set(requested) & set(ALIGNMENT):
        _alignment(metric, view, errors, result)
    if "diversity" in requested and view.repeats is not None:
        result.metrics["diversity"] = prompt_diversity(view.repeats, view.repeat_prompts)
    if view.labels is not None:
        _of_classes(view, requested, result)
    ordered = {metric: result.metrics[metric] for metric in requested if metric in result.metrics}
    return Measurement(ordered, result.diagnostics)


def _frechet(metric: str, view: ViewRows, errors: bool, result: Measurement) -> None:
    real, samples = view.real.moments, view.samples
    if view.labels is None:
        result.metrics[metric] = frechet_distance(real, samples.moments())
        if errors:
            result.diagnostics[f"{metric}_error"] = standard_error(
                lambda index: frechet_distance(real, resampled_moments(samples, index)),
                samples.count,
                resamples=FRECHET_RESAMPLES,
            )
        return
    rows = samples.all("rows")
    result.metrics[metric] = frechet_distance(real, Moments.of(rows))
    if errors and metric == "fd_classifier":  # of 1280 features the bootstrap would take a minute a row
        result.diagnostics[f"{metric}_error"] = standard_error(
            lambda index: frechet_distance(real, Moments.of(rows[index])), len(rows), strata=view.labels
        )


def resampled_moments(samples: Blocks, index: Tensor) -> Moments:
    """Moments of the rows ``index`` (n,), which may repeat, with one block in memory at a time."""
    times = torch.bincount(index, minlength=samples.count).split(samples.size)
    blocks = zip(samples.blocks("rows"), times, strict=True)
    return MomentSum.of(rows.repeat_interleave(several, dim=0) for rows, several in blocks).moments()


def _against_rows(protocol: Protocol, view: ViewRows, requested: Sequence[str], result: Measurement) -> None:
    real, fake, values = view.real.rows(), view.samples.all("rows"), result.metrics
    for metric in set(requested) & set(KID):
        values[metric], spread = kid(real, fake, **protocol.kid.model_dump())
        blocks = min(protocol.kid.subsets, min(len(real), len(fake)) // protocol.kid.size)
        if view.labels is not None:
            result.diagnostics[f"{metric}_std"] = spread
        elif blocks > 1:  # subsets that are whole sets do not vary, and would say nothing of other samples
            result.diagnostics[f"{metric}_error"] = spread / blocks**0.5
    if "memorised" in requested:
        values["memorised"] = memorised(fake, real, view.real.unseen, near=protocol.reference.near)
    if "cmmd" in requested:
        values["cmmd"] = cmmd(real, fake)
    # Both sides as many rows: these metrics depend on their numbers.
    n, k = min(len(real), len(fake), protocol.neighbours.rows), protocol.neighbours.k
    if n <= k:
        raise InputError(f"samples: protocol {protocol.id} needs more than {k}, found {n}")
    if view.real.labels is not None:
        real = real[:n]  # in random order
    # Evenly over each side: where real pictures lie by category, the first would be those of a few.
    real, fake = (rows[torch.arange(n) * len(rows) // n] for rows in (real, fake))
    if {"precision", "recall"} & set(requested):
        values["precision"], values["recall"] = precision_recall(real, fake, k=k)
    if {"density", "coverage"} & set(requested):
        values["density"], values["coverage"] = density_coverage(real, fake, k=k)


def _alignment(metric: str, view: ViewRows, errors: bool, result: Measurement) -> None:
    rows, texts, split = view.samples.all("rows"), view.texts, ALIGNMENT[metric]
    if split is not None:
        chosen = torch.tensor([its == split for its in view.splits])
        rows, texts = rows[chosen], texts[chosen]
    if len(rows) == 0:
        return
    result.metrics[metric] = clip_score(rows, texts)
    if errors and len(rows) > 1:
        result.diagnostics[f"{metric}_error"] = standard_error(
            lambda index: clip_score(rows[index], texts[index]), len(rows)
        )


def _of_classes(view: ViewRows, requested: Sequence[str], result: Measurement) -> None:
    rows = view.samples.all("rows")
    for metric in requested:
        if metric.startswith("diversity_"):
            result.metrics[metric] = class_variance(rows, view.labels)
    if "accuracy" in requested:
        result.metrics["accuracy"] = class_accuracy(view.samples.all("logits"), view.labels)
    if view.real.labels is not None:
        result.diagnostics["variance_ratio"] = variance_ratio(rows, view.labels, view.real.rows(), view.real.labels)
