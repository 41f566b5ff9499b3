"""Distances between two sets of feature rows, all in float64 on the CPU, and their bootstrap standard errors.

Every function takes plain tensors and knows nothing of images or networks. Sources: Frechet distance,
Heusel et al. 2017; kernel distance, Binkowski et al. 2018; precision and recall, Kynkaanniemi et al. 2019; density
and coverage, Naeem et al. 2020; Inception score, Salimans et al. 2016; CMMD, Jayasumana et al. 2024.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of feature rows, float64."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Sample mean and unbiased covariance of ``rows`` (N, d), N >= 2."""
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / (len(rows) - 1))

    @cached_property
    def root(self) -> Tensor:
        """R (d, d) with R R^T = cov; kept, because a reference meets many sets."""
        values, vectors = torch.linalg.eigh(self.cov.double())
        return vectors * values.clamp(min=0).sqrt()


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


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr (A^1/2 B A^1/2)^1/2 between two Gaussians.

    The root is taken by two symmetric eigen-decompositions, so rank-deficient covariances (fewer samples
    than dimensions) need neither a complex root nor a regulariser.
    """
    overlap = torch.linalg.eigvalsh(a.root.T @ b.cov.double() @ a.root).clamp(min=0).sqrt().sum()
    shift = (a.mean.double() - b.mean.double()).square().sum()
    return float(shift + a.cov.double().trace() + b.cov.double().trace() - 2 * overlap)


def kid(a: Tensor, b: Tensor, *, subsets: int = 20, size: int = 500, seed: int = 0) -> tuple[float, float]:
    """Kernel distance between rows ``a`` (N, d) and ``b`` (M, d): mean and standard deviation over subsets.

    Each subset gives the unbiased estimate of MMD^2 (it may be negative) under the kernel (x.y / d + 1)^3. Subsets
    are consecutive blocks of random permutations, so all rows are used before any is used twice. ``size`` is
    lowered to the smaller set's when that has fewer rows.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"kid needs at least 2 rows on each side, found {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    blocks = zip(range(subsets), _blocks(len(a), size, generator), _blocks(len(b), size, generator), strict=False)
    values = torch.stack([_mmd2(a[i].double(), b[j].double()) for _, i, j in blocks])
    return float(values.mean()), float(values.std(correction=0))


def _blocks(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % size].split(size)


def _mmd2(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape
    within = sum(_kernel(x, x, d).sum() - _kernel_diagonal(x, d).sum() for x in (a, b)) / (n * (n - 1))
    return within - 2 * _kernel(a, b, d).mean()


def _kernel(x: Tensor, y: Tensor, d: int) -> Tensor:
    return (x @ y.T / d + 1) ** 3


def _kernel_diagonal(x: Tensor, d: int) -> Tensor:
    return (x.square().sum(1) / d + 1) ** 3


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, chunk: int = 1000) -> tuple[float, float]:
    """Improved precision and recall of ``fake`` (N, d) against ``real`` (M, d).

    A set's manifold is the union of balls around its rows, each reaching to the row's k-th nearest neighbour
    in the same set. Precision: the share of fake rows inside the real manifold; recall: the share of real rows
    inside the fake one. Both depend on N and M: compare rows of equal size only.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k={k} rows on each side")
    real, fake = real.double(), fake.double()
    return _share_inside(fake, real, k, chunk), _share_inside(real, fake, k, chunk)


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5, chunk: int = 1000) -> tuple[float, float]:
    """Density and coverage of ``fake`` (N, d) against ``real`` (M, d).

    Every real row has a ball that reaches to its k-th nearest real neighbour. Density: how many balls hold a fake
    row, mean over fake rows, divided by k; it may exceed 1. Coverage: the share of balls that hold a fake row.
    """
    if min(len(real) - 1, len(fake)) < k:
        raise ValueError(f"density and coverage need more than k={k} rows, found {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    radii, inside, covered = _radii(real, k, chunk), 0, torch.zeros(len(real), dtype=torch.bool)
    for rows in fake.split(chunk):
        within = _squared(rows, real) < radii
        inside += int(within.sum())
        covered |= within.any(0)
    return inside / (k * len(fake)), float(covered.double().mean())


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence of p(class | image) from p(class): mean and standard deviation over the splits.

    Args:
        logits: class logits (N, classes); splits are consecutive parts of it, as even as possible.
    """
    scores = []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def cmmd(real: Tensor, fake: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 2000) -> float:
    """``scale`` times the squared MMD between normalised CLIP rows (M, d) and (N, d), kernel exp(-|x-y|^2 / 2 sigma^2).

    The estimate keeps the diagonals, as the metric's authors do: it is biased, never negative, and needs few images.
    """
    real, fake = (F.normalize(rows.double(), dim=1) for rows in (real, fake))

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        sums = [torch.exp(-_squared(rows, y) / (2 * sigma**2)).sum() for rows in x.split(chunk)]
        return torch.stack(sums).sum() / (len(x) * len(y))

    return float(scale * (mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean cosine between image rows and text rows (N, d); neither times 100 nor floored at zero."""
    return float(F.cosine_similarity(images.double(), texts.double(), dim=1).mean())


def prompt_diversity(rows: Tensor, prompts: Tensor) -> float:
    """Mean cosine distance between rows (N, d) of one prompt, averaged over prompts (N,) with at least two."""
    rows, means = F.normalize(rows.double(), dim=1), []
    for prompt in prompts.unique():
        group = rows[prompts == prompt]
        if (n := len(group)) >= 2:
            means.append(1 - ((group @ group.T).sum() - n) / (n * (n - 1)))
    return float(torch.stack(means).mean()) if means else float("nan")


def memorised(fake: Tensor, real: Tensor, unseen: Tensor, *, near: float = 0.05, chunk: int = 1000) -> float:
    """Share of rows ``fake`` (N, d) as near to one of the training rows ``real`` (M, d) as hardly any fresh picture is.

    As near: within the quantile ``near`` of the distances from real pictures that were not trained on, ``unseen``
    (K, d), to their nearest training row. So unseen pictures have ``near`` themselves, and copies have 1.
    """
    ours, theirs = (
        torch.cat([_squared(rows, real.double()).min(1).values for rows in some.double().split(chunk)])
        for some in (fake, unseen)
    )
    return float((ours <= theirs.quantile(near)).double().mean())


def _radii(centres: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance (N,) from every row to its k-th nearest other row."""
    return torch.cat([_squared(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(chunk)])


def _share_inside(points: Tensor, centres: Tensor, k: int, chunk: int) -> float:
    radii = _radii(centres, k, chunk)
    inside = [(_squared(rows, centres) <= radii).any(1) for rows in points.split(chunk)]
    return float(torch.cat(inside).double().mean())


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit (N, classes) is the requested class (N,)."""
    return float((logits.argmax(1) == labels).double().mean())


def class_variance(rows: Tensor, labels: Tensor) -> float:
    """Diversity: the trace of the unbiased feature covariance (N, d) within a class, averaged over classes (N,).

    It has no bias in N. Classes with a single row are left out; nan when there is no other.
    """
    classes = [rows[labels == label].double() for label in labels.unique()]
    traces = [rows.var(0).sum() for rows in classes if len(rows) >= 2]
    return float(torch.stack(traces).mean()) if traces else float("nan")


def variance_ratio(fake: Tensor, fake_labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Mean over classes of (total feature variance of the fake rows) / (that of the real rows).

    Below 1: samples of one class resemble each other more than real ones do, the usual loss of distribution
    matching. Classes with fewer than two rows on either side are left out.
    """
    ratios = []
    for label in real_labels.unique():
        ours, theirs = fake[fake_labels == label].double(), real[real_labels == label].double()
        if min(len(ours), len(theirs)) >= 2:
            ratios.append(ours.var(0).sum() / theirs.var(0).sum())
    return float(torch.stack(ratios).mean()) if ratios else float("nan")


def standard_error(
    statistic: Callable[[Tensor], float], n: int, *, resamples: int = 20, seed: int = 0, strata: Tensor | None = None
) -> float:
    """Standard deviation of ``statistic`` over resamples of ``n`` indices with replacement (Efron 1979).

    A Frechet distance of a resample is biased upwards, as repeated rows count as fewer; its spread is the
    result, and a 95 % interval is the value plus or minus 1.96 of it.

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
