"""How far a metric would move with other samples of the same model: bootstrap standard errors."""

from collections.abc import Callable

import torch
from torch import Tensor


def standard_error(statistic: Callable[[Tensor], float], n: int, *, resamples: int = 20, seed: int = 0) -> float:
    """Standard deviation of ``statistic`` over resamples of ``n`` indices with replacement (Efron 1979).

    A Frechet distance of a resample is biased upwards, as repeated rows count as fewer; its spread is what is
    wanted, and a 95 % interval is the value plus or minus 1.96 of it.

    Args:
        statistic: of an index tensor (n,).
    """
    if n < 2 or resamples < 2:
        raise ValueError(f"a bootstrap needs at least 2 rows and 2 resamples, found {n} and {resamples}")
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    return float(torch.tensor(draws, dtype=torch.float64).std())
