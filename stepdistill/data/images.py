"""Real images for the methods that need them: Fashion-MNIST, or a folder with one subfolder per condition."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load(source: str, channels: int, size: int) -> tuple[Tensor, list[str]]:
    """Images uint8 (N, channels, size, size) and the condition of each, a class name or a caption.

    Args:
        source: "fashion-mnist" or a folder. In a folder, the condition of FOLDER/NAME/picture.png is NAME,
            or the text in picture.txt beside it.

    Raises:
        InputError: nothing readable there; the message names the first file that is wrong.
    """
    if source == "fashion-mnist":
        try:
            images, labels = fashion_mnist.load("train")
        except FileNotFoundError as error:
            raise InputError(str(error)) from None
        if images.shape[1:] != (channels, size, size):
            raise InputError(f"fashion-mnist has 1x32x32 images, this pipeline wants {channels}x{size}x{size}")
        return images, [fashion_mnist.CLASS_NAMES[label] for label in labels.tolist()]
    paths = _paths(source)
    return torch.stack([_read(path, channels, size) for path in paths]), [_condition(path) for path in paths]


def captions(source: str) -> list[str]:
    """The conditions of the images in ``source`` (see :func:`load`), each once, in order.

    Raises:
        InputError: there are no images.
    """
    if source == "fashion-mnist":
        return list(fashion_mnist.CLASS_NAMES)
    return list(dict.fromkeys(_condition(path) for path in _paths(source)))


def _paths(source: str) -> list[Path]:
    paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{source}: expected images ({', '.join(sorted(SUFFIXES))}), found none")
    return paths


def _read(path: Path, channels: int, size: int) -> Tensor:
    try:
        with Image.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)


def _condition(path: Path) -> str:
    caption = path.with_suffix(".txt")
    return caption.read_text(encoding="utf-8").strip() if caption.is_file() else path.parent.name
