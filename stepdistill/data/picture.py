"""One way to read a picture file: for real images, for pictures of the samples' own, and for examples in a recipe."""

from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from stepdistill.data.sample import UNREADABLE

ON_WHITE = "transparent parts are put on white"
FROM_16_BITS = "16 bits a channel are scaled to 8"
FIRST_FRAME = "the first frame is taken of pictures with several"

_PROPERTIES = {ON_WHITE: "transparent parts", FROM_16_BITS: "16 bits"}
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def read(file: BinaryIO | Path, mode: Literal["RGB", "L"] = "RGB") -> tuple[Image.Image, list[str]]:
    """A picture, upright and opaque with 8 bits a channel, and what was changed that its owner should know.

    EXIF orientation is applied. 16-bit grey is scaled, 65535 becomes 255. Transparent parts are put on white.

    Raises:
        One of UNREADABLE: no picture, or one of floating-point or 32-bit numbers, whose range no file states.
    """
    notes = []
    with Image.open(file) as opened:
        # Phones write a second, small picture into MPO files; that is no animation.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            notes.append(FIRST_FRAME)
        image, form = ImageOps.exif_transpose(opened), opened.format
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow before 11 opens 16-bit PNG as "I", and every Pillow such PPM.
        if not (image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM"))):
            raise ValueError(f"pixels of Pillow's mode {image.mode} have no stated range; save it with 8 or 16 bits")
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        notes.append(FROM_16_BITS)
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            notes.append(ON_WHITE)
    return image.convert(mode), notes


def misread(file: Path) -> str:
    """Why a picture cannot be an example in ``teacher.arguments``; nothing where it can.

    Exports are called with what diffusers' ``load_image`` reads, which clips 16 bits and ignores transparency.
    """
    try:
        image, notes = read(file)
        with Image.open(file) as opened:
            stock = ImageOps.exif_transpose(opened).convert("RGB")
    except UNREADABLE as error:
        return f"expected a picture that can be read ({error})"
    if ImageChops.difference(image, stock).getbbox() is None:
        return ""
    kind = " and ".join(_PROPERTIES[note] for note in notes if note in _PROPERTIES)
    return f"expected an opaque picture of 8 bits a channel, as load_image of diffusers misreads {kind}"


def middle(image: Image.Image, like: tuple[int, int] | None = None) -> Image.Image:
    """The middle square of a picture; of one with other proportions than a size ``like`` the whole picture."""
    if like is not None and abs(image.width * like[1] - image.height * like[0]) > max(*image.size, *like):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def scaled(square: Image.Image, channels: int, size: int) -> Tensor:
    """A square picture as uint8 (channels, size, size)."""
    image = square.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1)
