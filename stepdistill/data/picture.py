"""One way to read a picture file: for real images, for pictures of the samples' own, and for examples in a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from stepdistill.data.sample import UNREADABLE

if TYPE_CHECKING:
    from torch import Tensor

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
    try:
        whole = Image.open(file)
    except UnidentifiedImageError:  # whose own message names the object in memory, another one each time
        raise UnidentifiedImageError("cannot identify image file") from None
    with whole as opened:
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
    image, transparent = opaque(image)
    notes += [ON_WHITE] * transparent
    return image.convert(mode), notes


def opaque(image: Image.Image) -> tuple[Image.Image, bool]:
    """A picture with its transparent parts on white, and whether it has any."""
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image, False
    image = image.convert("RGBA")
    if np.asarray(image.getchannel("A")).min() == 255:
        return image, False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image), True


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


def middle(image: Image.Image, like: tuple[int, int] | None = None, size: Sequence[int] = (1, 1)) -> Image.Image:
    """The middle part with the proportions of ``size`` (height, width); of a picture with other proportions than those
    of another one's width and height, ``like``, the whole picture."""
    if like is not None and abs(image.width * like[1] - image.height * like[0]) > max(*image.size, *like):
        return image
    return cut(image, size)


def cut(image: Image.Image, size: Sequence[int], place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The largest part of a picture with the proportions of ``size`` (height, width).

    Args:
        place: where the part lies across and down, 0 to 1; the default is the middle.
    """
    height, width = size
    if image.width * height >= image.height * width:
        part = round(image.height * width / height), image.height
    else:
        part = image.width, round(image.width * height / width)
    left, top = (int(at * (whole - of)) for at, whole, of in zip(place, image.size, part, strict=True))
    return image.crop((left, top, left + part[0], top + part[1]))


def scaled(image: Image.Image, channels: int, height: int, width: int) -> "Tensor":
    """A picture as uint8 (channels, height, width)."""
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    import torch  # seconds, which a recipe with a wrong key must not wait for

    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


def upright_size(file: BinaryIO | Path) -> tuple[int, int]:
    """Width and height of a picture as :func:`read` gives it, without its pixels.

    Raises:
        One of UNREADABLE: it is no picture.
    """
    with Image.open(file) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return opened.size[::-1] if turned else opened.size
