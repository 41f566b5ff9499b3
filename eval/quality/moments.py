"""Mean and covariance of feature rows that are never in memory together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stepdistill.eval.metrics import Moments


class MomentSum:
    """Count, mean (d,) and scatter (d, d) about the mean, float64; memory does not depend on the number of rows.

    Blocks and other sums are merged by the pairwise update of Chan, Golub & LeVeque 1983, which does not subtract
    large numbers from each other as a sum of squares does.
    """

    def __init__(self, features: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> "MomentSum":
        """The sum over blocks of rows (n, d), taken in order.

        Raises:
            ValueError: there is no block.
        """
        total = None
        for rows in blocks:
            total = cls(rows.shape[1], rows.device) if total is None else total
            total.update(rows)
        if total is None:
            raise ValueError("moments need at least one block of rows, found none")
        return total

    def update(self, rows: Tensor) -> None:
        """Add rows (n, d) of any floating type."""
        if not len(rows):
            return
        rows = rows.to(self.mean)
        mean = rows.mean(0)
        centred = rows - mean
        self.scatter.addmm_(centred.T, centred)
        self._move(len(rows), mean)

    def merge(self, other: "MomentSum") -> None:
        """Add what another sum has seen, such as that of another process."""
        if other.count:
            self.scatter += other.scatter.to(self.mean)
            self._move(other.count, other.mean.to(self.mean))

    def _move(self, count: int, mean: Tensor) -> None:
        """Count rows whose scatter about their own mean is in the sum already."""
        total = self.count + count
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def moments(self) -> Moments:
        """Mean and unbiased covariance, on the CPU.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, found {self.count}")
        return Moments(self.mean.cpu(), (self.scatter / (self.count - 1)).cpu())
