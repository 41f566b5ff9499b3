"""f-divergences for distribution matching: f-distill (Xu et al. 2025, "One-step Diffusion Models with f-Divergence
Distribution Matching").

    D_f(real || fake) = E_fake[ f(r) ],  r = p_real / p_fake
    its gradient at a sample = h(r) (s_fake - s_real),  h(r) = r^2 f''(r)

so that every divergence is DMD's gradient times a weight per sample. r comes from a discriminator: r = exp(logit).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Divergence = Literal[
    "reverse-kl", "forward-kl", "jensen-shannon", "softened-reverse-kl", "squared-hellinger", "neyman", "jeffreys"
]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "jensen-shannon": lambda r: r / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "squared-hellinger": lambda r: r.sqrt(),
    "neyman": lambda r: 1 / r,
    "jeffreys": lambda r: 1 + r,
}
"""h(r), up to a constant factor."""


class RatioWeight(nn.Module):
    """h(r) with mean 1, of a ratio with mean 1.

        r <- clip(exp logit) / its mean in each of ten bins of time         E_fake[r] = 1, as of any density ratio
        weight = h(r) / the mean of h

    A discriminator that is ahead of the student says r < 1 of every sample. Without the first division h would then be
    read where it is steep or flat for that reason alone; with it, h compares samples of one noise level. Means are
    running ones, over the updates so far.
    """

    BINS, LOWEST, HIGHEST, DECAY = 10, 0.1, 20.0, 0.9
    seen: Tensor

    def __init__(self, divergence: Divergence):
        super().__init__()
        self.h = WEIGHTS[divergence]
        # Of r in each bin, and of h last. A parameter that no player moves, because checkpoints keep parameters.
        mean = torch.ones(self.BINS + 1)
        mean[-1] = self.h(mean[-1])
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.register_buffer("seen", torch.zeros(2, self.BINS + 1))

    def forward(self, logit: Tensor, t: Tensor) -> Tensor:
        """Weights (B,) for a discriminator's logits (B,) of samples at times ``t`` (B,)."""
        ratio = logit.exp().clamp(self.LOWEST, self.HIGHEST)
        where = (t * self.BINS).long().clamp(max=self.BINS - 1)
        h = self.h(ratio / self.mean[where].to(ratio))
        for place, value in ((where, ratio), (torch.full_like(where, self.BINS), h)):
            self.seen.index_add_(1, place, torch.stack([value, torch.ones_like(value)]).to(self.seen))
        return h / self.mean[-1].to(h)

    @torch.no_grad()
    def update(self) -> None:
        """Move the means towards what was seen since the last call: once a step, whatever its micro-batches."""
        total, count = self.seen
        current = torch.where(count > 0, total / count.clamp_min(1), self.mean)
        self.mean.lerp_(current, 1 - self.DECAY)
        self.seen.zero_()
