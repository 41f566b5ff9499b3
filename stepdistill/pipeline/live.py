"""Conditions that are encoded whenever a batch needs them, in the bits that a store would hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Conditions
from stepdistill.errors import InputError
from stepdistill.pipeline.compare import rows_equal
from stepdistill.pipeline.conditioning import CHUNK, Conditioning, caught, check_entries, identity
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.trace import Trace


def live(trace: Trace, entries: Sequence[str | int]) -> Conditioning:
    """The conditions of ``entries``, none of which is kept.

    What a network computes for a prompt may depend, in its last bits, on how many are beside it and on its place. So
    every prompt is encoded among ``CHUNK``, or alone where the call takes one, at the place that it has in a store's
    chunk.

    Raises:
        InputError: as :func:`stepdistill.pipeline.conditioning.encode`, or conditions have lengths of their own.
    """
    labels = check_entries(trace, entries)
    if varying := [name for name, shape in trace.conditioning.items() if None in shape]:
        raise InputError(
            f"data.encode: expected 'store' for a pipeline whose {varying[0]} has any length, found 'live'"
        )
    with quiet():
        first, null = caught(trace, entries[: trace.at_once(CHUNK)], {})
    if drawn := [name for name, rows in (null or {}).items() if not rows_equal(rows)]:
        raise InputError(f"data.encode: expected 'store' for a pipeline that draws {drawn[0]} anew, found 'live'")
    encoder = _Encoder(trace, entries)
    names = {name: _Column(encoder, name, rows) for name, rows in first.items()}
    empty = {name: rows[:1].to("cpu", copy=True) for name, rows in null.items()} if null is not None else None
    device = next(trace.network.parameters()).device
    return Conditioning(labels, names, empty, entries, key=identity(trace, entries, None), encoder=encoder).to(device)


class _Encoder:
    def __init__(self, trace: Trace, entries: Sequence[str | int]):
        self.trace, self.entries, self.chunk = trace, entries, trace.at_once(CHUNK)

    def __call__(self, index: Tensor) -> Conditions:
        """The conditions of entries ``index`` (B,), where the pipeline makes them."""
        rows = index.tolist()
        found: dict[int, Conditions] = {}
        for chunk in self._chunks(rows):
            with quiet():
                cond, _ = caught(self.trace, [self.entries[row] for row in chunk], {})
            for place, row in enumerate(chunk):
                if place == row % self.chunk:
                    found[row] = {name: value[place] for name, value in cond.items()}
        return {name: torch.stack([found[row][name] for row in rows]) for name in found[rows[0]]} if rows else {}

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        """Entries that are encoded together, so that each of ``rows`` is once at its place of a chunk of a store."""
        count, chunks = len(self.entries), []
        whole = count - count % self.chunk
        left = sorted({row for row in rows if row < whole})
        while left:
            chosen: dict[int, int] = {}
            for row in left:
                chosen.setdefault(row % self.chunk, row)
            chunks.append([chosen.get(place, left[0]) for place in range(self.chunk)])
            left = [row for row in left if row not in chosen.values()]
        if any(row >= whole for row in rows):  # of the last chunk, which has fewer
            chunks.append(list(range(whole, count)))
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
