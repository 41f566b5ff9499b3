"""How far a metric would move with other samples of the same model: bootstrap standard errors."""

from collections.abc import Callable

import torch
from torch import Tensor


def standard_error(
    statistic: Callable[[Tensor], float], n: int, *, resamples: int = 20, seed: int = 0, strata: Tensor | None = None
) -> float:
    """Standard deviation of ``statistic`` over resamples of ``n`` indices with replacement (Efron 1979).

    A Frechet distance of a resample is biased upwards, as repeated rows count as fewer; its spread is what is
    wanted, and a 95 % interval is the value plus or minus 1.96 of it.

    Args:
        statistic: of an index tensor (n,).
        strata: group of each row (n,), int64 from 0; a resample has as many rows of each group as the sample has.
            Without it the classes of images that were drawn in equal numbers would vary, and the error of their FD
            would be twice as large.
    """
    if n < 2 or resamples < 2:
        raise ValueError(f"a bootstrap needs at least 2 rows and 2 resamples, found {n} and {resamples}")
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(_resample(n, generator, strata)) for _ in range(resamples)]
    return float(torch.tensor(draws, dtype=torch.float64).std())


def _resample(n: int, generator: torch.Generator, strata: Tensor | None) -> Tensor:
    """Indices (n,) with replacement, of each group as many as it has rows."""
    if strata is None:
        return torch.randint(n, (n,), generator=generator)
    order = strata.argsort(stable=True)
    groups, sizes = strata[order], strata.bincount()
    within = (torch.rand(n, generator=generator, dtype=torch.float64) * sizes[groups]).long()
    return order[(sizes.cumsum(0) - sizes)[groups] + within]
