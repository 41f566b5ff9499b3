"""Reference statistics: moments and rows of real images, as their publishers or this package store them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.eval.metrics import Moments
from stepdistill.eval.networks import FeatureNetwork, feature_pass
from stepdistill.eval.protocol import ClassReference, Protocol
from stepdistill.files import check_sha256


@dataclass
class RealSide:
    """What samples are compared with: moments, and rows where a metric needs them.

    Args:
        unseen: rows (K, d) of real images whose captions are the prompts, where the protocol has such.
        labels: classes (M,) of all ``rows``, where they are known. Rows of a data set of classes are in random order.
    """

    moments: Moments | None = None
    rows: Callable[[], Tensor] | None = None
    unseen: Tensor | None = None
    labels: Tensor | None = None


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


def class_statistics(spec: ClassReference, view: str) -> RealSide:
    """A view's statistics as :func:`build_reference` writes them.

    Raises:
        InputError: the file is absent, not the pinned one, or has none of this view.
    """
    path = spec.path()
    if spec.sha256:
        check_sha256(path, spec.sha256)
    stored = load_file(path)
    if f"{view}/rows" not in stored:
        raise InputError(f"reference {path} has no statistics of {view}; build it again")
    rows = stored[f"{view}/rows"].float()
    if f"{view}/mean" not in stored:
        return RealSide(Moments.of(rows), lambda: rows, labels=stored["labels"].long())
    mean = stored[f"{view}/mean"].double()
    upper = torch.triu_indices(len(mean), len(mean))
    cov = mean.new_zeros(len(mean), len(mean))
    cov[upper[0], upper[1]] = stored[f"{view}/cov_upper"].double()
    return RealSide(Moments(mean, cov.triu() + cov.triu(1).T), lambda: rows)


def build_reference(
    images: Tensor, labels: Tensor, out: Path, *, protocol: Protocol, networks: Mapping[str, FeatureNetwork]
) -> None:
    """Write the statistics of a data set's images, uint8 (N, C, H, W), and their classes as safetensors to ``out``.

    ``<view>/rows`` float16: all of them, or the first of a view of which few are ``kept``; of such a view also
    ``<view>/mean`` and ``<view>/cov_upper``, the upper triangle of the covariance, over all images, float32. ``labels``
    uint8.

    Raises:
        InputError: there are fewer images than the protocol says.
    """
    spec = protocol.reference
    if len(images) < spec.count:
        raise InputError(f"reference: protocol {protocol.id} needs {spec.count} images, found {len(images)}")
    images, labels = images[: spec.count], labels[: spec.count]
    tensors = {"labels": labels.to(torch.uint8)}
    for name, network in networks.items():
        device = next(network.parameters()).device
        rows = feature_pass(network, images, device=device, batch=250)["rows"]
        tensors[f"{name}/rows"] = rows[: spec.kept.get(name)].half()
        if name in spec.kept:
            moments, (row, column) = Moments.of(rows), torch.triu_indices(rows.shape[1], rows.shape[1])
            tensors |= {f"{name}/mean": moments.mean.float(), f"{name}/cov_upper": moments.cov[row, column].float()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"protocol": protocol.id, "images": spec.images})
