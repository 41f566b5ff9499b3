"""Samples as their readers give them: a caption, perhaps an image that is still a file, or what is wrong with them;
and the count of those that cannot be used."""

import io
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import Image

from stepdistill.data.places import inside, opened
from stepdistill.errors import InputError
from stepdistill.progress import say

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
"""Endings of the pictures that are read; .avif by a Pillow that was built with it."""
VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}
READY = ".safetensors"
"""The ending of latents that were made ahead."""
KINDS = (SUFFIXES, VIDEOS, SOUNDS, {READY})
"""Endings of samples by kind; a source that has several gives those of the first."""
CAPTION_KEYS = ("caption", "text", "prompt")
# What opening and decoding a picture raises.
UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError)
IMAGE_KEYS = ("image", "video", "audio", "file_name", "image_path", "mp4", "wav", "path", "jpg", "png", "webp")
# Rejections are held against the limit from this many samples on, so that a wrong key stops a long read early.
FIRST_LOOK = 100
# Examples in a line.
SHOWN = 3

Pictures = dict[str, Image.Image]
"""A sample's own pictures, RGB, by the arguments of the pipeline's call that they are for."""


class Data(Protocol):
    """The recipe's section ``data``, which says what each key is (:class:`stepdistill.recipe.schema.Data`)."""

    conditions: str | list[str]
    images: str | None
    caption_key: str | None
    image_key: str | None
    arguments: dict[str, str]
    frame_rate: float | None
    limit: int | None
    max_rejected: float


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


def first_key(requested: str | None, usual: Sequence[str], present: Container[str]) -> str | None:
    """``requested`` if it is present; without a request the first usual name that is."""
    return next((key for key in ((requested,) if requested else usual) if key in present), None)


def json_sample(
    text: bytes, name: str, caption_key: str | None, image_key: str | None = None, folder: str | None = None
) -> Sample:
    """A sample from a JSON object; with a ``folder`` its image is a path, relative to that, or a URL."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Sample(name, problem=f"not JSON: {error}")
    if not isinstance(entry, dict):
        return Sample(name, problem="not a JSON object")
    return entry_sample(entry, name, caption_key, image_key, folder)


def entry_sample(
    entry: Mapping[str, Any], name: str, caption_key: str | None, image_key: str | None, folder: str | None
) -> Sample:
    """A sample from an object's keys or a row's columns; see :func:`json_sample`."""
    key = first_key(caption_key, CAPTION_KEYS, entry)
    if key is None:
        expected = caption_key or " or ".join(CAPTION_KEYS)
        return Sample(name, problem=f"no key {expected}: it has {', '.join(entry) or 'none'}")
    caption, problem = text_of(entry[key], key)

    def other(key: str) -> BinaryIO:
        return opened(inside(folder or "", entry[key]))

    path = entry.get(first_key(image_key, IMAGE_KEYS, entry)) if folder is not None else None
    image = partial(opened, inside(folder or "", path)) if path and isinstance(path, str) else None
    return Sample(name, caption, image, problem, other)


def decoded(text: bytes) -> tuple[str | None, str]:
    """(a caption, what is wrong with it) of a text file's content."""
    try:
        return text.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError:
        return None, "caption that is not UTF-8"


def in_memory(data: bytes) -> Callable[[], BinaryIO]:
    """Opens ``data`` as a file."""
    return lambda: io.BytesIO(data)


class Tally:
    """Counts samples read and rejected, logs the counts once, and stops past the limit.

    Args:
        key: the recipe's key, for messages.
        limit: the share of samples that may be rejected.
    """

    def __init__(self, key: str, limit: float):
        self.key, self.limit = key, limit
        self.clear()

    def clear(self) -> None:
        """Count from nothing again."""
        self.read, self.reasons, self.example = 0, {}, ""
        self.notes: dict[str, tuple[int, list[str]]] = {}

    def accepts(self, sample: Sample) -> bool:
        """Count a sample; whether it has a caption and no problem so far.

        Raises:
            InputError: too many have been rejected.
        """
        self.read += 1
        problem = sample.problem or ("no caption" if sample.caption is None else "empty caption")
        if sample.problem or not sample.caption:
            self.reject(sample, problem)
            return False
        for kind, example in sample.notes.items():
            self._note(kind, 1, [example])
        return True

    def note(self, sample: Sample, *kinds: str) -> None:
        """Count a sample, already counted as read, as one of which something was changed."""
        for kind in kinds:
            self._note(kind, 1, [Path(sample.name).name])

    def _note(self, kind: str, count: int, examples: list[str]) -> None:
        before, known = self.notes.get(kind, (0, []))
        self.notes[kind] = before + count, list(dict.fromkeys([*known, *examples]))[: SHOWN + 1]

    def facts(self) -> dict[str, Any]:
        """What was counted, as JSON."""
        return {"read": self.read, "reasons": self.reasons, "example": self.example, "notes": self.notes}

    def add(self, facts: Mapping[str, Any]) -> None:
        """Count what another tally, :meth:`facts`, has counted of the samples that follow.

        Raises:
            InputError: too many have been rejected.
        """
        self.read += facts["read"]
        for kind, count in facts["reasons"].items():
            self.reasons[kind] = self.reasons.get(kind, 0) + count
        self.example = self.example or facts["example"]
        for kind, (count, examples) in facts["notes"].items():
            self._note(kind, count, examples)
        if facts["reasons"] and self.read >= FIRST_LOOK:
            self._check()

    def reject(self, sample: Sample, reason: str) -> None:
        """Count a sample, already counted as read, as one that cannot be used."""
        # What follows a colon belongs to this one sample.
        kind = reason.partition(": ")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        self.example = self.example or f"{sample.name} ({reason})"
        if self.read >= FIRST_LOOK:
            self._check()

    def close(self, log: bool = True) -> None:
        """The source has been read; ``log``: log how many samples were rejected and what was changed.

        Raises:
            InputError: too many were rejected, or there was nothing.
        """
        self._check()
        if not log:
            return
        if self.reasons:
            say(f"{self.key}: {self._rejected()}")
        for kind, (count, different) in self.notes.items():
            listing = ", ".join(different[:SHOWN]) + ", ..." * (len(different) > SHOWN)
            say(f"{self.key}: {kind}: {count} of {self.read} ({listing})")

    def _check(self) -> None:
        rejected = sum(self.reasons.values())
        if rejected > self.limit * self.read:
            raise InputError(f"{self.key}: {self._rejected()}; more than data.max_rejected, {self.limit:g}")

    def _rejected(self) -> str:
        reasons = ", ".join(f"{number} {kind}" for kind, number in self.reasons.items())
        rejected = sum(self.reasons.values())
        return f"{rejected} of {self.read} samples rejected ({reasons}), the first: {self.example}"
