"""Protocols: named, versioned ways to measure a set of images against a stored reference.

A protocol is a YAML file in protocols/ (or one given by path). It pins the networks, their preprocessing and the
reference by SHA-256, so that two numbers under one id mean the same thing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval.bootstrap import standard_error
from stepdistill.eval.features import Classifier, EfficientNetLite, Progress, check_sha256, enet, extract
from stepdistill.eval.metrics import (
    Moments,
    class_accuracy,
    class_variance,
    frechet_distance,
    kid,
    precision_recall,
    variance_ratio,
)

NetworkName = Literal["classifier", "enet"]
NETWORKS: tuple[NetworkName, ...] = ("classifier", "enet")
DIVERSITY = ("diversity_classifier", "diversity_enet")
"""Younger than protocol fashion-v1: a stored row without them is whole, and is not measured again."""
METRICS = ("fd_classifier", "kid_classifier", "fd_enet", "kid_enet", "precision", "recall", "accuracy", *DIVERSITY)

_FOLDER = Path(__file__).parent / "protocols"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReferenceSpec(_Strict):
    """Which real images stand for the data, and where their statistics lie."""

    images: str
    file: str
    sha256: str | None
    rows: int
    enet_rows: int


class NetworkSpec(_Strict):
    """One feature network: its weights and what an image goes through before it."""

    weights: str
    sha256: str | None
    resolution: int
    resize: str
    normalise: str
    features: int


class KidSpec(_Strict):
    subsets: int
    size: int
    seed: int


class Protocol(_Strict):
    """A frozen protocol; see protocols/fashion-v1.yaml for the meaning of every key."""

    id: str
    image: tuple[int, int, int]
    labels: tuple[str, ...]
    data: Literal["fashion-mnist"] | None = None
    reference: ReferenceSpec
    measurements: str
    networks: dict[NetworkName, NetworkSpec]
    kid: KidSpec
    neighbours: int

    @property
    def digest(self) -> str:
        """SHA-256 over everything the protocol says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def protocol_path(name: str | Path) -> Path:
    """The YAML file of a protocol named like ``fashion-v1``, or ``name`` itself when it is a YAML file.

    Raises:
        InputError: there is no such protocol; the message lists those that exist.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.yaml")))
        raise InputError(f"protocol: expected one of {known} or a YAML file, found {str(name)!r}")
    return path


def load_protocol(name: str | Path = "fashion-v1") -> Protocol:
    """A protocol by name or by the path of its YAML file.

    Raises:
        InputError: there is no such protocol, or a key is missing, unknown or of the wrong type.
    """
    path = protocol_path(name)
    try:
        return Protocol.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg']}, found {first['input']!r}") from error


def pin(name: str | Path, found: dict[str, str]) -> None:
    """Write SHA-256 values into the ``sha256: null`` places of a protocol file.

    Args:
        found: SHA-256 by section, ``reference`` or a network's name. A section that is pinned already is left
            as it is: a frozen protocol does not move.
    """
    path, section, lines = protocol_path(name), "", []
    for line in path.read_text().splitlines(keepends=True):
        key = line.strip().partition(":")[0]
        section = key if key in ("reference", *NETWORKS) else section
        if line.strip().startswith("sha256: null") and section in found:
            line = f"{line[: line.index('sha256')]}sha256: {found[section]}\n"
        lines.append(line)
    path.write_text("".join(lines))


def locate(relative: str) -> Path:
    """A protocol's file: an absolute path as it is, anything else below assets/."""
    return Path(relative) if Path(relative).is_absolute() else assets.find(relative)


def load_networks(
    protocol: Protocol, names: Sequence[str] = NETWORKS, device: str | torch.device = "cpu"
) -> dict[str, Classifier | EfficientNetLite]:
    """The protocol's feature networks by name, verified and in eval mode.

    Raises:
        InputError: a name is not in the protocol, a weights file or package is absent or not the pinned one.
    """
    networks: dict[str, Classifier | EfficientNetLite] = {}
    for name in names:
        if name not in protocol.networks:
            known = ", ".join(protocol.networks)
            raise InputError(f"networks: protocol {protocol.id} has {known}, found {name!r}")
        if name == "enet":
            networks[name] = enet().to(device)
            continue
        spec = protocol.networks["classifier"]
        path = locate(spec.weights)
        if spec.sha256:
            check_sha256(path, spec.sha256)
        networks[name] = Classifier.load(path).to(device)
    return networks


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images: per network their moments, and rows (n, d) float32 for kernel distances."""

    labels: Tensor
    moments: dict[str, Moments]
    rows: dict[str, Tensor]


def build_reference(
    images: Tensor,
    labels: Tensor,
    out: Path,
    *,
    protocol: Protocol,
    networks: dict[str, Classifier | EfficientNetLite],
    progress: Progress | None = None,
) -> None:
    """Write the statistics of the protocol's reference images, uint8 (N, C, H, W), as safetensors to ``out``.

    Classifier: all rows, float16. EfficientNet: mean and upper triangle of the covariance over all images,
    float32, and the first ``enet_rows`` rows, float16. Labels: uint8.
    """
    spec = protocol.reference
    if len(images) < spec.rows:
        raise InputError(f"reference: protocol {protocol.id} needs {spec.rows} images, found {len(images)}")
    images, labels = images[: spec.rows], labels[: spec.rows]
    tensors = {"labels": labels.to(torch.uint8)}
    tensors["classifier/rows"] = extract(networks["classifier"], images, progress=progress).half()
    if "enet" in networks:
        rows = extract(networks["enet"], images, progress=progress)
        moments = Moments.of(rows)
        upper = torch.triu_indices(rows.shape[1], rows.shape[1])
        tensors |= {
            "enet/rows": rows[: spec.enet_rows].half(),
            "enet/mean": moments.mean.float(),
            "enet/cov_upper": moments.cov[upper[0], upper[1]].float(),
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"protocol": protocol.id, "images": spec.images})


def load_reference(protocol: Protocol) -> Reference:
    """The protocol's reference statistics.

    Raises:
        InputError: the file is absent, or not the pinned one.
    """
    path = locate(protocol.reference.file)
    if protocol.reference.sha256:
        check_sha256(path, protocol.reference.sha256)
    stored = load_file(path)
    rows = {"classifier": stored["classifier/rows"].float()}
    moments = {"classifier": Moments.of(rows["classifier"])}
    if "enet/rows" in stored:
        rows["enet"] = stored["enet/rows"].float()
        mean = stored["enet/mean"].double()
        upper = torch.triu_indices(len(mean), len(mean))
        cov = mean.new_zeros(len(mean), len(mean))
        cov[upper[0], upper[1]] = stored["enet/cov_upper"].double()
        moments["enet"] = Moments(mean, cov.triu() + cov.triu(1).T)
    return Reference(stored["labels"].long(), moments, rows)


@dataclass(frozen=True)
class Instruments:
    """A protocol with its networks and reference in memory, ready to measure."""

    protocol: Protocol
    networks: dict[str, Classifier | EfficientNetLite]
    reference: Reference

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that these networks give, in the report's order."""
        absent = [f"_{name}" for name in NETWORKS if name not in self.networks]
        needs_classifier = () if "classifier" in self.networks else ("precision", "recall", "accuracy")
        return tuple(m for m in METRICS if m not in needs_classifier and not m.endswith(tuple(absent)))


def load_instruments(
    protocol: str | Path = "fashion-v1", names: Sequence[str] = NETWORKS, device: str | torch.device = "cpu"
) -> Instruments:
    """Protocol, networks and reference at once; raises InputError as their loaders do."""
    loaded = load_protocol(protocol)
    networks, reference = load_networks(loaded, names, device), load_reference(loaded)
    for name in networks:
        if name not in reference.moments:
            raise InputError(f"reference {loaded.reference.file} has no statistics of {name}; build it again")
    return Instruments(loaded, networks, reference)


@dataclass(frozen=True)
class Measurement:
    """``metrics`` are the report's; ``diagnostics`` explain them: spread of the kernel distance over its
    subsets, standard errors by bootstrap, and the within-class feature variance relative to real images."""

    metrics: dict[str, float]
    diagnostics: dict[str, float]


def measure(instruments: Instruments, images: Tensor, labels: Tensor, progress: Progress | None = None) -> Measurement:
    """Measure uint8 images (N, C, H, W), asked to be of classes ``labels`` (N,), against the reference.

    Raises:
        InputError: the images are not of the protocol's shape, or fewer than its neighbours need.
    """
    protocol, reference = instruments.protocol, instruments.reference
    if tuple(images.shape[1:]) != protocol.image:
        found = tuple(images.shape[1:])
        raise InputError(f"protocol {protocol.id} measures images of shape {protocol.image}, found {found}")
    if len(images) <= protocol.neighbours:
        raise InputError(f"samples: protocol {protocol.id} needs more than {protocol.neighbours}, found {len(images)}")
    values: dict[str, float] = {}
    diagnostics: dict[str, float] = {}
    settings = protocol.kid.model_dump()
    for name, network in instruments.networks.items():
        rows = extract(network, images, progress=progress)
        values[f"fd_{name}"] = frechet_distance(reference.moments[name], Moments.of(rows))
        values[f"kid_{name}"], diagnostics[f"kid_{name}_std"] = kid(reference.rows[name], rows, **settings)
        values[f"diversity_{name}"] = class_variance(rows, labels)
        if name == "classifier":
            real = reference.rows[name]
            moved = partial(_resampled, reference.moments[name], rows)
            diagnostics["fd_classifier_error"] = standard_error(moved, len(rows), strata=labels)
            pair = precision_recall(real[: len(rows)], rows, k=protocol.neighbours)
            values["precision"], values["recall"] = pair
            logits = network.head(rows.to(network.head.weight.device)).cpu()
            values["accuracy"] = class_accuracy(logits, labels)
            diagnostics["variance_ratio"] = variance_ratio(rows, labels, real, reference.labels)
    return Measurement({metric: values[metric] for metric in METRICS if metric in values}, diagnostics)


def _resampled(real: Moments, rows: Tensor, index: Tensor) -> float:
    return frechet_distance(real, Moments.of(rows[index]))


def floor(instruments: Instruments, test_images: Tensor, test_labels: Tensor, n: int) -> Measurement:
    """What ``n`` real images that are not in the reference score: no sampler can be expected to do better.

    Raises:
        InputError: there are fewer than ``n`` test images.
    """
    if len(test_images) < n:
        raise InputError(f"floor: expected {n} test images, found {len(test_images)}")
    return measure(instruments, test_images[:n], test_labels[:n])
