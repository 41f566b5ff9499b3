"""The files of a store (:mod:`stepdistill.data.store`), written one after the other with nothing else in memory.

An item (a prompt, a sample of a source) makes one row, or none where it is rejected. Items are divided into blocks of a
fixed number; a shard ends with its block, or sooner once it has ``SHARD`` bytes, and its name holds a hash of its
content. So the files depend neither on where writing was interrupted nor on how many processes share it.

Of each name a shard has all rows one behind the other, and NAME.lengths: zeros at the end of dimension 1 are left out.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from stepdistill.data.sample import Tally
from stepdistill.errors import InputError
from stepdistill.files import atomic, publish, sha256, write_json
from stepdistill.progress import WorkProgress, say

SHARD = 2**26
"""Bytes from which on a shard ends."""
SCHEMA = 1
CONSTANTS, INDEX, LENGTHS = "constants.safetensors", "index.json", ".lengths"
GIB = 2**30
MEASURED = 3.0
"""Seconds of encoding from which the time of all of it is estimated."""


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does: ``rank`` of ``count``.

    Args:
        any: whether the flag is set in any process; returns when all of them have called it.
        of_first: what the first process has called it with, in all of them.
    """

    rank: int = 0
    count: int = 1
    any: Callable[[bool], bool] = bool
    of_first: Callable[[Exception | None], Exception | None] = lambda error: error

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    @contextmanager
    def after_the_first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others: they find what it has left on the disk.

        What it raises in the first is raised in all of them: none is left waiting.
        """
        if self.rank:
            if (error := self.of_first(None)) is not None:
                raise error
            yield
            return
        try:
            yield
        except Exception as error:
            self.of_first(error)
            raise
        self.of_first(None)


@dataclass(frozen=True)
class Chunk:
    """``count`` rows (count, ...) by name, the number of items that they were made of, and a tally's facts of these."""

    rows: Mapping[str, Tensor]
    count: int
    items: int
    tally: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Content:
    """What a store is to hold, and how it is made.

    Args:
        what: for people, such as "prompts".
        items: how many there are.
        chunk: items that are encoded together; a block is a multiple of it.
        row_bytes: of one row, by :func:`row_bytes` of the first chunk.
        make: the chunks of the items ``first`` .. ``last``, in order; ``first`` is a multiple of ``chunk``.
        constants: rows (1, ...) by name. Rows of these names that are all equal to them are not stored.
        alike: a name, and another whose rows may be the same one by one; then only the other's are stored. Both are
            padded to one length.
    """

    what: str
    items: int
    chunk: int
    row_bytes: int
    make: Callable[[int, int], Iterator[Chunk]]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    alike: Mapping[str, str] = field(default_factory=dict)

    @property
    def block(self) -> int:
        """Items of a block."""
        return max(1, SHARD // max(1, self.row_bytes) // self.chunk) * self.chunk


def row_bytes(rows: Mapping[str, Tensor]) -> int:
    """Bytes that a row of a chunk takes in a shard, on average."""
    pieces = [piece for name, value in rows.items() for piece in _ragged(name, value).values()]
    return sum(piece.nbytes for piece in pieces) // max(1, *(len(value) for value in rows.values()), 1)


def fill(folder: Path, key: str, content: Content, share: Share) -> None:
    """Write the shards of this process's blocks that are not there.

    Raises:
        InputError: the disk has too little space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = -(-content.items // content.block)
    first, last = (
        min(blocks * rank // share.count * content.block, content.items) for rank in (share.rank, share.rank + 1)
    )
    gaps = list(_gaps(folder, key, first, last))
    missing, done = sum(stop - start for start, stop in gaps), 0
    if not missing:
        return
    # What the others write has to fit as well.
    _check_space(
        folder, content, sum(stop - start for start, stop in _gaps(folder, key, 0, content.items)), share.count
    )
    with WorkProgress() as progress:
        forecast = _Forecast(content.what, missing)
        for start, stop in gaps:
            with _Writer(folder, key, content, start) as shard:
                for chunk in content.make(start, stop):
                    shard.add(chunk)
                    done += chunk.items
                    progress(f"encoding {content.what}", done, missing)
                    forecast(done)
                    if shard.last % content.block == 0 or shard.last == stop or shard.bytes >= SHARD:
                        shard.write()
                # A source may have fewer than it says: the hub's have at most data.limit.
                while shard.last < stop:
                    end = min(shard.last - shard.last % content.block + content.block, stop)
                    shard.add(Chunk({}, 0, end - shard.last))
                    shard.write()


def finish(folder: Path, key: str, content: Content) -> None:
    """Write constants and index of a store whose shards are all there, and remove what killed processes have left."""
    shards, names = list(_shards(folder, key, 0, content.items).values()), {}
    if (found := sum(shard["items"] for shard in shards)) != content.items:
        raise InputError(
            f"{folder}: expected the shards of {content.items} {content.what}, found those of {found}; processes of "
            "several machines need a folder that all of them see: set STEPDISTILL_CACHE"
        )
    for name, row in content.constants.items():
        _note(names, name, row)
    for shard in shards:
        for name, form in shard.pop("names").items():
            _note(names, name, torch.empty(0, *form["shape"], dtype=getattr(torch, form["dtype"]), device="meta"))
    for pair in content.alike.items():
        if set(pair) <= names.keys():
            names[pair[0]]["shape"] = names[pair[1]]["shape"] = _longest(*(names[name]["shape"] for name in pair))
    constants = []
    if content.constants:
        with atomic(folder / CONSTANTS) as draft:
            save_file({name: row.cpu().contiguous() for name, row in content.constants.items()}, draft)
        constants.append(_file_facts(folder / CONSTANTS))
    for draft in folder.glob(".*.partial"):
        if not _runs(int(draft.name.split(".")[-2])):
            draft.unlink(missing_ok=True)
    facts = {"schema": SCHEMA, "key": key, "items": content.items, "names": dict(sorted(names.items()))}
    write_json(folder / INDEX, facts | {"constants": constants, "shards": shards})


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_space(folder: Path, content: Content, missing: int, processes: int) -> None:
    """Say how large the store will be, before it is made; each process has a shard there twice while it writes it."""
    size, free = missing * content.row_bytes, shutil.disk_usage(folder).free
    needed = size + min(size, processes * SHARD)
    if needed > free:
        raise InputError(
            f"{folder}: expected {needed / GIB:.2f} GiB of free disk for {missing} {content.what}, found "
            f"{free / GIB:.2f}; name a larger disk in STEPDISTILL_CACHE, or use fewer"
        )
    if size >= SHARD:
        say(f"{missing} {content.what} take about {size / GIB:.2f} GiB in {folder}; {free / GIB:.0f} GiB are free")


class _Forecast:
    """Says once, soon, how long encoding will take, where that is some time; the first chunk is no measure."""

    def __init__(self, what: str, missing: int):
        self.what, self.missing = what, missing
        self.began: float | None = None
        self.first, self.said = 0, False

    def __call__(self, done: int) -> None:
        """Called with the number of items that are done."""
        now = time.monotonic()
        if self.began is None:
            self.began, self.first = now, done
        elif not self.said and now - self.began >= MEASURED:
            self.said = True
            left = (now - self.began) * (self.missing - done) / (done - self.first)
            if left >= 10 * MEASURED:
                say(f"{self.missing} {self.what} take about {timedelta(seconds=round(left))}")


def _gaps(folder: Path, key: str, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The items from ``first`` to ``last`` of which there is no whole shard."""
    for start, facts in _shards(folder, key, first, last).items():
        if start > first:
            yield first, start
        first = start + facts["items"]
    if first < last:
        yield first, last


def _shards(folder: Path, key: str, first: int, last: int) -> dict[int, dict[str, Any]]:
    """The facts of the whole shards whose items begin from ``first`` to ``last``, in order; others are removed."""
    found = {}
    for file in sorted(folder.glob("[0-9]*-*.safetensors")):
        start, content = file.stem.split("-")
        if not first <= int(start) < last:
            continue
        known = _file_facts(file)
        inside = _facts_inside(file) if known["sha256"].startswith(content) else {"key": None}
        if inside.pop("key") != key:
            say(f"{file}: damaged, or of another pipeline or other data; it is made again")
            file.unlink()
            continue
        found[int(start)] = known | inside
    return found


def _file_facts(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def _facts_inside(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return json.loads(header["__metadata__"]["stepdistill"])


class _Writer(ExitStack):
    """Writes shards one after the other, from item ``first`` on. What is added goes to unnamed files at once, one for
    each tensor, and from there into the shard: memory does not grow with the shard."""

    def __init__(self, folder: Path, key: str, content: Content, first: int):
        super().__init__()
        self.folder, self.key, self.content = folder, key, content
        self.files: dict[str, BinaryIO] = {}
        self._begin(first)

    def _begin(self, first: int) -> None:
        self.first, self.last, self.rows, self.bytes = first, first, 0, 0
        self.names: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}  # of no rows: dtype and shape of what a file has
        self.constant, self.alike = set(self.content.constants), dict(self.content.alike)
        self.tally = Tally("", 1.0)
        for file in self.files.values():
            file.seek(0)
            file.truncate()

    def add(self, chunk: Chunk) -> None:
        self.last += chunk.items
        self.rows += chunk.count
        if chunk.tally is not None:
            self.tally.add(chunk.tally)
        pieces: dict[str, Tensor] = {}
        for name, rows in chunk.rows.items():
            _note(self.names, name, rows)
            pieces |= _ragged(name, rows)
        self.constant = {name for name in self.constant if _all_are(pieces, name, self.content.constants[name])}
        self.alike = {a: b for a, b in self.alike.items() if a not in pieces or _same(pieces, a, b)}
        for name, piece in pieces.items():
            known = self.tensors.setdefault(name, piece.new_empty(0, *piece.shape[1:]))
            if (known.dtype, known.shape[1:]) != (piece.dtype, piece.shape[1:]):
                forms = " and ".join(f"{tuple(one.shape[1:])} {one.dtype}" for one in (known, piece))
                raise InputError(f"{self.content.what}: expected {name} of one form in all rows, found {forms}")
            if name not in self.files:
                self.files[name] = self.enter_context(TemporaryFile(dir=self.folder))  # noqa: SIM115, the stack closes it
            self.files[name].write(piece.reshape(-1).view(torch.uint8).numpy())
            self.bytes += piece.nbytes

    def write(self) -> None:
        """Write the file, rename it once the disk holds it, and begin the next one."""
        constant = [name for name in self.content.constants if name in self.constant]
        alike = {a: b for a, b in self.alike.items() if a in self.tensors and a not in constant}
        left_out = {part for name in (*constant, *alike) for part in (name, name + LENGTHS)}
        facts: dict[str, Any] = {"key": self.key, "items": self.last - self.first, "rows": self.rows}
        facts |= {"names": self.names, "constant": constant, "alike": alike, "tally": self.tally.facts()}
        draft = self.folder / f".{self.first:010d}.{os.getpid()}.partial"
        try:
            with open(draft, "wb") as file:
                kept = {name: empty for name, empty in self.tensors.items() if name not in left_out}
                self._copy(file, kept, json.dumps(facts, sort_keys=True))
            publish(draft, self.folder / f"{self.first:010d}-{sha256(draft)[:16]}.safetensors")
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self._begin(self.last)

    def _copy(self, file: BinaryIO, kept: Mapping[str, Tensor], facts: str) -> None:
        """Write the tensors that are ``kept``: a header as safetensors makes it of no rows, and what the files have."""
        # All facts under one key: safetensors writes several in no fixed order.
        header, end = json.loads(save(dict(kept), {"stepdistill": facts})[8:]), 0
        names = [name for name in header if name != "__metadata__"]
        for name in names:
            begin, end = end, end + self.files[name].tell()
            row = kept[name].dtype.itemsize * math.prod(kept[name].shape[1:])
            rows = (end - begin) // row if row else 0
            header[name] |= {"shape": [rows, *kept[name].shape[1:]], "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            self.files[name].seek(0)
            shutil.copyfileobj(self.files[name], file)


def _note(names: dict[str, dict[str, Any]], name: str, rows: Tensor) -> None:
    """Keep dtype and longest shape of the rows of ``name``."""
    known = names.setdefault(name, {"dtype": str(rows.dtype).removeprefix("torch."), "shape": list(rows.shape[1:])})
    known["shape"] = _longest(known["shape"], list(rows.shape[1:]))


def _longest(a: list[int], b: list[int]) -> list[int]:
    """The shape that has the longer first dimension."""
    return max(a, b, key=lambda shape: shape[:1])


def _ragged(name: str, rows: Tensor) -> dict[str, Tensor]:
    """Rows (n, L, ...) one behind the other without the zeros at their ends (sum of all L_i, ...), and L_i (n,).

    In the host's memory; of rank 1 the rows alone.
    """
    rows = rows.detach().cpu().contiguous()
    if rows.ndim == 1:
        return {name: rows}
    count, length = rows.shape[:2]
    used = rows.reshape(count, length, -1).view(torch.uint8).any(-1)  # by bits: a negative zero is kept
    place = torch.arange(1, length + 1)
    lengths = (used * place).amax(1)
    return {name: rows[place <= lengths[:, None]], name + LENGTHS: lengths.int()}


def _all_are(tensors: Mapping[str, Tensor], name: str, row: Tensor) -> bool:
    """Whether all rows of ``name`` that there are are ``row`` (1, ...)."""
    if name not in tensors:
        return True
    own, count = _ragged(name, row), len(tensors.get(name + LENGTHS, tensors[name]))
    return all(torch.equal(tensors[key], one.repeat(count, *[1] * (one.ndim - 1))) for key, one in own.items())


def _same(tensors: Mapping[str, Tensor], name: str, other: str) -> bool:
    """Whether the rows of two names are equal one by one."""
    return all(torch.equal(tensors[key], tensors[key.replace(name, other)]) for key in _keys(tensors, name))


def _keys(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    return [key for key in (name, name + LENGTHS) if key in tensors]
