"""Draws depend on (seed, step, turn, name) and a sample's global index, and on nothing else."""

import pytest
import torch

from stepdistill.data.batch import Batch, random_rows


def make(first: int = 0, size: int = 6, **changes) -> Batch:
    keys = {"seed": 1, "step": 2, "shape": (2, 3), "cond": {}} | changes
    return Batch(first=first, size=size, **keys)


def test_a_slice_of_the_batch_draws_the_slice_of_the_numbers():
    whole = make()
    parts = [make(0, 2), make(2, 3), make(5, 1)]
    shares = ([0.1, 0.5, 0.9], [0.2, 0.3, 0.5])
    assert torch.equal(whole.picks("a", *shares), torch.cat([part.picks("a", *shares) for part in parts]))
    for draw in ("noise", "uniform"):
        assert torch.equal(getattr(whole, draw)("a"), torch.cat([getattr(part, draw)("a") for part in parts]))
    assert torch.equal(whole.integers("a", 9), torch.cat([part.integers("a", 9) for part in parts]))
    assert {part.integer("a", 1000) for part in parts} == {whole.integer("a", 1000)}


def test_every_part_of_the_key_matters():
    base = make().noise("a")
    others = [make().noise("b"), make(seed=2).noise("a"), make(step=3).noise("a"), make(turn=1).noise("a")]
    assert all(not torch.equal(base, other) for other in others)
    assert torch.equal(base, make().noise("a"))


@pytest.mark.parametrize("size", [1, 128])
def test_only_its_own_rows_are_drawn(size, monkeypatch):
    """Whatever the global batch is: more processes make a draw cheaper."""
    drawn = []

    def counted(first, size, *key):
        for number, row in enumerate(random_rows(first, size, *key), first):
            drawn.append(number)
            yield row

    monkeypatch.setattr("stepdistill.data.batch.random_rows", counted)
    rows = make(first=64 if size == 1 else 0, size=size)
    for draw in ("noise", "uniform"):
        getattr(rows, draw)("a")
    rows.rows("a", 9), rows.picks("a", [0.1, 0.2], [0.5, 0.5])
    assert drawn == 4 * list(range(rows.first, rows.first + size))


def test_rows_and_draws_are_independent():
    """Of neighbouring rows, steps and names; torch's generators would keep 32 bits of a key."""
    size = 2000
    draws = [make(size=size, shape=(16,), **key).noise(name) for key, name in (
        ({}, "a"), ({}, "b"), ({"step": 3}, "a"), ({"seed": 2}, "a"), ({"seed": 1 + 2**32}, "a")
    )]  # fmt: skip
    values = torch.stack([draw.flatten() for draw in draws])
    assert (torch.corrcoef(values) - torch.eye(len(draws))).abs().max() < 4 / (16 * size) ** 0.5
    assert abs(torch.corrcoef(torch.stack([draws[0][:-1].flatten(), draws[0][1:].flatten()]))[0, 1]) < 0.025
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert len(values.unique()) > 0.99 * values.numel()


def test_scalars_are_spread_as_they_should_be():
    rows = make(size=4000)
    assert abs(rows.uniform("a", 2, 4).mean() - 3) < 0.03 and rows.uniform("a", 2, 4).min() >= 2
    counts = torch.bincount(rows.integers("a", 4)) / 4000
    assert (counts - 0.25).abs().max() < 0.03
    picked = rows.picks("a", [0.1, 0.5, 0.9], [1, 0, 3])
    assert abs((picked == 0.9).double().mean() - 0.75) < 0.03 and not (picked == 0.5).any()


def test_a_share_of_the_conditions_is_replaced_by_the_empty_one():
    labels, null = torch.arange(4000) % 9, torch.full((4000,), 9)
    rows = {"size": 4000, "cond": {"class_labels": labels}}
    cond, empty = make(**rows, null={"class_labels": null}).partly_empty("a", 0.1)
    assert torch.equal(cond["class_labels"], torch.where(empty, null, labels))
    assert 0.08 < empty.double().mean() < 0.12
    cond, empty = make(**rows).partly_empty("a", 0.1)
    assert cond["class_labels"] is labels and not empty.any()
