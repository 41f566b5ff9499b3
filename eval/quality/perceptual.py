"""Perceptual metrics: LPIPS between two images, and models of human preference for a prompt.

These are what ``bench --also`` measures beside a protocol's own metrics. Their files lie below the data folder and are
found, downloaded and checked as a protocol's are.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from stepdistill.errors import InputError
from stepdistill.eval.networks import clip, load_weights, required
from stepdistill.eval.preprocess import rgb
from stepdistill.eval.protocol import FileSpec

Preference = Callable[[Tensor, Sequence[str]], Tensor]
"""Scores (N,) of uint8 images (N, C, H, W), each for its own prompt; higher is better."""


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
        """Distances (N,), on the CPU, between uint8 images (N, 1 or 3, H, W); 0 for equal ones."""
        device = next(self.network.parameters()).device
        scaled = [images.to(device).float().expand(-1, 3, -1, -1) / 127.5 - 1 for images in (a, b)]
        return self.network(*scaled).flatten().cpu()


def lpips_diversity(distance: Callable[[Tensor, Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean distance between the pairs of a prompt's images (N, C, H, W), N >= 2: how much its seeds differ."""
    first, second = (images[list(side)] for side in zip(*itertools.combinations(range(len(images)), 2), strict=True))
    return distance(first, second).double().mean()


def hpsv2(weights: Path, device: str | torch.device = "cpu", arch: str = "ViT-H-14") -> Preference:
    """HPSv2 (Wu et al. 2023): 100 times the cosine of its CLIP, on images padded to squares.

    Args:
        weights: a checkpoint of https://huggingface.co/xswu/HPSv2, such as HPS_v2.1_compressed.pt.

    Raises:
        InputError: open_clip is not installed, or the file holds another network.
    """
    network = clip(arch, weights, resize="longest").to(device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        prepared = torch.stack([network.prepare(image) for image in images]).to(device)
        return 100 * F.cosine_similarity(network.rows(prepared)["rows"], network.texts(prompts)).cpu()

    return score


def pick_score(folder: Path, device: str | torch.device = "cpu") -> Preference:
    """PickScore (Kirstain et al. 2023): its CLIP's cosine times its learned scale.

    Args:
        folder: config.json and model.safetensors of https://huggingface.co/yuvalkirstain/PickScore_v1.

    Raises:
        InputError: open_clip, whose tokenizer it uses, is not installed, or the folder does not hold the model.
    """
    open_clip = required("open_clip", "open_clip_torch", "PickScore")
    try:
        model = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval().to(device)
    except (OSError, ValueError) as error:
        raise InputError(f"pickscore: {folder}: expected config.json and model.safetensors, found {error}") from error
    transform = open_clip.image_transform(model.config.vision_config.image_size, is_train=False)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([transform(picture) for picture in _pictures(images)])
        tokens = open_clip.tokenize(list(prompts))
        output = model(input_ids=tokens.to(device), pixel_values=pixels.to(device))
        return output.logits_per_image.diagonal().float().cpu()

    return score


def image_reward(weights: Path, config: Path, tokenizer: Path, device: str | torch.device = "cpu") -> Preference:
    """ImageReward (Xu et al. 2023) of the package image-reward, with files that are here already.

    Args:
        weights: ImageReward.pt of https://huggingface.co/THUDM/ImageReward.
        config: its med_config.json, from the same place.
        tokenizer: a folder called bert-base-uncased with that model's tokenizer.

    Raises:
        InputError: image-reward is not installed, or a file is not what it should be.
    """
    library = required("ImageReward", "image-reward", "ImageReward")
    files = {"name": str(weights.resolve()), "med_config": str(config.resolve())}
    try:
        # It tells its progress on stdout, where a report may be read from.
        with contextlib.redirect_stdout(sys.stderr), _inside(tokenizer.parent):
            model = library.load(**files, device=str(device))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"imagereward: {weights}: {str(error).splitlines()[0]}") from error

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([model.score(p, i) for p, i in zip(prompts, _pictures(images), strict=True)])

    return score


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder: a library that loads a model by its name alone finds a folder of that name there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(rgb(image).permute(1, 2, 0).contiguous().numpy()) for image in images]


DIVERSITY, DISTANCE = "lpips_diversity", "lpips_teacher"


@dataclass(frozen=True)
class Also:
    """One name of ``--also``: its files, what people are shown for each metric, and how the files become a network."""

    files: tuple[FileSpec, ...]
    labels: dict[str, str]
    load: Callable[..., Any]

    @property
    def wants_prompts(self) -> bool:
        """Whether it scores an image for its prompt."""
        return DISTANCE not in self.labels


ALSO = {
    "lpips": Also(
        files=(
            FileSpec(
                file="lpips/alexnet-owt-7be5be79.pth",
                sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            ),
        ),
        labels={DIVERSITY: "LPIPS between images of a prompt", DISTANCE: "LPIPS to the teacher's image"},
        load=lambda trunk, device: Lpips(trunk).to(device),
    ),
    "imagereward": Also(
        files=(
            FileSpec(
                file="imagereward/ImageReward.pt",
                sha256=None,
                url="https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt",
            ),
            FileSpec(
                file="imagereward/med_config.json",
                sha256=None,
                url="https://huggingface.co/THUDM/ImageReward/resolve/main/med_config.json",
            ),
            FileSpec(
                file="imagereward/bert-base-uncased",
                sha256=None,
                hub="google-bert/bert-base-uncased",
                names=("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
            ),
        ),
        labels={"image_reward": "ImageReward"},
        load=image_reward,
    ),
    "hpsv2": Also(
        files=(
            FileSpec(
                file="hpsv2/HPS_v2.1_compressed.pt",
                sha256=None,
                url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
            ),
        ),
        labels={"hpsv2": "HPSv2.1 ×100"},
        load=hpsv2,
    ),
    "pickscore": Also(
        files=(FileSpec(file="pickscore", sha256=None, hub="yuvalkirstain/PickScore_v1"),),
        labels={"pick_score": "PickScore"},
        load=pick_score,
    ),
}


def check_also(names: Sequence[str]) -> None:
    """Raises InputError unless all are names of ``--also``."""
    if unknown := [name for name in names if name not in ALSO]:
        raise InputError(f"also: expected some of {', '.join(ALSO)}, found {unknown[0]!r}")


def also_files(names: Sequence[str]) -> list[FileSpec]:
    """What these metrics need below the data folder."""
    return [spec for name in names for spec in ALSO[name].files]


def also_labels(names: Sequence[str]) -> dict[str, str]:
    """What people are shown for each of these metrics."""
    return {metric: label for name in names for metric, label in ALSO[name].labels.items()}


def load_also(name: str, folder: Path, device: str | torch.device) -> Lpips | Preference:
    """LPIPS or a preference score, on ``device``, with its files from the data folder.

    Raises:
        InputError: a package is not installed (it is named), or a file is not what it should be.
    """
    return ALSO[name].load(*(folder / spec.file for spec in ALSO[name].files), device=device)
