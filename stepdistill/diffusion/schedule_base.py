"""What every noise schedule has: alpha and sigma of a time, and what a prediction means by them."""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from stepdistill.kernels import add_noise

Kind = Literal["epsilon", "v", "edm", "flow", "inverted flow", "sample"]
"""What a network emits: eps; v = sd alpha eps - sigma x_0 / sd with the schedule's data deviation sd, 1 unless it is
EDM's; -v, as EDM's preconditioning has it; flow velocity u = eps - x_0; -u, of inverted sigmas; or x_0 itself."""


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A (B,) coefficient shaped to multiply ``like`` (B, ...), in its dtype."""
    return coefficient.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Schedule(ABC):
    """alpha(t), sigma(t) and everything that follows from them."""

    name: str
    data_std = 1.0
    rounding = 0.0
    """What float32 may make of a step, relative, beside the usual: samples of x_0 + 80 eps lose digits of x_0."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t``, float64, shaped like ``t``."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """``t`` in the unit of the stock schedulers of this family (0..999 for VP), float64."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of :meth:`timestep`."""

    @abstractmethod
    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx/d(natural time): the angle on VP, t on flow, sigma on EDM."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest times the family's networks were trained at: table entries on VP, ``t`` itself elsewhere."""
        return t

    def between(self, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
        """The time at ``share`` (0 .. 1) of the way from ``low`` to ``high``, spaced as the family's grids are.

        The arguments broadcast; float64. Flow's grids are even before their shift, all others in t.
        """
        return self.snap(torch.lerp(low.double(), high.double(), share.double()))

    def alpha(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]

    def _shaped(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return per_sample(alpha, like), per_sample(sigma, like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps; shapes (B, ...), t (B,)."""
        return add_noise(x0, eps, *self.coefficients(t))

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """x_0 from what a network of this ``kind`` emitted at ``(x_t, t)``."""
        alpha, sigma = self._shaped(t, x_t)
        match kind:
            case "epsilon":
                return (x_t - sigma * prediction) / alpha
            case "v" | "edm":
                sd, v = self.data_std, -prediction if kind == "edm" else prediction
                return (sd**2 * alpha * x_t - sd * sigma * v) / (sd**2 * alpha**2 + sigma**2)
            case "flow" | "inverted flow":
                u = prediction if kind == "flow" else -prediction
                return (x_t - sigma * u) / (alpha + sigma)
            case "sample":
                return prediction
        raise ValueError(f"unknown prediction kind {kind!r}, expected one of {get_args(Kind)}")

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """eps from what a network of this ``kind`` emitted at ``(x_t, t)``."""
        alpha, sigma = self._shaped(t, x_t)
        match kind:
            case "epsilon":
                return prediction
            case "v" | "edm":
                sd, v = self.data_std, -prediction if kind == "edm" else prediction
                return (sigma * x_t + sd * alpha * v) / (sd**2 * alpha**2 + sigma**2)
            case "flow" | "inverted flow":
                u = prediction if kind == "flow" else -prediction
                return (x_t + alpha * u) / (alpha + sigma)
            case "sample":
                return (x_t - alpha * prediction) / sigma
        raise ValueError(f"unknown prediction kind {kind!r}, expected one of {get_args(Kind)}")

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor, kind: Kind) -> Tensor:
        """The inverse of :meth:`to_x0`: what a network of this ``kind`` would emit to mean ``x0``."""
        alpha, sigma = self._shaped(t, x_t)
        if kind == "sample":
            return x0
        eps = (x_t - alpha * x0) / sigma
        v = self.data_std * alpha * eps - sigma * x0 / self.data_std
        return {"epsilon": eps, "v": v, "edm": -v, "flow": eps - x0, "inverted flow": x0 - eps}[kind]

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = -(x_t - alpha D)/sigma^2 for the posterior mean D = ``x0`` (Tweedie)."""
        alpha, sigma = self._shaped(t, x_t)
        return (alpha * x0 - x_t) / sigma**2
