"""Draws depend on (seed, step, turn, name) and a sample's global index, and on nothing else."""

import torch

from stepdistill.data.batch import Batch


def make(first: int = 0, size: int = 6, **changes) -> Batch:
    keys = {"seed": 1, "step": 2, "total": 6, "shape": (2, 3), "cond": {}} | changes
    return Batch(first=first, size=size, **keys)


def test_a_slice_of_the_batch_draws_the_slice_of_the_numbers():
    whole = make()
    parts = [make(0, 2), make(2, 3), make(5, 1)]
    for draw in ("noise", "uniform"):
        assert torch.equal(getattr(whole, draw)("a"), torch.cat([getattr(part, draw)("a") for part in parts]))
    assert torch.equal(whole.integers("a", 9), torch.cat([part.integers("a", 9) for part in parts]))
    assert {part.integer("a", 1000) for part in parts} == {whole.integer("a", 1000)}


def test_every_part_of_the_key_matters():
    base = make().noise("a")
    others = [make().noise("b"), make(seed=2).noise("a"), make(step=3).noise("a"), make(turn=1).noise("a")]
    assert all(not torch.equal(base, other) for other in others)
    assert torch.equal(base, make().noise("a"))


def test_a_share_of_the_conditions_is_replaced_by_the_empty_one():
    labels, null = torch.arange(4000) % 9, torch.full((4000,), 9)
    rows = {"size": 4000, "total": 4000, "cond": {"class_labels": labels}}
    cond, empty = make(**rows, null={"class_labels": null}).partly_empty("a", 0.1)
    assert torch.equal(cond["class_labels"], torch.where(empty, null, labels))
    assert 0.08 < empty.double().mean() < 0.12
    cond, empty = make(**rows).partly_empty("a", 0.1)
    assert cond["class_labels"] is labels and not empty.any()
