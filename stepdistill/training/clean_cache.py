"""What lies in the cache of encoded conditions, latents, trajectories and samples, and its removal. Without torch."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KINDS = {
    "conditions": "encoded prompts and classes",
    "latents": "encoded images",
    "paths": "trajectories of teachers",
    "prompts": "lists of captions",
    "buckets": "proportions of images",
    "pipelines": "pipelines made of several files",
    "traces": "what was learned about pipelines",
    "samples": "samples of benchmarks",
    "references": "features of reference images",
    "texts": "features of prompts",
    "rows": "measured rows of benchmarks",
}
"""What the first word of a name in the cache is."""


@dataclass(frozen=True)
class Kept:
    """One entry of the cache: a file or a folder.

    Args:
        path: where it is.
        kind: what it is, in words.
        bytes: its size on disk.
        days: since it was last used or, where the file system does not say, written.
    """

    path: Path
    kind: str
    bytes: int
    days: float


def kept(folder: Path, older: float = 0) -> list[Kept]:
    """The entries of the cache that are at least ``older`` days old, the largest first."""
    entries = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        states = [one.lstat() for one in (path, *path.rglob("*"))]
        age = (time.time() - max(max(state.st_atime, state.st_mtime) for state in states)) / 86400
        kind = _KINDS.get(path.name.partition("-")[0].partition(".")[0], "other")
        if age >= older:
            entries.append(Kept(path, kind, sum(state.st_size for state in states), max(0.0, age)))
    return sorted(entries, key=lambda one: -one.bytes)


def remove(entries: Sequence[Kept]) -> None:
    """Remove entries of the cache; what a run needs is made again by its next start."""
    for one in entries:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def totals(entries: Sequence[Kept]) -> list[tuple[str, int, int]]:
    """(kind, number, bytes) of each kind, the largest first."""
    sums: dict[str, tuple[int, int]] = {}
    for one in entries:
        count, size = sums.get(one.kind, (0, 0))
        sums[one.kind] = count + 1, size + one.bytes
    return sorted(((kind, *pair) for kind, pair in sums.items()), key=lambda row: -row[2])
