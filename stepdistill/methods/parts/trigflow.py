"""TrigFlow (Lu & Song 2024): noise levels as angles, and what continuous-time consistency derives from them.

Every schedule is one up to scale: x_t alpha'/alpha with alpha' = cos a, tan a = sigma / (alpha sd), has the same signal
and noise as TrigFlow's x = cos a x_0 + sin a sd eps. So x_0 and eps carry over, and samples stay as they are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from stepdistill.diffusion.float32 import no_autocast
from stepdistill.diffusion.schedule import Prediction, Schedule, per_sample


class LogVariance(nn.Module):
    """v(a): the learned uncertainty of each noise level, a few harmonics of the angle (B,); 0 at the start."""

    def __init__(self, harmonics: int = 8):
        super().__init__()
        self.linear = nn.Linear(harmonics, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, angle: Tensor) -> Tensor:
        orders = torch.arange(self.linear.in_features, device=angle.device)
        with no_autocast(angle.device):
            return self.linear((2 * angle[:, None] * orders).cos().to(self.linear.weight))[:, 0]


@torch.no_grad()
def derivative(function: Callable[..., Tensor], point: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """d/dh function(point + h direction) at h = 0, in forward mode: one pass of values and tangents."""
    # torch.func.jvp does the same a third slower.
    with forward_ad.dual_level(), torch.compiler.set_stance("force_eager"):  # compiled code has no tangents
        value = function(*map(forward_ad.make_dual, point, direction))
        primal, tangent = forward_ad.unpack_dual(value)
        return torch.zeros_like(primal) if tangent is None else tangent


class TrigFlow:
    """A schedule's times as angles; noisy samples stay in the schedule's own scale. All (B,) float64.

    Args:
        schedule: any.
        t: times (B,).
        sigma_data: sd.
    """

    def __init__(self, schedule: Schedule, t: Tensor, sigma_data: float):
        self.sigma_data = sigma_data
        alpha, sigma = schedule.coefficients(t)
        self.d_alpha, self.d_sigma = (
            derivative(c, (t,), (torch.ones_like(t),)) for c in (schedule.alpha, schedule.sigma)
        )
        self.angle = torch.atan2(sigma, alpha * sigma_data)
        self.cos, self.sin = self.angle.cos(), self.angle.sin()
        wronskian = self.d_sigma * alpha - sigma * self.d_alpha
        self.dt = (sigma_data**2 * alpha**2 + sigma**2) / (sigma_data * wronskian)

    def velocity(self, prediction: Prediction) -> Tensor:
        """F = cos a sd eps - sin a x_0, dx/da in TrigFlow's own scale."""
        x0, eps = prediction.x0, prediction.eps
        return per_sample(self.cos * self.sigma_data, x0) * eps - per_sample(self.sin, x0) * x0

    def flow(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """cos a d(x_t, t)/da along the flow that ``prediction`` describes; the cosine keeps it finite at a = pi/2."""
        dt = self.cos * self.dt
        x0, eps = prediction.x0, prediction.eps
        return per_sample(self.d_alpha * dt, x0) * x0 + per_sample(self.d_sigma * dt, x0) * eps, dt
