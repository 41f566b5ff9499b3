"""The files that protocols stand on: found below one data folder or in a package, downloaded where a link exists
unless ``offline``, and checked against the protocol's SHA-256, or against the user's own pins.yaml where it has none.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError

from stepdistill.errors import InputError
from stepdistill.eval.protocol import FileSpec, ShippedSpec
from stepdistill.files import sha256, write_text

PINS = "pins.yaml"


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
    digests: dict[str, str] = {}
    for name, spec in unique.items():
        path = spec.path(folder)
        digests[name] = content_sha256(path)
        for expected, where in ((spec.sha256, "the protocol's"), (pins.get(name), f"in {folder / PINS}")):
            if expected and not digests[name].startswith(expected):
                raise InputError(f"{path}: SHA-256 is {digests[name]}, pinned is {expected} ({where})")
    if fresh := {name: digests[name] for name, spec in unique.items() if spec.open and name not in pins}:
        write_text(folder / PINS, yaml.safe_dump(pins | fresh))
    return digests


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
    return sha256(path)


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


def read_entries(path: Path) -> dict[str, dict[str, str]]:
    """The prompts of a :class:`ShippedPrompts`: each picture's name, with its ``prompt`` and its ``split``."""
    return json.loads(path.read_text(encoding="utf-8"))
