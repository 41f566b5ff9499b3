"""Metrics of a standard protocol from rows on disk; every network has looked at every image once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.bootstrap import standard_error
from stepdistill.eval.lite import Thumbnail, lit_scorer, projected_lite
from stepdistill.eval.metrics import (
    Moments,
    clip_score,
    cmmd,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    memorised,
    precision_recall,
    prompt_diversity,
)
from stepdistill.eval.moments import MomentSum
from stepdistill.eval.networks import FeatureNetwork, clip, dino, inception
from stepdistill.eval.protocol import Measurement
from stepdistill.eval.shards import SHARD, Shards
from stepdistill.eval.shipped import ShippedView
from stepdistill.eval.standard import StandardProtocol, ViewSpec

FRECHET = ("fid", "patch_fid", "fd_dinov2", "fd_enet")
KID = ("kid", "kid_enet")
NEEDS_REAL_ROWS = (*KID, "precision", "recall", "density", "coverage", "cmmd", "memorised")
ALIGNMENT = {"clip_score": None, "lit_score": None, "lit_score_styles": "styles", "lit_score_concepts": "concepts"}
"""Metrics of a picture and its prompt: of which split's prompts, None: of all."""


@dataclass
class RealSide:
    """What samples are compared with: moments, and rows where a metric needs them.

    ``unseen``: rows (K, d) of real images whose captions are the prompts, where the protocol has such.
    """

    moments: Moments | None = None
    rows: Callable[[], Tensor] | None = None
    unseen: Tensor | None = None


@dataclass
class ViewRows:
    """One view's rows of one row of the report.

    ``texts``: rows of the prompts (N, d), for CLIP and LiT. ``splits``: each prompt's. ``repeats`` and
    ``repeat_prompts``: rows of the further samples for diversity and the number of each one's prompt.
    """

    samples: Shards
    texts: Tensor | None = None
    splits: Sequence[str] = ()
    repeats: Tensor | None = None
    repeat_prompts: Tensor | None = None
    real: RealSide = field(default_factory=RealSide)


def load_view(view: ViewSpec | ShippedView, folder: Path, device: str | torch.device) -> FeatureNetwork:
    """The network of a view, on ``device``, with its weights from the data folder or this package."""
    if isinstance(view, ShippedView):
        loaders = {"enet": projected_lite, "lit": lit_scorer, "thumbnail": Thumbnail}
        return loaders[view.network](*(spec.path(folder) for spec in view.files[:1])).to(device)
    weights = view.weights.path(folder)
    if view.network == "inception":
        return inception(weights, crop=view.crop, resize=view.resize).to(device)
    if view.network == "clip":
        return clip(view.arch, weights, prefix=view.prefix, crop=view.crop).to(device)
    return dino(weights, crop=view.crop).to(device)


def measure_standard(
    protocol: StandardProtocol, views: Mapping[str, ViewRows], metrics: Sequence[str], *, resamples: int = 10
) -> Measurement:
    """The protocol's metrics, of ``metrics`` alone; diagnostics ``<metric>_error`` are bootstrap standard errors."""
    values: dict[str, float] = {}
    diagnostics: dict[str, float] = {}
    for name, spec in protocol.views.items():
        wanted = [metric for metric in spec.metrics if metric in metrics]
        found, errors = _measure_view(protocol, views[name], wanted, resamples)
        values |= found
        diagnostics |= {f"{metric}_error": error for metric, error in errors.items()}
    return Measurement(values, diagnostics)


def _measure_view(
    protocol: StandardProtocol, view: ViewRows, wanted: Sequence[str], resamples: int
) -> tuple[dict[str, float], dict[str, float]]:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for metric in set(wanted) & set(FRECHET):
        values[metric] = frechet_distance(view.real.moments, view.samples.moments())
        if resamples:
            errors[metric] = standard_error(
                lambda index: frechet_distance(view.real.moments, resampled_moments(view.samples, index)),
                view.samples.count,
                resamples=resamples,
            )
    if set(wanted) & set(NEEDS_REAL_ROWS):
        values |= _against_rows(protocol, view, wanted, errors)
    if "inception_score" in wanted:
        values["inception_score"], spread = inception_score(view.samples.all("logits"))
        errors["inception_score"] = spread / min(10, view.samples.count) ** 0.5  # of the splits' mean, as KID's is
    for metric in set(wanted) & set(ALIGNMENT):
        rows, texts, split = view.samples.all("rows"), view.texts, ALIGNMENT[metric]
        if split is not None:
            chosen = torch.tensor([its == split for its in view.splits])
            rows, texts = rows[chosen], texts[chosen]
        if len(rows) == 0:
            continue
        values[metric] = clip_score(rows, texts)
        if resamples and len(rows) > 1:
            resampled = lambda index, rows=rows, texts=texts: clip_score(rows[index], texts[index])  # noqa: E731
            errors[metric] = standard_error(resampled, len(rows))
    if "diversity" in wanted and view.repeats is not None:
        values["diversity"] = prompt_diversity(view.repeats, view.repeat_prompts)
    return {metric: values[metric] for metric in wanted if metric in values}, errors


def resampled_moments(samples: Shards, index: Tensor) -> Moments:
    """Moments of the rows ``index`` (n,), which may repeat, with one shard in memory at a time."""
    times = torch.bincount(index, minlength=samples.count).split(SHARD)
    blocks = zip(samples.blocks("rows"), times, strict=True)
    return MomentSum.of(rows.repeat_interleave(several, dim=0) for rows, several in blocks).moments()


def _against_rows(
    protocol: StandardProtocol, view: ViewRows, wanted: Sequence[str], errors: dict[str, float]
) -> dict[str, float]:
    real, fake = view.real.rows(), view.samples.all("rows")
    values: dict[str, float] = {}
    for metric in set(wanted) & set(KID):
        values[metric], spread = kid(real, fake, **protocol.kid.model_dump())
        # Subsets that are whole sets do not vary, and would say nothing of other samples.
        if (blocks := min(protocol.kid.subsets, min(len(real), len(fake)) // protocol.kid.size)) > 1:
            errors[metric] = spread / blocks**0.5
    if "memorised" in wanted:
        values["memorised"] = memorised(fake, real, view.real.unseen, near=protocol.reference.near)
    if "cmmd" in wanted:
        values["cmmd"] = cmmd(real, fake)
    # Both sides as many rows: these metrics depend on their numbers.
    n, k = min(len(real), len(fake), protocol.neighbours.rows), protocol.neighbours.k
    if n <= k:
        raise InputError(f"samples: protocol {protocol.id} needs more than {k}, found {n}")
    # Evenly over each side: where real pictures lie by category, the first would be those of a few.
    real, fake = (rows[torch.arange(n) * len(rows) // n] for rows in (real, fake))
    if {"precision", "recall"} & set(wanted):
        values["precision"], values["recall"] = precision_recall(real, fake, k=k)
    if {"density", "coverage"} & set(wanted):
        values["density"], values["coverage"] = density_coverage(real, fake, k=k)
    return values


def stored_moments(path: Path, features: int) -> Moments:
    """Moments of an .npz with mu (d,) and sigma (d, d), as EDM and ADM publish them.

    Raises:
        InputError: the file has no such arrays.
    """
    arrays = _npz(path)
    try:
        mean, cov = torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()
    except KeyError as error:
        raise InputError(f"{path}: expected the arrays mu and sigma, found {', '.join(arrays.files)}") from error
    if mean.shape != (features,) or cov.shape != (features, features):
        raise InputError(f"{path}: expected moments of {features} features, found {tuple(cov.shape)}")
    return Moments(mean, cov)


def stored_rows(path: Path, view: str) -> RealSide:
    """A view's rows of a safetensors file, ``<view>/real`` where samples are compared with any, and ``<view>/unseen``.

    Raises:
        InputError: the file has no such tensors.
    """
    with safe_open(path, "pt") as stored:
        names = stored.keys()
        if f"{view}/unseen" not in names:
            raise InputError(f"{path}: expected the rows {view}/unseen, found {', '.join(names)}")
        unseen = stored.get_tensor(f"{view}/unseen").float()
        if f"{view}/real" not in names:
            return RealSide(unseen=unseen)
        rows = stored.get_tensor(f"{view}/real").float()
    return RealSide(Moments.of(rows), lambda: rows, unseen)


def stored_images(path: Path) -> Tensor:
    """Images uint8 (N, 3, H, W) of an .npz whose arr_0 holds them channels-last.

    Raises:
        InputError: the file has none.
    """
    arrays = _npz(path)
    if "arr_0" not in arrays.files or arrays["arr_0"].dtype != np.uint8:
        raise InputError(f"{path}: expected uint8 images arr_0, found {', '.join(arrays.files)}")
    return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)


def _npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected an .npz file, found {error}") from error
