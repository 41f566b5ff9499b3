"""Measured rows cached on disk under a key of everything that a row depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.errors import InputError
from stepdistill.files import write_json


def weights_digest(pipeline: Any) -> str:
    """SHA-256 over the weights and configs of every network of a diffusers pipeline.

    Taken from the loaded tensors, so it holds for a folder, a hub id or a pipeline built in memory alike.
    """
    digest = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if not isinstance(component, nn.Module):
            continue
        digest.update(json.dumps([name, _plain(getattr(component, "config", {}))], sort_keys=True).encode())
        for key, tensor in sorted(component.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def row_key(
    *, weights: str, scheduler: Any, steps: int, guidance: float, seed: int, samples: int, protocol: str, rule: str = ""
) -> str:
    """SHA-256 over what decides a row's metrics. ``weights`` and ``protocol`` are digests; ``rule`` is guidance's."""
    content = {
        "weights": weights,
        "scheduler": [type(scheduler).__name__, _plain(scheduler.config)],
        "steps": steps,
        "guidance": float(guidance),
        "seed": seed,
        "samples": samples,
        "protocol": protocol,
    }
    content |= {"rule": rule} if rule else {}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    """A config without the private keys, which name versions and folders."""
    config = config if hasattr(config, "items") else config.to_dict()
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(public, default=_as_list))


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


class RowCache:
    """Rows by key: JSON files in a folder, and read-only rows that were shipped with the protocol.

    Args:
        folder: made on the first write.
        shipped: a measurements.json, or None.
        protocol: digest; shipped rows of another protocol are ignored.
    """

    def __init__(self, folder: Path, shipped: Path | None, protocol: str):
        self.folder = folder / "rows"
        self.shipped = read_measurements(shipped, protocol) if shipped else empty_measurements(protocol)

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored row, or None; a file that is not whole JSON counts as absent and is measured again."""
        if key in self.shipped["rows"]:
            return self.shipped["rows"][key]
        try:
            return json.loads((self.folder / f"{key}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; atomic, so that two processes never see half of one."""
        write_json(self.folder / f"{key}.json", row)

    def floor(self, samples: int) -> dict[str, Any] | None:
        """The shipped real-against-real row for this many samples."""
        return self.shipped["floors"].get(str(samples))


def empty_measurements(protocol: str) -> dict[str, Any]:
    """A measurements.json without rows: floors by number of samples, rows by key."""
    return {"schema": 1, "protocol": protocol, "floors": {}, "rows": {}}


def read_measurements(path: Path, protocol: str) -> dict[str, Any]:
    """A measurements.json; an empty one when the file is absent or belongs to another protocol digest.

    Raises:
        InputError: the file is not JSON.
    """
    if not path.is_file():
        return empty_measurements(protocol)
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: expected JSON, found {error.msg}") from error
    return stored if stored.get("protocol") == protocol else empty_measurements(protocol)
