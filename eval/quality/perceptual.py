"""LPIPS diversity per prompt, and preference scores of packages that the user installs."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.eval.networks import load_weights, required

Preference = Callable[[Sequence[Image.Image], str], list[float]]
"""Scores of pictures made for one prompt, higher is better."""

# Published name, module, package on PyPI, where its weights come from.
PREFERENCES = {
    "ImageReward": ("ImageReward", "image-reward", "THUDM/ImageReward"),
    "HPSv2": ("hpsv2", "hpsv2", "xswu/HPSv2"),
    "PickScore": ("transformers", "transformers", "yuvalkirstain/PickScore_v1"),
}


class Lpips(nn.Module):
    """LPIPS (Zhang et al. 2018) with AlexNet between pairs of uint8 images.

    Args:
        trunk: torchvision's AlexNet weights file (``alexnet-owt-7be5be79.pth``); None: random, for tests. The
            linear weights come with the package lpips.

    Raises:
        InputError: lpips is not installed, or the file does not hold AlexNet.
    """

    def __init__(self, trunk: str | Path | None):
        super().__init__()
        self.network = required("lpips", "lpips", "LPIPS").LPIPS(net="alex", pnet_rand=True, verbose=False)
        self.network.eval().requires_grad_(False)
        if trunk is not None:
            alexnet = required("torchvision.models", "torchvision", "LPIPS").alexnet()
            load_weights(alexnet, Path(trunk))
            stages = self.network.net
            # lpips names a convolution by its stage and its place in torchvision's list.
            stages.load_state_dict({k: alexnet.features.state_dict()[k.partition(".")[2]] for k in stages.state_dict()})

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) between uint8 images (N, 1 or 3, H, W); 0 for equal ones."""
        device = next(self.network.parameters()).device
        scaled = [images.to(device).float().expand(-1, 3, -1, -1) / 127.5 - 1 for images in (a, b)]
        return self.network(*scaled).flatten()


def lpips_diversity(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor, prompts: Tensor) -> float:
    """Mean LPIPS between images (N, C, H, W) of one prompt, averaged over prompts (N,); nan without a pair."""
    means = []
    for prompt in prompts.unique():
        group = images[prompts == prompt]
        pairs = list(itertools.combinations(range(len(group)), 2))
        if pairs:
            first, second = (group[list(side)] for side in zip(*pairs, strict=True))
            means.append(distance(first, second).double().mean())
    return float(torch.stack(means).mean()) if means else float("nan")


def preference(name: str, folder: str | Path | None = None, device: str = "cpu") -> Preference:
    """A preference model of people: ``ImageReward``, ``HPSv2`` or ``PickScore``.

    Args:
        folder: its weights: ImageReward's and HPSv2's checkpoint file, PickScore's folder. None: the package's own
            way of finding them, which may use the network.

    Raises:
        InputError: there is no such score, or its package is not installed.
    """
    if name not in PREFERENCES:
        raise InputError(f"preference: expected one of {', '.join(PREFERENCES)}, found {name!r}")
    module, package, home = PREFERENCES[name]
    library = required(module, package, name)
    if name == "ImageReward":
        model = library.load(str(folder) if folder else "ImageReward-v1.0", device=device)
        return lambda pictures, prompt: [model.score(prompt, picture) for picture in pictures]
    if name == "HPSv2":
        options = {"cp": str(folder)} if folder else {}
        return lambda pictures, prompt: [float(x) for x in library.score(list(pictures), prompt, **options)]
    return _pick_score(library, str(folder or home), device)


def _pick_score(library: Any, home: str, device: str) -> Preference:
    model = library.CLIPModel.from_pretrained(home).eval().to(device)
    processor = library.CLIPProcessor.from_pretrained(home)

    @torch.no_grad()
    def score(pictures: Sequence[Image.Image], prompt: str) -> list[float]:
        inputs = processor(text=[prompt], images=list(pictures), padding=True, truncation=True, return_tensors="pt")
        return model(**inputs.to(device)).logits_per_image[:, 0].tolist()

    return score
