"""From an image of any size to what a feature network sees: crops, then one of the two resizes that FIDs differ by."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.errors import InputError


def rgb(image: Tensor) -> Tensor:
    """A uint8 image (1 or 3, H, W) as (3, H, W).

    Raises:
        InputError: it is of another type or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"image: expected uint8 (1 or 3, H, W), found {image.dtype} {tuple(image.shape)}")
    return image.expand(3, -1, -1)


def crop(image: Tensor, how: str) -> Tensor:
    """A uint8 image (3, H, W) cropped as a protocol says.

    Args:
        how: ``none``; ``centre-N``: the middle N x N pixels as they are; ``lanczos-N``: the middle square of the
            short side, then PIL's Lanczos to N x N, rounded to uint8 (GigaGAN's and DMD2's COCO evaluation).

    Raises:
        InputError: the image is smaller than ``centre-N`` needs, or ``how`` is none of these.
    """
    if how == "none":
        return image
    kind, _, number = how.partition("-")
    if kind not in ("centre", "lanczos") or not number.isdecimal():
        raise InputError(f"crop: expected none, centre-N or lanczos-N, found {how!r}")
    height, width = image.shape[1:]
    side = int(number) if kind == "centre" else min(height, width)
    if side > min(height, width):
        raise InputError(f"crop: {how} needs images of at least {side} px, found {width}x{height}")
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if kind == "centre" or side == int(number):
        return square
    picture = Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())
    resized = picture.resize((int(number), int(number)), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_clean(image: Tensor, size: int) -> Tensor:
    """A uint8 image (3, H, W) as float32 (3, size, size) in [0, 255]: PIL's antialiased bicubic, channel by channel.

    In float32 and without rounding, as Parmar et al. 2022 ("clean-fid") found necessary.
    """
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized).clip(0, 255))


def resize_tf1(image: Tensor, size: int) -> Tensor:
    """A uint8 image (3, H, W) as float32 (3, size, size): bilinear as TensorFlow 1 has it.

    Without antialias, and corner pixels are not aligned: source = target * H / size. Source row and weight are
    computed in float32, as the original does, so that ties fall the same way.
    """
    x = image.float()
    for axis in (1, 2):
        length = x.shape[axis]
        source = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
        low = source.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (source - low).view(-1, 1) if axis == 1 else source - low
        below, above = x.index_select(axis, low), x.index_select(axis, high)
        x = below + (above - below) * weight
    return x
