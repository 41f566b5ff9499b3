"""The feature networks that published numbers stand on, fed by explicit preprocessing; their weights are local files.

A network takes images one at a time through ``prepare`` (on the CPU, any size) and in batches through ``rows``.
"""

import importlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Dinov2Model

from stepdistill.errors import InputError
from stepdistill.eval.preprocess import crop, resize_clean, resize_tf1, rgb

INCEPTION_SIZE = 299
# torch-fidelity's names for the layers up to the pooled features, in order.
_TRUNK = [
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "MaxPool_1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "MaxPool_2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
    "AvgPool",
]
_RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {"clean": resize_clean, "tf1": resize_tf1}


class FeatureNetwork(Protocol):
    """What a feature pass needs. ``features``: the width of a row."""

    features: int

    def prepare(self, image: Tensor) -> Tensor:
        """A uint8 image (1 or 3, H, W) as the network's float input (3, h, w)."""

    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, features) and whatever else one pass gives, float32, of prepared images (N, 3, h, w)."""


class Inception(nn.Module):
    """InceptionV3 of FID: pooled rows (2048) and the logits of the Inception score (1008, without their bias).

    Args:
        network: torch-fidelity's FeatureExtractorInceptionV3.
        crop: see :func:`stepdistill.eval.preprocess.crop`.
        resize: ``clean``, ``tf1``, or ``none`` for crops that are 299 px already (patch-FID).
    """

    features = 2048

    def __init__(self, network: nn.Module, *, crop: str = "none", resize: str = "clean"):
        super().__init__()
        if resize not in (*_RESIZES, "none"):
            raise InputError(f"resize: expected clean, tf1 or none, found {resize!r}")
        self.network = network.eval().requires_grad_(False)
        self.crop, self.resize = crop, resize

    def prepare(self, image: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`; values in [0, 255]."""
        image = crop(rgb(image), self.crop)
        if self.resize != "none":
            return _RESIZES[self.resize](image, INCEPTION_SIZE)
        if tuple(image.shape[1:]) != (INCEPTION_SIZE, INCEPTION_SIZE):
            raise InputError(f"resize: none needs crops of {INCEPTION_SIZE} px, found {tuple(image.shape[1:])}")
        return image.float()

    @torch.no_grad()
    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, 2048) and ``logits`` (N, 1008)."""
        x = (batch.to(self.network.fc.weight) - 128) / 128
        for name in _TRUNK:
            x = getattr(self.network, name)(x)
        pooled = x.flatten(1)
        return {"rows": pooled, "logits": pooled @ self.network.fc.weight.T}


def inception(weights: str | Path | None, **preprocessing: str) -> Inception:
    """Inception with the weights of a file (.pth of torch-fidelity, or .safetensors); None: random, for tests.

    Raises:
        InputError: torch-fidelity is not installed, or the file does not hold this network.
    """
    module = required("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "the Inception metrics")

    class Inceptionv3(module.FeatureExtractorInceptionV3):
        """Its constructor reads weights, by pickle; an empty state lets it keep the fresh ones."""

        def load_state_dict(self, state: dict[str, Tensor]) -> Any:
            return super().load_state_dict(state, strict=bool(state))

    torch.save({}, empty := io.BytesIO())
    empty.seek(0)
    network = Inceptionv3("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    if weights is not None:
        load_weights(network, Path(weights))
    return Inception(network, **preprocessing)


class Clip(nn.Module):
    """An OpenCLIP model: image rows and text rows, float32, not normalised.

    Args:
        model: of open_clip.
        tokenizer: of open_clip.
        transform: its evaluation transform, PIL image -> (3, h, w).
        prefix: put before every prompt, such as ``"A photo depicts "``.
        crop: done before the transform.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Any], Tensor],
        tokenizer: Callable[[Sequence[str]], Tensor],
        *,
        prefix: str = "",
        crop: str = "none",
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.transform, self.tokenizer = transform, tokenizer
        self.prefix, self.crop = prefix, crop
        self.features = model.text_projection.shape[-1]

    def prepare(self, image: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        image = crop(rgb(image), self.crop)
        return self.transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))

    @torch.no_grad()
    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, features)."""
        return {"rows": self.model.encode_image(batch.to(self.model.logit_scale)).float()}

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Rows (N, features) of prompts, cut to the tokenizer's length."""
        tokens = self.tokenizer([self.prefix + prompt for prompt in prompts])
        return self.model.encode_text(tokens.to(self.model.logit_scale.device)).float()


def clip(
    arch: str, weights: str | Path | None, *, prefix: str = "", crop: str = "none", resize: str = "shortest"
) -> Clip:
    """OpenCLIP ``arch`` (``ViT-g-14``) with a local weights file; None: random weights, for tests.

    Args:
        resize: which side is resized to the network's: the ``shortest``, and the longest is cut, or the ``longest``,
            and the shortest is padded.

    Raises:
        InputError: open_clip is not installed, does not know ``arch``, or the file holds another network.
    """
    open_clip = required("open_clip", "open_clip_torch", "CLIP scores")
    if arch not in open_clip.list_models():
        raise InputError(f"clip: expected an architecture of open_clip such as ViT-g-14, found {arch!r}")
    model, _, transform = open_clip.create_model_and_transforms(arch, pretrained=None, image_resize_mode=resize)
    if weights is not None:
        try:
            open_clip.load_checkpoint(model, str(weights))
        except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise InputError(f"weights: {weights} does not fit {arch}: {str(error).splitlines()[0]}") from error
    return Clip(model, transform, open_clip.get_tokenizer(arch), prefix=prefix, crop=crop)


class Dino(nn.Module):
    """DINOv2 of transformers: its class token after the last norm, as FD-DINOv2 (Stein et al. 2023) takes it.

    Preprocessing: clean bicubic to 224 px, scaled to [0, 1], ImageNet mean and deviation.
    """

    size = 224

    def __init__(self, model: nn.Module, *, crop: str = "none"):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.features, self.crop = model.config.hidden_size, crop

    def prepare(self, image: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        x = resize_clean(crop(rgb(image), self.crop), self.size) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (x - mean[:, None, None]) / deviation[:, None, None]

    @torch.no_grad()
    def rows(self, batch: Tensor) -> dict[str, Tensor]:
        """``rows`` (N, features)."""
        return {"rows": self.model(batch.to(self.model.dtype)).last_hidden_state[:, 0].float()}


def dino(folder: str | Path, *, crop: str = "none") -> Dino:
    """DINOv2 from a local folder of transformers format (config.json, model.safetensors).

    Raises:
        InputError: the folder does not hold it.
    """
    try:
        return Dino(Dinov2Model.from_pretrained(str(folder), local_files_only=True), crop=crop)
    except (OSError, ValueError) as error:
        raise InputError(f"dinov2: {folder}: expected config.json and model.safetensors, found {error}") from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a .safetensors file, or a .pth of tensors alone, into a network; every tensor must fit.

    Raises:
        InputError: there is no such file, it holds more than tensors, or not this network's.
    """
    if not path.is_file():
        raise InputError(f"weights: {path} does not exist")
    try:
        safe = path.suffix == ".safetensors"
        network.load_state_dict(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, SafetensorError, UnpicklingError) as error:
        raise InputError(
            f"weights: {path} does not fit {type(network).__name__}: {str(error).splitlines()[0]}"
        ) from error


def required(module: str, package: str, what: str) -> Any:
    """An optional package's module.

    Raises:
        InputError: it is not installed, and the message says how to get it, or it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise InputError(f"{what}: needs the package {package}: pip install {package}") from error
        raise InputError(f"{what}: the package {package} cannot be imported: {error}") from error


def feature_pass(
    network: FeatureNetwork,
    images: Iterable[Any],
    *,
    load: Callable[[Any], Tensor] | None = None,
    device: str | torch.device = "cpu",
    batch: int = 64,
) -> dict[str, Tensor]:
    """What ``network`` gives for uint8 images (C, H, W) of any sizes, concatenated on the CPU.

    Args:
        load: makes an image of each of ``images``, such as a path. Loading and preparing run in threads, all images
            at once; the network sees ``batch`` of them at a time.
    """
    parts: list[dict[str, Tensor]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        prepared = threads.map(lambda image: network.prepare(load(image) if load else image), images)
        while waiting := list(itertools.islice(prepared, batch)):
            rows = network.rows(torch.stack(waiting).to(device))
            parts.append({name: value.cpu() for name, value in rows.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
