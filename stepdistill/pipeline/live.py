"""Conditions that are encoded whenever a batch needs them, in the bits that a store would hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Conditions
from stepdistill.errors import InputError
from stepdistill.pipeline.compare import rows_equal
from stepdistill.pipeline.conditioning import Conditioning, caught, check_entries, together, varying
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.identity import identity
from stepdistill.pipeline.resting import rest, stay
from stepdistill.pipeline.trace import Trace
from stepdistill.pipeline.unread import with_most_tokens


def live(trace: Trace, entries: Sequence[str | int], stays: bool = False) -> Conditioning:
    """The conditions of ``entries``, none of which is kept.

    What a network computes for a prompt may depend, in its last bits, on how many are beside it and on its place. So
    every prompt is encoded among as many as in a store's chunk, and at its place there. Where conditions have lengths
    of their own it is encoded with the chunk itself, and padded as a store pads it: to the longest of all.

    Encoders that rest in the host's memory go back there after each batch.

    Args:
        entries: prompts for a text pipeline, class ids for a class pipeline.
        stays: encoders at rest are on the device from now on.

    Raises:
        InputError: as :func:`stepdistill.pipeline.conditioning.encode`.
    """
    labels, encoder = check_entries(trace, entries), _Encoder(trace, entries)
    for name in trace.encoders if stays else ():
        stay(getattr(trace.pipeline, name))
    first, null = encoder.chunk(0)
    if drawn := [name for name, rows in (null or {}).items() if name in trace.guidance.drawn or not rows_equal(rows)]:
        raise InputError(f"data.encode: expected 'store' for a pipeline that draws {drawn[0]} anew, found 'live'")
    empty = {name: rows[:1].to("cpu", copy=True) for name, rows in null.items()} if null is not None else None
    if varying(trace):
        places = {row - row % encoder.count for row in with_most_tokens(trace, entries)} - {0}
        for rows in (first, empty or {}, *(encoder.chunk(place)[0] for place in sorted(places))):
            encoder.learn(rows)
        first, empty = encoder.padded(first), empty and encoder.padded(empty)
    rest(trace.pipeline)
    names = {name: _Column(encoder, name, rows) for name, rows in first.items()}
    device = next(trace.network.parameters()).device
    return Conditioning(labels, names, empty, entries, key=identity(trace, entries, None), encoder=encoder).to(device)


class _Encoder:
    """Makes the conditions of entries by their numbers.

    ``count`` is the number of entries in a store's chunk.
    """

    def __init__(self, trace: Trace, entries: Sequence[str | int]):
        self.trace, self.entries, self.count = trace, entries, together(trace)
        self.lengths: dict[str, int] = {}

    def __call__(self, index: Tensor) -> Conditions:
        """The conditions of entries ``index`` (B,), where the pipeline makes them."""
        rows = index.tolist()
        found: dict[int, Conditions] = {}
        for chunk in self._chunks(rows):
            cond, _ = self._caught(chunk)
            cond = self.padded(cond)
            for place, row in enumerate(chunk):
                if place == row % self.count:
                    found[row] = {name: value[place] for name, value in cond.items()}
        rest(self.trace.pipeline)
        return {name: torch.stack([found[row][name] for row in rows]) for name in found[rows[0]]} if rows else {}

    def chunk(self, start: int) -> tuple[Conditions, Conditions | None]:
        """(cond, null) of a store's chunk, whose first entry is ``start``."""
        return self._caught(range(start, min(start + self.count, len(self.entries))))

    def _caught(self, rows: Sequence[int]) -> tuple[Conditions, Conditions | None]:
        with quiet():
            return caught(self.trace, [self.entries[row] for row in rows], {})

    def learn(self, rows: Conditions) -> None:
        """Keep how long the longest rows of each name are; rank 1 has no length."""
        for name, value in rows.items():
            if value.ndim > 1:
                self.lengths[name] = max(value.shape[1], self.lengths.get(name, 0))

    def padded(self, rows: Conditions) -> Conditions:
        """``rows`` (B, L, ...) with zeros behind them to the longest of their name."""
        return {name: self._padded(name, value) for name, value in rows.items()}

    def _padded(self, name: str, value: Tensor) -> Tensor:
        length = self.lengths.get(name)
        if length is None or value.shape[1] == length:
            return value
        if value.shape[1] > length:
            raise InputError(
                f"data.encode: expected at most {length} tokens, those of the prompt with the most, found "
                f"{value.shape[1]} in {name}: this pipeline needs 'store'"
            )
        whole = value.new_zeros(len(value), length, *value.shape[2:])
        whole[:, : value.shape[1]] = value
        return whole

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        """Entries that are encoded together, so that each of ``rows`` is once at its place of a chunk of a store."""
        total, apart = len(self.entries), bool(varying(self.trace))
        whole = total - total % self.count
        # What is padded needs the chunk's own prompts beside it, and the last chunk has fewer.
        own = sorted({row - row % self.count for row in rows if apart or row >= whole})
        chunks = [list(range(start, min(start + self.count, total))) for start in own]
        left = [] if apart else sorted({row for row in rows if row < whole})
        while left:
            chosen: dict[int, int] = {}
            for row in left:
                chosen.setdefault(row % self.count, row)
            chunks.append([chosen.get(place, left[0]) for place in range(self.count)])
            left = [row for row in left if row not in chosen.values()]
        return chunks


class _Column:
    """The conditions of one name (N, ...); indexing encodes them."""

    def __init__(self, encoder: _Encoder, name: str, example: Tensor):
        self.encoder, self.name, self.shape = encoder, name, torch.Size((len(encoder.entries), *example.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice | list[int]) -> Tensor:
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        return self.encoder(torch.as_tensor(index))[self.name].cpu()
