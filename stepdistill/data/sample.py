"""Samples as their readers give them: a caption, perhaps an image that is still a file, or what is wrong with them."""

import io
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
"""Endings of the pictures that are read; .avif by a Pillow that was built with it."""
CAPTION_KEYS = ("caption", "text", "prompt")
# What opening and decoding a picture raises.
UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)
IMAGE_KEYS = ("image", "file_name", "image_path", "path", "jpg", "png", "webp")

Pictures = dict[str, Image.Image]
"""A sample's own pictures, RGB, by the arguments of the pipeline's call that they are for."""


def _no_other(key: str) -> BinaryIO:
    raise KeyError(key)


@dataclass(frozen=True)
class Sample:
    """One sample of a source.

    Args:
        name: where it is, for messages.
        caption: its text; None if it has none.
        image: opens the image's file; None if it has none.
        problem: why it cannot be used, if that shows by now.
        other: opens the picture under a key; KeyError: there is none.
        notes: what a person should know of how the caption was found, and the example to show.
    """

    name: str
    caption: str | None = None
    image: Callable[[], BinaryIO] | None = None
    problem: str = ""
    other: Callable[[str], BinaryIO] = _no_other
    notes: Mapping[str, str] = field(default_factory=dict)


def text_of(value: Any, key: str) -> tuple[str | None, str]:
    """(a caption, what is wrong with it) of the value under ``key``."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip(), ""
    return None, f"{key} is {type(value).__name__}, expected text"


def first_key(wanted: str | None, usual: Sequence[str], present: Container[str]) -> str | None:
    """``wanted`` if it is present, else (where nothing is wanted) the first usual name that is."""
    return next((key for key in ((wanted,) if wanted else usual) if key in present), None)


def json_sample(
    text: bytes, name: str, caption_key: str | None, image_key: str | None = None, folder: Path | None = None
) -> Sample:
    """A sample from a JSON object; with a ``folder`` its image is a path, relative to that."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Sample(name, problem=f"not JSON: {error}")
    if not isinstance(entry, dict):
        return Sample(name, problem="not a JSON object")
    key = first_key(caption_key, CAPTION_KEYS, entry)
    if key is None:
        wanted = caption_key or " or ".join(CAPTION_KEYS)
        return Sample(name, problem=f"no key {wanted}: it has {', '.join(entry) or 'none'}")
    caption, problem = text_of(entry[key], key)
    path = entry.get(first_key(image_key, IMAGE_KEYS, entry)) if folder else None
    image = partial(open, folder / path, "rb") if isinstance(path, str) else None
    return Sample(name, caption, image, problem, lambda key: open((folder or Path()) / entry[key], "rb"))


def decoded(text: bytes) -> tuple[str | None, str]:
    """(a caption, what is wrong with it) of a text file's content."""
    try:
        return text.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError:
        return None, "caption that is not UTF-8"


def in_memory(data: bytes) -> Callable[[], BinaryIO]:
    """Opens ``data`` as a file."""
    return lambda: io.BytesIO(data)
