"""Rows on disk: named tensors of many rows, gathered by index from mapped files.

    FOLDER/0000000000-HASH.safetensors   rows of the items from 0 on (:mod:`stepdistill.data.shards`)
    FOLDER/constants.safetensors         rows that all items share
    FOLDER/index.json                    written last: with it the store is complete

The rows of a store have one shape, but for the length of dimension 1. Latents of another size are another store.
"""

import json
import mmap
import shutil
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.data.shards import CONSTANTS, INDEX, LENGTHS, SCHEMA, Content, Share, fill, finish
from stepdistill.errors import InputError
from stepdistill.files import read_json, sha256
from stepdistill.progress import say

CHECKED = 2**30
"""Bytes of a store whose content is hashed whenever it is opened; of a larger one the files' sizes are compared."""
OPEN = 64
"""Shards that are mapped at one time."""


class Store:
    """A complete store.

    Args:
        folder: which has an index.

    ``temporary`` is what deletes the folder, of a store that nobody keeps.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, read_json(folder / INDEX)
        self.shards = [shard for shard in self.index["shards"] if shard["rows"]]
        self.starts = np.cumsum([0, *(shard["rows"] for shard in self.shards)]).tolist()
        stored = load_file(folder / CONSTANTS) if self.index["constants"] else {}
        self.constants = {name: self._padded(name, row) for name, row in stored.items()}
        self.temporary: Any = None
        self._shard = lru_cache(OPEN)(lambda number: _Shard(folder, self.shards[number]))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def bytes(self) -> int:
        """Of all files but the index."""
        return sum(shard["bytes"] for shard in (*self.index["shards"], *self.index["constants"]))

    @property
    def content(self) -> list[str]:
        """The hashes of all files but the index."""
        return [shard["sha256"] for shard in (*self.index["shards"], *self.index["constants"])]

    def rows(self, prefix: str) -> "dict[str, Rows | Tensor]":
        """The rows whose names begin with ``prefix``, by the rest of their names; of a constant its one row."""
        names = [name for name in self.index["names"] if name.startswith(prefix)]
        constant = {name for name in names if all(name in shard["constant"] for shard in self.shards)}
        return {
            name.removeprefix(prefix): self.constants[name] if name in constant else Rows(self, name) for name in names
        }

    def gather(self, name: str, index: Tensor) -> Tensor:
        """Rows ``index`` (B,) of ``name``, padded with zeros to the store's longest, in the host's memory."""
        rows, touched = self._zeros(name, len(index)), set()
        if not rows.numel():
            return rows
        places = _as_bytes(rows)
        for place, row in zip(places, index.tolist(), strict=True):
            number = bisect_right(self.starts, row) - 1
            shard = self._shard(number)
            if name in shard.facts["constant"]:
                own = _as_bytes(self.constants[name])[0]
            else:
                own = shard.row(shard.facts["alike"].get(name, name), row - self.starts[number])
            place[: len(own)] = own
            touched.add(shard)
        for shard in touched:
            shard.forget()
        return rows

    def _zeros(self, name: str, count: int) -> Tensor:
        form = self.index["names"][name]
        return torch.zeros(count, *form["shape"], dtype=getattr(torch, form["dtype"]))

    def _padded(self, name: str, row: Tensor) -> Tensor:
        whole = self._zeros(name, 1)
        (whole[:, : row.shape[1]] if row.ndim > 1 else whole).copy_(row)
        return whole


class Rows:
    """The rows of one name in a store (N, ...); indexing reads them."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.shape = torch.Size((len(store), *store.index["names"][name]["shape"]))

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: Tensor | slice | list[int] | int) -> Tensor:
        if isinstance(index, int):
            return self[[index]][0]
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        return self.store.gather(self.name, torch.as_tensor(index, dtype=torch.int64))


class _Shard:
    """A mapped file, in which the bytes of a row are found by its number."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.facts = facts
        with open(folder / facts["file"], "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes, self.begin = np.frombuffer(self.map, np.uint8), 8 + int.from_bytes(self.map[:8], "little")
        self.header = json.loads(self.map[8 : self.begin])
        self.ends: dict[str, np.ndarray] = {}

    def row(self, name: str, number: int) -> np.ndarray:
        """Its bytes."""
        if name not in self.ends:
            self.ends[name] = self._ends(name)
        start, stop = self.ends[name][number : number + 2]
        return self.bytes[start:stop]

    def _ends(self, name: str) -> np.ndarray:
        """Where each row of ``name`` begins in the file, and where the last one ends (n + 1,)."""
        lengths = np.ones(self.facts["rows"], np.int64)
        if name + LENGTHS in self.header:
            lengths = np.frombuffer(self.bytes[slice(*self._place(name + LENGTHS))].tobytes(), np.int32).astype(
                np.int64
            )
        (start, stop), ends = self._place(name), np.cumsum([0, *lengths])
        return start + ends * ((stop - start) // max(1, int(ends[-1])))

    def _place(self, name: str) -> tuple[int, int]:
        start, stop = self.header[name]["data_offsets"]
        return self.begin + start, self.begin + stop

    def forget(self) -> None:
        """Its pages stay with the system, and no longer count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def _as_bytes(rows: Tensor) -> np.ndarray:
    """The bytes of each row (B, bytes), in the same memory."""
    return rows.reshape(len(rows), -1).view(torch.uint8).numpy()


def ensure(
    folder: Path, key: str, content: Callable[[], Content], share: Share | None = None, verify: bool = False
) -> Store:
    """The store in ``folder``; what is missing, damaged or of another key is made, by all processes of ``share``.

    Args:
        key: says everything that the rows depend on.
        content: called where something has to be made.
        verify: compare the hashes of all shards, however many there are.

    Raises:
        InputError: the disk has too little space for it.
        OSError, SafetensorError: the disk is full. What was written so far is kept.
    """
    share = share or Share()
    if share.rank == 0:
        _remove_damaged(folder, key, verify)
    share.wait()
    if share.any(not (folder / INDEX).is_file()):
        to_make = content()
        fill(folder, key, to_make, share)
        share.wait()
        if share.rank == 0:
            finish(folder, key, to_make)
        share.wait()
    return Store(folder)


def _remove_damaged(folder: Path, key: str, verify: bool) -> None:
    """Remove files that are not what the index says, and the index with them; a store of another key as a whole."""
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        facts = read_json(index)
        foreign = (facts["schema"], facts["key"]) != (SCHEMA, key)
        files = [(folder / one["file"], one["bytes"], one["sha256"]) for one in facts["shards"] + facts["constants"]]
    except (InputError, KeyError, TypeError):
        say(f"{index}: damaged; it is made again")
        return index.unlink()
    if foreign:
        say(f"{folder}: a store of another pipeline, other data or another version; it is made again")
        return shutil.rmtree(folder)
    verify = verify or sum(size for _, size, _ in files) <= CHECKED
    for file, size, content in files:
        if not file.is_file() or file.stat().st_size != size or (verify and sha256(file) != content):
            say(f"{file}: damaged or lost; it is made again")
            file.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
