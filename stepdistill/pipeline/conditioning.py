"""Prompts or classes -> conditioning batches: the pipeline's own encoding, caught at its denoiser, kept on disk."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.host_rows import HostRows, pinned, to_device
from stepdistill.data.lines import Lines
from stepdistill.data.sample import Pictures
from stepdistill.data.shards import Chunk, Content, Share, row_bytes
from stepdistill.data.store import Rows, Store, ensure
from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.passes import of_pass, plain_name
from stepdistill.errors import InputError
from stepdistill.pipeline.call import COUNTS
from stepdistill.pipeline.compare import close, rows_equal, same
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.groups import Group
from stepdistill.pipeline.identity import FEW, identity
from stepdistill.pipeline.recording import Call, Recording, calls_of
from stepdistill.pipeline.resting import rest
from stepdistill.pipeline.trace import Trace

CHUNK = 32
"""Entries that are encoded at once."""
# Names under which a diffusers network's config states how many classes it embeds.
CLASS_COUNTS = ("num_classes", "num_class_embeds", "num_embeds_ada_norm")


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's conditions for each of N entries.

    Args:
        labels: the entries for people: prompts or class names.
        cond: N rows of each name, in the host's memory or in a store.
        null: the pipeline's own empty condition; None where it does not guide. One row, or N of what is not the same
            for all: the pictures of the entries.
        entries: what the pipeline is called with: prompts or class ids.
        device: where batches go. Rows stay where they are: thousands of them are too many for a GPU.
        store: the files that hold the rows, if any do.
        encoder: makes the rows of entries (B,), where none are kept.
        key: says what its rows depend on.
        group: which of several groups it is; None: all conditions.
    """

    labels: Sequence[str]
    cond: dict[str, Tensor | Rows]
    null: dict[str, Tensor | Rows] | None
    entries: Sequence[str | int] = ()
    device: torch.device | str = "cpu"
    store: Store | None = None
    encoder: Callable[[Tensor], Conditions] | None = None
    key: str = ""
    group: Group | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def content(self) -> Any:
        """What :func:`stepdistill.files.digest` takes for the values of all rows."""
        sides = self.cond, self.null or {}
        held = [{name: rows for name, rows in side.items() if isinstance(rows, Tensor)} for side in sides]
        return self.key, self.store and self.store.content, held, self.null is None

    def gathered(self, index: Tensor) -> tuple[Conditions, Conditions | None]:
        """(cond, null) for entries ``index`` (B,), ready to be copied: B rows, or the one that all entries share."""

        def taken(side: Mapping[str, Tensor | Rows]) -> Conditions:
            return {n: rows if len(rows) == 1 else pinned(rows[index.cpu()], self.device) for n, rows in side.items()}

        cond = taken(self.cond) if self.encoder is None else self.encoder(index)
        return cond, None if self.null is None else taken(self.null)

    def batch(self, index: Tensor) -> tuple[Conditions, Conditions | None]:
        """(cond, null) for entries ``index`` (B,): B rows each, on the device."""
        return self.on_device(self.gathered(index), len(index))

    def on_device(
        self, gathered: tuple[Conditions, Conditions | None], size: int
    ) -> tuple[Conditions, Conditions | None]:
        """What :meth:`gathered` returned, ``size`` rows each, on the device."""
        cond, null = (
            side and {name: to_device(rows, self.device).expand(size, *rows.shape[1:]) for name, rows in side.items()}
            for side in gathered
        )
        return cond, null

    def to(self, device: torch.device | str) -> "Conditioning":
        """Batches on ``device``; what is one row for all entries is kept there."""

        def moved(side: Mapping[str, Tensor | Rows]) -> dict[str, Tensor | Rows]:
            return {name: rows[:].to(device) if len(rows) == 1 else rows for name, rows in side.items()}

        return replace(self, cond=moved(self.cond), null=self.null and moved(self.null), device=device)


def class_names(trace: Trace) -> tuple[str, ...]:
    """The classes of a class-conditional pipeline in the order of their ids; empty for any other pipeline.

    From the pipeline's own labels (id2label) where it has them, numbered by the network's config otherwise.
    """
    if trace.entry != "class_labels":
        return ()
    labels = getattr(trace.pipeline, "labels", None) or {}
    if labels:
        by_id: dict[int, str] = {}
        for name, number in labels.items():
            by_id.setdefault(int(number), name)
        return tuple(by_id.get(i, str(i)) for i in range(max(by_id) + 1))
    config = getattr(trace.network, "config", {})
    count = next((config[name] for name in CLASS_COUNTS if config.get(name)), 0)
    return tuple(str(i) for i in range(count))


def class_count(trace: Trace) -> int:
    """How many classes the pipeline knows; 0 for a pipeline that takes no classes."""
    return len(class_names(trace))


def entries(trace: Trace, conditions: str | Sequence[str | int]) -> Sequence[str | int]:
    """What to call the pipeline with, from what the user wrote.

    Args:
        conditions: "classes" (all of them), a file with an entry a line, or a list; classes by name or number.

    Raises:
        InputError: "classes" of a pipeline without, no such file, an unknown class, nothing at all.
    """
    names = class_names(trace)
    if conditions == "classes":
        if trace.entry in COUNTS:
            return [0]
        if not names:
            ways = "--prompt or --prompts; in a recipe data.conditions: a list, a file, everyday or captions"
            raise InputError(f"conditions: expected prompts for this pipeline ({ways}), found 'classes', the default")
        return list(range(len(names)))
    if isinstance(conditions, str):
        file = Path(conditions)
        if not file.is_file():
            raise InputError(f"conditions: expected 'classes', a list or a file, found no file {conditions}")
        conditions = Lines(file)
    if not conditions:
        raise InputError("conditions: expected at least one, found none")
    if trace.entry == "class_labels":
        return [_class_id(entry, names) for entry in conditions]
    return conditions if isinstance(conditions, Lines) else list(conditions)


def encode(
    trace: Trace,
    entries: Sequence[str | int],
    cache: Path | None = None,
    pictures: Sequence[Pictures] | None = None,
    share: Share | None = None,
    verify: bool = False,
) -> Conditioning:
    """The conditions of ``entries``, by running the pipeline up to its denoiser's first calls.

    Args:
        entries: prompts for a text pipeline, class ids for a class pipeline.
        cache: folder for a store of them, whose name is a hash of the pipeline, the entries and the pictures; None:
            they are kept in the host's memory.
        pictures: each entry's own arguments of the pipeline's call, in place of the trace's.
        share: the processes that fill the store together; None: this one.
        verify: compare the hashes of a store's files, however many there are.

    Raises:
        InputError: no entries, or entries of the wrong type or range; pictures of another size than the trace's.
    """
    entries, store = entries if isinstance(entries, Lines) else tuple(entries), None
    labels = check_entries(trace, entries)
    if cache is None:
        stored = _encoded(trace, entries, pictures)
        cond, null = _section(stored, "cond/"), _section(stored, "null/")
    else:
        key = identity(trace, entries, pictures)
        store = ensure(cache / f"conditions-{key}", key, lambda: _content(trace, entries, pictures), share, verify)
        cond, null = store.rows("cond/"), store.rows("null/")
        if isinstance(entries, Lines):  # a run does not need the file, whatever becomes of it
            labels = entries = entries.copied(store.folder / "prompts.txt")
    rest(trace.pipeline)
    count = max(1, len(trace.denoiser.spec.mix))
    every = {name: rows for number in range(count) for name, rows in of_pass(cond, number).items()}
    whole = {name: null.get(name, rows) for name, rows in every.items()} if null else None
    device = next(trace.network.parameters()).device
    return Conditioning(labels, cond, whole, entries, store=store).to(device)


def _encoded(trace: Trace, entries: Sequence[str | int], pictures: Sequence[Pictures] | None) -> dict[str, Tensor]:
    """All rows by name, in the host's memory; on the pipeline's device there is one chunk at a time.

    What the empty condition shares with the others, row by row, is there once.
    """
    count = len(entries)
    # Conditions, and behind them the empty ones, all padded to one length.
    own = _null_of_each(trace, pictures)
    storage = HostRows(2 * count if own else count + 1)
    empties: set[str] = set()
    for start, cond, null in _chunks(trace, entries, pictures, 0, count):
        storage.write(start, cond)
        if null is not None and (own or start == 0):
            empties |= null.keys()
            storage.write(count + start, null if own else {name: rows[:1] for name, rows in null.items()})
    stored = {f"cond/{name}": rows[:count] for name, rows in storage.tensors.items() if name == plain_name(name)}
    for name in (name for name in storage.tensors if name in empties):
        rows, empty = storage.tensors[plain_name(name)][:count], storage.tensors[name][count:]
        if all(close(part, empty[:1].expand_as(part)) for part in empty.split(CHUNK)):
            stored[f"null/{name}"] = empty[:1]
        elif not torch.equal(empty, rows):
            stored[f"null/{name}"] = empty
    return stored


def _content(trace: Trace, entries: Sequence[str | int], pictures: Sequence[Pictures] | None) -> Content:
    """The same for a store; the first chunk says how large the rows are."""
    size, each = _chunk(trace, pictures), _null_of_each(trace, pictures)
    ((_, cond, null),) = _chunks(trace, entries, pictures, 0, min(size, len(entries)))
    first = {0: _rows(cond, null if each else None)}
    # Copies: nothing of this chunk stays on the device for longer than its turn.
    constants = {f"null/{name}": rows[:1].to("cpu", copy=True) for name, rows in (null or {}).items()}
    kept = row_bytes(first[0])

    def make(start: int, stop: int) -> Iterator[Chunk]:
        rows = first.pop(0, None)
        if start == 0 and rows is not None:
            count = min(size, stop)
            yield Chunk(rows, count, count)
            start = count
        del rows
        for at, own, empty in _chunks(trace, entries, pictures, start, stop):
            count = min(size, stop - at)
            yield Chunk(_rows(own, empty if each else None), count, count)

    what = "classes" if trace.entry == "class_labels" else "prompts"
    alike = {f"null/{name}": f"cond/{plain_name(name)}" for name in null or ()}
    return Content(what, len(entries), size, kept, make, constants, alike)


def _rows(cond: Conditions, null: Conditions | None) -> dict[str, Tensor]:
    rows = {f"cond/{name}": value for name, value in cond.items()}
    return rows | {f"null/{name}": value for name, value in (null or {}).items()}


def _chunks(
    trace: Trace, entries: Sequence[str | int], pictures: Sequence[Pictures] | None, first: int, last: int
) -> Iterator[tuple[int, Conditions, Conditions | None]]:
    """(first entry, cond, null) of the entries ``first`` .. ``last``, :func:`together` at a time.

    With pictures one at a time: what a pipeline makes of a list of pictures is its own affair.
    """
    size = _chunk(trace, pictures)
    for start in range(first, last, size):
        chunk = entries[start : min(start + size, last)]
        with quiet():  # or diffusers warns of every chunk with a prompt that is too long, and repeats the whole chunk
            cond, null = caught(trace, chunk, {} if pictures is None else _laid_out(trace, pictures[start]))
        if pictures is not None:
            _check_size(trace, chunk[0], cond)
        elif (
            null is not None and start == 0 and not trace.guidance.drawn
        ):  # the one chunk whose empty conditions are kept
            # A picture that is drawn anew for each row is the same in both passes.
            shared = {name: cond[plain_name(name)] for name in null}
            null = {name: rows for name, rows in null.items() if rows_equal(rows) or not same(rows, shared[name])}
        yield start, cond, null


def _null_of_each(trace: Trace, pictures: Sequence[Pictures] | None) -> bool:
    """Whether every entry has an empty condition of its own: with its picture, or with what is drawn for it."""
    return bool(pictures) or bool(trace.guidance.drawn)


def _chunk(trace: Trace, pictures: Sequence[Pictures] | None) -> int:
    return together(trace) if pictures is None else 1


def together(trace: Trace) -> int:
    """How many entries without pictures of their own are encoded at once."""
    return trace.at_once(FEW if varying(trace) else CHUNK)


def varying(trace: Trace) -> list[str]:
    """The conditions whose length grows with the prompt."""
    return [name for name, shape in trace.conditioning.items() if None in shape]


def _laid_out(trace: Trace, pictures: Pictures) -> dict[str, Any]:
    """An entry's own pictures, as lists where those of the trace are."""
    lists = {name for name, value in trace.arguments.items() if isinstance(value, list)}
    return {name: [picture] if name in lists else picture for name, picture in pictures.items()}


def _check_size(trace: Trace, entry: str | int, cond: Conditions) -> None:
    for name, known in trace.conditioning.items():
        shape = tuple(cond[name].shape[1:])
        if len(shape) != len(known) or any(a not in (None, b) for a, b in zip(known, shape, strict=True)):
            raise InputError(
                f"data.arguments: the pictures of {entry!r} give {name} the shape {shape}, those in "
                f"teacher.arguments {known}; state height and width in teacher.arguments"
            )


def caught(
    trace: Trace, entries: Sequence[str | int], pictures: Mapping[str, Any]
) -> tuple[Conditions, Conditions | None]:
    """(cond, null), a row for each entry, by running the pipeline up to its denoiser's first calls.

    Its arguments are the trace's, and ``pictures`` in place of some.
    """
    arguments, stop = {**trace.arguments, **pictures}, (trace.component, trace.guidance.calls)
    recording = trace.observe(entries, arguments, guidance=trace.guidance.scale, stop_calls=stop)
    return trace.guidance.split(_calls(trace, recording), trace.denoiser.spec, trace.conditioning, len(entries))


def plain_conditions(trace: Trace, entries: Sequence[str | int], steps: int) -> Conditions:
    """What a plain call for ``entries`` tells its denoiser, seeded with 0 and without guidance.

    A picture that the pipeline encodes for its network is drawn at random there, so no other call's conditions will do.
    """
    count = trace.guidance.calls if trace.guidance.always else 1
    recording = trace.observe(entries, steps=steps, stop_calls=(trace.component, count), plain=True)
    calls = _calls(trace, recording)
    if trace.guidance.always:
        return trace.guidance.split(calls, trace.denoiser.spec, trace.conditioning, len(entries))[0]
    return trace.denoiser.spec.conditions(calls[0].arguments, trace.conditioning)


def _calls(trace: Trace, recording: Recording) -> list[Call]:
    return calls_of(recording.calls, trace.component, [helper.name for helper in trace.denoiser.spec.helpers])


def check_entries(trace: Trace, entries: Sequence[str | int]) -> Sequence[str]:
    """The entries for people.

    Raises:
        InputError: there are none, or one is of the wrong type or range.
    """
    names = class_names(trace)
    if not entries:
        raise InputError("conditions: expected at least one, found none")
    expected = str if trace.entry == "prompt" else int
    for entry in entries:
        if not isinstance(entry, expected) or isinstance(entry, bool):
            what = "a prompt" if expected is str else "a class number"
            raise InputError(f"conditions: expected {what}, found {entry!r}")
        if names and not 0 <= entry < len(names):
            raise InputError(f"conditions: expected a class from 0 to {len(names) - 1}, found {entry}")
    return entries if isinstance(entries, Lines) else tuple(names[one] if names else str(one) for one in entries)


def _class_id(entry: str | int, names: tuple[str, ...]) -> int:
    if isinstance(entry, str) and entry in names:
        return names.index(entry)
    if len(alike := [number for number, name in enumerate(names) if name.lower() == str(entry).lower()]) == 1:
        return alike[0]
    if str(entry).isdecimal() and int(entry) < len(names):
        return int(entry)
    close = difflib.get_close_matches(str(entry), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"conditions: expected a class name or a number from 0 to {len(names) - 1}, found {entry!r}{hint}")


def _section(stored: dict[str, Tensor], prefix: str) -> Conditions:
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
