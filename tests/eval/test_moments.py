"""Streaming moments: equal to those of all rows at once, mergeable, and of constant size."""

import pytest
import torch

from stepdistill.eval.metrics import Moments, MomentSum, frechet_distance


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e4


def test_any_blocks_give_the_moments_of_all_rows():
    x = rows(500, 12)
    whole = Moments.of(x)
    for size in (1, 7, 64, 500):
        ours = MomentSum.of(x.split(size)).moments()
        assert torch.allclose(ours.mean, whole.mean, rtol=1e-13) and torch.allclose(ours.cov, whole.cov, atol=1e-10)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_sums_of_processes_merge_into_the_same_distance(processes):
    x, other = rows(300, 8), Moments.of(rows(300, 8, seed=1))
    total = MomentSum(8)
    for rank in range(processes):
        total.merge(MomentSum.of(x[rank::processes].split(32)))
    assert total.count == 300
    assert frechet_distance(total.moments(), other) == pytest.approx(frechet_distance(Moments.of(x), other), rel=1e-9)


def test_float32_rows_with_a_large_mean_keep_their_variance():
    x = rows(1000, 3).float()
    assert torch.allclose(MomentSum.of(x.split(100)).moments().cov, Moments.of(x).cov, rtol=1e-9)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="at least 2 rows, found 1"):
        MomentSum.of([rows(1, 3)]).moments()
    with pytest.raises(ValueError, match="at least one block"):
        MomentSum.of([])
    empty = MomentSum(3)
    empty.update(rows(0, 3))
    empty.merge(MomentSum(3))
    assert empty.count == 0
