"""Discriminator heads on the hidden states of a denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """One small patch head per hidden state: every token or pixel votes with one logit.

    Args:
        shapes: shapes of the hidden states without batch, (tokens, width) or (channels, h, w).
        width: hidden width of each head.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], width: int = 64):
        super().__init__()
        channels = [shape[-1] if len(shape) == 2 else shape[0] for shape in shapes]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width), nn.SiLU(), nn.Linear(width, 1)) for c in channels
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, votes) from hidden states (B, tokens, width) or (B, channels, h, w)."""
        votes = []
        for head, feature in zip(self.heads, features, strict=True):
            tokens = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
            votes.append(head(tokens.float())[..., 0])
        return torch.cat(votes, dim=1)
