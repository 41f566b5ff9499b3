"""Protocols that published numbers stand on: prompts, count, reference, networks and preprocessing, in frozen YAML.

Their files are the user's: they lie below one data folder, are downloaded where a link exists unless ``offline``, and
are checked against the protocol's SHA-256, or against the user's own pins.yaml where the protocol has none.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from pydantic import ValidationError, model_validator

from stepdistill.errors import InputError
from stepdistill.eval.protocol import protocol_path
from stepdistill.eval.shipped import ShippedPrompts, ShippedReference, ShippedSpec, ShippedView, Strict
from stepdistill.text_files import write_text

Metric = Literal[
    "fid", "kid", "patch_fid", "fd_dinov2", "precision", "recall", "density", "coverage", "inception_score",
    "clip_score", "cmmd", "diversity",
]  # fmt: skip


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


class PromptSpec(FileSpec):
    """``count``: prompts in the file; None where any list will do."""

    count: int | None

    @property
    def open(self) -> bool:
        """See :class:`FileSpec`; a list of the user's own may change."""
        return super().open and self.count is not None


class ReferenceSpec(FileSpec):
    """Real images: a ``folder`` of them, or ``moments``, an .npz with mu and sigma and perhaps images arr_0."""

    images: str
    kind: Literal["folder", "moments"]
    count: int


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


class TeacherSpec(Strict):
    """How the teacher's row is made; ``guidance`` None: as the student was trained."""

    steps: int
    guidance: float | None


class KidSpec(Strict):
    subsets: int
    size: int
    seed: int


class NeighbourSpec(Strict):
    """``k`` of precision, recall, density and coverage, on at most ``rows`` rows a side."""

    k: int
    rows: int


class DiversitySpec(Strict):
    prompts: int
    images: int


class StandardProtocol(Strict):
    """A frozen protocol; protocols/coco30k-gigagan-v1.yaml explains the keys. ``reference`` None: the teacher."""

    id: str
    conditions: Literal["prompts", "classes", "any"]
    samples: int
    seed: int
    teacher: TeacherSpec
    prompts: PromptSpec | ShippedPrompts | None = None
    reference: ReferenceSpec | ShippedReference | None = None
    views: dict[str, ViewSpec | ShippedView]
    kid: KidSpec
    neighbours: NeighbourSpec
    diversity: DiversitySpec | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything the protocol says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Its metrics, in the order of its views."""
        return tuple(dict.fromkeys(metric for view in self.views.values() for metric in view.metrics))

    def labels(self, samples: int) -> dict[str, str]:
        """What people are shown for every metric, with what its numbers depend on."""
        return {metric: _label(metric, view, samples) for view in self.views.values() for metric in view.metrics}


_TITLES = {
    "fid": "FID@{n}", "patch_fid": "Patch-FID@{n}", "kid": "KID@{n} ×1000", "fd_dinov2": "FD-DINOv2@{n}",
    "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage",
    "inception_score": "Inception score", "cmmd": "CMMD@{n}", "fd_enet": "FD-ENetLite0@{n}",
    "kid_enet": "KID-ENetLite0@{n} ×1000", "memorised": "Memorised", "lit_score": "LiT-score",
    "lit_score_styles": "LiT-score, unseen style", "lit_score_concepts": "LiT-score, unseen concept",
}  # fmt: skip


def _label(metric: str, view: ViewSpec | ShippedView, samples: int) -> str:
    if metric == "clip_score":
        return f"CLIP {view.arch}/{view.pretrained}/{view.prefix.strip() or 'no prefix'}"
    if metric == "diversity":
        return f"Diversity a prompt ({view.network})"
    return _TITLES[metric].format(n=samples)


def is_standard(name: str | Path) -> bool:
    """Whether a protocol is one of these, and not of the embedded data set's kind.

    Raises:
        InputError: there is no such protocol.
    """
    return "views" in _content(name)[0]


def load_standard(name: str | Path) -> StandardProtocol:
    """A protocol by name or path; ``edm50k-v1/cifar10`` where it has several references.

    Raises:
        InputError: no such protocol or reference, or a key is missing, unknown or of the wrong type.
    """
    stated, path, variant = _content(name)
    references = stated.pop("references", None)
    if references is not None:
        if variant not in references:
            raise InputError(
                f"protocol: expected {stated['id']}/ and one of {', '.join(references)}, found {str(name)!r}"
            )
        stated |= {"reference": references[variant], "id": f"{stated['id']}/{variant}"}
    try:
        return StandardProtocol.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg']}, found {first['input']!r}") from error


def _content(name: str | Path) -> tuple[dict[str, Any], Path, str]:
    text = str(name)
    stem, variant = (text, "") if text.endswith((".yaml", ".yml")) else (text.partition("/")[0], text.partition("/")[2])
    path = protocol_path(stem)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the keys of a protocol, found {type(content).__name__}")
    return content, path, variant


def obtain(specs: Sequence[FileSpec | ShippedSpec], folder: Path, *, offline: bool) -> dict[str, str]:
    """Make sure that files lie below ``folder``; returns the SHA-256 of each by its name.

    Where no publisher states a hash, the first use writes it into ``folder``/pins.yaml (name: SHA-256), and later ones
    must agree.

    Raises:
        InputError: files are missing (all are named, with where to get them), or one is not the pinned one.
    """
    unique = {spec.file: spec for spec in specs}
    missing = [spec for spec in unique.values() if not spec.path(folder).exists()]
    if lost := [spec for spec in missing if offline or not (spec.url or spec.hub)]:
        raise InputError("; ".join(_advice(spec, folder) for spec in lost))
    for spec in missing:
        _download(spec, folder / spec.file)
    pins = _read_pins(folder / PINS)
    found: dict[str, str] = {}
    for name, spec in unique.items():
        path = spec.path(folder)
        found[name] = content_sha256(path)
        for expected, where in ((spec.sha256, "the protocol's"), (pins.get(name), f"in {folder / PINS}")):
            if expected and not found[name].startswith(expected):
                raise InputError(f"{path}: SHA-256 is {found[name]}, pinned is {expected} ({where})")
    if fresh := {name: found[name] for name, spec in unique.items() if spec.open and name not in pins}:
        write_text(folder / PINS, yaml.safe_dump(pins | fresh))
    return found


PINS = "pins.yaml"


def _read_pins(path: Path) -> dict[str, str]:
    pins = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return {str(name): str(value) for name, value in (pins or {}).items()}


def _advice(spec: FileSpec | ShippedSpec, folder: Path) -> str:
    path = spec.path(folder)
    if spec.url:
        get = f"curl -L --create-dirs -o {path} {spec.url}"
    elif spec.hub:
        get = f"hf download {spec.hub} {' '.join(spec.names)} --local-dir {path}"
    else:
        get = (spec.how or "").replace("DATA", str(folder))
    return f"{path} is missing; get it: {get}"


def _download(spec: FileSpec, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.partial")
    try:
        if spec.hub:
            huggingface_hub.snapshot_download(spec.hub, local_dir=draft, allow_patterns=list(spec.names))
        else:
            torch.hub.download_url_to_file(spec.url, str(draft), progress=False)
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: {spec.url or spec.hub} cannot be downloaded: {reason}") from error
    shutil.move(draft, path)


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents in the order of names, hidden ones left out."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                digest.update(f"{name.as_posix()} {content_sha256(file)}\n".encode())
        return digest.hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_prompts(path: Path, count: int | None) -> list[str]:
    """Prompts of a text file (one a line), of COCO's annotations (the first of every image), or of MJHQ's JSON.

    Raises:
        InputError: the file holds another number of them, or is not one of these.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        prompts = _json_prompts(path, text)
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts or (count is not None and len(prompts) != count):
        raise InputError(f"{path}: expected {count or 'some'} prompts, found {len(prompts)}")
    return prompts


def _json_prompts(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
        if "annotations" not in content:
            return [entry["prompt"] for entry in content.values()]
        first: dict[int, str] = {}
        for entry in sorted(content["annotations"], key=lambda entry: (entry["image_id"], entry["id"])):
            first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
        return list(first.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected COCO captions or entries with a prompt, found {error}") from error
