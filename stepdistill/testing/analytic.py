"""Teachers with a known answer: Gaussians and Gaussian mixtures under any schedule, without a network.

They are called like ``pipeline.denoiser.Denoiser`` and are exact in float64: posterior mean, score, density and
probability-flow map are closed forms, so every loss, gradient and optimum of a method can be asserted, not
eyeballed. With x_t = alpha x_0 + sigma eps and x_0 ~ N(m, q^2 I), the marginal is N(alpha m, V I) with
V = alpha^2 q^2 + sigma^2; a mixture is a responsibility-weighted sum of such terms.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import Kind, Prediction, Schedule, per_sample
from stepdistill.kernels import Rule

LABELS = "class_labels"
"""The key of the conditioning tensor (B,) that selects a class, as in DiT."""

Conditions = Mapping[str, Tensor]


class AnalyticDenoiser(ABC):
    """What both distributions share: the call, the score and the labels. Times ``t`` are (B,), samples (B, ...)."""

    norm_axis = None
    rule = Rule()
    takes_r = False

    def __init__(self, schedule: Schedule, kind: Kind):
        self.schedule = schedule
        self.kind: Kind = kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Prediction:
        """What a perfect network of this ``kind`` emits at ``(x_t, t)``, in the dtype of ``x_t``."""
        x0 = self.posterior_mean(x_t, t, cond)
        return Prediction(self.schedule.from_x0(x0, x_t, t, self.kind), x_t, t, self.schedule, self.kind)

    @abstractmethod
    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        """D = E[x_0 | x_t], shaped like ``x_t``; differentiable in ``x_t``."""

    @abstractmethod
    def log_density(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        """log p_t(x_t), shape (B,), float64; differentiable in ``x_t``."""

    @abstractmethod
    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Conditions | None = None) -> Tensor:
        """Where the probability-flow ODE takes ``x_t`` from time ``t`` to time ``r``, in either direction."""

    @abstractmethod
    def sample(
        self, count: int, shape: Sequence[int], cond: Conditions | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``count`` independent x_0 of ``shape``, float64."""

    def score(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        """grad log p_t(x_t), from the posterior mean by Tweedie's formula."""
        return self.schedule.score(self.posterior_mean(x_t, t, cond), x_t, t)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        return per_sample(alpha, like), per_sample(sigma, like)


class GaussianDenoiser(AnalyticDenoiser):
    """x_0 ~ N(m, q^2 I).

    Args:
        mean: a number or 0-d tensor; or a tensor whose first axis has one row per class (further axes broadcast
            against one sample), from which ``cond["class_labels"]`` selects. It may require grad.
        std: likewise.
    """

    def __init__(self, mean: float | Tensor, std: float | Tensor, schedule: Schedule, kind: Kind):
        super().__init__(schedule, kind)
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64)

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        x, alpha, sigma, mean, std = self._at(x_t, t, cond)
        variance = alpha**2 * std**2 + sigma**2
        return (mean + alpha * std**2 / variance * (x - alpha * mean)).to(x_t)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        x, alpha, sigma, mean, std = self._at(x_t, t, cond)
        variance = alpha**2 * std**2 + sigma**2
        terms = -((x - alpha * mean) ** 2) / (2 * variance) - (2 * math.pi * variance).log() / 2
        return terms.expand_as(x).flatten(1).sum(1)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Conditions | None = None) -> Tensor:
        """alpha_r m + sqrt(V_r / V_t) (x_t - alpha_t m); differentiable."""
        x, alpha, sigma, mean, std = self._at(x_t, t, cond)
        alpha_r, sigma_r = self._coefficients(r, x)
        ratio = (alpha_r**2 * std**2 + sigma_r**2) / (alpha**2 * std**2 + sigma**2)
        return (alpha_r * mean + ratio.sqrt() * (x - alpha * mean)).to(x_t)

    def sample(
        self, count: int, shape: Sequence[int], cond: Conditions | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        z = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        return self._row(self.mean, z, cond) + self._row(self.std, z, cond) * z

    def _at(self, x_t: Tensor, t: Tensor, cond: Conditions | None) -> tuple[Tensor, ...]:
        x = x_t.double()
        return x, *self._coefficients(t, x), self._row(self.mean, x, cond), self._row(self.std, x, cond)

    def _row(self, table: Tensor, x: Tensor, cond: Conditions | None) -> Tensor:
        """``table`` as one row per sample, shaped to broadcast with ``x`` (B, ...)."""
        table = table.to(x.device)
        if table.ndim == 0:
            return table
        one_class = len(table) == 1
        rows = table.expand(len(x), *table.shape[1:]) if one_class else table[(cond or {})[LABELS]]
        return rows.reshape(len(x), *[1] * (x.ndim - rows.ndim), *rows.shape[1:])


def affine_critic(scale: float | Tensor, shift: float | Tensor, schedule: Schedule, kind: Kind) -> GaussianDenoiser:
    """The perfect critic of the generator x = scale z + shift, z ~ N(0, I): its samples are N(shift, scale^2 I)."""
    scale, shift = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (scale, shift))
    return GaussianDenoiser(shift, scale.abs(), schedule, kind)


class MixtureDenoiser(AnalyticDenoiser):
    """x_0 ~ sum_k pi_k N(m_k, q_k^2 I); class k is component k, and any other label means the whole mixture.

    So the null label of a guided model is K, as in DiT; without ``class_labels`` every sample is unconditional.

    Args:
        weights: pi (K,), summing to 1.
        means: m, (K,) or (K, *sample shape).
        stds: q (K,).
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[float] | Tensor,
        stds: Sequence[float] | Tensor,
        schedule: Schedule,
        kind: Kind,
    ):
        super().__init__(schedule, kind)
        self.weights, self.means, self.stds = (
            torch.as_tensor(values, dtype=torch.float64) for values in (weights, means, stds)
        )

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        x, alpha, means, stds, variance = self._components(x_t, t)
        each = means + alpha * stds**2 / variance * (x - alpha * means)
        share = self._joint(x, alpha, means, variance, cond).softmax(1)
        return (share.reshape(*share.shape, *[1] * (x.ndim - 2)) * each).sum(1).to(x_t)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Conditions | None = None) -> Tensor:
        x, alpha, means, _, variance = self._components(x_t, t)
        return self._joint(x, alpha, means, variance, cond).logsumexp(1)

    @torch.no_grad()
    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Conditions | None = None) -> Tensor:
        """F_r^-1(F_t(x)) by bisection: the flow keeps quantiles in one dimension. Not differentiable.

        Raises:
            ValueError: a sample has more than one element.
        """
        if x_t[0].numel() != 1:
            raise ValueError(f"the flow map of a mixture is known for one element per sample, not {x_t[0].numel()}")
        x, alpha, means, _, variance = (value.flatten(1) for value in self._components(x_t, t))
        _, alpha_r, means_r, _, variance_r = (value.flatten(1) for value in self._components(x_t, r))
        weights = self._log_weights(len(x_t), x.device, cond).exp()
        standard = (x - alpha * means) / variance.sqrt()
        below = (weights * torch.special.ndtr(standard)).sum(1)
        above = (weights * torch.special.ndtr(-standard)).sum(1)
        # Every component's own map enters the cumulative probability term by term, so their range holds the answer.
        mapped = alpha_r * means_r + variance_r.sqrt() * standard
        low, high = mapped.amin(1), mapped.amax(1)
        for _ in range(100):
            middle = (low + high) / 2
            trial = (middle[:, None] - alpha_r * means_r) / variance_r.sqrt()
            # In the upper tail the cumulative probability is 1 to machine precision; its complement is not.
            upper = (weights * torch.special.ndtr(-trial)).sum(1) < above
            too_high = torch.where(below <= 0.5, (weights * torch.special.ndtr(trial)).sum(1) > below, upper)
            low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
        return ((low + high) / 2).reshape(x_t.shape).to(x_t)

    def sample(
        self, count: int, shape: Sequence[int], cond: Conditions | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        weights = self._log_weights(count, self.weights.device, cond).exp()
        component = torch.multinomial(weights, 1, generator=generator)[:, 0]
        z = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        means = self.means[component]
        means = means.reshape(count, *[1] * (z.ndim - means.ndim), *means.shape[1:])
        return means + per_sample(self.stds[component], z) * z

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, alpha, m, q, V with a component axis 1, all broadcastable to (B, K, ...)."""
        x = x_t.double().unsqueeze(1)
        alpha, sigma = self._coefficients(t, x)
        means, stds = self.means.to(x.device), self.stds.to(x.device)
        means = means.reshape(1, len(means), *[1] * (x.ndim - 1 - means.ndim), *means.shape[1:])
        stds = stds.reshape(1, len(stds), *[1] * (x.ndim - 2))
        return x, alpha, means, stds, alpha**2 * stds**2 + sigma**2

    def _joint(self, x: Tensor, alpha: Tensor, means: Tensor, variance: Tensor, cond: Conditions | None) -> Tensor:
        """log(pi_k N(x; alpha m_k, V_k I)), shape (B, K)."""
        terms = -((x - alpha * means) ** 2) / (2 * variance) - (2 * math.pi * variance).log() / 2
        return self._log_weights(len(x), x.device, cond) + terms.flatten(2).sum(2)

    def _log_weights(self, count: int, device: torch.device, cond: Conditions | None) -> Tensor:
        """log pi per sample (B, K): of the whole mixture, or of the labelled component alone."""
        whole = self.weights.to(device).log().expand(count, -1)
        if not cond:
            return whole
        labels = cond[LABELS].reshape(-1, 1)
        components = torch.arange(len(self.weights), device=device)
        alone = torch.where(labels == components, 0.0, -math.inf).to(whole)
        return torch.where(labels < len(self.weights), alone, whole)
